"""Compiling and loading the kernels: `torch.ops.t2app.…` from then on."""

import hashlib
import logging
import os
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import compress
from pathlib import Path

import torch
from torch.utils import cpp_extension

from t2app.cache import cache_folder

# What a row's length must divide by: bfloat16 in a register of AVX2.
WIDTH = 16
# The compiler's flags for what CPUs can do, each with all before it.
INSTRUCTIONS = {
    "AVX2": ("-mavx2", "-mfma"),
    "AVX-512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "VNNI": ("-mavx512vnni",),
    "bfloat16": ("-mavx512bf16",),
    "AMX": ("-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
# Whose stable interface is used, as its headers write it: 2.11, the oldest that requirements.txt takes.
_OLDEST_TORCH = 2 << 56 | 11 << 48
_SOURCE = Path(__file__).parent / "csrc" / "library.cpp"


def _has_avx512() -> bool:
    """Whether there are registers of 512 bits, and torch, which can be told to do without, uses them."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _has_vnni() -> bool:
    """Whether the CPU multiplies 64 bytes at a time and sums each four (AVX-512 VNNI)."""
    return _has_avx512() and torch.cpu._is_vnni_supported()


@cache
def has_bfloat16_arithmetic() -> bool:
    """Whether the CPU multiplies bfloat16 itself, as only CPUs with VNNI do; torch then does so well for many rows."""
    return _has_vnni() and torch.cpu._is_avx512_bf16_supported()


@cache
def has_tiles() -> bool:
    """Whether the CPU multiplies tiles (AMX), and the system lets this process do so, which is asked for here."""
    return has_bfloat16_arithmetic() and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def can_have_kernels() -> bool:
    """Whether this machine runs a model by kernels if there is a compiler: on a CPU with AVX2, and without a GPU."""
    return not torch.cuda.is_available() and torch.cpu._is_avx2_supported()


def kernel_folder() -> Path:
    """Where the compiled kernels are kept."""
    return cache_folder() / "kernels"


def kernels_ahead(precision: str) -> Future[bool] | None:
    """The kernels on their way, the same however often it is called; None where a model in this precision has none.

    They take the compiler as long as it takes to import transformers, which leaves a processor idle, as the conversion
    of a checkpoint does.
    """
    if precision == "fp32" or torch.cuda.is_available():
        return None
    return _ahead(kernel_folder())


@cache
def _ahead(folder: Path) -> Future[bool]:
    return ThreadPoolExecutor(1).submit(load_kernels, folder)


def has_kernels() -> bool:
    """Whether the kernels were loaded."""
    return hasattr(torch.ops.t2app, "decode")


def load_kernels(folder: Path) -> bool:
    """Make the kernels available; False where the CPU lacks AVX2 or nothing can be compiled.

    Args:
        folder: where the compiled ones are kept, for a process that has not loaded any.
    """
    return has_kernels() or _loaded_from(folder)


@cache
def _loaded_from(folder: Path) -> bool:
    if not torch.cpu._is_avx2_supported():
        return False
    sources = b"".join(file.read_bytes() for file in (_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))))
    built_for = " ".join([torch.__version__, *cpu_instructions()])
    key = hashlib.sha256(sources + built_for.encode()).hexdigest()[:16]
    library = folder / f"kernels-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Built beside and renamed: a build that is cut off leaves nothing, and two at once do no harm.
        with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as scratch:
            built = Path(scratch) / library.name
            if not _compile(built):
                return False
            os.replace(built, library)
    torch.ops.load_library(library)
    return True


def cpu_instructions() -> list[str]:
    """Those of `INSTRUCTIONS` that the CPU has and torch uses."""
    has = torch.cpu._is_avx2_supported(), _has_avx512(), _has_vnni(), has_bfloat16_arithmetic(), has_tiles()
    return list(compress(INSTRUCTIONS, has))


def compiler_command(instructions: Iterable[str], *others: str) -> list[str]:
    """What compiles the kernels for a CPU with these of `INSTRUCTIONS`."""
    flags = [flag for name in instructions for flag in INSTRUCTIONS[name]]
    command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++20", *flags, "-fopenmp", "-fPIC"]
    command += ["-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={_OLDEST_TORCH:#x}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    return [*command, str(_SOURCE), *others]


def _compile(library: Path) -> bool:
    command = compiler_command(cpu_instructions(), "-shared", "-o", str(library))
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning(
            "decoding without the fast kernels, which could not be compiled: %s", detail
        )
        return False
    return True
