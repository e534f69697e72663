"""`bench`: what things cost."""

import argparse
from dataclasses import asdict

from t2app.bench import BENCHES, bench_named
from t2app.cli.options import Commands, model_options, name_of
from t2app.cli.output import print_json


def add_bench(commands: Commands) -> None:
    command = commands.add_parser("bench", parents=[model_options()], help="measure what things cost")
    command.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        type=name_of(BENCHES),
        help=f"of {', '.join(BENCHES)} (default: all)",
    )
    command.set_defaults(run=bench)


def bench(options: argparse.Namespace) -> None:
    """Print the figures of the benches named, or of all."""
    for name in options.name or BENCHES:
        for figure in bench_named(name)(options.model, options.precision):
            if options.json:
                print_json(asdict(figure))
            else:
                print(
                    f"{figure.bench} {figure.figure}: {figure.value:.4g} {figure.unit} "
                    f"({figure.min:.4g} to {figure.max:.4g}, n = {figure.n})"
                )
