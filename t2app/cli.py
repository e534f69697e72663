"""The command line, `python -m t2app`: answer, models, experts, train, import, ablate, eval, search, families, bench.

With `--json` a command prints one JSON object a line on standard output and nothing else there; progress and errors go
to standard error. Every command ends with exit code 0, or 1 and a sentence.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

from tqdm import tqdm

from t2app import bench
from t2app.catalogue import (
    CATALOGUE,
    DEFAULT_MODEL,
    EXPERTS_OF_HELP,
    HELD_IN,
    PRECISIONS,
    classifier_file,
    expert_files,
    pool_folder,
)
from t2app.categories import CATEGORIES
from t2app.dispatch import Dispatcher, make_dispatcher
from t2app.engine import Engine
from t2app.evaluation import (
    BASE,
    Accuracy,
    AnswerFile,
    DispatchAccuracy,
    confusion_table,
    evaluate,
    evaluate_dispatch,
    results_table,
    write_csv,
)
from t2app.experts import mix, save_expert
from t2app.figures import training_curve
from t2app.machine import fits
from t2app.messages import (
    DEFAULT_DISPATCH,
    DISPATCHERS,
    MANUAL,
    NAMING_DISPATCHERS,
    SCORES,
    Dispatched,
    Finished,
    Reevaluated,
    Sampling,
    SearchSettings,
    Token,
    as_json,
    few_shot,
    mixture_name,
)
from t2app.mixtures import mixture_file, write_mixture
from t2app.models import Model, load_model
from t2app.pictures import read_picture
from t2app.reference_checkpoints import expert_of_checkpoint, read_checkpoint
from t2app.search import MixtureSearch, pick_shots
from t2app.spectral import is_mlp_path
from t2app.tasks import Task
from t2app.tasks.benchmark_data import DATA_DIR_VARIABLE
from t2app.tasks.dispatch import Dispatch, labelled_prompts
from t2app.tasks.registry import TASKS, task_named
from t2app.tasks.shots import shots_of_file
from t2app.tasks.union import Union
from t2app.training import ADVANTAGES, PRESETS, Trainer, TrainingSettings, processes
from t2app.training.ablation import VARIATIONS, ablation, ablation_table

LAYERS = {"mlp": is_mlp_path, "all": lambda path: True}


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


def answer(options: argparse.Namespace) -> None:
    """Print the two answers as they come, or the events as JSON lines."""
    image = None if options.image is None else read_picture(options.image)
    engine = Engine(_load(options, experts_of=options.experts_of))
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    for event in engine.answer(options.prompt, engine.dispatcher(options.dispatch, options.weights), sampling, image):
        if options.json:
            _print_json(as_json(event))
        elif isinstance(event, Dispatched):
            mixture = ", ".join(f"{name}={weight:.2f}" for name, weight in event.weights.items())
            print(f"task: {event.label or 'weights by hand'}   mixture: {mixture or 'no experts'}", flush=True)
            print(f"({event.note})\n" if event.note else "", flush=True)
        elif isinstance(event, Token) and event.stream == "adapted":
            print(event.text, end="", flush=True)
        elif isinstance(event, Finished):
            print(f"\n\nbase model: {event.base}\n\n{event.tokens} tokens, {event.tokens_per_second:.1f} tokens/s")


def models(options: argparse.Namespace) -> None:
    """List the catalogue: what its models are, what they take, and which experts they have."""
    for entry in CATALOGUE.values():
        files = [*expert_files(entry.name), classifier_file(entry.name)]
        row = {
            "name": entry.name,
            "title": entry.title,
            "licence": entry.licence,
            "gated": entry.gated,
            "hub_name": entry.hub_name,
            "parameters": entry.shape.parameters,
            "download_bytes": entry.download_bytes,
            "memory_bytes": {precision: entry.memory_bytes(precision) for precision in HELD_IN},
            "fits": {precision: fits(entry, precision) for precision in HELD_IN},
            "experts": [file.stem for file in files if file is not None],
        }
        if options.json:
            _print_json(row)
            continue
        memory = ", ".join(
            f"{precision} {size / 1e9:.1f} GB{'' if row['fits'][precision] else ' (does not fit here)'}"
            for precision, size in row["memory_bytes"].items()
        )
        print(
            f"{entry.name}  {entry.shape.parameters / 1e6:,.0f} M parameters, {entry.licence}"
            f"{' (gated on the hub)' if entry.gated else ''}, download {entry.download_bytes / 1e9:.1f} GB\n"
            f"    weights in memory: {memory}\n    experts: {', '.join(row['experts']) or 'none'}"
        )


def experts(options: argparse.Namespace) -> None:
    """List the model's experts."""
    for expert in _load(options, experts_of=options.experts_of).pool:
        if options.json:
            _print_json(
                {
                    "name": expert.name,
                    "label": expert.label,
                    "description": expert.description,
                    "model": expert.weights.model,
                    "fingerprint": expert.weights.fingerprint,
                    "layers": len(expert.z),
                    "parameters": expert.parameters,
                    "training": dict(expert.training),
                    "accuracies": [asdict(row) for row in expert.accuracies],
                    "curve": expert.curve,
                }
            )
        else:
            print(f"{expert.name}  [{expert.label}]  {expert.parameters:,} numbers  {expert.description}")


