"""What things cost, by the name that the command line uses; one file a bench, imported when it runs."""

from collections.abc import Callable, Iterator
from importlib import import_module

from t2app.bench.figure import Figure

# `first-pass` is the function `bench_first_pass` of `first_pass.py`, and so on.
BENCHES = (
    "decode",
    "profile",
    "edit",
    "start",
    "page",
    "products",
    "training",
    "first-pass",
    "first-token",
    "wordings",
    "search",
    "serve",
    "recommended",
    "basis",
    "model",
    "shape",
)


def bench_named(name: str) -> Callable[[str, str], Iterator[Figure]]:
    """The bench of a name of `BENCHES`: it takes a model's name and a precision, and yields its figures."""
    module = name.replace("-", "_")
    return getattr(import_module(f"t2app.bench.{module}"), f"bench_{module}")
