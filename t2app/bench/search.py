"""What a round of a search costs: 32 candidates on 10 examples by the likelihood score, ours against the authors' way.

Their way composes W' = U diag(σ ⊙ z) Vᵀ of every layer for each candidate, writes it into a model that has nothing of
ours in it, and looks at the examples one after another.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from t2app.bench.composed import ComposedWeights
from t2app.bench.figure import Figure, figure_of, seconds
from t2app.bench.generate import plain_model
from t2app.experts import mix
from t2app.models import Model, load_model
from t2app.search.scores import log_likelihoods
from t2app.spectral import Deltas, SpectralModel
from t2app.tasks import Example
from t2app.tasks.registry import task_named

_CANDIDATES, _SHOTS, _ROUNDS = 32, 10, 3


def bench_search(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds of a round both ways, in turns, and how many times faster ours is.

    Raises:
        ValueError: the model has no expert to search with, or a layer of a candidate cannot be written.
    """
    model = load_model(model_name, precision, many_rows=True)
    if not model.experts:
        raise ValueError(f"{model.name} has no expert to measure with")
    shots = task_named("chain-sum").examples("train")[:_SHOTS]
    composed = ComposedModel(replace(model, adapted=SpectralModel(plain_model(model, model_name), {})))
    draw = torch.Generator().manual_seed(0)
    names = [expert.name for expert in model.experts]
    ours, theirs = [], []
    for round_ in range(1 + _ROUNDS):
        alphas = torch.rand(_CANDIDATES, len(names), generator=draw).tolist()
        mixtures = [mix(model.experts, dict(zip(names, row, strict=True))) for row in alphas]
        pair = (
            seconds(partial(log_likelihoods, model, shots, mixtures)),
            seconds(partial(composed.log_likelihoods, shots, mixtures)),
        )
        if round_ > 0:  # the first warms both up
            ours.append(pair[0])
            theirs.append(pair[1])
    yield figure_of("search", "round_seconds", ours, "s")
    yield figure_of("search", "composed_round_seconds", theirs, "s")
    yield figure_of("search", "speedup", [b / a for a, b in zip(ours, theirs, strict=True)], "ratio")


class ComposedModel:
    """A model with each candidate's weights written into it, one after another."""

    def __init__(self, model: Model):
        self._model = model
        self._weights = ComposedWeights(model.adapted.model, model.identity.ranks)

    @torch.inference_mode()
    def log_likelihoods(self, shots: Sequence[Example], mixtures: Sequence[Deltas | None]) -> list[float]:
        """As `scores.log_likelihoods`; the model's own weights are back afterwards."""
        means = []
        for mixture in mixtures:
            self._weights.write(mixture)
            means.append(sum(log_likelihoods(self._model, [shot], [None])[0] for shot in shots) / len(shots))
        self._weights.write(None)
        return means
