"""Batched decoding in which every row has its own prompt, mixture and random generator, and scoring of given answers.

One forward pass a token serves all rows: base and adapted answers of the page, the samples of a training step, the
problems of an evaluation. A row stops at its end of turn and leaves the batch. What prompts of one mixture begin with
alike, as their chat template makes them, is computed once for all of them. This file knows token ids and mixtures; text
appears only where `TextStream` turns one row's tokens into pieces that can be shown.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from t2app.key_values import GrowingCache
from t2app.messages import Sampling
from t2app.spectral import Deltas, SpectralModel, execution_device
from t2app.vision import PictureInputs, picture_arguments, take_position_shift

# Tokens × rows from which it pays to compute what prompts begin with alike in a pass of its own.
_LEAST_SAVING = 64
# Answers are scored in parts. The tokens of a part bound its memory, since logits are tokens × vocabulary; the ratio of
# its longest row to its shortest bounds the work that is lost to padding.
_PART_TOKENS = 4096
_PART_RATIO = 1.5


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
        rows = copy.copy(self.cache)
        rows.layers = [copy.copy(layer) for layer in self.cache.layers]
        # Selecting makes new tensors, so the prefix's own are never written to.
        rows.batch_select_indices(torch.tensor([row_of[id(mixture)] for mixture in mixtures]))
        return rows


def compute_prefix(adapted: SpectralModel, ids: Sequence[int], mixtures: Sequence[Deltas | None]) -> Prefix:
    """Run the tokens that prompts begin with, once for each distinct mixture."""
    mixtures = _distinct(mixtures)
    cache = GrowingCache(adapted.model.config)
    with adapted.rows(mixtures):
        _forward(adapted, torch.tensor([ids] * len(mixtures), device=_device(adapted)), None, cache)
    return Prefix(len(ids), mixtures, cache)


# As a decorator the mode is entered for each step only, and so never leaks into the code that reads the stream.
@torch.inference_mode()
def decode(
    adapted: SpectralModel,
    prompts: Sequence[Sequence[int]],
    mixtures: Sequence[Deltas | None],
    sampling: Sampling,
    eos_ids: Sequence[int],
    samples: int = 1,
    seeds: Sequence[int] | None = None,
    prefix: Prefix | None = None,
    picture: PictureInputs | None = None,
) -> Iterator[dict[int, int]]:
    """Yield, for every step, the next token id of each row that is still running, by row.

    Each prompt is run once and continued `samples` times: row p·samples + s is sample s of prompt p. Every row draws
    from a generator of its own, so that what it says does not depend on its company. The token that ends a turn is
    yielded too.

    Args:
        prompts: token ids; rows of different lengths are padded on the left.
        mixtures: z − 1 of every prompt, None for the base model.
        seeds: where each prompt's generators start, sample s at seeds[p] + s; None starts all prompts at sampling.seed,
            so that two mixtures of one prompt are compared on the same draws.
        prefix: what the prompts go on from; None finds what they begin with alike.
        picture: what the prompts carry, which then are all the same.

    Raises:
        ValueError: there is no prompt, one is empty, or there are not as many mixtures or seeds as prompts; prompts
            that differ come with one picture, or a picture comes after a prefix.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("decoding needs at least one prompt, and none that is empty")
    if len(mixtures) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(mixtures)} mixtures; one for each was expected")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds; one for each was expected")
    if picture is not None and (prefix is not None or any(prompt != prompts[0] for prompt in prompts)):
        raise ValueError("a picture belongs to one prompt; the same prompt for every row, and no prefix, was expected")
    device = _device(adapted)
    starts = [sampling.seed] * len(prompts) if seeds is None else seeds
    choose = _TokenChooser(sampling, [start + sample for start in starts for sample in range(samples)], device)
    stop = set(eos_ids)
    if picture is None:
        logits, mask, cache = _prefill(adapted, prompts, mixtures, prefix)
        shift = 0
    else:
        mask = None
        logits, cache, shift = _prefill_picture(adapted, prompts[0], mixtures, picture)
    logits = logits[:, -1].repeat_interleave(samples, 0)  # (rows, vocabulary)
    if samples > 1:
        cache.batch_repeat_interleave(samples)
        mask = mask.repeat_interleave(samples, 0) if mask is not None else None
    mixtures = [mixture for mixture in mixtures for _ in range(samples)]
    plan = adapted.plan(mixtures)
    running = list(range(len(mixtures)))
    for step in range(sampling.max_new_tokens):
        tokens = choose(logits, running)
        yield dict(zip(running, tokens, strict=True))
        kept = [i for i, token in enumerate(tokens) if token not in stop]
        if not kept or step + 1 == sampling.max_new_tokens:
            return
        if len(kept) < len(running):
            index = torch.tensor(kept)  # on the CPU: the blocks' caches may lie on several devices
            cache.batch_select_indices(index)
            mask = mask[index] if mask is not None else None
            running = [running[i] for i in kept]
            tokens = [tokens[i] for i in kept]
            plan = adapted.plan([mixtures[row] for row in running])
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
        # The plan is in use only while a step runs: a stream that is left half-read leaves the model clean.
        with adapted.using(plan):
            logits = _forward(adapted, torch.tensor(tokens, device=device)[:, None], mask, cache, shift=shift)[:, -1]


