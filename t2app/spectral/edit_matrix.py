"""Spectral edits of single tokens on a GPU: as one product with a matrix, by a kernel in Triton.

While a mixture stays the same, x + V((z − 1) ⊙ Vᵀx) is x + Ex with E = V diag(z − 1) Vᵀ. One operation takes the place
of two products that wait for each other and of what goes on around them, and E in 8 bits is half of V in bfloat16. It
is worth while for the steps of an answer alone, since the matrices have to be made. torch has no product with such
integers on a GPU that leaves some rows as they are.
"""

from functools import cache, partial
from subprocess import SubprocessError
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.errors import TritonError

# Of the matrix, by one program: so many of its rows, in parts of so many entries at most.
_ROWS, _ENTRIES, _WARPS = 4, 4096, 8
# Several times what rounding to bfloat16 does, of a product's norm.
_TOLERANCE = 0.02


class EditMatrix(NamedTuple):
    """E = V diag(z − 1) Vᵀ (narrow, narrow) in 8 bits: diag(diagonal) + diag(scales) · integers.

    The diagonal is apart, since it holds what all z have in common, which is many times any other entry.

    Attributes:
        integers: (narrow, narrow) int8.
        scales: (narrow,) float32, of each row.
        diagonal: (narrow,) float32.
    """

    integers: Tensor
    scales: Tensor
    diagonal: Tensor

    def edited(self, side: Tensor, rows: slice, bias: Tensor | None = None) -> Tensor:
        """A layer's narrow side with some rows edited: s + E(s − bias), the other rows bit for bit as they are.

        Args:
            side: (rows, 1, narrow), a token of each row.
            rows: the rows to edit.
            bias: (narrow,), what of `side` is no part of the product that the edit is for.
        """
        side = side.contiguous()
        count, _, narrow = side.shape
        result = torch.empty_like(side)
        entries = min(_ENTRIES, triton.next_power_of_2(narrow))
        grid = (triton.cdiv(narrow, _ROWS), count)
        _edited[grid](
            side,
            bias,
            *self,
            result,
            rows.start,
            rows.stop,
            narrow,
            bias is not None,
            narrow % _ROWS == 0 and narrow % entries == 0,
            _ROWS,
            entries,
            num_warps=_WARPS,
        )
        return result


@cache
def why_not(narrow: int, biased: bool, device: torch.device) -> str | None:
    """Why sides of this width, of layers with or without a bias, are not edited by matrices there; None where they can.

    The kernel is compiled by what the user's machine has for it, and is used only where it gives what torch gives.
    """
    normal = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    side, bias = normal(2, 1, narrow).bfloat16(), normal(narrow).bfloat16()
    integers = normal(narrow, narrow).mul_(32).to(torch.int8)
    scales, diagonal = normal(narrow) / 32, normal(narrow)
    x = (side[1, 0].float() - bias.float()) if biased else side[1, 0].float()
    expected = side[1, 0] + integers.float() @ x * scales + diagonal * x
    try:
        result = EditMatrix(integers, scales, diagonal).edited(side, slice(1, 2), bias if biased else None)
    except (TritonError, RuntimeError, OSError, SubprocessError) as error:  # it needs a C compiler too
        return str(error)
    error = float((result[1, 0] - expected).norm() / expected.norm())
    if error <= _TOLERANCE and torch.equal(result[0], side[0]):
        return None
    return f"a kernel gave another product than torch, by {error:.0%}"


def edit_matrix(vectors: Tensor, delta: Tensor) -> EditMatrix:
    """The matrix of singular vectors (rank, narrow), one a row, and z − 1 (rank,)."""
    matrix = ((vectors * delta[:, None]).to(vectors.dtype).T @ vectors).float()
    diagonal = matrix.diagonal().clone()
    matrix.fill_diagonal_(0)
    scales = matrix.abs().amax(1) / torch.iinfo(torch.int8).max
    return EditMatrix(matrix.div_(scales[:, None]).nan_to_num_().round_().to(torch.int8), scales, diagonal)


@triton.jit
def _loaded(pointers, inside, whole: tl.constexpr):
    """What lies there, and 0 where nothing is inside; where the whole side fits, it is read without a mask."""
    if whole:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=inside, other=0)


@triton.jit(do_not_specialize=["start", "stop"])
def _edited(
    side,
    bias,
    integers,
    scales,
    diagonal,
    result,
    start,
    stop,
    narrow: tl.constexpr,
    has_bias: tl.constexpr,
    whole: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """A program makes some entries of one of the side's rows, with as many rows of the matrix."""
    row = tl.program_id(1)
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = places < narrow
    side += row * narrow
    value = _loaded(side + places, there, whole).to(tl.float32)
    if (row >= start) & (row < stop):
        sums = tl.zeros((ROWS, ENTRIES), tl.float32)
        for first in tl.static_range(0, narrow, ENTRIES):
            entries = first + tl.arange(0, ENTRIES)
            inside = entries < narrow
            part = _loaded(
                integers + places[:, None] * narrow + entries[None, :], there[:, None] & inside[None, :], whole
            )
            x = _loaded(side + entries, inside, whole).to(tl.float32)
            if has_bias:
                x -= _loaded(bias + entries, inside, whole).to(tl.float32)
            sums += part.to(tl.float32) * x[None, :]
        own = value
        if has_bias:
            own -= _loaded(bias + places, there, whole).to(tl.float32)
        change = tl.sum(sums, 1) * _loaded(scales + places, there, whole)
        value += change + own * _loaded(diagonal + places, there, whole)
    tl.store(result + row * narrow + places, value, mask=there)