def train(options: argparse.Namespace) -> None:
    """Train an expert, then measure base and expert on the test split and write that into its file."""
    tasks = [task_named(name) for name in options.task]
    trainer = _trainer(options, tasks[0] if len(tasks) == 1 else Union(tasks))
    # Of several processes, the first alone shows and measures.
    first = processes().is_main_process
    title = f"training {trainer.name}"
    with tqdm(desc=title, total=trainer.last_step, initial=trainer.step, unit="step", disable=not first) as bar:
        for step in trainer.run():
            bar.update(step.step - bar.n)
            reward = "warm start" if step.reward is None else f"{step.reward:.2f}"
            bar.set_postfix(reward=reward, validation=f"{trainer.best:.3f}")
            if options.json and first:
                _print_json(asdict(step))
    if not first:
        return
    mixtures = {BASE: None, trainer.name: trainer.best_mixture()}
    measured: list[Accuracy] = []
    for task in tasks:
        examples = task.examples("test")[: options.test_limit]
        if not examples:
            continue
        columns = {name: [mixture] * len(examples) for name, mixture in mixtures.items()}
        with tqdm(total=len(examples) * len(columns), desc=task.name, unit="answer") as bar:
            measured += evaluate(trainer.model, task, examples, columns, bar.update)
    trainer.add_test(measured, f"python -m t2app {options.command}")
    training_curve({trainer.name: trainer.log.validations()}).write_html(options.out / "curve.html")
    _print_accuracies(measured, options.json)
    if not options.json:
        print(f"written to {trainer.file}")


def _trainer(options: argparse.Namespace, task: Task) -> Trainer:
    """The training of an expert, or of a LoRA, that the options ask for."""
    preset = PRESETS[options.preset]
    given = {field.name: getattr(options, field.name) for field in fields(TrainingSettings)}
    settings = replace(preset.settings, **{name: value for name, value in given.items() if value is not None})
    layers, name = LAYERS[options.layers or preset.layers], options.name or task.label
    if options.lora is None:
        return Trainer(_load(options, many_rows=True, layers=layers), task, settings, options.out, name)
    from t2app.training.lora import LoraTrainer, with_lora  # here, because peft takes seconds to import

    model = _load(options, many_rows=True, layers=lambda path: False)
    model = with_lora(model, filter(layers, model.identity.ranks), options.lora, settings.seed)
    return LoraTrainer(model, task, settings, options.out, name)


