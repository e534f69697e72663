"""`families`: which architectures can be adapted."""

import argparse
from dataclasses import asdict
from pathlib import Path

from t2app.cli.options import Commands, json_option
from t2app.cli.output import print_json, write_markdown


def add_families(commands: Commands) -> None:
    command = commands.add_parser(
        "families", parents=[json_option()], help="check which architectures can be adapted, on small random models"
    )
    command.add_argument("--results", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    command.set_defaults(run=families)


def families(options: argparse.Namespace) -> None:
    """Check what each architecture keeps; exits with 1 where one does not keep all of it."""
    from t2app.models.families import FAMILIES, REFUSED, check_family, families_table, refusal

    kept, refused = {}, {}
    for name in FAMILIES:
        kept[name] = check_family(name)
        if options.json:
            outcomes = {check: asdict(outcome) for check, outcome in kept[name].items()}
            print_json({"family": name, "checks": outcomes})
    for name in REFUSED:
        refused[name] = refusal(name)
        if options.json:
            print_json({"family": name, "refused": refused[name]})
    table = families_table(kept, refused)
    if not options.json:
        print(table)
    if options.results is not None:
        write_markdown(options.results, "Families", options.command, table)
    broken = [name for name, checks in kept.items() if not all(outcome.kept for outcome in checks.values())]
    broken += [name for name, sentence in refused.items() if sentence is None]
    if broken:
        raise ValueError(f"not everything is kept by {', '.join(broken)}")
