"""How likely given answers are, with a gradient to the mixtures where one is asked for."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from t2app.decoding.context import device_of, forward
from t2app.decoding.prefill import Prefilled, prefill
from t2app.decoding.prefix import Prefix
from t2app.spectral import Deltas, SpectralModel

# Answers are scored in parts. The tokens of a part bound its memory, since logits are tokens × vocabulary; the ratio of
# its longest row to its shortest bounds the work that is lost to padding.
_PART_TOKENS = 4096
_PART_RATIO = 1.5


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
