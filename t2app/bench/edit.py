"""What an edit may leave out: how far an answer's next-token distributions move, by how an edit is computed.

Mean Kullback-Leibler divergence a token of an answer, in nats, of the adapted model in fp32 from:

- `bf16`: the model in bfloat16, edits as torch computes them in bfloat16;
- `bf16_8_bits`: the same by the kernels, whose edits round singular vectors and what meets them to 8 bits;
- `bf16_matrices`: the same, but by the mixture's matrices, which are made of those vectors;
- `8bit_matrices`: the same with the model's weights in 8 bits, where there are kernels for them;
- `directions_75` and so on: the model in fp32 with the smallest |z − 1| of each layer at 0, 75 % of them kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from t2app.bench.figure import Figure, figure_of
from t2app.bench.step import with_matrices
from t2app.decoding import collected, decode
from t2app.experts import mix
from t2app.kernels.build import has_kernels
from t2app.key_values import GrowingCache
from t2app.messages import Sampling
from t2app.models.catalogue import EIGHT_BIT
from t2app.models.model import Model, load_model
from t2app.spectral import Deltas
from t2app.tasks.registry import task_named

# A task of each expert, whose prompts need no download.
_TASKS = {"math": "arithmetic", "reasoning": "reasoning-basics", "code": "code-basics"}
_PROMPTS_OF_EACH, _ANSWER_TOKENS = 8, 24
_SHARES = (0.9, 0.75, 0.5)


def bench_edit(model_name: str, precision: str) -> Iterator[Figure]:
    """Divergences, a value for each of the greedy answers to the first validation prompts of the experts' own tasks.

    Raises:
        ValueError: a precision is given, or the model has none of the experts.
    """
    if precision != "auto":
        raise ValueError("the bench 'edit' compares bf16 with fp32 by itself; leave --precision out")
    exact = load_model(model_name, "fp32")
    rounded = load_model(model_name, "bf16")
    held = [rounded, *([load_model(model_name, EIGHT_BIT)] if has_kernels() else [])]
    experts = {expert.name: expert for expert in exact.experts if expert.name in _TASKS}
    if not experts:
        raise ValueError(f"{exact.name} has none of the experts {', '.join(_TASKS)} to measure with")
    values: dict[str, list[float]] = {}
    for name, expert in experts.items():
        mixture = mix([expert], {name: 1.0})
        by_matrices = [with_matrices(model, dict(mixture)) for model in held]  # to a model, another one
        for example in task_named(_TASKS[name]).examples("validation")[:_PROMPTS_OF_EACH]:
            prompt = exact.prompt_ids(example.prompt)
            steps = decode(exact.adapted, [prompt], [mixture], Sampling(_ANSWER_TOKENS), exact.eos_ids)
            answer = collected(steps)[0]
            right = _log_probabilities(exact, prompt, answer, mixture)
            ways = {"bf16_8_bits": _log_probabilities(rounded, prompt, answer, mixture)}
            for model, own in zip(held, by_matrices, strict=True):
                ways[f"{model.precision}_matrices"] = _log_probabilities(model, prompt, answer, own)
            with _by_torch(rounded, exact):
                ways["bf16"] = _log_probabilities(rounded, prompt, answer, mixture)
            for share in _SHARES:
                fewer = _largest(mixture, share)
                ways[f"directions_{share:.0%}".rstrip("%")] = _log_probabilities(exact, prompt, answer, fewer)
            for way, found in ways.items():
                values.setdefault(way, []).append((right.exp() * (right - found)).sum(1).mean().item())
    for way, divergences in values.items():
        yield figure_of("edit", way, divergences, "nats a token")


@torch.inference_mode()
def _log_probabilities(model: Model, prompt: Sequence[int], answer: Sequence[int], mixture: Deltas) -> Tensor:
    """Of every token that could come next (answer tokens, vocabulary) in fp32, a token a step as in decoding."""
    cache = GrowingCache(model.adapted.model.config)
    logits = []
    with model.adapted.rows([mixture]):
        for ids in ([*prompt], *([token] for token in answer[:-1])):
            output = model.adapted.model(input_ids=torch.tensor([ids]), cache=cache, logits_to_keep=1)
            logits.append(output.logits[0, -1].float())
    return torch.stack(logits).log_softmax(-1)


def _largest(mixture: Deltas, share: float) -> Deltas:
    """The mixture with only this share of each layer's z − 1, the largest ones."""
    thresholds = {path: delta.abs().quantile(1 - share) for path, delta in mixture.items()}
    return {path: delta * (delta.abs() >= thresholds[path]) for path, delta in mixture.items()}


@contextmanager
def _by_torch(model: Model, exact: Model) -> Iterator[None]:
    """Edits as torch computes them, for the time of a block, with the singular vectors of the model in fp32."""
    layers = model.adapted.layers
    kept = {path: (layer.packed, layer.vectors) for path, layer in layers.items()}
    for path, layer in layers.items():
        layer.packed, layer.vectors = None, exact.adapted.layers[path].vectors.bfloat16()
    try:
        yield
    finally:
        for path, layer in layers.items():
            layer.packed, layer.vectors = kept[path]
