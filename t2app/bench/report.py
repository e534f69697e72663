"""The figures of a run as Markdown, with what a reader needs to judge them: the machine, the versions and the date.

Nothing in it tells whose machine it was: no host's name and no folder of it.
"""

import datetime
import inspect
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from t2app.bench import bench_named
from t2app.bench.figure import Figure
from t2app.kernels.build import cpu_instructions, kernel_folder, load_kernels
from t2app.models.model import resolve_precision

_PACKAGES = ("torch", "transformers", "gradio")
_CPU_INFO = Path("/proc/cpuinfo")
# By which torch, and the libraries that it multiplies by, are told to do without some of what a CPU can.
_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def report(figures: Sequence[Figure], benches: Sequence[str], model: str, precision: str) -> str:
    """The machine, what each of the benches measures, and a table of the figures.

    Args:
        benches: names of those that the figures are of; a bench's docstring says in its first line what it measures.
        model: what the model is called; precision: as it was asked for.
    """
    facts = {"model": f"{model}, held in {_held_in(precision)}", **machine(), "date": datetime.date.today().isoformat()}
    meanings = {name: inspect.getdoc(bench_named(name)).splitlines()[0] for name in benches}
    sections = [
        [f"- {name}: {value}" for name, value in facts.items()],
        [f"- `{name}`: {meaning}" for name, meaning in meanings.items()],
        list(_table(figures)),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def machine() -> dict[str, str]:
    """Processor and memory, whether the kernels are lacking, the GPUs, and the versions of what computes on them."""
    instructions = "/".join(cpu_instructions()) or torch.backends.cpu.get_cpu_capability()
    gpus = [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
    without_kernels = not gpus and not load_kernels(kernel_folder())
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {instructions}",
        **({"limited by": " ".join(limits)} if limits else {}),
        **({"kernels": "none, since nothing here compiles them"} if without_kernels else {}),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "GPU": ", ".join(gpus) or "none",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(_versions()),
    }


def _versions() -> Iterator[str]:
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # a machine without a page needs no Gradio
            yield f"{package} {version(package)}"


def _held_in(precision: str) -> str:
    few, many = resolve_precision(precision), resolve_precision(precision, many_rows=True)
    return few if few == many else f"{few}, and in {many} where there are many rows"


def without_folders(command: Sequence[str]) -> list[str]:
    """The words of a command line, absolute paths in it cut down to their last part."""
    return [_last_part(word) for word in command]


def _last_part(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _processor() -> str:
    if _CPU_INFO.exists():
        names = [line.partition(":")[2].strip() for line in _CPU_INFO.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _table(figures: Sequence[Figure]) -> Iterator[str]:
    yield "| bench | figure | median | min | max | n | unit |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for figure in figures:
        median, least, most = (f"{value:.4g}" for value in (figure.value, figure.min, figure.max))
        # `|` in a unit, as in |VᵀV − I|, would end the cell.
        unit = figure.unit.replace("|", "\\|")
        yield f"| {figure.bench} | {figure.figure} | {median} | {least} | {most} | {figure.n} | {unit} |"
