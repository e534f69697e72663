"""Work that is done in parts, so that others may use the model in between: a generator that returns its result."""

from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")
Parts = Generator[None, None, _T]


def next_part(parts: Parts[_T]) -> tuple[bool, _T | None]:
    """Do one part: whether it was the last one, and what all of them give if it was."""
    try:
        next(parts)
    except StopIteration as end:
        return True, end.value
    return False, None


def whole(parts: Parts[_T]) -> _T:
    """Do all parts without a break."""
    while True:
        ended, result = next_part(parts)
        if ended:
            return result
