"""Singular value fine-tuning as an edit beside an untouched layer.

With W = U diag(σ) Vᵀ an expert turns W into W' = U diag(σ ⊙ z) Vᵀ (arXiv 2501.06252, section 3.1). Only the basis of
W's narrow side is needed to compute W'x from Wx:

    in_features ≤ out_features:  W'x = W(x + V((z − 1) ⊙ Vᵀx))      the input is edited, then the layer runs as it is
    out_features < in_features:  W'x = y + U((z − 1) ⊙ Uᵀy), y = Wx  the layer runs as it is, then its output is edited

so nothing is ever written into the weights and every row of a batch can carry its own z. Where every row of a large
batch is edited, as in a training or a search, W' is cheaper as two factors in the basis: WV(z ⊙ Vᵀx), or U(z ⊙ UᵀWx).
Where all rows of many batches have one z, as in a first pass by an expert, W' is cheapest as a weight of its own. Where
rows have one z for many batches, as in an answer, V diag(z − 1) Vᵀ is cheapest as one matrix: on a GPU a whole one for
single tokens (edit_matrix.py), by the kernels a triangle (`PackedMatrix`).
This file knows linear layers and vectors; it does not know experts, prompts or how a model is loaded.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional as F

from t2app.kernels.linear import (
    EditedLayer,
    FastLinear,
    MatrixEdit,
    PackedMatrix,
    RowEdit,
    VectorEdit,
    edits_fast,
    edits_fast_by_matrix,
    has_fast_linears,
    integers_in_order,
    needs_gradient,
    pack_vectors,
    packed_matrix,
    packed_matrix_bytes,
)
from t2app.machine import can_spare, gpu_can_spare
from t2app.parts import Parts
from t2app.products import edited, has_products_of_many_rows

if TYPE_CHECKING:
    from t2app.edit_matrix import EditMatrix

# z − 1 of every adapted module, by the module's path; a path that is missing is left as it is. One row's mixture.
Deltas = Mapping[str, Tensor]

_FINGERPRINT_ENTRIES = 1024
# Strips of rows that a Gram matrix is computed in.
_GRAM_STRIPS = 4
# Of so many tokens, all of them edited, the two factors are faster than a kernel (`bench products`).
_FACTOR_TOKENS = 96
# More edited rows than these read the same whole matrix too often: products with the vectors are as fast.
_MATRIX_ROWS = 4
# Mixtures that have matrices for the kernels at a time.
_KEPT_MATRICES = 8


@dataclass(frozen=True)
class Basis:
    """Singular vectors of the narrow side of one weight matrix.

    Attributes:
        vectors: (narrow, rank) float32 with orthonormal columns, by falling singular value; narrow = rank = min(m, n).
        singular_values: (rank,) float32, falling.
        edits_input: True where the narrow side is the layer's input (V), False where it is its output (U).
    """

    vectors: Tensor
    singular_values: Tensor
    edits_input: bool

    @property
    def rank(self) -> int:
        return self.singular_values.numel()


def basis_of(weight: Tensor) -> Basis:
    """The basis of `weight` (out_features, in_features) from the eigenvectors of its smaller Gram matrix.

    The Gram matrix squares the condition number, so it is formed and decomposed in float64: near-equal singular values
    then come out in the same order on every machine, which experts rely on.
    """
    out_features, in_features = weight.shape
    edits_input = in_features <= out_features
    matrix = weight.detach().to(torch.float64)
    eigenvalues, eigenvectors = torch.linalg.eigh(_lower_gram(matrix if edits_input else matrix.T), UPLO="L")
    return Basis(
        vectors=eigenvectors.flip(1).to(torch.float32).contiguous(),
        singular_values=eigenvalues.flip(0).clamp_min(0).sqrt().to(torch.float32),
        edits_input=edits_input,
    )


def _lower_gram(matrix: Tensor) -> Tensor:
    """XᵀX (n, n) for X (m, n), its lower triangle alone: what lies above means nothing."""
    n = matrix.shape[1]
    gram = matrix.new_empty(n, n)
    # Each strip as far as the triangle goes: of four, five eighths of the products.
    height = -(-n // _GRAM_STRIPS)
    for begin in range(0, n, height):
        end = begin + height
        gram[begin:end, :end] = matrix[:, begin:end].T @ matrix[:, :end]
    return gram


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over names, shapes and an even sample of the entries of `weights`, read as bfloat16.

    It takes the full-precision weights, so that it is the same whatever precision the model is then run in.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        flat = weight.detach().flatten()
        # Float arithmetic would round differently for large matrices; integer strides do not.
        picks = torch.arange(_FINGERPRINT_ENTRIES, device=flat.device) * flat.numel() // _FINGERPRINT_ENTRIES
        entries = flat[picks].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name}:{tuple(weight.shape)}\n".encode())
        digest.update(entries.numpy().tobytes())
    return digest.hexdigest()


class Merged(NamedTuple):
    """One z − 1 (rank,), which is known again as this object, and a layer of the weight W' that it makes."""

    delta: Tensor
    layer: FastLinear


