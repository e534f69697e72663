"""The command line, `python -m t2app`, one file a group of commands.

With `--json` a command prints one JSON object a line on standard output and nothing else there; progress and errors go
to standard error. Every command ends with exit code 0, or 1 and a sentence.

These files import at their top what their options need, and in a command what it takes to run it: torch and
transformers take seconds, and nobody who lists models or asks for help should wait for them.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from t2app.cli import answering, benches, evaluation, families, models, search, training
from t2app.tasks.benchmark_data import DATA_DIR_VARIABLE


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 1 and a sentence on standard error where it cannot be done."""
    options = _parser().parse_args(arguments)
    options.command = shlex.join(sys.argv[1:] if arguments is None else arguments)
    if getattr(options, "data", None) is not None:
        os.environ[DATA_DIR_VARIABLE] = str(options.data)
    try:
        options.run(options)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m t2app", description="Transformer² on one machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    answering.add_answer(commands)
    models.add_models(commands)
    models.add_experts(commands)
    training.add_train(commands)
    models.add_import(commands)
    training.add_ablate(commands)
    evaluation.add_eval(commands)
    search.add_search(commands)
    families.add_families(commands)
    benches.add_bench(commands)
    return parser
