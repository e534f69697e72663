"""Answers by what there is without us: transformers' `generate` on a model that has nothing of ours in it.

By it the base model answers; both answers are made of it the authors' way, and by a LoRA in a mixed batch of peft's.
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from t2app.bench.composed import ComposedWeights
from t2app.models.checkpoints import checkpoint_of
from t2app.models.model import Model
from t2app.spectral import Deltas

_LORA_RANK = 16


def plain_model(model: Model, name: str) -> PreTrainedModel:
    """A model of the same checkpoint and precision as transformers loads it: its layers are torch's own.

    Args:
        name: what `model` was loaded by.
    """
    ours = model.adapted.model
    plain = type(ours).from_pretrained(checkpoint_of(name, lambda message, share: None).folder, dtype=ours.dtype)
    return plain.to(ours.device).eval().requires_grad_(False)


def generate(
    plain: PreTrainedModel, context: Sequence[int], tokens: int, adapters: Sequence[str] | None = None
) -> list[list[int]]:
    """Greedy answers of `tokens` tokens each, by row; the end of a turn does not end them.

    Args:
        plain: the model, or one of peft's.
        adapters: for one of peft's, the adapter of every row by peft's names; there is one row by default.
    """
    ids = torch.tensor([context] * (1 if adapters is None else len(adapters)), device=plain.device)
    named = {} if adapters is None else {"adapter_names": list(adapters)}
    answers = plain.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        **named,
    )
    return answers[:, len(context) :].tolist()


def generate_composed(
    plain: PreTrainedModel, weights: ComposedWeights, mixture: Deltas, context: Sequence[int], tokens: int
) -> list[list[int]]:
    """The base model's answer and the adapted one, the authors' way: W' is written into the weights for its answer.

    Args:
        weights: those of `plain`, which are its own again afterwards.
    """
    weights.write(mixture)
    adapted = generate(plain, context, tokens)
    weights.write(None)
    return [*generate(plain, context, tokens), *adapted]


class LoraBeside:
    """A model with a LoRA beside its layers, as peft makes it; the weights are those of `plain`, which stays as it is.

    It is untrained, which costs the same. It is in the model's precision: what it takes part in is then as quick as it
    can be.

    Args:
        paths: of the layers.
    """

    def __init__(self, plain: PreTrainedModel, paths: Iterable[str]):
        from peft import LoraConfig, get_peft_model  # here, because it takes seconds to import

        shared = copy.deepcopy(plain, {id(weight): weight for weight in plain.parameters()})
        config = LoraConfig(r=_LORA_RANK, target_modules=list(paths), init_lora_weights=False)
        self._model = get_peft_model(shared, config, autocast_adapter_dtype=False).eval()

    def generate(self, context: Sequence[int], tokens: int) -> list[list[int]]:
        """The base model's answer and the LoRA's, two rows of one batch."""
        return generate(self._model, context, tokens, ["__base__", "default"])
