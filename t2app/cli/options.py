"""Options that several commands share, what their values may be, and the model that they name."""

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from t2app.found_mixtures import mixture_file, read_mixture
from t2app.messages import DISPATCHERS, check_weights, few_shot, mixture_name
from t2app.models.catalogue import DEFAULT_MODEL, EXPERTS_OF_HELP, PRECISIONS
from t2app.tasks.benchmark_data import DATA_DIR_VARIABLE

if TYPE_CHECKING:
    from t2app.models.model import Model

# What `add_subparsers` gives: every command adds its own parser to it.
Commands = argparse._SubParsersAction


def json_option() -> argparse.ArgumentParser:
    """For `parents`, as the other functions here: how a command prints."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--json", action="store_true", help="print one JSON object a line and nothing else")
    return options


def model_options() -> argparse.ArgumentParser:
    """Which model, held in what, and how the command prints."""
    options = argparse.ArgumentParser(add_help=False, parents=[json_option()])
    options.add_argument(
        "--model", default=DEFAULT_MODEL, help="a catalogue name, a hub name, a local folder or a GGUF file of either"
    )
    options.add_argument("--precision", choices=PRECISIONS, default="auto", help="what the weights are held in")
    return options


def data_option() -> argparse.ArgumentParser:
    """Where benchmark data lies."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--data", type=Path, metavar="DIR", help=f"benchmark data (default: ${DATA_DIR_VARIABLE}, the hub)"
    )
    return options


def pool_option() -> argparse.ArgumentParser:
    """Whose experts."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--experts-of", metavar="NAME", help=EXPERTS_OF_HELP)
    return options


def weights_option() -> argparse.ArgumentParser:
    """Weights by hand."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--weights", type=_weights, help="with manual dispatch: NAME=NUMBER,… for each expert")
    return options


def check_dispatch(model_name: str, dispatch: str, weights: Mapping[str, float] | None) -> None:
    """Refuse what can be refused before a model is loaded, which takes seconds.

    Raises:
        ValueError: weights are given to a dispatch that decides them itself, or are missing.
        MixtureError: there is no mixture of that name.
    """
    check_weights(dispatch, weights)
    if kept := mixture_name(dispatch):
        read_mixture(mixture_file(model_name, kept))


def load(options: argparse.Namespace, **arguments) -> "Model":
    """The model that the options name, by `load_model`, its progress on standard error."""
    from t2app.models.model import load_model

    with tqdm(total=1.0, bar_format="{desc} {percentage:3.0f}%", leave=False) as bar:

        def progress(message: str, share: float | None) -> None:
            bar.n = share or 0.0
            bar.set_description_str(message)

        return load_model(options.model, options.precision, progress=progress, **arguments)


def _weights(text: str) -> dict[str, float]:
    """`math=0.7,code=0.1` as a dictionary."""
    weights = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise argparse.ArgumentTypeError(
                f"'{part}' is no weight; NAME=NUMBER was expected, as in math=0.7,code=0.1"
            )
    return weights


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """For an option that takes several of these names with commas between them."""

    def names(text: str) -> list[str]:
        return [name_of(known)(name) for name in text.split(",")]

    return names


def name_of(known: Collection[str]) -> Callable[[str], str]:
    """For an option that takes one of these names."""

    # argparse's choices refuse the empty list that no name stands for.
    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {', '.join(known)})")
        return text

    return name


def dispatch_name(text: str) -> str:
    """The type of an option that takes a dispatch."""
    return text if mixture_name(text) else name_of((*DISPATCHERS, few_shot("NAME")))(text)


def count(text: str) -> int:
    """The type of an option that takes a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; a whole number from 1 was expected")
    return int(text)
