"""`train` and `ablate`: training an expert, and what its settings are worth."""

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from t2app.cli.options import Commands, count, data_option, load, model_options, names_of
from t2app.cli.output import print_accuracies, print_json, write_markdown
from t2app.tasks import Task
from t2app.tasks.registry import TASKS, task_named
from t2app.tasks.union import Union
from t2app.training.ablation import VARIATIONS, ablation, ablation_table
from t2app.training.settings import ADVANTAGES, PRESETS, TrainingSettings

if TYPE_CHECKING:
    from t2app.training.trainer import Trainer

LAYERS = ("mlp", "all")


def add_train(commands: Commands) -> None:
    command = commands.add_parser(
        "train", parents=[model_options(), data_option()], help="train an expert by reinforcement learning"
    )
    command.add_argument(
        "task", nargs="+", metavar="TASK", choices=TASKS, help=f"of {', '.join(TASKS)}; several in equal parts"
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of expert, log and checkpoint")
    command.add_argument("--name", help="the expert's name (default: the task's label)")
    command.add_argument("--preset", choices=PRESETS, default="default", help="settings that the others then change")
    command.add_argument("--layers", choices=LAYERS, help="adapt all linear layers of the blocks, or those of the MLP")
    command.add_argument(
        "--start", type=Path, metavar="FILE", help="an expert's .safetensors file to train further, not the base model"
    )
    command.add_argument(
        "--lora", type=count, metavar="RANK", help="train a LoRA of this rank instead of an expert, for comparison"
    )
    defaults = PRESETS["default"].settings
    for name, kind, help_text in (
        ("warm_start_steps", int, "supervised steps before those of reinforcement learning"),
        ("warm_start_learning_rate", float, "of these"),
        ("steps", int, "steps of reinforcement learning"),
        ("prompts", count, "prompts a step"),
        ("samples", count, "sampled answers to each prompt"),
        ("learning_rate", float, "of Adam"),
        ("decay_steps", int, "steps at the end over which the learning rate falls to 0"),
        ("kl_weight", float, "weight of the KL divergence to the base model"),
        ("clip_norm", float, "largest norm of the gradient"),
        ("temperature", float, "of the samples"),
        ("validate_every", count, "steps between validations and checkpoints"),
        ("validation_limit", count, "validation examples at most"),
        ("seed", int, "of prompts and samples"),
    ):
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=kind, help=f"{help_text} ({getattr(defaults, name)})")
    command.add_argument("--test-limit", type=int, metavar="N", help="measure at the end on the first N test examples")
    command.add_argument("--advantage", choices=ADVANTAGES, help="plain is the paper's ±1")
    command.set_defaults(run=train)


def add_ablate(commands: Commands) -> None:
    command = commands.add_parser(
        "ablate", parents=[model_options(), data_option()], help="compare training settings over seeds"
    )
    command.add_argument("task", metavar="TASK", choices=TASKS, help="to train on")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the trainings")
    command.add_argument("--seeds", type=count, default=3, metavar="N", help="trainings of each variation (3)")
    command.add_argument(
        "--only",
        type=names_of(VARIATIONS),
        default=list(VARIATIONS),
        metavar="NAME,…",
        help=f"of {', '.join(VARIATIONS)} (default: all)",
    )
    command.add_argument("--results", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    command.set_defaults(run=ablate)


def train(options: argparse.Namespace) -> None:
    """Train an expert, then measure base and expert on the test split and write that into its file."""
    from t2app.evaluation import BASE, Accuracy, evaluate
    from t2app.figures import training_curve
    from t2app.models.model import processes

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
                print_json(asdict(step))
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
    print_accuracies(measured, options.json)
    if not options.json:
        print(f"written to {trainer.file}")


def _trainer(options: argparse.Namespace, task: Task) -> "Trainer":
    """The training of an expert, or of a LoRA, that the options ask for."""
    from t2app.experts import load_expert
    from t2app.spectral.layer_paths import is_mlp_path
    from t2app.training.trainer import Trainer

    preset = PRESETS[options.preset]
    given = {field.name: getattr(options, field.name) for field in fields(TrainingSettings)}
    settings = replace(preset.settings, **{name: value for name, value in given.items() if value is not None})
    layers = {"mlp": is_mlp_path, "all": lambda path: True}[options.layers or preset.layers]
    name = options.name or task.label
    if options.lora is None:
        model = load(options, many_rows=True, layers=layers)
        start = None if options.start is None else load_expert(options.start, model.identity)
        return Trainer(model, task, settings, options.out, name, start)
    if options.start is not None:
        raise ValueError("a LoRA starts at the base model; leave out --start or --lora")
    from t2app.training.lora import LoraTrainer, with_lora  # here, because peft takes seconds to import

    model = load(options, many_rows=True, layers=lambda path: False)
    model = with_lora(model, filter(layers, model.identity.ranks), options.lora, settings.seed)
    return LoraTrainer(model, task, settings, options.out, name)


def ablate(options: argparse.Namespace) -> None:
    """Train the variations with several seeds and print what each is worth."""
    shared = [f"--model={options.model}", f"--precision={options.precision}"]
    rows = []
    with tqdm(total=len(options.only) * options.seeds, desc="ablation", unit="training") as bar:
        for row in ablation(options.task, options.seeds, options.out, options.only, shared, bar.update):
            rows.append(row)
            if options.json:
                print_json(asdict(row))
    if not options.json:
        print(ablation_table(rows))
    if options.results is not None:
        write_markdown(options.results, f"Ablation on {options.task}", options.command, ablation_table(rows))
