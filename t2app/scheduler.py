"""Many callers at once: one thread runs the model, a step of all running rows at a time, and lets others in between.

Every row carries its own mixture, so the answers of different callers are rows of one batch, which requests join and
leave at token boundaries (continuous batching). transformers' own continuous batching packs the tokens of all requests
into one row and draws from one generator: there is no row left to have a mixture, and company would change the draws.

A prompt is run in parts, so that a long one keeps nobody waiting for their next token, nor for their first. Whatever
else runs the model, such as a part of a first pass or a round of a search, is a piece of work that is done between two
steps. Work, requests that wait to be let in and prompts that are run stand in queues, in each of which the users take
turns; in the first two nobody overtakes the first one in turn. Where nobody waits for anything, what makes later work
faster is done, a part at a time.
This file knows token ids and mixtures, and nothing of prompts or experts.
"""

import atexit
import ctypes
import gc
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from t2app.decoding import Batch, Beginnings, run_in_parts
from t2app.fair_queue import FairQueue
from t2app.machine import memory_bytes
from t2app.messages import Limits, Sampling, Waiting
from t2app.models.vision import PictureInputs
from t2app.parts import Parts, next_part
from t2app.spectral import Deltas, SpectralModel

# How long a caller waits for others until it says so. Whoever reads a stream can close it then.
_PATIENCE_SECONDS = 0.3
# How long the thread stays with nothing to do: the next request mostly follows soon.
_IDLE_SECONDS = 5.0
# OpenMP's number for resources that are had again when they are needed.
_OMP_PAUSE_SOFT = 1
# Of the memory that the model leaves free: joining rows needs room for what is there and for what comes of it.
_CACHE_SHARE = 0.5

# Threads that may still let go of what they ran when Python ends, which would end it with a crash.
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()

_T = TypeVar("_T")


class EngineError(ValueError):
    """The engine cannot answer now; the message is for the person who asked."""


@dataclass(eq=False)
class _Request:
    """Rows to be decoded, one for each mixture, and what their caller reads: steps, then None or what went wrong.

    Attributes:
        parts: of running its prompt, once that has begun; they give the first tokens of its rows.
    """

    user: Hashable
    prompt: Sequence[int]
    mixtures: Sequence[Deltas | None]
    sampling: Sampling
    picture: PictureInputs | None
    steps: "queue.SimpleQueue[dict[int, int] | Exception | None]" = field(default_factory=queue.SimpleQueue)
    parts: Parts[dict[int, int]] | None = None
    cancelled: bool = False

    @property
    def tokens(self) -> int:
        """Of the prompt and the longest answer together."""
        return len(self.prompt) + self.sampling.max_new_tokens


