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

    # The tensors with room, of which so many tokens were seen; None where what was seen stands in no room.
    _room: tuple[Tensor, Tensor] | None = None
    _length = 0
    # Keys and values as they were last asked for: a step of a decoder in one call makes none of these views.
    _seen: tuple[Tensor | None, Tensor | None] = (None, None)

    @property
    def keys(self) -> Tensor | None:
        return self._views()[0]

    @keys.setter
    def keys(self, keys: Tensor | None) -> None:
        self._put(keys, self.values)

    @property
    def values(self) -> Tensor | None:
        return self._views()[1]

    @values.setter
    def values(self, values: Tensor | None) -> None:
        self._put(self.keys, values)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self._room is None else self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Add the tokens of `key_states` and `value_states`; returns the keys and values of all tokens."""
        if _recorded(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.begin(key_states, value_states)
        tokens = key_states.shape[-2]
        self.extend(tokens)
        self.keys[..., -tokens:, :] = key_states
        self.values[..., -tokens:, :] = value_states
        return self._views()

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Have seen no token yet, of such keys and values (rows, heads, any number of tokens, head size)."""
        self.lazy_initialization(keys, values)
        self._put(keys[..., :0, :], values[..., :0, :])

    def hold(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Have seen the first `length` tokens of these; what is behind them is room that nobody else writes to."""
        self._room, self._length, self._seen = (keys, values), length, (None, None)

    def leave_room(self) -> None:
        """Leave the room behind what was seen to others, and have the next tokens in tensors of its own."""
        self._put(*self._views())

    def extend(self, tokens: int) -> tuple[Tensor, Tensor]:
        """See so many more tokens, which are the caller's to write; gives keys and values with the room behind them."""
        length = self.get_seq_length() + tokens
        if self._room is not None and length <= self._room[0].shape[-2]:
            self.hold(*self._room, length)
        else:
            self._copy(length, room_for(length))
        return self._room

    def advance(self) -> None:
        """See a token more of the room that is there, which is the caller's to write."""
        self._length += 1
        self._seen = (None, None)

    @property
    def room(self) -> int:
        """For how many tokens more there is room."""
        return 0 if self._room is None else self._room[0].shape[-2] - self._length

    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens in all."""
        length = self.get_seq_length()
        if self.room < tokens - length:
            self._copy(length, tokens - length)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, as tensors of their own."""
        if self.get_seq_length() == 0 or _recorded(self.keys, self.values):
            super().batch_select_indices(indices)
            return
        length = self.get_seq_length()
        self._copy(length, room_for(length), indices)

    def _copy(self, length: int, more: int, rows: Tensor | None = None) -> None:
        """Have seen `length` tokens of all rows or of these, in tensors of its own with room for so many more."""
        self.hold(*(_with_room(seen, length, more, rows) for seen in self._views()), length)

    def _views(self) -> tuple[Tensor | None, Tensor | None]:
        if self._room is not None and self._seen[0] is None:
            keys, values = self._room
            self._seen = keys.narrow(-2, 0, self._length), values.narrow(-2, 0, self._length)
        return self._seen

    def _put(self, keys: Tensor | None, values: Tensor | None) -> None:
        """What transformers does with a layer, such as forgetting tokens, leaves it without room."""
        self._room, self._seen = None, (keys, values)


def room_for(length: int) -> int:
    """For how many more tokens there is room where so many were seen."""
    return max(_LEAST_ROOM, int(length * _ROOM_SHARE))


def _with_room(tokens: Tensor, length: int, more: int, rows: Tensor | None = None) -> Tensor:
    """A copy of all rows of `tokens` or of these, with room for `length` tokens and so many more."""
    count = len(tokens) if rows is None else len(rows)
    room = tokens.new_empty(count, *tokens.shape[1:-2], length + more, tokens.shape[-1])
    seen = room[..., : tokens.shape[-2], :]
    if rows is None:
        seen.copy_(tokens)
    else:
        torch.index_select(tokens, 0, rows.to(tokens.device), out=seen)
    return room


def _recorded(keys: Tensor, values: Tensor) -> bool:
    """Whether autograd keeps these, so that nothing may be written into them."""
    return torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
