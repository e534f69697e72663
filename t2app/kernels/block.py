"""Decoder blocks of Llama's kind in one call where each row has one new token, on a CPU in bfloat16."""

from operator import is_not

import torch
from torch import ScriptObject, Tensor, nn
from transformers import Cache

from t2app.kernels.attention import attends_fast
from t2app.kernels.build import WIDTH
from t2app.kernels.linear import FastLinear
from t2app.key_values import GrowingLayer

# transformers writes these out separately and alike: norm, attention with rotated queries and keys, sum, norm, gated
# MLP, sum. `tests/test_kernels.py` holds a block of each against transformers' own.
_LIKE_LLAMA = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")
_ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


def use_fast_blocks(model: nn.Module) -> None:
    """Let the blocks of a model whose layers and attention are fast ones run by `FastBlock` where that can be."""
    for block in model.modules():
        if type(block).__name__ in _LIKE_LLAMA and _fits(block):
            block.forward = FastBlock(block)


def _fits(block: nn.Module) -> bool:
    attention, mlp = block.self_attn, block.mlp
    layers = [getattr(attention, name) for name in _ATTENTION_LAYERS] + [getattr(mlp, name) for name in _MLP_LAYERS]
    norms = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
    return (
        attends_fast(attention)
        and all(isinstance(layer, FastLinear) for layer in layers)
        and all(norm.dtype == torch.bfloat16 and norm.numel() % WIDTH == 0 for norm in norms)
        and attention.head_dim % (2 * WIDTH) == 0
        and attention.config.hidden_act == "silu"
        and not any(hasattr(module, "_hf_hook") for module in block.modules())
    )


class FastBlock:
    """A block's `forward`: a call of the kernel for one token a row without a gradient, and transformers' own else."""

    def __init__(self, block: nn.Module):
        self._own = block.forward
        attention, mlp = block.self_attn, block.mlp
        # Adapting a model, or a LoRA, puts other layers in these places.
        self._places = [(attention._modules, name) for name in _ATTENTION_LAYERS]
        self._places += [(mlp._modules, name) for name in _MLP_LAYERS]
        norms = (block.input_layernorm, block.post_attention_layernorm)
        self._norms = [norm.weight for norm in norms]
        self._settings = (norms[0].variance_epsilon, attention.head_dim, attention.scaling)
        self._index = attention.layer_idx
        self._count, self._used = 0, []
        self._kernel: ScriptObject | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others,
    ) -> Tensor:
        rows, tokens, _ = hidden_states.shape
        seen = None if cache is None else cache.layers[self._index]
        kept = isinstance(seen, GrowingLayer) and seen.is_initialized
        plain_mask = attention_mask is None or attention_mask.dtype == torch.bool
        if tokens == 1 and kept and plain_mask and not torch.is_grad_enabled():
            kernel = self._kernel_for(rows)
            if kernel is not None:
                return kernel.forward(hidden_states, *position_embeddings, *seen.extend(1), attention_mask)
        return self._own(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **others,
        )

    def _kernel_for(self, count: int) -> ScriptObject | None:
        """The kernel of the layers and the plan in use, made anew only where those are others than last time."""
        layers = [modules[name] for modules, name in self._places]
        used = [*layers, *(getattr(layer, "rows", None) for layer in layers)]
        # By identity: the plans of two layers cannot be compared.
        if count != self._count or any(map(is_not, used, self._used)):
            self._count, self._used, self._kernel = count, used, self._made(layers, count)
        return self._kernel

    def _made(self, layers: list[nn.Module], count: int) -> ScriptObject | None:
        if not all(hasattr(layer, "kernel_of_plan") for layer in layers):
            return None
        kernels = [layer.kernel_of_plan(count) for layer in layers]
        if any(kernel is None for kernel in kernels):
            return None
        return torch.classes.t2app.Block(kernels, self._norms, *self._settings)
