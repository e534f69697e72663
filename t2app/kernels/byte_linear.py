"""Linear layers in bfloat16 whose weights are held in 8 bits: a step of decoding reads half as much.

bitsandbytes has such layers too (LLM.int8, arXiv 2208.07339), which round what is multiplied by a weight to 8 bits as
well. Here it keeps 16, so that nothing but the weights is less exact than it was.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from t2app.kernels.build import has_tiles
from t2app.kernels.linear import FastLinear, Kind, Layer

# Numbers of a row with a scale in common, as in the GGUF format's Q8_0; csrc/byte_weight.h has the same.
SCALED_TOGETHER = 32
# Up to how many rows bytes are multiplied as they are; for more they are widened to bfloat16 (`bench products`).
_FEW_ROWS, _FEW_ROWS_BESIDE_TILES = 32, 4


class PackedWeight(NamedTuple):
    """A weight in 9 bits a number.

    Attributes:
        integers: (out_features, in_features) int8.
        scales: (out_features, in_features / 32) float32; a number is its scale · its integer.
    """

    integers: Tensor
    scales: Tensor


def pack_weight(weight: Tensor) -> PackedWeight:
    """Round a weight (out_features, in_features), whose rows divide by 32, to 8 bits.

    It moves a number by 0.4 % of the largest of its 32 at most; `bench edit` measures what that does to an answer.
    """
    together = weight.float().unflatten(1, (-1, SCALED_TOGETHER))
    scales = together.abs().amax(2) / torch.iinfo(torch.int8).max
    # Numbers that are all zeros have a scale of 0.
    integers = (together / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None]).round().to(torch.int8)
    return PackedWeight(integers.flatten(1), scales)


def unpack_weight(packed: PackedWeight) -> Tensor:
    """The weight (out_features, in_features) in bfloat16, by a kernel."""
    return torch.ops.t2app.unpack_weight(*packed)


class ByteLinear(FastLinear):
    """A `FastLinear` whose weight is held in 8 bits; it takes the kernels."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        packed = pack_weight(layer.weight)
        self.weight = nn.Parameter(packed.integers, requires_grad=False)
        self.scales = nn.Parameter(packed.scales, requires_grad=False)

    @property
    def whole_weight(self) -> Tensor:
        return unpack_weight(PackedWeight(self.weight, self.scales))

    def kernel_for(self, tokens: int) -> Layer | None:
        return self.kernel(Kind.FEW) if multiplies_bytes(tokens) else super().kernel_for(tokens)


def multiplies_bytes(tokens: int) -> bool:
    """Whether so many tokens of all rows together are multiplied by bytes as they are, and not by bfloat16."""
    return tokens <= (_FEW_ROWS_BESIDE_TILES if has_tiles() else _FEW_ROWS)


def hold_in_bytes(model: nn.Module) -> None:
    """Let the `FastLinear` layers of a model hold their weights in 8 bits, all whose rows divide by 32."""
    for path, layer in list(model.named_modules()):
        if type(layer) is FastLinear and not layer.in_features % SCALED_TOGETHER:
            model.set_submodule(path, ByteLinear(layer))
