"""Many callers at once: their rows in one batch of the real model in fp32, who waits for whom, and what is refused."""

import os
import queue
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from random_mixtures import random_deltas
from transformers import MistralConfig

from t2app.decoding import Batch, batch, collected, decode, prefix
from t2app.dispatch import Decision, Dispatcher
from t2app.engine import Engine, EngineError, PromptError
from t2app.fair_queue import FairQueue
from t2app.messages import MANUAL, Finished, Limits, Sampling, Token, Waiting
from t2app.models.families import random_model
from t2app.models.model import Model
from t2app.parts import Parts
from t2app.scheduler import Scheduler, cache_bytes_per_token, leave_cores
from t2app.spectral import Deltas, SpectralModel

QUESTIONS = (
    "Compute 12 + 7. Reply with only the number.",
    "Why is the sky blue?",
    "Write one short sentence about a cat, a dog and the sea in winter, please.",
    "Name three rivers.",
)
SAMPLINGS = (
    Sampling(max_new_tokens=14),
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=9, temperature=0.8, top_p=0.9, seed=11),
    Sampling(max_new_tokens=12, temperature=1.0, seed=5),
)
SLIDING = MistralConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=8,
    initializer_range=0.2,
)
PATIENCE = 300  # in seconds; nothing takes that long unless something is wrong


@dataclass
class Asked:
    """A request and what it gives where nobody else asks."""

    prompt: list[int]
    mixtures: list[Deltas | None]
    sampling: Sampling
    alone: list[list[int]]


@pytest.fixture(scope="module")
def asked(real) -> list[Asked]:
    """Requests of different prompts, lengths, mixtures and ways to draw, each with a row of the base model."""
    requests = []
    for seed, (question, sampling) in enumerate(zip(QUESTIONS, SAMPLINGS, strict=True)):
        prompt, mixtures = real.prompt_ids(question), [None, random_deltas(real.adapted, seed)]
        alone = collected(decode(real.adapted, [prompt] * 2, mixtures, sampling, real.eos_ids))
        requests.append(Asked(prompt, mixtures, sampling, alone))
    assert len({len(request.prompt) for request in requests}) > 2
    return requests


@pytest.fixture(autouse=True)
def as_on_a_cpu(monkeypatch) -> None:
    """Prompts in short parts, and steps that are forward passes of the model: on a GPU they may be recorded."""
    monkeypatch.setitem(prefix._PART_TOKENS, "cuda", prefix._PART_TOKENS["cpu"])
    monkeypatch.setattr(batch, "recorder_for", lambda adapted: None)


@pytest.fixture
def passes(real) -> Iterator[list[tuple[int, int, bool]]]:
    """Grows by every forward pass: rows, tokens that are in the cache after it, and whether anything is padded."""
    seen = []

    def note(module, arguments, options, output) -> None:
        padded = options.get("attention_mask") is not None
        seen.append((len(options["input_ids"]), options["cache"].get_seq_length(), padded))

    hook = real.adapted.model.register_forward_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.fixture
def start(real) -> Iterator[Callable[..., Scheduler]]:
    """Makes schedulers of the real model, and closes them."""
    with ExitStack() as stack:

        def make(limits: Limits | None = None, eos_ids: Sequence[int] = real.eos_ids) -> Scheduler:
            scheduler = Scheduler(real.adapted, eos_ids, limits or Limits())
            stack.callback(scheduler.close)
            return scheduler

        yield make


def answered_together(scheduler: Scheduler, requests: Sequence[tuple[str, Asked]]) -> list[list[list[int]]]:
    """The tokens of every row of requests, by user, that come in this order while the scheduler is busy."""
    answers, busy = [[[] for _ in request.mixtures] for _, request in requests], threading.Event()

    def ask(number: int, waits: threading.Event) -> None:
        user, request = requests[number]
        with scheduler.caller(user) as caller:
            for step in caller.decode(request.prompt, request.mixtures, request.sampling):
                if isinstance(step, Waiting):
                    waits.set()
                else:
                    for row, token in step.items():
                        answers[number][row].append(token)

    with scheduler.caller("busy") as caller:
        work = caller.submit(busy.wait)
        while not work.running():
            time.sleep(0.001)
        threads = []
        for number in range(len(requests)):
            waits = threading.Event()
            threads.append(threading.Thread(target=ask, args=(number, waits)))
            threads[-1].start()
            assert waits.wait(PATIENCE)
        busy.set()
        for thread in threads:
            thread.join(PATIENCE)
    return answers


