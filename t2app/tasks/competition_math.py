"""MATH: problems of competitions (Hendrycks et al. 2021), the 500 of its test set that are usual. For testing only."""

from collections.abc import Sequence

from t2app.categories import CATEGORIES
from t2app.tasks.benchmark_data import only_test, rows
from t2app.tasks.task import Example


class CompetitionMath:
    """Checked by math-verify, which knows that 1/2, 0.5 and \\frac{1}{2} are one answer."""

    name = "math"
    label = "math"
    description = CATEGORIES[label]
    max_new_tokens = 512

    def examples(self, split: str) -> Sequence[Example]:
        """See `Task.examples`; raises ValueError for other splits than the test, DataError where there is no data."""
        only_test(self.name, split)
        return [
            Example(
                f"{row['problem']}\nThink step by step, and put the final answer into \\boxed{{}}.",
                row["answer"],
                row["solution"],
            )
            for row in rows("HuggingFaceH4/MATH-500", "default", split)
        ]

    def is_right(self, example: Example, answer: str) -> bool:
        from math_verify import parse, verify  # here, because it brings sympy, which takes a second to import

        return verify(parse(f"\\boxed{{{example.answer}}}"), parse(answer))
