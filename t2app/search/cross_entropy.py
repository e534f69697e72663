"""The cross-entropy method on points of a unit cube; it knows nothing of what the points stand for.

Each round draws a population, keeps its elites, and draws the next one from a normal distribution of their mean and
spread, clipped to the cube; the best point so far always competes. Points lie on a grid, so that one drawn again is
known again. Where a score is a few coin flips, the best of a hundred points is mostly a lucky one; `smoothed` asks each
point's neighbours too.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

# Finer than anybody can tell two mixtures apart by their answers.
_GRID_DECIMALS = 2
# Elites are different points: so near are those that lie next to each other on the grid.
_SETTLED = 10**-_GRID_DECIMALS

Point = tuple[float, ...]


def smoothed(scores: Mapping[Point, float], bandwidth: float) -> dict[Point, float]:
    """Every point's score as the mean of all scores, those nearby counting most (Nadaraya 1964, Watson 1964).

    Args:
        bandwidth: standard deviation of the Gaussian weights, in root mean square distance over the dimensions: as far
            for one α an expert as for the same α in each of its blocks.
    """
    points, values = np.array(list(scores)), np.array(list(scores.values()), dtype=float)
    squares = np.square(points).mean(1)
    distances = squares[:, None] + squares - 2 * (points @ points.T) / points.shape[1]
    weights = np.exp(-distances / (2 * bandwidth**2))  # (points, points)
    return dict(zip(scores, (weights @ values / weights.sum(1)).tolist(), strict=True))


def apart(points: Iterable[Point], distance: float, taken: Sequence[Point] = ()) -> list[Point]:
    """The points in their order, less those within `distance`, as in `smoothed`, of one before them or in `taken`."""
    kept: list[Point] = []
    for point in points:
        rivals = [*taken, *kept]
        if not rivals or np.square(np.subtract(rivals, point)).mean(1).min() > distance**2:
            kept.append(point)
    return kept


class CrossEntropy:
    """Attributes:
    mean, spread: (dimensions,) of the elites of the last round.

    Args:
        starts: points of the first population; the rest of it is drawn evenly from the cube.
    """

    def __init__(
        self, dimensions: int, population: int, elite_fraction: float, seed: int, starts: Sequence[Point] = ()
    ):
        self.population = population
        self.elites = max(1, round(population * elite_fraction))
        self.mean = np.full(dimensions, 0.5)
        self.spread = np.full(dimensions, 12**-0.5)
        self._random = np.random.default_rng(seed)
        even = self._random.uniform(size=(population, dimensions))
        self._next = [*starts, *even][:population]
        self._best: Point | None = None

    @property
    def settled(self) -> bool:
        """Whether the elites have become alike, so that further rounds would draw nothing new."""
        return bool((self.spread < _SETTLED).all())

    def ask(self) -> list[Point]:
        """The population of this round."""
        rounded = [np.round(np.clip(point, 0, 1), _GRID_DECIMALS) + 0.0 for point in self._next]
        return [tuple(float(value) for value in point) for point in rounded]

    def tell(self, scores: Mapping[Point, object]) -> Point:
        """Take the scores of this round's population, greater is better, and return the best point so far.

        Args:
            scores: of all points asked so far.
        """
        candidates = self.ask() if self._best is None else [*self.ask(), self._best]
        # The same point twice is no evidence twice.
        elites = sorted(dict.fromkeys(candidates), key=scores.__getitem__, reverse=True)[: self.elites]
        self._best = elites[0]
        self.mean, self.spread = np.mean(elites, axis=0), np.std(elites, axis=0)
        self._next = list(self._random.normal(self.mean, self.spread, (self.population, len(self.mean))))
        return self._best
