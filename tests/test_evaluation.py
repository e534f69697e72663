"""Accuracy of mixtures: the interval, and that every example is answered under its own mixture and kept in order."""

import pytest
import torch

from t2app.decoding import collected, decode
from t2app.evaluation import Accuracy, evaluate, greedy_answers
from t2app.messages import Sampling
from t2app.tasks import TASKS, Example


class Exact:
    """An answer is right where it is the example's, letter for letter."""

    name = "exact"
    label = "other"
    description = "repeating"
    max_new_tokens = 5

    def is_right(self, example: Example, answer: str) -> bool:
        return answer == example.answer


# More than one batch, of prompts whose lengths go up and down, so that they are not answered in this order.
EXAMPLES = [Example("word " * (1 + number * 7 % 13) + str(number), "", "") for number in range(80)]


@pytest.fixture(scope="module")
def mixtures(tiny) -> list:
    generator = torch.Generator().manual_seed(0)
    experts = [
        {path: torch.randn(len(layer.vectors), generator=generator) for path, layer in tiny.adapted.layers.items()}
        for _ in range(2)
    ]
    return [(None, *experts)[number % 3] for number in range(len(EXAMPLES))]


@pytest.fixture(scope="module")
def alone(tiny, mixtures) -> list[str]:
    """The greedy answer to each example under its mixture, decoded by itself."""
    sampling = Sampling(max_new_tokens=Exact.max_new_tokens)
    rows = [
        collected(decode(tiny.adapted, [tiny.prompt_ids(example.prompt)], [mixture], sampling, tiny.eos_ids))[0]
        for example, mixture in zip(EXAMPLES, mixtures, strict=True)
    ]
    return [tiny.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962), (500, 500, 0.9924, 1.0)],
)
def test_interval_is_wilsons_at_95_percent(correct, n, low, high):
    accuracy = Accuracy("arithmetic", "base", correct, n)
    assert accuracy.accuracy == correct / n
    assert accuracy.interval == pytest.approx((low, high), abs=1e-4)
    assert all(type(bound) is float for bound in accuracy.interval)


def test_answers_come_in_the_order_of_the_examples_each_under_its_own_mixture(tiny, mixtures, alone):
    done = []
    assert greedy_answers(tiny, Exact(), EXAMPLES, mixtures, done.append) == alone
    assert len(done) > 1 and sum(done) == len(EXAMPLES)
    # The mixtures matter: without them the rows that have one answer otherwise.
    base = greedy_answers(tiny, Exact(), EXAMPLES, [None] * len(EXAMPLES))
    assert [answer == other for answer, other in zip(base, alone, strict=True)] == [
        mixture is None for mixture in mixtures
    ]


def test_accuracy_counts_the_examples_answered_rightly(tiny, mixtures, alone):
    examples = [
        Example(example.prompt, answer if number < 30 else answer + "!", "")
        for number, (example, answer) in enumerate(zip(EXAMPLES, alone, strict=True))
    ]
    assert evaluate(tiny, Exact(), examples, "mixed", mixtures) == Accuracy("exact", "mixed", 30, 80)


def test_real_model_does_some_arithmetic_rightly_and_some_not(real):
    task = TASKS["arithmetic"]
    examples = task.examples("test")[::30]
    accuracy = evaluate(real, task, examples, "base", [None] * len(examples))
    assert accuracy.n == len(examples)
    assert 0.1 < accuracy.accuracy < 0.9


def test_no_example_is_an_error(tiny):
    with pytest.raises(ValueError, match="there are no examples of 'exact' to evaluate on"):
        evaluate(tiny, Exact(), [], "base", [])
