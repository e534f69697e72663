"""Batched decoding in which every row has its own prompt, mixture and random generator, and scoring of given answers.

One forward pass a token serves all rows: the answers that are being written for the page, the samples of a training
step, the problems of an evaluation. A row stops at its end of turn and leaves the batch; others may join it between two
steps. This file knows token ids and mixtures; text appears only where `TextStream` turns one row's tokens into pieces
that can be shown.
"""

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from t2app.context import Context, Prefix, compute_prefix, device_of, distinct, forward
from t2app.key_values import GrowingCache
from t2app.messages import Sampling
from t2app.spectral import Deltas, RowDeltas, SpectralModel
from t2app.step_graphs import StepGraphs, recorder_for
from t2app.vision import PictureInputs, picture_arguments, take_position_shift

# Tokens × rows from which it pays to compute what prompts begin with alike in a pass of its own.
_LEAST_SAVING = 64
# Answers are scored in parts. The tokens of a part bound its memory, since logits are tokens × vocabulary; the ratio of
# its longest row to its shortest bounds the work that is lost to padding.
_PART_TOKENS = 4096
_PART_RATIO = 1.5


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


@dataclass(eq=False)
class _Row:
    """One row of a batch and how far it is.

    Attributes:
        number: by which the batch's caller knows it.
        generator: that it is drawn from, None where the likeliest token is taken.
        left: tokens that it may still get.
        position: of its next token.
        token: the last one that was chosen, which the next step runs.
    """

    number: int
    mixture: Deltas | None
    sampling: Sampling
    generator: torch.Generator | None
    left: int
    position: int
    token: int = 0