class Caller:
    """Somebody who has the model run; made by `Scheduler.caller`, and of no use after that block."""

    def __init__(self, scheduler: "Scheduler", user: Hashable):
        self._scheduler, self._user = scheduler, user
        self._work: Future | None = None
        self._request: _Request | None = None

    def submit(self, work: Callable[[], _T]) -> "Future[_T]":
        """Have something run between two steps, with the model for itself."""
        self._work = Future()
        self._scheduler._add_work(self._user, self, self._work, work)
        return self._work

    def run_in_parts(self, parts: Parts[_T]) -> Generator[Waiting, None, _T]:
        """`run` for work in parts, between which others are served.

        Raises:
            EngineError: the GPU's memory did not suffice.
        """
        while True:
            ended, result = yield from self.run(partial(next_part, parts))
            if ended:
                return result

    def run(self, work: Callable[[], _T]) -> Generator[Waiting, None, _T]:
        """`submit`, yielding that others are served while they are; returns what `work` gives, and raises what it does.

        Raises:
            EngineError: the GPU's memory did not suffice.
        """
        submitted = self.submit(work)
        started = time.perf_counter()
        while not wait([submitted], _PATIENCE_SECONDS).done:
            if not submitted.running() and self._scheduler.has_others:
                yield Waiting(time.perf_counter() - started)
        return submitted.result()

    def decode(
        self,
        prompt: Sequence[int],
        mixtures: Sequence[Deltas | None],
        sampling: Sampling,
        picture: PictureInputs | None = None,
    ) -> Iterator[dict[int, int] | Waiting]:
        """Answer a prompt with a row for each mixture, in the batch of all callers.

        Yields no token at first, when the prompt is begun; then the tokens of every step by row, as `decode` does; and
        in between that others are served, while they are.

        Raises:
            ValueError: so many rows and tokens never fit; see `Scheduler.most_tokens`.
            EngineError: the GPU's memory did not suffice.
        """
        request = self._request = _Request(self._user, prompt, mixtures, sampling, picture)
        self._scheduler._add_request(request)
        started = time.perf_counter()
        while True:
            try:
                step = request.steps.get(timeout=_PATIENCE_SECONDS)
            except queue.Empty:
                served = request.parts is not None and self._scheduler.serving in (None, self)
                if not served and self._scheduler.has_others:
                    yield Waiting(time.perf_counter() - started)
                continue
            if step is None:
                return
            if isinstance(step, Exception):
                raise step
            yield step

    def cancel(self) -> None:
        """Let go of what was asked for; rows that are running leave before the next step."""
        if self._work is not None:
            self._work.cancel()
        if self._request is not None:
            self._scheduler._cancel(self._request)


