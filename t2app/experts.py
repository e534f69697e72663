"""Experts: z vectors with what one needs to know about them, pools of them, and mixing.

An expert is one `.safetensors` file: a float32 tensor z (rank,) for every adapted layer, named by the layer's path, and
string metadata. Reading one executes nothing, and everything is checked before it is used. This file does not know how
models are loaded or run; it takes a `WeightsIdentity` to check an expert against.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2app.spectral import Deltas
from t2app.spectral.layer_paths import block_of, place_in_blocks

# How much of an expert is mixed in: one α for the whole model, or one for each of its blocks.
Alpha = float | Sequence[float]

FORMAT_VERSION = "1"
_REQUIRED_METADATA = ("format_version", "model", "revision", "fingerprint", "label", "description")


class ExpertError(ValueError):
    """An expert cannot be used; the message says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class WeightsIdentity:
    """Which weights an expert belongs to.

    Attributes:
        model: the model's name; revision: the revision of its weights.
        fingerprint: SHA-256 (hex) of `spectral.fingerprint`.
        ranks: the rank of every layer that can be adapted, by its path.
    """

    model: str
    revision: str
    fingerprint: str
    ranks: Mapping[str, int]

    @property
    def blocks(self) -> int:
        return 1 + max(map(block_of, self.ranks))


@dataclass(frozen=True)
class Measurement:
    """A measured accuracy: `correct` of `n` greedy answers on a task's split."""

    task: str
    split: str
    mixture: str
    correct: int
    n: int


@dataclass(frozen=True)
class Expert:
    """Attributes:
    name: its name in a pool, the file's stem.
    label: the category of prompts it is for; description: one line that the first pass shows to the model.
    z: (rank,) float32 by layer path.
    training: the settings it was trained with, as JSON can hold them.
    curve: steps and accuracies of the validations in its training.
    """

    name: str
    label: str
    description: str
    weights: WeightsIdentity
    z: Mapping[str, Tensor]
    training: Mapping[str, object] = field(default_factory=dict)
    accuracies: tuple[Measurement, ...] = ()
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def parameters(self) -> int:
        return sum(z.numel() for z in self.z.values())

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over its numbers: which training's result this is, whatever its name."""
        return digest(self.z)


