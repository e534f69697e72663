"""Experts that the authors' code trained, read from its checkpoints.

That code (SakanaAI/self-adaptive-llms, `policy/base.py` and `utils.py`) adapts the matrices of the MLP. It learns a
vector p (rank,) for each, makes the mask m = sigmoid(p) · max_mult of it, and composes

    W' = U diag(σ ⊙ m) Vᵀ · Σσ / Σ(σ ⊙ m),   so   z = m · Σσ / Σ(σ ⊙ m),

in which max_mult cancels. It writes the p in two forms: `learnable_params.pt` names each by its weight
(`model.layers.0.mlp.gate_proj.weight`), `policy_params.pt` numbers them (`learnable_params_module_list.0`) in the order
in which the model's state dict lists these weights. Neither says which model it belongs to, and Llama-3-8B and
Mistral-7B have the same names and shapes: that is for whoever imports one to know.
"""

import hashlib
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2app.experts import Expert, ExpertError
from t2app.models.model import Model
from t2app.spectral.layer_paths import is_mlp_path

_SOURCE = "the authors' code (SakanaAI/self-adaptive-llms)"
_NUMBERED = re.compile(r"\w+\.(\d+)")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """What a file holds: the vectors p by the names that they have in it; `sha256` (hex) is the file's."""

    file: Path
    sha256: str
    vectors: Mapping[str, Tensor]


def read_checkpoint(file: Path) -> ReferenceCheckpoint:
    """Read a `policy_params.pt` or `learnable_params.pt`.

    Nothing in the file is run: only plain tensors and containers of them are unpickled.

    Raises:
        ExpertError: there is no such file, it is damaged, or it holds anything else than named tensors.
    """
    if not file.is_file():
        raise ExpertError(f"there is no checkpoint file {file}")
    try:
        vectors = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ExpertError(
            f"{file} was not read: it is damaged, or it holds objects, which could run code; a file of plain tensors "
            "was expected, as torch.save writes a state dict"
        ) from None
    except Exception as error:  # noqa: BLE001  what torch raises for a damaged file depends on where it is damaged
        raise ExpertError(f"{file} cannot be read as a file of torch.save ({error}); it may be cut off") from None
    if not isinstance(vectors, Mapping) or not vectors:
        raise ExpertError(f"{file} holds a {type(vectors).__name__}; vectors by name were expected")
    for name, vector in vectors.items():
        if not isinstance(name, str) or not isinstance(vector, Tensor):
            raise ExpertError(f"{file} holds a {type(vector).__name__} as '{name}'; vectors by name were expected")
    return ReferenceCheckpoint(
        file=file,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        vectors={name: vector.detach() for name, vector in vectors.items()},
    )


def expert_of_checkpoint(
    checkpoint: ReferenceCheckpoint, name: str, label: str, description: str, model: Model
) -> Expert:
    """The expert that a checkpoint of the authors' code holds, for the model that it was trained on.

    Args:
        model: one whose MLP layers are adapted; their singular values are a part of what the vectors mean.

    Raises:
        ExpertError: the file does not hold one fitting, finite vector for each matrix of the model's MLP and nothing
            else.
    """
    ranks = {path: rank for path, rank in model.identity.ranks.items() if is_mlp_path(path)}
    vectors = _by_layer(checkpoint, list(ranks), model.name)
    for path, vector in vectors.items():
        _check(checkpoint.file, path, vector, ranks[path])
    return Expert(
        name=name,
        label=label,
        description=description,
        weights=model.identity,
        z={path: z_of(vector, model.adapted.layers[path].singular_values) for path, vector in vectors.items()},
        training={
            "trained_by": _SOURCE,
            "imported_from": checkpoint.file.name,
            "sha256_of_that_file": checkpoint.sha256,
        },
    )


def z_of(vector: Tensor, singular_values: Tensor) -> Tensor:
    """z (rank,) float32 of a vector p and the singular values σ, both (rank,).

    The mask is rounded to the precision of p, as in the training of p: in bfloat16 that moves it by up to 0.4 %.
    """
    mask = torch.sigmoid(vector).double()
    sigma = singular_values.to(mask)
    return (mask * sigma.sum() / (sigma @ mask)).float()


def _by_layer(checkpoint: ReferenceCheckpoint, paths: list[str], model: str) -> dict[str, Tensor]:
    """The vector of every layer in `paths`, which are in the model's order."""
    file, vectors = checkpoint.file, checkpoint.vectors
    if not paths:
        raise ExpertError(f"{model} has no MLP layers by the names that {_SOURCE} adapts ('….mlp.…')")
    numbers = [_NUMBERED.fullmatch(name) for name in vectors]
    if all(numbers):
        order = [int(match[1]) for match in numbers]
        if sorted(order) != list(range(len(paths))):
            raise ExpertError(
                f"{file} numbers {len(order)} vectors from {min(order)} to {max(order)}; {model} has {len(paths)} MLP "
                f"matrices, so 0 to {len(paths) - 1} was expected. Name the model that it was trained on by --model"
            )
        by_number = dict(zip(order, vectors.values(), strict=True))
        return {path: by_number[number] for number, path in enumerate(paths)}
    weights = {f"{path}{_WEIGHT}": path for path in paths}
    if unknown := [name for name in vectors if name not in weights]:
        raise ExpertError(
            f"{file} has {len(unknown)} vectors that are for no MLP matrix of {model}, the first '{unknown[0]}'; names "
            f"such as '{next(iter(weights))}' were expected. Name the model that it was trained on by --model"
        )
    if missing := [weight for weight in weights if weight not in vectors]:
        raise ExpertError(
            f"{file} lacks {len(missing)} of the {len(weights)} MLP matrices of {model}, the first '{missing[0]}'"
        )
    return {path: vectors[weight] for weight, path in weights.items()}


def _check(file: Path, path: str, vector: Tensor, rank: int) -> None:
    if tuple(vector.shape) != (rank,):
        raise ExpertError(f"{file}: the vector for '{path}' has shape {tuple(vector.shape)}; {(rank,)} was expected")
    if not vector.is_floating_point():
        raise ExpertError(f"{file}: the vector for '{path}' is {vector.dtype}; floating-point numbers were expected")
    if not vector.isfinite().all():
        raise ExpertError(f"{file}: the vector for '{path}' holds values that are not finite")
    if not torch.sigmoid(vector).any():
        raise ExpertError(
            f"{file}: the vector for '{path}' masks every singular value; nothing would be left to rescale"
        )
