"""The search for a mixture: points of the cross-entropy method as weights of the experts, scored on solved examples."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from t2app.experts import Alpha, mix, share
from t2app.messages import EXACT, Searched, SearchSettings
from t2app.mixtures import KeptMixture
from t2app.models import Model
from t2app.search.cross_entropy import CrossEntropy, Point, smoothed
from t2app.search.scores import Score, scorer
from t2app.tasks import Example, Task

# How far mixtures vouch for each other, in root mean square difference of their α.
_BANDWIDTH = 0.15


def pick_shots(task: Task, count: int, seed: int) -> list[Example]:
    """`count` of the task's examples to train on, always the same ones for a seed; all where there are fewer."""
    examples = task.examples("train")
    return random.Random(seed).sample(examples, min(count, len(examples)))


def recommended(scores: Mapping[Point, Score]) -> Point:
    """The candidate to keep: the one around which the most examples are answered rightly, then the likeliest.

    On ten examples the candidate that is the best itself owes much of that to luck; `bench recommended` compares the
    two. Where nothing was answered the likelihood decides alone.
    """
    right = smoothed({point: score.right for point, score in scores.items()}, _BANDWIDTH)
    return max(scores, key=lambda point: (right[point], scores[point].log_likelihood))


class MixtureSearch:
    """Searches the weights under which the model's experts solve `shots` best.

    The base model and each expert alone are in the first population. The search itself goes by the candidates' own
    scores, as in the paper; what it keeps is `recommended`.

    Attributes:
        scores: of every candidate so far.

    Raises:
        ValueError: the model has no experts, there is no example, or the population has no room for the experts.
    """

    def __init__(self, model: Model, task: Task, shots: Sequence[Example], settings: SearchSettings):
        self._model, self._task, self._shots, self._settings = model, task, shots, settings
        self._names = [expert.name for expert in model.experts]
        if not self._names:
            raise ValueError(f"{model.name} has no experts to mix; train one first")
        if not shots:
            raise ValueError("a search needs at least one solved example")
        if settings.population <= len(self._names):
            raise ValueError(
                f"population is {settings.population}; the base model and {len(self._names)} experts alone are in it, "
                "so more was expected"
            )
        self._per_expert = model.identity.blocks if settings.per_layer else 1
        self._score = scorer(settings.score, model, task, shots)
        self.scores: dict[Point, Score] = {}
        self._best: Point | None = None
        self._trace: list[Searched] = []

    def rounds(self) -> Iterator[Searched]:
        """Search, yielding every round as it ends; whoever stops reading has `found` so far."""
        settings = self._settings
        starts = [tuple(np.repeat(row, self._per_expert)) for row in (np.zeros(self._count), *np.eye(self._count))]
        method = CrossEntropy(
            self._count * self._per_expert, settings.population, settings.elite_fraction, settings.seed, starts
        )
        started = time.perf_counter()
        while len(self._trace) < settings.rounds and not method.settled:
            new = [point for point in dict.fromkeys(method.ask()) if point not in self.scores]
            mixtures = [mix(self._model.experts, self.weights(point)) for point in new]
            self.scores |= zip(new, self._score(mixtures) if new else [], strict=True)
            method.tell(self.scores)
            self._best = recommended(self.scores)
            score = self.scores[self._best]
            self._trace.append(
                Searched(
                    round=len(self._trace) + 1,
                    mean=self._by_expert(method.mean),
                    spread=self._by_expert(method.spread),
                    best=self._by_expert(self._best),
                    right=score.right if settings.score == EXACT else None,
                    log_likelihood=score.log_likelihood,
                    evaluations=len(self.scores),
                    seconds=time.perf_counter() - started,
                )
            )
            yield self._trace[-1]

    def found(self, name: str) -> KeptMixture:
        """The best so far, to be kept by this name; raises ValueError before the first round has ended."""
        if self._best is None:
            raise ValueError("the search was stopped before its first round ended: nothing was found yet")
        return KeptMixture(
            name=name,
            model=self._model.name,
            fingerprint=self._model.identity.fingerprint,
            experts={expert.name: expert.fingerprint for expert in self._model.experts},
            weights=self.weights(self._best),
            task=self._task.name,
            shots=len(self._shots),
            score=self._settings.score,
            seed=self._settings.seed,
            trace=tuple(self._trace),
        )

    def weights(self, point: Sequence[float]) -> Mapping[str, Alpha]:
        """A point as α by expert."""
        alphas = np.reshape(point, (self._count, self._per_expert)).tolist()
        return {
            name: row if self._settings.per_layer else row[0] for name, row in zip(self._names, alphas, strict=True)
        }

    @property
    def _count(self) -> int:
        return len(self._names)

    def _by_expert(self, point: Sequence[float]) -> dict[str, float]:
        return {name: share(alpha) for name, alpha in self.weights(point).items()}
