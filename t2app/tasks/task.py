"""What a task is: examples by split, the prompt of an example, and whether an answer to it is right.

A task knows nothing of models, experts or training.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from PIL.Image import Image

from t2app.pictures import read_picture

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Picture:
    """A picture that is read when it is needed; `read` gives the bytes of its file.

    Both uses raise what `read` raises, and `image` PictureError where the bytes are no picture.
    """

    read: Callable[[], bytes]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of its file: which picture it is."""
        return hashlib.sha256(self.read()).hexdigest()

    def image(self) -> Image:
        return read_picture(self.read())


@dataclass(frozen=True)
class Example:
    """A prompt as the user would type it, and the answer that is right.

    Attributes:
        solution: a whole text that gives the answer, which a supervised warm start imitates; nothing else looks at it.
        options: what may be answered, where that is a choice.
        tests: statements that a program which is right runs without an exception, where a program is asked for.
        answers: what each of several people answered, where they were asked.
        picture: what the prompt is about, where it is about a picture.
    """

    prompt: str
    answer: str
    solution: str
    options: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    picture: Picture | None = None


class Task(Protocol):
    """A task of the registry.

    Attributes:
        name: as on the command line.
        label: the category of prompts that an expert for this task stands for (math, code, reasoning).
        description: one line about that category, shown to the model by the first pass.
        max_new_tokens: how long an answer may be.
    """

    name: str
    label: str
    description: str
    max_new_tokens: int

    def examples(self, split: str) -> Sequence[Example]:
        """All examples of a split, always the same ones in the same order; splits share no problem.

        Raises:
            ValueError: the task has no such split.
            DataError: its data cannot be had.
        """

    def is_right(self, example: Example, answer: str) -> bool:
        """Whether `answer`, the model's whole text, answers the example."""
