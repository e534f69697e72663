"""The first pass as a task: name the category of a prompt. It is what the classification expert is trained on.

Training and validation take the procedural tasks' prompts and a written set. The test takes the public benchmarks and
another written set, for `other`: neither their wordings nor their sources are trained on.
"""

import json
import random
from collections.abc import Iterator, Sequence
from importlib import resources

from t2app.categories import CLASSIFIER, LABELS, OTHER, question
from t2app.tasks.arc import Arc
from t2app.tasks.arithmetic import Arithmetic
from t2app.tasks.code import CodeBasics
from t2app.tasks.gsm8k import Gsm8k
from t2app.tasks.mbpp import Mbpp
from t2app.tasks.procedural import check_split, sample, split_of
from t2app.tasks.reasoning import ReasoningBasics
from t2app.tasks.task import Example

_PROCEDURAL = (Arithmetic(), CodeBasics(), ReasoningBasics())
_BENCHMARKS = (Gsm8k(), Mbpp(), Arc("ARC-Easy"))
_OF_EACH_PROCEDURAL = {"train": 40, "validation": 10}
_OF_EACH_LABEL_IN_TEST = 125


def labelled_prompts(split: str) -> list[tuple[str, str]]:
    """Prompts as users type them, and the category of each.

    Raises:
        ValueError: there is no such split.
        DataError: a benchmark's data cannot be had, for the test.
    """
    check_split(split)
    labelled = list(_test_prompts() if split == "test" else _written(split))
    if split != "test":
        count = _OF_EACH_PROCEDURAL[split]
        labelled += [(e.prompt, task.label) for task in _PROCEDURAL for e in sample(task.examples(split), count)]
    random.Random(0).shuffle(labelled)
    return labelled


class Dispatch:
    """The first word of the answer counts."""

    name = "dispatch"
    label = CLASSIFIER
    description = "naming the category of a prompt, for the first pass"
    max_new_tokens = 4

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split, DataError where there is no data."""
        return [Example(question(prompt), label, label, LABELS) for prompt, label in labelled_prompts(split)]

    def is_right(self, example: Example, answer: str) -> bool:
        words = answer.split(maxsplit=1)
        return bool(words) and words[0].strip(".,:;!\"'*").lower() == example.answer


def _written(split: str) -> Iterator[tuple[str, str]]:
    for line in _lines("train.jsonl"):
        row = json.loads(line)
        # A part is kept for validation; there is no test in this file.
        if (split_of((row["prompt"],)) == "validation") == (split == "validation"):
            yield row["prompt"], row["label"]


def _test_prompts() -> Iterator[tuple[str, str]]:
    for task in _BENCHMARKS:
        for example in sample(task.examples("test"), _OF_EACH_LABEL_IN_TEST):
            yield example.prompt, task.label
    for line in _lines("other_test.txt"):
        yield line, OTHER


def _lines(name: str) -> list[str]:
    text = resources.files("t2app.tasks").joinpath("prompts", name).read_text(encoding="utf-8")
    return text.splitlines()
