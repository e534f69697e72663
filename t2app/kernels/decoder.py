"""All blocks of a decoder of Llama's kind in one call, for a token or a short prompt a row, on a CPU in bfloat16."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from t2app.kernels.attention import attends_fast
from t2app.kernels.build import WIDTH
from t2app.kernels.linear import EditedLayer, FastLinear
from t2app.key_values import GrowingLayer

# transformers writes these out separately and alike: embedding, blocks, norm; of a block norm, attention with rotated
# queries and keys, sum, norm, gated MLP, sum. `tests/test_kernels.py` holds one of each against transformers' own.
_LIKE_LLAMA = ("LlamaModel", "MistralModel", "Qwen2Model")
_ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LAYERS = ("gate_proj", "up_proj", "down_proj")


def use_fast_decoders(model: nn.Module) -> None:
    """Let a decoder whose layers and attention are fast ones run by `FastDecoder` where that can be."""
    for decoder in model.modules():
        if type(decoder).__name__ in _LIKE_LLAMA and _fits(decoder):
            decoder.forward = FastDecoder(decoder)


def _fits(decoder: nn.Module) -> bool:
    return (
        all(isinstance(modules[name], FastLinear) for modules, name in _places(decoder))
        and all(norm.weight.dtype == torch.bfloat16 and norm.weight.numel() % WIDTH == 0 for norm in _norms(decoder))
        and all(attends_fast(block.self_attn) for block in decoder.layers)
        and decoder.layers[0].self_attn.head_dim % (2 * WIDTH) == 0
        and decoder.config.hidden_act == "silu"
        and not any(hasattr(module, "_hf_hook") for module in decoder.modules())
    )


def _places(decoder: nn.Module) -> list[tuple[dict[str, nn.Module], str]]:
    """Where the linear layers are, seven a block: adapting a model, or a LoRA, puts other layers there."""
    return [
        (part._modules, name)
        for block in decoder.layers
        for part, names in ((block.self_attn, _ATTENTION_LAYERS), (block.mlp, _MLP_LAYERS))
        for name in names
    ]


def _norms(decoder: nn.Module) -> list[nn.Module]:
    """Two a block, and the one after the last."""
    of_blocks = [norm for block in decoder.layers for norm in (block.input_layernorm, block.post_attention_layernorm)]
    return [*of_blocks, decoder.norm]


class Decoder:
    """All blocks of a decoder and the norm after them, without a gradient.

    Args:
        layers: seven a block, in the order of `_places`.
        norms: the weights of two a block and of the last one.
        epsilon: of the norms.
        scale: of attention's scores.
    """

    def __init__(self, layers: list[EditedLayer], norms: list[Tensor], epsilon: float, head_size: int, scale: float):
        kept = [layer.kept for layer, _ in layers]
        edits = [None if edit is None else edit.kept for _, edit in layers]
        self.kept = torch.ops.t2app.make_decoder(kept, edits, norms, epsilon, head_size, scale)

    def __call__(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        length: int,
        mask: Tensor | None,
    ) -> Tensor:
        """What the output layer takes, (rows, new tokens, hidden), for embeddings x of that shape.

        Args:
            cos, sin: of the new tokens' positions, (1 or rows, new tokens, head size).
            keys, values: of each block (rows, key heads, room, head size); the new tokens' are written into them.
            length: of how many tokens keys and values are seen, the new ones last.
            mask: true for what a token attends to, (1 or rows, 1, new tokens, length); None where it attends to itself
                and all before it.
        """
        if mask is not None and x.shape[1] > 1:
            # As torch's attention adds it, which would make that of one of bools itself, in every block.
            mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill_(~mask, -torch.inf)
        return torch.ops.t2app.decode(self.kept, x, cos, sin, keys, values, length, mask)


class FastDecoder:
    """A decoder's `forward`: the kernel where all layers have one for so many tokens, and transformers' own else.

    There is none with a gradient, without a cache to fill, nor in a sliding window.
    """

    def __init__(self, decoder: nn.Module):
        self._decoder, self._own = decoder, decoder.forward
        self._places = _places(decoder)
        norms, attention = _norms(decoder), decoder.layers[0].self_attn
        self._weights_of_norms = [norm.weight for norm in norms]
        self._settings = (norms[0].variance_epsilon, attention.head_dim, attention.scaling)
        self._in_use: list[object] = []
        self._made_for: tuple | None = None
        self._key_heads = attention.k_proj.out_features // attention.head_dim
        self._kernel: Decoder | None = None

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others,
    ) -> BaseModelOutputWithPast:
        new = inputs_embeds if input_ids is None else input_ids  # (rows, tokens) or (rows, tokens, hidden)
        plain = use_cache and not others and (attention_mask is None or attention_mask.dim() == 2)
        if plain and not torch.is_grad_enabled() and grows(cache):
            kernel = self.kernel_for(*new.shape[:2])
            if kernel is not None:
                x = self._decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
                return BaseModelOutputWithPast(self._run(kernel, x, attention_mask, position_ids, cache), cache)
        return self._own(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **others,
        )

    def _run(self, kernel: Decoder, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: Cache) -> Tensor:
        """The output (rows, tokens, hidden) for embeddings of that shape; the cache takes the tokens in."""
        rows, tokens, _ = x.shape
        if positions is None:
            positions = cache.get_seq_length() + torch.arange(tokens)[None]
        cos, sin = self.angles(positions)
        if tokens > 1:
            mask = create_causal_mask(self._decoder.config, x, mask, cache, positions)
        elif mask is not None:
            mask = mask[:, None, None, :].bool()
        none = x.new_empty(rows, self._key_heads, 0, cos.shape[-1])
        for layer in cache.layers:
            if not layer.is_initialized:
                layer.begin(none, none)
        keys, values = zip(*(layer.extend(tokens) for layer in cache.layers), strict=True)
        return kernel(x, cos, sin, keys, values, cache.get_seq_length(), mask)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of positions (1 or rows, tokens), (1 or rows, tokens, head size)."""
        return self._decoder.rotary_emb(self._weights_of_norms[0], positions)

    def kernel_for(self, rows: int, tokens: int) -> Decoder | None:
        """The kernel of the layers and the plan in use, made anew only where those are others than last time.

        None where they have none.
        """
        layers = [modules[name] for modules, name in self._places]
        if self._made_for != (layers, rows, tokens, *self._plans()):
            # Where the layers look their plan up, each place once.
            places = (getattr(layer, "in_use", None) for layer in layers)
            self._in_use = list({id(place): place for place in places if place is not None}.values())
            self._made_for = (layers, rows, tokens, *self._plans())
            self._kernel = self._made(layers, rows, tokens)
        return self._kernel

    def _plans(self) -> list[object]:
        return [place.plan for place in self._in_use]

    def _made(self, layers: list[nn.Module], rows: int, tokens: int) -> Decoder | None:
        if not all(hasattr(layer, "edited_layer") for layer in layers):
            return None
        kernels = [layer.edited_layer(rows, tokens) for layer in layers]
        if any(kernel is None for kernel in kernels):
            return None
        return Decoder(kernels, self._weights_of_norms, *self._settings)


def grows(cache: Cache | None) -> bool:
    """Whether there is room for more tokens in every block."""
    return cache is not None and bool(cache.layers) and all(isinstance(layer, GrowingLayer) for layer in cache.layers)
