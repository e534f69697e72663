"""What the products of a decoding step cost, in each way that there is on this machine."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.kernels import FastLinear, has_bfloat16_arithmetic
from t2app.models import load_model
from t2app.products import edited
from t2app.spectral import SpectralLinear

_ROWS = (1, 2, 4, 8, 12, 16, 32, 64, 90)
_STEPS = 10


def bench_products(model_name: str, precision: str) -> Iterator[Figure]:
    """One product with every layer of the model's blocks, so that weights come from memory as in a step.

    `few` and `dot` are our kernels, `bf16` and `fp32` are torch's, the latter with a float32 copy of the weight that
    lives for one product. Those with `edit` edit the last half of the rows, each by a z of its own. What is best here
    decides nothing by itself: the choices are in `kernels/linear.py` and `models.resolve_precision`, made on this.

    Raises:
        ValueError: a precision is given that leaves nothing to compare.
    """
    if precision == "fp32":
        raise ValueError("the bench 'products' compares bf16 with fp32 by itself; leave --precision out")
    layers = list(load_model(model_name, "bf16", layers=lambda path: True).adapted.layers.values())
    ways = {"bf16": _bf16, "fp32": _fp32, "bf16_edit": _bf16_edit}
    if any(isinstance(layer.base, FastLinear) for layer in layers):
        ways |= {"few": _few, "few_edit": _few_edit}
        if has_bfloat16_arithmetic():
            ways |= {"dot": _dot, "dot_edit": _dot_edit}
    generator = torch.Generator().manual_seed(0)
    for rows in _ROWS:
        inputs = [torch.randn(rows, 1, layer.base.in_features, generator=generator).bfloat16() for layer in layers]
        count = rows - rows // 2
        deltas = [torch.randn(count, len(layer.vectors), generator=generator) / 20 for layer in layers]
        for name, multiply in ways.items():
            step = partial(_all, multiply, layers, inputs, deltas)
            step()
            values = [1e3 * seconds(step) for _ in range(_STEPS)]
            yield figure_of("products", f"{name}_{rows}_rows", values, "ms")


@torch.inference_mode()
def _all(multiply: Callable, layers: list[SpectralLinear], inputs: list[Tensor], deltas: list[Tensor]) -> None:
    for layer, x, delta in zip(layers, inputs, deltas, strict=True):
        multiply(layer, x, delta)


def _bf16(layer: SpectralLinear, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x, layer.base.weight)


def _fp32(layer: SpectralLinear, x: Tensor, _: Tensor) -> Tensor:
    return F.linear(x.float(), layer.base.weight.float())


def _few(layer: SpectralLinear, x: Tensor, _: Tensor) -> Tensor:
    return torch.ops.t2app.few_rows_linear(x, layer.base.weight, None)


def _dot(layer: SpectralLinear, x: Tensor, _: Tensor) -> Tensor:
    return torch.ops.t2app.dot_linear(x, layer.base.weight, None)


def _bf16_edit(layer: SpectralLinear, x: Tensor, delta: Tensor) -> Tensor:
    rows = _last(x, delta)
    if layer.edits_input:
        return F.linear(edited(x, rows, layer.vectors, delta), layer.base.weight)
    return edited(F.linear(x, layer.base.weight), rows, layer.vectors, delta)


def _few_edit(layer: SpectralLinear, x: Tensor, delta: Tensor) -> Tensor:
    rows, edit = _last(x, delta), (*layer.packed, layer.edits_input, delta)
    return torch.ops.t2app.few_rows_adapted(x, layer.base.weight, None, *edit, rows.start, rows.stop - rows.start)


def _dot_edit(layer: SpectralLinear, x: Tensor, delta: Tensor) -> Tensor:
    rows, edit = _last(x, delta), (layer.vectors, layer.edits_input, delta)
    return torch.ops.t2app.dot_adapted(x, layer.base.weight, None, *edit, rows.start, rows.stop - rows.start)


def _last(x: Tensor, delta: Tensor) -> slice:
    return slice(len(x) - len(delta), len(x))
