"""What things cost, measured in paired runs in one process: medians, with their range and n."""

import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from gradio_client import Client
from transformers import DynamicCache

from t2app.experts import mix
from t2app.models import Model, load_model
from t2app.spectral import Deltas

_CONTEXT_TOKENS = 64
_STEPS = 60
_STARTS = 3
_START_LIMIT_SECONDS = 300
_APP = Path(__file__).resolve().parent.parent / "app.py"


@dataclass(frozen=True)
class Figure:
    """One measured figure: the median of n values and their range, in `unit`."""

    bench: str
    figure: str
    value: float
    min: float
    max: float
    n: int
    unit: str


def bench_decode(model_name: str, precision: str) -> Iterator[Figure]:
    """A decoding step with both answers against one of the plain base model, at the same length.

    The steps alternate, so that a slow moment of the machine meets both. Both go through the same loaded model.

    Raises:
        ValueError: the model has no expert to measure with.
    """
    model = load_model(model_name, precision)
    mixture = mix(model.experts, {expert.name: 1.0 for expert in model.experts})
    if mixture is None:
        raise ValueError(f"{model.name} has no expert to measure with")
    base = _stepper(model, [None])
    both = _stepper(model, [None, mixture])
    for step in (base, both):
        for _ in range(5):
            step()
    pairs = [(_seconds(base), _seconds(both)) for _ in range(_STEPS)]
    yield _figure("decode", "base_step", [1e3 * first for first, _ in pairs], "ms")
    yield _figure("decode", "both_step", [1e3 * second for _, second in pairs], "ms")
    yield _figure("decode", "both_over_base", [second / first for first, second in pairs], "ratio")


def bench_start(model_name: str, precision: str) -> Iterator[Figure]:
    """Starts of the app in a process of its own, with a warm cache: until its page is served, until it has answered."""
    served, answered, memory = [], [], []
    for _ in range(_STARTS):
        port = _free_port()
        url = f"http://127.0.0.1:{port}/"
        command = [sys.executable, str(_APP), "--port", str(port), "--model", model_name, "--precision", precision]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            served.append(_seconds_until_served(url, process, started))
            Client(url, verbose=False).predict(prompt="Compute 12 + 7.", api_name="/answer")
            answered.append(time.perf_counter() - started)
        finally:
            process.terminate()
            _, _, usage = os.wait4(process.pid, 0)
        memory.append(usage.ru_maxrss / 1024)
    yield _figure("start", "warm_seconds", served, "s")
    yield _figure("start", "answered_seconds", answered, "s")
    yield _figure("start", "peak_memory_mb", memory, "MiB")


BENCHES: dict[str, Callable[[str, str], Iterator[Figure]]] = {"decode": bench_decode, "start": bench_start}


def _stepper(model: Model, mixtures: list[Deltas | None]) -> Callable[[], None]:
    """One decoding step with a row for each mixture, continuing a context of random tokens."""
    transformer, device = model.adapted.model, model.adapted.model.device
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(100, 1000, (1, _CONTEXT_TOKENS), generator=generator).expand(len(mixtures), -1).to(device)
    cache = DynamicCache(config=transformer.config)

    plan = model.adapted.plan(mixtures)

    def forward(ids: torch.Tensor) -> None:
        with torch.inference_mode(), model.adapted.using(plan):
            transformer(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    forward(context)
    return lambda: forward(context[:, :1])


def _seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _figure(bench: str, figure: str, values: list[float], unit: str) -> Figure:
    return Figure(bench, figure, statistics.median(values), min(values), max(values), len(values), unit)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _seconds_until_served(url: str, process: subprocess.Popen, started: float) -> float:
    """Seconds from `started` until `url` is served; raises RuntimeError where the process ends or takes too long."""
    while time.perf_counter() - started < _START_LIMIT_SECONDS:
        if process.poll() is not None:
            raise RuntimeError(f"the app ended with exit code {process.returncode} before it served its page")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.perf_counter() - started
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the app served no page within {_START_LIMIT_SECONDS} s")
