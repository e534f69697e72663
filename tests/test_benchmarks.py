"""The public benchmarks as tasks, on a few rows of our own in the hub's form, read from a local folder."""

import json
import re
from fractions import Fraction

import pytest

from t2app.categories import question as dispatch_question
from t2app.tasks import Example
from t2app.tasks.benchmark_data import DataError
from t2app.tasks.numbers import last_number
from t2app.tasks.registry import TASKS

PROGRAM = "def twice(x):\r\n    return 2 * x"
MBPP_ROW = {
    "task_id": 1,
    "text": "Write a function to double a number.",
    "code": PROGRAM,
    "test_list": ["assert twice(2) == 4", "assert twice(0) == START"],
    "test_setup_code": "START = 0",
    "challenge_test_list": [],
}
GSM8K_ROW = {
    "question": "Ann has 1,000 pens and buys 2 more. How many has she?",
    "answer": "She has 1000 + 2 = <<1000+2=1002>>1002 pens.\n#### 1,002",
}
ARC_ROW = {
    "id": "1",
    "question": "Which is a planet?",
    "choices": {"text": ["Mars", "Moon", "Sun"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
FILES = {
    "gsm8k/main/train": [GSM8K_ROW | {"question": f"{number}?\u2028"} for number in range(25)],
    "gsm8k/main/test": [GSM8K_ROW],
    "mbpp/full/train": [MBPP_ROW],
    "mbpp/full/validation": [MBPP_ROW],
    "mbpp/full/test": [MBPP_ROW],
    "ai2_arc/ARC-Easy/train": [ARC_ROW | {"id": str(number)} for number in range(25)],
    "ai2_arc/ARC-Easy/test": [ARC_ROW],
    "ai2_arc/ARC-Challenge/test": [ARC_ROW],
    "svamp/default/test": [{"question": "Tom had 8 cakes and ate 3. How many are left?", "answer": 5.0}],
    "math-500/default/test": [
        {
            "problem": "Compute $\\frac{1}{4}+\\frac{1}{4}$.",
            "solution": "It is \\boxed{\\frac{1}{2}}.",
            "answer": "\\frac{1}{2}",
        }
    ],
    "openai_humaneval/openai_humaneval/test": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'import math\n\ndef root(x):\n    """The square root of x."""\n',
            "canonical_solution": "    return math.sqrt(x)\n",
            "test": "def check(candidate):\n    assert candidate(9) == 3",
            "entry_point": "root",
        }
    ],
}  # fmt: skip
TEST_ONLY = ("svamp", "math", "humaneval", "arc-challenge")
BENCHMARKS = ("gsm8k", "mbpp", "arc-easy", *TEST_ONLY)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    for name, rows in FILES.items():
        file = tmp_path / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", BENCHMARKS)
def test_solution_of_a_benchmark_is_right_and_no_answer_is_wrong(name):
    [example] = TASKS[name].examples("test")
    assert TASKS[name].is_right(example, example.solution)
    assert not TASKS[name].is_right(example, "") and not TASKS[name].is_right(example, "I do not know.")


@pytest.mark.parametrize("name", ["gsm8k", "arc-easy"])
def test_validation_is_a_tenth_of_the_training_rows_that_training_does_not_get(name):
    sizes = {split: len(TASKS[name].examples(split)) for split in ("train", "validation")}
    assert sizes == {"train": 22, "validation": 3}


def test_validation_and_training_share_no_row():
    train, validation = ({example.prompt for example in TASKS["gsm8k"].examples(s)} for s in ("train", "validation"))
    assert len(train) == 22 and not train & validation


@pytest.mark.parametrize("name", TEST_ONLY)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_benchmarks_that_are_unseen_tasks_have_only_a_test(name, split):
    with pytest.raises(ValueError, match=f"'{name}' has no split '{split}'"):
        TASKS[name].examples(split)


def test_file_that_is_not_there_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("T2_DATA_DIR", str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"there is no file .*gsm8k/main/test.jsonl; .* --data or T2_DATA_DIR"):
        TASKS["gsm8k"].examples("test")


def test_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "gsm8k" / "main" / "test.jsonl").write_text('{"question": ')
    with pytest.raises(DataError, match="cannot be read as one JSON object a line"):
        TASKS["gsm8k"].examples("test")


