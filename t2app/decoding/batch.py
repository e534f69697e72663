"""Rows that are decoded together. A row stops at its end of turn and leaves the batch; others may join it between two
steps.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

import torch

from t2app.decoding.context import Context, device_of
from t2app.decoding.prefill import Prefilled, prefill, prefill_picture
from t2app.decoding.prefix import Prefix
from t2app.decoding.sampling import NextLogits, next_tokens
from t2app.decoding.step_calls import StepCalls
from t2app.decoding.step_graphs import StepGraphs, recorder_for
from t2app.kernels.steps import calls_kernels
from t2app.messages import Sampling
from t2app.models.vision import PictureInputs
from t2app.spectral import Deltas, SpectralModel


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
        steps: what this batch's steps go by; None takes what is the fastest.
    """

    def __init__(self, adapted: SpectralModel, eos_ids: Sequence[int], steps: StepCalls | StepGraphs | None = None):
        self._adapted, self._stop = adapted, frozenset(eos_ids)
        self._rows: list[_Row] = []
        self._admitted = 0
        self._context: Context | None = None
        self._steps = steps or steps_of(adapted)

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
            prefilled = prefill_picture(self._adapted, prompts[0], mixtures, picture)
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
        tokens, kept = self._choose(NextLogits(prefilled.logits[:, -1].repeat_interleave(samples, 0)), rows)
        if kept:
            if len(kept) < len(rows):
                context.select(kept)
            self._join([rows[i] for i in kept], context, device)
        self._admitted += len(rows)
        return tokens

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """Run the last token of every row; gives their next ones, by the rows' numbers."""
        ids, places = [row.token for row in self._rows], [row.position for row in self._rows]
        following = self._steps.run(ids, places, self._context)
        for row in self._rows:
            row.position += 1
        tokens, kept = self._choose(following, self._rows)
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

    def _choose(self, following: NextLogits, rows: Sequence[_Row]) -> tuple[dict[int, int], list[int]]:
        """The next token of each row by its number, and which of the rows go on."""
        chosen = next_tokens(following, [row.sampling for row in rows], [row.generator for row in rows])
        for row, token in zip(rows, chosen, strict=True):
            row.token = token
            row.left -= 1
        tokens = {row.number: row.token for row in sorted(rows, key=lambda row: row.number)}
        return tokens, [i for i, row in enumerate(rows) if row.left and row.token not in self._stop]

    def _join(self, rows: list[_Row], context: Context, device: torch.device) -> None:
        if self._rows:
            rows = [*self._rows, *rows]
            order = _base_first([row.mixture for row in rows])
            context, rows = self._context.joined(context, order, device), [rows[i] for i in order]
        self._rows, self._context = rows, context
        self._steps.begin(self._adapted.plan([row.mixture for row in rows]))

    def _keep(self, kept: Sequence[int]) -> None:
        """Go on with these of the rows."""
        if len(kept) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in kept]
        if not kept:
            self._context = None
            self._steps.begin({})
            return
        self._context.select(kept)
        self._steps.begin(self._adapted.plan([row.mixture for row in self._rows]))


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


def steps_of(adapted: SpectralModel) -> StepCalls | StepGraphs:
    """What the steps of one batch of a model go by: calls of the kernels on a CPU, CUDA graphs on a GPU."""
    return StepCalls(adapted) if calls_kernels(adapted.model) else StepGraphs(adapted, recorder_for(adapted))


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


def _base_first(mixtures: Sequence[Deltas | None]) -> list[int]:
    """The rows, the base model's first: the others are then a slice of the batch, which is edited without a copy."""
    return sorted(range(len(mixtures)), key=lambda row: mixtures[row] is not None)
