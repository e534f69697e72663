"""What a step of training costs: ours, the authors' way, and a LoRA, each in a process of its own.

All ways do the same work: sampled answers to the same prompts, all of the same length, and one update from them with
the gradient of every z. They differ in how:

- `shared` is what `t2app.training` does: each prompt is computed once for all its samples, the weights are not written;
- `repeated` is the same with the whole prompt computed anew for every sample;
- `composed` is how the authors' code does it: W' = U diag(σ ⊙ z) Vᵀ is composed and written into the model, the
  gradient of every W' is taken and pushed on to z, and the prompt is computed anew for every sample;
- `lora` trains a LoRA of rank 16 on the same layers, with the prompts shared.
"""

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2app.bench.composed import compose, factors_of
from t2app.bench.figure import Figure, figure_of, seconds
from t2app.bench.memory import PeakMemory, memory_in_use
from t2app.decoding import Prefix, answer_log_probabilities, collected, decode
from t2app.key_values import GrowingCache
from t2app.messages import Sampling
from t2app.models.model import Model, load_model
from t2app.spectral import Deltas, linear_layer
from t2app.tasks.registry import task_named

_PROMPTS, _SAMPLES, _ANSWER_TOKENS = 8, 8, 16
_STEPS = 3
_LORA_RANK = 16


def bench_training(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds of sampling and of the update; the memory of model and step together at the step's peak."""
    values: dict[tuple[str, str], list[float]] = {}
    for way in _WAYS:
        # A process that has trained one way holds memory that the next way would find.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for name, measured in pool.apply(_measure, (way, model_name, precision)).items():
                values[way, name] = measured
    for (way, name), measured in values.items():
        yield figure_of("training", f"{way}_{name}", measured, "MiB" if name.endswith("_mb") else "s")
    for way in (name for name in _WAYS if name != "shared"):
        # The authors' way is what a speedup is meant against where nothing else is said.
        against = "" if way == "composed" else f"_over_{way}"
        for name, ratio in (("step_seconds", "speedup"), ("peak_memory_mb", "memory_ratio")):
            ratios = [theirs / ours for theirs, ours in zip(values[way, name], values["shared", name], strict=True)]
            yield figure_of("training", f"{ratio}{against}", ratios, "ratio")


@dataclass(frozen=True)
class _Batch:
    """Prompts, and an answer of each sample to each, as token ids."""

    prompts: list[list[int]]
    groups: list[list[list[int]]]


class _Way:
    """Trains the z of every layer of the model's blocks, each prompt computed `once` or for every sample anew."""

    def __init__(self, model: Model, once: bool):
        self.model, self.once = model, once
        self.parameters: Mapping[str, nn.Parameter] = model.adapted.trainable()
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=1e-3)

    def mixture(self) -> Deltas | None:
        return {path: parameter.detach() for path, parameter in self.parameters.items()}

    def prefix(self, mixtures: Sequence[Deltas | None]) -> Prefix | None:
        """That the decoder finds for itself, or one of no tokens: then all prompts are computed whole."""
        return None if self.once else Prefix(0, mixtures, GrowingCache(self.model.adapted.model.config))

    def sample(self, batch: _Batch) -> None:
        repeated, samples = (1, _SAMPLES) if self.once else (_SAMPLES, 1)
        prompts = [prompt for prompt in batch.prompts for _ in range(repeated)]
        sampling = Sampling(_ANSWER_TOKENS, temperature=1.0)
        # No token ends an answer: all ways then sample answers of the same length.
        mixtures, adapted = [self.mixture()] * len(prompts), self.model.adapted
        collected(decode(adapted, prompts, mixtures, sampling, (), samples, prefix=self.prefix(mixtures)))

    def update(self, batch: _Batch) -> None:
        self.optimizer.zero_grad()
        self.loss(batch, self.parameters).backward()
        self.optimizer.step()

    def loss(self, batch: _Batch, mixture: Deltas | None) -> Tensor:
        prompts, groups = batch.prompts, batch.groups
        if not self.once:
            prompts = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
            groups = [[answer] for group in groups for answer in group]
        mixtures, adapted = [mixture] * len(prompts), self.model.adapted
        logs, mask = answer_log_probabilities(adapted, prompts, groups, mixtures, prefix=self.prefix(mixtures))
        advantages = torch.arange(len(logs)).remainder(2).mul(2).sub(1).to(logs.device)  # as many good as bad
        return -(advantages[:, None] * logs * mask).mean()


class _Composed(_Way):
    """The weights themselves are those of W', and have gradients."""

    def __init__(self, model: Model):
        super().__init__(model, once=False)
        self.factors = {}
        for path in model.adapted.layers:
            weight = linear_layer(model.adapted.model, path).weight
            self.factors[path] = factors_of(weight)
            weight.requires_grad_(True)
        # The model as it is, with weights that can be written: nothing of the edit beside them is used.
        model.adapted.detach()

    def mixture(self) -> None:
        return None

    def write(self) -> None:
        with torch.no_grad():
            for path, factors in self.factors.items():
                linear_layer(self.model.adapted.model, path).weight.copy_(compose(factors, self.parameters[path]))

    def sample(self, batch: _Batch) -> None:
        self.write()
        super().sample(batch)

    def update(self, batch: _Batch) -> None:
        self.optimizer.zero_grad()
        self.loss(batch, None).backward()
        for path, factors in self.factors.items():
            weight = linear_layer(self.model.adapted.model, path).weight
            compose(factors, self.parameters[path]).backward(weight.grad)
            weight.grad = None
        self.optimizer.step()


def _lora(model: Model) -> _Way:
    from t2app.training.lora import with_lora  # here, because peft takes seconds to import

    return _Way(with_lora(model, list(model.adapted.layers), _LORA_RANK, seed=0), once=True)


_WAYS: dict[str, Callable[[Model], _Way]] = {
    "shared": lambda model: _Way(model, once=True),
    "repeated": lambda model: _Way(model, once=False),
    "composed": _Composed,
    "lora": _lora,
}


def _measure(way_name: str, model_name: str, precision: str) -> dict[str, list[float]]:
    """The figures of one way by name, a value a step; the first step is not counted."""
    before = _memory()
    model = load_model(model_name, precision, many_rows=True, layers=lambda path: True)
    way = _WAYS[way_name](model)
    del model
    gc.collect()
    batch = _batch(way.model)
    measured: dict[str, list[float]] = {}
    for step in range(1 + _STEPS):
        with PeakMemory() as memory:
            sampling, update = seconds(lambda: way.sample(batch)), seconds(lambda: way.update(batch))
        if step == 0:
            continue
        figures = {
            "sampling_seconds": sampling,
            "update_seconds": update,
            "step_seconds": sampling + update,
            "peak_memory_mb": ((memory.gpu_peak or memory.peak) - before) / 2**20,
        }
        for name, value in figures.items():
            measured.setdefault(name, []).append(value)
    return measured


def _memory() -> int:
    """Bytes in use now: the GPU's, or where there is none the process's."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else memory_in_use()


def _batch(model: Model) -> _Batch:
    examples = task_named("arithmetic").examples("train")[:_PROMPTS]
    generator = torch.Generator().manual_seed(0)
    shape = (_PROMPTS, _SAMPLES, _ANSWER_TOKENS)
    answers = torch.randint(100, 1000, shape, generator=generator).tolist()
    return _Batch([model.prompt_ids(example.prompt) for example in examples], answers)
