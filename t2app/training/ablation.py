"""What each setting of a training is worth: the same short training with one thing changed at a time, over seeds.

Every run is a `train` command that anyone can give by hand, in a process and a folder of its own, so that an ablation
that is cut off goes on where it was. It is judged on validation: nothing is chosen on a test split.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from t2app.training.log import read_log
from t2app.training.settings import PRESETS, TrainingSettings

# What all variations start from: short, and with a warm start that leaves something to reinforce.
BASE = TrainingSettings(warm_start_steps=15, steps=25, prompts=8, decay_steps=25, validate_every=40)
_PAPER = PRESETS["paper"]
_NO_WARM_START = {"warm_start_steps": 0, "steps": BASE.warm_start_steps + BASE.steps}
# What each changes, as options of `train`.
VARIATIONS: dict[str, dict[str, object]] = {
    "default": {},
    "supervised only": {"warm_start_steps": BASE.warm_start_steps + BASE.steps, "steps": 0},
    "RL only": _NO_WARM_START,
    "plain advantage": {"advantage": "plain"},
    "KL weight 0.2": {"kl_weight": 0.2},
    "learning rate × 1/4": {"learning_rate": BASE.learning_rate / 4},
    "learning rate × 4": {"learning_rate": BASE.learning_rate * 4},
    "MLP layers only": {"layers": "mlp"},
    "2 samples": {"samples": 2, "prompts": BASE.prompts * BASE.samples // 2},
    "temperature 0.7": {"temperature": 0.7},
    "paper": _NO_WARM_START
    | {name: getattr(_PAPER.settings, name) for name in ("samples", "advantage", "learning_rate", "clip_norm")}
    | {"prompts": BASE.prompts * BASE.samples, "decay_steps": 0, "layers": _PAPER.layers},
    "LoRA of rank 16": {"lora": 16, "warm_start_learning_rate": 2e-3, "learning_rate": 5e-4},
}


@dataclass(frozen=True)
class AblationRow:
    """One variation over all seeds.

    Attributes:
        changed: what it changes of `BASE`.
        accuracies: on validation after the last step, by seed.
        seconds: of a step, without validation, the median over all steps.
    """

    variation: str
    changed: Mapping[str, object]
    accuracies: tuple[float, ...]
    seconds: float


def ablation(
    task: str, seeds: int, out: Path, variations: Sequence[str], options: Sequence[str], done: Callable[[], None]
) -> Iterator[AblationRow]:
    """Train every variation with every seed, and yield a row for each variation.

    Args:
        out: every run has a folder in it, named by variation and seed.
        options: further options of `train`, for all runs alike.
        done: is told of every run that has ended.

    Raises:
        RuntimeError: a run failed; the message is what it said.
    """
    for name in variations:
        logs = []
        for seed in range(seeds):
            folder = out / f"{name.replace(' ', '-').replace('/', '-')}-{seed}"
            settings = {field.name: getattr(BASE, field.name) for field in fields(BASE)} | VARIATIONS[name]
            flags = [f"--{key.replace('_', '-')}={value}" for key, value in (settings | {"seed": seed}).items()]
            _train(task, [f"--out={folder}", "--test-limit=0", *flags, *options])
            logs.append(read_log(folder))
            done()
        yield AblationRow(
            name,
            VARIATIONS[name],
            tuple([row["validation"] for row in log if row["validation"] is not None][-1] for log in logs),
            statistics.median(row["seconds"] for log in logs for row in log if row["validation"] is None),
        )


def ablation_table(rows: Sequence[AblationRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| variation | changed | validation, mean (range) | n seeds | s / step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        changed = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.changed.items())
        low, high = min(row.accuracies), max(row.accuracies)
        accuracy = f"{statistics.mean(row.accuracies):.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {row.variation} | {changed} | {accuracy} | {len(row.accuracies)} | {row.seconds:.1f} |")
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in asdict(BASE).items() if key != "seed")
    return "\n".join(lines) + f"\n\nAll else: {settings}.\n"


def _train(task: str, options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "t2app", "train", task, "--json", *options]
    result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the training {' '.join(options)} failed: {result.stderr.strip().splitlines()[-1]}")
