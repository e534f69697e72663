"""What the basis of a matrix costs and how exact it is, against a singular value decomposition by torch."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from t2app.bench.composed import Factors, factors_of
from t2app.bench.figure import Figure, figure_of, seconds
from t2app.models.model import load_model
from t2app.spectral import Basis, basis_of, linear_layer
from t2app.spectral.layer_paths import block_linear_paths, is_mlp_path

# The MLP of an 8B Llama or Mistral; on a CPU one of its decompositions takes minutes.
_SHAPES = {"cuda": ((14336, 4096), (4096, 14336)), "cpu": ((4096, 1024),)}
_OWN, _RANDOM = 5, 3


def bench_basis(model_name: str, precision: str) -> Iterator[Figure]:
    """The basis of matrices against `torch.linalg.svd` in float32, a pair on each matrix, by the matrices' shape.

    The matrices are those of the model's MLP from blocks all over it, and larger ones of random numbers: as large as an
    8B model's on a GPU. The errors are max |VᵀV − I|, and that of an edit W' − W over the edit (Frobenius norms), for
    one matrix a shape: ours, and `svd_edit_error` of the float32 decomposition, both against one in float64.

    Raises:
        ValueError: the model's weights are packed, as in 8 or 4 bits.
    """
    model = load_model(model_name, precision, layers=lambda path: False).adapted.model
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for path in block_linear_paths(model, is_mlp_path):
        weight = linear_layer(model, path).weight.detach()
        if not weight.is_floating_point():
            raise ValueError("a basis is computed of whole weights; leave --precision out, or give bf16 or fp32")
        by_shape.setdefault(tuple(weight.shape), []).append(weight)
    for weights in by_shape.values():
        yield from _figures(weights[:: -(-len(weights) // _OWN)])
    generator = torch.Generator().manual_seed(0)
    for shape in _SHAPES[model.device.type]:
        yield from _figures([torch.randn(shape, generator=generator).to(model.device) for _ in range(_RANDOM)])


def _figures(weights: Sequence[Tensor]) -> Iterator[Figure]:
    """The figures for matrices of one shape."""
    wait = torch.cuda.synchronize if weights[0].is_cuda else lambda: None
    basis_of(weights[0]), factors_of(weights[0])  # the first of each is not counted: it warms up
    pairs = [
        (_seconds(partial(basis_of, weight), wait), _seconds(partial(factors_of, weight), wait)) for weight in weights
    ]
    wide = weights[0].double()
    delta = 0.1 * torch.randn(min(wide.shape), generator=torch.Generator().manual_seed(0)).to(wide)
    expected = _edit_by_factors(Factors(*torch.linalg.svd(wide, full_matrices=False)), delta)
    edits = _edit_by_basis(wide, basis_of(weights[0]), delta), _edit_by_factors(factors_of(weights[0].float()), delta)
    edit_error, svd_edit_error = (float((edit - expected).norm() / expected.norm()) for edit in edits)
    out_features, in_features = wide.shape
    for figure, values, unit in (
        ("basis", [ours for ours, _ in pairs], "s"),
        ("svd", [theirs for _, theirs in pairs], "s"),
        ("svd_over_basis", [theirs / ours for ours, theirs in pairs], "ratio"),
        ("orthogonality_error", [orthogonality_error(basis_of(weight)) for weight in weights], "max |VᵀV − I|"),
        ("edit_error", [edit_error], "of the edit"),
        ("svd_edit_error", [svd_edit_error], "of the edit"),
    ):
        yield figure_of("basis", f"{figure}_{out_features}x{in_features}", values, unit)


def _seconds(run: Callable[[], object], wait: Callable[[], None]) -> float:
    wait()
    return seconds(lambda: (run(), wait()))


def orthogonality_error(basis: Basis) -> float:
    """max |VᵀV − I| of a basis's vectors V, in float64 so that only the basis errs."""
    vectors = basis.vectors.double()
    return float((vectors.T @ vectors - torch.eye(basis.rank).to(vectors)).abs().max())


def _edit_by_basis(weight: Tensor, basis: Basis, delta: Tensor) -> Tensor:
    """W' − W as an adapted layer has it: W V diag(z − 1) Vᵀ, or U diag(z − 1) Uᵀ W."""
    vectors = basis.vectors.to(weight)
    edit = (vectors * delta) @ vectors.T
    return weight @ edit if basis.edits_input else edit @ weight


def _edit_by_factors(factors: Factors, delta: Tensor) -> Tensor:
    """W' − W = U diag(σ ⊙ (z − 1)) Vᵀ."""
    u, s, vt = (factor.to(delta) for factor in factors)
    return (u * (s * delta)) @ vt
