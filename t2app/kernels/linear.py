"""Linear layers in bfloat16 on a CPU.

Decoding multiplies one or two rows by every weight of the model: a kernel for few rows reads weights as fast as memory
gives them. Another one is for more rows, up to the tokens of a prompt, and a third one where the CPU multiplies tiles
(AMX); for more torch is right, and for all where there are no kernels. Where the CPU does not multiply bfloat16 itself,
the second one rounds to integers of 16 bits, and torch takes one row at a time, so that its product of many goes by a
float32 copy of the weight that lives for one product. `bench products` measures all of these.
"""

from enum import IntEnum
from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from t2app.kernels.build import WIDTH, has_bfloat16_arithmetic, has_kernels, has_tiles
from t2app.kernels.edits import RowEdit


class Kind(IntEnum):
    """How a layer multiplies: for few rows, for many, or for many by tiles. csrc/layer.h has the same."""

    FEW = 0
    MANY = 1
    TILES = 2


# Up to how many rows the first kernel is the fastest that there is, where bfloat16 is not multiplied as it is; where it
# is, the second one reads a single row as fast, and rounds it as it does in company. Up to how many the second one is
# beside tiles. And up to how many the kernels are. All by `bench products`.
_FEW_ROWS = 4
_MANY_ROWS_BESIDE_TILES = 2
MANY_ROWS = 256
# Up to how many rows torch multiplies faster one at a time than by a copy of the weight.
_ROWS_IN_TURN = 8
# What rows divide by where bfloat16 is multiplied as it is.
_BFLOAT16_WIDTH = 2 * WIDTH


class Layer:
    """A linear layer in bfloat16 that multiplies by one of the kernels, without a gradient.

    Args:
        weight: (out_features, in_features) in bfloat16, or the integers of a `PackedWeight`.
        scales: those of a `PackedWeight`.
        kind: by which of them; `TILES` takes a CPU that has them, and rows that divide by 32.

    Raises:
        RuntimeError: there is no such kernel for this weight.
    """

    def __init__(self, weight: Tensor, scales: Tensor | None, bias: Tensor | None, kind: Kind):
        self.kept = torch.ops.t2app.make_layer(weight, scales, bias, kind)

    def __call__(self, x: Tensor, edit: RowEdit | None = None) -> Tensor:
        """Wx + bias for x (…, in_features), and with an edit, where x is (rows, tokens, in_features), W'x + bias for
        the edited rows.
        """
        return torch.ops.t2app.multiply(self.kept, x, None if edit is None else edit.kept)


class EditedLayer(NamedTuple):
    """A layer as a plan has it; `edit` is None where no row is edited."""

    layer: Layer
    edit: RowEdit | None


def edits_fast(tokens: int) -> bool:
    """Whether a `RowEdit` is faster than torch's products for so many tokens of all rows together."""
    return tokens <= MANY_ROWS


class FastLinear(nn.Linear):
    """A linear layer that multiplies by the kernels, where there are any, or by what of torch is the fastest.

    It shares its weight and bias with the layer it stands for.
    """

    in_use = None  # where a plan would be looked up, which a `SpectralLinear` does

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_parameter("scales", None)  # of a weight in 8 bits, see `ByteLinear`
        self.by_kernels = has_kernels()
        self._kernels: dict[Kind, Layer] = {}

    @property
    def whole_weight(self) -> Tensor:
        """The weight (out_features, in_features) in bfloat16."""
        return self.weight

    def with_weight(self, weight: Tensor) -> Self:
        """A layer of its kind with another weight (out_features, in_features), and with its bias."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False), self.bias
        return type(self)(layer)

    def forward(self, x: Tensor) -> Tensor:
        if needs_gradient(x, self.weight):
            return F.linear(x, self.whole_weight, self.bias)
        kernel = self.kernel_for(x.numel() // x.shape[-1])
        if kernel is not None:
            return kernel(x)
        rows = x.reshape(-1, x.shape[-1])
        if has_bfloat16_arithmetic() or len(rows) <= _ROWS_IN_TURN:
            y = F.linear(rows, self.whole_weight, self.bias)
        else:
            bias = None if self.bias is None else self.bias.float()
            y = F.linear(rows.float(), self.whole_weight.float(), bias).to(x.dtype)
        return y.view(*x.shape[:-1], -1)

    def kernel_for(self, tokens: int) -> Layer | None:
        """The fastest kernel for so many tokens of all rows together; None where there is none."""
        kind = _fastest_kernel(tokens, self.in_features) if self.by_kernels else None
        return None if kind is None else self.kernel(kind)

    def edited_layer(self, rows: int, tokens: int) -> EditedLayer | None:
        """What the layer is for so many tokens of each of so many rows; `SpectralLinear` has the same."""
        kernel = self.kernel_for(rows * tokens)
        return None if kernel is None else EditedLayer(kernel, None)

    def kernel(self, kind: Kind) -> Layer:
        """The kernel of a kind."""
        if kind not in self._kernels:
            self._kernels[kind] = Layer(self.weight, self.scales, self.bias, kind)
        return self._kernels[kind]


def runs_by_kernels(model: nn.Module) -> bool:
    """Whether a model does; one of 4 bits does so in its output layer alone."""
    return any(isinstance(layer, FastLinear) and layer.by_kernels for layer in model.modules())


def use_fast_linears(model: nn.Module) -> None:
    """Let the linear layers of a bfloat16 model on the CPU run as `FastLinear`.

    Layers that are no plain ones, as those of 4-bit, and layers that accelerate offloads stay as they are.
    """
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and not hasattr(layer, "_hf_hook"):
            model.set_submodule(path, FastLinear(layer))


@cache
def _fastest_kernel(tokens: int, length: int) -> Kind | None:
    """The kind of the kernel for so many tokens, None where there is none; it reads rows of this length."""
    if length % WIDTH or tokens > MANY_ROWS:
        return None
    as_it_is = has_bfloat16_arithmetic() and not length % _BFLOAT16_WIDTH
    tiles = as_it_is and has_tiles()
    if tokens <= _FEW_ROWS and not as_it_is:
        return Kind.FEW
    if tiles and tokens > _MANY_ROWS_BESIDE_TILES:
        return Kind.TILES
    # What is left to torch where it multiplies bfloat16 too.
    return Kind.MANY if as_it_is or not has_bfloat16_arithmetic() else None


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether somebody will ask for a gradient, which the kernels have none of."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
