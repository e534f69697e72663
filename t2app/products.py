"""Linear layers and spectral edits: as torch computes them, and faster in bfloat16 on a CPU.

Decoding multiplies one or two rows by every weight of the model. Kernels of our own do that in about half of torch's
time, whatever the CPU; up to how many rows they are the faster ones depends on it. For many rows (a prompt) torch is
right where the CPU has 16-bit arithmetic. Where it has none, torch multiplies bfloat16 one row at a time, and such a
product goes through a float32 copy of the weight that lives for one product. `bench products` measures all of these.

The kernels are compiled on first use and kept in the cache; without a compiler the model runs on torch's own products.
"""

import hashlib
import logging
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import cpp_extension

_KERNEL_WIDTH = 16
_SOURCE = Path(__file__).with_name("few_rows.cpp")


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for x (…, in_features), weight (out_features, in_features) and bias (out_features,), all bfloat16."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= few_rows() and weight.shape[1] % _KERNEL_WIDTH == 0:
        y = torch.ops.t2app.few_rows_linear(rows, weight, bias)
    elif has_bfloat16_arithmetic():
        y = F.linear(rows, weight, bias)
    else:
        y = F.linear(rows.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def edited(side: Tensor, rows: slice | Tensor, vectors: Tensor, delta: Tensor, bias: Tensor | None = None) -> Tensor:
    """A layer's narrow side with some rows edited: s + V((z − 1) ⊙ Vᵀ(s − bias)), the other rows as they are.

    Args:
        side: (rows, tokens, narrow).
        rows: the rows to edit, as an index.
        vectors: Vᵀ (rank, narrow), a singular vector a row.
        delta: z − 1 (1 or edited rows, rank) in float32.
        bias: (narrow,), what of `side` is no part of the product that the edit is for.
    """
    before = side[rows] if bias is None else side[rows] - bias
    return _with_rows(side, rows, _edit(before, vectors, delta))


def fast_edited(
    side: Tensor, rows: slice | Tensor, vectors: Tensor, delta: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`edited` for bfloat16."""
    if torch.is_grad_enabled() and (side.requires_grad or delta.requires_grad):
        return edited(side, rows, vectors, delta, bias)
    few = side.shape[1] == 1 and len(side) <= few_rows() and isinstance(rows, slice) and bias is None
    if few and vectors.shape[1] % _KERNEL_WIDTH == 0:
        return torch.ops.t2app.few_rows_edited(side, vectors, delta, rows.start, rows.stop - rows.start)
    if has_bfloat16_arithmetic():
        return edited(side, rows, vectors, delta, bias)
    before = side[rows].float() if bias is None else side[rows].float() - bias
    return _with_rows(side, rows, _edit(before, vectors.float(), delta))


def _edit(side: Tensor, vectors: Tensor, delta: Tensor) -> Tensor:
    coordinates = F.linear(side, vectors) * delta[:, None, :]  # (rows, tokens, rank)
    return coordinates.to(side.dtype) @ vectors


def _with_rows(side: Tensor, rows: slice | Tensor, change: Tensor) -> Tensor:
    """`side` with `change` added to its rows; what the other rows hold is copied bit for bit."""
    if len(change) == len(side):
        return (side + change).to(side.dtype)
    side = side.clone()
    side[rows] += change
    return side


class FastLinear(nn.Linear):
    """A linear layer that multiplies by `fast_linear`; it shares its weight and bias with the layer it stands for."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)


def use_fast_products(model: nn.Module, kernel_folder: Path) -> None:
    """Let the linear layers of a bfloat16 model on the CPU multiply by `fast_linear`, where the CPU can (AVX2).

    Layers that are no plain ones, as those of 4-bit, and layers that accelerate offloads stay as they are.

    Args:
        kernel_folder: where the compiled kernel is kept.
    """
    weights = next(model.parameters())
    if weights.device.type != "cpu" or weights.dtype != torch.bfloat16 or not load_kernel(kernel_folder):
        return
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not hasattr(layer, "_hf_hook"):
            model.set_submodule(path, FastLinear(layer))


@cache
def has_bfloat16_arithmetic() -> bool:
    """Whether the CPU multiplies bfloat16 itself; torch then does so well for many rows."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_products_of_many_rows(weight: Tensor) -> bool:
    """Whether torch's own product of many rows by a weight is a good one: of floats, and not one row at a time."""
    if not weight.dtype.is_floating_point or weight.device.type == "meta":
        return False
    return weight.dtype == torch.float32 or weight.device.type != "cpu" or has_bfloat16_arithmetic()


@cache
def few_rows() -> int:
    """Up to how many rows the kernels are faster than what else there is (`bench products`)."""
    return 4 if has_bfloat16_arithmetic() else 8


@cache
def load_kernel(folder: Path) -> bool:
    """Make `torch.ops.t2app.few_rows_linear` available; False where the CPU lacks AVX2 or it cannot be compiled."""
    if not torch.cpu._is_avx2_supported():
        return False
    key = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"few_rows-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Built beside and renamed: a build that is cut off leaves nothing, and two at once do no harm.
        with tempfile.TemporaryDirectory(dir=folder, suffix=".partial") as scratch:
            built = Path(scratch) / library.name
            if not _compile(built):
                return False
            os.replace(built, library)
    if not hasattr(torch.ops.t2app, "few_rows_linear"):
        torch.ops.load_library(library)
    return True


def _compile(library: Path) -> bool:
    command = [os.environ.get("CXX", "c++"), "-O3", "-std=c++20", "-mavx2", "-mfma", "-fopenmp", "-fPIC", "-shared"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += ["-DAT_PARALLEL_OPENMP=1", str(_SOURCE), "-o", str(library)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning("decoding without the fast kernel, which could not be compiled: %s", detail)
        return False
    return True
