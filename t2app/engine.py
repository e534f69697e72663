"""The two passes together: a prompt in, a stream of typed events out.

The events are the same for the page, the command line, its JSON lines and the tests. This file does not know how any
of them shows an event.
"""

import time
from collections.abc import Hashable, Iterator, Mapping
from functools import partial

from PIL.Image import Image

from t2app.decoding import TextStream
from t2app.dispatch import Decision, Dispatcher, make_dispatcher
from t2app.experts import mean_changes, share
from t2app.messages import (
    NAMING_DISPATCHERS,
    Dispatched,
    Event,
    Finished,
    Limits,
    Reevaluated,
    Sampling,
    Searched,
    Token,
    Waiting,
)
from t2app.mixer import Mixer
from t2app.models.model import Model
from t2app.models.vision import PictureInputs
from t2app.parts import Parts, next_part
from t2app.scheduler import Caller, EngineError, Scheduler, free_memory
from t2app.search import MixtureSearch
from t2app.spectral import Deltas

__all__ = ["STREAMS", "Engine", "EngineError", "PromptError"]

STREAMS = ("base", "adapted")


class PromptError(ValueError):
    """A prompt that cannot be answered; the message is for the person who typed it."""


class Engine:
    """Answers prompts with one model, those of many callers at a time: their answers are rows of one batch.

    Attributes:
        mixer: of the model's experts; None once the engine is closed.

    Args:
        limits: of what is decoded at a time, by default those of `Limits`; callers beyond them wait.
    """

    def __init__(self, model: Model, limits: Limits | None = None):
        self._model: Model | None = model
        self._dispatchers: dict[str, Dispatcher] = {}
        self._scheduler = Scheduler(model.adapted, model.eos_ids, limits or Limits(), model.beginning())
        self.mixer: Mixer | None = Mixer(model.experts, model.adapted)

    @property
    def model(self) -> Model:
        """The model; raises EngineError once the engine is closed."""
        if self._model is None:
            raise EngineError("Another model is taking the place of this one; ask again when it is ready.")
        return self._model

    def close(self) -> None:
        """Let go of the model once all callers that are there have left; those who come now get an EngineError."""
        self._scheduler.close()
        self._model = self.mixer = None
        self._dispatchers.clear()
        free_memory()

    def dispatcher(self, name: str, weights: Mapping[str, float] | None = None, user: Hashable = None) -> Dispatcher:
        """See `make_dispatcher`; one that names the prompt's category is kept, since it prepares its question once."""
        if weights is not None or name not in NAMING_DISPATCHERS:
            return make_dispatcher(name, self.model, weights)
        if name not in self._dispatchers:
            with self._scheduler.caller(user) as caller:
                caller.submit(partial(self._prepare_dispatcher, name)).result()
        return self._dispatchers[name]

    def _prepare_dispatcher(self, name: str) -> None:
        """Another caller may have had it prepared meanwhile."""
        if name not in self._dispatchers:
            self._dispatchers[name] = dispatcher = make_dispatcher(name, self.model)
            # An answer waits for its expert's matrices, so these come first.
            self._scheduler.when_idle(self.mixer.making_matrices())
            self._scheduler.when_idle(dispatcher.speeding_up())

    def answer(
        self,
        prompt: str,
        dispatcher: Dispatcher,
        sampling: Sampling,
        image: Image | None = None,
        user: Hashable = None,
    ) -> Iterator[Event]:
        """Decide a mixture for `prompt`, then stream the base model's and the adapted answer side by side.

        Closing the iterator stops the compute at the next token. Whether others are answered at the same time changes
        how long it takes and, but for rounding, nothing else.

        Args:
            image: a picture that the prompt is about. The first pass sees the text alone, the second one both.
            user: whose prompt it is: where more is asked for than fits, users take turns.

        Raises:
            PromptError: the prompt is empty, or does not fit the model or this machine together with its answer.
            PictureError: the model takes no pictures, or the prompt's text holds what stands for one.
            EngineError: the GPU's memory did not suffice, or the engine was closed.
        """
        if not prompt.strip():
            raise PromptError("Type a prompt first.")
        if image is None:
            ids, picture = self.model.prompt_ids(prompt), None
        else:
            ids, picture = self.model.picture_prompt(prompt, image)
        self._check_length(
            len(ids), sampling.max_new_tokens, "The prompt" if image is None else "The prompt with its picture"
        )
        with self._scheduler.caller(user) as caller:
            decision, seconds = yield from caller.run_in_parts(_timed(dispatcher.deciding(prompt)))
            mixture = self.mixer.mixture(decision.weights)
            yield Dispatched(
                decision.label,
                {name: share(alpha) for name, alpha in decision.weights.items()},
                decision.probabilities,
                seconds,
                decision.note,
                mean_changes(mixture),
                decision.trace,
            )
            if mixture is not None and self.model.adapted.lacks_matrices(mixture):
                yield from caller.run_in_parts(self.mixer.making_matrices_of(mixture, decision.weights))
            yield from self._second_pass(caller, ids, picture, mixture, sampling)

    def search(self, search: MixtureSearch, user: Hashable = None) -> Iterator[Searched | Reevaluated | Waiting]:
        """Run a search; between its rounds others are served. Closing the iterator ends it.

        Raises:
            EngineError: the GPU's memory did not suffice, or the engine was closed.
        """
        events = search.run()
        with self._scheduler.caller(user) as caller:
            while (event := (yield from caller.run(partial(next, events, None)))) is not None:
                yield event

    def _check_length(self, prompt_tokens: int, answer_tokens: int, asked: str) -> None:
        """Raises PromptError where a prompt and its answer are too long together."""
        room = self.model.context_length - answer_tokens
        if prompt_tokens > room:
            raise PromptError(
                f"{asked} is {prompt_tokens:,} tokens long; with {answer_tokens:,} tokens for the answer, "
                f"{self.model.name} takes at most {room:,}. Shorten the prompt or ask for a shorter answer."
            )
        most = self._scheduler.most_tokens(len(STREAMS))
        if prompt_tokens + answer_tokens > most:
            raise PromptError(
                f"{asked} is {prompt_tokens:,} tokens long and its answer may have {answer_tokens:,}; there is memory "
                f"for {most:,} together. Shorten the prompt or ask for a shorter answer."
            )

    def _second_pass(
        self,
        caller: Caller,
        ids: list[int],
        picture: PictureInputs | None,
        mixture: Deltas | None,
        sampling: Sampling,
    ) -> Iterator[Event]:
        """Two rows: the base model's and the mixture's."""
        streams = [TextStream(self.model.tokenizer) for _ in STREAMS]
        counts = [0] * len(STREAMS)
        started = time.perf_counter()
        for step in caller.decode(ids, [None, mixture], sampling, picture):
            if isinstance(step, Waiting):
                yield step
                continue
            if not step:
                started = time.perf_counter()
            seconds = time.perf_counter() - started
            for row in step:
                counts[row] += 1
            pieces = [(row, text) for row, token in step.items() if (text := streams[row].push(token))]
            for place, (row, text) in enumerate(pieces, 1):
                yield Token(STREAMS[row], text, counts[row], seconds, paired=place < len(pieces))
        seconds = time.perf_counter() - started
        for row, stream in enumerate(streams):
            if text := stream.finish():
                yield Token(STREAMS[row], text, counts[row], seconds)
        base, adapted = (stream.text for stream in streams)
        yield Finished(base, adapted, sum(counts), seconds, sum(counts) / seconds)


def _timed(parts: Parts[Decision]) -> Parts[tuple[Decision, float]]:
    """The first pass, and the seconds that it took, without those of others in between."""
    seconds = 0.0
    while True:
        started = time.perf_counter()
        ended, decision = next_part(parts)
        seconds += time.perf_counter() - started
        if ended:
            return decision, round(seconds, 4)
        yield
