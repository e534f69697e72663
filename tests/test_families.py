"""What the families that are supported keep, by the checks that the table of `python -m t2app families` is made of."""

import re

import pytest
from torch import nn

from t2app.models.families import CHECKS, FAMILIES, check_family, families_table, refusal
from t2app.spectral.layer_paths import block_linear_paths


@pytest.fixture(scope="module")
def checked():
    """Checks a family once, whatever of it is asked."""
    results = {}

    def checked(name):
        if name not in results:
            results[name] = check_family(name)
        return results[name]

    return checked


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_keeps(checked, family, check):
    outcome = checked(family)[check]
    assert outcome.kept, outcome.seen


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("Mixtral", r"'model.layers.0.mlp.experts.gate_up_proj' \(4 × 384 × 64\) belongs to MixtralExperts"),
        ("Qwen3-MoE", r"'model.layers.0.mlp.experts.gate_up_proj' \(4 × 128 × 64\) belongs to Qwen3MoeExperts"),
        ("GPT-2", r"'transformer.h.0.attn.c_attn.weight' \(64 × 192\) belongs to Conv1D"),
    ],
)
def test_model_whose_weights_are_not_those_of_linear_layers_is_refused_by_naming_them(family, layer):
    assert re.search(rf"cannot be adapted: its weight {layer}, which is no torch.nn.Linear", refusal(family))


def test_list_inside_a_block_is_not_taken_for_the_list_of_blocks():
    block = nn.Module()
    block.branches = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    assert block_linear_paths(model) == [f"blocks.0.branches.{branch}" for branch in range(3)]


def test_table_shows_what_was_found(checked):
    table = families_table({"Llama": checked("Llama")}, {"GPT-2": None})
    assert "| Llama | ✓ 14 layers, 6 of the MLP | ✓ " in table and "| GPT-2 | ✗ nothing |" in table
