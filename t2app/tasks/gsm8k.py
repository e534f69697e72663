"""GSM8K: word problems of grade school, a number for an answer (Cobbe et al. 2021)."""

import re
from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.tasks.benchmark_data import rows_with_validation
from t2app.tasks.numbers import last_number
from t2app.tasks.procedural import check_split
from t2app.tasks.task import Example

_DATA = ("openai/gsm8k", "main")
_CALCULATION = re.compile(r"<<.*?>>")


class Gsm8k:
    """The last number of the answer counts."""

    name = "gsm8k"
    label = "math"
    description = CATEGORIES[label]
    max_new_tokens = 256

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split, DataError where there is no data."""
        check_split(split)
        return [_example(row) for row in rows_with_validation(*_DATA, split)]

    def is_right(self, example: Example, answer: str) -> bool:
        return last_number(answer) == last_number(example.answer)


def _example(row: dict) -> Example:
    reasoning, _, answer = row["answer"].rpartition("####")
    solution = f"{_CALCULATION.sub('', reasoning).strip()}\nThe answer is {answer.strip()}."
    prompt = f"{row['question']}\nThink step by step, and end with the answer as a number."
    return Example(prompt, answer.strip(), solution)
