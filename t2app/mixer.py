"""The mixtures of a model's experts that it is asked for, and the matrices by which their rows are edited.

A mixture is z' − 1 = Σ αₖ (zₖ − 1), and so its matrix V diag(z' − 1) Vᵀ is the same sum of its experts' matrices. Those
are made while nobody asks for anything, or once they are asked for; a mixture then has its own before its first answer,
which is as fast as those that follow it and, since it is rounded as they are, the same.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from t2app.experts import Alpha, Expert, alphas_by_path, mix
from t2app.parts import Parts
from t2app.spectral import Deltas, SpectralModel

# Mixtures that were used last and are not made anew.
_KEPT_MIXTURES = 16
# No answer waits for an expert whose matrices take more multiplications than that: they are made in an idle moment.
# Those of the embedded model's experts take a third of it.
_MOST_MULTIPLICATIONS = 10**11


class Mixer:
    """Mixes a model's experts; a mixture that was used lately is the same object again, by which it is known.

    Attributes:
        alone: the mixture of each expert alone with α = 1, by the expert's name.
    """

    def __init__(self, experts: Sequence[Expert], adapted: SpectralModel):
        self._experts = {expert.name: expert for expert in experts}
        self._adapted = adapted
        self.alone = {name: mix([expert], {name: 1.0}) for name, expert in self._experts.items()}
        self._kept = lru_cache(_KEPT_MIXTURES)(self._mix)

    def mixture(self, weights: Mapping[str, Alpha]) -> Deltas | None:
        """See `mix`."""
        return self._kept(_frozen(weights))

    def making_matrices(self) -> Parts[None]:
        """Have each expert have its own, of which all others are sums."""
        for deltas in self.alone.values():
            yield from self._adapted.making_matrices(deltas)

    def making_matrices_of(self, mixture: Deltas, weights: Mapping[str, Alpha]) -> Parts[None]:
        """Have what `mixture` gave for these weights have its own, unless a large model's experts have none yet."""
        terms = [(self.alone[name], alphas_by_path(self._experts[name], own)) for name, own in _frozen(weights)]
        if sum(layer.rank**3 for layer in self._adapted.layers.values()) <= _MOST_MULTIPLICATIONS:
            for expert, _ in terms:
                yield from self._adapted.making_matrices(expert)
        yield from self._adapted.adding_matrices(mixture, terms)

    def _mix(self, weights: tuple[tuple[str, Alpha], ...]) -> Deltas | None:
        for name, deltas in self.alone.items():
            if weights == ((name, 1.0),):
                return deltas
        return mix(self._experts.values(), dict(weights))


def _frozen(weights: Mapping[str, Alpha]) -> tuple[tuple[str, Alpha], ...]:
    """Weights as a key to look a mixture up by, without those who take no part, in whichever order they come."""
    frozen = ((name, tuple(alpha) if isinstance(alpha, Sequence) else alpha) for name, alpha in weights.items())
    return tuple(sorted((name, alpha) for name, alpha in frozen if alpha != 0))
