"""The two passes together: a prompt in, a stream of typed events out.

The events are the same for the page, the command line, its JSON lines and the tests. This file does not know how any
of them shows an event.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from t2app.decoding import Sampling, TextStream, decode
from t2app.dispatch import Decision, Dispatcher, PromptDispatch
from t2app.experts import mix
from t2app.models import Model

STREAMS = ("base", "adapted")


@dataclass(frozen=True)
class Dispatched:
    """The first pass is done. `probabilities` is None where the dispatch has none."""

    label: str | None
    weights: Mapping[str, float]
    probabilities: Mapping[str, float] | None
    seconds: float


@dataclass(frozen=True)
class Token:
    """A piece of one stream's text; `tokens` so far in that stream, `seconds` since the second pass began."""

    stream: str
    text: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Finished:
    """Both answers are complete. `tokens` counts both streams, `seconds` is the second pass."""

    base: str
    adapted: str
    tokens: int
    seconds: float
    tokens_per_second: float


Event = Dispatched | Token | Finished


class PromptError(ValueError):
    """A prompt that cannot be answered; the message is for the person who typed it."""


class Engine:
    """Answers prompts with one model, one at a time: a second caller waits until the first stream ends or is closed."""

    def __init__(self, model: Model):
        self.model = model
        # Kept, because it measures its labels' prior once.
        self.prompt_dispatch = PromptDispatch(model)
        self._turn = threading.Lock()

    def answer(self, prompt: str, dispatcher: Dispatcher, sampling: Sampling) -> Iterator[Event]:
        """Decide a mixture for `prompt`, then stream the base model's and the adapted answer side by side.

        Closing the iterator stops the compute at the next token.

        Raises:
            PromptError: the prompt is empty, or does not fit the model together with its answer.
        """
        if not prompt.strip():
            raise PromptError("Type a prompt first.")
        ids = self.model.prompt_ids(prompt)
        room = self.model.context_length - sampling.max_new_tokens
        if len(ids) > room:
            raise PromptError(
                f"The prompt is {len(ids):,} tokens long; with {sampling.max_new_tokens:,} tokens for the answer, "
                f"{self.model.name} takes at most {room:,}. Shorten the prompt or ask for a shorter answer."
            )
        with self._turn:
            started = time.perf_counter()
            decision = dispatcher.decide(prompt)
            yield Dispatched(
                decision.label, decision.weights, decision.probabilities, round(time.perf_counter() - started, 4)
            )
            yield from self._second_pass(ids, decision, sampling)

    def _second_pass(self, ids: list[int], decision: Decision, sampling: Sampling) -> Iterator[Event]:
        """One batch of two rows: the base model's and the mixture's."""
        mixtures = [None, mix(self.model.experts, decision.weights)]
        streams = [TextStream(self.model.tokenizer) for _ in STREAMS]
        counts = [0] * len(STREAMS)
        started = time.perf_counter()
        for step in decode(self.model.adapted, [ids, ids], mixtures, sampling, self.model.eos_ids):
            for row, token in step.items():
                counts[row] += 1
                if text := streams[row].push(token):
                    yield Token(STREAMS[row], text, counts[row], time.perf_counter() - started)
        seconds = time.perf_counter() - started
        for row, stream in enumerate(streams):
            if text := stream.finish():
                yield Token(STREAMS[row], text, counts[row], seconds)
        base, adapted = (stream.text for stream in streams)
        yield Finished(base, adapted, sum(counts), seconds, sum(counts) / seconds)


def as_json(event: Event) -> dict:
    """The event as the command line prints it, with its name under "event"."""
    fields = {key: value for key, value in asdict(event).items() if value is not None or key == "label"}
    return {"event": type(event).__name__.lower(), **fields}
