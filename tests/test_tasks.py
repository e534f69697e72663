"""Tasks: what their splits hold and which answers they take for right."""

import re
import sys
from collections import Counter

import gradio as gr
import pytest

from t2app.categories import LABELS
from t2app.loading import EngineLoader
from t2app.models.catalogue import DEFAULT_MODEL
from t2app.tasks import SPLITS, Example
from t2app.tasks.benchmark_data import DataError
from t2app.tasks.registry import TASKS, task_named
from t2app.tasks.shots import Shots, shots_of_file
from t2app.tasks.union import Union
from t2app.ui.search import build_search_tab

ARITHMETIC = TASKS["arithmetic"]
# The tasks that make their own examples.
PROCEDURAL = ("arithmetic", "reasoning-basics", "code-basics")
CHECKED_HERE = ("arithmetic", "reasoning-basics")
PUZZLES = ("chain-sum", "letter-counting", "needle")
OPERATOR_WORDS = {"+": r"\+|plus|add", "-": r" - |minus|subtract|take", "*": r"×|\*|times|multipl"}
RESULT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
LARGEST = {"+": 20, "-": 20, "*": 10}
LARGEST_IN_TRAINING = {"+": 40, "-": 60, "*": 12}


def problem(example: Example) -> tuple[str, int, int]:
    """Operator and operands of a prompt, as its wording orders them."""
    a, b = map(int, re.findall(r"\d+", example.prompt))
    if re.search(r"add \d+ to|take \d+ away from|Subtract \d+ from", example.prompt):
        a, b = b, a
    [operator] = [name for name, words in OPERATOR_WORDS.items() if re.search(words, example.prompt, re.IGNORECASE)]
    return operator, a, b


PROBLEMS = {split: [problem(example) for example in ARITHMETIC.examples(split)] for split in SPLITS}


def test_splits_of_arithmetic_share_no_problem_not_even_the_other_way_round():
    train, validation, test = (
        {(operator, frozenset((a, b))) for operator, a, b in PROBLEMS[split]} for split in SPLITS
    )
    assert not train & validation and not train & test and not validation & test


def test_solutions_of_arithmetic_state_no_problem_of_another_split():
    apart = {(a, operator, b) for split in ("validation", "test") for operator, a, b in PROBLEMS[split]}
    for example in ARITHMETIC.examples("train"):
        for a, operator, b in re.findall(r"(\d+) ([-+×]) (\d+) =", example.solution):
            problem_stated = (int(a), operator.replace("×", "*"), int(b))
            assert problem_stated not in apart, example.solution


def test_test_split_of_arithmetic_has_at_least_five_hundred_problems_each_once():
    assert len(PROBLEMS["test"]) == len(set(PROBLEMS["test"])) >= 500


def test_arithmetic_asks_each_problem_of_validation_and_the_small_ones_of_training_in_six_wordings():
    assert set(Counter(PROBLEMS["validation"]).values()) == {6}
    for (operator, a, b), count in Counter(PROBLEMS["train"]).items():
        assert count == (6 if max(a, b) <= LARGEST[operator] else 1)


@pytest.mark.parametrize("name", PROCEDURAL)
@pytest.mark.parametrize("split", SPLITS)
def test_a_split_is_always_the_same_and_repeats_no_prompt(name, split):
    examples = TASKS[name].examples(split)
    assert examples and examples == TASKS[name].examples(split)
    assert len({example.prompt for example in examples}) == len(examples)


@pytest.mark.parametrize("name", PROCEDURAL)
@pytest.mark.parametrize("split", SPLITS)
def test_the_answer_and_the_solution_of_every_example_are_right(name, split):
    task = TASKS[name]
    # Code takes a process an example, so a sample of them.
    for example in task.examples(split)[:: 1 if not task.examples(split)[0].tests else 20]:
        assert task.is_right(example, example.answer) and task.is_right(example, example.solution)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_of_arithmetic_are_the_results_never_negative_and_of_small_numbers(split):
    for example, (operator, a, b) in zip(ARITHMETIC.examples(split), PROBLEMS[split], strict=True):
        assert int(example.answer) == RESULT[operator](a, b) >= 0
        assert max(a, b) <= (LARGEST_IN_TRAINING if split == "train" else LARGEST)[operator]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("19", "19", True),
        (" 19\n", "19", True),
        ("12 + 7 = 19.", "19", True),
        ("The answer is **19**", "19", True),
        ("19.0", "19", True),
        ("1,000", "1000", True),
        ("-3", "-3", True),
        ("−3", "-3", True),
        ("19, or so", "19", True),
        ("0", "0", True),
        ("-3", "3", False),
        ("19.5", "19", False),
        ("190", "19", False),
        ("19 is what 12 + 7 makes", "19", False),
        ("no number", "19", False),
        ("", "19", False),
        ("nineteen", "19", False),
        (",", "19", False),
        ("9" * 500, "19", False),
    ],
)
def test_last_number_of_an_answer_counts(answer, expected, right):
    assert ARITHMETIC.is_right(Example("", expected, ""), answer) is right


