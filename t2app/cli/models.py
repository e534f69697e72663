"""`models`, `experts` and `import`: which models there are, which experts they have, and an expert of other code."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from t2app.categories import CATEGORIES
from t2app.cli.options import Commands, json_option, load, model_options, pool_option
from t2app.cli.output import print_json
from t2app.models.catalogue import CATALOGUE, EIGHT_BIT, HELD_IN, classifier_file, expert_files, pool_folder


def add_models(commands: Commands) -> None:
    command = commands.add_parser("models", parents=[json_option()], help="list the models that have a name here")
    command.set_defaults(run=models)


def add_experts(commands: Commands) -> None:
    command = commands.add_parser("experts", parents=[model_options(), pool_option()], help="list the model's experts")
    command.set_defaults(run=experts)


def add_import(commands: Commands) -> None:
    command = commands.add_parser(
        "import", parents=[model_options()], help="read an expert that the authors' code trained on --model"
    )
    command.add_argument("file", type=Path, metavar="FILE", help="its policy_params.pt or learnable_params.pt")
    command.add_argument("--name", type=_file_name, required=True, help="the expert's name")
    command.add_argument("--label", help=f"{', '.join(CATEGORIES)} or one of your own (default: the name)")
    command.add_argument("--description", help="a line on what it is for (default: the label's)")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder to write into (default: the model's experts)")
    command.set_defaults(run=import_expert)


def models(options: argparse.Namespace) -> None:
    """List the catalogue: what its models are, what they take, and which experts they have."""
    from t2app.kernels.build import can_have_kernels  # asks torch for the CPU
    from t2app.machine import memory_bytes  # and for the memory of GPUs

    available, here = memory_bytes(), [of for of in HELD_IN if of != EIGHT_BIT or can_have_kernels()]
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
            "fits": {precision: precision in here and entry.fits(precision, available) for precision in HELD_IN},
            "experts": [file.stem for file in files if file is not None],
        }
        if options.json:
            print_json(row)
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
    """List the model's experts, checked against its weights; nothing is computed that only an answer would need."""
    for expert in load(options, layers=lambda path: False, experts_of=options.experts_of).pool:
        if options.json:
            print_json(
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

    from t2app.experts import save_expert
    from t2app.reference_checkpoints import expert_of_checkpoint, read_checkpoint
    from t2app.spectral.layer_paths import is_mlp_path

    checkpoint = read_checkpoint(options.file)
    expert = expert_of_checkpoint(checkpoint, options.name, label, description, load(options, layers=is_mlp_path))
    save_expert(replace(expert, training=expert.training | {"command": f"python -m t2app {options.command}"}), target)
    if options.json:
        row = {"event": "imported", "name": expert.name, "label": label, "layers": len(expert.z)}
        print_json(row | {"parameters": expert.parameters, "file": str(target)})
    else:
        print(f"{len(expert.z)} layers, {expert.parameters:,} numbers; written to {target}")


def _file_name(text: str) -> str:
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"'{text}' is no name for a file")
    return text
