"""What prompts begin with alike, computed once for all of one mixture.

Chat templates begin all of a model's prompts in the same way; the parts of a long prompt are each the beginning of the
next; and samples of one prompt begin with all of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from t2app.decoding.context import Context, copied, device_of, forward
from t2app.key_values import GrowingCache
from t2app.parts import Parts
from t2app.spectral import Deltas, SpectralModel

# Fewer tokens of a beginning are not worth keeping, and neither are more mixtures.
_LEAST_KEPT_TOKENS = 8
_MOST_KEPT_MIXTURES = 16
# Tokens of a prompt, of all its rows together, that are run at a time, by where they are run. A CPU takes a third of a
# second for so many of a 135M model, and is no faster with more (`bench products`).
_PART_TOKENS = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class Prefix:
    """What prompts begin with, computed once for every mixture that they are answered with.

    Attributes:
        length: in tokens.
        mixtures: one for every row of `cache`.
    """

    length: int
    mixtures: Sequence[Deltas | None]
    cache: GrowingCache

    def cache_for(self, mixtures: Sequence[Deltas | None]) -> GrowingCache:
        """A cache of its own with a row for each of these mixtures, which must be among the prefix's."""
        row_of = {id(mixture): row for row, mixture in enumerate(self.mixtures)}
        rows = copied(self.cache)
        # Selecting makes new tensors, so the prefix's own are never written to.
        rows.batch_select_indices(torch.tensor([row_of[id(mixture)] for mixture in mixtures]))
        return rows

    def joined(self, other: "Prefix") -> "Prefix":
        """The same tokens for the mixtures of both."""
        mixtures = [*self.mixtures, *other.mixtures]
        context = Context(self.cache, None).joined(
            Context(other.cache, None), range(len(mixtures)), torch.device("cpu")
        )
        return Prefix(self.length, mixtures, context.cache)


def compute_prefix(
    adapted: SpectralModel, ids: Sequence[int], mixtures: Sequence[Deltas | None], before: Prefix | None = None
) -> Prefix:
    """Run the tokens that prompts begin with, or go on with after `before`, once for each distinct mixture."""
    mixtures = distinct(mixtures)
    cache = GrowingCache(adapted.model.config) if before is None else before.cache_for(mixtures)
    with adapted.rows(mixtures):
        forward(adapted, torch.tensor([ids] * len(mixtures), device=device_of(adapted)), Context(cache, None))
    return Prefix(len(ids) + (0 if before is None else before.length), mixtures, cache)


def run_in_parts(
    adapted: SpectralModel, ids: Sequence[int], mixtures: Sequence[Deltas | None], prefix: Prefix | None = None
) -> Parts[tuple[Sequence[int], Prefix | None]]:
    """Run all of a prompt but its end, without a gradient.

    Args:
        ids: what the prompt goes on with after `prefix`.

    Returns:
        the ids that are left, no more than a part, and the prefix that they go on from.
    """
    tokens = _PART_TOKENS.get(device_of(adapted).type, max(_PART_TOKENS.values()))
    part = max(tokens // len(distinct(mixtures)), 1)
    while len(ids) > part:
        with torch.inference_mode():
            prefix = compute_prefix(adapted, ids[:part], mixtures, prefix)
        ids = ids[part:]
        yield
    return ids, prefix


class Beginnings:
    """What most prompts of a model begin with, kept as it was computed for the mixtures that were asked for last.

    A prompt then costs what comes after it. The embedded model's chat template begins with some 25 tokens, a third of a
    prompt of two sentences (`bench first-token`).

    Args:
        ids: token ids of the beginning; there may be none.
    """

    def __init__(self, adapted: SpectralModel, ids: Sequence[int]):
        self._adapted, self._ids = adapted, list(ids)
        self._prefix: Prefix | None = None
        self._by_use: list[Deltas | None] = []  # the mixtures of the prefix, the one that was asked for last at the end

    @torch.inference_mode()
    def prefix_of(self, prompt: Sequence[int], mixtures: Sequence[Deltas | None]) -> Prefix | None:
        """The prefix from which `prompt` goes on under any of these mixtures, computed for those that are new.

        Two mixtures are the same if they are one object. None where the prompt begins otherwise, or with nothing worth
        keeping.
        """
        length = len(self._ids)
        if length < _LEAST_KEPT_TOKENS or len(prompt) <= length or list(prompt[:length]) != self._ids:
            return None
        asked = distinct(mixtures)
        if new := [mixture for mixture in asked if not _among(mixture, self._by_use)]:
            computed = compute_prefix(self._adapted, self._ids, new)
            self._prefix = computed if self._prefix is None else self._prefix.joined(computed)
        # Last, for where memory was lacking before: this list and the prefix hold the same mixtures.
        self._by_use = [mixture for mixture in self._by_use if not _among(mixture, asked)] + asked
        if len(self._by_use) > _MOST_KEPT_MIXTURES:
            self._by_use = self._by_use[-max(_MOST_KEPT_MIXTURES, len(asked)) :]
            self._prefix = Prefix(length, self._by_use, self._prefix.cache_for(self._by_use))
        return self._prefix


def _among(mixture: Deltas | None, mixtures: Sequence[Deltas | None]) -> bool:
    return any(mixture is other for other in mixtures)


def distinct(mixtures: Sequence[Deltas | None]) -> list[Deltas | None]:
    """Each mixture once; two are the same if they are one object."""
    return list({id(mixture): mixture for mixture in mixtures}.values())