def test_unknown_split_and_unknown_task_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="there is no split 'dev'; choose one of train, validation, test"):
        ARITHMETIC.examples("dev")
    with pytest.raises(ValueError, match="there is no task 'cooking'; there are: .*arithmetic"):
        task_named("cooking")


@pytest.mark.parametrize("name", ["reasoning-basics", "code-basics"])
def test_procedural_tasks_are_large_enough_to_train_on_and_to_measure(name):
    sizes = {split: len(TASKS[name].examples(split)) for split in SPLITS}
    assert sizes["test"] >= 500 and sizes["train"] >= 1000 and sizes["validation"] >= 200


def test_splits_of_reasoning_share_no_set_of_things_that_a_question_is_about():
    # Three people may be asked about in two splits, as long as it is another thing that orders them.
    about = {
        split: {
            frozenset(example.options) if example.options else tuple(re.findall(r"\d+", example.prompt)[:2])
            for example in TASKS["reasoning-basics"].examples(split)
            if not re.search(r" is \w+ than ", example.prompt)
        }
        for split in SPLITS
    }
    assert (
        not about["train"] & about["validation"] | about["train"] & about["test"] | about["validation"] & about["test"]
    )


def test_splits_of_code_share_no_program():
    def bodies(split: str) -> set[str]:
        return {example.answer.split(":", 1)[1] for example in TASKS["code-basics"].examples(split)}

    train, validation, test = map(bodies, SPLITS)
    assert not train & validation | train & test | validation & test


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("Anna", True),
        ("anna.", True),
        ("It is Anna!", True),
        ("**Anna**", True),
        ("Anna is taller than Ben", False),
        ("Annabel", False),
        ("Ben", False),
        ("", False),
    ],
)
def test_reasoning_takes_an_answer_that_names_the_right_option_and_no_other(answer, right):
    example = Example("", "Anna", "Anna", ("Anna", "Ben", "Carl"))
    assert TASKS["reasoning-basics"].is_right(example, answer) is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("def f(n):\n    return n + 1", True),
        ("Here it is:\n```python\ndef f(n):\n    return n + 1\n```\nIt adds one.", True),
        ("```\ndef f(n):\n    return n + 1", True),
        ("```python\ndef g(n):\n    return n + 1\n```", False),
        ("def f(n):\n    return n + 2", False),
        ("The function adds one.", False),
        ("", False),
    ],
)
def test_code_is_right_where_the_code_of_the_answer_passes_the_tests(answer, right):
    example = Example("", "", "", tests=("assert f(1) == 2", "assert f(0) == 1"))
    assert TASKS["code-basics"].is_right(example, answer) is right


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_registered_under_its_name_and_says_what_it_is_for(name):
    task = task_named(name)
    assert task.name == name
    assert task.label and task.max_new_tokens > 0
    assert task.description and "\n" not in task.description


class Echo:
    """Says that an answer is right where it is the example's; has as many examples as it is told."""

    label = "math"
    description = "echoes"

    def __init__(self, name: str, counts: dict[str, int], max_new_tokens: int):
        self.name, self.counts, self.max_new_tokens = name, counts, max_new_tokens

    def examples(self, split: str) -> list[Example]:
        return [Example(f"{self.name} {number}", self.name, self.name) for number in range(self.counts[split])]

    def is_right(self, example: Example, answer: str) -> bool:
        return answer == f"{self.name}!"


def test_union_takes_equal_shares_repeats_for_training_only_and_asks_each_task_about_its_own_examples():
    small = Echo("small", {"train": 2, "validation": 1, "test": 3}, 4)
    large = Echo("large", {"train": 5, "validation": 4, "test": 3}, 9)
    union = Union([small, large])
    assert (union.name, union.label, union.max_new_tokens) == ("small+large", "math", 9)
    for split, share, distinct in (("train", 5, 2 + 5), ("validation", 1, 2), ("test", 3, 6)):
        examples = union.examples(split)
        assert Counter(example.answer for example in examples) == {"small": share, "large": share}
        assert len({example.prompt for example in examples}) == distinct
        assert all(union.is_right(example, f"{example.answer}!") for example in examples)
        assert not any(union.is_right(example, example.answer) for example in examples)


