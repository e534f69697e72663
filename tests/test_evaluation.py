"""Accuracy of mixtures: the interval, and that every example is answered under its own mixture and kept in order."""

import csv

import pytest
import torch

from t2app.decoding import collected, decode
from t2app.evaluation import Accuracy, AnswerFile, _p_value, evaluate, greedy_answers, results_table, write_csv
from t2app.messages import Sampling
from t2app.tasks import Example
from t2app.tasks.registry import TASKS


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
        {path: torch.randn(layer.rank, generator=generator) for path, layer in tiny.adapted.layers.items()}
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


@pytest.fixture
def decoded(monkeypatch) -> list:
    """Grows by every prompt that is decoded."""
    rows = []

    def counted(adapted, prompts, *arguments, **named):
        rows.extend(prompts)
        return decode(adapted, prompts, *arguments, **named)

    monkeypatch.setattr("t2app.evaluation.decode", counted)
    return rows


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
    assert evaluate(tiny, Exact(), examples, {"mixed": mixtures}) == [Accuracy("exact", "mixed", 30, 80)]


def test_mixtures_are_answered_together_as_they_are_apart_and_tested_against_the_base(tiny, mixtures, alone):
    examples = [Example(example.prompt, answer, "") for example, answer in zip(EXAMPLES, alone, strict=True)]
    nothing = [None] * len(examples)
    base, mixed = evaluate(tiny, Exact(), examples, {"base": nothing, "mixed": mixtures})
    assert [base] == evaluate(tiny, Exact(), examples, {"base": nothing})
    assert (mixed.correct, base.p_value) == (80, None)
    # Of n examples that differ, all in favour of one side: both tails of n throws of a coin.
    assert mixed.p_value == pytest.approx(2 * 0.5 ** (80 - base.correct))


def test_p_value_looks_only_at_examples_that_differ():
    assert _p_value([True] * 5 + [False] * 5, [True] * 5 + [False] * 5) == 1.0
    assert _p_value([True, False] * 20, [False, True] * 20) == 1.0
    assert _p_value([False] * 10, [True] * 10) == _p_value([True] * 10, [False] * 10) == pytest.approx(2 / 2**10)


def test_answers_that_were_kept_are_not_given_again(tiny, mixtures, alone, decoded, tmp_path):
    file = tmp_path / "answers.jsonl"
    assert greedy_answers(tiny, Exact(), EXAMPLES, mixtures, kept=AnswerFile(file)) == alone
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == len(EXAMPLES)
    # Cut off in the middle of a line: that answer and the ones after it are given again, the others are not.
    file.write_text("".join(lines[:70]) + lines[70][:20])
    decoded.clear()
    done = []
    assert greedy_answers(tiny, Exact(), EXAMPLES, mixtures, done.append, AnswerFile(file)) == alone
    assert len(decoded) == 10 and sum(done) == len(EXAMPLES)
    assert sorted(file.read_text().splitlines(keepends=True)) == sorted(lines)


def test_what_is_asked_for_twice_is_answered_once(tiny, mixtures, alone, decoded):
    done = []
    copies = [dict(mixture) if mixture else None for mixture in mixtures[:6]]
    twice = greedy_answers(tiny, Exact(), EXAMPLES[:6] * 2, [*mixtures[:6], *copies], done.append)
    assert twice == alone[:6] * 2
    assert len(decoded) == 6 and sum(done) == 12


def test_kept_answers_are_of_one_mixture_one_length_and_one_prompt(tiny, mixtures, tmp_path):
    kept = AnswerFile(tmp_path / "answers.jsonl")
    greedy_answers(tiny, Exact(), EXAMPLES[:3], mixtures[:3], kept=kept)
    changed = [mixtures[0], {path: delta * 2 for path, delta in mixtures[1].items()}, mixtures[2]]
    expected = greedy_answers(tiny, Exact(), EXAMPLES[:3], changed)
    assert greedy_answers(tiny, Exact(), EXAMPLES[:3], changed, kept=kept) == expected
    longer = Exact()
    longer.max_new_tokens = 9
    expected = greedy_answers(tiny, longer, EXAMPLES[:3], mixtures[:3])
    assert greedy_answers(tiny, longer, EXAMPLES[:3], mixtures[:3], kept=kept) == expected


def test_table_and_csv_say_what_was_measured(tmp_path):
    measured = [Accuracy("exact", "base", 30, 80), Accuracy("exact", "mixed", 80, 80, 1e-9)]
    assert results_table(measured).splitlines()[2:] == [
        "| exact | base | 37.5% | 27.7% to 48.5% | 80 |  |",
        "| exact | mixed | 100.0% | 95.4% to 100.0% | 80 | < 0.001 |",
    ]
    write_csv(measured, tmp_path / "made" / "table.csv")
    with open(tmp_path / "made" / "table.csv", newline="") as file:
        base, mixed = csv.DictReader(file)
    assert (base["correct"], base["p_value"], mixed["p_value"]) == ("30", "", "1e-09")
    assert float(base["low"]) == pytest.approx(measured[0].interval[0])


def test_real_model_does_some_arithmetic_rightly_and_some_not(real):
    task = TASKS["arithmetic"]
    examples = task.examples("test")[::30]
    [accuracy] = evaluate(real, task, examples, {"base": [None] * len(examples)})
    assert accuracy.n == len(examples)
    assert 0.1 < accuracy.accuracy < 0.9


def test_no_example_is_an_error(tiny):
    with pytest.raises(ValueError, match="there are no examples of 'exact' to evaluate on"):
        evaluate(tiny, Exact(), [], {"base": []})
