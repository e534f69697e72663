"""Linear layers in bfloat16 on a CPU.

Decoding multiplies one or two rows by every weight of the model. Our kernel does that in about half of torch's time,
whatever the CPU; up to how many rows it is the faster one depends on it. For many rows (a prompt) torch is right where
the CPU has 16-bit arithmetic. Where it has none, torch multiplies bfloat16 one row at a time, and such a product goes
through a float32 copy of the weight that lives for one product. `bench products` measures all of these.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2app.kernels.build import WIDTH

# Up to how many rows each kernel is the fastest that there is (`bench products`). The first reads weights as fast as
# the memory gives them; the second needs a CPU that multiplies bfloat16 itself and computes faster.
FEW_ROWS = 12
FEW_ROWS_BESIDE_DOT = 3
DOT_ROWS = 64
_DOT_WIDTH = 32


class PackedVectors(NamedTuple):
    """Singular vectors in 8 bits, since an edit costs what reading them costs.

    Attributes:
        integers: (rank, narrow) int8, a vector a row; of every 16 entries those with even places come first.
        scales: (rank,) float32; a vector is scale · integers.
    """

    integers: Tensor
    scales: Tensor


def pack_vectors(vectors: Tensor) -> PackedVectors | None:
    """Round singular vectors (rank, narrow), one a row, to 8 bits; None where the kernel takes no such length.

    It moves an entry by 0.4 % of the vector's largest at most; `bench edit` measures what that does to an answer.
    """
    rank, narrow = vectors.shape
    if narrow % WIDTH:
        return None
    scales = vectors.float().abs().amax(1) / torch.iinfo(torch.int8).max
    integers = (vectors.float() / scales[:, None]).round().to(torch.int8)
    even_first = integers.view(rank, -1, WIDTH // 2, 2).transpose(2, 3).reshape(rank, narrow)
    return PackedVectors(even_first.contiguous(), scales)


class FastLinear(nn.Linear):
    """A linear layer that multiplies by `fast_linear`; it shares its weight and bias with the layer it stands for."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return fast_linear(x, self.weight, self.bias)

    def adapted(
        self, vectors: Tensor, packed: "PackedVectors", edits_input: bool, count: int, rows: slice, delta: Tensor
    ) -> Callable[[Tensor], Tensor] | None:
        """What gives W'x + bias for some rows of a batch and Wx + bias for the others, from x (rows, 1, in_features).

        It has no gradient. What can be decided before a step is decided here: a step calls it in every layer.

        Args:
            vectors: of the narrow side, which is the input or the output: (rank, narrow), a singular vector a row.
            packed: the same.
            count: rows of the batch; there is no kernel for many of them, and None is returned.
            rows: those that are adapted.
            delta: z − 1 (1 or adapted rows, rank) in float32.
        """
        weight, bias = self.weight, self.bias
        first, adapted = rows.start, rows.stop - rows.start
        kernel = _kernel_for(count, self.in_features, vectors.shape[1])
        if kernel == "few":
            op, (integers, scales) = torch.ops.t2app.few_rows_adapted.default, packed
            return lambda x: op(x, weight, bias, integers, scales, edits_input, delta, first, adapted)
        if kernel == "dot":
            op = torch.ops.t2app.dot_adapted.default
            return lambda x: op(x, weight, bias, vectors, edits_input, delta, first, adapted)
        return None


def use_fast_linears(model: nn.Module) -> None:
    """Let the linear layers of a bfloat16 model on the CPU multiply by `fast_linear`.

    Layers that are no plain ones, as those of 4-bit, and layers that accelerate offloads stay as they are.
    """
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not hasattr(layer, "_hf_hook"):
            model.set_submodule(path, FastLinear(layer))


@cache
def has_bfloat16_arithmetic() -> bool:
    """Whether the CPU multiplies bfloat16 itself; torch then does so well for many rows."""
    return torch.cpu._is_avx512_bf16_supported()


@cache
def _kernel_for(rows: int, *lengths: int) -> str | None:
    """Which kernel is for so many rows, "few" or "dot", or None; the lengths are those of the rows that it reads."""
    if any(length % WIDTH for length in lengths):
        return None
    dot = has_bfloat16_arithmetic() and not any(length % _DOT_WIDTH for length in lengths)
    if rows <= (FEW_ROWS_BESIDE_DOT if dot else FEW_ROWS):
        return "few"
    return "dot" if dot and rows <= DOT_ROWS else None


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` for x (…, in_features), weight (out_features, in_features) and bias (out_features,), all bfloat16."""
    if needs_gradient(x, weight):
        return F.linear(x, weight, bias)
    kernel = _kernel_for(x.numel() // x.shape[-1], x.shape[-1])
    if kernel == "few":
        return torch.ops.t2app.few_rows_linear.default(x, weight, bias)
    if kernel == "dot":
        return torch.ops.t2app.dot_linear.default(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if has_bfloat16_arithmetic():
        y = F.linear(rows, weight, bias)
    else:
        y = F.linear(rows.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return y.view(*x.shape[:-1], -1)


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether somebody will ask for a gradient, which the kernels have none of."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