def import_expert(options: argparse.Namespace) -> None:
    """Turn a checkpoint of the authors' code into an expert."""
    target = (options.out or pool_folder(options.model)) / f"{options.name}.safetensors"
    if target.exists():
        raise ValueError(f"there is an expert {target} already; give another --name or another --out")
    label = options.label or options.name
    description = options.description or CATEGORIES.get(label)
    if description is None:
        raise ValueError(
            f"'{label}' is none of the categories {', '.join(CATEGORIES)}, so the first pass needs to be told what it "
            "is for: give one of them as --label, or say it in a line by --description"
        )
    checkpoint = read_checkpoint(options.file)
    expert = expert_of_checkpoint(checkpoint, options.name, label, description, _load(options, layers=is_mlp_path))
    save_expert(replace(expert, training=expert.training | {"command": f"python -m t2app {options.command}"}), target)
    if options.json:
        row = {"event": "imported", "name": expert.name, "label": label, "layers": len(expert.z)}
        _print_json(row | {"parameters": expert.parameters, "file": str(target)})
    else:
        print(f"{len(expert.z)} layers, {expert.parameters:,} numbers; written to {target}")


def ablate(options: argparse.Namespace) -> None:
    """Train the variations with several seeds and print what each is worth."""
    shared = [f"--model={options.model}", f"--precision={options.precision}"]
    rows = []
    with tqdm(total=len(options.only) * options.seeds, desc="ablation", unit="training") as bar:
        for row in ablation(options.task, options.seeds, options.out, options.only, shared, bar.update):
            rows.append(row)
            if options.json:
                _print_json(asdict(row))
    if not options.json:
        print(ablation_table(rows))
    if options.results is not None:
        about = f"# Ablation on {options.task}\n\n```bash\npython -m t2app {options.command}\n```\n\n"
        options.results.write_text(about + ablation_table(rows), encoding="utf-8")


def evaluate_tasks(options: argparse.Namespace) -> None:
    """Measure the base model, the experts named and the dispatches named on the test split of each task."""
    tasks = [task_named(name) for name in options.task]
    model = _load(options, many_rows=True, experts_of=options.experts_of)
    if options.weights is not None and MANUAL not in options.dispatch:
        raise ValueError("weights belong to the manual dispatch, and --dispatch does not name it")
    weights = {MANUAL: options.weights}
    dispatchers = [make_dispatcher(name, model, weights.get(name)) for name in options.dispatch]
    measured: list[Accuracy] = []
    for task in tasks:
        measure = _measure_dispatch if isinstance(task, Dispatch) else _measure_mixtures
        accuracies = measure(options, model, task, dispatchers)
        _print_accuracies(accuracies, options.json)
        measured += accuracies
    if options.csv is not None:
        write_csv(measured, options.csv)
    if options.results is not None:
        _write_results(options, model, measured)


def _measure_mixtures(
    options: argparse.Namespace, model: Model, task: Task, dispatchers: Sequence[Dispatcher]
) -> list[Accuracy]:
    """The base model's answers, the experts' and those under what the dispatchers mix."""
    examples = task.examples("test")[: options.limit]
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
    options: argparse.Namespace, model: Model, task: Dispatch, dispatchers: Sequence[Dispatcher]
) -> list[Accuracy]:
    """The first pass itself: what the dispatchers name, by default all that do, and the answers of experts named."""
    measured = [] if options.experts is None else _measure_mixtures(options, model, task, [])
    if options.experts is None and not dispatchers:
        dispatchers = [make_dispatcher(name, model) for name in NAMING_DISPATCHERS]
    prompts = labelled_prompts("test")[: options.limit]
    for dispatcher in dispatchers:
        with tqdm(total=len(prompts), desc=f"{task.name} by {dispatcher.name}", unit="prompt") as bar:
            measured.append(evaluate_dispatch(task.name, prompts, dispatcher, bar.update))
    return measured


