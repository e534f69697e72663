"""What the products of a decoding step cost, in each way that there is on this machine."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.kernels.build import has_kernels, has_tiles
from t2app.kernels.edits import MatrixEdit, VectorEdit
from t2app.kernels.linear import Kind
from t2app.models.catalogue import EIGHT_BIT
from t2app.models.model import load_model
from t2app.spectral import SpectralLinear
from t2app.spectral.products import edited

_ROWS = (1, 2, 3, 4, 6, 7, 8, 16, 64, 96, 128, 256, 384)
_STEPS = 5


def bench_products(model_name: str, precision: str) -> Iterator[Figure]:
    """One product with every layer of the model's blocks, so that weights come from memory as in a step.

    `few`, `many` and `tiles` are our kernels, `bf16` and `fp32` are torch's, the latter with a float32 copy of the
    weight that lives for one product, as both have a copy of one in 8 bits. Those with `edit` edit the last half of the
    rows, each by a z of its own, those with `all` all of them; `factors` does that too, by the weight in the basis.
    Those with `matrix` edit the last half by the matrix of one z. What is best here decides nothing: the choices are in
    `spectral/layer.py`, `kernels/linear.py`, `kernels/byte_linear.py` and `resolve_precision`, made on this.

    Raises:
        ValueError: a precision is given that leaves nothing to compare.
    """
    if precision not in ("auto", "bf16", EIGHT_BIT):
        raise ValueError("the bench 'products' compares bf16 with fp32 by itself; give --precision 8bit, or none")
    held_in = EIGHT_BIT if precision == EIGHT_BIT else "bf16"
    layers = list(load_model(model_name, held_in, many_rows=True, layers=lambda path: True).adapted.layers.values())
    ways = {"bf16": _bf16, "fp32": _fp32, "bf16_edit": _bf16_edit}
    if layers[0].in_basis is not None:
        ways["factors"] = _factors
    if has_kernels():
        for kind in Kind if has_tiles() else (Kind.FEW, Kind.MANY):
            name = kind.name.lower()
            ways[name] = partial(_kernel, kind)
            ways[f"{name}_edit"] = partial(_kernel_edit, kind, _last_half)
            ways[f"{name}_all"] = partial(_kernel_edit, kind, _all_rows)
            ways[f"{name}_matrix"] = partial(_kernel_matrix, kind)
    generator = torch.Generator().manual_seed(0)
    for rows in _ROWS:
        inputs = [torch.randn(rows, 1, layer.base.in_features, generator=generator).bfloat16() for layer in layers]
        deltas = [torch.randn(rows, layer.rank, generator=generator) / 20 for layer in layers]
        for name, prepare in ways.items():
            products = [prepare(layer, delta) for layer, delta in zip(layers, deltas, strict=True)]
            step = partial(_all, products, inputs)
            step()
            values = [1e3 * seconds(step) for _ in range(_STEPS)]
            yield figure_of("products", f"{name}_{rows}_rows", values, "ms")


@torch.inference_mode()
def _all(products: list[Callable[[Tensor], Tensor]], inputs: list[Tensor]) -> None:
    for product, x in zip(products, inputs, strict=True):
        product(x)


def _bf16(layer: SpectralLinear, delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, layer.base.whole_weight)


def _fp32(layer: SpectralLinear, delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x.float(), layer.base.whole_weight.float())


def _bf16_edit(layer: SpectralLinear, delta: Tensor) -> Callable[[Tensor], Tensor]:
    rows, delta = _last_half(delta)
    if layer.edits_input:
        return lambda x: F.linear(edited(x, rows, layer.vectors, delta), layer.base.whole_weight)
    return lambda x: edited(F.linear(x, layer.base.whole_weight), rows, layer.vectors, delta)


def _factors(layer: SpectralLinear, delta: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: layer.by_factors(x, delta)


def _kernel(kind: Kind, layer: SpectralLinear, delta: Tensor) -> Callable[[Tensor], Tensor]:
    return layer.base.kernel(kind)


def _kernel_edit(
    kind: Kind, edited_rows: Callable[[Tensor], tuple[slice, Tensor]], layer: SpectralLinear, delta: Tensor
) -> Callable[[Tensor], Tensor]:
    kernel, edit = layer.base.kernel(kind), VectorEdit(layer.packed, layer.edits_input, *edited_rows(delta))
    return lambda x: kernel(x, edit)


def _kernel_matrix(kind: Kind, layer: SpectralLinear, delta: Tensor) -> Callable[[Tensor], Tensor]:
    rows, delta = _last_half(delta)
    kernel, edit = layer.base.kernel(kind), MatrixEdit(layer.matrix(delta[0]), layer.edits_input, rows)
    return lambda x: kernel(x, edit)


def _all_rows(delta: Tensor) -> tuple[slice, Tensor]:
    """All of the rows, and their z − 1."""
    return slice(0, len(delta)), delta


def _last_half(delta: Tensor) -> tuple[slice, Tensor]:
    """The last half of the rows, of which one is edited at least, and their z − 1."""
    first = len(delta) // 2
    return slice(first, len(delta)), delta[first:]