class _KeptMatrices(NamedTuple):
    """A mixture, which is known again as this object, and its matrices by layer."""

    deltas: Deltas
    by_layer: Mapping[str, PackedMatrix]


@dataclass(eq=False)
class RowDeltas:
    """Which rows of a batch one layer edits, and by what.

    Attributes:
        count: rows of the batch.
        edited: the rows that are edited, as an index into the batch.
        delta: z − 1 (1 or edited rows, rank) in float32; one row where all edited rows share it.
        merged: a layer of W' in place of the edit; None where there is none for these rows.
        matrix: of the edit, packed for the kernels, or whole on a GPU for single tokens; None where there is none.
        kernel: of the edit; matrix_kernel: of the packed matrix. Each is made when it is first used.
    """

    count: int
    edited: slice | Tensor
    delta: Tensor
    merged: FastLinear | None = None
    matrix: "EditMatrix | PackedMatrix | None" = None
    kernel: RowEdit | None = None
    matrix_kernel: RowEdit | None = None

    @property
    def edits_all(self) -> bool:
        return isinstance(self.edited, slice) and self.edited.stop - self.edited.start == self.count


class _PlanInUse:
    """What all layers of a model look up their part of a plan in: to set it in each of them takes a tenth of a step."""

    def __init__(self):
        self.plan: Mapping[str, RowDeltas | None] | None = None


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
        in_use: _PlanInUse,
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

    def matrix_bytes(self) -> int:
        """What a whole matrix of these rows' edit takes; 0 where there can be none, or there is no use of one."""
        rows = self.rows
        if rows is None or not self.takes_whole_matrix or self._has_factors(rows) or len(rows.delta) > 1:
            return 0
        few = isinstance(rows.edited, slice) and rows.edited.stop - rows.edited.start <= _MATRIX_ROWS
        return self.vectors.numel() if few else 0

    def make_matrix(self) -> None:
        """Edit the rows of the plan in use by a whole matrix from now on, where each has a single token."""
        from t2app.edit_matrix import edit_matrix

        self.rows.matrix = edit_matrix(self.vectors, self.rows.delta[0])

    def packed_matrix(self, delta: Tensor) -> PackedMatrix:
        """The matrix of z − 1 (rank,) for the kernels, of a layer that has packed vectors."""
        return packed_matrix(*self._vectors_with(delta, torch.float32))

    def merge(self, delta: Tensor) -> None:
        """Keep the weight of z − 1 (rank,) beside the layer's own, for batches all of whose rows have it.

        It takes a layer that runs by the kernels.
        """
        vectors, scaled = self._vectors_with(delta, torch.float32)
        change = (vectors.T * scaled) @ vectors  # (narrow, narrow)
        weight = self.base.weight.float()
        weight += weight @ change if self.edits_input else change @ weight
        layer = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None, device="meta")
        layer.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        layer.bias = self.base.bias
        self.merged = Merged(delta, FastLinear(layer))

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


