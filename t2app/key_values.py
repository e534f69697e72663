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
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]


class GrowingLayer(DynamicLayer):
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
            self.begin(key_states, value_states)
        tokens = key_states.shape[-2]
        keys, values = self.extend(tokens)
        keys[..., -tokens:, :] = key_states
        values[..., -tokens:, :] = value_states
        return keys, values

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Have seen no token yet, of such keys and values (rows, heads, any number of tokens, head size)."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys[..., :0, :], values[..., :0, :]

    def extend(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The keys and values of all tokens and of so many more, which are the caller's to write."""
        length = self.keys.shape[-2] + tokens
        if not self._has_room(length):
            capacity = length + max(_LEAST_ROOM, int(length * _ROOM_SHARE))
            self._room = _with_room(self.keys, capacity), _with_room(self.values, capacity)
        self.keys, self.values = (room.narrow(-2, 0, length) for room in self._room)
        return self.keys, self.values

    def _has_room(self, length: int) -> bool:
        """Whether what was seen stands in the room, which it no more does once rows were chosen, and more fits."""
        if self._room is None:
            return False
        keys = self._room[0]
        same = self.keys.data_ptr() == keys.data_ptr() and self.keys.shape[0] == keys.shape[0]
        return same and length <= keys.shape[-2]


def _with_room(tokens: Tensor, capacity: int) -> Tensor:
    room = tokens.new_empty(*tokens.shape[:-2], capacity, tokens.shape[-1])
    room[..., : tokens.shape[-2], :] = tokens
    return room