def test_union_of_tasks_of_several_categories_is_refused():
    with pytest.raises(ValueError, match="arithmetic, code-basics are of code, math; train an expert for each"):
        Union([TASKS["arithmetic"], TASKS["code-basics"]])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_dispatch_task_asks_for_the_category_of_prompts_of_all_labels(split):
    examples = TASKS["dispatch"].examples(split)
    assert {example.answer for example in examples} == set(LABELS)
    assert len({example.prompt for example in examples}) == len(examples)
    assert Counter(example.answer for example in examples)["other"] > len(examples) / 8


@pytest.mark.parametrize(
    ("answer", "right"),
    [("math", True), ("Math.", True), ("math, I think", True), ("code", False), ("It is math", False), ("", False)],
)
def test_dispatch_task_takes_the_first_word_of_an_answer(answer, right):
    assert TASKS["dispatch"].is_right(Example("", "math", "math", LABELS), answer) is right


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzles_of_a_split_are_always_the_same_and_in_no_other_split(name):
    task = TASKS[name]
    prompts = {split: [example.prompt for example in task.examples(split)] for split in SPLITS}
    assert all(len(set(found)) == len(found) >= 50 for found in prompts.values())
    assert len(prompts["test"]) >= 400
    assert len(set().union(*prompts.values())) == sum(map(len, prompts.values()))
    for example in task.examples("test"):
        assert task.is_right(example, f"It is {example.answer}.") and not task.is_right(example, "No idea")


@pytest.mark.parametrize("name", PUZZLES)
def test_puzzles_without_the_library_that_makes_them_say_how_to_get_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match=f"'{name}' .* `pip install reasoning-gym`"):
        task_named(name).examples("test")


@pytest.mark.parametrize(("installed", "offered"), [(True, [*PUZZLES, *CHECKED_HERE]), (False, [*CHECKED_HERE])])
def test_page_offers_puzzles_where_the_library_is_that_makes_them(monkeypatch, installed, offered):
    if not installed:
        monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with gr.Blocks() as page:
        build_search_tab(EngineLoader(DEFAULT_MODEL, "fp32"), gr.Radio())
    [task] = [block for block in page.blocks.values() if isinstance(block, gr.Dropdown)]
    assert [name for name, _ in task.choices] == offered and task.value == offered[0]


def test_puzzle_that_asks_for_a_name_takes_that_name_alone():
    task = TASKS["needle"]
    example = next(example for example in task.examples("test") if len(example.options) > 1)
    wrong = next(name for name in example.options if name != example.answer.lower())
    assert not task.is_right(example, f"{example.answer} or {wrong}")
    assert not task.is_right(example, wrong)


@pytest.mark.parametrize(
    ("expected", "answer", "right"),
    [
        ("12", "It is 12.", True),
        ("12", "12 + 1 = 13", False),
        ("3 + 9 = 12", "12", True),
        ("Paris", "That is paris, I think.", True),
        ("New York", "new  york!", True),
        ("New York", "York, new", False),
        ("cat", "concatenate", False),
        ("B12 vitamin", "vitamin", False),
    ],
)
def test_answer_to_ones_own_example_counts_by_its_last_number_or_its_words(expected, answer, right):
    task = Shots("own", [("?", expected)])
    assert task.is_right(task.examples("train")[0], answer) is right


def test_own_examples_are_read_from_a_file_of_one_object_a_line(tmp_path):
    file = tmp_path / "capitals.jsonl"
    file.write_text('{"prompt": "France?", "answer": "Paris"}\n\n{"prompt": "1 + 1?", "answer": 2}\n')
    task = shots_of_file(file)
    assert task.name == "capitals"
    assert [(example.prompt, example.answer) for example in task.examples("train")] == [
        ("France?", "Paris"),
        ("1 + 1?", "2"),
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "capitals holds no example"),
        ('{"prompt": "a", "answer": "b"}\nnonsense', "line 2 of .* is no example"),
        ('{"prompt": "a"}', "line 1 of .* is no example"),
        ("[1]", "line 1 of .* is no example"),
        ('{"prompt": "a", "answer": " "}', "example 1 of capitals lacks its answer"),
    ],
)
def test_file_that_holds_no_examples_is_refused(tmp_path, text, sentence):
    file = tmp_path / "capitals.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=sentence):
        shots_of_file(file)
