"""Questions about pictures that several people answered: TextVQA (Singh et al. 2019), whose answers are written in the
picture, and OK-VQA (Marino et al. 2019), whose answers need knowledge from outside of it. For testing only.
"""

import re
from collections import Counter
from collections.abc import Sequence

from t2app.categories import OTHER, OTHER_DESCRIPTION
from t2app.tasks.benchmark_data import only_test, pictured_rows
from t2app.tasks.task import Example, Picture

# Of ten people who answered, so many have to have said it. The benchmarks' own score gives a third of a point for each,
# and so a whole one from here on; the answers that it gives a part of a point count as wrong here.
_SAID_BY = 3
_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS)} | {"none": "0"}
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
_APOSTROPHES = re.compile(r"['’`]")
# A point or a colon between digits belongs to a number or a time.
_PUNCTUATION = re.compile(r"(?<!\d)[.:]|[.:](?!\d)|[^\w\s.:]")


class VisualQuestions:
    """An answer is right if at least three of the ten people gave it, in the benchmarks' way of comparing: without
    upper case, punctuation and articles, and with numbers as digits.

    Args:
        dataset: hub name; split: the one whose answers are public.
    """

    label = OTHER
    description = OTHER_DESCRIPTION
    max_new_tokens = 16

    def __init__(self, name: str, dataset: str, split: str):
        self.name = name
        self._data = (dataset, "default", split)

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError for other splits than the test, DataError where there is no data."""
        only_test(self.name, split)
        return [_example(row, picture) for row, picture in pictured_rows(*self._data)]

    def is_right(self, example: Example, answer: str) -> bool:
        given = _normalised(answer)
        return sum(_normalised(said) == given for said in example.answers) >= _SAID_BY


VISUAL_QUESTIONS = (
    VisualQuestions("textvqa", "lmms-lab/textvqa", "validation"),
    VisualQuestions("okvqa", "lmms-lab/OK-VQA", "val2014"),
)


def _example(row: dict, picture: Picture) -> Example:
    [(answer, _)] = Counter(row["answers"]).most_common(1)
    prompt = f"{row['question']}\nAnswer with one word or a short phrase."
    return Example(prompt, answer, answer, answers=tuple(row["answers"]), picture=picture)


def _normalised(text: str) -> str:
    text = _APOSTROPHES.sub("", _THOUSANDS.sub("", text.lower()))
    words = _PUNCTUATION.sub(" ", text).split()
    return " ".join(_NUMBERS.get(word, word) for word in words if word not in _ARTICLES)
