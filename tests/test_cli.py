"""The command line held against the contract of its JSON lines: most of it within this process, which has torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
from statsmodels.stats.proportion import proportion_confint

from t2app.cli import main
from t2app.experts import load_expert
from t2app.found_mixtures import mixture_file
from t2app.kernels.build import can_have_kernels
from t2app.models.catalogue import CATALOGUE, DEFAULT_MODEL
from t2app.models.model import load_model


@dataclass
class Ended:
    """How a command ended: its exit code and what it printed."""

    code: int
    output: str
    errors: str


@pytest.fixture
def run(capfd) -> Callable[..., Ended]:
    """Runs a command as `python -m t2app` does; its environment variables end with it."""

    def run(*arguments: str) -> Ended:
        code = 0
        with patch.dict(os.environ):
            try:
                main(arguments)
            except SystemExit as end:
                code = end.code
        output, errors = capfd.readouterr()
        # A sentence is what Python itself prints at its end, with the exit code 1.
        return Ended(1, output, f"{errors}{code}\n") if isinstance(code, str) else Ended(code, output, errors)

    return run


@pytest.fixture
def json_lines(run) -> Callable[..., list[dict]]:
    """Runs a command with `--json`: its lines."""

    def json_lines(*arguments: str) -> list[dict]:
        ended = run(*arguments, "--json")
        assert ended.code == 0, ended.errors
        return [json.loads(line) for line in ended.output.splitlines()]

    return json_lines


def process(*arguments: str, **environment: str) -> Ended:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "t2app", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_options_are_read_without_what_it_takes_to_run_a_command():
    heavy = ("torch", "transformers", "gradio", "statsmodels", "sympy", "pandas")
    program = f"import sys, t2app.cli; sys.exit(' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("precision", ["auto", "8bit", "4bit"])
def test_answer_prints_the_events_of_the_contract(json_lines, precision, request):
    if precision == "8bit":
        request.getfixturevalue("models_by_kernels")
    prompt = "Compute 12 + 7. Reply with only the number."
    arguments = ("--dispatch", "manual", "--weights", "math=1", "--precision", precision)
    first, *tokens, last = json_lines("answer", prompt, *arguments)
    assert first["event"] == "dispatched" and first["seconds"] >= 0
    assert {name: weight for name, weight in first["weights"].items() if weight} == {"math": 1.0}
    assert {token["event"] for token in tokens} == {"token"}
    assert {token["stream"] for token in tokens} == {"base", "adapted"}
    assert last["event"] == "finished" and last["adapted"] == "".join(
        token["text"] for token in tokens if token["stream"] == "adapted"
    )
    assert "19" in last["adapted"]


def test_answer_without_json_is_for_people(run):
    ended = run("answer", "Compute 2 + 2.", "--max-new-tokens", "8")
    assert ended.code == 0, ended.errors
    assert "task: " in ended.output and "base model: " in ended.output


def test_process_prints_json_lines_and_nothing_else():
    ended = process("answer", "Compute 2 + 2.", "--max-new-tokens", "8", "--json")
    assert ended.code == 0, ended.errors
    events = [json.loads(line)["event"] for line in ended.output.splitlines()]
    assert events[0] == "dispatched" and events[-1] == "finished"


def test_models_lists_the_catalogue_with_what_each_takes_and_its_experts(run, json_lines):
    rows = {row["name"]: row for row in json_lines("models")}
    assert list(rows) == list(CATALOGUE)
    default = rows[DEFAULT_MODEL]
    assert default["experts"] == ["code", "math", "reasoning", "classifier"]
    assert default["fits"].pop("8bit") == can_have_kernels() and all(default["fits"].values())
    for held_in in (row["memory_bytes"] for row in rows.values()):
        assert 0 < held_in["4bit"] < held_in["8bit"] < held_in["bf16"] < held_in["fp32"]
    assert rows["llama-3-8b-instruct"]["gated"] and rows["llama-3-8b-instruct"]["parameters"] == 8_030_261_248
    ended = run("models")
    assert ended.code == 0 and all(row["licence"] in ended.output for row in rows.values())


def test_experts_lists_what_ships_with_its_measurements(json_lines):
    rows = json_lines("experts")
    math = next(row for row in rows if row["name"] == "math")
    assert math["label"] == "math" and math["parameters"] > 0
    tests = {row["mixture"]: row for row in math["accuracies"] if row["split"] == "test"}
    assert tests["math"]["n"] == tests["base"]["n"] >= 500


def test_eval_prints_one_wilson_interval_a_mixture(json_lines):
    rows = json_lines("eval", "arithmetic", "--experts", "math", "--limit", "24")
    assert [row["mixture"] for row in rows] == ["base", "math"]
    for row in rows:
        assert row["task"] == "arithmetic" and row["n"] == 24 and row["accuracy"] == row["correct"] / 24
        assert (row["low"], row["high"]) == pytest.approx(proportion_confint(row["correct"], 24, method="wilson"))
    assert rows[1]["correct"] > rows[0]["correct"]


def test_eval_measures_a_dispatch_beside_the_base(json_lines):
    rows = json_lines("eval", "arithmetic", "--dispatch", "prompt,manual", "--weights", "math=1", "--limit", "8")
    assert [row["mixture"] for row in rows] == ["base", "prompt", "manual"]


def test_eval_of_several_tasks_goes_on_from_its_answers_and_writes_a_table(json_lines, tmp_path):
    answers, table = tmp_path / "answers.jsonl", tmp_path / "table.csv"
    arguments = (
        "eval",
        "arithmetic",
        "reasoning-basics",
        "--experts",
        "math",
        "--limit",
        "4",
        "--answers",
        str(answers),
    )
    first = json_lines(*arguments)
    assert [(row["task"], row["mixture"]) for row in first] == [
        (task, mixture) for task in ("arithmetic", "reasoning-basics") for mixture in ("base", "math")
    ]
    assert len(answers.read_text().splitlines()) == 16
    assert json_lines(*arguments, "--csv", str(table)) == first
    assert len(answers.read_text().splitlines()) == 16
    assert len(table.read_text().splitlines()) == 5
    results = tmp_path / "RESULTS.md"
    json_lines(*arguments, "--results", str(results))
    written = results.read_text()
    assert f"python -m t2app {' '.join(arguments)} --results {results} --json" in written
    assert all(f"| {row['task']} | {row['mixture']} | {row['accuracy']:.1%} |" in written for row in first)


def test_paper_preset_adapts_the_mlp_with_plain_rewards_and_its_flags_can_be_changed(json_lines, tmp_path):
    arguments = ("train", "arithmetic", "--preset", "paper", "--out", str(tmp_path), "--steps", "1", "--prompts", "2")
    json_lines(*arguments, "--validation-limit", "2", "--test-limit", "2")
    expert = load_expert(tmp_path / "math.safetensors", load_model(layers=lambda path: False).identity)
    assert all(".mlp." in path for path in expert.z) and len(expert.z) == 30 * 3
    assert expert.training["advantage"] == "plain" and expert.training["clip_norm"] == 1e-3
    assert (expert.training["prompts"], expert.training["samples"], expert.training["warm_start_steps"]) == (2, 1, 0)


def test_train_writes_an_expert_that_is_resumed_and_listed(json_lines, tmp_path):
    arguments = ("train", "arithmetic", "--out", str(tmp_path), "--prompts", "2", "--samples", "2")
    arguments += ("--warm-start-steps", "0", "--decay-steps", "0")
    arguments += ("--validate-every", "1", "--validation-limit", "4", "--test-limit", "4")
    rows = json_lines(*arguments, "--steps", "1")
    assert [row["step"] for row in rows if "step" in row] == [0, 1]
    assert [row["mixture"] for row in rows if "mixture" in row] == ["base", "math"]
    assert {"math.safetensors", "math.md", "log.jsonl", "checkpoint.pt"} <= {path.name for path in tmp_path.iterdir()}
    assert [row["step"] for row in json_lines(*arguments, "--steps", "2") if "step" in row] == [2]


def test_search_keeps_a_mixture_that_answers_and_evaluations_use(json_lines, tmp_path):
    file = tmp_path / "capitals.jsonl"
    rows = [{"prompt": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = mixture_file(DEFAULT_MODEL, "made-by-a-test")
    try:
        arguments = ("--name", "made-by-a-test", "--score", "likelihood", "--population", "5", "--rounds", "2")
        *rounds, last = json_lines("search", str(file), *arguments)
        assert [row["event"] for row in rounds] == ["searched"] * len(rounds) and 1 <= len(rounds) <= 2
        assert set(rounds[0]["mean"]) == set(rounds[0]["spread"]) == set(rounds[0]["best"]) == set(last["weights"])
        assert last["event"] == "kept" and last["file"] == str(kept)
        first, *_ = json_lines("answer", "Hello", "--dispatch", "few-shot:made-by-a-test", "--max-new-tokens", "2")
        assert first["weights"] == pytest.approx(last["weights"]) and "capitals" in first["note"]
        rows = json_lines("eval", "arithmetic", "--dispatch", "few-shot:made-by-a-test", "--limit", "4")
        assert [row["mixture"] for row in rows] == ["base", "few-shot:made-by-a-test"]
    finally:
        kept.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("answer", ""), "Type a prompt first."),
        (("answer", "x", "--weights", "math=1"), "weights belong to the manual dispatch"),
        (("answer", "x", "--dispatch", "manual"), "the manual dispatch needs weights"),
        (("answer", "x", "--dispatch", "manual", "--weights", "math"), "NAME=NUMBER was expected"),
        (("answer", "x", "--dispatch", "manual", "--weights", "cooking=1"), "there is no expert 'cooking'"),
        (("answer", "x", "--temperature", "-1"), "temperature is -1.0; 0 (greedy) or more was expected"),
        (("answer", "x", "--max-new-tokens", "0"), "a whole number from 1 was expected"),
        (("eval", "cooking"), "invalid choice: 'cooking'"),
        (("eval", "arithmetic", "--experts", "cooking"), "there is no expert 'cooking'"),
        (("eval", "arithmetic", "--dispatch", "psychic"), "invalid choice: 'psychic'"),
        (("eval", "arithmetic", "--dispatch", "prompt", "--weights", "math=1"), "weights belong to the manual"),
        (("eval", "gsm8k", "--data", "no-such-folder"), "there is no file no-such-folder/gsm8k/main/test.jsonl"),
        (("bench", "cooking"), "invalid choice: 'cooking'"),
        (("answer", "x", "--dispatch", "few-shot:cooking"), "there is no mixture 'cooking'; kept for this model"),
        (("search", "cooking", "--name", "x"), "there is neither a task nor a file 'cooking'"),
        (("search", "arithmetic", "--name", "a/b"), "'a/b' is no name for a mixture"),
        (("search", "svamp", "--name", "x"), "it is there to be tested on, not to be trained on"),
        (("ablate", "arithmetic", "--out", "no-such", "--only", "default,cooking"), "invalid choice: 'cooking'"),
    ],
)
def test_what_cannot_be_done_ends_with_a_sentence_and_nothing_on_standard_output(run, arguments, sentence):
    check_refused(run(*arguments), sentence)


def test_process_that_cannot_do_what_is_asked_ends_so_too():
    ended = process("answer", "x", "--model", "no-such/model", HF_HUB_OFFLINE="1")
    check_refused(ended, "the model 'no-such/model' cannot be loaded")


@pytest.mark.parametrize(
    "arguments",
    [
        ("answer", "x", "--weights", "math=1"),
        ("answer", "x", "--dispatch", "few-shot:cooking"),
        ("eval", "arithmetic", "--dispatch", "few-shot:cooking"),
        ("eval", "gsm8k", "--data", "no-such-folder"),
        ("search", "arithmetic", "--name", "a/b"),
        ("search", "svamp", "--name", "x"),
    ],
)
def test_what_needs_no_model_is_refused_before_torch_is_imported(arguments):
    program = f"""
import sys
from t2app.cli import main
try:
    main({arguments!r})
except SystemExit:
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def check_refused(ended: Ended, sentence: str) -> None:
    assert ended.code != 0
    assert sentence in ended.errors
    assert "Traceback" not in ended.errors
    assert ended.output == ""
