"""Solved examples that a search for a mixture goes by: some of a task's, or somebody's own as a task."""

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from t2app.categories import OTHER, OTHER_DESCRIPTION
from t2app.tasks.numbers import last_number
from t2app.tasks.task import Example, Task

_LEAST_NEW_TOKENS, _MOST_NEW_TOKENS = 16, 256


class Shots:
    """An answer is right if its last number is that of the expected one or, where that ends in no number, if the
    expected words stand in it one after another.

    Args:
        pairs: prompt and expected answer of each example.

    Raises:
        ValueError: there is no example, or one lacks its prompt or its answer.
    """

    label = OTHER
    description = OTHER_DESCRIPTION

    def __init__(self, name: str, pairs: Iterable[tuple[str, str]]):
        self.name = name
        self._examples = []
        for number, (prompt, answer) in enumerate(pairs, start=1):
            if not prompt.strip() or not answer.strip():
                raise ValueError(f"example {number} of {name} lacks its {'answer' if prompt.strip() else 'prompt'}")
            self._examples.append(Example(prompt.strip(), answer.strip(), answer.strip()))
        if not self._examples:
            raise ValueError(f"{name} holds no example; a prompt and its expected answer were expected")
        # A token is at least a character, mostly.
        longest = max(len(example.answer) for example in self._examples)
        self.max_new_tokens = min(max(longest, _LEAST_NEW_TOKENS), _MOST_NEW_TOKENS)

    def examples(self, split: str) -> Sequence[Example]:
        """All of them, whatever the split: they were given to be learned from."""
        return self._examples

    def is_right(self, example: Example, answer: str) -> bool:
        expected = _words(example.answer)
        if expected and last_number(expected[-1]) is not None:
            return last_number(answer) == last_number(example.answer)
        return f" {' '.join(expected)} " in f" {' '.join(_words(answer))} "


def shots_of_file(path: Path) -> Shots:
    """The examples of a file with one JSON object a line, `prompt` and `answer`.

    Raises:
        ValueError: the file cannot be read so, or see `Shots`.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"there is neither a task nor a file '{path}'") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pairs.append((str(row["prompt"]), str(row["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError):
            expected = '{"prompt": "…", "answer": "…"}'
            raise ValueError(f"line {number} of {path} is no example; {expected} was expected") from None
    return Shots(path.stem, pairs)


def pick_shots(task: Task, count: int, seed: int) -> list[Example]:
    """`count` of the task's examples to train on, always the same ones for a seed; all where there are fewer."""
    examples = task.examples("train")
    return random.Random(seed).sample(examples, min(count, len(examples)))


def _words(text: str) -> list[str]:
    return re.findall(r"[\w.%€$-]*\w", text.lower())
