"""A model that decodes by the kernels, or by what of torch is the fastest."""

from pathlib import Path

import torch
from torch import nn

from t2app.kernels.attention import use_fast_attention
from t2app.kernels.build import load_kernels
from t2app.kernels.byte_linear import hold_in_bytes
from t2app.kernels.decoder import use_fast_decoders
from t2app.kernels.linear import use_fast_linears


def use_kernels(model: nn.Module, folder: Path, in_bytes: bool = False) -> None:
    """Let a bfloat16 model on a CPU decode by the kernels where they are there, which takes AVX2 and a compiler.

    Elsewhere its linear layers alone are faster.

    Args:
        folder: where the compiled kernels are kept.
        in_bytes: whether to hold weights in 8 bits, which only the kernels read.

    Raises:
        ValueError: weights are to be held in 8 bits, and there are no kernels.
    """
    weights = next(model.parameters())
    if weights.device.type != "cpu" or weights.dtype != torch.bfloat16:
        return
    loaded = load_kernels(folder)
    if in_bytes and not loaded:
        raise ValueError("weights in 8 bits are multiplied by the kernels alone, which take AVX2 and a C++ compiler")
    use_fast_linears(model)
    if in_bytes:
        hold_in_bytes(model)
    if loaded:
        use_fast_attention(model)
        use_fast_decoders(model)
