"""LoRA (Hu et al. 2021) through peft, under the same training as an expert: the baseline of the paper's table 1.

Nothing but `train --lora` comes here; the app and its answers know experts only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2app.evaluation import Accuracy
from t2app.experts import Measurement, card
from t2app.models.model import Model
from t2app.spectral import require_gradients
from t2app.training.trainer import Trainer

_ADAPTER, _NO_ADAPTER = "default", "__base__"


class LoraModel:
    """Stands where `SpectralModel` stands in a `Model`: a row is adapted by the one LoRA there is, or by none.

    Args:
        model: its linear layers named by `paths` get a LoRA of this rank beside them, which starts without effect.
        seed: of the matrices that start at random.

    Raises:
        ValueError: the model's layers compute no gradient.

    Attributes:
        layers: those that have a LoRA.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], rank: int, seed: int):
        require_gradients(model)
        self.model = model
        self.config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(paths))
        torch.manual_seed(seed)
        inject_adapter_in_model(self.config, model, _ADAPTER)
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        for parameter in self.trainable().values():
            # As the z of an expert, whatever the precision of the weights.
            parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """The LoRA's matrices by name; what is written into them takes effect."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def plan(self, rows: Sequence[Mapping[str, Tensor] | None]) -> list[str] | None:
        """The adapter of every row of a batch, by peft's names; None where all rows have the LoRA."""
        if None not in rows:
            return None
        return [_NO_ADAPTER if row is None else _ADAPTER for row in rows]

    @contextmanager
    def using(self, plan: list[str] | None) -> Iterator[None]:
        """See `SpectralModel.using`."""
        hooks = []
        if plan is not None:
            hook = partial(_with_adapter_names, plan)
            hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in self.layers]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def rows(self, rows: Sequence[Mapping[str, Tensor] | None]):
        """`using` a plan for these rows."""
        return self.using(self.plan(rows))


def with_lora(model: Model, paths: Iterable[str], rank: int, seed: int) -> Model:
    """The model with a LoRA instead of the z of experts; `model` itself can't be used any more."""
    return replace(model, adapted=LoraModel(model.adapted.detach(), paths, rank, seed))


class LoraTrainer(Trainer):
    """Trains the LoRA of a model from `with_lora`, and writes it into a folder in peft's format."""

    @property
    def file(self) -> Path:
        """Where the best LoRA so far is, in a folder with its configuration and card."""
        return self.out / self.name / "adapter_model.safetensors"

    def best_mixture(self) -> Mapping[str, Tensor]:
        """See `Trainer.best_mixture`; what is trained is from then on the best so far."""
        set_peft_model_state_dict(self.model.adapted.model, load_file(self.file), _ADAPTER)
        return self._mixture()

    def add_test(self, measured: Sequence[Accuracy], command: str) -> None:
        """See `Trainer.add_test`; the card is where it is written."""
        rows = [Measurement(row.task, "test", row.mixture, row.correct, row.n) for row in measured]
        self._write_card({"command": command}, rows, self.log.validations())

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        save_file(get_peft_model_state_dict(self.model.adapted.model, adapter_name=_ADAPTER), partial)
        partial.replace(self.file)
        self.model.adapted.config.save_pretrained(self.file.parent)
        self._write_card({}, (), ())

    def _write_card(self, facts: Mapping[str, object], test: Iterable[Measurement], curve: Iterable) -> None:
        identity, lora = self.model.identity, self.model.adapted
        about = {
            "model": f"{identity.model}, revision {identity.revision}",
            "adapts": f"{len(lora.layers)} layers, rank {lora.config.r}, "
            f"{sum(parameter.numel() for parameter in self.parameters.values()):,} numbers",
        }
        text = card(
            f"{self.name} (LoRA)",
            self.task.description,
            about | self._facts() | facts,
            (*self._validation_accuracies(), *test),
            curve,
        )
        (self.file.parent / "README.md").write_text(text, encoding="utf-8")


def _with_adapter_names(names: list[str], _: nn.Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
    return arguments, keywords | {"adapter_names": names}
