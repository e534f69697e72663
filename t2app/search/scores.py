"""How good mixtures are on solved examples: by answers decoded and checked, or by the likelihood of the right ones.

Candidates are rows: all mixtures are tried on all examples in as few batches as memory allows.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from t2app.decoding import (
    answer_log_probabilities,
    collected,
    decode,
    decode_prefilled,
    log_probabilities_after,
    parts_by_length,
    prefill,
)
from t2app.messages import EXACT, Sampling
from t2app.models.model import Model
from t2app.spectral import Deltas
from t2app.tasks import Example, Task

# Tokens that are run together, prompts and answers at their longest, which bound the cache's memory; and how many of
# them may be scored, which bound that of the logits.
_BATCH_TOKENS, _SCORED_TOKENS = 16384, 4096


class Score(NamedTuple):
    """Greater is better: first the examples answered rightly, where they were answered, then the likelihood.

    Attributes:
        right: examples answered rightly, 0 where the score does not look at that.
        log_likelihood: of the right answers, in nats a token: the mean of the examples' means.
    """

    right: int
    log_likelihood: float


class Scored(NamedTuple):
    """Several mixtures on the same examples.

    Attributes:
        scores: of each mixture.
        right: which examples were answered rightly, (mixtures, examples); none where they were not answered.
    """

    scores: list[Score]
    right: np.ndarray


Scorer = Callable[[Sequence[Deltas | None]], Scored]


def scorer(name: str, model: Model, task: Task, shots: Sequence[Example]) -> Scorer:
    """The score called `name`, one of `messages.SCORES`, of mixtures on `shots`."""

    def by_likelihood(mixtures: Sequence[Deltas | None]) -> Scored:
        scores = [Score(0, likelihood) for likelihood in log_likelihoods(model, shots, mixtures)]
        return Scored(scores, np.zeros((len(mixtures), len(shots)), dtype=int))

    return partial(answers_and_likelihoods, model, task, shots) if name == EXACT else by_likelihood


def answers_and_likelihoods(
    model: Model, task: Task, shots: Sequence[Example], mixtures: Sequence[Deltas | None]
) -> Scored:
    """The greedy answer to each shot under each mixture, and the likelihood of the right one; prompts are run once for
    both.
    """
    prompts, solutions = _prompts(model, shots), _solutions(model, shots)
    sampling = Sampling(max_new_tokens=task.max_new_tokens)
    scored = max(map(len, solutions))
    # What was seen of a prompt is there twice while its solution is scored.
    longest = 2 * max(map(len, prompts)) + max(scored, task.max_new_tokens)
    rows = min(_BATCH_TOKENS // longest, _SCORED_TOKENS // scored)
    right = np.zeros((len(mixtures), len(shots)), dtype=int)
    means = torch.zeros(len(mixtures), len(shots))
    for part in _batches(mixtures, shots, rows):
        with torch.inference_mode():
            prefilled = prefill(model.adapted, [prompts[shot] for _, shot in part], [mixtures[m] for m, _ in part])
            scores = _means(*log_probabilities_after(prefilled.copy(), [[solutions[shot]] for _, shot in part]))
        answers = collected(decode_prefilled(prefilled, sampling, model.eos_ids))
        for place, mean, ids in zip(part, scores, answers, strict=True):
            means[place] = mean
            right[place] = _is_right(model, task, shots[place[1]], ids)
    return Scored([Score(*both) for both in zip(right.sum(1).tolist(), means.mean(1).tolist(), strict=True)], right)


def right_answers(
    model: Model,
    task: Task,
    shots: Sequence[Example],
    mixtures: Sequence[Deltas | None],
    samples: int,
    temperature: float,
) -> np.ndarray:
    """How many of `samples` answers to each shot are right under each mixture, (mixtures, shots); all mixtures have the
    same draws.
    """
    prompts = _prompts(model, shots)
    sampling = Sampling(max_new_tokens=task.max_new_tokens, temperature=temperature)
    longest = max(map(len, prompts)) + task.max_new_tokens
    right = np.zeros((len(mixtures), len(shots)), dtype=int)
    for part in _batches(mixtures, shots, _BATCH_TOKENS // (longest * samples)):
        steps = decode(
            model.adapted,
            [prompts[shot] for _, shot in part],
            [mixtures[mixture] for mixture, _ in part],
            sampling,
            model.eos_ids,
            samples,
            seeds=[shot * samples for _, shot in part],
        )
        for row, ids in enumerate(collected(steps)):
            mixture, shot = part[row // samples]
            right[mixture, shot] += _is_right(model, task, shots[shot], ids)
    return right


@torch.inference_mode()
def log_likelihoods(model: Model, shots: Sequence[Example], mixtures: Sequence[Deltas | None]) -> list[float]:
    """Mean log-likelihood a token of the shots' solutions under each mixture; one forward pass, nothing is decoded."""
    prompts, solutions = _prompts(model, shots), _solutions(model, shots)
    lengths = [len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True)]
    rows = [(mixture, shot) for mixture in range(len(mixtures)) for shot in range(len(shots))]
    means = torch.zeros(len(mixtures), len(shots))
    for part in parts_by_length(range(len(rows)), [lengths[shot] for _, shot in rows]):
        scores = answer_log_probabilities(
            model.adapted,
            [prompts[rows[i][1]] for i in part],
            [[solutions[rows[i][1]]] for i in part],
            [mixtures[rows[i][0]] for i in part],
        )
        for i, mean in zip(part, _means(*scores), strict=True):
            means[rows[i]] = mean
    return means.mean(1).tolist()


def _prompts(model: Model, shots: Sequence[Example]) -> list[list[int]]:
    return [model.prompt_ids(shot.prompt) for shot in shots]


def _solutions(model: Model, shots: Sequence[Example]) -> list[list[int]]:
    """Token ids of each shot's solution, with the end of the turn."""
    tokenize = partial(model.tokenizer, add_special_tokens=False)
    return [[*tokenize(shot.solution)["input_ids"], model.eos_ids[0]] for shot in shots]


def _batches(mixtures: Sequence[Deltas | None], shots: Sequence[Example], rows: int) -> Iterator[list[tuple[int, int]]]:
    """Each mixture with each shot, as their numbers, so many in a batch.

    A mixture's rows stay together: what its prompts begin with is then computed in one batch, seldom in two.
    """
    pairs = [(mixture, shot) for mixture in range(len(mixtures)) for shot in range(len(shots))]
    rows = max(rows, 1)
    return (pairs[start : start + rows] for start in range(0, len(pairs), rows))


def _means(logs: Tensor, mask: Tensor) -> list[float]:
    """Of the log-probabilities (rows, tokens) of each row's tokens."""
    return ((logs * mask).sum(1) / mask.sum(1)).tolist()


def _is_right(model: Model, task: Task, shot: Example, ids: Sequence[int]) -> bool:
    return task.is_right(shot, model.tokenizer.decode(ids, skip_special_tokens=True))
