"""The memory of a process and of a GPU: how much is used, and how fast it is."""

import threading

import psutil
import torch

from t2app.bench.figure import seconds

_PROBE_SECONDS = 0.002
# Several times what the caches hold, and on a GPU enough for what it takes to ask for it not to count.
_READ_BYTES = {"cpu": 2**28, "cuda": 2**32}


class MemoryReading:
    """How fast a device's memory is read: what it gives changes, on a virtual machine more than anywhere."""

    def __init__(self, device: torch.device):
        self._numbers = torch.ones(_READ_BYTES[device.type] // 4, device=device)
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._read()

    def seconds_per_byte(self) -> float:
        self._wait()
        return seconds(self._read) / self._numbers.nbytes

    def _read(self) -> None:
        self._numbers.sum()
        self._wait()


def memory_in_use(process: psutil.Process | None = None) -> int:
    """Bytes of memory that a process, by default this one, has now and that cannot be taken from it.

    Pages of mapped files are not among them: all that was read of a checkpoint stays until somebody else needs the
    memory.
    """
    memory = (process or psutil.Process()).memory_info()
    return memory.rss - memory.shared


class PeakMemory:
    """The most memory in bytes that a process, by default this one, had at a time within the block.

    Attributes:
        peak: of the host's memory; see `memory_in_use`.
        gpu_peak: of a GPU's, what torch has allocated in this process; 0 without one.
    """

    def __init__(self, process: int | None = None):
        self._process = psutil.Process(process)

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.peak, self.gpu_peak = memory_in_use(self._process), 0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()
        if torch.cuda.is_available():
            self.gpu_peak = torch.cuda.max_memory_allocated()

    def _look(self) -> None:
        while not self._over.wait(_PROBE_SECONDS):
            try:
                self.peak = max(self.peak, memory_in_use(self._process))
            except psutil.NoSuchProcess:
                return