def short(request: Asked, tokens: int = 3) -> Asked:
    return replace(request, sampling=Sampling(max_new_tokens=tokens))


def at_once(*calls: Callable[[], object]) -> list:
    """What these give when they are called in a thread each."""
    results = [None] * len(calls)

    def call(number: int) -> None:
        results[number] = calls[number]()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results


def admit(batch: Batch, request: Asked, rows: dict[int, list[int]]) -> None:
    first = batch.admit([request.prompt] * 2, request.mixtures, request.sampling)
    rows.update({number: [token] for number, token in first.items()})


def step(batch: Batch, rows: dict[int, list[int]]) -> None:
    for number, token in batch.step().items():
        rows[number].append(token)


def test_rows_that_join_and_leave_at_any_moment_give_what_they_give_alone(real, asked):
    batch, rows = Batch(real.adapted, real.eos_ids), {}
    for request, steps in zip(asked, (3, 1, 2, 4), strict=True):
        admit(batch, request, rows)
        for _ in range(steps):
            step(batch, rows)
    # Two rows of different requests go before their end.
    gone = {1, 2} & batch.running
    assert gone
    batch.drop(gone)
    while batch:
        step(batch, rows)
    for number, tokens in rows.items():
        expected = asked[number // 2].alone[number % 2]
        assert tokens == (expected[: len(tokens)] if number in gone else expected), number


def test_cache_of_the_longest_row_is_given_back_when_it_leaves(real, asked, passes):
    long = replace(asked[2], sampling=Sampling(max_new_tokens=4))
    short = min(asked[:2], key=lambda request: len(request.prompt))
    batch, rows = Batch(real.adapted, ()), {}
    admit(batch, long, rows)
    admit(batch, short, rows)
    passes.clear()
    step(batch, rows)
    assert passes[-1] == (4, len(long.prompt) + 1, True)
    while len(batch) == 4:
        step(batch, rows)
    step(batch, rows)
    # What is left has the same length: nothing is padded any more, so that it is the quicker way again.
    assert passes[-1] == (2, len(short.prompt) + len(rows[2]) - 1, False)


def test_sliding_windows_are_joined_and_trimmed_as_whole_contexts_are():
    adapted = SpectralModel(random_model(SLIDING), {})
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 96, (length,), generator=generator).tolist() for length in (21, 4, 11)]
    samplings = [Sampling(max_new_tokens=6), Sampling(max_new_tokens=30), Sampling(max_new_tokens=14)]
    batch, rows = Batch(adapted, ()), {}
    for prompt, sampling in zip(prompts, samplings, strict=True):
        rows |= {number: [token] for number, token in batch.admit([prompt], [None], sampling).items()}
        step(batch, rows)
    while batch:
        step(batch, rows)
    alone = [collected(decode(adapted, [p], [None], s, ())) for p, s in zip(prompts, samplings, strict=True)]
    assert [[rows[number]] for number in range(3)] == alone


def test_callers_at_once_are_given_what_each_is_given_alone(start, asked, passes):
    requests = [(f"user {number}", request) for number, request in enumerate(asked)]
    assert answered_together(start(), requests) == [request.alone for request in asked]
    assert max(rows for rows, _, _ in passes) > 2, "they were answered one after another"


def test_rows_of_a_caller_that_leaves_are_gone_with_the_step_that_runs(start, asked, passes):
    scheduler = start(eos_ids=())
    long = Sampling(max_new_tokens=400)
    with scheduler.caller("stays") as stays:
        kept = stays.decode(asked[1].prompt, [None], long)
        next(kept)
        with scheduler.caller("leaves") as leaves:
            stream = leaves.decode(asked[0].prompt, asked[0].mixtures, long)
            while not any(rows == 3 for rows, _, _ in passes):
                next(stream)
        before = len(passes)
        while len(passes) < before + 4:
            next(kept)
    # The step that was running when it left may have had its rows, none after it.
    assert [rows for rows, _, _ in passes[before + 1 :]] == [1] * len(passes[before + 1 :])