class Scheduler:
    """Runs a model for all callers, on one thread that is there while there is something to do.

    It is made by the thread that loaded the model, which is expected to compute nothing more.

    Attributes:
        closed: whether nobody new is let in.
        serving: the caller whose work is run at the moment, None where there is none.

    Args:
        eos_ids: token ids that end an answer.
        beginning: token ids that most prompts begin with; see `Beginnings`.
    """

    def __init__(self, adapted: SpectralModel, eos_ids: Sequence[int], limits: Limits, beginning: Sequence[int] = ()):
        self._adapted, self._eos_ids = adapted, eos_ids
        self._rows = limits.rows
        self._cache_bytes = _spare_bytes(adapted) if limits.cache_bytes is None else limits.cache_bytes
        self._token_bytes = cache_bytes_per_token(adapted)
        self._changed = threading.Condition()
        self._work: FairQueue[tuple[Caller, Future, Callable]] = FairQueue()
        self._waiting: FairQueue[_Request] = FairQueue()
        self._preparations: deque[Parts[None]] = deque()
        self._callers = 0
        self.closed = self._stopped = False
        self._thread: threading.Thread | None = None
        self.serving: Caller | None = None
        # Touched by the thread alone: what prompts begin with, the requests whose prompts are run, the batch, and whose
        # its rows are, by the row's number: the request and its row.
        self._beginnings = Beginnings(adapted, beginning)
        self._entering: FairQueue[_Request] = FairQueue()
        self._batch = Batch(adapted, eos_ids)
        self._running: dict[int, tuple[_Request, int]] = {}
        leave_cores()

    def most_tokens(self, rows: int) -> int:
        """How many tokens a prompt and its answer may have together where they are decoded in so many rows."""
        return self._cache_bytes // (rows * self._token_bytes) if rows <= self._rows else 0

    @property
    def has_others(self) -> bool:
        """Whether there is more than one caller."""
        return self._callers > 1

    @contextmanager
    def caller(self, user: Hashable) -> Iterator[Caller]:
        """Somebody who has the model run for the time of a block; whatever is not done at its end is cancelled.

        Raises:
            EngineError: the scheduler was closed.
        """
        with self._changed:
            if self.closed:
                raise EngineError("Another model is taking the place of this one; ask again when it is ready.")
            self._callers += 1
        caller = Caller(self, user)
        try:
            yield caller
        finally:
            caller.cancel()
            with self._changed:
                self._callers -= 1
                self._changed.notify_all()

    def when_idle(self, preparation: Parts[None]) -> None:
        """Have something done whenever there is nothing else to do; where it fails it is left as far as it came."""
        with self._changed:
            self._preparations.append(preparation)
            self._wake()

    def close(self) -> None:
        """Let nobody new in, wait until those who are in have left, and let go of the model."""
        with self._changed:
            self.closed = True
            self._changed.wait_for(lambda: not self._callers)
        self._stop()
        self._beginnings = self._entering = self._batch = self._adapted = self._preparations = None
        free_memory()

    def _add_work(self, user: Hashable, caller: Caller, future: Future, work: Callable) -> None:
        with self._changed:
            self._work.push(user, (caller, future, work))
            self._wake()

    def _add_request(self, request: _Request) -> None:
        most = self.most_tokens(len(request.mixtures))
        if request.tokens > most:
            rows = len(request.mixtures)
            raise ValueError(f"{rows} rows of {request.tokens} tokens never fit; {rows} rows may have {most} each")
        with self._changed:
            self._waiting.push(request.user, request)
            self._wake()

    def _cancel(self, request: _Request) -> None:
        with self._changed:
            request.cancelled = True
            self._waiting.remove(request.user, request)

    def _wake(self) -> None:
        """Have the thread look at the queues, which the caller holds the lock of."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
            # A thread that is in the middle of a step when Python ends would end it with a crash.
            atexit.register(self._stop)
            self._thread.start()
            _threads.add(self._thread)
        self._changed.notify_all()

    def _stop(self) -> None:
        """End the thread, after the step that it is in."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        """The thread: in turns a piece of work, a part of a prompt, and a step of all that run."""
        served = None
        while self._wait_for_something():
            if not self._is_asked:
                self._prepare()
                continue
            self._drop_cancelled()
            with self._changed:
                work = self._work.pop() if self._work else None
                if self._waiting and self._fits(self._waiting.first()):
                    request = self._waiting.pop()
                    self._entering.push(request.user, request)
            if work is not None:
                self._do(*work)
            # Whoever came meanwhile is before the one whose turn it was.
            if self._entering and self._entering.first() is served:
                self._entering.push(served.user, self._entering.pop())
            if self._entering:
                served = self._entering.first()
                self._let_in(served)
            if self._running:
                self._step()

    def _wait_for_something(self) -> bool:
        """Whether there is something to do; where there is not, this thread ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_something, _IDLE_SECONDS)
            if not self._stopped and self._has_something:
                return True
            self._thread = None
            atexit.unregister(self._stop)
            return False

    @property
    def _has_something(self) -> bool:
        return self._is_asked or bool(self._preparations)

    @property
    def _is_asked(self) -> bool:
        return bool(self._work or self._waiting or self._entering or self._running)

    def _fits(self, request: _Request) -> bool:
        """Whether a request's rows fit beside those that are in, once all of them are as long as the longest gets."""
        together = {request, *self._entering, *(other for other, _ in self._running.values())}
        rows = len(self._running) + sum(len(other.mixtures) for other in (request, *self._entering))
        return max(other.tokens for other in together) <= self.most_tokens(rows)

    def _prepare(self) -> None:
        done, failure = _attempt(partial(next_part, self._preparations[0]))
        if failure is not None:
            logging.getLogger(__name__).warning("a preparation failed", exc_info=failure)
        if failure is not None or done[0]:
            self._preparations.popleft()

    def _do(self, caller: Caller, future: Future, work: Callable) -> None:
        if not future.set_running_or_notify_cancel():
            return
        self.serving = caller
        result, failure = _attempt(work)
        self.serving = None
        if failure is None:
            future.set_result(result)
        else:
            future.set_exception(failure)

    def _let_in(self, request: _Request) -> None:
        """Run a part of the prompt whose turn it is, this request's; with the last one its rows join the batch."""
        if request.parts is None:
            request.parts = self._entered(request)
            request.steps.put({})
        done, failure = _attempt(partial(next_part, request.parts))
        ended, tokens = (True, {}) if failure is not None else done
        if not ended:
            return
        self._entering.pop()
        if failure is not None:
            request.steps.put(failure)
            return
        self._running |= {number: (request, row) for row, number in enumerate(tokens)}
        self._deliver(tokens)

    def _entered(self, request: _Request) -> Parts[dict[int, int]]:
        """Run a request's prompt and let its rows join the batch: their first tokens."""
        left, mixtures, prefix = request.prompt, request.mixtures, None
        if request.picture is None:  # one is seen in a single pass
            prefix = self._beginnings.prefix_of(left, mixtures)
            left = left[0 if prefix is None else prefix.length :]
            left, prefix = yield from run_in_parts(self._adapted, left, mixtures, prefix)
        prompts = [left] * len(mixtures)
        return self._batch.admit(prompts, mixtures, request.sampling, prefix=prefix, picture=request.picture)

    def _step(self) -> None:
        tokens, failure = _attempt(self._batch.step)
        if failure is None:
            self._deliver(tokens)
        else:
            self._give_up(failure)

    def _drop_cancelled(self) -> None:
        for request in [request for request in self._entering if request.cancelled]:
            self._entering.remove(request.user, request)
        cancelled = {number for number, (request, _) in self._running.items() if request.cancelled}
        if not cancelled:
            return
        _, failure = _attempt(lambda: self._batch.drop(cancelled))
        if failure is not None:
            self._give_up(failure)
            return
        for number in cancelled:
            del self._running[number]

    def _deliver(self, tokens: dict[int, int]) -> None:
        """Give everybody the tokens of their rows, and the end where no row goes on."""
        steps: dict[_Request, dict[int, int]] = {}
        for number, token in tokens.items():
            request, row = self._running[number]
            steps.setdefault(request, {})[row] = token
        running = self._batch.running
        self._running = {number: whose for number, whose in self._running.items() if number in running}
        going_on = {request for request, _ in self._running.values()}
        for request, step in steps.items():
            request.steps.put(step)
            if request not in going_on:
                request.steps.put(None)

    def _give_up(self, failure: Exception) -> None:
        """Tell all whose rows were running, which shared what failed; those that wait get a new batch."""
        requests = {request for request, _ in self._running.values()}
        self._running = {}
        self._batch = Batch(self._adapted, self._eos_ids)
        free_memory()
        for request in requests:
            request.steps.put(failure)


