"""Decoding in bfloat16 on a CPU by kernels of our own, compiled on first use; without them torch does the same, slower.

`linear.py`, `attention.py` and `decoder.py` stand for torch's linear layers, transformers' attention and its decoders,
and call the kernels where those are the faster ones.
"""

from pathlib import Path

import torch
from torch import nn

from t2app.kernels.attention import use_fast_attention
from t2app.kernels.build import has_bfloat16_arithmetic, load_kernels
from t2app.kernels.decoder import use_fast_decoders
from t2app.kernels.linear import (
    EditedLayer,
    FastLinear,
    RowEdit,
    edits_fast,
    has_fast_linears,
    integers_in_order,
    needs_gradient,
    pack_vectors,
    use_fast_linears,
)

__all__ = [
    "EditedLayer",
    "FastLinear",
    "RowEdit",
    "edits_fast",
    "has_bfloat16_arithmetic",
    "has_fast_linears",
    "integers_in_order",
    "load_kernels",
    "needs_gradient",
    "pack_vectors",
    "use_kernels",
]


def use_kernels(model: nn.Module, folder: Path) -> None:
    """Let a bfloat16 model on the CPU decode by the kernels, where the CPU (AVX2) and a compiler allow that.

    Args:
        folder: where the compiled kernels are kept.
    """
    weights = next(model.parameters())
    if weights.device.type != "cpu" or weights.dtype != torch.bfloat16 or not load_kernels(folder):
        return
    use_fast_linears(model)
    use_fast_attention(model)
    use_fast_decoders(model)