def test_long_prompt_is_run_in_parts_between_the_steps_of_others(start, real, asked, passes):
    prompt, mixtures, sampling = (asked[2].prompt * 20)[:300], asked[2].mixtures, Sampling(max_new_tokens=3)
    alone = collected(decode(real.adapted, [prompt] * 2, mixtures, sampling, ()))
    passes.clear()
    scheduler, rows = start(eos_ids=()), [[], []]
    with scheduler.caller("first") as first, scheduler.caller("second") as second:
        steps = first.decode(asked[0].prompt, asked[0].mixtures, Sampling(max_new_tokens=500))
        assert [len(next(steps)) for _ in range(2)] == [0, 2]
        for step in second.decode(prompt, mixtures, sampling):
            if not isinstance(step, Waiting):
                for row, token in step.items():
                    rows[row].append(token)
    assert rows == alone
    # A part is 128 tokens of both rows; what the first caller's rows have seen is shorter, until they are padded.
    parts = [length for rows, length, padded in passes if rows == 2 and length >= 128]
    assert parts == [128, 256, 300]
    lengths = [length for _, length, _ in passes]
    between = [lengths[lengths.index(part) + 1] for part in parts]
    assert between[0] < between[1] < 128 and between[2] == 301


def test_short_prompt_beside_a_long_one_waits_for_a_part_of_it_only(start, real, asked, passes):
    long = (asked[2].prompt * 40)[:600]
    scheduler, seen = start(eos_ids=()), []

    def ask(user: str, prompt: list[int], after: threading.Event, entered: threading.Event) -> None:
        assert after.wait(PATIENCE)
        with scheduler.caller(user) as caller:
            for step in caller.decode(prompt, asked[2].mixtures, Sampling(max_new_tokens=1)):
                if step == {}:
                    entered.set()
                elif not isinstance(step, Waiting):
                    seen.append(user)

    begun, done = threading.Event(), threading.Event()
    begun_at_once = threading.Event()
    begun_at_once.set()
    at_once(lambda: ask("long", long, begun_at_once, begun), lambda: ask("short", asked[0].prompt, begun, done))
    assert seen == ["short", "long"]
    lengths = [length for _, length, _ in passes]
    # A part is 128 tokens of both rows; the long prompt's first one was being run, and a slow thread asks a part later.
    assert lengths.index(len(asked[0].prompt)) <= 2 and lengths[-1] == 600


def test_users_take_turns_with_the_parts_of_their_prompts(start, asked, passes):
    long = short(replace(asked[2], prompt=(asked[2].prompt * 30)[:400], alone=[]), 1)
    other = replace(long, prompt=long.prompt[:300])
    answered_together(start(eos_ids=()), [("greedy", long), ("greedy", long), ("other", other)])
    lengths = [length for _, length, _ in passes]
    assert lengths.index(300) < lengths.index(400), "the two prompts of one user had more turns than the other user's"


def test_caller_that_leaves_while_its_prompt_is_run_has_the_rest_of_it_not_run(start, asked, passes):
    scheduler = start()
    with scheduler.caller("leaves") as caller:
        assert next(caller.decode(asked[0].prompt * 50, asked[0].mixtures, Sampling(max_new_tokens=3))) == {}
    assert answered_together(scheduler, [("stays", asked[1])]) == [asked[1].alone]
    assert max(length for _, length, _ in passes) < len(asked[0].prompt * 50) // 2


def test_users_take_turns_and_each_is_served_in_its_own_order():
    waiting = FairQueue()
    for number in range(4):
        waiting.push("greedy", f"greedy {number}")
    waiting.push("late", "late 0")
    waiting.push("greedy", "greedy 4")
    waiting.push("late", "late 1")
    waiting.remove("greedy", "greedy 1")
    taken = []
    while waiting:
        assert waiting.first() not in taken
        taken.append(waiting.pop())
    assert taken == ["greedy 0", "late 0", "greedy 2", "late 1", "greedy 3", "greedy 4"]