@atexit.register
def _wait_for_threads() -> None:
    """Comes after every scheduler's own end, which is registered later: threads that are not idle have been stopped."""
    for thread in list(_threads):
        thread.join()


def cache_bytes_per_token(adapted: SpectralModel) -> int:
    """Of one row, with keys and values in all blocks: at most, since a sliding window keeps fewer tokens."""
    config = adapted.model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * adapted.model.dtype.itemsize


def leave_cores() -> None:
    """End the threads that torch has computed with on behalf of this one.

    OpenMP (GCC's, which torch comes with on Linux) keeps a team of them for every thread that has computed. Once all
    teams together are larger than the number of cores, their members go to sleep after each operation, and a step takes
    nearly twice as long.
    """
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        ctypes.CDLL(str(library)).omp_pause_resource_all(_OMP_PAUSE_SOFT)


def free_memory() -> None:
    """Free what nothing refers to any more, and give the GPUs' share of it back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _spare_bytes(adapted: SpectralModel) -> int:
    """The share for caches of the memory that this machine has beside the model."""
    return max(int(_CACHE_SHARE * (memory_bytes() - adapted.model.get_memory_footprint())), 0)


def _attempt(work: Callable[[], _T]) -> tuple[_T | None, Exception | None]:
    """What `work` gives, or what is to be raised to whom it was for."""
    try:
        return work(), None
    except torch.OutOfMemoryError:
        # Left behind here: the error would keep the frames that it came through, and these what did not fit.
        pass
    except Exception as error:  # noqa: BLE001  whatever it was, it is the caller's and not the other callers'
        return None, error
    free_memory()
    return None, EngineError(
        "The GPU's memory did not suffice; what was computed is freed. Ask for a shorter answer or with a shorter "
        "prompt, or load the model in 4-bit (--precision 4bit)."
    )
