"""SVAMP: one-step word problems in variations (Patel et al. 2021). For testing only."""

from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.tasks.benchmark_data import only_test, rows
from t2app.tasks.numbers import last_number
from t2app.tasks.task import Example


class Svamp:
    """The last number of the answer counts."""

    name = "svamp"
    label = "math"
    description = CATEGORIES[label]
    max_new_tokens = 128

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError for other splits than the test, DataError where there is no data."""
        only_test(self.name, split)
        return [_example(row) for row in rows("ChilleD/SVAMP", "default", split)]

    def is_right(self, example: Example, answer: str) -> bool:
        return last_number(answer) == last_number(example.answer)


def _example(row: dict) -> Example:
    # The hub's copy capitalises its fields; others do not.
    fields = {name.lower(): value for name, value in row.items()}
    question = fields.get("question_concat") or " ".join(filter(None, (fields.get("body"), fields["question"])))
    answer = str(fields["answer"])
    return Example(f"{question}\nThink step by step, and end with the answer as a number.", answer, answer)
