"""The full-precision weights of a checkpoint's linear layers, one at a time, whatever a model was loaded from it as.

A basis and a fingerprint belong to these weights, so that an expert means the same at every precision. Files are mapped
into memory and not read: no more of a checkpoint has to fit there than one weight.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from t2app.spectral import linear_layer

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


class WeightsError(ValueError):
    """A checkpoint does not hold the weights that were asked for; the message says what is there instead."""


class CheckpointWeights:
    """The weight of every linear layer of a model, as its checkpoint holds it.

    Args:
        folder: the checkpoint, in one safetensors file or in several with an index.
        model: the model that transformers made of it, in any precision and on any device.

    Raises:
        WeightsError: the folder holds no safetensors that can be read.
    """

    def __init__(self, folder: Path, model: PreTrainedModel):
        self.folder = folder
        self._model = model
        self._opened = {file: _open(file) for file in _safetensors_files(folder)}
        keys = {key: file for file, opened in self._opened.items() for key in opened.keys()}  # noqa: SIM118
        self._places = {name: (keys[key], key) for key, name in _parameter_names(sorted(keys), model).items()}

    def __getitem__(self, path: str) -> Tensor:
        """The weight (out_features, in_features) of the layer at `path`, on the CPU and in the checkpoint's dtype.

        Raises:
            WeightsError: the checkpoint has no such tensor, one of another shape, or no floating-point numbers.
        """
        name = f"{path}.weight"
        if name not in self._places:
            raise WeightsError(
                f"{self.folder} holds no tensor '{name}', which the basis of this layer is computed of; a layer whose "
                "weight transformers puts together of several tensors cannot be adapted"
            )
        file, key = self._places[name]
        weight = self._opened[file].get_tensor(key)
        layer = linear_layer(self._model, path)
        expected = (layer.out_features, layer.in_features)
        if not weight.is_floating_point() or weight.element_size() < 2 or tuple(weight.shape) != expected:
            raise WeightsError(
                f"{file.name} holds '{key}' as {weight.dtype} of shape {tuple(weight.shape)}; full-precision weights "
                f"of shape {expected} were expected. A checkpoint that is quantised already has no basis to give: load "
                "the one that it was made of, with --precision 4bit where memory is short"
            )
        return weight

    def items(self, paths: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Path and weight of one layer after another."""
        return ((path, self[path]) for path in paths)


def _safetensors_files(folder: Path) -> list[Path]:
    """The files of a checkpoint in one piece or in several."""
    index = folder / _INDEX
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {_WHOLE}
    except (ValueError, KeyError, AttributeError) as error:
        raise WeightsError(f"{index} cannot be read as the index of a checkpoint ({error})") from None
    if missing := sorted(name for name in names if not (folder / name).exists()):
        raise WeightsError(
            f"{folder} holds no {missing[0]}; the full-precision weights are read from safetensors files, which "
            "`save_pretrained` writes"
        )
    return [folder / name for name in sorted(names)]


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} cannot be read as a safetensors file ({error}); it may be cut off") from None


def _parameter_names(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """What the model calls the tensors that a checkpoint holds under `keys`, without those that are converted.

    Older checkpoints of some architectures have names of their own; which, transformers knows.
    """
    parameters = dict.fromkeys((name for name, _ in model.named_parameters()), True)
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    names = {}
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if name not in parameters and key in parameters:
            name, converted = key, None
        if converted is None:
            names[key] = name
    return names
