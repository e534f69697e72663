"""What the first pass costs, against the time of both answers."""

from collections.abc import Iterator
from functools import partial

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.decoding import collected, decode
from t2app.dispatch import make_dispatcher
from t2app.experts import mix
from t2app.messages import NAMING_DISPATCHERS, Sampling
from t2app.models.model import load_model
from t2app.tasks.dispatch import labelled_prompts

_ANSWER_TOKENS = 128
_PROMPTS = 8


def bench_first_pass(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds of each dispatch that names the category, and its share of the time of both answers of 128 tokens."""
    model = load_model(model_name, precision)
    mixture = mix(model.experts, {expert.name: 1.0 for expert in model.experts})
    dispatchers = [make_dispatcher(name, model) for name in NAMING_DISPATCHERS]
    times: dict[str, list[float]] = {dispatcher.name: [] for dispatcher in dispatchers}
    answers = []
    prompts = [prompt for prompt, _ in labelled_prompts("train")[:_PROMPTS]]
    for prompt in [prompts[0], *prompts]:
        ids = model.prompt_ids(prompt)
        # No token ends an answer: all are of this length.
        stream = decode(model.adapted, [ids, ids], [None, mixture], Sampling(_ANSWER_TOKENS), ())
        answers.append(seconds(partial(collected, stream)))
        for dispatcher in dispatchers:
            times[dispatcher.name].append(seconds(partial(dispatcher.decide, prompt)))
    for name, measured in times.items():
        # The first of each is not counted: it warms up.
        yield figure_of("first-pass", f"{name}_seconds", measured[1:], "s")
        shares = [first / second for first, second in zip(measured[1:], answers[1:], strict=True)]
        yield figure_of("first-pass", f"{name}_over_answers", shares, "ratio")
