"""The app in a process of its own, as somebody starts it, with prompts answered as its page has them answered."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gradio_client import Client

from t2app.bench.memory import PeakMemory

# After an answer, more than long enough for what is prepared while nobody asks for anything.
IDLE_SECONDS = 15
_START_LIMIT_SECONDS = 300
_APP = Path(__file__).resolve().parent.parent.parent / "app.py"


@dataclass
class ServedApp:
    """The app in a process of its own; `peak_memory` in bytes is known once it has ended."""

    url: str
    peak_memory: int = 0

    @cached_property
    def _client(self) -> Client:
        return Client(self.url, verbose=False)

    def answer(self, prompt: str) -> int:
        """Have a prompt answered, and wait until both answers are complete: how often the page was updated.

        Raises:
            RuntimeError: the page says that it cannot answer.
        """
        job = self._client.submit(prompt=prompt, api_name="/answer")
        shown = job.result()
        # As the page begins each of its sentences about what went wrong.
        if failures := [text for text in shown if isinstance(text, str) and text.startswith("⚠️")]:
            raise RuntimeError(f"the app did not answer: {failures[0]}")
        return len(job.outputs())


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
