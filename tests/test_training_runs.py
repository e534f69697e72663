"""Trainings as processes of their own on a small random Llama: killed and resumed, shared by two, and of a LoRA."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2app.experts import load_expert
from t2app.training.ablation import BASE, ablation, ablation_table
from t2app.training.log import read_log

# Plain rewards, so that the answers of a random model, which are never right, teach something too.
SETTINGS = {
    "precision": "fp32",
    "warm-start-steps": 3,
    "warm-start-learning-rate": 0.05,
    "steps": 3,
    "learning-rate": 0.05,
    "prompts": 4,
    "samples": 2,
    "advantage": "plain",
    "validate-every": 2,
    "validation-limit": 4,
    "test-limit": 4,
}
LAST_STEP = 6
ONE_PROCESS = ("-m", "t2app")
# What `accelerate launch` does on GPUs; on a CPU it wants an MPI for more than one process.
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "t2app")


@pytest.fixture(scope="module")
def start(tiny_folder, tmp_path_factory):
    """Starts a training of the small Llama that writes into a folder, in another process."""
    cache = tmp_path_factory.mktemp("cache")

    def start(out: Path, *more: str, launcher: tuple[str, ...] = ONE_PROCESS) -> subprocess.Popen:
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        training = ("train", "arithmetic", "--model", str(tiny_folder), "--out", str(out), *settings, *more)
        environment = os.environ | {"T2_CACHE_DIR": str(cache)}
        return subprocess.Popen(
            [sys.executable, *launcher, *training], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    return start


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """The folder of a training that nothing came in the way of."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    end(start(out))
    return out


def end(process: subprocess.Popen) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


def logged(out: Path) -> list[dict]:
    return read_log(out) if (out / "log.jsonl").exists() else []


def parameters(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "checkpoint.pt", weights_only=True)["parameters"]


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory) -> Path:
    """The folder of a training that was killed at several steps and went on."""
    out = tmp_path_factory.mktemp("runs") / "killed"
    for steps in (1, 3, 5):
        process = start(out)
        while len(logged(out)) < 1 + steps and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (out / "checkpoint.pt").exists():
            done = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
            assert done in [row["step"] for row in logged(out)], "the run goes on behind a step that was not logged"
        # As if the kill had come in the middle of a line.
        with open(out / "log.jsonl", "a") as log:
            log.write('{"step": 9')
    end(start(out))
    return out


def test_training_killed_at_several_steps_resumes_to_the_numbers_of_one_that_was_not(killed, whole):
    assert without_seconds(logged(killed)) == without_seconds(logged(whole))
    assert [row["step"] for row in logged(killed)] == list(range(LAST_STEP + 1))
    first, second = load_file(killed / "math.safetensors"), load_file(whole / "math.safetensors")
    assert all(torch.equal(first[path], second[path]) for path in second)
    first, second = parameters(killed), parameters(whole)
    assert all(torch.equal(first[path], second[path]) and second[path].any() for path in second)


def test_two_processes_make_the_update_of_one_with_the_whole_batch(start, whole, tmp_path):
    two = tmp_path / "two"
    end(start(two, launcher=TWO_PROCESSES))
    assert [row["step"] for row in logged(two)] == list(range(LAST_STEP + 1))
    for alone, shared in zip(without_seconds(logged(whole)), without_seconds(logged(two)), strict=True):
        for name, value in alone.items():
            assert shared[name] == (value if value is None else pytest.approx(value, rel=1e-3)), name
    alone, shared = parameters(whole), parameters(two)
    assert all(alone[path].abs().max() > 0.01 for path in alone)
    assert all(torch.allclose(shared[path], alone[path], atol=1e-3) for path in alone)


def test_more_processes_than_prompts_are_refused(start, tmp_path):
    process = start(tmp_path / "out", "--prompts", "1", launcher=TWO_PROCESSES)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "2 processes cannot share batches of 1 prompts" in errors.decode()


def test_run_can_be_looked_at_in_tensorboard_with_every_step_once(killed):
    board = EventAccumulator(str(killed / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("training/gradient_norm")] == list(range(LAST_STEP + 1))
    assert [event.step for event in board.Scalars("training/imitation_loss")] == [1, 2, 3]
    assert [event.step for event in board.Scalars("training/validation")] == [0, 2, 3, 4, 6]


def test_finished_training_writes_curve_command_and_test_into_the_expert(whole, tiny):
    expert = load_expert(whole / "math.safetensors", tiny.identity)
    assert [step for step, _ in expert.curve] == [0, 2, 3, 4, 6]
    assert expert.training["command"].startswith("python -m t2app train arithmetic --model ")
    assert {(row.split, row.mixture, row.n) for row in expert.accuracies} == {
        (split, mixture, 4) for split in ("validation", "test") for mixture in ("base", "math")
    }
    assert (whole / "curve.html").stat().st_size > 1000
    card = (whole / "math.md").read_text()
    assert "| step | validation |" in card and expert.training["command"] in card


def test_lora_is_trained_by_the_same_loop_and_written_in_pefts_format(start, tmp_path):
    out = tmp_path / "out"
    output = end(start(out, "--lora", "4", "--layers", "mlp"))
    assert "| arithmetic | base |" in output and "| arithmetic | math |" in output
    rows = logged(out)
    assert [row["step"] for row in rows] == list(range(LAST_STEP + 1))
    losses = [row["imitation_loss"] for row in rows[1:4]]
    assert losses[-1] < losses[0]
    config = json.loads((out / "math" / "adapter_config.json").read_text())
    assert config["r"] == 4 and all(".mlp." in path for path in config["target_modules"])
    written = load_file(out / "math" / "adapter_model.safetensors")
    # Two blocks of three layers with two matrices each, of 32 × 80 features.
    assert len(written) == 12 and sum(value.numel() for value in written.values()) == 6 * 4 * (32 + 80)
    card = (out / "math" / "README.md").read_text()
    assert "6 layers, rank 4, 2,688 numbers" in card and "| arithmetic | test | math |" in card


def test_ablation_trains_a_variation_with_every_seed_and_goes_on_from_what_is_there(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    short = replace(BASE, warm_start_steps=2, steps=2, prompts=2, validation_limit=4)
    monkeypatch.setattr("t2app.training.ablation.BASE", short)
    options = ("--model", str(tiny_folder), "--precision", "fp32")
    done = []
    [row], [again] = (
        ablation("arithmetic", 2, tmp_path / "runs", ["MLP layers only"], options, lambda: done.append(1))
        for _ in range(2)
    )
    assert row == again and len(done) == 4
    assert (row.variation, row.changed) == ("MLP layers only", {"layers": "mlp"})
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["MLP-layers-only-0", "MLP-layers-only-1"]
    assert row.accuracies == tuple(read_log(run)[-1]["validation"] for run in runs)
    assert all(".mlp." in path for run in runs for path in parameters(run))
    assert "| MLP layers only | layers mlp |" in ablation_table([row])