def collected(steps: Iterator[dict[int, int]]) -> list[list[int]]:
    """`decode` run to its end: the token ids of every row, the token that ended its turn included."""
    rows = {row: [token] for row, token in next(steps).items()}
    for step in steps:
        for row, token in step.items():
            rows[row].append(token)
    return list(rows.values())


def answer_log_probabilities(
    adapted: SpectralModel,
    prompts: Sequence[Sequence[int]],
    groups: Sequence[Sequence[Sequence[int]]],
    mixtures: Sequence[Deltas | None],
    temperature: float = 1.0,
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of every answer token, with gradient to `mixtures`; each prompt is computed once for its group.

    Args:
        prompts: token ids; groups: for each prompt, as many answers as every other prompt has.
        mixtures: z − 1 of every prompt, None for the base model.
        temperature: of the distribution whose log-probabilities are asked for.
        prefix: what the prompts go on from; None finds what they begin with alike.

    Returns:
        log-probabilities and mask, both (prompts · samples, longest answer); the mask is 1 where there is a token.
    """
    samples = len(groups[0])
    answers = [answer for group in groups for answer in group]
    device = _device(adapted)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    targets = nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(device)
    mask = (torch.arange(targets.shape[1], device=device) < lengths[:, None]).float()

    first, seen, cache = _prefill(adapted, prompts, mixtures, prefix)
    logits = first.repeat_interleave(samples, 0)  # (rows, 1, vocabulary)
    if targets.shape[1] > 1:
        cache.batch_repeat_interleave(samples)
        if seen is not None:
            # What follows an answer's end is masked by causality already; only the prompt's padding needs the mask.
            seen = torch.cat([seen.repeat_interleave(samples, 0), torch.ones_like(targets[:, 1:])], dim=1)
        with adapted.rows([mixture for mixture in mixtures for _ in range(samples)]):
            rest = _forward(adapted, targets[:, :-1], seen, cache, logits_to_keep=0)
        logits = torch.cat([logits, rest], dim=1)  # (rows, longest answer, vocabulary)
    # Flat, because torch's cross entropy over a class dimension that is not the last sums it ten times less exactly.
    flat = (logits.float() / temperature).flatten(0, 1)
    logs = -nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    return logs, mask


def parts_by_length(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows that are scored together: in order of length, with little padding, and no more than memory should hold."""
    part: list[int] = []
    for row in sorted(rows, key=lengths.__getitem__):
        length = lengths[row]
        if part and ((len(part) + 1) * length > _PART_TOKENS or length > _PART_RATIO * lengths[part[0]]):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Token ids (rows, longest) and their attention mask of the same shape, or None where nothing was padded."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), None if bool(mask.all()) else mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """Position of every token of a left-padded batch (rows, tokens): padding does not count."""
    return (mask.cumsum(1) - 1).clamp_min(0)


def _prefill(
    adapted: SpectralModel, prompts: Sequence[Sequence[int]], mixtures: Sequence[Deltas | None], prefix: Prefix | None
) -> tuple[Tensor, Tensor | None, GrowingCache]:
    """Run the prompts: logits of their last tokens (rows, 1, vocabulary), mask (rows, tokens) or None, and cache."""
    if prefix is None:
        # Each prompt keeps a token of its own, for the logits.
        columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
        alike = sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
        rows_saved = len(mixtures) - len(_distinct(mixtures))
        if alike * rows_saved >= _LEAST_SAVING:
            prefix = compute_prefix(adapted, prompts[0][:alike], mixtures)
            prompts = [prompt[alike:] for prompt in prompts]
    cache = GrowingCache(adapted.model.config) if prefix is None else prefix.cache_for(mixtures)
    ids, mask = pad_left(prompts, _device(adapted))
    if mask is not None and prefix is not None:
        mask = torch.cat([mask.new_ones(len(prompts), prefix.length), mask], dim=1)
    with adapted.rows(mixtures):
        logits = _forward(adapted, ids, mask, cache)
    return logits, mask, cache


def _prefill_picture(
    adapted: SpectralModel, prompt: Sequence[int], mixtures: Sequence[Deltas | None], picture: PictureInputs
) -> tuple[Tensor, GrowingCache, int]:
    """Run a prompt and its picture, a row for each mixture: logits of the last token (rows, 1, vocabulary), cache, and
    how much the positions of what follows differ from the count of tokens.
    """
    cache = GrowingCache(adapted.model.config)
    seen = picture_arguments(adapted.model, picture, len(mixtures))
    try:
        with adapted.rows(mixtures):
            ids = torch.tensor([list(prompt)] * len(mixtures), device=_device(adapted))
            logits = _forward(adapted, ids, None, cache, **seen)
    finally:
        shift = take_position_shift(adapted.model)
    return logits, cache, shift


def _device(adapted: SpectralModel) -> torch.device:
    """Where token ids go."""
    return execution_device(adapted.model.get_input_embeddings())


def _distinct(mixtures: Sequence[Deltas | None]) -> list[Deltas | None]:
    """Each mixture once; two are the same if they are one object."""
    return list({id(mixture): mixture for mixture in mixtures}.values())


def _forward(
    adapted: SpectralModel,
    ids: Tensor,
    mask: Tensor | None,
    cache: GrowingCache,
    logits_to_keep: int = 1,
    shift: int = 0,
    **others,
) -> Tensor:
    """Logits of the last tokens, or of all for 0; ids (rows, new tokens), mask (rows, all tokens).

    Args:
        shift: what the tokens' positions differ by from their count, where there is no mask.
        others: what else the model takes.
    """
    arguments = {"input_ids": ids, "cache": cache, "use_cache": True, "logits_to_keep": logits_to_keep}
    if mask is not None:
        arguments["attention_mask"] = mask
        arguments["position_ids"] = positions(mask)[:, -ids.shape[1] :]
    elif shift:
        seen = cache.get_seq_length()
        counted = torch.arange(seen, seen + ids.shape[1], device=ids.device)
        arguments["position_ids"] = (counted + shift).expand(len(ids), -1)
    arguments |= others
    return adapted.model(**arguments).logits


class _TokenChooser:
    """Greedy, or sampled with transformers' own warpers, every row from a generator of its own."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device):
        self.greedy = sampling.temperature == 0
        self.warpers = LogitsProcessorList()
        if self.greedy:
            return
        if sampling.temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(sampling.top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """The next token of each row, from logits (rows, vocabulary)."""
        if self.greedy:
            return logits.argmax(-1).tolist()
        scores = self.warpers(None, logits.float())
        probabilities = scores.softmax(-1)
        return [
            torch.multinomial(probabilities[i], 1, generator=self.generators[row]).item() for i, row in enumerate(rows)
        ]


class TextStream:
    """One row's tokens as text that only ever grows: a character is shown once all of its bytes are there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self.text = ""

    def push(self, token: int) -> str:
        """Add a token and return the text that became certain with it, which may be empty."""
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # An unfinished character decodes to U+FFFD at the end; it may yet become another one.
        return self._advance(decoded.rstrip("\ufffd"))

    def finish(self) -> str:
        """The text that was still held back when the row ended."""
        return self._advance(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _advance(self, decoded: str) -> str:
        if len(decoded) <= len(self.text):
            return ""
        piece, self.text = decoded[len(self.text) :], decoded
        return piece
