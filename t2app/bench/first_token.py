"""How long somebody waits for the first words: from the prompt to the first token of both answers."""

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from t2app.bench.figure import Figure, figure_of
from t2app.dispatch import Dispatcher, make_dispatcher
from t2app.engine import STREAMS, Engine
from t2app.messages import DEFAULT_DISPATCH, Dispatched, Sampling, Token
from t2app.models.model import Model, load_model
from t2app.parts import whole
from t2app.tasks.dispatch import labelled_prompts

_PROMPT_TOKENS = 64
_PROMPTS = 16
# More than one joined prompt needs to be cut to the length.
_JOINED = 8


def bench_first_token(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds from the engine's call to the first token of both answers, the first pass included.

    Every prompt is another one, of 64 tokens, to which the chat template adds its own. `first_pass_seconds` and
    `prefill_seconds` are the two parts: until the mixture is decided, and from there. Of the first part
    `unprepared_first_pass_seconds` is what it takes before there was time for what makes it faster.
    """
    model = load_model(model_name, precision)
    dispatcher = make_dispatcher(DEFAULT_DISPATCH, model)
    prompts = list(islice(_prompts(model), 1 + _PROMPTS))
    unprepared = [first_pass for first_pass, _ in _all_parts(model, dispatcher, prompts)]
    whole(dispatcher.speeding_up())
    parts = _all_parts(model, dispatcher, prompts)
    yield figure_of("first-token", "seconds", [sum(both) for both in parts], "s")
    yield figure_of("first-token", "first_pass_seconds", [first_pass for first_pass, _ in parts], "s")
    yield figure_of("first-token", "prefill_seconds", [prefill for _, prefill in parts], "s")
    yield figure_of("first-token", "unprepared_first_pass_seconds", unprepared, "s")


def _all_parts(model: Model, dispatcher: Dispatcher, prompts: Sequence[str]) -> list[tuple[float, float]]:
    """`_parts` of all prompts but the first, which warms up."""
    engine = Engine(model)
    parts = [_parts(engine, dispatcher, prompt) for prompt in prompts]
    engine.close()
    return parts[1:]


def _parts(engine: Engine, dispatcher: Dispatcher, prompt: str) -> tuple[float, float]:
    """Seconds until the mixture is decided, and from there until both answers have shown a token."""
    waiting = set(STREAMS)
    started = time.perf_counter()
    events = engine.answer(prompt, dispatcher, Sampling())
    for event in events:
        if isinstance(event, Dispatched):
            dispatched = time.perf_counter()
        elif isinstance(event, Token):
            waiting.discard(event.stream)
        if not waiting:
            break
    ended = time.perf_counter()
    events.close()
    return dispatched - started, ended - dispatched


def _prompts(model: Model) -> Iterator[str]:
    """Prompts of the tasks, joined and cut to exactly 64 tokens."""
    texts = [prompt for prompt, _ in labelled_prompts("train")]
    for start in range(0, len(texts), _JOINED):
        ids = model.tokenizer(" ".join(texts[start : start + _JOINED]), add_special_tokens=False)["input_ids"]
        prompt = model.tokenizer.decode(ids[:_PROMPT_TOKENS])
        # Cut within a word or a character it may be read as other tokens than it was written as.
        if len(model.tokenizer(prompt, add_special_tokens=False)["input_ids"]) == _PROMPT_TOKENS:
            yield prompt
