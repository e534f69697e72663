"""Choosing the next tokens: the likeliest, or drawn by a generator of each row's own."""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

from t2app.messages import Sampling

# The nucleus is mostly among so many tokens.
_LIKELIEST = 512


class NextLogits(NamedTuple):
    """What the next token of each row is chosen by.

    Attributes:
        logits: (rows, vocabulary).
        likeliest: the token of the largest in each row, of several such the first; None where nobody looked for it yet.
    """

    logits: Tensor
    likeliest: Sequence[int] | None = None


def next_tokens(
    following: NextLogits, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int]:
    """The next token of each row; a row that is not greedy has a generator."""
    alike: dict[tuple[float, float], list[int]] = defaultdict(list)
    for i, sampling in enumerate(samplings):
        alike[sampling.temperature, sampling.top_p].append(i)
    tokens = [0] * len(samplings)
    for (temperature, top_p), some in alike.items():
        chosen = _tokens_at(temperature, top_p, _rows_of(following, some), [generators[i] for i in some])
        for i, token in zip(some, chosen, strict=True):
            tokens[i] = token
    return tokens


def _rows_of(following: NextLogits, some: Sequence[int]) -> NextLogits:
    if len(some) == len(following.logits):
        return following
    likeliest = following.likeliest
    return NextLogits(following.logits[some], None if likeliest is None else [likeliest[i] for i in some])


def _tokens_at(
    temperature: float, top_p: float, following: NextLogits, generators: Sequence[torch.Generator | None]
) -> Sequence[int]:
    """`next_tokens` of rows that are sampled alike: greedy, or drawn."""
    logits, likeliest = following
    if temperature == 0:
        # Of `argmax` torch has no quick way in bfloat16 on a CPU: it takes five times as long.
        return logits.max(-1).indices.tolist() if likeliest is None else likeliest
    scores = logits.float() / temperature
    if top_p < 1:
        scores = nucleus(scores, top_p)
    return torch.stack([_drawn(own, generator) for own, generator in zip(scores, generators, strict=True)]).tolist()


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Scores (rows, vocabulary) of the likeliest tokens that have a probability of `top_p` together; of the others −∞.

    transformers' warper sorts the whole vocabulary, which takes a CPU 6 ms for two rows of 49,152 tokens. It is left
    the rows in which so many are needed.
    """
    likeliest = scores.topk(min(_LIKELIEST, scores.shape[-1]))  # values and indices, (rows, those), by falling score
    probabilities = (likeliest.values - scores.logsumexp(-1, keepdim=True)).exp()
    before = probabilities.cumsum(-1) - probabilities
    if bool((before[:, -1] < top_p).any()):
        return TopPLogitsWarper(top_p)(None, scores)
    kept = likeliest.values.masked_fill(before >= top_p, -torch.inf)
    return torch.full_like(scores, -torch.inf).scatter(-1, likeliest.indices, kept)


def _drawn(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One of the tokens that `scores` (vocabulary,) are the logits of, as a tensor ().

    Every token draws the time that it takes, exponentially distributed with its probability as the rate, and the first
    one is it. That is `torch.multinomial`'s way too, whose times are drawn one after another and take much longer. By
    one number for all tokens, roundings of what precedes a token would change what is drawn.
    """
    probabilities = scores.softmax(-1)
    times = torch.empty_like(probabilities).uniform_(torch.finfo(probabilities.dtype).tiny, 1, generator=generator)
    return (probabilities / times.log_().neg_()).argmax()
