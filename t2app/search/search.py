"""The search for a mixture: points of the cross-entropy method as weights of the experts, scored on solved examples."""

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.special import stdtrit

from t2app.evaluation import BASE
from t2app.experts import Alpha, mix, share
from t2app.found_mixtures import KeptMixture
from t2app.messages import EXACT, Reevaluated, Searched, SearchSettings
from t2app.models.model import Model
from t2app.search.cross_entropy import CrossEntropy, Point, apart, smoothed
from t2app.search.scores import Score, right_answers, scorer
from t2app.spectral import Deltas
from t2app.tasks import Example, Task

# How far mixtures vouch for each other, in root mean square difference of their α.
_BANDWIDTH = 0.15
# What is tried again beside the base model and each expert alone, and on how many sampled answers to each example
# beside the greedy one. Chosen on examples to train on and validation examples of letter-counting.
_OTHERS = 4
_SAMPLES, _SAMPLES_TEMPERATURE = 4, 0.5
# The chance, of all other mixtures together, that one that is no better than the best of those alone is kept.
_RISK = 0.025


def by_neighbourhood(scores: Mapping[Point, Score]) -> list[Point]:
    """The candidates, first those around which the most examples are answered rightly, then the likeliest.

    On ten examples the candidate that is the best itself owes much of that to luck. Where nothing was answered the
    likelihood decides alone.
    """
    right = smoothed({point: score.right for point, score in scores.items()}, _BANDWIDTH)
    return sorted(scores, key=lambda point: (right[point], scores[point].log_likelihood), reverse=True)


def finalists(scores: Mapping[Point, Score], alone: Sequence[Point]) -> list[Point]:
    """What is tried again: `alone`, and the best others that are too far apart to vouch for each other."""
    return [*alone, *apart(by_neighbourhood(scores), _BANDWIDTH, alone)[:_OTHERS]]


def chosen(right: Mapping[Point, np.ndarray], scores: Mapping[Point, Score], alone: Sequence[Point]) -> Point:
    """The finalist to keep: the best of `alone`, or the best of those others that are better beyond doubt.

    That is by Student's paired test over the examples against the best alone, at `_RISK` divided by the number of
    others (Bonferroni). The most right of several mixtures that are worth the same is always a little ahead, and an
    expert alone was trained to be good, while what lies between two need not be (in the spirit of the
    one-standard-error rule, Breiman et al. 1984).

    Args:
        right: right answers to each example, (examples,), of every finalist.
    """
    best = max(alone, key=lambda point: (right[point].sum(), scores[point]))
    others, examples = [point for point in right if point not in alone], len(right[best])
    # Of one example the error is not known, and nothing is beyond doubt.
    if not others or examples == 1:
        return best
    standard_errors = stdtrit(examples - 1, 1 - _RISK / len(others))
    ahead = {}
    for point in others:
        lead = right[point] - right[best]
        if lead.mean() > standard_errors * lead.std(ddof=1) / examples**0.5:
            ahead[point] = (right[point].sum(), scores[point])
    return max(ahead, key=ahead.__getitem__, default=best)


class MixtureSearch:
    """Searches the weights under which the model's experts solve `shots` best.

    The base model and each expert alone are in the first population. The search itself goes by the candidates' own
    scores, as in the paper, and by the answers of `EXACT` the best are tried again after it.

    Attributes:
        scores: of every candidate so far.
        best: the candidate to keep so far, None before the first round has ended.

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
        corners = (np.zeros(self._count), *np.eye(self._count))
        points = [tuple(np.repeat(corner, self._per_expert).tolist()) for corner in corners]
        self._alone: dict[str, Point] = dict(zip((BASE, *self._names), points, strict=True))
        self.scores: dict[Point, Score] = {}
        self._right: dict[Point, np.ndarray] = {}  # which examples each candidate answered rightly, (examples,)
        self.best: Point | None = None
        self._stopped = False
        self._trace: list[Searched] = []
        self._reevaluated: Reevaluated | None = None

    def run(self) -> Iterator[Searched | Reevaluated]:
        """Search, yielding every round as it ends, and last how the best were tried again where they were.

        Whoever stops reading has `found` so far.
        """
        started = time.perf_counter()
        yield from self._rounds(started)
        if self._settings.score == EXACT:
            yield self._reevaluate(started)

    def stop(self) -> None:
        """Let no further round begin: what `run` yields next is how the best were tried again, if anything."""
        self._stopped = True

    def _rounds(self, started: float) -> Iterator[Searched]:
        settings = self._settings
        method = CrossEntropy(
            self._count * self._per_expert,
            settings.population,
            settings.elite_fraction,
            settings.seed,
            list(self._alone.values()),
        )
        while len(self._trace) < settings.rounds and not method.settled and not self._stopped:
            new = [point for point in dict.fromkeys(method.ask()) if point not in self.scores]
            if new:
                scored = self._score(self._mixtures(new))
                self.scores |= zip(new, scored.scores, strict=True)
                self._right |= zip(new, scored.right, strict=True)
            method.tell(self.scores)
            self.best = by_neighbourhood(self.scores)[0]
            score = self.scores[self.best]
            self._trace.append(
                Searched(
                    round=len(self._trace) + 1,
                    mean=self._by_expert(method.mean),
                    spread=self._by_expert(method.spread),
                    best=self._by_expert(self.best),
                    right=score.right if settings.score == EXACT else None,
                    log_likelihood=score.log_likelihood,
                    evaluations=len(self.scores),
                    seconds=time.perf_counter() - started,
                )
            )
            yield self._trace[-1]

    def _reevaluate(self, started: float) -> Reevaluated:
        """Try the finalists again and make the best of them `best`; their greedy answers are known."""
        alone = list(self._alone.values())
        points = finalists(self.scores, alone)
        asked = (self._model, self._task, self._shots, self._mixtures(points))
        sampled = right_answers(*asked, _SAMPLES, _SAMPLES_TEMPERATURE)
        right = {point: self._right[point] + row for point, row in zip(points, sampled, strict=True)}
        self.best = chosen(right, self.scores, alone)
        self._reevaluated = Reevaluated(
            best=self._by_expert(self.best),
            right=int(right[self.best].sum()),
            answers=len(self._shots) * (1 + _SAMPLES),
            alone={name: int(right[point].sum()) for name, point in self._alone.items()},
            finalists=len(points),
            seconds=time.perf_counter() - started,
        )
        return self._reevaluated

    def _mixtures(self, points: Sequence[Point]) -> list[Deltas | None]:
        return [mix(self._model.experts, self.weights(point)) for point in points]

    def found(self, name: str) -> KeptMixture:
        """The best so far, to be kept by this name; raises ValueError before the first round has ended."""
        if self.best is None:
            raise ValueError("the search was stopped before its first round ended: nothing was found yet")
        return KeptMixture(
            name=name,
            model=self._model.name,
            fingerprint=self._model.identity.fingerprint,
            experts={expert.name: expert.fingerprint for expert in self._model.experts},
            weights=self.weights(self.best),
            task=self._task.name,
            shots=len(self._shots),
            score=self._settings.score,
            seed=self._settings.seed,
            trace=tuple(self._trace),
            reevaluated=self._reevaluated,
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
