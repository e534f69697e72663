"""Imports Gradio without what it does for editors alone; the package imports this before anything else of the page.

While one of its components' classes is made, Gradio parses the source of that class and writes a type stub (`.pyi`)
beside it: half of what the import takes. It leaves that out for a class without a file.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _classes_without_files() -> Iterator[None]:
    own = inspect.getfile

    def getfile(thing: object) -> str:
        if str(getattr(thing, "__module__", None)).startswith("gradio."):
            raise OSError("Gradio is imported without its stubs")
        return own(thing)

    inspect.getfile = getfile
    try:
        yield
    finally:
        inspect.getfile = own


with _classes_without_files():
    import gradio  # noqa: F401
