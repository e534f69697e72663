"""A linear layer with the edit of some rows beside it, by whatever computes that fastest."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from t2app.kernels.edits import (
    MatrixEdit,
    RowEdit,
    VectorEdit,
    edits_fast_by_matrix,
    integers_in_order,
    pack_vectors,
    packed_matrix,
    packed_matrix_bytes,
    sum_of_packed,
)
from t2app.kernels.linear import EditedLayer, FastLinear, edits_fast, needs_gradient
from t2app.spectral.basis import Basis
from t2app.spectral.dense_matrix import dense_matrix, dense_matrix_bytes, sum_of_dense
from t2app.spectral.plan import Matrix, PlanInUse, RowDeltas
from t2app.spectral.products import edited, has_products_of_many_rows

# Of so many tokens, all of them edited, the two factors are faster than a kernel (`bench products`).
_FACTOR_TOKENS = 96
# More edited rows than these read the same whole matrix too often: products with the vectors are as fast.
_MATRIX_ROWS = 4


class Merged(NamedTuple):
    """One z − 1 (rank,), which is known again as this object, and a layer of the weight W' that it makes."""

    delta: Tensor
    layer: FastLinear


class SpectralLinear(nn.Module):
    """A linear layer with the edit of this module beside it; the layer itself stays whole under `base`.

    The edit happens where the layer computes, which for a layer that accelerate offloads is not where its weight lies.

    Args:
        many_rows: keep, for batches in which every row is edited, whole vectors beside packed ones and, where torch
            multiplies many rows well, the weight in the basis, a second copy of it.
        by_kernels: edit by the kernels where they can.
        path: of the layer in the plan that is in use.

    Attributes:
        in_use: where that plan is looked up.
        packed: the singular vectors for the kernels; None without these.
        vectors: Vᵀ or Uᵀ (rank, narrow); None where the packed ones are there alone.
        in_basis: WV (out_features, rank) or UᵀW (rank, in_features); None where it is not kept.
        merged: what `merge` made; None before.
        device: the one that it computes on.
    """

    def __init__(
        self,
        base: nn.Module,
        basis: Basis,
        dtype: torch.dtype,
        many_rows: bool,
        by_kernels: bool,
        path: str,
        in_use: PlanInUse,
    ):
        super().__init__()
        self.base = base
        self._path, self.in_use = path, in_use
        self.edits_input = basis.edits_input
        self.singular_values = basis.singular_values
        self.merged: Merged | None = None
        self.device = execution_device(base)
        vectors = basis.vectors.T.to(self.device, dtype).contiguous()
        by_kernels = by_kernels and self.device.type == "cpu" and dtype == torch.bfloat16
        self.packed = pack_vectors(vectors) if by_kernels else None
        in_basis = self._weight_in_basis(vectors) if many_rows and has_products_of_many_rows(base.weight) else None
        self.register_buffer("in_basis", in_basis, persistent=False)
        self.register_buffer("vectors", vectors if many_rows or self.packed is None else None, persistent=False)
        # Of an offloaded layer the bias is there only while the layer runs, and the edit of an output comes after.
        with align_module_device(base):
            bias = None if base.bias is None else base.bias.detach()
            self.register_buffer("bias", bias, persistent=False)

    @property
    def rank(self) -> int:
        return len(self.singular_values)

    @property
    def rows(self) -> RowDeltas | None:
        """What the plan in use does here; None where that is nothing."""
        plan = self.in_use.plan
        return None if plan is None else plan[self._path]

    @property
    def takes_whole_matrix(self) -> bool:
        """Whether that can edit single tokens: torch brings what compiles its kernel for a GPU on Linux."""
        return self.device.type == "cuda" and self.vectors.dtype == torch.bfloat16 and find_spec("triton") is not None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows
        if rows is None:
            return self.base(x)
        if x.dim() != 3 or x.shape[0] != rows.count:
            raise ValueError(
                f"an adapted layer was given an input of shape {tuple(x.shape)}; its mixtures are for "
                f"{rows.count} rows, so (rows, tokens, features) with that many rows was expected"
            )
        if rows.merged is not None:
            return rows.merged(x)
        if not needs_gradient(x, rows.delta) and (edited_layer := self.edited_layer(*x.shape[:2])) is not None:
            return edited_layer.layer(x, edited_layer.edit)
        if self._has_factors(rows):
            return self.by_factors(x, rows.delta)
        if self.edits_input:
            return self.base(self._edited(x, rows))
        return self._edited(self.base(x), rows, self.bias)

    def edited_layer(self, count: int, tokens: int) -> EditedLayer | None:
        """What the layer is now for so many tokens of each of `count` rows, without a gradient.

        None where no kernel is, where the factors are faster, and where the plan is for another batch.
        """
        if not isinstance(self.base, FastLinear):
            return None
        rows = self.rows
        if rows is None:
            return self.base.edited_layer(count, tokens)
        if rows.count != count:
            return None
        if rows.merged is not None:
            return rows.merged.edited_layer(count, tokens)
        if self.packed is None or not isinstance(rows.edited, slice):
            return None
        if self._has_factors(rows) and count * tokens >= _FACTOR_TOKENS:
            return None
        kernel = self.base.kernel_for(count * tokens)
        return None if kernel is None else EditedLayer(kernel, self._edit_kernel(rows, tokens))

    def row_deltas(self, deltas: Sequence[Tensor | None], matrix: Matrix | None) -> RowDeltas | None:
        """This layer's part of a plan, from the z − 1 (rank,) of every row or None; None where no row is edited.

        Args:
            matrix: of these rows' mixture, where they have one mixture and it has one.
        """
        adapted = [row for row, delta in enumerate(deltas) if delta is not None]
        if not adapted:
            return None
        first, last = adapted[0], adapted[-1]
        shared = all(deltas[row] is deltas[first] for row in adapted)
        delta = deltas[first][None] if shared else torch.stack([deltas[row] for row in adapted])
        # A slice of rows is a view; an index of rows that are apart copies them.
        together = last - first + 1 == len(adapted)
        rows = slice(first, last + 1) if together else torch.tensor(adapted, device=self.device)
        merged = self.merged
        of_merged = merged is not None and shared and deltas[first] is merged.delta and len(adapted) == len(deltas)
        whole = merged.layer if of_merged else None
        return RowDeltas(len(deltas), rows, delta.to(self.device, torch.float32), whole, matrix)

    def whole_matrix_bytes(self) -> int:
        """What a whole matrix of these rows' edit takes; 0 where there can be none, or there is no use of one."""
        rows = self.rows
        if rows is None or not self.takes_whole_matrix or self._has_factors(rows) or len(rows.delta) > 1:
            return 0
        few = isinstance(rows.edited, slice) and rows.edited.stop - rows.edited.start <= _MATRIX_ROWS
        return self.vectors.numel() if few else 0

    def make_whole_matrix(self) -> None:
        """Edit the rows of the plan in use by a whole matrix from now on, where each has a single token."""
        from t2app.spectral.edit_matrix import edit_matrix

        self.rows.matrix = edit_matrix(self.vectors, self.rows.delta[0])

    @property
    def takes_matrix(self) -> bool:
        """Whether rows of one mixture can be edited by its matrix here, and faster so.

        In float32 there is none: answers would not be the same alone and beside other mixtures, whose rows have none.
        """
        if self.packed is not None:
            return True
        return self.device.type == "cpu" and self.vectors.dtype == torch.bfloat16

    @property
    def matrix_bytes(self) -> int:
        """What `matrix` takes."""
        return dense_matrix_bytes(self.rank) if self.packed is None else packed_matrix_bytes(self.rank)

    def matrix(self, delta: Tensor) -> Matrix:
        """The matrix of z − 1 (rank,), of a layer that takes one: for the kernels, or for torch."""
        if self.packed is None:
            return dense_matrix(self.vectors, delta)
        return packed_matrix(*self._vectors_with(delta, torch.float32))

    def sum_of_matrices(self, matrices: Sequence[Matrix], factors: Sequence[float]) -> Matrix:
        """The `matrix` of Σ factor · (z − 1), out of those of each z."""
        return (sum_of_dense if self.packed is None else sum_of_packed)(matrices, factors)

    def merge(self, delta: Tensor) -> None:
        """Keep the weight of z − 1 (rank,) beside the layer's own, for batches all of whose rows have it.

        It takes a layer that runs by the kernels.
        """
        vectors, scaled = self._vectors_with(delta, torch.float32)
        change = (vectors.T * scaled) @ vectors  # (narrow, narrow)
        weight = self.base.whole_weight.float()
        weight += weight @ change if self.edits_input else change @ weight
        self.merged = Merged(delta, self.base.with_weight(weight))

    def _has_factors(self, rows: RowDeltas) -> bool:
        return self.in_basis is not None and rows.edits_all

    def _edit_kernel(self, rows: RowDeltas, tokens: int) -> RowEdit:
        """The edit of these rows in a batch; of rows that are apart, of a batch of them alone."""
        edited_rows = rows.edited if isinstance(rows.edited, slice) else slice(0, len(rows.edited))
        count = edited_rows.stop - edited_rows.start
        if rows.matrix is not None and edits_fast_by_matrix(count * tokens):
            if rows.matrix_kernel is None:
                rows.matrix_kernel = MatrixEdit(rows.matrix, self.edits_input, edited_rows)
            return rows.matrix_kernel
        if rows.kernel is None:
            rows.kernel = VectorEdit(self.packed, self.edits_input, edited_rows, rows.delta)
        return rows.kernel

    def _edited(self, side: Tensor, rows: RowDeltas, bias: Tensor | None = None) -> Tensor:
        """The narrow side (rows, tokens, narrow) with its edited rows changed, by whatever does that fastest."""
        if self.packed is None and rows.matrix is not None and side.shape[1] == 1:
            return rows.matrix.edited(side, rows.edited, bias)
        few = edits_fast(rows.count * side.shape[1])
        if self.packed is None or not few or needs_gradient(side, rows.delta):
            return self._edited_by_torch(side, rows, bias)
        kernel = self._edit_kernel(rows, side.shape[1])
        if isinstance(rows.edited, slice):
            return kernel(side, bias)
        side = side.clone()
        side[rows.edited] = kernel(side[rows.edited], bias)
        return side

    def _edited_by_torch(self, side: Tensor, rows: RowDeltas, bias: Tensor | None) -> Tensor:
        return edited(side, rows.edited, *self._vectors_with(rows.delta, side.dtype), bias)

    def _vectors_with(self, delta: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The vectors (rank, narrow), and z − 1 as it goes with them."""
        if self.vectors is not None:
            return self.vectors.to(dtype), delta
        # The coordinate and the contribution both lack a vector's scale.
        return integers_in_order(self.packed, dtype), delta * self.packed.scales.square()

    def by_factors(self, x: Tensor, delta: Tensor) -> Tensor:
        """W'x + bias, every row under its own z − 1 (1 or rows, rank): two products; an edit beside Wx takes three.

        It takes the weight in the basis, which is there `many_rows`.
        """
        coordinates = F.linear(x, self.vectors if self.edits_input else self.in_basis) * (1 + delta)[:, None, :]
        coordinates = coordinates.to(x.dtype)  # (rows, tokens, rank)
        if self.edits_input:
            return F.linear(coordinates, self.in_basis, self.bias)
        y = coordinates @ self.vectors
        return y if self.bias is None else y + self.bias

    def _weight_in_basis(self, vectors: Tensor) -> Tensor:
        """WV (out_features, rank), or UᵀW (rank, in_features), in the weight's own precision."""
        weight, vectors = self.base.weight.float(), vectors.float()
        return (weight @ vectors.T if self.edits_input else vectors @ weight).to(self.base.weight.dtype)


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its parameters lie, or where accelerate moves them to while it runs."""
    attached = getattr(module, "_hf_hook", None)
    for hook in getattr(attached, "hooks", [attached]):
        if isinstance(hook, AlignDevicesHook) and hook.execution_device is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


def linear_layer(model: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path`; raises ValueError where there is none."""
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"the model has no module '{path}'") from None
    if isinstance(layer, SpectralLinear):
        layer = layer.base
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"'{path}' is a {type(layer).__name__}; only linear layers can be adapted")
    return layer
