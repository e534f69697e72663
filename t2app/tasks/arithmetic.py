"""Arithmetic on small whole numbers: + and − up to 20, × up to 10, asked in several wordings.

No result is negative: the embedded model gets none of those right, and a task without a success has no signal to train
on. That leaves 793 problems, each in one split only; a + b and b + a, a × b and b × a always share a split. Since the
test takes two thirds of them, training adds problems with an operand beyond that range, which no other split has, lest
an expert learn the few that are left by heart.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from t2app.categories import CATEGORIES
from t2app.tasks.numbers import last_number
from t2app.tasks.procedural import check_split
from t2app.tasks.task import Example

_WORDINGS = {
    "+": (
        "Compute {a} + {b}. Reply with only the number.",
        "What is {a} plus {b}? Answer with just the number.",
        "Add {a} and {b}. Give only the result.",
        "{a} + {b} = ?",
        "Please calculate {a} + {b} and reply with the number alone.",
        "What do you get when you add {b} to {a}? Just the number, please.",
    ),
    "-": (
        "Compute {a} - {b}. Reply with only the number.",
        "What is {a} minus {b}? Answer with just the number.",
        "Subtract {b} from {a}. Give only the result.",
        "{a} - {b} = ?",
        "Please calculate {a} - {b} and reply with the number alone.",
        "What do you get when you take {b} away from {a}? Just the number, please.",
    ),
    "*": (
        "Compute {a} × {b}. Reply with only the number.",
        "What is {a} times {b}? Answer with just the number.",
        "Multiply {a} by {b}. Give only the result.",
        "{a} * {b} = ?",
        "Please calculate {a} * {b} and reply with the number alone.",
        "What do you get when you multiply {a} by {b}? Just the number, please.",
    ),
}
_WORDING_COUNT = 6
_LARGEST = {"+": 20, "-": 20, "*": 10}
# Further for −, which has half as many problems.
_LARGEST_IN_TRAINING = {"+": 40, "-": 60, "*": 12}
_RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_SIGN = {"+": "+", "-": "-", "*": "×"}


# (a, operator, b)
Problem = tuple[int, str, int]


class Arithmetic:
    """Problems of training and validation are asked in every wording, those of the test and those beyond the range in
    one each: the former are few.
    """

    name = "arithmetic"
    label = "math"
    description = CATEGORIES[label]
    max_new_tokens = 16

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split."""
        check_split(split)
        problems = _problems_by_split()
        if split == "test":
            return _once_each(problems["test"])
        in_range = [_example(*problem, wording) for problem in problems[split] for wording in range(_WORDING_COUNT)]
        return in_range + (_once_each(_problems_beyond()) if split == "train" else [])

    def is_right(self, example: Example, answer: str) -> bool:
        """The last number of the answer counts, so that "12 + 7 = 19." is right too."""
        return last_number(answer) == last_number(example.answer)


def _problems_by_split() -> dict[str, list[Problem]]:
    """Two thirds of the problems for the test (so that n ≥ 500), a tenth for validation, the rest for training."""
    families: dict[tuple, list[Problem]] = {}
    for problem in _problems(_LARGEST):
        a, operator, b = problem
        families.setdefault((operator, min(a, b), max(a, b)), []).append(problem)
    keys = sorted(families)
    random.Random(0).shuffle(keys)
    test, validation = round(len(keys) * 0.65), round(len(keys) * 0.75)
    parts = {"test": keys[:test], "validation": keys[test:validation], "train": keys[validation:]}
    return {split: [problem for key in part for problem in families[key]] for split, part in parts.items()}


def _problems_beyond() -> list[Problem]:
    """The problems for training with an operand that no other split has."""
    return [(a, operator, b) for a, operator, b in _problems(_LARGEST_IN_TRAINING) if max(a, b) > _LARGEST[operator]]


def _problems(largest: dict[str, int]) -> Iterator[Problem]:
    for operator, bound in largest.items():
        for a, b in itertools.product(range(bound + 1), repeat=2):
            if _RESULT[operator](a, b) >= 0:
                yield a, operator, b


def _once_each(problems: Sequence[Problem]) -> list[Example]:
    return [_example(*problem, i % _WORDING_COUNT) for i, problem in enumerate(problems)]


def _example(a: int, operator: str, b: int, wording: int) -> Example:
    answer = str(_RESULT[operator](a, b))
    return Example(_WORDINGS[operator][wording].format(a=a, b=b), answer, f"{a} {_SIGN[operator]} {b} = {answer}")
