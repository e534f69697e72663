"""`search`: a mixture for a new task."""

import argparse
import sys
from pathlib import Path

from t2app.cli.options import Commands, count, data_option, load, model_options, pool_option
from t2app.cli.output import print_json
from t2app.found_mixtures import mixture_file, write_mixture
from t2app.messages import SCORES, Reevaluated, SearchSettings, as_json, few_shot
from t2app.tasks.registry import TASKS, task_named
from t2app.tasks.shots import pick_shots, shots_of_file


def add_search(commands: Commands) -> None:
    command = commands.add_parser(
        "search",
        parents=[model_options(), pool_option(), data_option()],
        help="search a mixture on a few solved examples",
    )
    command.add_argument(
        "task", metavar="TASK|FILE", help="a task, or a file of one JSON object a line with prompt and answer"
    )
    command.add_argument("--name", required=True, help="to keep the mixture by")
    command.add_argument("--shots", type=count, default=10, metavar="N", help="solved examples (10)")
    command.add_argument("--per-layer", action="store_true", help="an α for each expert and block, not each expert")
    command.add_argument(
        "--score", choices=SCORES, default=SearchSettings.score, help="decode and check, or likelihood of the answers"
    )
    for name, kind, help_text in (
        ("rounds", count, "rounds at most"),
        ("population", count, "candidates a round"),
        ("elite_fraction", float, "share of them that the next round is drawn around"),
        ("seed", int, "of examples and candidates"),
    ):
        default = getattr(SearchSettings, name)
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=kind, default=default, help=f"{help_text} ({default})")
    command.set_defaults(run=search)


def search(options: argparse.Namespace) -> None:
    """Search a mixture on a few solved examples and keep the best; interrupted, it keeps the best so far as it is."""
    file = mixture_file(options.model, options.name)
    task = task_named(options.task) if options.task in TASKS else shots_of_file(Path(options.task))
    settings = SearchSettings(
        options.population, options.elite_fraction, options.rounds, options.per_layer, options.score, options.seed
    )
    shots = pick_shots(task, options.shots, options.seed)

    from t2app.search import MixtureSearch

    model = load(options, many_rows=True, experts_of=options.experts_of)
    running = MixtureSearch(model, task, shots, settings)
    try:
        for event in running.run():
            if options.json:
                print_json(as_json(event))
                continue
            best = ", ".join(f"{name}={alpha:.2f}" for name, alpha in event.best.items())
            if isinstance(event, Reevaluated):
                alone = ", ".join(f"{name} {right}" for name, right in event.alone.items())
                print(
                    f"the best {event.finalists} again: {best}   {event.right} of {event.answers} answers right; "
                    f"alone: {alone}   {event.seconds:.0f} s",
                    flush=True,
                )
            else:
                right = "" if event.right is None else f"{event.right} of {len(shots)} right, "
                print(
                    f"round {event.round}: {best}   {right}{event.log_likelihood:.3f} nats a token   "
                    f"{event.evaluations} candidates, {event.seconds:.0f} s",
                    flush=True,
                )
    except KeyboardInterrupt:
        print("stopped: the best so far is kept", file=sys.stderr)
    found = running.found(options.name)
    write_mixture(found, file)
    if options.json:
        print_json({"event": "kept", "name": found.name, "weights": found.weights, "file": str(file)})
    else:
        print(f"kept as {found.name}: answer with --dispatch {few_shot(found.name)}")