def search(options: argparse.Namespace) -> None:
    """Search a mixture on a few solved examples and keep the best; interrupted, it keeps the best so far as it is."""
    file = mixture_file(options.model, options.name)
    task = task_named(options.task) if options.task in TASKS else shots_of_file(Path(options.task))
    settings = SearchSettings(
        options.population, options.elite_fraction, options.rounds, options.per_layer, options.score, options.seed
    )
    shots = pick_shots(task, options.shots, options.seed)
    model = _load(options, many_rows=True, experts_of=options.experts_of)
    running = MixtureSearch(model, task, shots, settings)
    try:
        for event in running.run():
            if options.json:
                _print_json(as_json(event))
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
        _print_json({"event": "kept", "name": found.name, "weights": found.weights, "file": str(file)})
    else:
        print(f"kept as {found.name}: answer with --dispatch {few_shot(found.name)}")


def _write_results(options: argparse.Namespace, model: Model, measured: Sequence[Accuracy]) -> None:
    """The table, with the command that measured it."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(
        f"# {model.name}\n\nGreedy answers on the test splits, weights held in {model.precision}. Written by\n\n"
        f"```bash\npython -m t2app {options.command}\n```\n\n"
        f"p is McNemar's exact test against the base model on the same examples.\n\n{results_table(measured)}",
        encoding="utf-8",
    )


def families(options: argparse.Namespace) -> None:
    """Check what each architecture keeps; exits with 1 where one does not keep all of it."""
    # Here, because so many architectures take a second to import.
    from t2app.families import FAMILIES, REFUSED, check_family, families_table, refusal

    kept, refused = {}, {}
    for name in FAMILIES:
        kept[name] = check_family(name)
        if options.json:
            outcomes = {check: asdict(outcome) for check, outcome in kept[name].items()}
            _print_json({"family": name, "checks": outcomes})
    for name in REFUSED:
        refused[name] = refusal(name)
        if options.json:
            _print_json({"family": name, "refused": refused[name]})
    table = families_table(kept, refused)
    if not options.json:
        print(table)
    if options.results is not None:
        about = f"# Families\n\n```bash\npython -m t2app {options.command}\n```\n\n"
        options.results.write_text(about + table, encoding="utf-8")
    broken = [name for name, checks in kept.items() if not all(outcome.kept for outcome in checks.values())]
    broken += [name for name, sentence in refused.items() if sentence is None]
    if broken:
        raise ValueError(f"not everything is kept by {', '.join(broken)}")


def run_benches(options: argparse.Namespace) -> None:
    """Print the figures of the benches named, or of all."""
    for name in options.name or bench.BENCHES:
        for figure in bench.BENCHES[name](options.model, options.precision):
            if options.json:
                _print_json(asdict(figure))
            else:
                print(
                    f"{figure.bench} {figure.figure}: {figure.value:.4g} {figure.unit} "
                    f"({figure.min:.4g} to {figure.max:.4g}, n = {figure.n})"
                )


def _load(options: argparse.Namespace, **arguments) -> Model:
    with tqdm(total=1.0, bar_format="{desc} {percentage:3.0f}%", leave=False) as bar:

        def progress(message: str, share: float | None) -> None:
            bar.n = share or 0.0
            bar.set_description_str(message)

        return load_model(options.model, options.precision, progress=progress, **arguments)


def _print_json(row: dict) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def _print_accuracies(accuracies: Sequence[Accuracy], as_json_lines: bool) -> None:
    if not as_json_lines:
        print(results_table(accuracies))
        for row in accuracies:
            if isinstance(row, DispatchAccuracy):
                print(confusion_table(row))
        return
    for row in accuracies:
        low, high = row.interval
        _print_json(asdict(row) | {"accuracy": row.accuracy, "low": low, "high": high})


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


def _names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """For an option that takes several of these names with commas between them."""

    def names(text: str) -> list[str]:
        return [_name_of(known)(name) for name in text.split(",")]

    return names


def _name_of(known: Collection[str]) -> Callable[[str], str]:
    # argparse's choices refuse the empty list that no name stands for.
    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"invalid choice: '{text}' (choose from {', '.join(known)})")
        return text

    return name


def _dispatch_name(text: str) -> str:
    return text if mixture_name(text) else _name_of((*DISPATCHERS, few_shot("NAME")))(text)


def _file_name(text: str) -> str:
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"'{text}' is no name for a file")
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no count; a whole number from 1 was expected")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    as_json_lines = argparse.ArgumentParser(add_help=False)
    as_json_lines.add_argument("--json", action="store_true", help="print one JSON object a line and nothing else")
    common = argparse.ArgumentParser(add_help=False, parents=[as_json_lines])
    common.add_argument(
        "--model", default=DEFAULT_MODEL, help="a catalogue name, a hub name, a local folder or a GGUF file of either"
    )
    common.add_argument("--precision", choices=PRECISIONS, default="auto", help="what the weights are held in")
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument(
        "--data", type=Path, metavar="DIR", help=f"benchmark data (default: ${DATA_DIR_VARIABLE}, the hub)"
    )
    pool = argparse.ArgumentParser(add_help=False)
    pool.add_argument("--experts-of", metavar="NAME", help=EXPERTS_OF_HELP)
    dispatch = argparse.ArgumentParser(add_help=False)
    dispatch.add_argument("--weights", type=_weights, help="with manual dispatch: NAME=NUMBER,… for each expert")

    parser = argparse.ArgumentParser(prog="python -m t2app", description="Transformer² on one machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("answer", parents=[common, pool, dispatch], help="answer a prompt, adapted and base")
    command.add_argument("prompt", metavar="PROMPT")
    command.add_argument(
        "--image",
        type=Path,
        metavar="FILE",
        help="a picture that the prompt is about; the first pass sees the text only",
    )
    command.add_argument(
        "--dispatch",
        type=_dispatch_name,
        default=DEFAULT_DISPATCH,
        metavar="NAME",
        help=f"who decides the mixture: {', '.join(DISPATCHERS)} or {few_shot('NAME')} ({DEFAULT_DISPATCH})",
    )
    command.add_argument("--max-new-tokens", type=_count, default=Sampling.max_new_tokens, metavar="N")
    command.add_argument("--temperature", type=float, default=Sampling.temperature, metavar="T", help="0 is greedy")
    command.add_argument("--top-p", type=float, default=Sampling.top_p, metavar="P")
    command.add_argument("--seed", type=int, default=Sampling.seed, metavar="N")
    command.set_defaults(run=answer)

    command = commands.add_parser("models", parents=[as_json_lines], help="list the models that have a name here")
    command.set_defaults(run=models)

    command = commands.add_parser("experts", parents=[common, pool], help="list the model's experts")
    command.set_defaults(run=experts)

    command = commands.add_parser("train", parents=[common, data], help="train an expert by reinforcement learning")
    command.add_argument(
        "task", nargs="+", metavar="TASK", choices=TASKS, help=f"of {', '.join(TASKS)}; several in equal parts"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of expert, log and checkpoint")
    command.add_argument("--name", help="the expert's name (default: the task's label)")
    command.add_argument("--preset", choices=PRESETS, default="default", help="settings that the others then change")
    command.add_argument("--layers", choices=LAYERS, help="adapt all linear layers of the blocks, or those of the MLP")
    command.add_argument(
        "--lora", type=_count, metavar="RANK", help="train a LoRA of this rank instead of an expert, for comparison"
    )
    defaults = PRESETS["default"].settings
    for name, kind, help_text in (
        ("warm_start_steps", int, "supervised steps before those of reinforcement learning"),
        ("warm_start_learning_rate", float, "of these"),
        ("steps", int, "steps of reinforcement learning"),
        ("prompts", _count, "prompts a step"),
        ("samples", _count, "sampled answers to each prompt"),
        ("learning_rate", float, "of Adam"),
        ("decay_steps", int, "steps at the end over which the learning rate falls to 0"),
        ("kl_weight", float, "weight of the KL divergence to the base model"),
        ("clip_norm", float, "largest norm of the gradient"),
        ("temperature", float, "of the samples"),
        ("validate_every", _count, "steps between validations and checkpoints"),
        ("validation_limit", _count, "validation examples at most"),
        ("seed", int, "of prompts and samples"),
    ):
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=kind, help=f"{help_text} ({getattr(defaults, name)})")
    command.add_argument("--test-limit", type=int, metavar="N", help="measure at the end on the first N test examples")
    command.add_argument("--advantage", choices=ADVANTAGES, help="plain is the paper's ±1")
    command.set_defaults(run=train)

    command = commands.add_parser(
        "import", parents=[common], help="read an expert that the authors' code trained on --model"
    )
    command.add_argument("file", type=Path, metavar="FILE", help="its policy_params.pt or learnable_params.pt")
    command.add_argument("--name", type=_file_name, required=True, help="the expert's name")
    command.add_argument("--label", help=f"{', '.join(CATEGORIES)} or one of your own (default: the name)")
    command.add_argument("--description", help="a line on what it is for (default: the label's)")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (default: the model's experts)")
    command.set_defaults(run=import_expert)

    command = commands.add_parser("ablate", parents=[common, data], help="compare training settings over seeds")
    command.add_argument("task", metavar="TASK", choices=TASKS, help="to train on")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the trainings")
    command.add_argument("--seeds", type=_count, default=3, metavar="N", help="trainings of each variation (3)")
    command.add_argument(
        "--only",
        type=_names_of(VARIATIONS),
        default=list(VARIATIONS),
        metavar="NAME,…",
        help=f"of {', '.join(VARIATIONS)} (default: all)",
    )
    command.add_argument("--results", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    command.set_defaults(run=ablate)

    command = commands.add_parser(
        "eval", parents=[common, pool, data, dispatch], help="measure accuracy on test splits"
    )
    command.add_argument("task", nargs="+", metavar="TASK", choices=TASKS, help=f"of {', '.join(TASKS)}")
    command.add_argument(
        "--experts", type=lambda text: text.split(","), metavar="NAME,…", help="(default: all but the classifier)"
    )
    command.add_argument(
        "--dispatch",
        type=lambda text: [_dispatch_name(name) for name in text.split(",")],
        default=[],
        metavar="NAME,…",
        help="also what these mix",
    )
    command.add_argument("--limit", type=_count, metavar="N", help="only the first N examples")
    command.add_argument("--answers", type=Path, metavar="FILE", help="keep answers there, and go on from those in it")
    command.add_argument("--csv", type=Path, metavar="FILE", help="also write the table there")
    command.add_argument("--results", type=Path, metavar="FILE", help="also write table and command there, as Markdown")
    command.set_defaults(run=evaluate_tasks)

    command = commands.add_parser(
        "search", parents=[common, pool, data], help="search a mixture on a few solved examples"
    )
    command.add_argument(
        "task", metavar="TASK|FILE", help="a task, or a file of one JSON object a line with prompt and answer"
    )
    command.add_argument("--name", required=True, help="to keep the mixture by")
    command.add_argument("--shots", type=_count, default=10, metavar="N", help="solved examples (10)")
    command.add_argument("--per-layer", action="store_true", help="an α for each expert and block, not each expert")
    command.add_argument(
        "--score", choices=SCORES, default=SearchSettings.score, help="decode and check, or likelihood of the answers"
    )
    for name, kind, help_text in (
        ("rounds", _count, "rounds at most"),
        ("population", _count, "candidates a round"),
        ("elite_fraction", float, "share of them that the next round is drawn around"),
        ("seed", int, "of examples and candidates"),
    ):
        default = getattr(SearchSettings, name)
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=kind, default=default, help=f"{help_text} ({default})")
    command.set_defaults(run=search)

    command = commands.add_parser(
        "families", parents=[as_json_lines], help="check which architectures can be adapted, on small random models"
    )
    command.add_argument("--results", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    command.set_defaults(run=families)

    command = commands.add_parser("bench", parents=[common], help="measure what things cost")
    command.add_argument(
        "name",
        nargs="*",
        metavar="NAME",
        type=_name_of(bench.BENCHES),
        help=f"of {', '.join(bench.BENCHES)} (default: all)",
    )
    command.set_defaults(run=run_benches)
    return parser
