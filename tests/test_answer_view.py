"""When the page is told of what: tokens that come close together are shown together, and none is lost."""

import subprocess
import sys
import threading
from contextlib import ExitStack

import pytest

from t2app.loading import EngineLoader
from t2app.messages import DEFAULT_DISPATCH, Dispatched, Finished, Token, Waiting
from t2app.models.catalogue import DEFAULT_MODEL
from t2app.ui import answer
from t2app.ui.answer import _UPDATE_SECONDS, _answer, _AnswerView
from t2app.ui.updates import Stops

OUTPUTS = ("answer", "stop", "status", "bars", "reasons", "changes", "adapted", "adapted_statistics", "base")


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the page takes for the time, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(answer.time, "monotonic", lambda: now[0])
    return now


def shown(update: list) -> dict:
    """The texts that an update shows, without what it leaves as it is."""
    return {name: value for name, value in zip(OUTPUTS, update, strict=False) if isinstance(value, str)}


def dispatched() -> tuple[_AnswerView, dict]:
    view = _AnswerView(["math"])
    view.running("Reading the prompt…")
    return view, shown(view.event(Dispatched("math", {"math": 1.0}, None, 0.2)))


def test_tokens_of_one_step_are_shown_together_at_once(clock):
    view, _ = dispatched()
    assert view.event(Token("base", "A", 1, 0.1, paired=True)) is None
    update = shown(view.event(Token("adapted", "B", 1, 0.1)))
    assert (update["base"], update["adapted"]) == ("A", "B")


def test_steps_that_follow_closely_are_shown_by_the_next_update(clock):
    view, _ = dispatched()
    assert view.event(Token("base", "A", 1, 0.1)) is not None
    clock[0] += 0.6 * _UPDATE_SECONDS
    assert view.event(Token("base", " b", 2, 0.13)) is None
    clock[0] += 0.6 * _UPDATE_SECONDS
    assert shown(view.event(Token("base", " c", 3, 0.16)))["base"] == "A b c"
    clock[0] += 0.6 * _UPDATE_SECONDS
    assert view.event(Token("adapted", "B", 4, 0.19)) is None
    # Not a token, but the tokens before it are as new.
    assert shown(view.event(Waiting(1.0)))["adapted"] == "B"


@pytest.mark.parametrize("seconds", [0.0, 2 * _UPDATE_SECONDS], ids=["soon", "after a while"])
def test_others_are_not_said_to_be_served_once_a_token_came(clock, seconds):
    view, before = dispatched()
    view.event(Token("base", "A", 1, 0.1))
    assert "others are served" in shown(view.event(Waiting(1.0)))["status"]
    clock[0] += seconds
    updates = [view.event(Token("base", " b", 2, 1.2)), view.event(Finished("A b", "", 2, 1.2, 1.7))]
    status = [shown(update)["status"] for update in updates if update is not None and "status" in shown(update)]
    assert status == [before["status"]]


def test_token_leaves_the_status_alone_where_nobody_waited(clock):
    view, _ = dispatched()
    assert "status" not in shown(view.event(Token("base", "A", 1, 0.1))), "it would take the place of “Stopped.”"


def test_what_fails_shows_the_tokens_before_it(clock):
    view, _ = dispatched()
    view.event(Token("base", "A", 1, 0.1))
    view.event(Token("base", " b", 2, 0.11))
    update = shown(view.ended("⚠️ Something."))
    assert update["base"] == "A b" and update["status"] == "⚠️ Something."


def test_page_is_imported_without_parsing_the_components_of_gradio():
    program = """
import inspect, sys
own, parsed = inspect.getfile, []
sys.setprofile(lambda frame, *_: parsed.append(frame) if frame.f_code.co_name == "create_pyi" else None)
import t2app.ui
sys.setprofile(None)
sys.exit(bool(parsed) or inspect.getfile is not own)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_answer_that_waits_for_the_model_ends_once_it_is_stopped():
    stopped = threading.Event()
    never_there = EngineLoader(DEFAULT_MODEL, "fp32")
    updates = _answer(never_there, [], None, stopped, "Hello", DEFAULT_DISPATCH, (8, 0.0, 1.0, 0), None, ())
    assert shown(next(updates))["status"] == "Reading the prompt…"
    stopped.set()
    assert [shown(update) for update in updates] == [{"status": "Stopped."}]


def test_a_run_that_ends_leaves_the_one_that_was_begun_after_it_to_be_stopped():
    stops = Stops()
    with ExitStack() as later:
        with stops.of("session") as first:
            second = later.enter_context(stops.of("session"))
        stops.stop("session")
        assert second.is_set() and not first.is_set()
    stops.stop("session")  # nothing runs
