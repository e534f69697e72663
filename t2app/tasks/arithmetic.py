"""Arithmetic on small whole numbers: + and − up to 20, × up to 10, asked in several wordings.

No result is negative: the embedded model gets none of those right, and a task without a success has no signal to train
on. That leaves 793 problems, each in one split only; a + b and b + a, a × b and b × a always share a split. Since the
test takes two thirds of them, training adds problems with an operand just beyond that range, which no other split has:
on the few in range alone, an expert learned the problems by heart (88 % of them right, 66 % of those held out).
"""

import random
import re
from collections.abc import Sequence

from t2app.tasks.task import SPLITS, Example

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
_LARGEST = {"+": 20, "-": 20, "*": 10}
_LARGEST_IN_TRAINING = {"+": 30, "-": 30, "*": 12}
_RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
_NUMBER = re.compile(r"[-−]?\d[\d,]*(?:\.\d+)?")


class Arithmetic:
    """A problem of the test stands there in one wording, a problem of another split in each of them."""

    name = "arithmetic"
    label = "math"
    description = "calculating with numbers: arithmetic, equations and word problems"
    max_new_tokens = 16

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split."""
        if split not in SPLITS:
            raise ValueError(f"there is no split '{split}'; choose one of {', '.join(SPLITS)}")
        problems = _problems_by_split()[split]
        wordings = range(len(_WORDINGS["+"]))
        if split == "test":
            return [_example(*problem, i % len(wordings)) for i, problem in enumerate(problems)]
        return [_example(*problem, wording) for problem in problems for wording in wordings]

    def is_right(self, example: Example, answer: str) -> bool:
        """The last number of the answer counts, so that "12 + 7 = 19." is right too."""
        numbers = _NUMBER.findall(answer)
        return bool(numbers) and float(numbers[-1].replace(",", "").replace("−", "-")) == float(example.answer)


def _problems_by_split() -> dict[str, list[tuple[int, str, int]]]:
    """Two thirds of the problems for the test (so that n ≥ 500), a tenth for validation, the rest for training."""
    families: dict[tuple, list[tuple[int, str, int]]] = {}
    beyond: list[tuple[int, str, int]] = []
    for operator, largest in _LARGEST_IN_TRAINING.items():
        for a in range(largest + 1):
            for b in range(largest + 1):
                if _RESULT[operator](a, b) < 0:
                    continue
                if max(a, b) > _LARGEST[operator]:
                    beyond.append((a, operator, b))
                else:
                    families.setdefault((operator, min(a, b), max(a, b)), []).append((a, operator, b))
    keys = sorted(families)
    random.Random(0).shuffle(keys)
    test, validation = round(len(keys) * 0.65), round(len(keys) * 0.75)
    parts = {"test": keys[:test], "validation": keys[test:validation], "train": keys[validation:]}
    problems = {split: [problem for key in part for problem in families[key]] for split, part in parts.items()}
    problems["train"] += beyond
    return problems


def _example(a: int, operator: str, b: int, wording: int) -> Example:
    return Example(_WORDINGS[operator][wording].format(a=a, b=b), str(_RESULT[operator](a, b)))
