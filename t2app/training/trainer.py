"""Training an expert: REINFORCE on a task's verifiable reward, with only the z vectors moving.

What differs from the paper's recipe (section 3.1, and the authors' code), by default, and why:

1. Several samples answer each prompt and a reward counts against the mean of its group, divided by its spread: a
   prompt that is always or never answered then says nothing, and costs no backward pass. `advantage="plain"` is ±1.
2. z starts at exactly 1, so that step 0 is the base model; the authors' sigmoid starts away from it.
3. The gradient's norm is clipped to 1 and not to 0.001, which under Adam only matters for outliers.
4. A prompt's tokens are computed once for all its samples, and what all prompts begin with once for all of them, in the
   rollout and in the update.
5. A few supervised steps come first: sampled at temperature 1 the embedded model is right so rarely that most groups
   of its answers say nothing. `warm_start_steps=0` is RL alone.

Started by `accelerate launch` in several processes, each takes its share of every batch and all make the same update.
This file does not know where examples come from, and nothing of dispatch.
"""

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from t2app.decoding import answer_log_probabilities, collected, decode, parts_by_length
from t2app.evaluation import Accuracy, evaluate
from t2app.experts import Expert, Measurement, load_expert, mix, save_expert
from t2app.messages import Sampling
from t2app.models.model import Model, processes
from t2app.tasks import Example, Task
from t2app.training.log import TrainingLog
from t2app.training.settings import TrainingSettings


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
        start: an expert to train further; None starts at the base model.

    Raises:
        ValueError: the folder holds a training with other settings, there are more processes than prompts a step, or
            the layers of `start` are not those that are trained.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        settings: TrainingSettings,
        out: Path,
        name: str,
        start: Expert | None = None,
    ):
        self.model, self.task, self.settings, self.out, self.name = model, task, settings, out, name
        self.start = start
        self.processes = processes()
        self.parameters = model.adapted.trainable()
        if start is not None:
            self._begin_at(start)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate)
        self.step = 0
        self.best = 0.0
        self.best_step = 0
        self.base_validation = 0.0
        self.seconds = 0.0
        self.examples = {split: task.examples(split) for split in ("train", "validation")}
        held_out = self.examples["validation"]
        self.validation = random.Random(0).sample(held_out, min(settings.validation_limit, len(held_out)))
        smallest = min(settings.prompts, len(self.examples["train"]), len(self.validation))
        if self.processes.num_processes > smallest:
            raise ValueError(f"{self.processes.num_processes} processes cannot share batches of {smallest} prompts")
        out.mkdir(parents=True, exist_ok=True)
        resumed = self._resume()
        self.log = TrainingLog(out, self.step if resumed else None) if self.processes.is_main_process else None
        self.processes.wait_for_everyone()

    @property
    def last_step(self) -> int:
        return self.settings.warm_start_steps + self.settings.steps

    @property
    def file(self) -> Path:
        """Where the best expert so far is."""
        return self.out / f"{self.name}.safetensors"

    def run(self) -> Iterator[TrainingStep]:
        """Train to the last step, yielding each; the first validation, of where it starts, is step 0."""
        if self.step == 0:
            self.base_validation = self._validate(None)
            self.best = self.base_validation if self.start is None else self._validate(self._mixture())
            self._save_best()
            yield self._logged(TrainingStep(0, None, None, 0.0, 0.0, 0.0, self.best))
        settings = self.settings
        while self.step < self.last_step:
            started = time.perf_counter()
            self.step += 1
            if settings.warm_start_steps and self.step == settings.warm_start_steps + 1:
                # The warm start is where reinforcement learning begins, and no rival of it.
                self.best = self.base_validation
            step = self._imitation_step() if self.step <= settings.warm_start_steps else self._reinforcement_step()
            accuracy = None
            if self.step % settings.validate_every == 0 or self.step in (settings.warm_start_steps, self.last_step):
                accuracy = self._validate(self._mixture())
            seconds = time.perf_counter() - started
            self.seconds += seconds
            # Before the checkpoint: a run that is killed between the two does the step, and logs it, again.
            logged = self._logged(replace(step, seconds=seconds, validation=accuracy))
            if accuracy is not None:
                if accuracy > self.best:
                    self.best = accuracy
                    self._save_best()
                self._save_checkpoint()
            yield logged

    def best_mixture(self) -> Mapping[str, Tensor] | None:
        """The best so far as it was written, as a mixture of the model's rows."""
        return mix([load_expert(self.file, self.model.identity)], {self.name: 1.0})

    def add_test(self, measured: Sequence[Accuracy], command: str) -> None:
        """Write test accuracies, the training as it ended, its curve and its command to the best so far."""
        expert = load_expert(self.file, self.model.identity)
        rows = [Measurement(row.task, "test", row.mixture, row.correct, row.n) for row in measured]
        save_expert(
            replace(
                expert,
                training=self._facts() | {"command": command},
                accuracies=(*(row for row in expert.accuracies if row.split != "test"), *rows),
                curve=self.log.validations(),
            ),
            self.file,
        )

    def _imitation_step(self) -> TrainingStep:
        """One batch of solutions and one update towards them."""
        settings = self.settings
        _, examples, prompts = self._batch()
        tokenizer, end = self.model.tokenizer, self.model.eos_ids[0]
        solutions = [[*tokenizer(example.solution, add_special_tokens=False)["input_ids"], end] for example in examples]
        tokens = sum(map(len, solutions))
        mine = self._share(range(len(prompts)))
        loss = 0.0
        self.optimizer.zero_grad()
        lengths = [len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True)]
        for part in parts_by_length(mine, lengths):
            mixtures = [self.parameters] * len(part)
            logs, mask = answer_log_probabilities(
                self.model.adapted, [prompts[i] for i in part], [[solutions[i]] for i in part], mixtures
            )
            part_loss = -(logs * mask).sum() / tokens
            part_loss.backward()
            loss += part_loss.item()
        left, decay_steps = settings.warm_start_steps - self.step + 1, settings.warm_start_steps // 3
        norm = self._update(_decayed(settings.warm_start_learning_rate, left, decay_steps))
        [loss] = self._totals(loss)
        return TrainingStep(self.step, None, loss, norm, tokens / len(prompts), 0.0)

    def _reinforcement_step(self) -> TrainingStep:
        """One batch of rollouts and one update."""
        settings = self.settings
        draw, examples, prompts = self._batch()
        seeds = self._share([draw.getrandbits(48) for _ in prompts])
        answered = len(prompts) * settings.samples
        examples, prompts = self._share(examples), self._share(prompts)
        rollout = decode(
            self.model.adapted,
            prompts,
            [self._mixture()] * len(prompts),
            Sampling(self.task.max_new_tokens, settings.temperature),
            self.model.eos_ids,
            settings.samples,
            seeds,
        )
        rows = collected(rollout)
        answers = [self.model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        right = torch.tensor(
            [self.task.is_right(examples[i // settings.samples], answer) for i, answer in enumerate(answers)]
        ).view(len(prompts), settings.samples)
        advantages = _advantages(right, settings.advantage)  # (prompts, samples)
        groups = [rows[i * settings.samples : (i + 1) * settings.samples] for i in range(len(prompts))]
        # Where all advantages are 0 there is nothing to learn, unless from the divergence.
        learning = [i for i in range(len(prompts)) if settings.kl_weight or advantages[i].any()]
        self.optimizer.zero_grad()
        lengths = [len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, groups, strict=True)]
        for part in parts_by_length(learning, lengths):
            loss = self._loss([prompts[i] for i in part], [groups[i] for i in part], advantages[part])
            (loss / answered).backward()
        right_answers, tokens, learned = self._totals(right.sum().item(), sum(map(len, rows)), len(learning))
        rate = _decayed(settings.learning_rate, self.last_step - self.step + 1, settings.decay_steps)
        norm = self._update(rate) if learned else 0.0
        return TrainingStep(self.step, right_answers / answered, None, norm, tokens / answered, 0.0)

    def _batch(self) -> tuple[random.Random, list[Example], list[list[int]]]:
        """This step's source of randomness, the examples drawn from it, and their prompts' token ids."""
        draw = random.Random(f"{self.settings.seed}-{self.step}")
        train = self.examples["train"]
        examples = draw.sample(train, min(self.settings.prompts, len(train)))
        return draw, examples, [self.model.prompt_ids(example.prompt) for example in examples]

    def _share(self, batch: Sequence) -> Sequence:
        """What this process takes of a batch that all of them drew."""
        return batch[self.processes.process_index :: self.processes.num_processes]

    def _totals(self, *shares: float) -> list[float]:
        """The sums over all processes."""
        return reduce(torch.tensor(shares, dtype=torch.float64, device=self.model.adapted.model.device), "sum").tolist()

    def _mixture(self) -> dict[str, Tensor]:
        """What is trained as it now is, as a mixture to decode by."""
        return {path: parameter.detach() for path, parameter in self.parameters.items()}

    def _update(self, learning_rate: float) -> float:
        """Add up all processes' gradients, clip the sum and take one step along it; returns its norm before."""
        parameters = list(self.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        total = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        return float(norm)

    def _loss(self, prompts: Sequence, groups: Sequence[Sequence[Sequence[int]]], advantages: Tensor) -> Tensor:
        """−Σ A·log π_z(answer) + λ·Σ KL over the answers of some prompts; advantages is (prompts, samples)."""
        adapted, n, temperature = self.model.adapted, len(prompts), self.settings.temperature
        logs, mask = answer_log_probabilities(adapted, prompts, groups, [self.parameters] * n, temperature)
        loss = -(advantages.to(logs.device).view(-1, 1) * logs * mask).sum()
        if self.settings.kl_weight:
            with torch.no_grad():
                base, _ = answer_log_probabilities(adapted, prompts, groups, [None] * n, temperature)
            # Its gradient over samples of π_z is that of KL(π_z ‖ π_base); that of the better known estimator, which
            # has the divergence itself as its mean, is not.
            loss = loss + self.settings.kl_weight * (0.5 * (base - logs).square() * mask).sum()
        return loss

    def _begin_at(self, start: Expert) -> None:
        if set(start.z) != set(self.parameters):
            raise ValueError(
                f"the expert '{start.name}' adapts {len(start.z)} layers; {len(self.parameters)} are to be trained: "
                "train those of the expert (--layers)"
            )
        for path, z in start.z.items():
            self.parameters[path].data.copy_(z - 1)

    def _validate(self, mixture: Mapping[str, Tensor] | None) -> float:
        mine = self._share(self.validation)
        [measured] = evaluate(self.model, self.task, mine, {self.name: [mixture] * len(mine)})
        [correct] = self._totals(measured.correct)
        return correct / len(self.validation)

    def _save_best(self) -> None:
        """Write what is trained as it now is, with its validation accuracy."""
        self.best_step = self.step
        if self.processes.is_main_process:
            self._write()

    def _write(self) -> None:
        """Write the expert as it now is."""
        expert = Expert(
            name=self.name,
            label=self.task.label,
            description=self.task.description,
            weights=self.model.identity,
            z={path: 1 + delta for path, delta in self._mixture().items()},
            training=self._facts(),
            accuracies=self._validation_accuracies(),
        )
        save_expert(expert, self.file)

    def _facts(self) -> dict[str, object]:
        """Settings and circumstances of the training, as a card tells them."""
        facts = asdict(self.settings) | {"task": self.task.name, "best_step": self.best_step}
        if self.start is not None:
            facts["start"] = f"{self.start.name} ({self.start.fingerprint[:16]}…)"
        return facts | {"precision": self.model.precision, "seconds": round(self.seconds)}

    def _validation_accuracies(self) -> tuple[Measurement, ...]:
        n = len(self.validation)
        return tuple(
            Measurement(self.task.name, "validation", mixture, round(accuracy * n), n)
            for mixture, accuracy in (("base", self.base_validation), (self.name, self.best))
        )

    def _logged(self, step: TrainingStep) -> TrainingStep:
        if self.log is not None:
            self.log.add(asdict(step))
        return step

    def _save_checkpoint(self) -> None:
        if self.processes.is_main_process:
            state = {
                "settings": json.dumps(self._identity()),
                "step": self.step,
                "best": self.best,
                "best_step": self.best_step,
                "base_validation": self.base_validation,
                "seconds": self.seconds,
                "parameters": self._mixture(),
                "optimizer": self.optimizer.state_dict(),
            }
            partial = self.out / "checkpoint.partial"
            torch.save(state, partial)
            partial.replace(self.out / "checkpoint.pt")
        self.processes.wait_for_everyone()

    def _resume(self) -> bool:
        """Go back to where the folder's checkpoint was written; says whether there is one."""
        file = self.out / "checkpoint.pt"
        if not file.exists():
            return False
        state = torch.load(file, weights_only=True, map_location=self.model.adapted.model.device)
        if json.loads(state["settings"]) != self._identity():
            raise ValueError(
                f"{self.out} holds a training with other settings ({state['settings']}); give another folder, "
                "or remove it to start anew"
            )
        for path, value in state["parameters"].items():
            self.parameters[path].data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best, self.best_step = state["step"], state["best"], state["best_step"]
        self.base_validation, self.seconds = state["base_validation"], state["seconds"]
        return True

    def _identity(self) -> dict:
        """What must be the same for a training to be resumed; more steps may be asked for."""
        settings = asdict(replace(self.settings, steps=1))
        return settings | {
            "task": self.task.name,
            "weights": self.model.identity.fingerprint,
            "start": None if self.start is None else self.start.fingerprint,
            "parameters": {path: list(parameter.shape) for path, parameter in self.parameters.items()},
        }


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
