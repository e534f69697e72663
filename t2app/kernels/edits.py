"""Edits of some rows of a batch on a CPU in bfloat16, by singular vectors or by a mixture's matrix, both in 8 bits.

Vectors edit rows of any mixtures, in two products; a matrix is one product, of half as many bytes, for rows of one
mixture. `bench products` measures both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from t2app.kernels.build import WIDTH, has_tiles

# What singular vectors divide by: the most bytes that any CPU multiplies together.
_BYTES_WIDTH = 4 * WIDTH
# Where there are tiles, products with the vectors of more tokens are by these. Elsewhere a matrix is faster, or as
# fast, for as many as the kernels take (`bench products`).
_MATRIX_TOKENS_BESIDE_TILES = 8


class PackedVectors(NamedTuple):
    """Singular vectors in 8 bits, since an edit costs what reading them costs.

    Attributes:
        integers: (rank, narrow) int8, a vector a row; of every `WIDTH` entries those with even places come first.
        scales: (rank,) float32; a vector is scale · integers.
    """

    integers: Tensor
    scales: Tensor


class PackedMatrix(NamedTuple):
    """V diag(z − 1) Vᵀ, the edit of one z, in 8 bits: diag(diagonal) + diag(scales) · integers · diag(scales).

    It is symmetric, so its lower triangle is enough, which is half of what packed vectors are. The diagonal is apart,
    since it holds what all z have in common, which is many times any other entry. Rows and columns are in even-first
    order, as the entries of `PackedVectors` are.

    Attributes:
        integers: (entries,) int8 of the lower triangle by blocks of `WIDTH` rows: of each its columns up to the
            diagonal's block, four together, (columns / 4, WIDTH, 4).
        scales, diagonal: (narrow,) float32.
    """

    integers: Tensor
    scales: Tensor
    diagonal: Tensor


class RowEdit:
    """What is done to some rows of a batch at one layer's narrow side. A `Layer` takes it into its own kernels."""

    def __init__(self, kept: Tensor):
        self.kept = kept

    def __call__(self, side: Tensor, bias: Tensor | None = None) -> Tensor:
        """The narrow side (rows, tokens, narrow) in bfloat16 of a layer that has no kernel, its edited rows changed.

        Args:
            bias: what of `side` is no part of the product that is edited.
        """
        return torch.ops.t2app.edit_side(self.kept, side, bias)


class VectorEdit(RowEdit):
    """An edit by singular vectors.

    Args:
        vectors: of the layer's narrow side.
        edits_input: whether the narrow side is the input, or the output.
        rows: those that are edited.
        delta: z − 1 (1 or edited rows, rank) in float32.
    """

    def __init__(self, vectors: PackedVectors, edits_input: bool, rows: slice, delta: Tensor):
        make = torch.ops.t2app.make_vector_edit
        super().__init__(make(*vectors, delta, edits_input, rows.start, rows.stop - rows.start))


class MatrixEdit(RowEdit):
    """An edit of rows that share their z − 1, by the matrix of it.

    Args:
        edits_input: whether the narrow side is the input, or the output.
        rows: those that are edited.
    """

    def __init__(self, matrix: PackedMatrix, edits_input: bool, rows: slice):
        make = torch.ops.t2app.make_matrix_edit
        super().__init__(make(*matrix, edits_input, rows.start, rows.stop - rows.start))


def pack_vectors(vectors: Tensor) -> PackedVectors | None:
    """Round singular vectors (rank, narrow), one a row, to 8 bits; None where the kernel takes no such length.

    It moves an entry by 0.4 % of the vector's largest at most; `bench edit` measures what that does to an answer.
    """
    if vectors.shape[1] % _BYTES_WIDTH:
        return None
    scales = vectors.float().abs().amax(1) / torch.iinfo(torch.int8).max
    integers = (vectors.float() / scales[:, None]).round().to(torch.int8)
    return PackedVectors(_even_first(integers), scales)


def integers_in_order(vectors: PackedVectors, dtype: torch.dtype) -> Tensor:
    """The integers of packed vectors (rank, narrow) as they were before, even and odd places in turns.

    bfloat16 holds them exactly.
    """
    even, odd = vectors.integers.to(dtype).view(len(vectors.scales), -1, 2, WIDTH // 2).unbind(2)
    return torch.stack((even, odd), -1).view(vectors.integers.shape)


def packed_matrix(vectors: Tensor, delta: Tensor) -> PackedMatrix:
    """The matrix of singular vectors (rank, narrow), one a row, and z − 1 (rank,); narrow divides by `WIDTH`."""
    vectors = _even_first(vectors)
    matrix = (vectors.T * delta) @ vectors
    narrow = len(matrix)
    diagonal = matrix.diagonal().clone()
    matrix.fill_diagonal_(0)
    fours = matrix.view(-1, WIDTH, narrow // 4, 4).transpose(1, 2)  # (blocks, narrow / 4, WIDTH, 4)
    lower = [block[: WIDTH // 4 * number].flatten() for number, block in enumerate(fours, 1)]
    return PackedMatrix(*torch.ops.t2app.pack_triangle(torch.cat(lower), narrow), diagonal)


def sum_of_packed(matrices: Sequence[PackedMatrix], factors: Sequence[float]) -> PackedMatrix:
    """The matrix of Σ factor · (z − 1) out of those of each z, which takes reading them in place of a product.

    An entry is off by its own rounding, and by those of the matrices, each times its factor.
    """
    factors = torch.tensor(factors, dtype=torch.float32)
    scales = torch.stack([matrix.scales for matrix in matrices])  # (matrices, narrow)
    triangle = torch.ops.t2app.sum_triangles([matrix.integers for matrix in matrices], scales, factors)
    diagonal = factors @ torch.stack([matrix.diagonal for matrix in matrices])
    return PackedMatrix(*torch.ops.t2app.pack_triangle(triangle, len(diagonal)), diagonal)


def packed_matrix_bytes(narrow: int) -> int:
    """What a packed matrix of this width takes, and what a step reads of it."""
    return narrow * (narrow + WIDTH) // 2 + 2 * narrow * torch.float32.itemsize


def _even_first(rows: Tensor) -> Tensor:
    """Of every `WIDTH` entries of (…, entries) those with even places first."""
    blocks = rows.reshape(*rows.shape[:-1], -1, WIDTH // 2, 2)
    return blocks.transpose(-2, -1).reshape(rows.shape).contiguous()


def edits_fast_by_matrix(tokens: int) -> bool:
    """Whether so many edited tokens of all rows together take a `MatrixEdit` no longer than a `VectorEdit`."""
    return tokens <= _MATRIX_TOKENS_BESIDE_TILES or not has_tiles()