def digest(vectors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over vectors and their names, whatever order they come in."""
    sha = hashlib.sha256()
    for path in sorted(vectors):
        sha.update(path.encode() + vectors[path].detach().cpu().float().numpy().tobytes())
    return sha.hexdigest()


def share(alpha: Alpha) -> float:
    """An α as one number: the mean over the blocks where there is one for each."""
    return sum(alpha) / len(alpha) if isinstance(alpha, Sequence) else float(alpha)


def mean_changes(mixture: Deltas | None) -> dict[str, float]:
    """Mean |z − 1| of every layer that a mixture changes, by the layer's path: where it differs from the base model."""
    return {path: float(delta.abs().mean()) for path, delta in (mixture or {}).items()}


def mix(experts: Iterable[Expert], weights: Mapping[str, Alpha]) -> Deltas | None:
    """z' − 1 = Σ αₖ (zₖ − 1) by layer path (paper, section 3.2), or None where that leaves the base model as it is.

    Where the α sum to 1 this is the paper's Σ αₖ zₖ; what they lack to 1 is the base model's share.

    Args:
        weights: α by expert name; an expert that is not named takes no part.

    Raises:
        ExpertError: a weight names no expert, is not finite, or has another number of blocks than the expert.
    """
    by_name = {expert.name: expert for expert in experts}
    deltas: dict[str, Tensor] = {}
    for name, alpha in weights.items():
        if name not in by_name:
            raise ExpertError(f"there is no expert '{name}'; this model has {_listed(by_name)}")
        expert = by_name[name]
        for path, own in alphas_by_path(expert, alpha).items():
            delta = own * (expert.z[path] - 1)
            deltas[path] = deltas[path] + delta if path in deltas else delta
    return deltas or None


def alphas_by_path(expert: Expert, alpha: Alpha) -> dict[str, float]:
    """An expert's α of every layer that it changes in a mixture, by the layer's path.

    Raises:
        ExpertError: it is not finite, or of another number of blocks than the expert.
    """
    by_block = _by_block(expert.name, alpha, expert.weights.blocks)
    return {path: own for path in expert.z if (own := by_block[block_of(path)]) != 0}


def _by_block(name: str, alpha: Alpha, blocks: int) -> Sequence[float]:
    """An expert's α of every block."""
    alphas = alpha if isinstance(alpha, Sequence) else [float(alpha)] * blocks
    if len(alphas) != blocks:
        raise ExpertError(
            f"expert '{name}' has {len(alphas)} weights; one for each of its {blocks} blocks was expected"
        )
    if wrong := [value for value in alphas if not math.isfinite(value)]:
        raise ExpertError(f"the weight of expert '{name}' is {wrong[0]}; a finite number was expected")
    return alphas


def save_expert(expert: Expert, path: Path) -> None:
    """Write `expert` to `path` and its card beside it, `<stem>.md`; a file that is there is replaced whole.

    Raises:
        ExpertError: it has no label or no description.
    """
    if not expert.label or not expert.description:
        raise ExpertError(f"expert '{expert.name}' has no label or no description; the first pass needs both")
    metadata = {
        "format_version": FORMAT_VERSION,
        "model": expert.weights.model,
        "revision": expert.weights.revision,
        "fingerprint": expert.weights.fingerprint,
        "modules": json.dumps(list(expert.z)),
        "label": expert.label,
        "description": expert.description,
        "training": json.dumps(dict(expert.training)),
        "accuracies": json.dumps([vars(measurement) for measurement in expert.accuracies]),
        "curve": json.dumps(expert.curve),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {name: z.detach().to("cpu", torch.float32).contiguous() for name, z in expert.z.items()}, partial, metadata
    )
    partial.replace(path)
    facts = {
        "model": f"{expert.weights.model}, revision {expert.weights.revision}",
        "weights": f"{expert.weights.fingerprint[:16]}…",
        "adapts": f"{len(expert.z)} layers, {expert.parameters:,} numbers",
    }
    text = card(expert.name, expert.description, facts | dict(expert.training), expert.accuracies, expert.curve)
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def load_expert(path: Path, weights: WeightsIdentity, adopted: bool = False) -> Expert:
    """Read an expert and check it against the model it is to be used with.

    Args:
        adopted: take it, by the user's word, although it was trained on other weights: on a model that has the same
            blocks, under whatever name. The layers' names from the block on and their ranks must be the same.

    Raises:
        ExpertError: the file is missing, truncated or no safetensors file; metadata is missing or of another format
            version; it was trained on other weights and is not adopted; a layer is unknown, of another shape or dtype,
            or not finite.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            z = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open has no iterator
    except FileNotFoundError:
        raise ExpertError(f"there is no expert file {path}") from None
    except (SafetensorError, OSError) as error:
        raise ExpertError(f"{path} cannot be read as a safetensors file ({error}); it may be cut off") from None

    missing = [key for key in _REQUIRED_METADATA if not metadata.get(key)]
    if missing:
        raise ExpertError(f"{path} is no expert file: its metadata lacks {', '.join(missing)}")
    if metadata["format_version"] != FORMAT_VERSION:
        raise ExpertError(
            f"{path} has expert format {metadata['format_version']}; this program reads format {FORMAT_VERSION}"
        )
    if metadata["fingerprint"] != weights.fingerprint and not adopted:
        raise ExpertError(
            f"expert '{path.stem}' was trained on other weights ({metadata['model']}, {metadata['fingerprint'][:8]}…) "
            f"than this model's ({weights.model}, {weights.fingerprint[:8]}…); an expert fits only the weights it was "
            "trained on, so load that model or train the expert anew. If this model is built on that one, as a "
            f"vision-language model on its text model, take its experts with --experts-of {metadata['model']}"
        )
    _check_modules(path, metadata, z)
    if adopted:
        own_paths = {place_in_blocks(own): own for own in weights.ranks}
        z = {own_paths.get(place_in_blocks(name), name): vector for name, vector in z.items()}
    _check_vectors(path, z, weights)
    try:
        training = json.loads(metadata.get("training", "{}"))
        if not isinstance(training, dict):
            raise TypeError("the training settings are no object")
        accuracies = tuple(Measurement(**row) for row in json.loads(metadata.get("accuracies", "[]")))
        curve = tuple((int(step), float(accuracy)) for step, accuracy in json.loads(metadata.get("curve", "[]")))
    except (ValueError, TypeError) as error:
        raise ExpertError(f"{path} has metadata that cannot be read ({error})") from None
    return Expert(path.stem, metadata["label"], metadata["description"], weights, z, training, accuracies, curve)


def card(
    name: str,
    description: str,
    facts: Mapping[str, object],
    accuracies: Iterable[Measurement],
    curve: Iterable[tuple[int, float]],
) -> str:
    """A card in Markdown: what was trained, how, how right it is, and how it came to be so."""
    lines = [f"# {name}", "", description, ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in facts.items()]
    if rows := list(accuracies):
        lines += ["", "| task | split | mixture | correct | n | accuracy |", "| --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row.task} | {row.split} | {row.mixture} | {row.correct} | {row.n} | {row.correct / row.n:.1%} |"
            for row in rows
        ]
    if points := list(curve):
        lines += ["", "| step | validation |", "| --- | --- |"]
        lines += [f"| {step} | {accuracy:.1%} {'█' * round(20 * accuracy)} |" for step, accuracy in points]
    return "\n".join(lines) + "\n"


def _check_modules(path: Path, metadata: Mapping[str, str], z: Mapping[str, Tensor]) -> None:
    """Whether the layers that the file says it adapts are those that it holds vectors for."""
    try:
        listed = json.loads(metadata["modules"])
    except (KeyError, json.JSONDecodeError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        raise ExpertError(f"{path} does not list the layers it adapts")
    absent = sorted(set(listed) ^ set(z))
    if absent:
        raise ExpertError(f"{path} lists and holds different layers; the first that differs is '{absent[0]}'")


def _check_vectors(path: Path, z: Mapping[str, Tensor], weights: WeightsIdentity) -> None:
    for name, vector in z.items():
        if name not in weights.ranks:
            raise ExpertError(f"{path} adapts the layer '{name}', which {weights.model} does not have")
        expected = (weights.ranks[name],)
        if tuple(vector.shape) != expected:
            raise ExpertError(f"{path}: '{name}' has shape {tuple(vector.shape)}; {expected} was expected")
        if vector.dtype != torch.float32:
            raise ExpertError(f"{path}: '{name}' is {vector.dtype}; torch.float32 was expected")
        if not torch.isfinite(vector).all():
            raise ExpertError(f"{path}: '{name}' holds values that are not finite")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
