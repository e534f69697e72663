"""Spectral edits of a layer's narrow side as products of torch's, for any precision and device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from t2app.kernels.build import has_bfloat16_arithmetic


def edited(side: Tensor, rows: slice | Tensor, vectors: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """A layer's narrow side with some rows edited: s + V((z − 1) ⊙ Vᵀ(s − bias)), the other rows as they are.

    Args:
        side: (rows, tokens, narrow).
        rows: the rows to edit, as an index.
        vectors: Vᵀ (rank, narrow), a singular vector a row.
        delta: z − 1 (1 or edited rows, rank) in float32.
        bias: (narrow,), what of `side` is no part of the product that the edit is for.
    """
    before = side[rows]
    # A CPU without 16-bit arithmetic is quicker by way of float32, whose copies a gradient would have to keep.
    gradient = torch.is_grad_enabled() and (side.requires_grad or delta.requires_grad)
    if side.dtype == torch.bfloat16 and side.device.type == "cpu" and not has_bfloat16_arithmetic() and not gradient:
        before, vectors = before.float(), vectors.float()
    return with_rows(side, rows, _edit(before if bias is None else before - bias, vectors, delta))


def _edit(side: Tensor, vectors: Tensor, delta: Tensor) -> Tensor:
    coordinates = F.linear(side, vectors) * delta[:, None, :]  # (rows, tokens, rank)
    return coordinates.to(side.dtype) @ vectors


def with_rows(side: Tensor, rows: slice | Tensor, change: Tensor) -> Tensor:
    """`side` with `change` added to its rows; what the other rows hold is copied bit for bit."""
    if len(change) == len(side):
        return (side + change).to(side.dtype)
    side = side.clone()
    side[rows] += change
    return side


def has_products_of_many_rows(weight: Tensor) -> bool:
    """Whether torch's own product of many rows by a weight is a good one: of floats, and not one row at a time."""
    if not weight.dtype.is_floating_point or weight.device.type == "meta":
        return False
    return weight.dtype == torch.float32 or weight.device.type != "cpu" or has_bfloat16_arithmetic()
