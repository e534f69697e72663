"""How good mixtures are on solved examples: by answers decoded and checked, or by the likelihood of the right ones.

Candidates are rows: all mixtures are tried on all examples in as few batches as memory allows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from t2app.decoding import answer_log_probabilities, collected, decode, parts_by_length
from t2app.messages import EXACT, Sampling
from t2app.models import Model
from t2app.spectral import Deltas
from t2app.tasks import Example, Task

# Tokens that are decoded together, prompts and answers at their longest: they bound the cache's memory.
_BATCH_TOKENS = 16384


class Score(NamedTuple):
    """Greater is better: first the examples answered rightly, where they were answered, then the likelihood.

    Attributes:
        right: examples answered rightly, 0 where the score does not look at that.
        log_likelihood: of the right answers, in nats a token: the mean of the examples' means.
    """

    right: int
    log_likelihood: float


Scorer = Callable[[Sequence[Deltas | None]], list[Score]]


def scorer(name: str, model: Model, task: Task, shots: Sequence[Example]) -> Scorer:
    """The score called `name`, one of `messages.SCORES`, of mixtures on `shots`."""
    exact = name == EXACT

    def score(mixtures: Sequence[Deltas | None]) -> list[Score]:
        right = right_answers(model, task, shots, mixtures).sum(1).tolist() if exact else [0] * len(mixtures)
        likelihoods = log_likelihoods(model, shots, mixtures)
        return [Score(*both) for both in zip(right, likelihoods, strict=True)]

    return score


def right_answers(
    model: Model,
    task: Task,
    shots: Sequence[Example],
    mixtures: Sequence[Deltas | None],
    samples: int = 1,
    temperature: float = 0.0,
) -> np.ndarray:
    """How many of `samples` answers to each shot are right under each mixture, (mixtures, shots); all mixtures have the
    same draws.
    """
    sampling = Sampling(max_new_tokens=task.max_new_tokens, temperature=temperature)
    prompts = [model.prompt_ids(shot.prompt) for shot in shots]
    longest = max(map(len, prompts)) + task.max_new_tokens
    in_a_batch = max(1, _BATCH_TOKENS // (longest * samples))
    # A mixture's rows stay together: what its prompts begin with is then computed in one batch, seldom in two.
    rows = [(mixture, shot) for mixture in range(len(mixtures)) for shot in range(len(shots))]
    right = np.zeros((len(mixtures), len(shots)), dtype=int)
    for start in range(0, len(rows), in_a_batch):
        part = rows[start : start + in_a_batch]
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
            right[mixture, shot] += task.is_right(shots[shot], model.tokenizer.decode(ids, skip_special_tokens=True))
    return right


@torch.inference_mode()
def log_likelihoods(model: Model, shots: Sequence[Example], mixtures: Sequence[Deltas | None]) -> list[float]:
    """Mean log-likelihood a token of the shots' solutions under each mixture; one forward pass, nothing is decoded."""
    tokenizer, end = model.tokenizer, model.eos_ids[0]
    prompts = [model.prompt_ids(shot.prompt) for shot in shots]
    solutions = [[*tokenizer(shot.solution, add_special_tokens=False)["input_ids"], end] for shot in shots]
    lengths = [len(prompt) + len(solution) for prompt, solution in zip(prompts, solutions, strict=True)]
    rows = [(mixture, shot) for mixture in range(len(mixtures)) for shot in range(len(shots))]
    means = torch.zeros(len(mixtures), len(shots))
    for part in parts_by_length(range(len(rows)), [lengths[shot] for _, shot in rows]):
        logs, mask = answer_log_probabilities(
            model.adapted,
            [prompts[rows[i][1]] for i in part],
            [[solutions[rows[i][1]]] for i in part],
            [mixtures[rows[i][0]] for i in part],
        )
        for i, mean in zip(part, ((logs * mask).sum(1) / mask.sum(1)).tolist(), strict=True):
            means[rows[i]] = mean
    return means.mean(1).tolist()
