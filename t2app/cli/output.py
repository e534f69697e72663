"""What several commands print or write alike."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2app.evaluation import Accuracy


def print_json(row: dict) -> None:
    """One line of `--json`, at once."""
    print(json.dumps(row, ensure_ascii=False), flush=True)


def print_accuracies(accuracies: Sequence["Accuracy"], as_json_lines: bool) -> None:
    """Measured accuracies as JSON lines with their intervals, or as tables."""
    if not as_json_lines:
        print(accuracy_tables(accuracies))
        return
    for row in accuracies:
        low, high = row.interval
        print_json(asdict(row) | {"accuracy": row.accuracy, "low": low, "high": high})


def accuracy_tables(accuracies: Sequence["Accuracy"]) -> str:
    """The accuracies as a Markdown table, and below it what each dispatch named."""
    from t2app.evaluation import DispatchAccuracy, confusion_table, results_table

    confusions = [confusion_table(row) for row in accuracies if isinstance(row, DispatchAccuracy)]
    return "\n".join([results_table(accuracies), *confusions])


def write_markdown(file: Path, title: str, command: str, text: str, about: str = "") -> None:
    """A title, the command that measured what follows, and the text.

    Args:
        command: as it was given after `python -m t2app`.
        about: what is said of it before the command.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = (f"# {title}", about, f"```bash\npython -m t2app {command}\n```", text)
    file.write_text("\n\n".join(filter(None, parts)), encoding="utf-8")
