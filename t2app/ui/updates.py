"""What both tabs do alike while something runs in them."""

import logging

import gradio as gr


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
