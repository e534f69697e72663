"""Importing large libraries without looking for garbage among what they make."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """What is made within is kept to the end of the process, and never looked through for garbage.

    Python's collector goes through all objects again and again while they become more, and torch, transformers and
    Gradio are hundreds of thousands. `bench start` measures what comes of it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
