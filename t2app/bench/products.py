"""What one product with the model's widest layer costs, in each way that there is on this machine."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.models import load_model
from t2app.products import FastLinear
from t2app.spectral import block_linear_paths, linear_layer

_ROWS = (1, 2, 4, 8, 16, 90)
_PRODUCTS = 200


def bench_products(model_name: str, precision: str) -> Iterator[Figure]:
    """A product with the model's widest layer, in each way that there is on this machine, for few rows and many.

    `kernel` is ours (bf16, few rows), `bf16` and `fp32` are torch's. What is best here decides nothing by itself: the
    choices are in `products.py` and `models.resolve_precision`, and this is what they were made on.

    Raises:
        ValueError: a precision is given that leaves nothing to compare.
    """
    if precision == "fp32":
        raise ValueError("the bench 'products' compares bf16 with fp32 by itself; leave --precision out")
    model = load_model(model_name, "bf16", layers=lambda path: False).adapted.model
    layers = [linear_layer(model, path) for path in block_linear_paths(model)]
    weight = max((layer.weight for layer in layers), key=torch.Tensor.numel).detach()
    wide = weight.float()
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "bf16": lambda x: F.linear(x, weight),
        "fp32": lambda x: F.linear(x.float(), wide),
    }
    if any(isinstance(layer, FastLinear) for layer in layers):
        ways["kernel"] = lambda x: torch.ops.t2app.few_rows_linear(x, weight, None)
    for rows in _ROWS:
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        for name, multiply in ways.items():
            multiply(x)
            values = [1e3 * seconds(partial(multiply, x)) for _ in range(_PRODUCTS)]
            yield figure_of("products", f"{name}_{rows}_rows", values, "ms")
