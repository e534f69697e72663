"""The authors' way to adapt a layer, to measure ours against: its weight composed anew of its singular directions."""

from typing import NamedTuple

import torch
from torch import Tensor


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
            "the authors' way writes into the weights, which in 4-bit are packed; measure it with --precision bf16"
        )
    u, s, vt = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    return Factors(u.to(weight.dtype), s, vt.to(weight.dtype))


def compose(factors: Factors, delta: Tensor) -> Tensor:
    """W' = U diag(σ ⊙ z) Vᵀ (out, in) for z − 1 as (rank,); differentiable in it."""
    return (factors.u * (factors.s * (1 + delta)).to(factors.u.dtype)) @ factors.vt