def test_without_a_folder_and_without_the_hub_the_error_says_so(monkeypatch, tmp_path):
    import datasets

    monkeypatch.delenv("T2_DATA_DIR")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="could not be had from the hub .* --data or T2_DATA_DIR"):
        TASKS["arc-easy"].examples("test")


def test_solution_of_gsm8k_is_readable_and_ends_in_the_answer():
    [example] = TASKS["gsm8k"].examples("test")
    assert example.solution == "She has 1000 + 2 = 1002 pens.\nThe answer is 1,002."


def test_mbpp_shows_the_first_test_and_runs_them_all():
    [example] = TASKS["mbpp"].examples("test")
    assert example.prompt.endswith("assert twice(2) == 4") and len(example.tests) == 3
    assert not TASKS["mbpp"].is_right(example, "def twice(x): return x + 2")


def test_humaneval_takes_the_whole_function_or_its_body():
    [example] = TASKS["humaneval"].examples("test")
    task = TASKS["humaneval"]
    assert task.is_right(example, "```python\ndef root(x):\n    return x ** 0.5\n```")
    assert task.is_right(example, "```python\n    return math.sqrt(x)\n```")
    assert not task.is_right(example, "```python\ndef root(x):\n    return x\n```")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("A", True),
        ("A.", True),
        ("A. Mars", True),
        ("The answer is A", True),
        ("(A)", True),
        ("Mars", True),
        ("mars.", True),
        ("A planet is Mars.", True),
        ("B", False),
        ("B, not A", False),
        ("B. Mars", False),
        ("Mars or Moon", False),
        ("Marsh", False),
        ("E", False),
        ("", False),
    ],
)
def test_arc_takes_a_choice_by_its_words_or_its_letter(answer, right):
    [example] = TASKS["arc-easy"].examples("test")
    assert example.prompt.count("\n") == 4 and "A. Mars" in example.prompt
    assert TASKS["arc-easy"].is_right(example, answer) is right


@pytest.mark.parametrize("answer", ["\\boxed{\\frac{1}{2}}", "It is $\\frac12$.", "So \\boxed{0.5}", "\\boxed{2/4}"])
def test_math_takes_every_way_to_write_the_answer(answer):
    [example] = TASKS["math"].examples("test")
    assert TASKS["math"].is_right(example, answer)
    assert not TASKS["math"].is_right(example, answer.replace("2", "3").replace("0.5", "0.4"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,234.50 in all", Fraction("1234.5")),
        ("5 apples and 12 pears.", 12),
        ("It is −3 degrees", -3),
        ("-3", -3),
        ("10-3", 3),
        ("(4)-2", 2),
        ("80%", 80),
        ("3 / 4 of it", Fraction(3, 4)),
        ("1/0", None),
        ("9" * 5000, None),
        ("none", None),
    ],
)
def test_last_number_of_a_text(text, number):
    assert last_number(text) == number


def test_numbers_count_by_value_and_not_by_how_they_are_written():
    [example] = TASKS["svamp"].examples("test")
    for answer in ("8 - 3 = 5", "5.0", "He has 5 cakes.", "$5.00"):
        assert TASKS["svamp"].is_right(example, answer)
    assert not TASKS["svamp"].is_right(Example("", "5", "5"), "-5")


def _words(text):
    return frozenset(re.findall(r"[\w']+", text.lower()))


def _overlap(words, others):
    """The Jaccard index of two sets of words."""
    return len(words & others) / len(words | others)


def test_dispatch_is_tested_on_sources_and_wordings_that_it_is_not_trained_on():
    task = TASKS["dispatch"]
    seen = {example.prompt for split in ("train", "validation") for example in task.examples(split)}
    test = task.examples("test")
    question = _words(dispatch_question(""))
    for prompt in test:
        words = _words(prompt.prompt) - question
        twin = max(seen, key=lambda other: _overlap(words, _words(other) - question))
        assert _overlap(words, _words(twin) - question) < 0.5, (prompt.prompt, twin)
    asked = {TASKS[name].examples("test")[0].prompt: TASKS[name].label for name in ("gsm8k", "mbpp", "arc-easy")}
    for prompt, label in asked.items():
        [example] = [example for example in test if prompt in example.prompt]
        assert example.answer == label
        # What a benchmark's prompts have in common is its wording: the sentence that follows the row's own text.
        wording = prompt.splitlines()[1 if label == "code" else -1]
        assert not any(wording in prompt for prompt in seen)
    assert sum(example.answer == "other" for example in test) == 125
