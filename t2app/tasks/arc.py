"""ARC: questions of science at school with a few answers to choose from (Clark et al. 2018), Easy and Challenge."""

import re
from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.tasks.benchmark_data import only_test, rows_with_validation
from t2app.tasks.procedural import check_split
from t2app.tasks.task import Example

_LETTERS = "ABCDE"
_LETTER = re.compile(rf"\b([{_LETTERS}])\b")


class Arc:
    """The letter that the answer begins with counts; without one at its start, the first that stands alone.

    Args:
        config: of the data set, ARC-Easy or ARC-Challenge; the latter is for testing only.
    """

    label = "reasoning"
    description = CATEGORIES[label]
    max_new_tokens = 16

    def __init__(self, config: str):
        self.name = config.lower()
        self._config = config

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split, DataError where there is no data."""
        check_split(split)
        if self._config == "ARC-Challenge":
            only_test(self.name, split)
        return [_example(row) for row in rows_with_validation("allenai/ai2_arc", self._config, split)]

    def is_right(self, example: Example, answer: str) -> bool:
        named = _LETTER.search(answer)
        return named is not None and named.group(1) == example.answer


def _example(row: dict) -> Example:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    # A few questions number their choices.
    answer = _LETTERS[labels.index(row["answerKey"])]
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False))
    prompt = f"{row['question']}\n{choices}\nAnswer with the letter of the right choice."
    return Example(prompt, answer, answer, tuple(_LETTERS[: len(texts)]))
