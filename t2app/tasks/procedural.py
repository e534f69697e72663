"""What the tasks that make their own examples share: which split a problem is in, and choices that look random."""

import hashlib
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from t2app.tasks.task import SPLITS

# Of a hundred problems; the rest are for training.
_TEST, _VALIDATION = 25, 10

Choice = TypeVar("Choice")


def split_of(key: Iterable[object]) -> str:
    """The split of all problems with this key: the same on every machine, and no problem is in two."""
    place = _number(*key) % 100
    return "test" if place < _TEST else "validation" if place < _TEST + _VALIDATION else "train"


def pick(choices: Sequence[Choice], key: Iterable[object]) -> Choice:
    """One of the choices, always the same one for the same key."""
    return choices[_number("pick", *key) % len(choices)]


def sample(problems: Sequence[Choice], count: int) -> list[Choice]:
    """`count` of the problems in random order, always the same ones; all where there are fewer."""
    return random.Random(0).sample(problems, min(count, len(problems)))


def check_split(split: str) -> None:
    """Raises ValueError where there is no such split."""
    if split not in SPLITS:
        raise ValueError(f"there is no split '{split}'; choose one of {', '.join(SPLITS)}")


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")