class Batch:
    """Rows that are decoded together, one forward pass a token for all of them; rows may come and go between two steps.

    Every row draws from a generator of its own, so that what it says does not depend on its company. Prompts with a
    picture and without may share a batch, since a picture is seen in its prompt's own pass. After a step that raised
    the batch is of no use.

    Args:
        eos_ids: token ids that end a row.
        graphs: of this batch's steps; None records them where that can be.
    """

    def __init__(self, adapted: SpectralModel, eos_ids: Sequence[int], graphs: StepGraphs | None = None):
        self._adapted, self._stop = adapted, frozenset(eos_ids)
        self._rows: list[_Row] = []
        self._admitted = 0
        self._context: Context | None = None
        self._plan: dict[str, RowDeltas | None] = {}
        self._graphs = graphs or StepGraphs(adapted, recorder_for(adapted))

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def running(self) -> set[int]:
        """The numbers of the rows that go on."""
        return {row.number for row in self._rows}

    # As a decorator the mode is entered for each step only, and so never leaks into the code that reads a stream.
    @torch.inference_mode()
    def admit(
        self,
        prompts: Sequence[Sequence[int]],
        mixtures: Sequence[Deltas | None],
        sampling: Sampling,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
        prefix: Prefix | None = None,
        picture: PictureInputs | None = None,
    ) -> dict[int, int]:
        """Run prompts, and let what follows them be decoded with the rows that are there.

        Returns:
            the first token of every new row, by its number: rows are numbered from 0 as they are admitted, sample s of
            prompt p as p·samples + s from the first number of this call.

        The arguments and what is raised are those of `decode`; where anything is raised, the batch is as it was.
        """
        _check(prompts, mixtures, seeds, prefix, picture)
        order = _base_first(mixtures)
        prompts, mixtures = [prompts[p] for p in order], [mixtures[p] for p in order]
        if picture is None:
            prefilled = prefill(self._adapted, prompts, mixtures, prefix)
        else:
            prefilled = _prefill_picture(self._adapted, prompts[0], mixtures, picture)
        return self._admit(prefilled, order, sampling, samples, seeds)

    @torch.inference_mode()
    def admit_prefilled(self, prefilled: Prefilled, sampling: Sampling) -> dict[int, int]:
        """`admit` for prompts that have been run, an answer to each."""
        return self._admit(prefilled, range(len(prefilled.mixtures)), sampling)

    def _admit(
        self,
        prefilled: Prefilled,
        numbers: Sequence[int],
        sampling: Sampling,
        samples: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> dict[int, int]:
        """`admit` for prompts that have been run, of which the caller knows row i as prompt numbers[i]."""
        device = device_of(self._adapted)
        starts = [sampling.seed] * len(numbers) if seeds is None else seeds
        context = prefilled.context
        context.repeat(samples)
        rows = [
            _Row(
                self._admitted + p * samples + sample,
                mixture,
                sampling,
                None if sampling.temperature == 0 else torch.Generator(device).manual_seed(starts[p] + sample),
                sampling.max_new_tokens,
                position,
            )
            for p, mixture, position in zip(numbers, prefilled.mixtures, prefilled.positions, strict=True)
            for sample in range(samples)
        ]
        tokens, kept = self._choose(prefilled.logits[:, -1].repeat_interleave(samples, 0), rows)
        if kept:
            if len(kept) < len(rows):
                context.select(kept)
            self._join([rows[i] for i in kept], context, device)
        self._admitted += len(rows)
        return tokens

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Run the last token of every row; gives their next ones, by the rows' numbers."""
        device = device_of(self._adapted)
        ids = torch.tensor([[row.token] for row in self._rows], device=device)
        places = torch.tensor([[row.position] for row in self._rows], device=device)
        # The plan is in use only while a step runs: a stream that is left half-read leaves the model clean.
        with self._adapted.using(self._plan):
            logits = self._graphs.logits(ids, places, self._context)
        for row in self._rows:
            row.position += 1
        tokens, kept = self._choose(logits, self._rows)
        self._keep(kept)
        return tokens

    def rest(self) -> Iterator[dict[int, int]]:
        """Step after step, until no row is left."""
        while self:
            yield self.step()

    @torch.inference_mode()
    def drop(self, numbers: Container[int]) -> None:
        """Let rows go before they have ended."""
        self._keep([i for i, row in enumerate(self._rows) if row.number not in numbers])

    def _choose(self, logits: Tensor, rows: Sequence[_Row]) -> tuple[dict[int, int], list[int]]:
        """The next token of each row by its number, from logits (rows, vocabulary), and which of the rows go on."""
        for row, token in zip(rows, _next_tokens(logits, rows), strict=True):
            row.token = token
            row.left -= 1
        tokens = {row.number: row.token for row in sorted(rows, key=lambda row: row.number)}
        return tokens, [i for i, row in enumerate(rows) if row.left and row.token not in self._stop]

    def _join(self, rows: list[_Row], context: Context, device: torch.device) -> None:
        if self._rows:
            rows = [*self._rows, *rows]
            order = _base_first([row.mixture for row in rows])
            context, rows = self._context.joined(context, order, device), [rows[i] for i in order]
        self._plan = self._adapted.plan([row.mixture for row in rows])
        self._rows, self._context = rows, context
        self._graphs.forget()

    def _keep(self, kept: Sequence[int]) -> None:
        """Go on with these of the rows."""
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        self._graphs.forget()
        if not kept:
            self._context, self._plan = None, {}
            return
        self._context.select(kept)
        self._plan = self._adapted.plan([row.mixture for row in self._rows])


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
    """Yield, for every step, the next token id of each row that is still running, by row, in a batch of their own.

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
    batch = Batch(adapted, eos_ids)
    yield batch.admit(prompts, mixtures, sampling, samples, seeds, prefix, picture)
    yield from batch.rest()


def decode_prefilled(prefilled: Prefilled, sampling: Sampling, eos_ids: Sequence[int]) -> Iterator[dict[int, int]]:
    """`decode` for prompts that have been run, an answer to each."""
    batch = Batch(prefilled.adapted, eos_ids)
    yield batch.admit_prefilled(prefilled, sampling)
    yield from batch.rest()


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
    return log_probabilities_after(prefill(adapted, prompts, mixtures, prefix), groups, temperature)


def log_probabilities_after(
    prefilled: Prefilled, groups: Sequence[Sequence[Sequence[int]]], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`answer_log_probabilities` for prompts that have been run."""
    adapted, context, samples = prefilled.adapted, prefilled.context, len(groups[0])
    answers = [answer for group in groups for answer in group]
    device = device_of(adapted)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    targets = nn.utils.rnn.pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(device)
    mask = (torch.arange(targets.shape[1], device=device) < lengths[:, None]).float()

    logits = prefilled.logits.repeat_interleave(samples, 0)  # (rows, 1, vocabulary)
    if targets.shape[1] > 1:
        context.repeat(samples)
        # What follows an answer's end is masked by causality already; only the prompt's padding needs the mask.
        context.extend(targets.shape[1] - 1)
        with adapted.rows([mixture for mixture in prefilled.mixtures for _ in range(samples)]):
            rest = forward(adapted, targets[:, :-1], context, logits_to_keep=0)
        logits = torch.cat([logits, rest], dim=1)  # (rows, longest answer, vocabulary)
    # Flat, because torch's cross entropy over a class dimension that is not the last sums it ten times less exactly.
    flat = (logits.float() / temperature).flatten(0, 1)
    logs = -nn.functional.cross_entropy(flat, targets.flatten(), reduction="none").view_as(targets)
    return logs, mask


def choice_log_probabilities(
    adapted: SpectralModel,
    prompt: Sequence[int],
    choices: Sequence[Sequence[int]],
    mixture: Deltas | None,
    prefix: Prefix | None = None,
) -> Tensor:
    """Log-probability of each of several short answers to one prompt, (choices,).

    The arguments are those of `answer_log_probabilities`, for one prompt and its group.
    """
    longest = max(choices, key=len)
    if any(choice[:-1] != longest[: len(choice) - 1] for choice in choices):
        logs, mask = answer_log_probabilities(adapted, [prompt], [choices], [mixture], prefix=prefix)
        return (logs * mask).sum(1)
    # The longest goes on behind the prompt, in the same pass, and what precedes any other's last token is part of it.
    prefilled = prefill(adapted, [[*prompt, *longest[:-1]]], [mixture], prefix, logits_to_keep=len(longest))
    logs = prefilled.logits[0].float().log_softmax(-1)  # (tokens of the longest, vocabulary)
    return torch.stack([logs[range(len(choice)), choice].sum() for choice in choices])


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


def _check(
    prompts: Sequence[Sequence[int]],
    mixtures: Sequence[Deltas | None],
    seeds: Sequence[int] | None,
    prefix: Prefix | None,
    picture: PictureInputs | None,
) -> None:
    """Raises ValueError where these do not go together."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("decoding needs at least one prompt, and none that is empty")
    if len(mixtures) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(mixtures)} mixtures; one for each was expected")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds; one for each was expected")
    if picture is not None and (prefix is not None or any(prompt != prompts[0] for prompt in prompts)):
        raise ValueError("a picture belongs to one prompt; the same prompt for every row, and no prefix, was expected")


def _prefill_picture(
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


def _base_first(mixtures: Sequence[Deltas | None]) -> list[int]:
    """The rows, the base model's first: the others are then a slice of the batch, which is edited without a copy."""
    return sorted(range(len(mixtures)), key=lambda row: mixtures[row] is not None)


def _next_tokens(logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    """The next token of each row, from logits (rows, vocabulary)."""
    alike: dict[tuple[float, float], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        alike[row.sampling.temperature, row.sampling.top_p].append(i)
    tokens = [0] * len(rows)
    for (temperature, top_p), some in alike.items():
        own = logits if len(some) == len(rows) else logits[some]
        for i, token in zip(some, _tokens_at(temperature, top_p, own, [rows[i] for i in some]), strict=True):
            tokens[i] = token
    return tokens


def _tokens_at(temperature: float, top_p: float, logits: Tensor, rows: Sequence[_Row]) -> list[int]:
    """`_next_tokens` of rows that are sampled alike: greedy, or drawn after transformers' own warpers."""
    if temperature == 0:
        # Of `argmax` torch has no quick way in bfloat16 on a CPU: it takes five times as long.
        return logits.max(-1).indices.tolist()
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    scores = warpers(None, logits.float())
    return torch.stack([_drawn(own, row.generator) for own, row in zip(scores, rows, strict=True)]).tolist()


def _drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One of the tokens that `scores` (vocabulary,) are the logits of, as a tensor ().

    Every token draws the time that it takes, exponentially distributed with its probability as the rate, and the first
    one is it. That is `torch.multinomial`'s way too, whose times are drawn one after another and take much longer. By
    one number for all tokens, roundings of what precedes a token would change what is drawn.
    """
    probabilities = scores.softmax(-1)
    times = torch.empty_like(probabilities).uniform_(torch.finfo(probabilities.dtype).tiny, 1, generator=generator)
    return (probabilities / times.log_().neg_()).argmax()


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
