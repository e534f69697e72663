"""Starts the web app; a Hugging Face Space runs this file."""

import argparse
import os
import shlex
import sys

from t2app.imports import kept_imports
from t2app.loading import EngineLoader
from t2app.messages import Limits
from t2app.models.catalogue import DEFAULT_MODEL, EXPERTS_OF_HELP, PRECISIONS

with kept_imports():
    from t2app.ui import CSS, THEME, build_page

# A Space passes no arguments.
_OPTIONS_VARIABLE = "T2_APP_OPTIONS"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Transformer²: a language model that adapts itself to the prompt.",
        epilog=f"Options in the variable {_OPTIONS_VARIABLE} are taken before those that are given here.",
    )
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help="a catalogue name, a hub name, a local folder or a GGUF file of either"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="what the weights are held in")
    parser.add_argument("--experts-of", metavar="NAME", help=EXPERTS_OF_HELP)
    parser.add_argument(
        "--fixed-model", action="store_true", help="let nobody change the model on the page, which is the same for all"
    )
    parser.add_argument("--port", type=int, help="port of the page (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="also serve the page under a public Gradio address")
    parser.add_argument(
        "--rows", type=int, default=Limits.rows, help="rows that are decoded at a time at most; an answer has two"
    )
    parser.add_argument(
        "--cache-mib",
        type=int,
        help="memory for the keys and values of all of them (default: half of what the model leaves free)",
    )
    try:
        arguments = parser.parse_args([*shlex.split(os.environ.get(_OPTIONS_VARIABLE, "")), *sys.argv[1:]])
        limits = Limits(arguments.rows, None if arguments.cache_mib is None else arguments.cache_mib * 2**20)
    except ValueError as error:
        parser.error(str(error))
    loader = EngineLoader(
        arguments.model, arguments.precision, arguments.experts_of, limits, fixed=arguments.fixed_model
    )
    page = build_page(loader)
    page.launch(server_port=arguments.port, share=arguments.share, theme=THEME, css=CSS, prevent_thread_lock=True)
    # Only now, so that the imports of torch do not compete with the page for the processor.
    loader.start()
    page.block_thread()


if __name__ == "__main__":
    main()
