"""Running prompts, before what follows them is decoded or scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor

from t2app.decoding.context import Context, device_of, forward
from t2app.decoding.prefix import Prefix, compute_prefix, distinct
from t2app.key_values import GrowingCache
from t2app.models.vision import PictureInputs, picture_arguments, take_position_shift
from t2app.spectral import Deltas, SpectralModel

# Tokens × rows from which it pays to compute what prompts begin with alike in a pass of its own.
_LEAST_SAVING = 64


@dataclass(frozen=True)
class Prefilled:
    """Prompts that were run, a row each: what follows them can be decoded, or be given and scored.

    Attributes:
        mixtures: z − 1 of every row, None for the base model.
        positions: of each row's next token.
        logits: of that token, (rows, 1, vocabulary), and of as many before it as `prefill` was asked for.
        context: what the rows have seen, which changes as they go on.
    """

    adapted: SpectralModel
    mixtures: Sequence[Deltas | None]
    positions: Sequence[int]
    logits: Tensor
    context: Context

    def copy(self) -> "Prefilled":
        """The same once more, to go on in another way."""
        return replace(self, context=self.context.copy())


def prefill(
    adapted: SpectralModel,
    prompts: Sequence[Sequence[int]],
    mixtures: Sequence[Deltas | None],
    prefix: Prefix | None = None,
    logits_to_keep: int = 1,
) -> Prefilled:
    """Run prompts, each under its own mixture; with gradient to `mixtures`.

    Args:
        prompts: token ids; rows of different lengths are padded on the left.
        mixtures: z − 1 of every prompt, None for the base model.
        prefix: what the prompts go on from; None finds what they begin with alike.
        logits_to_keep: of how many of the last tokens there are to be logits, where only one prompt is run.
    """
    before = 0 if prefix is None else prefix.length
    positions = [before + len(prompt) for prompt in prompts]
    if prefix is None:
        # Each prompt keeps a token of its own, for the logits.
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        alike = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        rows_saved = len(mixtures) - len(distinct(mixtures))
        if alike * rows_saved >= _LEAST_SAVING:
            prefix = compute_prefix(adapted, prompts[0][:alike], mixtures)
            prompts = [prompt[alike:] for prompt in prompts]
    cache = GrowingCache(adapted.model.config) if prefix is None else prefix.cache_for(mixtures)
    ids, mask = pad_left(prompts, device_of(adapted))
    if mask is not None and prefix is not None:
        mask = torch.cat([mask.new_ones(len(prompts), prefix.length), mask], dim=1)
    context = Context(cache, mask)
    with adapted.rows(mixtures):
        logits = forward(adapted, ids, context, logits_to_keep=logits_to_keep)
    return Prefilled(adapted, mixtures, positions, logits, context)


def prefill_picture(
    adapted: SpectralModel, prompt: Sequence[int], mixtures: Sequence[Deltas | None], picture: PictureInputs
) -> Prefilled:
    """Run a prompt and its picture, a row for each mixture."""
    context = Context(GrowingCache(adapted.model.config), None)
    seen = picture_arguments(adapted.model, picture, len(mixtures))
    try:
        with adapted.rows(mixtures):
            ids = torch.tensor([list(prompt)] * len(mixtures), device=device_of(adapted))
            logits = forward(adapted, ids, context, **seen)
    finally:
        # A picture's tokens may share positions.
        shift = take_position_shift(adapted.model)
    return Prefilled(adapted, mixtures, [shift + len(prompt)] * len(mixtures), logits, context)


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids (rows, longest) and their attention mask of the same shape, or None where nothing was padded."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), None if bool(mask.all()) else mask.to(device)
