"""The two passes together: a prompt in, a stream of typed events out.

The events are the same for the page, the command line, its JSON lines and the tests. This file does not know how any
of them shows an event.
"""

import gc
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from PIL.Image import Image

from t2app.decoding import TextStream, decode
from t2app.dispatch import Dispatcher, make_dispatcher
from t2app.experts import mean_changes, mix, share
from t2app.messages import NAMING_DISPATCHERS, Dispatched, Event, Finished, Reevaluated, Sampling, Searched, Token
from t2app.models import Model
from t2app.search import MixtureSearch
from t2app.spectral import Deltas
from t2app.vision import PictureInputs

STREAMS = ("base", "adapted")
_Event = TypeVar("_Event", bound=Event)


class PromptError(ValueError):
    """A prompt that cannot be answered; the message is for the person who typed it."""


class EngineError(ValueError):
    """The engine cannot answer now; the message is for the person who asked."""


class Engine:
    """Answers prompts with one model, one at a time: a second caller waits until the first stream ends or is closed."""

    def __init__(self, model: Model):
        self._model: Model | None = model
        self._dispatchers: dict[str, Dispatcher] = {}
        self._turn = threading.Lock()

    @property
    def model(self) -> Model:
        """The model; raises EngineError once the engine is closed."""
        if self._model is None:
            raise EngineError("Another model is taking the place of this one; ask again when it is ready.")
        return self._model

    def close(self) -> None:
        """Let go of the model, as one of the callers that wait for each other; those behind get an EngineError."""
        with self._turn:
            self._model = None
            self._dispatchers.clear()
        _free_memory()

    def dispatcher(self, name: str, weights: Mapping[str, float] | None = None) -> Dispatcher:
        """See `make_dispatcher`; one that names the prompt's category is kept, since it prepares its question once."""
        if weights is not None or name not in NAMING_DISPATCHERS:
            return make_dispatcher(name, self.model, weights)
        if name not in self._dispatchers:
            self._dispatchers[name] = make_dispatcher(name, self.model)
        return self._dispatchers[name]

    def answer(
        self, prompt: str, dispatcher: Dispatcher, sampling: Sampling, image: Image | None = None
    ) -> Iterator[Event]:
        """Decide a mixture for `prompt`, then stream the base model's and the adapted answer side by side.

        Closing the iterator stops the compute at the next token.

        Args:
            image: a picture that the prompt is about. The first pass sees the text alone, the second one both.

        Raises:
            PromptError: the prompt is empty, or does not fit the model together with its answer.
            PictureError: the model takes no pictures, or the prompt's text holds what stands for one.
            EngineError: the GPU's memory did not suffice, or the engine was closed.
        """
        return _freeing_memory(self._answer(prompt, dispatcher, sampling, image))

    def search(self, search: MixtureSearch) -> Iterator[Searched | Reevaluated]:
        """Run a search, as one of the callers that wait for each other; closing the iterator ends it.

        Raises:
            EngineError: the GPU's memory did not suffice, or the engine was closed.
        """
        return _freeing_memory(self._search(search))

    @contextmanager
    def _model_in_turn(self) -> Iterator[Model]:
        """The model, once those who came before are done with it."""
        with self._turn:
            yield self.model

    def _answer(self, prompt: str, dispatcher: Dispatcher, sampling: Sampling, image: Image | None) -> Iterator[Event]:
        if not prompt.strip():
            raise PromptError("Type a prompt first.")
        if image is None:
            ids, picture = self.model.prompt_ids(prompt), None
        else:
            ids, picture = self.model.picture_prompt(prompt, image)
        room = self.model.context_length - sampling.max_new_tokens
        if len(ids) > room:
            asked = "The prompt" if picture is None else "The prompt with its picture"
            raise PromptError(
                f"{asked} is {len(ids):,} tokens long; with {sampling.max_new_tokens:,} tokens for the answer, "
                f"{self.model.name} takes at most {room:,}. Shorten the prompt or ask for a shorter answer."
            )
        with self._model_in_turn() as model:
            started = time.perf_counter()
            decision = dispatcher.decide(prompt)
            seconds = round(time.perf_counter() - started, 4)
            mixture = mix(model.experts, decision.weights)
            yield Dispatched(
                decision.label,
                {name: share(alpha) for name, alpha in decision.weights.items()},
                decision.probabilities,
                seconds,
                decision.note,
                mean_changes(mixture),
                decision.trace,
            )
            yield from self._second_pass(ids, picture, mixture, sampling)

    def _search(self, search: MixtureSearch) -> Iterator[Searched | Reevaluated]:
        with self._model_in_turn():
            yield from search.run()

    def _second_pass(
        self, ids: list[int], picture: PictureInputs | None, mixture: Deltas | None, sampling: Sampling
    ) -> Iterator[Event]:
        """One batch of two rows: the base model's and the mixture's."""
        mixtures = [None, mixture]
        streams = [TextStream(self.model.tokenizer) for _ in STREAMS]
        counts = [0] * len(STREAMS)
        started = time.perf_counter()
        steps = decode(self.model.adapted, [ids, ids], mixtures, sampling, self.model.eos_ids, picture=picture)
        for step in steps:
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


def _freeing_memory(events: Iterator[_Event]) -> Iterator[_Event]:
    """The same events; where the GPU's memory does not suffice, what they held is freed before the error is raised."""
    try:
        yield from events
        return
    except torch.OutOfMemoryError:
        # Left behind here: the error would keep the frames that it came through, and these what did not fit.
        pass
    _free_memory()
    raise EngineError(
        "The GPU's memory did not suffice; what was computed is freed. Ask for a shorter answer or with a shorter "
        "prompt, or load the model in 4-bit (--precision 4bit)."
    )


def _free_memory() -> None:
    """Free what nothing refers to any more, and give the GPUs' share of it back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
