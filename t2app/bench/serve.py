"""What company costs: several prompts answered at once against the same ones one after another, by one engine.

And what another user's prompt of a thousand tokens costs: `longest_pause` is between two tokens of an answer that is on
its way, while that prompt goes through both passes; `beside_long_prompt` is from a short prompt, asked while that one
goes through the second pass, to its first token, where the user gives the weights.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.engine import Engine
from t2app.messages import DEFAULT_DISPATCH, MANUAL, Event, Sampling, Token
from t2app.models.model import load_model
from t2app.tasks.dispatch import labelled_prompts

_REQUESTS = 8
_LEAST_TOKENS, _MOST_TOKENS = 64, 128
_LONG_PROMPT_TOKENS = 1000
_PAIRS = 7
# Until a prompt that was asked is being run.
_BEGINNING_SECONDS = 0.1


def bench_serve(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds until eight prompts have both answers, each by a mixture of its own, and what a long prompt beside costs.

    Raises:
        ValueError: the model has no expert to mix.
    """
    # No token ends an answer: all are as long as was asked for.
    model = replace(load_model(model_name, precision), eos_ids=())
    if not model.experts:
        raise ValueError(f"{model.name} has no expert to measure with")
    engine = Engine(model)
    requests = _requests(engine)
    for run in (partial(_one_after_another, requests[:1]), partial(_at_once, requests)):
        run()  # warms up
    ways = (partial(_one_after_another, requests), partial(_at_once, requests))
    pairs = [tuple(seconds(way) for way in ways) for _ in range(_PAIRS)]
    pauses = [_longest_pause(engine) for _ in range(_PAIRS)]
    waits = [_wait_beside_long_prompt(engine) for _ in range(_PAIRS)]
    engine.close()
    yield figure_of("serve", "serial_seconds", [serial for serial, _ in pairs], "s")
    yield figure_of("serve", "concurrent_seconds", [concurrent for _, concurrent in pairs], "s")
    yield figure_of("serve", "concurrent_over_serial", [concurrent / serial for serial, concurrent in pairs], "ratio")
    yield figure_of("serve", "longest_pause", pauses, "s")
    yield figure_of("serve", "beside_long_prompt", waits, "s")


def _requests(engine: Engine) -> list[Callable[[], None]]:
    """Prompts of all categories, each with a length and weights of its own; calling one answers it."""
    prompts = [prompt for prompt, _ in labelled_prompts("train")]
    names = [expert.name for expert in engine.model.experts]
    requests = []
    for number in range(_REQUESTS):
        share = (number + 1) / _REQUESTS
        dispatcher = engine.dispatcher(MANUAL, {names[number % len(names)]: share})
        tokens = _LEAST_TOKENS + number * (_MOST_TOKENS - _LEAST_TOKENS) // (_REQUESTS - 1)
        prompt = prompts[number * len(prompts) // _REQUESTS]
        answer = partial(engine.answer, prompt, dispatcher, Sampling(tokens), user=f"user {number}")
        requests.append(partial(_read, answer))
    return requests


def _longest_pause(engine: Engine) -> float:
    """Seconds between two tokens of an answer, at most, while another user's long prompt goes through both passes."""
    prompt, long_prompt = _prompt_and_long_one(engine)
    dispatcher = engine.dispatcher(DEFAULT_DISPATCH)
    times = []
    with ThreadPoolExecutor(1) as threads:
        for event in engine.answer(prompt, dispatcher, Sampling(_MOST_TOKENS), user="first"):
            if not isinstance(event, Token):
                continue
            if not times:
                long = partial(engine.answer, long_prompt, dispatcher, Sampling(1), user="second")
                asked = threads.submit(_read, long)
            times.append(time.perf_counter())
        asked.result()
    return max(after - before for before, after in pairwise(times))


def _wait_beside_long_prompt(engine: Engine) -> float:
    """Seconds until a prompt has its first token, while another user's long prompt goes through the second pass."""
    prompt, long_prompt = _prompt_and_long_one(engine)
    dispatcher = engine.dispatcher(MANUAL, {engine.model.experts[0].name: 1.0})
    long = engine.answer(long_prompt, dispatcher, Sampling(1), user="first")
    next(long)  # the mixture is decided
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(_read, lambda: long)
        time.sleep(_BEGINNING_SECONDS)
        waited = seconds(partial(_read, partial(engine.answer, prompt, dispatcher, Sampling(1), user="second")))
        asked.result()
    return waited


def _prompt_and_long_one(engine: Engine) -> tuple[str, str]:
    prompt, _ = labelled_prompts("train")[0]
    long_prompt = prompt
    while len(engine.model.prompt_ids(long_prompt)) < _LONG_PROMPT_TOKENS:
        long_prompt += f"\n{prompt}"
    return prompt, long_prompt


def _read(answer: Callable[[], Iterator[Event]]) -> None:
    for _ in answer():
        pass


def _one_after_another(requests: list[Callable[[], None]]) -> None:
    for request in requests:
        request()


def _at_once(requests: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(len(requests)) as threads:
        for answer in [threads.submit(request) for request in requests]:
            answer.result()