@pytest.fixture
def let_in(real) -> Iterator[list[list[int]]]:
    """Grows by every prompt that is run."""
    prompts = []

    def note(module, arguments, options) -> None:
        if options["input_ids"].shape[1] > 1:
            prompts.append(options["input_ids"][0].tolist())

    hook = real.adapted.model.register_forward_pre_hook(note, with_kwargs=True)
    yield prompts
    hook.remove()


def test_user_with_many_requests_does_not_keep_others_waiting(start, asked, let_in):
    mine, other = short(asked[0]), short(asked[1])
    answered_together(start(Limits(rows=2), eos_ids=()), [*[("greedy", mine)] * 4, ("other", other)])
    assert let_in == [mine.prompt, other.prompt, mine.prompt, mine.prompt, mine.prompt]


def test_request_that_is_too_large_for_now_is_not_overtaken(start, real, asked, let_in):
    first, large, small = short(asked[0]), short(asked[2], 24), short(asked[1])
    room = 2 * (len(large.prompt) + 24) * cache_bytes_per_token(real.adapted)
    requests = [("first", first), ("large", large), *((f"small {number}", small) for number in range(3))]
    answered_together(start(Limits(cache_bytes=room), eos_ids=()), requests)
    assert let_in == [first.prompt, large.prompt, *[small.prompt] * 3]


def test_no_more_is_decoded_at_a_time_than_the_limits_allow(start, real, asked, passes):
    tokens = max(len(request.prompt) + request.sampling.max_new_tokens for request in asked)
    for limits, most_rows in (
        (Limits(rows=5), 5),
        (Limits(cache_bytes=6 * tokens * cache_bytes_per_token(real.adapted)), 6),
    ):
        passes.clear()
        answers = answered_together(start(limits), [("somebody", request) for request in asked])
        assert answers == [request.alone for request in asked]
        assert 2 < max(rows for rows, _, _ in passes) <= most_rows
        assert all(rows * seen <= 6 * tokens for rows, seen, _ in passes)


def test_cache_takes_the_bytes_a_token_that_it_is_counted_with(real, asked):
    caches = []
    hook = real.adapted.model.register_forward_pre_hook(
        lambda module, arguments, options: caches.append(options["cache"]), with_kwargs=True
    )
    request = short(asked[0], 1)
    collected(decode(real.adapted, [request.prompt], [None], request.sampling, ()))
    hook.remove()
    held = sum(tensor.nbytes for layer in caches[-1].layers for tensor in (layer.keys, layer.values))
    assert held == len(request.prompt) * cache_bytes_per_token(real.adapted)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"rows": 1}, "rows is 1; at least 2"), ({"cache_bytes": 0}, "cache_bytes is 0; at least 1")],
)
def test_limits_out_of_range_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Limits(**settings)


def test_what_never_fits_is_refused_at_once(start, real, asked):
    scheduler = start(Limits(cache_bytes=2 * 50 * cache_bytes_per_token(real.adapted)))
    assert scheduler.most_tokens(2) == 50
    with scheduler.caller("somebody") as caller:
        stream = caller.decode(asked[0].prompt, asked[0].mixtures, Sampling(max_new_tokens=100))
        with pytest.raises(ValueError, match="2 rows of .* tokens never fit; 2 rows may have 50 each"):
            next(stream)


def test_preparations_are_made_while_nothing_is_asked_for_and_one_that_fails_harms_nobody(tiny, caplog):
    scheduler, made, passes = Scheduler(tiny.adapted, (), Limits()), queue.SimpleQueue(), []
    hook = tiny.adapted.model.register_forward_hook(lambda *_: passes.append(None))

    def prepare(*parts: str) -> Parts[None]:
        for part in parts:
            made.put((part, len(passes)))
            yield

    def fail() -> Parts[None]:
        yield
        raise RuntimeError("this preparation fails")

    def ask(tokens: int, *preparations: Parts[None]) -> None:
        with scheduler.caller("somebody") as caller:
            steps = caller.decode([5, 6, 7], [None], Sampling(max_new_tokens=tokens))
            next(steps)
            for preparation in preparations:
                scheduler.when_idle(preparation)
            assert len(list(steps)) == tokens

    try:
        ask(300, prepare("first", "second"), fail(), prepare("third"))
        parts = [made.get(timeout=PATIENCE) for _ in range(3)]
        assert parts == [("first", 300), ("second", 300), ("third", 300)], "the answer was made in 300 passes"
        ask(4)
    finally:
        scheduler.close()
        hook.remove()
    assert "this preparation fails" in caplog.text


