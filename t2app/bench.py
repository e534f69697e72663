"""What things cost, measured in paired runs in one process: medians, with their range and n."""

import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from gradio_client import Client
from torch.nn import functional as F
from transformers import DynamicCache

from t2app.experts import mix
from t2app.models import Model, load_model
from t2app.products import FastLinear
from t2app.spectral import Deltas, block_linear_paths, linear_layer

_CONTEXT_TOKENS = 64
_STEPS = 60
_STARTS = 3
_PRODUCT_ROWS = (1, 2, 4, 8, 16, 90)
_PRODUCTS = 200
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
        started = time.perf_counter()
        with served_app("--model", model_name, "--precision", precision) as app:
            served.append(time.perf_counter() - started)
            Client(app.url, verbose=False).predict(prompt="Compute 12 + 7.", api_name="/answer")
            answered.append(time.perf_counter() - started)
        memory.append(app.peak_memory / 2**20)
    yield _figure("start", "warm_seconds", served, "s")
    yield _figure("start", "answered_seconds", answered, "s")
    yield _figure("start", "peak_memory_mb", memory, "MiB")


def bench_products(model_name: str, precision: str) -> Iterator[Figure]:
    """A product with the model's widest layer, in each way that there is on this machine, for few rows and many.

    `kernel` is ours (bf16, few rows), `bf16` and `fp32` are torch's. What is best here decides nothing by itself: the
    choices are in `products.py` and `models.resolve_precision`, and this is what they were made on.

    Raises:
        ValueError: a precision is given that leaves nothing to compare.
    """
    if precision == "fp32":
        raise ValueError("the bench 'products' compares bf16 with fp32 by itself; leave --precision out")
    model = load_model(model_name, "bf16", layers=lambda path: False).adapted.model
    layers = [linear_layer(model, path) for path in block_linear_paths(model)]
    weight = max((layer.weight for layer in layers), key=torch.Tensor.numel).detach()
    wide = weight.float()
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "bf16": lambda x: F.linear(x, weight),
        "fp32": lambda x: F.linear(x.float(), wide),
    }
    if any(isinstance(layer, FastLinear) for layer in layers):
        ways["kernel"] = lambda x: torch.ops.t2app.few_rows_linear(x, weight, None)
    for rows in _PRODUCT_ROWS:
        x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        for name, multiply in ways.items():
            multiply(x)
            values = [1e3 * _seconds(partial(multiply, x)) for _ in range(_PRODUCTS)]
            yield _figure("products", f"{name}_{rows}_rows", values, "ms")


BENCHES: dict[str, Callable[[str, str], Iterator[Figure]]] = {
    "decode": bench_decode,
    "start": bench_start,
    "products": bench_products,
}


@dataclass
class ServedApp:
    """The app in a process of its own; `peak_memory` in bytes is known once it has ended."""

    url: str
    peak_memory: int = 0


@contextmanager
def served_app(*arguments: str) -> Iterator[ServedApp]:
    """`app.py` with these arguments from the moment its page is served to the end of the block.

    Raises:
        RuntimeError: the app ends before it serves its page, or takes longer than _START_LIMIT_SECONDS.
    """
    port = _free_port()
    app = ServedApp(f"http://127.0.0.1:{port}/")
    process = subprocess.Popen([sys.executable, str(_APP), "--port", str(port), *arguments], stdout=subprocess.DEVNULL)
    try:
        _wait_until_served(app.url, process)
        yield app
    finally:
        process.terminate()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        app.peak_memory = usage.ru_maxrss * 1024


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


def _wait_until_served(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + _START_LIMIT_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the app ended with exit code {process.returncode} before it served its page")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the app served no page within {_START_LIMIT_SECONDS} s")
