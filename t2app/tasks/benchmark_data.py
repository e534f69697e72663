"""Rows of the public benchmarks: from a local folder if one is named, from the hub otherwise.

The folder is the one in the variable T2_DATA_DIR (`--data` on the command line sets it), laid out as
`<dataset>/<config>/<split>.jsonl` with the hub's field names. A row names its picture by a file beside it.
"""

import json
import os
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from t2app.tasks.task import Picture

if TYPE_CHECKING:
    from datasets import Dataset

DATA_DIR_VARIABLE = "T2_DATA_DIR"
# Of the training rows of a benchmark that has no validation split, each tenth is kept for it.
_VALIDATION_EVERY = 10


class DataError(ValueError):
    """A task's data cannot be had; the message says where it was looked for and what to do."""


def rows(dataset: str, config: str, split: str) -> list[dict]:
    """All rows of a split of `dataset`, a hub name; its local folder bears what follows the slash, in lower case.

    Raises:
        DataError: the folder that is named does not hold the split, or the hub does not give it.
    """
    folder = os.environ.get(DATA_DIR_VARIABLE)
    return _rows_of_folder(Path(folder), dataset, config, split) if folder else _rows_of_hub(dataset, config, split)


def pictured_rows(dataset: str, config: str, split: str) -> list[tuple[dict, Picture]]:
    """`rows` of a data set with a field `image`, each with its picture, which is not read yet.

    Raises:
        DataError: as `rows`; reading a picture raises it too, where its file is not there.
    """
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        return _pictured_rows_of_hub(dataset, config, split)
    place = _folder_of(Path(folder), dataset, config)
    return [(row, Picture(partial(_bytes_of, place / row["image"]))) for row in rows(dataset, config, split)]


def rows_with_validation(dataset: str, config: str, split: str) -> list[dict]:
    """`rows` of a benchmark without a validation split, which gets a part of the training rows instead."""
    if split == "test":
        return rows(dataset, config, split)
    return [
        row
        for number, row in enumerate(rows(dataset, config, "train"))
        if (number % _VALIDATION_EVERY == 0) == (split == "validation")
    ]


def only_test(task: str, split: str) -> None:
    """Raises ValueError for every split but the test: nobody may train or choose on this task."""
    if split != "test":
        raise ValueError(f"'{task}' has no split '{split}': it is there to be tested on, not to be trained on")


@cache
def _rows_of_folder(folder: Path, dataset: str, config: str, split: str) -> list[dict]:
    file = _folder_of(folder, dataset, config) / f"{split}.jsonl"
    try:
        with open(file, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise DataError(
            f"there is no file {file}; put {dataset} there, name another folder with --data or {DATA_DIR_VARIABLE}, or "
            "name none, so that it is fetched from the hub"
        ) from None
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{file} cannot be read as one JSON object a line: {error}") from None


def _folder_of(folder: Path, dataset: str, config: str) -> Path:
    return folder / dataset.split("/")[1].lower() / config


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"the picture {file}, which the data names, cannot be read: {error}") from None


@cache
def _rows_of_hub(dataset: str, config: str, split: str) -> list[dict]:
    return _dataset_of_hub(dataset, config, split).to_list()


@cache
def _pictured_rows_of_hub(dataset: str, config: str, split: str) -> list[tuple[dict, Picture]]:
    from datasets import Image

    data = _dataset_of_hub(dataset, config, split)
    # All of a data set's pictures at once would not fit in memory, decoded or not.
    files = data.select_columns("image").cast_column("image", Image(decode=False))
    words = data.remove_columns("image").to_list()
    return [(row, Picture(partial(_bytes_in, files, number))) for number, row in enumerate(words)]


def _bytes_in(files: "Dataset", number: int) -> bytes:
    return files[number]["image"]["bytes"]


def _dataset_of_hub(dataset: str, config: str, split: str) -> "Dataset":
    # Imported here: it takes seconds, which a procedural task need not pay.
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # noqa: BLE001  the library raises whatever its many ways to fetch raise
        raise DataError(
            f"{dataset} could not be had from the hub ({type(error).__name__}: {error}); without the hub, name a "
            f"folder that holds it with --data or {DATA_DIR_VARIABLE}"
        ) from None
