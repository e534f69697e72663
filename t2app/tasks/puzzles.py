"""Three families of reasoning-gym (Stojanovski et al. 2025), which no expert here is trained on: tasks to search for.

Of fourteen families these are the ones that the embedded model and its experts sometimes get right, on 60 examples to
train on. Every split has a seed of its own, and leaves out the questions of the splits before it.

The library is no requirement of the app: one that it needs itself (pycosat) comes as source alone, so that a C compiler
and Python's headers are needed to install it.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec

from t2app.categories import CATEGORIES
from t2app.tasks.benchmark_data import DataError
from t2app.tasks.numbers import last_number
from t2app.tasks.procedural import check_split
from t2app.tasks.task import Example

# In this order, the test first: it loses no question to the others.
_SIZES = {"test": 600, "validation": 100, "train": 400}
# reasoning-gym counts its examples on from the seed.
_SEEDS_APART = 1_000_000


class Puzzles:
    """The last number of the answer counts, or where the answer is one of several names, that it names that one alone.

    Args:
        name: as on the command line; dataset: what reasoning-gym calls the family; settings: its own, for this task.
    """

    max_new_tokens = 24

    def __init__(self, name: str, label: str, dataset: str, settings: Mapping[str, object]):
        self.name, self.label = name, label
        self.description = CATEGORIES[label]
        self._family = (dataset, tuple(settings.items()))

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`.

        Raises:
            ValueError: there is no such split.
            DataError: reasoning-gym is not installed.
        """
        check_split(split)
        if not has_reasoning_gym():
            raise DataError(
                f"the examples of '{self.name}' are made by reasoning-gym, which is not installed; `pip install "
                "reasoning-gym` does it where there are a C compiler and Python's headers"
            )
        return _examples(*self._family)[split]

    def is_right(self, example: Example, answer: str) -> bool:
        if not example.options:
            return last_number(answer) == last_number(example.answer)
        return _words(answer) & set(example.options) == {example.answer.lower()}


PUZZLES = (
    Puzzles("chain-sum", "math", "chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    Puzzles("letter-counting", "reasoning", "letter_counting", {"min_words": 2, "max_words": 4}),
    Puzzles("needle", "reasoning", "needle_haystack", {"min_num_statements": 3, "max_num_statements": 5}),
)


def has_reasoning_gym() -> bool:
    """Whether the library is installed that makes these tasks' examples."""
    return find_spec("reasoning_gym") is not None


@cache
def _examples(dataset: str, settings: tuple[tuple[str, object], ...]) -> dict[str, list[Example]]:
    # Imported here: it brings a hundred families, which no other task should wait for.
    import reasoning_gym

    seen: set[str] = set()
    by_split: dict[str, list[tuple[str, str]]] = {}
    for seed, (split, size) in enumerate(_SIZES.items()):
        rows = reasoning_gym.create_dataset(dataset, size=size, seed=seed * _SEEDS_APART, **dict(settings))
        made = {row["question"]: row["answer"] for row in rows if row["question"] not in seen}
        seen |= made.keys()
        by_split[split] = list(made.items())
    answers = {answer for rows in by_split.values() for _, answer in rows}
    numbers = all(last_number(answer) is not None for answer in answers)
    names = set() if numbers else {answer.lower() for answer in answers}
    return {
        split: [Example(question, answer, answer, tuple(sorted(names & _words(question)))) for question, answer in rows]
        for split, rows in by_split.items()
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[\w'-]+", text.lower()))
