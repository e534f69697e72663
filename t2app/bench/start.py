"""What the app costs: seconds until its page is served and until it has answered, and its memory."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradio_client import Client

from t2app.bench.figure import Figure, figure_of

_STARTS = 3
_START_LIMIT_SECONDS = 300
_APP = Path(__file__).resolve().parent.parent.parent / "app.py"


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
    yield figure_of("start", "warm_seconds", served, "s")
    yield figure_of("start", "answered_seconds", answered, "s")
    yield figure_of("start", "peak_memory_mb", memory, "MiB")


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
