"""Linear layers in bfloat16 on a CPU.

Decoding multiplies one or two rows by every weight of the model: a kernel for few rows reads weights as fast as memory
gives them. Another one is for more rows, up to the tokens of a prompt, and a third one where the CPU multiplies tiles
(AMX); for more torch is right. Where the CPU does not multiply bfloat16 itself, the second one rounds to integers of 16
bits, and torch takes one row at a time, so that its product goes through a float32 copy of the weight that lives for
one product. `bench products` measures all of these.
"""

from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2app.kernels.build import WIDTH, has_bfloat16_arithmetic, has_tiles


class Kind(IntEnum):
    """How a layer multiplies: for few rows, for many, or for many by tiles. csrc/layer.h has the same."""

    FEW = 0
    MANY = 1
    TILES = 2


# Up to how many rows the first kernel is the fastest that there is: beside tiles, where bfloat16 is multiplied as it is
# without them, and where it is not. Up to how many the second one is beside tiles. And up to how many the kernels are.
# All by `bench products`.
_FEW_ROWS_BESIDE_TILES, _FEW_ROWS_BESIDE_BFLOAT16, _FEW_ROWS = 0, 1, 4
_MANY_ROWS_BESIDE_TILES = 2
MANY_ROWS = 256
# What rows divide by where bfloat16 is multiplied as it is, and singular vectors on all CPUs: the most bytes that any
# of them multiplies together.
_BFLOAT16_WIDTH, _BYTES_WIDTH = 2 * WIDTH, 4 * WIDTH

# Where there are tiles, products with the vectors of more tokens are by these. Elsewhere a matrix is faster, or as
# fast, for as many as the kernels take (`bench products`).
_MATRIX_TOKENS_BESIDE_TILES = 8
# How often a matrix is scaled before it is rounded: an edit gets a little more exact each time, and ever less.
_SCALINGS = 3


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


class Layer:
    """A linear layer in bfloat16 that multiplies by one of the kernels, without a gradient.

    Args:
        kind: by which of them; `TILES` takes a CPU that has them, and rows that divide by 32.

    Raises:
        RuntimeError: there is no such kernel for this weight.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: Kind):
        self.kept = torch.ops.t2app.make_layer(weight, bias, kind)

    def __call__(self, x: Tensor, edit: RowEdit | None = None) -> Tensor:
        """Wx + bias for x (…, in_features), and with an edit, where x is (rows, tokens, in_features), W'x + bias for
        the edited rows.
        """
        return torch.ops.t2app.multiply(self.kept, x, None if edit is None else edit.kept)


class EditedLayer(NamedTuple):
    """A layer as a plan has it; `edit` is None where no row is edited."""

    layer: Layer
    edit: RowEdit | None


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
    # Rows and columns are scaled alike until the largest entry of each is near 1; none is ever larger.
    scales = torch.ones(narrow)
    for _ in range(_SCALINGS):
        root = matrix.abs().amax(1).sqrt_()
        root[root == 0] = 1
        matrix.div_(root).div_(root[:, None])
        scales *= root
    largest = torch.iinfo(torch.int8).max
    integers = matrix.mul_(largest).round_().to(torch.int8)
    fours = integers.view(-1, WIDTH, narrow // 4, 4).transpose(1, 2)  # (blocks, narrow / 4, WIDTH, 4)
    lower = [block[: WIDTH // 4 * number].flatten() for number, block in enumerate(fours, 1)]
    return PackedMatrix(torch.cat(lower), scales / largest**0.5, diagonal)


def packed_matrix_bytes(narrow: int) -> int:
    """What a packed matrix of this width takes, and what a step reads of it."""
    return narrow * (narrow + WIDTH) // 2 + 2 * narrow * torch.float32.itemsize


def _even_first(rows: Tensor) -> Tensor:
    """Of every `WIDTH` entries of (…, entries) those with even places first."""
    blocks = rows.reshape(*rows.shape[:-1], -1, WIDTH // 2, 2)
    return blocks.transpose(-2, -1).reshape(rows.shape).contiguous()


def edits_fast(tokens: int) -> bool:
    """Whether a `RowEdit` is faster than torch's products for so many tokens of all rows together."""
    return tokens <= MANY_ROWS


def edits_fast_by_matrix(tokens: int) -> bool:
    """Whether so many edited tokens of all rows together take a `MatrixEdit` no longer than a `VectorEdit`."""
    return tokens <= _MATRIX_TOKENS_BESIDE_TILES or not has_tiles()


class FastLinear(nn.Linear):
    """A linear layer that multiplies by the kernels; it shares its weight and bias with the layer it stands for."""

    in_use = None  # where a plan would be looked up, which a `SpectralLinear` does

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._kernels: dict[Kind, Layer] = {}

    def forward(self, x: Tensor) -> Tensor:
        if needs_gradient(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        kernel = self.kernel_for(x.numel() // x.shape[-1])
        if kernel is not None:
            return kernel(x)
        rows = x.reshape(-1, x.shape[-1])
        if has_bfloat16_arithmetic():
            y = F.linear(rows, self.weight, self.bias)
        else:
            bias = None if self.bias is None else self.bias.float()
            y = F.linear(rows.float(), self.weight.float(), bias).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def kernel_for(self, tokens: int) -> Layer | None:
        """The fastest kernel for so many tokens of all rows together; None where there is none."""
        kind = _fastest_kernel(tokens, self.in_features)
        return None if kind is None else self.kernel(kind)

    def edited_layer(self, rows: int, tokens: int) -> EditedLayer | None:
        """What the layer is for so many tokens of each of so many rows; `SpectralLinear` has the same."""
        kernel = self.kernel_for(rows * tokens)
        return None if kernel is None else EditedLayer(kernel, None)

    def kernel(self, kind: Kind) -> Layer:
        """The kernel of a kind."""
        if kind not in self._kernels:
            self._kernels[kind] = Layer(self.weight, self.bias, kind)
        return self._kernels[kind]


def has_fast_linears(model: nn.Module) -> bool:
    """Whether a model runs by the kernels; one of 4 bits does so in its output layer alone."""
    return any(isinstance(layer, FastLinear) for layer in model.modules())


def use_fast_linears(model: nn.Module) -> None:
    """Let the linear layers of a bfloat16 model on the CPU run as `FastLinear`.

    Layers that are no plain ones, as those of 4-bit, and layers that accelerate offloads stay as they are.
    """
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not hasattr(layer, "_hf_hook"):
            model.set_submodule(path, FastLinear(layer))


@cache
def _fastest_kernel(tokens: int, length: int) -> Kind | None:
    """The kind of the kernel for so many tokens, None where there is none; it reads rows of this length."""
    if length % WIDTH or tokens > MANY_ROWS:
        return None
    as_it_is = has_bfloat16_arithmetic() and not length % _BFLOAT16_WIDTH
    tiles = as_it_is and has_tiles()
    few_rows = _FEW_ROWS
    if as_it_is:
        few_rows = _FEW_ROWS_BESIDE_TILES if tiles else _FEW_ROWS_BESIDE_BFLOAT16
    if tokens <= few_rows:
        return Kind.FEW
    if tiles and tokens > _MANY_ROWS_BESIDE_TILES:
        return Kind.TILES
    # What is left to torch where it multiplies bfloat16 too.
    return Kind.MANY if as_it_is or not has_bfloat16_arithmetic() else None


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether somebody will ask for a gradient, which the kernels have none of."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
