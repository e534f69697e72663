"""What the engine is asked and what it tells, as plain data: nothing here imports torch, so that a page can be shown
before a model can be loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from t2app.categories import CLASSIFIER

# The ways to decide a mixture, as the command line and the page name them.
PROMPT, PROMPT_SOFT, MANUAL = "prompt", "prompt-soft", "manual"
# The first ones look at the prompt and name its category.
NAMING_DISPATCHERS = (CLASSIFIER, PROMPT, PROMPT_SOFT)
DISPATCHERS = (*NAMING_DISPATCHERS, MANUAL)
DEFAULT_DISPATCH = CLASSIFIER
# A mixture that a search found is a dispatch as well: `few-shot:NAME`.
FEW_SHOT = "few-shot"
# What a search goes by: answers decoded and checked, or the likelihood of the right ones.
EXACT, LIKELIHOOD = "exact", "likelihood"
SCORES = (EXACT, LIKELIHOOD)


def few_shot(name: str) -> str:
    """The dispatch by the mixture that is kept as `name`."""
    return f"{FEW_SHOT}:{name}"


def check_weights(dispatch: str, weights: Mapping[str, float] | None) -> None:
    """Raises ValueError where weights are given to a dispatch that decides them itself, or are missing."""
    if dispatch == MANUAL and weights is None:
        raise ValueError("the manual dispatch needs weights, for instance math=0.7")
    if dispatch != MANUAL and weights is not None:
        raise ValueError(f"weights belong to the manual dispatch; the {dispatch} dispatch decides them itself")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed is {seed}; a whole number from 0 on was expected, below 2^63")


def mixture_name(dispatch: str) -> str | None:
    """The name of the kept mixture that a dispatch stands for, None where it is another dispatch."""
    way, colon, name = dispatch.partition(":")
    return name if way == FEW_SHOT and colon else None


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
        _check_seed(self.seed)


@dataclass(frozen=True)
class Limits:
    """What is decoded at a time at most; what does not fit waits.

    Attributes:
        rows: an answer has two, one of the base model and one adapted.
        cache_bytes: of keys and values; None for half of what the model leaves free on this machine.

    Raises:
        ValueError: a value is out of its range.
    """

    rows: int = 32
    cache_bytes: int | None = None

    def __post_init__(self):
        if self.rows < 2:
            raise ValueError(f"rows is {self.rows}; at least 2 was expected, since an answer has two")
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise ValueError(f"cache_bytes is {self.cache_bytes}; at least 1 was expected")


@dataclass(frozen=True)
class SearchSettings:
    """How a mixture is searched, by default as in the authors' code.

    Attributes:
        population: candidates a round; elite_fraction: the share of them that the next round is drawn around.
        rounds: at most; a search whose candidates have become alike ends before.
        per_layer: an α for each expert and block, not for each expert.
        score: one of SCORES; seed: of the draws.

    Raises:
        ValueError: a value is out of its range.
    """

    population: int = 32
    elite_fraction: float = 0.2
    rounds: int = 50
    per_layer: bool = False
    score: str = EXACT
    seed: int = 0

    def __post_init__(self):
        if self.population < 2:
            raise ValueError(f"population is {self.population}; at least 2 was expected")
        if not 0 < self.elite_fraction <= 1:
            raise ValueError(f"elite_fraction is {self.elite_fraction}; more than 0 and at most 1 was expected")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}; at least 1 was expected")
        if self.score not in SCORES:
            raise ValueError(f"there is no score '{self.score}'; choose one of {', '.join(SCORES)}")
        _check_seed(self.seed)


@dataclass(frozen=True)
class Searched:
    """One round of a search is done. With an α for each block, `mean`, `spread` and `best` are means over the blocks.

    Attributes:
        mean, spread: of the elites' α, by expert.
        best: α of the best candidate so far, by expert.
        right: how many of the examples that one answers rightly, None where the score does not look at that.
        log_likelihood: of the right answers under that one, in nats a token.
        evaluations: candidates evaluated so far; seconds: since the search began.
    """

    round: int
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    best: Mapping[str, float]
    right: int | None
    log_likelihood: float
    evaluations: int
    seconds: float


@dataclass(frozen=True)
class Waiting:
    """Others are served at the moment; it comes again and again while that lasts, and never where nobody else asks.

    Attributes:
        seconds: waited so far.
    """

    seconds: float


@dataclass(frozen=True)
class Reevaluated:
    """The best candidates of a search were tried again, on a greedy and several sampled answers to every example.

    Attributes:
        best: α of the one that is kept, by expert, as in `Searched`.
        right: how many of its answers were right; answers: of how many.
        alone: the same of the base model and of each expert alone, by name.
        finalists: how many candidates were tried again, these among them.
        seconds: since the search began.
    """

    best: Mapping[str, float]
    right: int
    answers: int
    alone: Mapping[str, int]
    finalists: int
    seconds: float


@dataclass(frozen=True)
class Dispatched:
    """The first pass is done.

    Attributes:
        probabilities: by label, None where the dispatch has none.
        note: a sentence on how it decided, None where the rest tells that.
        changes: mean |z − 1| of every layer that the mixture changes, by the layer's path.
        trace: the rounds of the search that found the mixture, where one did.
    """

    label: str | None
    weights: Mapping[str, float]
    probabilities: Mapping[str, float] | None
    seconds: float
    note: str | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    trace: Sequence[Searched] = ()


@dataclass(frozen=True)
class Token:
    """A piece of one stream's text; `tokens` so far in that stream, `seconds` since the second pass began.

    Attributes:
        paired: whether the other stream's piece of the same step follows at once.
    """

    stream: str
    text: str
    tokens: int
    seconds: float
    paired: bool = False


@dataclass(frozen=True)
class Finished:
    """Both answers are complete. `tokens` counts both streams, `seconds` is the second pass."""

    base: str
    adapted: str
    tokens: int
    seconds: float
    tokens_per_second: float


Event = Waiting | Dispatched | Token | Finished | Searched | Reevaluated


def as_json(event: Event) -> dict:
    """The event as the command line prints it, with its name under "event", without what only a picture of it needs."""
    fields = {
        key: value
        for key, value in asdict(event).items()
        if key not in ("changes", "trace", "paired") and (value is not None or key == "label")
    }
    return {"event": type(event).__name__.lower(), **fields}