def test_closing_does_not_wait_for_preparations(tiny):
    scheduler, begun = Scheduler(tiny.adapted, (), Limits()), threading.Event()

    def prepare() -> Parts[None]:
        while True:
            begun.set()
            yield

    scheduler.when_idle(prepare())
    assert begun.wait(PATIENCE)
    scheduler.close()


# The engine: what is promised to callers, on a small model.

SHORT = Sampling(max_new_tokens=12)
LONG = Sampling(max_new_tokens=300)
PROMPT_TEXT = "Why is the sky blue?"


def endless(model: Model) -> Model:
    """The same where no token ends an answer."""
    return replace(model, eos_ids=())


def texts(events: Sequence) -> tuple[str, str]:
    assert isinstance(events[-1], Finished)
    return events[-1].base, events[-1].adapted


def answer(engine: Engine, dispatcher=None, sampling: Sampling = SHORT, user: str = "somebody") -> list:
    return list(engine.answer(PROMPT_TEXT, dispatcher or engine.dispatcher(MANUAL, {}), sampling, user=user))


def test_prompt_without_memory_for_its_answer_is_refused_with_a_sentence(tiny):
    engine = Engine(tiny, Limits(cache_bytes=2 * 60 * cache_bytes_per_token(tiny.adapted)))
    assert isinstance(answer(engine)[-1], Finished)
    with pytest.raises(PromptError, match="its answer may have 200; there is memory for 60 together. Shorten"):
        answer(engine, sampling=Sampling(max_new_tokens=200))


class Failing(Dispatcher):
    """A first pass that fails in its second part."""

    name = "failing"

    def deciding(self, prompt: str) -> Parts[Decision]:
        yield
        raise RuntimeError("this first pass fails")


class Slow(Dispatcher):
    """A first pass that goes on until `end` is set; without experts nothing is to be decided."""

    name = "slow"

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def deciding(self, prompt: str) -> Parts[Decision]:
        yield
        self.begun.set()
        assert self.end.wait(PATIENCE)
        return Decision(None, {})


def test_first_pass_that_fails_is_its_callers_own_affair(tiny):
    engine = Engine(endless(tiny))
    expected = texts(answer(engine, sampling=LONG))
    stream = engine.answer(PROMPT_TEXT, engine.dispatcher(MANUAL, {}), LONG)
    events = [next(stream), next(stream)]
    with pytest.raises(RuntimeError, match="this first pass fails"):
        answer(engine, Failing())
    assert texts([*events, *stream]) == expected


def test_first_pass_and_answer_of_one_come_between_the_tokens_of_another(tiny):
    engine = Engine(endless(tiny))
    long = threading.Thread(target=answer, args=(engine,), kwargs={"sampling": Sampling(max_new_tokens=400)})
    long.start()
    assert isinstance(answer(engine, sampling=Sampling(max_new_tokens=2))[-1], Finished)
    assert long.is_alive()
    long.join(PATIENCE)


