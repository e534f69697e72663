"""The authors' way to adapt a layer, to measure ours against: its weight composed anew of its singular directions."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from t2app.spectral import Deltas, linear_layer


class Factors(NamedTuple):
    """Singular value decomposition of a weight: `u` (out, rank), `vt` (rank, in) in its dtype, `s` (rank,) in fp32."""

    u: Tensor
    s: Tensor
    vt: Tensor


def factors_of(weight: Tensor) -> Factors:
    """The factors of a weight (out, in).

    Raises:
        ValueError: it is packed, and no W' can be written into it.
    """
    if not weight.is_floating_point():
        raise ValueError(
            "the authors' way writes into the weights, which in 8-bit and 4-bit are packed; measure it with "
            "--precision bf16"
        )
    u, s, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return Factors(u.to(weight.dtype), s, vt.to(weight.dtype))


def compose(factors: Factors, delta: Tensor) -> Tensor:
    """W' = U diag(σ ⊙ z) Vᵀ (out, in) for z − 1 as (rank,); differentiable in it."""
    return (factors.u * (factors.s * (1 + delta)).to(factors.u.dtype)) @ factors.vt


class ComposedWeights:
    """The weights of a model's linear layers, into which a mixture is written; their own are kept beside.

    Args:
        paths: of the layers.

    Raises:
        ValueError: a weight is packed.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]):
        self._weights = {path: linear_layer(model, path).weight for path in paths}
        self._factors = {path: factors_of(weight) for path, weight in self._weights.items()}
        self._own = {path: weight.detach().clone() for path, weight in self._weights.items()}

    @torch.no_grad()
    def write(self, mixture: Deltas | None) -> None:
        """Write W' into every layer that the mixture adapts, and into the others their own weights; None: into all."""
        for path, weight in self._weights.items():
            delta = (mixture or {}).get(path)
            weight.copy_(self._own[path] if delta is None else compose(self._factors[path], delta.to(weight.device)))
