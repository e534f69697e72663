"""Training an expert: REINFORCE on a task's verifiable reward, with only the z vectors moving.

What differs from the paper's recipe (section 3.1, and the authors' code), by default, and why:

1. Several samples answer each prompt and a reward counts against the mean of its group, divided by its spread: a
   prompt that is always or never answered then says nothing, and costs no backward pass. `advantage="plain"` is ±1.
2. z starts at exactly 1, so that step 0 is the base model; the authors' sigmoid starts away from it.
3. The gradient's norm is clipped to 1 and not to 0.001, which under Adam only matters for outliers.
4. A prompt's tokens are computed once for all its samples, in the rollout and in the update.
5. A few supervised steps come first: sampled at temperature 1 the embedded model is right so rarely that most groups
   of its answers say nothing. `warm_start_steps=0` is RL alone.

This file does not know where examples come from, and nothing of dispatch.
"""

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from t2app.decoding import answer_log_probabilities, collected, decode
from t2app.evaluation import Accuracy, evaluate
from t2app.experts import Expert, Measurement, save_expert
from t2app.messages import Sampling
from t2app.models import Model
from t2app.tasks import Example, Task

ADVANTAGES = ("group", "plain")
# Bounds the memory of an update: logits are rows × answer tokens × vocabulary.
_UPDATE_ROWS = 64


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training; the defaults train the shipped experts on two CPU cores.

    Attributes:
        warm_start_steps: supervised steps on the examples' solutions, before the `steps` of REINFORCE.
        warm_start_learning_rate: of these; it falls to 0 over their last third.
        prompts, samples: prompts a step, and sampled answers to each.
        advantage: "group" (reward against the prompt's other samples) or "plain" (the paper's r ∈ {−1, +1}).
        kl_weight: λ of the paper's λ·KL(π_z ‖ π_base), per answer token.
        decay_steps: steps at the end over which the learning rate falls to 0 in a straight line.
        clip_norm: the gradient's largest norm, over all z together.
        validate_every, validation_limit: steps between validations, and how many examples one takes.
    """

    warm_start_steps: int = 140
    warm_start_learning_rate: float = 6e-3
    steps: int = 40
    prompts: int = 32
    samples: int = 8
    advantage: str = "group"
    learning_rate: float = 1e-3
    decay_steps: int = 40
    kl_weight: float = 0.0
    clip_norm: float = 1.0
    temperature: float = 1.0
    validate_every: int = 20
    validation_limit: int = 231
    seed: int = 0

    def __post_init__(self):
        if self.advantage not in ADVANTAGES:
            raise ValueError(f"there is no advantage '{self.advantage}'; choose one of {', '.join(ADVANTAGES)}")
        if self.advantage == "group" and self.samples < 2:
            raise ValueError("a group advantage needs at least 2 samples a prompt; use --advantage plain for one")
        for name in ("steps", "prompts", "samples", "validate_every", "validation_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 was expected")
        for name in ("warm_start_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; 0 or more was expected")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; more than 0 was expected, for samples that differ")


class Preset(NamedTuple):
    """Settings that go together, and which linear layers they are for: a name of `cli.LAYERS`."""

    settings: TrainingSettings
    layers: str


PRESETS = {
    "default": Preset(TrainingSettings(), "all"),
    # The authors' code, as far as it can be had in these terms; z starts at 1 and is not passed through a sigmoid.
    "paper": Preset(
        TrainingSettings(
            warm_start_steps=0,
            prompts=256,
            samples=1,
            advantage="plain",
            learning_rate=2e-3,
            decay_steps=0,
            clip_norm=1e-3,
        ),
        "mlp",
    ),
}


@dataclass(frozen=True)
class TrainingStep:
    """What one step did; the steps of the warm start come first.

    Attributes:
        reward: share of right answers among the samples, None in the warm start.
        imitation_loss: nats per token of the solutions, None after the warm start.
        answer_tokens: mean length of the answers, sampled or imitated.
        validation: accuracy, where it was measured.
    """

    step: int
    reward: float | None
    imitation_loss: float | None
    gradient_norm: float
    answer_tokens: float
    seconds: float
    validation: float | None = None


class Trainer:
    """Trains z for one task and writes the best expert so far, a log and a checkpoint into a folder.

    The best is the one with the highest validation accuracy; once reinforcement learning has begun, of its own steps.

    Args:
        model: its adapted layers are the ones that are trained.
        out: the folder; a training that was cut off there is resumed, if its settings are the same.
        name: the expert's name.

    Raises:
        ValueError: the folder holds a training with other settings.
    """

    def __init__(self, model: Model, task: Task, settings: TrainingSettings, out: Path, name: str):
        self.model, self.task, self.settings, self.out, self.name = model, task, settings, out, name
        self.deltas = {
            path: nn.Parameter(torch.zeros(len(layer.vectors), device=layer.vectors.device))
            for path, layer in model.adapted.layers.items()
        }
        self.optimizer = torch.optim.Adam(self.deltas.values(), lr=settings.learning_rate)
        self.step = 0
        self.best = 0.0
        self.base_validation = 0.0
        self.seconds = 0.0
        self.examples = {split: task.examples(split) for split in ("train", "validation")}
        held_out = self.examples["validation"]
        self.validation = random.Random(0).sample(held_out, min(settings.validation_limit, len(held_out)))
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    @property
    def last_step(self) -> int:
        return self.settings.warm_start_steps + self.settings.steps

    @property
    def expert_file(self) -> Path:
        return self.out / f"{self.name}.safetensors"

    def run(self) -> Iterator[TrainingStep]:
        """Train to the last step, yielding each; the first validation, of the base model, is step 0."""
        if self.step == 0:
            self.base_validation = self.best = self._validate()
            self._save_best()
            yield self._log(TrainingStep(0, None, None, 0.0, 0.0, 0.0, self.best))
        settings = self.settings
        while self.step < self.last_step:
            started = time.perf_counter()
            self.step += 1
            if self.step == settings.warm_start_steps + 1:
                # The warm start is where reinforcement learning begins, and no rival of it.
                self.best = self.base_validation
            step = self._imitation_step() if self.step <= settings.warm_start_steps else self._reinforcement_step()
            accuracy = None
            if self.step % settings.validate_every == 0 or self.step in (settings.warm_start_steps, self.last_step):
                accuracy = self._validate()
            seconds = time.perf_counter() - started
            self.seconds += seconds
            if accuracy is not None:
                if accuracy > self.best:
                    self.best = accuracy
                    self._save_best()
                self._save_checkpoint()
            yield self._log(replace(step, seconds=seconds, validation=accuracy))

    def _imitation_step(self) -> TrainingStep:
        """One batch of solutions and one update towards them."""
        settings = self.settings
        _, examples, prompts = self._batch()
        tokenizer, end = self.model.tokenizer, self.model.eos_ids[0]
        solutions = [[*tokenizer(example.solution, add_special_tokens=False)["input_ids"], end] for example in examples]
        tokens = sum(map(len, solutions))
        loss = 0.0
        self.optimizer.zero_grad()
        for start in range(0, len(prompts), _UPDATE_ROWS):
            part = slice(start, start + _UPDATE_ROWS)
            logs, mask = answer_log_probabilities(
                self.model.adapted, prompts[part], [[solution] for solution in solutions[part]], self.deltas
            )
            part_loss = -(logs * mask).sum() / tokens
            part_loss.backward()
            loss += part_loss.item()
        left, decay_steps = settings.warm_start_steps - self.step + 1, settings.warm_start_steps // 3
        rate = _decayed(settings.warm_start_learning_rate, left, decay_steps)
        return TrainingStep(self.step, None, loss, self._update(rate), tokens / len(prompts), 0.0)

    def _reinforcement_step(self) -> TrainingStep:
        """One batch of rollouts and one update."""
        settings = self.settings
        draw, examples, prompts = self._batch()
        deltas = {path: delta.detach() for path, delta in self.deltas.items()}
        rollout = decode(
            self.model.adapted,
            prompts,
            [deltas] * len(prompts),
            Sampling(self.task.max_new_tokens, settings.temperature),
            self.model.eos_ids,
            settings.samples,
            [draw.getrandbits(48) for _ in prompts],
        )
        rows = collected(rollout)
        answers = [self.model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        right = torch.tensor(
            [self.task.is_right(examples[i // settings.samples], answer) for i, answer in enumerate(answers)]
        ).view(len(prompts), settings.samples)
        advantages = _advantages(right, settings.advantage)  # (prompts, samples)
        groups = [rows[i * settings.samples : (i + 1) * settings.samples] for i in range(len(prompts))]
        learning = range(len(prompts))
        if settings.kl_weight == 0:
            learning = [i for i in learning if advantages[i].any()]
        self.optimizer.zero_grad()
        step = max(1, _UPDATE_ROWS // settings.samples)
        for start in range(0, len(learning), step):
            part = learning[start : start + step]
            loss = self._loss([prompts[i] for i in part], [groups[i] for i in part], advantages[list(part)])
            (loss / right.numel()).backward()
        rate = _decayed(settings.learning_rate, self.last_step - self.step + 1, settings.decay_steps)
        norm = self._update(rate) if learning else 0.0
        reward = right.float().mean().item()
        return TrainingStep(self.step, reward, None, norm, sum(map(len, rows)) / len(rows), 0.0)

    def _batch(self) -> tuple[random.Random, list[Example], list[list[int]]]:
        """This step's source of randomness, the examples drawn from it, and their prompts' token ids."""
        draw = random.Random(f"{self.settings.seed}-{self.step}")
        train = self.examples["train"]
        examples = draw.sample(train, min(self.settings.prompts, len(train)))
        return draw, examples, [self.model.prompt_ids(example.prompt) for example in examples]

    def _update(self, learning_rate: float) -> float:
        """Clip the gradient that has gathered and take one step along it; returns its norm before."""
        norm = nn.utils.clip_grad_norm_(self.deltas.values(), self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(norm)

    def _loss(self, prompts: Sequence, groups: Sequence[Sequence[Sequence[int]]], advantages: Tensor) -> Tensor:
        """−Σ A·log π_z(answer) + λ·Σ KL over the answers of some prompts; advantages is (prompts, samples)."""
        temperature = self.settings.temperature
        logs, mask = answer_log_probabilities(self.model.adapted, prompts, groups, self.deltas, temperature)
        loss = -(advantages.to(logs.device).view(-1, 1) * logs * mask).sum()
        if self.settings.kl_weight:
            with torch.no_grad():
                base, _ = answer_log_probabilities(self.model.adapted, prompts, groups, None, temperature)
            # Its gradient over samples of π_z is that of KL(π_z ‖ π_base); that of the better known estimator, which
            # has the divergence itself as its mean, is not.
            loss = loss + self.settings.kl_weight * (0.5 * (base - logs).square() * mask).sum()
        return loss

    def _validate(self) -> float:
        deltas = {path: delta.detach() for path, delta in self.deltas.items()}
        mixtures = {self.name: [deltas] * len(self.validation)}
        [measured] = evaluate(self.model, self.task, self.validation, mixtures)
        return measured.accuracy

    def _save_best(self) -> None:
        """Write the expert as it now is, with its validation accuracy."""
        n = len(self.validation)
        measured = [("base", self.base_validation), (self.name, self.best)]
        settings = asdict(self.settings) | {"task": self.task.name, "best_step": self.step}
        expert = Expert(
            name=self.name,
            label=self.task.label,
            description=self.task.description,
            weights=self.model.identity,
            z={path: 1 + delta.detach() for path, delta in self.deltas.items()},
            training=settings | {"precision": self.model.precision, "seconds": round(self.seconds)},
            accuracies=tuple(
                Measurement(self.task.name, "validation", mixture, round(accuracy * n), n)
                for mixture, accuracy in measured
            ),
        )
        save_expert(expert, self.expert_file)

    def _log(self, step: TrainingStep) -> TrainingStep:
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as log:
            log.write(json.dumps(asdict(step)) + "\n")
        return step

    def _save_checkpoint(self) -> None:
        state = {
            "settings": json.dumps(self._identity()),
            "step": self.step,
            "best": self.best,
            "base_validation": self.base_validation,
            "seconds": self.seconds,
            "deltas": {path: delta.detach() for path, delta in self.deltas.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        partial = self.out / "checkpoint.partial"
        torch.save(state, partial)
        partial.replace(self.out / "checkpoint.pt")

    def _resume(self) -> None:
        file = self.out / "checkpoint.pt"
        if not file.exists():
            # Cut off before its first checkpoint, a training starts anew, and so does its log.
            (self.out / "log.jsonl").unlink(missing_ok=True)
            return
        state = torch.load(file, weights_only=True)
        if json.loads(state["settings"]) != self._identity():
            raise ValueError(
                f"{self.out} holds a training with other settings ({state['settings']}); give another folder, "
                "or remove it to start anew"
            )
        for path, delta in state["deltas"].items():
            self.deltas[path].data.copy_(delta)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.seconds = state["step"], state["best"], state["seconds"]
        self.base_validation = state["base_validation"]
        # Steps after the last checkpoint are done again: their lines go, so that the log has each step once.
        log = self.out / "log.jsonl"
        kept = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= self.step]
        log.write_text("".join(f"{line}\n" for line in kept))

    def _identity(self) -> dict:
        """What must be the same for a training to be resumed; more steps may be asked for."""
        settings = asdict(replace(self.settings, steps=1))
        return settings | {
            "task": self.task.name,
            "weights": self.model.identity.fingerprint,
            "layers": list(self.deltas),
        }


def with_test_accuracies(expert: Expert, measured: Sequence[Accuracy]) -> Expert:
    """The expert with its accuracies on the test split added to those on the validation split."""
    rows = [Measurement(row.task, "test", row.mixture, row.correct, row.n) for row in measured]
    return replace(expert, accuracies=(*(row for row in expert.accuracies if row.split != "test"), *rows))


def _decayed(learning_rate: float, steps_left: int, decay_steps: int) -> float:
    """The learning rate of a step: whole, or what a decay over the last steps leaves of it, never 0."""
    return learning_rate * min(1.0, steps_left / (decay_steps + 1))


def _advantages(right: Tensor, scheme: str) -> Tensor:
    """Advantages (prompts, samples) from which answers were right, of the same shape."""
    if scheme == "plain":
        return right.float() * 2 - 1
    rewards = right.float()
    spread = rewards.std(dim=1, keepdim=True, unbiased=False)
    return torch.where(spread > 0, (rewards - rewards.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-6), 0.0)
