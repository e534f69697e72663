"""A LoRA in the place of the z vectors: rows with and without it, and its gradient."""

import pytest
import torch

from t2app.spectral.layer_paths import block_linear_paths
from t2app.training.lora import LoraModel


@pytest.fixture
def lora(small_model) -> LoraModel:
    """A LoRA of rank 2 on all linear layers, moved off its start."""
    model = small_model("llama")
    lora = LoraModel(model, block_linear_paths(model), 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    for value in lora.trainable().values():
        value.data.normal_(std=0.3, generator=generator)
    return lora


IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [5, 6, 7, 8]])


def logits(lora: LoraModel, rows: list) -> torch.Tensor:
    with torch.no_grad(), lora.rows(rows):
        return lora.model(IDS).logits


def test_it_starts_as_the_model_as_it_is(small_model):
    base, model = small_model("llama"), small_model("llama")
    lora = LoraModel(model, block_linear_paths(model), 2, seed=0)
    values = lora.trainable()
    assert len(values) == 2 * len(block_linear_paths(base))
    with torch.no_grad(), lora.rows([values] * 3):
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_rows_without_it_are_the_base_models_and_the_others_are_not(lora, small_model):
    with torch.no_grad():
        base = small_model("llama")(IDS).logits
    values = lora.trainable()
    mixed = logits(lora, [None, values, values])
    torch.testing.assert_close(mixed[0], base[0])
    torch.testing.assert_close(logits(lora, [None] * 3), base)
    torch.testing.assert_close(mixed[1:], logits(lora, [values] * 3)[1:])
    assert (mixed[2] - base[2]).abs().max() > 0.1


def test_gradient_reaches_its_matrices_and_nothing_else(lora):
    values = lora.trainable()
    with lora.rows([values] * 3):
        lora.model(IDS).logits.square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in values.values())
    assert sum(parameter.grad is not None for parameter in lora.model.parameters()) == len(values)
