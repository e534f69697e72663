"""Spectral edits of single tokens on a CPU without the kernels: as one product of torch's with a matrix in bfloat16.

As in edit_matrix.py, x + V((z − 1) ⊙ Vᵀx) is x + Ex with E = V diag(z − 1) Vᵀ. Where the CPU does not multiply
bfloat16, torch multiplies few tokens by the rows of a matrix in it fast, and ever so slowly by its columns, as the
second product of an edit does; E has its rows for columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from t2app.spectral.products import with_rows


class DenseMatrix(NamedTuple):
    """E = V diag(z − 1) Vᵀ.

    Attributes:
        entries: (narrow, narrow) in bfloat16.
    """

    entries: Tensor

    def edited(self, side: Tensor, rows: slice | Tensor, bias: Tensor | None = None) -> Tensor:
        """A layer's narrow side with some rows edited: s + E(s − bias), the other rows bit for bit as they are.

        Args:
            side: (rows, 1, narrow), a token of each row.
            rows: the rows to edit, as an index.
            bias: (narrow,), what of `side` is no part of the product that the edit is for.
        """
        before = side[rows]
        return with_rows(side, rows, F.linear(before if bias is None else before - bias, self.entries))


def dense_matrix(vectors: Tensor, delta: Tensor) -> DenseMatrix:
    """The matrix of singular vectors (rank, narrow), one a row, and z − 1 (rank,)."""
    vectors = vectors.float()
    return DenseMatrix(((vectors.T * delta) @ vectors).bfloat16())


def sum_of_dense(matrices: Sequence[DenseMatrix], factors: Sequence[float]) -> DenseMatrix:
    """The matrix of Σ factor · (z − 1) out of those of each z, which takes reading them in place of a product."""
    total = sum(factor * matrix.entries.float() for matrix, factor in zip(matrices, factors, strict=True))
    return DenseMatrix(total.bfloat16())


def dense_matrix_bytes(narrow: int) -> int:
    """What such a matrix takes, and what a step reads of it."""
    return narrow**2 * torch.bfloat16.itemsize
