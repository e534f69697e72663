"""What a model costs to have and to answer with, on the device that it runs on."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from t2app.bench.figure import Figure, figure_of, in_turns, seconds
from t2app.bench.memory import MemoryReading, PeakMemory
from t2app.bench.step import random_context, step_seconds, stepper, weight_bytes, with_matrices
from t2app.cache import cache_folder
from t2app.decoding import decode
from t2app.messages import Sampling
from t2app.models.checkpoints import checkpoint_of
from t2app.models.model import Model, load_model
from t2app.spectral import Deltas

_LOADS, _PROMPTS, _STEPS = 3, 8, 40
# As much as experts change the singular values; what is measured does not depend on it.
_SPREAD = 0.05
_CACHE_VARIABLE = "T2_CACHE_DIR"


def bench_model(model_name: str, precision: str) -> Iterator[Figure]:
    """Preparing and loading a model with all linear layers of its blocks adapted, its memory, and its answers' speed.

    Every load is a process of its own. To prepare is to load with no basis and no kernel in the cache; the checkpoint
    is there, and converted. The cache that is used otherwise is left as it was. `first_token_seconds` is that of both
    answers to a prompt of 64 tokens, without a first pass; the tokens of both count in `both_tokens_per_second`. Of a
    step `…_bandwidth_share` is the time in which memory gives its weights at full speed. Peaks on a GPU are of what
    torch has allocated.
    """
    yield from model_figures("model", model_name, precision)


def model_figures(bench: str, model_name: str, precision: str) -> Iterator[Figure]:
    """The figures of `bench_model`, under the name of a bench."""
    checkpoint_of(model_name, lambda message, share: None)  # not counted
    with _empty_cache():
        prepared = _loaded(model_name, precision)
        loads = [_loaded(model_name, precision) for _ in range(_LOADS)]
        model = load_model(model_name, precision, layers=_all_layers)
    yield figure_of(bench, "prepare_seconds", [prepared.seconds], "s")
    yield from _peaks(bench, "prepare", [prepared])
    yield figure_of(bench, "load_seconds", [load.seconds for load in loads], "s")
    yield from _peaks(bench, "load", loads)
    yield figure_of(bench, "weights_mb", [_megabytes(model.adapted.model.parameters())], "MB")
    yield figure_of(bench, "bases_mb", [_megabytes(_base_tensors(model))], "MB")
    yield from _answer_figures(bench, model, _random_mixture(model))


def _answer_figures(bench: str, model: Model, mixture: Deltas) -> Iterator[Figure]:
    first_tokens = [seconds(partial(_first_tokens, model, mixture)) for _ in range(1 + _PROMPTS)]
    yield figure_of(bench, "first_token_seconds", first_tokens[1:], "s")
    mixture = with_matrices(model, mixture)
    ways = {"base": [None], "adapted": [mixture], "both": [None, mixture]}
    steps = {name: stepper(model, mixtures, 2 * _STEPS) for name, mixtures in ways.items()}
    if torch.cuda.is_available():  # now: what is read of memory below is no answer's
        yield figure_of(bench, "answer_gpu_peak_mb", [torch.cuda.max_memory_allocated() / 1e6], "MB")
    reading = MemoryReading(model.adapted.model.device).seconds_per_byte
    times = in_turns({"byte": reading} | {name: partial(step_seconds, step) for name, step in steps.items()}, _STEPS)
    for name, mixtures in ways.items():
        rates = [len(mixtures) / time for time in times[name]]
        yield figure_of(bench, f"{name}_tokens_per_second", rates, "tokens/s")
    pairs = zip(times["both"], times["base"], strict=True)
    yield figure_of(bench, "both_over_base", [both / base for both, base in pairs], "ratio")
    yield figure_of(bench, "read_bandwidth", [1e-9 / value for value in times["byte"]], "GB/s")
    for name in ("base", "both"):
        bytes_ = weight_bytes(model, ways[name]).total
        shares = [bytes_ * value / time for value, time in zip(times["byte"], times[name], strict=True)]
        yield figure_of(bench, f"{name}_bandwidth_share", shares, "ratio")


class _Load(NamedTuple):
    """Seconds of one load, and what its process held at most, in bytes."""

    seconds: float
    host_peak: int
    gpu_peak: int


def _loaded(model_name: str, precision: str) -> _Load:
    """Load the model in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (model_name, precision))


def _load(model_name: str, precision: str) -> _Load:
    with PeakMemory() as memory:
        taken = seconds(partial(load_model, model_name, precision, layers=_all_layers))
    return _Load(taken, memory.peak, memory.gpu_peak)


def _all_layers(path: str) -> bool:
    return True


@contextmanager
def _empty_cache() -> Iterator[None]:
    """A cache of its own, for this process and those that it starts meanwhile, with the converted checkpoints in it."""
    models, before = cache_folder() / "models", os.environ.get(_CACHE_VARIABLE)
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        (Path(scratch) / "models").symlink_to(models.absolute())
        os.environ[_CACHE_VARIABLE] = scratch
        try:
            yield
        finally:
            if before is None:
                del os.environ[_CACHE_VARIABLE]
            else:
                os.environ[_CACHE_VARIABLE] = before


def _peaks(bench: str, what: str, loads: Sequence[_Load]) -> Iterator[Figure]:
    yield figure_of(bench, f"{what}_host_peak_mb", [load.host_peak / 1e6 for load in loads], "MB")
    if torch.cuda.is_available():
        yield figure_of(bench, f"{what}_gpu_peak_mb", [load.gpu_peak / 1e6 for load in loads], "MB")


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / 1e6


def _base_tensors(model: Model) -> Iterator[Tensor]:
    for layer in model.adapted.layers.values():
        yield from layer.packed or (layer.vectors,)


def _random_mixture(model: Model) -> Deltas:
    generator = torch.Generator().manual_seed(0)
    layers = model.adapted.layers.items()
    return {path: _SPREAD * torch.randn(layer.rank, generator=generator) for path, layer in layers}


def _first_tokens(model: Model, mixture: Deltas) -> None:
    next(decode(model.adapted, [random_context()] * 2, [None, mixture], Sampling(1), ()))
