"""`eval`: accuracy on test splits."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from t2app.cli.options import (
    Commands,
    check_dispatch,
    count,
    data_option,
    dispatch_name,
    load,
    model_options,
    pool_option,
    weights_option,
)
from t2app.cli.output import accuracy_tables, print_accuracies, write_markdown
from t2app.messages import MANUAL, NAMING_DISPATCHERS
from t2app.tasks import Example, Task
from t2app.tasks.dispatch import Dispatch, labelled_prompts
from t2app.tasks.registry import TASKS, task_named

if TYPE_CHECKING:
    from t2app.dispatch import Dispatcher
    from t2app.evaluation import Accuracy
    from t2app.models.model import Model


def add_eval(commands: Commands) -> None:
    command = commands.add_parser(
        "eval",
        parents=[model_options(), pool_option(), data_option(), weights_option()],
        help="measure accuracy on test splits",
    )
    command.add_argument("task", nargs="+", metavar="TASK", choices=TASKS, help=f"of {', '.join(TASKS)}")
    command.add_argument(
        "--experts", type=lambda text: text.split(","), metavar="NAME,…", help="(default: all but the classifier)"
    )
    command.add_argument(
        "--dispatch",
        type=lambda text: [dispatch_name(name) for name in text.split(",")],
        default=[],
        metavar="NAME,…",
        help="also what these mix",
    )
    command.add_argument("--limit", type=count, metavar="N", help="only the first N examples")
    command.add_argument("--answers", type=Path, metavar="FILE", help="keep answers there, and go on from those in it")
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")
    command.add_argument("--results", type=Path, metavar="FILE", help="also write table and command there, as Markdown")
    command.set_defaults(run=evaluate_tasks)


def evaluate_tasks(options: argparse.Namespace) -> None:
    """Measure the base model, the experts named and the dispatches named on the test split of each task."""
    # What needs no model is refused before one is loaded, and before what that takes is imported.
    if options.weights is not None and MANUAL not in options.dispatch:
        raise ValueError("weights belong to the manual dispatch, and --dispatch does not name it")
    weights = {MANUAL: options.weights}
    for name in options.dispatch:
        check_dispatch(options.model, name, weights.get(name))
    tasks = [task_named(name) for name in options.task]
    examples = {task.name: task.examples("test")[: options.limit] for task in tasks}

    from t2app.dispatch import make_dispatcher
    from t2app.evaluation import write_csv

    model = load(options, many_rows=True, experts_of=options.experts_of)
    dispatchers = [make_dispatcher(name, model, weights.get(name)) for name in options.dispatch]
    measured: list[Accuracy] = []
    for task in tasks:
        measure = _measure_dispatch if isinstance(task, Dispatch) else _measure_mixtures
        accuracies = measure(options, model, task, examples[task.name], dispatchers)
        print_accuracies(accuracies, options.json)
        measured += accuracies
    if options.csv is not None:
        write_csv(measured, options.csv)
    if options.results is not None:
        _write_results(options, model, measured)


def _measure_mixtures(
    options: argparse.Namespace,
    model: "Model",
    task: Task,
    examples: Sequence[Example],
    dispatchers: Sequence["Dispatcher"],
) -> list["Accuracy"]:
    """The base model's answers, the experts' and those under what the dispatchers mix."""
    from t2app.evaluation import BASE, AnswerFile, evaluate
    from t2app.experts import mix

    all_experts = [] if dispatchers else [expert.name for expert in model.experts]
    named = all_experts if options.experts is None else options.experts
    fixed = {BASE: None} | {name: mix(model.pool, {name: 1.0}) for name in named}
    mixtures = {name: [mixture] * len(examples) for name, mixture in fixed.items()}
    for dispatcher in dispatchers:
        mixtures[dispatcher.name] = [
            mix(model.experts, dispatcher.decide(example.prompt).weights) for example in examples
        ]
    kept = AnswerFile(options.answers) if options.answers is not None else None
    with tqdm(total=len(examples) * len(mixtures), desc=task.name, unit="answer") as bar:
        return evaluate(model, task, examples, mixtures, bar.update, kept)


def _measure_dispatch(
    options: argparse.Namespace,
    model: "Model",
    task: Dispatch,
    examples: Sequence[Example],
    dispatchers: Sequence["Dispatcher"],
) -> list["Accuracy"]:
    """The first pass itself: what the dispatchers name, by default all that do, and the answers of experts named."""
    from t2app.dispatch import make_dispatcher
    from t2app.evaluation import evaluate_dispatch

    measured = [] if options.experts is None else _measure_mixtures(options, model, task, examples, [])
    if options.experts is None and not dispatchers:
        dispatchers = [make_dispatcher(name, model) for name in NAMING_DISPATCHERS]
    prompts = labelled_prompts("test")[: options.limit]
    for dispatcher in dispatchers:
        with tqdm(total=len(prompts), desc=f"{task.name} by {dispatcher.name}", unit="prompt") as bar:
            measured.append(evaluate_dispatch(task.name, prompts, dispatcher, bar.update))
    return measured


def _write_results(options: argparse.Namespace, model: "Model", measured: Sequence["Accuracy"]) -> None:
    """The tables, with the command that measured them."""
    about = f"Greedy answers on the test splits, weights held in {model.precision}. Written by"
    tested = any(row.p_value is not None for row in measured)
    explained = "p is McNemar's exact test against the base model on the same examples.\n\n" if tested else ""
    write_markdown(options.results, model.name, options.command, f"{explained}{accuracy_tables(measured)}", about)
