"""The keys and values of the tokens that were run, with room for those to come.

transformers' own cache copies all of them for every token, which for a 135M model is a quarter of a decoding step
(`bench decode`). Its static cache has room for the longest answer from the first token on and attends over all of it.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

# Room for this share of the tokens so far, and for so many tokens at least: growing costs one copy now and then.
_ROOM_SHARE = 0.25
_LEAST_ROOM = 16


class GrowingCache(DynamicCache):
    """transformers' `DynamicCache` of a model, whose layers of full attention write new tokens where there is room."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        # Sliding windows stay short, and other kinds of layers are no keys and values.
        self.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class _GrowingLayer(DynamicLayer):
    """`keys` and `values` (rows, heads, tokens, head size) are the beginning of tensors with room for more tokens."""

    def __init__(self):
        super().__init__()
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add the tokens of `key_states` and `value_states`; returns the keys and values of all tokens."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            # Autograd keeps what it saw: nothing may be written into it.
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        length = seen + key_states.shape[-2]
        if not self._has_room(seen, length):
            self._grow(key_states, value_states, seen, length)
        keys, values = (room.narrow(-2, 0, length) for room in self._room)
        keys[..., seen:, :] = key_states
        values[..., seen:, :] = value_states
        self.keys, self.values = keys, values
        return keys, values

    def _has_room(self, seen: int, length: int) -> bool:
        """Whether what was seen stands in the room, which it no more does once rows were chosen, and more fits."""
        if self._room is None or seen == 0:
            return False
        keys = self._room[0]
        same = self.keys.data_ptr() == keys.data_ptr() and self.keys.shape[0] == keys.shape[0]
        return same and length <= keys.shape[-2]

    def _grow(self, key_states: Tensor, value_states: Tensor, seen: int, length: int) -> None:
        capacity = length + max(_LEAST_ROOM, int(length * _ROOM_SHARE))
        rooms = []
        for new, old in ((key_states, self.keys), (value_states, self.values)):
            room = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
            if seen:
                room[..., :seen, :] = old
            rooms.append(room)
        self._room = tuple(rooms)
