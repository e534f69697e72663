"""What the page costs beside what it shows: the same answers by the app over HTTP, and by the engine alone."""

import time
from collections.abc import Iterator
from functools import partial

from t2app.bench.figure import Figure, figure_of, seconds
from t2app.bench.served_app import IDLE_SECONDS, served_app
from t2app.engine import Engine
from t2app.messages import DEFAULT_DISPATCH, Finished, Sampling
from t2app.models.model import load_model

# Both answers are as long as they may be, 128 tokens.
_PROMPT = "Write a long story about a fox that learns to count."
_PAIRS = 7


def bench_page(model_name: str, precision: str) -> Iterator[Figure]:
    """Seconds until a page has both answers, by the app in a process of its own, and until the engine alone has them.

    `updates` is how often the page was told of something new meanwhile.

    Raises:
        RuntimeError: the app does not start, or cannot answer.
    """
    engine = Engine(load_model(model_name, precision))
    updates = []
    with served_app("--model", model_name, "--precision", precision) as app:
        ways = (lambda: updates.append(app.answer(_PROMPT)), partial(_answer, engine))
        for way in ways:
            way()  # not counted: it warms up
        # Both prepare then what makes later answers faster, which would slow the other down.
        time.sleep(IDLE_SECONDS)
        updates.clear()
        pairs = [tuple(seconds(way) for way in ways) for _ in range(_PAIRS)]
    engine.close()
    yield figure_of("page", "page_seconds", [page for page, _ in pairs], "s")
    yield figure_of("page", "engine_seconds", [engine for _, engine in pairs], "s")
    yield figure_of("page", "page_over_engine", [page / engine for page, engine in pairs], "ratio")
    yield figure_of("page", "updates", updates, "count")


def _answer(engine: Engine) -> Finished:
    *_, finished = engine.answer(_PROMPT, engine.dispatcher(DEFAULT_DISPATCH), Sampling())
    return finished
