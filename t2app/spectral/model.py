"""A model whose layers edit every row of a batch by a mixture of its own."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from t2app.kernels.linear import FastLinear, runs_by_kernels
from t2app.machine import can_spare, gpu_can_spare
from t2app.parts import Parts
from t2app.spectral.basis import Basis
from t2app.spectral.layer import SpectralLinear, execution_device, linear_layer
from t2app.spectral.plan import Deltas, Matrix, Plan, PlanInUse, one_mixture

# What the matrices of mixtures that are sums take at most, but for those of the last one.
_SUMS_BYTES = 1 << 28
# What is done of matrices in one part, between which others are served: entries that are added, and multiplications of
# those that are made.
_ENTRIES_AT_ONCE, _MULTIPLICATIONS_AT_ONCE = 1 << 25, 1 << 31


class _KeptMatrices(NamedTuple):
    """A mixture, which is known again as this object, and its matrices by layer."""

    deltas: Deltas
    by_layer: Mapping[str, Matrix]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for matrix in self.by_layer.values() for tensor in matrix)


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
        self._in_use = PlanInUse()
        self._made: list[_KeptMatrices] = []
        self._sums: list[_KeptMatrices] = []  # those used last come last
        by_kernels = runs_by_kernels(model)
        for path, basis in bases.items():
            layer = linear_layer(model, path)
            if min(layer.in_features, layer.out_features) != basis.rank:
                raise ValueError(
                    f"the basis for '{path}' has rank {basis.rank}; the layer is "
                    f"{layer.out_features} × {layer.in_features}"
                )
            # A weight may be packed in integers; its edit then runs in the precision that the model computes in.
            dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else model.dtype
            self.layers[path] = SpectralLinear(layer, basis, dtype, many_rows, by_kernels, path, self._in_use)
        for path, layer in self.layers.items():
            model.set_submodule(path, layer)

    def plan(self, rows: Sequence[Deltas | None]) -> Plan:
        """What every layer does to a batch whose row i is adapted by rows[i]; None is the model as it is."""
        matrices = self._matrices_for(rows)
        return {
            path: layer.row_deltas(
                [None if deltas is None else deltas.get(path) for deltas in rows], matrices.get(path)
            )
            for path, layer in self.layers.items()
        }

    @contextmanager
    def using(self, plan: Plan):
        """Run batches by a plan for the time of a block; outside of one the model is the untouched one."""
        self._in_use.plan = plan
        try:
            yield
        finally:
            self._in_use.plan = None

    def rows(self, rows: Sequence[Deltas | None]):
        """`using` a plan for these rows."""
        return self.using(self.plan(rows))

    def trainable(self) -> dict[str, nn.Parameter]:
        """New z − 1 (rank,) of every layer in float32, all 0: as a mixture, the model as it is.

        Raises:
            ValueError: the layers compute no gradient.
        """
        require_gradients(self.model)
        return {path: nn.Parameter(torch.zeros(layer.rank, device=layer.device)) for path, layer in self.layers.items()}

    def merging(self, deltas: Deltas) -> Parts[None]:
        """Keep the weights of a mixture that all rows of many batches will have, a layer a part.

        Such a batch then costs what the plain model's does. Layers that are no `FastLinear` stay as they are.
        """
        for path in self._mergeable(deltas):
            self.layers[path].merge(deltas[path])
            yield

    def merged_bytes(self, deltas: Deltas) -> int:
        """What `merging` takes: as much memory as the layers' own weights."""
        layers = (self.layers[path].base for path in self._mergeable(deltas))
        return sum(parameter.nbytes for layer in layers for parameter in layer.parameters())

    def making_matrices(self, deltas: Deltas) -> Parts[None]:
        """Keep the matrices of a mixture, in parts: from then on they edit its rows, where all have this mixture.

        It takes the same object as `plan` is given. Nothing is made where layers take none, nor where memory does not
        allow.
        """
        if not self.lacks_matrices(deltas):
            return
        made, multiplied = {}, 0
        for path, delta in deltas.items():
            made[path] = self.layers[path].matrix(delta)
            multiplied += self.layers[path].rank ** 3
            if multiplied >= _MULTIPLICATIONS_AT_ONCE:
                multiplied = 0
                yield
        if not self.has_matrices_of(deltas):  # somebody else may have made them in between
            self._made = [*self._made, _KeptMatrices(deltas, made)]

    def adding_matrices(self, deltas: Deltas, terms: Sequence[tuple[Deltas, Mapping[str, float]]]) -> Parts[None]:
        """`making_matrices` for a mixture that is a sum of others, where all of these have theirs: it is much faster.

        Of such mixtures those that were used last keep theirs, as many as `_SUMS_BYTES` allow.

        Args:
            terms: each with its factors, by the layer's path; where a path is missing it takes no part.
        """
        made = [(self._matrices_of(term), factors) for term, factors in terms]
        if any(kept is None for kept, _ in made) or not self.lacks_matrices(deltas):
            return
        sums, added = {}, 0
        for path in deltas:
            own = [(kept.by_layer[path], factors[path]) for kept, factors in made if path in factors]
            sums[path] = self.layers[path].sum_of_matrices(*zip(*own, strict=True))
            added += len(own) * self.layers[path].rank ** 2
            if added >= _ENTRIES_AT_ONCE:
                added = 0
                yield
        kept = [*self._sums, _KeptMatrices(deltas, sums)]
        while len(kept) > 1 and sum(mixture.nbytes for mixture in kept) > _SUMS_BYTES:
            kept = kept[1:]
        self._sums = kept

    def has_matrices_of(self, deltas: Deltas) -> bool:
        """Whether they were made, and are kept."""
        return self._matrices_of(deltas) is not None

    def lacks_matrices(self, deltas: Deltas) -> bool:
        """Whether a mixture has none, its layers can have them, and there is memory for them."""
        layers = [self.layers[path] for path in deltas]
        if self.has_matrices_of(deltas) or not all(layer.takes_matrix for layer in layers):
            return False
        return can_spare(sum(layer.matrix_bytes for layer in layers))

    def edit_by_matrices(self) -> None:
        """Have the plan in use edit single tokens by matrices where that is faster, and memory allows.

        It takes a model whose layers all compute on one device.
        """
        sizes = {layer: size for layer in self.layers.values() if (size := layer.whole_matrix_bytes())}
        if not sizes or not gpu_can_spare(sum(sizes.values()), device := next(iter(sizes)).device):
            return
        from t2app.spectral.edit_matrix import why_not

        for narrow, biased in {(layer.vectors.shape[1], layer.bias is not None) for layer in sizes}:
            if reason := why_not(narrow, biased, device):
                _warn_once(f"steps are slower than they could be, edits go without matrices: {reason}")
                return
        for layer in sizes:
            layer.make_whole_matrix()

    def detach(self) -> nn.Module:
        """Put the original layers back and return the model."""
        for path, layer in self.layers.items():
            self.model.set_submodule(path, layer.base)
        self.layers, self._made, self._sums = {}, [], []
        return self.model

    def _mergeable(self, deltas: Deltas) -> list[str]:
        return [path for path in deltas if isinstance(self.layers[path].base, FastLinear)]

    def _matrices_for(self, rows: Sequence[Deltas | None]) -> Mapping[str, Matrix]:
        """The matrices of rows of one mixture that has them, by layer."""
        mixture = one_mixture(rows)
        kept = None if mixture is None else self._matrices_of(mixture)
        if kept is None:
            return {}
        self._sums = sorted(self._sums, key=lambda other: other is kept)  # this one was used last
        return kept.by_layer

    def _matrices_of(self, deltas: Deltas) -> _KeptMatrices | None:
        return next((kept for kept in (*self._made, *self._sums) if kept.deltas is deltas), None)


@cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)


def require_gradients(model: nn.Module) -> None:
    """Raises ValueError where a gradient would be lost: bitsandbytes' products on a CPU, once packed, have none."""
    packed = (layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8)
    if any(execution_device(layer).type == "cpu" for layer in packed):
        raise ValueError("4-bit layers give no gradient on a CPU: train with --precision bf16 or fp32, or on a GPU")
