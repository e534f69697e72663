"""What a bench measures: medians, with their range and n."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured figure: the median of n values and their range, in `unit`."""

    bench: str
    figure: str
    value: float
    min: float
    max: float
    n: int
    unit: str


def figure_of(bench: str, figure: str, values: Sequence[float], unit: str) -> Figure:
    """The figure that these values make."""
    return Figure(bench, figure, statistics.median(values), min(values), max(values), len(values), unit)


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every measure gives in each round; they take turns, so that a slow moment of the machine meets each."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            values[name].append(measure())
    return values


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
