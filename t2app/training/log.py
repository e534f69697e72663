"""What a training writes down as it goes: one JSON object a step, and the same numbers for TensorBoard."""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

_FILE = "log.jsonl"


class TrainingLog:
    """The log of the training in `folder`: `log.jsonl`, and `tensorboard/` for `tensorboard --logdir`.

    Args:
        done: steps that are done already. What was logged after them goes, so that each step is there once; None, for a
            training that begins, removes all of it.
    """

    def __init__(self, folder: Path, done: int | None):
        self._folder, self._file, self._board_folder = folder, folder / _FILE, folder / "tensorboard"
        self._done = done
        if done is None:
            self._file.unlink(missing_ok=True)
            shutil.rmtree(self._board_folder, ignore_errors=True)
            return
        kept = [row for row in read_log(folder) if row["step"] <= done]
        partial = self._file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.replace(self._file)

    def add(self, row: Mapping[str, float | None]) -> None:
        """Write down one step, whose number is under "step"; it is on disk when this returns."""
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step" and value is not None:
                self._board.add_scalar(f"training/{name}", value, row["step"])
        self._board.flush()

    def validations(self) -> tuple[tuple[int, float], ...]:
        """Step and validation accuracy, where it was measured."""
        return tuple(
            (row["step"], row["validation"]) for row in read_log(self._folder) if row["validation"] is not None
        )

    @cached_property
    def _board(self):
        # Imported here: it takes a second, which a finished training need not pay.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._board_folder, purge_step=None if self._done is None else self._done + 1)


def read_log(folder: Path) -> list[dict]:
    """The steps that the training in `folder` has logged; raises FileNotFoundError where there is none."""
    # What follows the last line's end was being written when the run was cut off.
    whole, _, _ = (folder / _FILE).read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]
