"""What the rows of a batch have seen, and a pass that goes on from it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from t2app.decoding.sampling import NextLogits
from t2app.key_values import GrowingLayer, room_for
from t2app.spectral import SpectralModel, execution_device

# Of torch's ways to attend on a GPU all but cuDNN's, which is planned anew for each number of tokens: that takes
# several times what the rest of a step does.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Context:
    """What the rows of a batch have seen.

    Attributes:
        cache: keys and values of it.
        mask: (rows, tokens), 1 where there is a token; None where nothing is padded.
    """

    cache: Cache
    mask: Tensor | None

    def copy(self) -> "Context":
        """The same for somebody else, who may go on from it in another way."""
        cache = copied(self.cache)
        for layer in cache.layers:
            if isinstance(layer, GrowingLayer):
                layer.leave_room()
        return Context(cache, self.mask)

    def repeat(self, samples: int) -> None:
        """Every row `samples` times, one beside the other."""
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
            self.mask = None if self.mask is None else self.mask.repeat_interleave(samples, 0)

    def extend(self, tokens: int) -> None:
        """So many tokens more of every row are going to be seen."""
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, tokens), value=1)

    def select(self, kept: Sequence[int]) -> None:
        """Keep these rows, and no padding that all of them share."""
        index = torch.tensor(kept)  # on the CPU: the blocks' caches may lie on several devices
        if self.mask is not None:
            self.mask = self.mask[index]
            if padding := int(self.mask.any(0).int().argmax()):
                self.mask = self.mask[:, padding:]
                _trim(self.cache, padding)
            if bool(self.mask.all()):
                self.mask = None
        self.cache.batch_select_indices(index)

    def joined(self, other: "Context", order: Sequence[int], device: torch.device) -> "Context":
        """These rows and the other's after them, in this order then; those that have seen less are padded on the left.

        The tensors are new ones: where memory for them is lacking, both are left as they were.
        """
        cache = copied(self.cache)
        runs = _runs(order, len(self.cache.layers[0].keys))
        for layer, others in zip(cache.layers, other.cache.layers, strict=True):
            length = max(layer.keys.shape[2], others.keys.shape[2])
            grows = isinstance(layer, GrowingLayer)
            room = room_for(length) if grows else 0
            keys = _stacked(layer.keys, others.keys, runs, dim=2, room=room)
            values = _stacked(layer.values, others.values, runs, dim=2, room=room)
            if grows:
                layer.hold(keys, values, length)
            else:
                layer.keys, layer.values = keys, values
            if layer.is_sliding:
                layer.cumulative_length = max(layer.get_seq_length(), others.get_seq_length())
        if self.mask is None and other.mask is None and self._tokens == other._tokens:
            return Context(cache, None)
        return Context(cache, _stacked(self.whole_mask(device), other.whole_mask(device), runs, dim=1))

    @property
    def _tokens(self) -> int:
        return self.cache.get_seq_length()

    def whole_mask(self, device: torch.device) -> Tensor:
        """The mask, of ones where nothing is padded."""
        if self.mask is not None:
            return self.mask
        return torch.ones(len(self.cache.layers[0].keys), self._tokens, dtype=torch.long, device=device)


def copied(cache: Cache) -> Cache:
    """A cache of the same tensors, whose layers can be given others."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


class _Run(NamedTuple):
    """Rows of one of two batches that stay beside each other where the two are put together."""

    of_second: bool
    rows: slice
    places: slice


def _runs(order: Sequence[int], rows_of_first: int) -> list[_Run]:
    """Where the rows of two batches go, those of the second counted on from the first's: row order[i] to place i."""
    starts = [
        place
        for place, row in enumerate(order)
        if place == 0 or row != order[place - 1] + 1 or row == rows_of_first  # the next batch is another tensor
    ]
    runs = []
    for start, end in pairwise([*starts, len(order)]):
        of_second = order[start] >= rows_of_first
        first = order[start] - (rows_of_first if of_second else 0)
        runs.append(_Run(of_second, slice(first, first + end - start), slice(start, end)))
    return runs


def _stacked(first: Tensor, second: Tensor, runs: Sequence[_Run], dim: int, room: int = 0) -> Tensor:
    """The rows of both by these runs, the shorter one's padded with zeros before what they have in `dim`, and so much
    room behind it.
    """
    length = max(first.shape[dim], second.shape[dim])
    stacked = first.new_empty(runs[-1].places.stop, *first.shape[1:dim], length + room, *first.shape[dim + 1 :])
    # By runs, since torch takes several times as long to write by an index.
    for run in runs:
        rows, places = (second if run.of_second else first)[run.rows], stacked[run.places]
        padding = length - rows.shape[dim]
        places.narrow(dim, 0, padding).zero_()
        places.narrow(dim, padding, rows.shape[dim]).copy_(rows)
    return stacked


def _trim(cache: Cache, tokens: int) -> None:
    """Forget the first tokens of all rows."""
    for layer in cache.layers:
        seen = layer.get_seq_length() - tokens
        if layer.is_sliding:
            layer.cumulative_length = seen
        # A sliding window may hold fewer than were seen.
        first = max(layer.keys.shape[2] - seen, 0)
        layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]


def forward(
    adapted: SpectralModel,
    ids: Tensor,
    context: Context,
    places: Tensor | None = None,
    logits_to_keep: int = 1,
    **others,
) -> Tensor:
    """Logits of the last tokens, or of all for 0; the context's cache takes the tokens in.

    Args:
        ids: (rows, new tokens); a mask of the context is of these too.
        places: their positions, of the same shape; None counts the tokens.
        others: what else the model takes.
    """
    arguments = {"input_ids": ids, "cache": context.cache, "use_cache": True, "logits_to_keep": logits_to_keep}
    if context.mask is not None:
        arguments["attention_mask"] = context.mask
        if places is None:
            places = positions(context.mask)[:, -ids.shape[1] :]
    if places is not None:
        arguments["position_ids"] = places
    arguments |= others
    with sdpa_kernel(_ATTENTION):
        return adapted.model(**arguments).logits


def plain_step(adapted: SpectralModel, ids: Sequence[int], places: Sequence[int], context: Context) -> NextLogits:
    """What follows a token of each row at its place, which the context takes in, by a pass of the model."""
    context.extend(1)
    ids, places = (torch.tensor(of_rows, device=device_of(adapted))[:, None] for of_rows in (ids, places))
    return NextLogits(forward(adapted, ids, context, places)[:, -1])


def positions(mask: Tensor) -> Tensor:
    """Position of every token of a left-padded batch (rows, tokens): padding does not count."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def device_of(adapted: SpectralModel) -> torch.device:
    """Where token ids go."""
    return execution_device(adapted.model.get_input_embeddings())