class SpectralModel:
    """A model whose linear layers named by `bases` take a mixture for every row; `detach` gives the model back.

    Args:
        model: any module; its parameters are neither copied nor changed.
        bases: the basis of every layer to adapt, by the layer's path in `model`.
        many_rows: whether batches will be large and all their rows adapted; a second copy of the weights makes them
            faster.

    Raises:
        ValueError: a path names no linear layer of `model`, or a basis does not fit its layer.
    """

    def __init__(self, model: nn.Module, bases: Mapping[str, Basis], many_rows: bool = False):
        self.model = model
        self.layers: dict[str, SpectralLinear] = {}
        self._in_use = _PlanInUse()
        self._matrices: list[_KeptMatrices] = []  # those used last come last
        by_kernels = has_fast_linears(model)
        for path, basis in bases.items():
            layer = linear_layer(model, path)
            if min(layer.in_features, layer.out_features) != basis.rank:
                raise ValueError(
                    f"the basis for '{path}' has rank {basis.rank}; the layer is "
                    f"{layer.out_features} × {layer.in_features}"
                )
            # A 4-bit layer's weight is packed in uint8; its edit then runs in the precision that the model computes in.
            dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else model.dtype
            self.layers[path] = SpectralLinear(layer, basis, dtype, many_rows, by_kernels, path, self._in_use)
        for path, layer in self.layers.items():
            model.set_submodule(path, layer)

    def merging(self, deltas: Deltas) -> Parts[None]:
        """Keep the weights of a mixture that all rows of many batches will have, a layer a part.

        Such a batch then costs what the plain model's does. Layers that do not run by the kernels stay as they are.
        """
        for path in self._mergeable(deltas):
            self.layers[path].merge(deltas[path])
            yield

    def merged_bytes(self, deltas: Deltas) -> int:
        """What `merging` takes: as much memory as the layers' own weights."""
        return sum(self.layers[path].base.weight.nbytes for path in self._mergeable(deltas))

    def making_matrices(self, deltas: Deltas) -> Parts[None]:
        """Keep the matrices of a mixture, a layer a part: from then on they edit its rows, where all have this mixture.

        It takes the same object as `plan` is given. Nothing is made where vectors are not packed for the kernels, nor
        where memory does not allow; the `_KEPT_MATRICES` mixtures that were used last have theirs.
        """
        layers = {path: layer for path in deltas if (layer := self.layers[path]).packed is not None}
        size = sum(packed_matrix_bytes(layer.rank) for layer in layers.values())
        if not layers or self.has_matrices_of(deltas) or not can_spare(size):
            return
        made = {}
        for path, layer in layers.items():
            made[path] = layer.packed_matrix(deltas[path])
            yield
        self._matrices = [*self._matrices, _KeptMatrices(deltas, made)][-_KEPT_MATRICES:]

    def has_matrices_of(self, deltas: Deltas) -> bool:
        """Whether `making_matrices` has made them, and they are kept."""
        return any(kept.deltas is deltas for kept in self._matrices)

    def _mergeable(self, deltas: Deltas) -> list[str]:
        return [path for path in deltas if isinstance(self.layers[path].base, FastLinear)]

    def trainable(self) -> dict[str, nn.Parameter]:
        """New z − 1 (rank,) of every layer in float32, all 0: as a mixture, the model as it is.

        Raises:
            ValueError: the layers compute no gradient.
        """
        require_gradients(self.model)
        return {path: nn.Parameter(torch.zeros(layer.rank, device=layer.device)) for path, layer in self.layers.items()}

    def plan(self, rows: Sequence[Deltas | None]) -> dict[str, RowDeltas | None]:
        """What every layer does to a batch whose row i is adapted by rows[i]; None is the model as it is."""
        matrices = self._matrices_for(rows)
        return {
            path: _row_deltas(
                [None if deltas is None else deltas.get(path) for deltas in rows], layer, matrices.get(path)
            )
            for path, layer in self.layers.items()
        }

    def _matrices_for(self, rows: Sequence[Deltas | None]) -> Mapping[str, PackedMatrix]:
        """The packed matrices of rows of one mixture that has them, by layer."""
        mixture = one_mixture(rows)
        if mixture is None or not self.has_matrices_of(mixture):
            return {}
        # This one was used last.
        self._matrices = sorted(self._matrices, key=lambda kept: kept.deltas is mixture)
        return self._matrices[-1].by_layer

    def edit_by_matrices(self) -> None:
        """Have the plan in use edit single tokens by matrices where that is faster, and memory allows.

        It takes a model whose layers all compute on one device.
        """
        sizes = {layer: size for layer in self.layers.values() if (size := layer.matrix_bytes())}
        if not sizes or not gpu_can_spare(sum(sizes.values()), device := next(iter(sizes)).device):
            return
        from t2app.edit_matrix import why_not

        for narrow, biased in {(layer.vectors.shape[1], layer.bias is not None) for layer in sizes}:
            if reason := why_not(narrow, biased, device):
                _warn_once(f"steps are slower than they could be, edits go without matrices: {reason}")
                return
        for layer in sizes:
            layer.make_matrix()

    @contextmanager
    def using(self, plan: Mapping[str, RowDeltas | None]):
        """Run batches by a plan for the time of a block; outside of one the model is the untouched one."""
        self._in_use.plan = plan
        try:
            yield
        finally:
            self._in_use.plan = None

    def rows(self, rows: Sequence[Deltas | None]):
        """`using` a plan for these rows."""
        return self.using(self.plan(rows))

    def detach(self) -> nn.Module:
        """Put the original layers back and return the model."""
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer.base)
        self.layers, self._matrices = {}, []
        return self.model


def one_mixture(rows: Sequence[Deltas | None]) -> Deltas | None:
    """The mixture of all adapted rows, known as the same object; None where there is none, or more than one."""
    adapted = [deltas for deltas in rows if deltas is not None]
    return adapted[0] if adapted and all(deltas is adapted[0] for deltas in adapted) else None


def _row_deltas(
    deltas: Sequence[Tensor | None], layer: SpectralLinear, matrix: PackedMatrix | None
) -> RowDeltas | None:
    """One layer's part of a plan, from the z − 1 (rank,) of every row or None; None where no row is edited.

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
    rows = slice(first, last + 1) if together else torch.tensor(adapted, device=layer.device)
    merged = layer.merged
    of_merged = merged is not None and shared and deltas[first] is merged.delta and len(adapted) == len(deltas)
    whole = merged.layer if of_merged else None
    return RowDeltas(len(deltas), rows, delta.to(layer.device, torch.float32), whole, matrix)


@cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def require_gradients(model: nn.Module) -> None:
    """Raises ValueError where a gradient would be lost: bitsandbytes' products on a CPU, once packed, have none."""
    packed = (layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8)
    if any(execution_device(layer).type == "cpu" for layer in packed):
        raise ValueError("4-bit layers give no gradient on a CPU: train with --precision bf16 or fp32, or on a GPU")


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
