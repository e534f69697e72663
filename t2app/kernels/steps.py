"""Decoding steps of a model of Llama's kind as one call each, for as long as rows and plan stay the same.

By transformers' own `forward` a tenth of a step of a 135M model is Python, which looks up every layer, prepares
positions and mask, and wraps what it gives twice. Here that is done once for many steps.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from t2app.kernels.decoder import FastDecoder, grows
from t2app.kernels.linear import FastLinear
from t2app.key_values import room_for

# Whose logits are what the output layer makes of the decoder's vectors, and nothing else.
_PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
# Where a position's angles do not depend on how many positions there are.
_FIXED_ANGLES = ("default", "linear", "llama3", "yarn")


class KernelSteps:
    """Steps of the rows of a cache, whose layers keep the same room meanwhile.

    Attributes:
        room: how many tokens the cache may have after a step.
    """

    def __init__(self, kept: Tensor, room: int):
        self._kept, self.room = kept, room

    @classmethod
    def of(cls, model: nn.Module, cache: Cache, positions: Sequence[int], mask: Tensor | None) -> Self | None:
        """The steps of a model by the plan that is in use; None where there is no kernel for them.

        Args:
            cache: what the rows have seen; it has room for a token more afterwards.
            positions: of each row's next token.
            mask: 1 for what a row attends to of what it has seen, (rows, tokens); None where that is all.
        """
        if not (calls_kernels(model) and grows(cache)):
            return None
        decoder, head = model.get_decoder().forward, model.get_output_embeddings()
        blocks, last = decoder.kernel_for(len(positions), 1), head.kernel_for(len(positions))
        if blocks is None or last is None:
            return None
        seen = cache.get_seq_length()
        for layer in cache.layers:
            if layer.room == 0:
                layer.reserve(seen + room_for(seen))
        keys, values = zip(*(layer.extend(0) for layer in cache.layers), strict=True)
        room = min(tensor.shape[-2] for tensor in keys)
        cos, sin = decoder.angles(torch.tensor(positions)[:, None] + torch.arange(room - seen))
        if mask is not None:
            mask = F.pad(mask.bool(), (0, room - seen), value=True)
        embedding = model.get_input_embeddings().weight
        return cls(
            torch.ops.t2app.make_steps(blocks.kept, last.kept, embedding, cos, sin, keys, values, seen, mask), room
        )

    def __call__(self, ids: Sequence[int], length: int) -> tuple[Tensor, list[int]]:
        """The logits (rows, vocabulary) after a token of each row, which are the cache's last ones then; and the
        likeliest token of each.

        Args:
            length: tokens of the cache with the new one of each row.
        """
        logits, likeliest = torch.ops.t2app.step(self._kept, ids, length)
        return logits, likeliest.tolist()


def calls_kernels(model: nn.Module) -> bool:
    """Whether steps of a model can be calls of the kernels, as long as there is one for its layers and rows."""
    return (
        type(model).__name__ in _PLAIN
        and isinstance(model.get_decoder().forward, FastDecoder)
        and model.get_decoder().rotary_emb.rope_type in _FIXED_ANGLES
        and isinstance(model.get_output_embeddings(), FastLinear)
    )
