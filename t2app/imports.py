"""Importing large libraries without looking for garbage among what they make."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_imports() -> Iterator[None]:
    """What is made within is kept to the end of the process, and never looked through for garbage.

    Python's collector goes through all objects again and again while they become more. Of a million modules, classes
    and functions that is a fifth of what it takes to import torch and transformers.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
