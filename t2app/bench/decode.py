"""What the second answer of the page costs: a decoding step with both rows against one of the base model alone."""

from collections.abc import Callable, Iterator

import torch

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.experts import mix
from t2app.key_values import GrowingCache
from t2app.models import Model, load_model
from t2app.spectral import Deltas

_CONTEXT_TOKENS = 64
_STEPS = 60


def bench_decode(model_name: str, precision: str) -> Iterator[Figure]:
    """A decoding step with both answers against one of the plain base model, at the same length.

    The steps alternate, so that a slow moment of the machine meets both. Both go through the same loaded model.

    Raises:
        ValueError: the model has no expert to measure with.
    """
    model = load_model(model_name, precision)
    mixture = mix(model.experts, {expert.name: 1.0 for expert in model.experts})
    if mixture is None:
        raise ValueError(f"{model.name} has no expert to measure with")
    base = _stepper(model, [None])
    both = _stepper(model, [None, mixture])
    for step in (base, both):
        for _ in range(5):
            step()
    pairs = [(seconds(base), seconds(both)) for _ in range(_STEPS)]
    yield figure_of("decode", "base_step", [1e3 * first for first, _ in pairs], "ms")
    yield figure_of("decode", "both_step", [1e3 * second for _, second in pairs], "ms")
    yield figure_of("decode", "both_over_base", [second / first for first, second in pairs], "ratio")


def _stepper(model: Model, mixtures: list[Deltas | None]) -> Callable[[], None]:
    """One decoding step with a row for each mixture, continuing a context of random tokens."""
    transformer, device = model.adapted.model, model.adapted.model.device
    generator = torch.Generator().manual_seed(0)
    context = torch.randint(100, 1000, (1, _CONTEXT_TOKENS), generator=generator).expand(len(mixtures), -1).to(device)
    cache = GrowingCache(transformer.config)

    plan = model.adapted.plan(mixtures)

    def forward(ids: torch.Tensor) -> None:
        with torch.inference_mode(), model.adapted.using(plan):
            transformer(input_ids=ids, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()

    forward(context)
    return lambda: forward(context[:, :1])