def test_step_that_fails_is_told_to_all_whose_rows_were_in_it_and_the_next_are_answered(tiny):
    engine = Engine(endless(tiny))
    expected = texts(answer(engine))
    streams = [engine.answer(PROMPT_TEXT, engine.dispatcher(MANUAL, {}), LONG) for _ in range(2)]
    for stream in streams:
        while not isinstance(next(stream), Token):
            pass

    def fall_short(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = tiny.adapted.model.model.layers[1].register_forward_pre_hook(fall_short)
    for stream in streams:
        with pytest.raises(EngineError, match="The GPU's memory did not suffice"):
            list(stream)
    hook.remove()
    assert texts(answer(engine)) == expected


@pytest.fixture
def busy(tiny) -> Iterator[tuple[Engine, Slow, Callable[[], list]]]:
    """An engine with room for one answer, the first pass that it is busy with, and the events of that answer."""
    engine, slow, events = Engine(tiny, Limits(rows=2)), Slow(), []
    thread = threading.Thread(target=lambda: events.extend(answer(engine, slow, user="busy")))
    thread.start()
    assert slow.begun.wait(PATIENCE)

    def finished() -> list:
        slow.end.set()
        thread.join(PATIENCE)
        return events

    yield engine, slow, finished
    finished()


def test_who_waits_for_others_hears_so_and_can_leave(tiny, busy):
    engine, _, finished = busy
    stream = engine.answer(PROMPT_TEXT, engine.dispatcher(MANUAL, {}), SHORT)
    first, second = next(stream), next(stream)
    assert isinstance(first, Waiting) and second.seconds > first.seconds
    stream.close()
    rows = []
    hook = tiny.adapted.model.register_forward_hook(
        lambda module, arguments, options, output: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    assert isinstance(finished()[-1], Finished)
    engine.close()
    hook.remove()
    # The answer that the engine was busy with: the beginning of its prompt, and a pass a token.
    assert len(rows) <= 1 + SHORT.max_new_tokens and set(rows) <= {1, 2}


def test_engine_that_closes_answers_those_who_wait_and_nobody_else(busy):
    engine, slow, finished = busy
    manual = engine.dispatcher(MANUAL, {})
    streams = [engine.answer(PROMPT_TEXT, manual, SHORT, user=user) for user in "abc"]
    for stream in streams:
        assert isinstance(next(stream), Waiting)
    closing = threading.Thread(target=engine.close)
    closing.start()
    with pytest.raises(EngineError, match="Another model is taking the place of this one"):
        while isinstance(next(engine.answer(PROMPT_TEXT, manual, SHORT)), Waiting):
            pass
    assert closing.is_alive()
    slow.end.set()
    waited = at_once(*(lambda stream=stream: list(stream) for stream in streams))
    expected = texts(finished())
    assert [texts(events) for events in waited] == [expected] * 3
    closing.join(PATIENCE)
    with pytest.raises(EngineError, match="Another model is taking the place of this one"):
        answer(engine, manual)


def test_closed_scheduler_holds_nothing_of_the_model():
    model, threads = random_model(SLIDING), set(threading.enumerate())
    scheduler, freed = Scheduler(SpectralModel(model, {}), (), Limits()), weakref.ref(model)
    del model
    with scheduler.caller("somebody") as caller:
        assert len(list(caller.decode([5, 6, 7], [None], Sampling(max_new_tokens=4)))) == 5
    scheduler.close()
    assert freed() is None and not set(threading.enumerate()) - threads


@pytest.mark.parametrize("seconds", [0.305, 0.31])
def test_python_ends_well_while_an_idle_thread_lets_go_of_a_large_model(seconds):
    script = f"""
        import time
        from transformers import LlamaConfig
        from t2app import scheduler
        from t2app.models.families import random_model
        from t2app.messages import Limits, Sampling
        from t2app.spectral import SpectralModel

        scheduler._IDLE_SECONDS = 0.3
        config = LlamaConfig(
            vocab_size=96, hidden_size=512, intermediate_size=1024, num_hidden_layers=40, num_attention_heads=8
        )
        running = scheduler.Scheduler(SpectralModel(random_model(config), {{}}), (), Limits())
        with running.caller("somebody") as caller:
            list(caller.decode([5, 6, 7], [None], Sampling(max_new_tokens=2)))
        del running, caller
        time.sleep({seconds})
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, timeout=PATIENCE, cwd=Path(__file__).parents[1])


def test_thread_that_loaded_the_model_leaves_the_cores_to_the_one_that_runs_it():
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        torch.ones(2_000_000).add_(1)
        computing = threads()
        leave_cores()
        deadline = time.monotonic() + PATIENCE
        while threads() > computing - 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert threads() <= computing - 3
    finally:
        torch.set_num_threads(before)
