"""`bench`: what things cost."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from t2app.bench import BENCHES, bench_named
from t2app.bench.figure import Figure
from t2app.cli.options import Commands, model_options, name_of
from t2app.cli.output import print_json, write_markdown
from t2app.models.catalogue import title_of


def add_bench(commands: Commands) -> None:
    command = commands.add_parser("bench", parents=[model_options()], help="measure what things cost")
    command.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        type=name_of(BENCHES),
        help=f"of {', '.join(BENCHES)} (default: all)",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the figures of this run there, with the machine, as Markdown; what the file held before goes",
    )
    command.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> None:
    """Print the figures of the benches named, or of all."""
    names, figures = list(dict.fromkeys(options.name or BENCHES)), []
    for name in names:
        for figure in bench_named(name)(options.model, options.precision):
            figures.append(figure)
            if options.json:
                print_json(asdict(figure))
            else:
                print(
                    f"{figure.bench} {figure.figure}: {figure.value:.4g} {figure.unit} "
                    f"({figure.min:.4g} to {figure.max:.4g}, n = {figure.n})"
                )
    if options.out is not None:
        _write_report(options, names, figures)


def _write_report(options: argparse.Namespace, names: Sequence[str], figures: Sequence[Figure]) -> None:
    from t2app.bench.report import report, without_folders

    text = report(figures, names, title_of(options.model), options.precision)
    command = shlex.join(without_folders(shlex.split(options.command)))
    write_markdown(options.out, "What `bench` measured", command, text)
