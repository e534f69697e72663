"""ARC: questions of science at school with a few answers to choose from (Clark et al. 2018), Easy and Challenge."""

import re
from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.tasks.benchmark_data import only_test, rows_with_validation
from t2app.tasks.procedural import check_split
from t2app.tasks.task import Example

_LETTERS = "ABCDE"
# A letter before a word is the word "A".
_LETTER = re.compile(rf"(?:^|\b(?:answer|choice) is\b)\W*([{_LETTERS}])\b(?! \w)")
_NOT_WORDS = re.compile(r"\W+")


class Arc:
    """A choice may be named by its words, which are asked for, or by its letter.

    A model of 135M learns to answer in words, and hardly in letters.

    Args:
        config: of the data set, ARC-Easy or ARC-Challenge; the latter is for testing only.
    """

    label = "reasoning"
    description = CATEGORIES[label]
    max_new_tokens = 32

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
        return _named(answer, example.options) == example.answer


def _named(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that is the answer, or else the one whose letter it names, or else the only one that it mentions."""
    for choice in choices:
        if answer.strip(" .\n").casefold() == choice.strip(" .").casefold():
            return choice
    if letter := _LETTER.search(answer):
        return dict(zip(_LETTERS, choices, strict=False)).get(letter.group(1))
    mentioned = [choice for choice in choices if _words(choice) in _words(answer)]
    return mentioned[0] if len(mentioned) == 1 else None


def _words(text: str) -> str:
    """The words of a text in lower case, with a space around each, so that no word is found inside another."""
    return f" {_NOT_WORDS.sub(' ', text).strip().lower()} "


def _example(row: dict) -> Example:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    # A few questions number their choices.
    answer = texts[labels.index(row["answerKey"])]
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(_LETTERS, texts, strict=False))
    prompt = f"{row['question']}\n{choices}\nAnswer with the words of the right choice."
    return Example(prompt, answer, answer, tuple(texts))
