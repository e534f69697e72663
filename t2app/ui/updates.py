"""What both tabs do alike while something runs in them."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

# How often what waits for the model looks for what else there is to do.
LOAD_POLL_SECONDS = 0.3


class Stops:
    """By which what runs in a tab is stopped, for each session that something runs for."""

    def __init__(self):
        self._running: dict[str | None, threading.Event] = {}

    @contextmanager
    def of(self, session: str | None) -> Iterator[threading.Event]:
        """What is set once somebody stops what runs in this block."""
        stopped = self._running[session] = threading.Event()
        try:
            yield stopped
        finally:
            # A caller of the API may have begun another run by now, which is the one to stop from then on.
            if self._running.get(session) is stopped:
                del self._running[session]

    def stop(self, session: str | None) -> None:
        """Nothing happens where nothing runs."""
        if stopped := self._running.get(session):
            stopped.set()


def run_buttons(running: bool | None) -> list:
    """Updates of the button that starts and of the one that stops; None leaves them as they are."""
    if running is None:
        return [gr.skip(), gr.skip()]
    return [gr.update(interactive=not running), gr.update(interactive=running)]


def failure(error: Exception, what: str) -> str:
    """The sentence for the person who asked; what is not their doing is logged too, as `what` having failed."""
    if not isinstance(error, ValueError):
        logging.getLogger(__name__).error("%s failed", what, exc_info=error)
    return f"⚠️ {error}" if str(error) else f"⚠️ {type(error).__name__}"
