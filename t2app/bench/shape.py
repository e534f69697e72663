"""What a model of the catalogue costs, by random weights in its shape: no download, and no licence to accept."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from t2app.bench.figure import Figure
from t2app.bench.model import model_figures
from t2app.bench.random_checkpoint import write_random_checkpoint
from t2app.cache import cache_folder
from t2app.models.catalogue import CATALOGUE


def bench_shape(model_name: str, precision: str) -> Iterator[Figure]:
    """The figures of `model` for random weights in the shape of a model of the catalogue.

    Raises:
        ValueError: the catalogue has no such model.
    """
    entry = CATALOGUE.get(model_name)
    if entry is None:
        raise ValueError(f"the bench 'shape' takes a name of the catalogue: {', '.join(CATALOGUE)}")
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
        write_random_checkpoint(entry.shape, Path(folder))
        yield from model_figures("shape", folder, precision)
