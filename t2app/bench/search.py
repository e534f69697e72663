"""What a round of a search costs: 32 candidates on 10 examples, by either score.

By likelihood it is measured against the authors' way, which composes W' = U diag(σ ⊙ z) Vᵀ of every layer for each
candidate, writes it into a model that has nothing of ours in it, and looks at the examples one after another. By
answers it is measured against running the prompts twice, once to answer them and once for the likelihood.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from t2app.bench.composed import ComposedWeights
from t2app.bench.figure import Figure, figure_of, seconds
from t2app.bench.generate import plain_model
from t2app.experts import mix
from t2app.models.model import Model, load_model
from t2app.search.scores import answers_and_likelihoods, log_likelihoods, right_answers
from t2app.spectral import Deltas, SpectralModel
from t2app.tasks import Example, Task
from t2app.tasks.registry import task_named

_CANDIDATES, _SHOTS, _ROUNDS = 32, 10, 3


def bench_search(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds of a round by either score, ours and another way in turns, and how many times faster ours is.

    Raises:
        ValueError: the model has no expert to search with, or a layer of a candidate cannot be written.
    """
    model = load_model(model_name, precision, many_rows=True)
    if not model.experts:
        raise ValueError(f"{model.name} has no expert to measure with")
    task = task_named("chain-sum")
    shots = task.examples("train")[:_SHOTS]
    composed = ComposedModel(replace(model, adapted=SpectralModel(plain_model(model, model_name), {})))
    ways = {
        "round_seconds": partial(log_likelihoods, model, shots),
        "composed_round_seconds": partial(composed.log_likelihoods, shots),
        "answers_round_seconds": partial(answers_and_likelihoods, model, task, shots),
        "twice_run_round_seconds": partial(_prompts_run_twice, model, task, shots),
    }
    draw = torch.Generator().manual_seed(0)
    names = [expert.name for expert in model.experts]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(1 + _ROUNDS):
        alphas = torch.rand(_CANDIDATES, len(names), generator=draw).tolist()
        mixtures = [mix(model.experts, dict(zip(names, row, strict=True))) for row in alphas]
        for way, score in ways.items():
            times[way].append(seconds(partial(score, mixtures)))
    measured = {way: values[1:] for way, values in times.items()}  # the first round warms up
    ours, theirs, answers, twice = measured.values()
    for way, values in measured.items():
        yield figure_of("search", way, values, "s")
    yield figure_of("search", "speedup", [b / a for a, b in zip(ours, theirs, strict=True)], "ratio")
    yield figure_of("search", "answers_speedup", [b / a for a, b in zip(answers, twice, strict=True)], "ratio")


def _prompts_run_twice(model: Model, task: Task, shots: Sequence[Example], mixtures: Sequence[Deltas | None]) -> None:
    right_answers(model, task, shots, mixtures, samples=1, temperature=0.0)
    log_likelihoods(model, shots, mixtures)


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
