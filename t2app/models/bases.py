"""The bases of a model's layers, computed once and kept in the cache, a file a layer."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load, save_file

from t2app.cache import cache_folder
from t2app.models.checkpoints import Progress
from t2app.models.weights import CheckpointWeights
from t2app.spectral import Basis, basis_of, linear_layer

# Of the matrices, in float64, that are decomposed at a time. A decomposition needs some three times its matrix.
_MOST_BYTES_AT_ONCE = 2**29


class CachedBases(Mapping[str, Basis]):
    """The basis of each layer to adapt, by its path; one is in memory only while somebody looks at it.

    They are kept in float32: rounded to bfloat16 they would still do for a model in bfloat16, which rounds them itself,
    but in float32 an edit is exact to a few units in the last places, and with rounded vectors it would not be.

    Args:
        fingerprint: of the model's full-precision weights, which the bases are those of.
        device: where they are computed.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weights: CheckpointWeights,
        fingerprint: str,
        paths: Sequence[str],
        device: torch.device,
    ):
        self._model, self._weights, self._paths, self._device = model, weights, paths, device
        self._folder = cache_folder() / "bases" / fingerprint[:32]

    def prepare(self, progress: Progress) -> None:
        """Compute those that are not in the cache; a preparation that is cut off goes on from the layers it was at.

        Raises:
            WeightsError: the checkpoint does not hold the full-precision weights.
        """
        if not self._missing():
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        progress("Computing singular vectors", None)  # or waiting for the process that does
        with FileLock(self._folder.with_suffix(".lock")):
            missing = self._missing()
            with _workers(self._at_once(missing)) as workers:
                there = len(self._paths) - len(missing)
                for done, _ in enumerate(workers.map(self._compute, missing), start=there + 1):
                    progress("Computing singular vectors", done / len(self._paths))

    def _missing(self) -> list[str]:
        return [path for path in self._paths if not self._file(path).exists()]

    def _at_once(self, paths: Sequence[str]) -> int:
        """How many of these are computed at a time: a CPU's threads share them out, as far as memory allows."""
        if self._device.type != "cpu" or not paths:
            return 1
        layers = (linear_layer(self._model, path) for path in paths)
        largest = max(layer.in_features * layer.out_features for layer in layers) * torch.float64.itemsize
        return max(min(torch.get_num_threads(), _MOST_BYTES_AT_ONCE // largest), 1)

    def _compute(self, path: str) -> None:
        basis = basis_of(self._weights[path].to(self._device))
        # Written beside and renamed: a process that is cut off leaves no half of a file.
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".partial", delete=False) as partial:
            partial.close()
            save_file({"vectors": basis.vectors, "singular_values": basis.singular_values}, partial.name)
            os.replace(partial.name, self._file(path))

    def __getitem__(self, path: str) -> Basis:
        # Read as a whole: a file mapped into memory is read page by page as it is transposed, ten times slower.
        layer = linear_layer(self._model, path)
        return Basis(**load(self._file(path).read_bytes()), edits_input=layer.in_features <= layer.out_features)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def _file(self, path: str) -> Path:
        return self._folder / f"{path}.safetensors"


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, each of which computes on its share of torch's.

    A decomposition on two threads waits at every step for the slower one. While the kernels are compiled beside, a
    matrix of 1536 × 576 took 0.14 s so, and 0.053 s where each thread had its own (two cores, n = 80); with nothing
    beside, 0.036 and 0.033 s (n = 16).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(threads // count)
    try:
        with ThreadPoolExecutor(count) as workers:
            yield workers
    finally:
        torch.set_num_threads(threads)
