"""HumanEval: Python functions to complete (Chen et al. 2021), checked by running its tests. For testing only."""

from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.sandbox import run_tests
from t2app.tasks.benchmark_data import only_test, rows
from t2app.tasks.code import code_of
from t2app.tasks.task import Example


class HumanEval:
    """The function may come whole or be only its body's continuation; either way its tests must pass."""

    name = "humaneval"
    label = "code"
    description = CATEGORIES[label]
    max_new_tokens = 384

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError for other splits than the test, DataError where there is no data."""
        only_test(self.name, split)
        return [_example(row) for row in rows("openai/openai_humaneval", "openai_humaneval", split)]

    def is_right(self, example: Example, answer: str) -> bool:
        """The beginning that was given comes first, so that what it imports and defines is there."""
        code = code_of(answer)
        return run_tests(example.answer + code, example.tests).passed


def _example(row: dict) -> Example:
    prompt = f"Complete this Python function. Give the whole function.\n```python\n{row['prompt']}```"
    # A program that only begins ends in a docstring, so a whole function after it is one more definition that counts.
    tests = (row["test"], f"check({row['entry_point']})")
    program = row["prompt"] + row["canonical_solution"]
    beginning = row["prompt"].rstrip() + "\n"
    return Example(prompt, beginning, f"```python\n{program}```", tests=tests)
