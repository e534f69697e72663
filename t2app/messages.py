"""What the engine is asked and what it tells, as plain data: nothing here imports torch, so that a page can be shown
before a model can be loaded.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from t2app.categories import CLASSIFIER

# The ways to decide a mixture, as the command line and the page name them.
PROMPT, MANUAL = "prompt", "manual"
DISPATCHERS = (CLASSIFIER, PROMPT, MANUAL)
DEFAULT_DISPATCH = CLASSIFIER


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; `seed` starts every row's own generator.

    Raises:
        ValueError: a value is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; at least 1 was expected")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; 0 (greedy) or more was expected")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; more than 0 and at most 1 was expected")


@dataclass(frozen=True)
class Dispatched:
    """The first pass is done.

    `probabilities` is None where the dispatch has none; `note` is a sentence on why it did not do as it was asked, None
    where it did.
    """

    label: str | None
    weights: Mapping[str, float]
    probabilities: Mapping[str, float] | None
    seconds: float
    note: str | None = None


@dataclass(frozen=True)
class Token:
    """A piece of one stream's text; `tokens` so far in that stream, `seconds` since the second pass began."""

    stream: str
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """Both answers are complete. `tokens` counts both streams, `seconds` is the second pass."""

    base: str
    adapted: str
    tokens: int
    seconds: float
    tokens_per_second: float


Event = Dispatched | Token | Finished


def as_json(event: Event) -> dict:
    """The event as the command line prints it, with its name under "event"."""
    fields = {key: value for key, value in asdict(event).items() if value is not None or key == "label"}
    return {"event": type(event).__name__.lower(), **fields}
