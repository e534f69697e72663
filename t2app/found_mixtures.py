"""Mixtures that a search found, kept by name: small JSON files beside the model's experts.

Nothing here imports torch: the page lists what is kept, and how it was found, before a model can be loaded. Whether a
file fits the model is for `dispatch.few_shot` to check.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from t2app.messages import Reevaluated, Searched
from t2app.models.catalogue import EXPERTS_FOLDER, pool_folder

FORMAT_VERSION = 2
_NAME = re.compile(r"[\w-]{1,60}")


class MixtureError(ValueError):
    """A kept mixture cannot be used; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class KeptMixture:
    """Attributes:
    fingerprint: of the weights that it was found on, as experts bear it.
    experts: the fingerprint of every expert that took part, by name.
    weights: α by expert, or an α for each block.
    task: what the examples were of; shots: how many; score: by which score; seed: of the search.
    trace: the rounds of the search.
    reevaluated: how it was chosen after the last round, None where it is the best so far of a search that decoded
        nothing or was interrupted.
    """

    name: str
    model: str
    fingerprint: str
    experts: Mapping[str, str]
    weights: Mapping[str, float | Sequence[float]]
    task: str
    shots: int
    score: str
    seed: int
    trace: Sequence[Searched]
    reevaluated: Reevaluated | None


def check_name(name: str) -> None:
    """Raises MixtureError where a mixture cannot be kept by this name."""
    if not _NAME.fullmatch(name):
        raise MixtureError(f"'{name}' is no name for a mixture; letters, digits, '-' and '_' were expected")


def mixture_file(model: str, name: str, experts_folder: Path = EXPERTS_FOLDER) -> Path:
    """Where a model's mixture of this name is kept, whether or not there is one; raises MixtureError for a bad name."""
    check_name(name)
    return pool_folder(model, experts_folder) / "mixtures" / f"{name}.json"


def kept_mixtures(model: str, experts_folder: Path = EXPERTS_FOLDER) -> list[str]:
    """The names of the mixtures that are kept for a model."""
    return sorted(file.stem for file in (pool_folder(model, experts_folder) / "mixtures").glob("*.json"))


def write_mixture(mixture: KeptMixture, path: Path) -> None:
    """Write `mixture`; a file that is there is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(mixture)}, indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def read_mixture(path: Path) -> KeptMixture:
    """Read a kept mixture; the file's name is the mixture's.

    Raises:
        MixtureError: there is none, or it cannot be read.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise MixtureError(f"{path} has mixture format {version}; this program reads format {FORMAT_VERSION}")
        fields["trace"] = tuple(Searched(**row) for row in fields["trace"])
        if fields["reevaluated"] is not None:
            fields["reevaluated"] = Reevaluated(**fields["reevaluated"])
        return KeptMixture(**fields | {"name": path.stem})
    except FileNotFoundError:
        kept = sorted(file.stem for file in path.parent.glob("*.json"))
        raise MixtureError(
            f"there is no mixture '{path.stem}'; kept for this model: {', '.join(kept) or 'none'}. `search` finds one"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, MixtureError):
            raise
        raise MixtureError(f"{path} cannot be read as a kept mixture ({error})") from None
