"""MBPP: small Python programs from a sentence and a test (Austin et al. 2021), checked by running its tests."""

from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.sandbox import run_tests
from t2app.tasks.benchmark_data import rows
from t2app.tasks.code import code_of
from t2app.tasks.procedural import check_split
from t2app.tasks.task import Example


class Mbpp:
    """All tests of a problem must pass; the prompt shows the first, which names the function."""

    name = "mbpp"
    label = "code"
    description = CATEGORIES[label]
    max_new_tokens = 256

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError where there is no such split, DataError where there is no data."""
        check_split(split)
        return [_example(row) for row in rows("google-research-datasets/mbpp", "full", split)]

    def is_right(self, example: Example, answer: str) -> bool:
        """The code of the answer must pass the example's tests in the sandbox."""
        return run_tests(code_of(answer), example.tests).passed


def _example(row: dict) -> Example:
    program = row["code"].replace("\r\n", "\n").strip()
    prompt = f"{row['text']}\nYour code should pass this test:\n{row['test_list'][0]}"
    setup = [row["test_setup_code"]] if row["test_setup_code"] else []
    return Example(prompt, program, f"```python\n{program}\n```", tests=(*setup, *row["test_list"]))
