"""Expert files and mixtures: what is written is read back, what does not fit is refused, and nothing in one is run."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2app.experts import (
    FORMAT_VERSION,
    Expert,
    ExpertError,
    Measurement,
    WeightsIdentity,
    load_expert,
    mean_changes,
    mix,
    save_expert,
    share,
)
from t2app.models.catalogue import classifier_file, expert_files

WEIGHTS = WeightsIdentity("tiny", "r1", "a1b2c3d4" * 8, {"layers.0.up": 4, "layers.0.down": 3})
METADATA = {
    "format_version": FORMAT_VERSION,
    "model": "tiny",
    "revision": "r1",
    "fingerprint": WEIGHTS.fingerprint,
    "modules": json.dumps(["layers.0.up", "layers.0.down"]),
    "label": "math",
    "description": "calculating",
}
TENSORS = {"layers.0.up": torch.ones(4), "layers.0.down": torch.ones(3)}


def make_expert(name: str, seed: int) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    z = {path: torch.randn(rank, generator=generator) for path, rank in WEIGHTS.ranks.items()}
    return Expert(name, "math", "calculating — ×, ÷", WEIGHTS, z)


MATH, CODE = make_expert("math", 0), make_expert("code", 1)


def test_expert_that_is_written_is_read_back_as_it_was(tmp_path):
    expert = replace(
        MATH,
        training={"steps": 3, "learning_rate": 2e-3, "advantage": "group"},
        accuracies=(Measurement("arithmetic", "test", "base", 5, 10), Measurement("arithmetic", "test", "math", 7, 10)),
        curve=((0, 0.5), (10, 0.7)),
    )
    file = tmp_path / "new" / "math.safetensors"
    save_expert(expert, file)
    read = load_expert(file, WEIGHTS)
    assert replace(read, z={}) == replace(expert, z={})
    assert read.z.keys() == expert.z.keys()
    assert all(torch.equal(read.z[path], z) for path, z in expert.z.items())
    assert read.parameters == 7


def test_writing_replaces_what_was_there_and_leaves_only_the_expert_and_its_card(tmp_path):
    file = tmp_path / "math.safetensors"
    save_expert(MATH, file)
    save_expert(replace(CODE, name="math"), file)
    assert torch.equal(load_file(file)["layers.0.up"], CODE.z["layers.0.up"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["math.md", "math.safetensors"]


def test_expert_that_is_trained_is_written_as_float32_without_its_gradient(tmp_path):
    z = {path: torch.nn.Parameter(z.double()) for path, z in MATH.z.items()}
    save_expert(replace(MATH, z=z), tmp_path / "math.safetensors")
    read = load_expert(tmp_path / "math.safetensors", WEIGHTS)
    assert all(torch.equal(read.z[path], z) and not read.z[path].requires_grad for path, z in MATH.z.items())


def test_pool_is_all_experts_of_a_models_folder_by_name_and_empty_without_the_folder(tmp_path):
    for expert in (MATH, CODE):
        save_expert(expert, tmp_path / "owner--name" / f"{expert.name}.safetensors")
    assert [file.stem for file in expert_files("owner/name", tmp_path)] == ["code", "math"]
    assert expert_files("owner/other", tmp_path) == []


def test_classification_expert_lies_in_the_folder_and_is_not_mixed(tmp_path):
    assert classifier_file("owner/name", tmp_path) is None
    file = tmp_path / "owner--name" / "classifier.safetensors"
    for expert in (MATH, replace(CODE, name="classifier")):
        save_expert(expert, file.with_name(f"{expert.name}.safetensors"))
    assert classifier_file("owner/name", tmp_path) == file
    assert [file.stem for file in expert_files("owner/name", tmp_path)] == ["math"]


def test_card_says_what_the_file_says(tmp_path):
    accuracies = (Measurement("arithmetic", "test", "math", 7, 10),)
    expert = replace(MATH, training={"best_step": 40}, accuracies=accuracies, curve=((0, 0.2), (40, 0.7)))
    save_expert(expert, tmp_path / "math.safetensors")
    text = (tmp_path / "math.md").read_text(encoding="utf-8")
    assert text.startswith("# math\n\ncalculating — ×, ÷\n")
    for line in (
        "- model: tiny, revision r1",
        f"- weights: {WEIGHTS.fingerprint[:16]}…",
        "- adapts: 2 layers, 7 numbers",
        "- best step: 40",
        "| arithmetic | test | math | 7 | 10 | 70.0% |",
        "| 40 | 70.0% ██████████████ |",
    ):
        assert line in text.splitlines()


def test_weights_that_sum_to_one_mix_to_the_papers_sum_of_experts():
    deltas = mix([MATH, CODE], {"math": 0.3, "code": 0.7})
    for path in WEIGHTS.ranks:
        torch.testing.assert_close(1 + deltas[path], 0.3 * MATH.z[path] + 0.7 * CODE.z[path])


def test_what_weights_lack_to_one_is_the_base_model():
    deltas = mix([MATH, CODE], {"math": 0.5, "code": -0.2})
    for path in WEIGHTS.ranks:
        torch.testing.assert_close(1 + deltas[path], 0.5 * MATH.z[path] - 0.2 * CODE.z[path] + 0.7)


def test_experts_of_different_layers_mix_layer_by_layer():
    up_only = replace(CODE, z={"layers.0.up": CODE.z["layers.0.up"]})
    deltas = mix([MATH, up_only], {"math": 0.5, "code": 0.5})
    torch.testing.assert_close(deltas["layers.0.down"], 0.5 * (MATH.z["layers.0.down"] - 1))
    torch.testing.assert_close(mix([up_only], {"code": 1})["layers.0.up"], CODE.z["layers.0.up"] - 1)
    assert "layers.0.down" not in mix([up_only], {"code": 1})


@pytest.mark.parametrize("weights", [{}, {"math": 0, "code": 0.0}], ids=["none", "all zero"])
def test_no_weight_and_weights_of_zero_are_the_base_model(weights):
    assert mix([MATH, CODE], weights) is None


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(alpha):
    with pytest.raises(ExpertError, match="the weight of expert 'math' is (nan|inf)"):
        mix([MATH], {"math": alpha})


def test_weight_of_an_unknown_expert_is_refused_with_the_names_there_are():
    with pytest.raises(ExpertError, match="there is no expert 'poetry'; this model has code, math"):
        mix([MATH, CODE], {"poetry": 0})


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(ExpertError, match="there is no expert file"):
        load_expert(tmp_path / "math.safetensors", WEIGHTS)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_file_is_refused(tmp_path, kept):
    file = tmp_path / "math.safetensors"
    save_expert(MATH, file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ExpertError, match="cannot be read as a safetensors file"):
        load_expert(file, WEIGHTS)


def test_folder_in_the_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ExpertError, match="cannot be read as a safetensors file"):
        load_expert(tmp_path, WEIGHTS)


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("write", [lambda data, file: file.write_bytes(pickle.dumps(data)), torch.save])
def test_pickle_is_refused_and_never_run(tmp_path, write):
    trap, file = tmp_path / "sprung", tmp_path / "math.safetensors"
    write({"layers.0.up": torch.ones(4), "trap": Trap(trap)}, file)
    with pytest.raises(ExpertError, match="cannot be read as a safetensors file"):
        load_expert(file, WEIGHTS)
    assert not trap.exists()


@pytest.mark.parametrize("key", ["format_version", "model", "revision", "fingerprint", "label", "description"])
def test_missing_metadata_is_refused_by_name(tmp_path, key):
    file = tmp_path / "math.safetensors"
    save_file(TENSORS, file, {name: value for name, value in METADATA.items() if name != key})
    with pytest.raises(ExpertError, match=f"its metadata lacks {key}"):
        load_expert(file, WEIGHTS)


def test_safetensors_file_without_metadata_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "math.safetensors")
    with pytest.raises(ExpertError, match="is no expert file"):
        load_expert(tmp_path / "math.safetensors", WEIGHTS)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format_version": "2"}, "has expert format 2; this program reads format 1"),
        (
            {"fingerprint": "ff" * 32},
            r"trained on other weights \(tiny, ffffffff…\) than this model's \(tiny, a1b2c3d4…\)",
        ),
        ({"modules": ""}, "does not list the layers"),
        ({"modules": "[layers"}, "does not list the layers"),
        ({"modules": "5"}, "does not list the layers"),
        ({"modules": '[["layers.0.up"], ["layers.0.down"]]'}, "does not list the layers"),
        ({"modules": '["layers.0.up"]'}, "lists and holds different layers; the first that differs is 'layers.0.down'"),
        (
            {"modules": '["layers.0.up", "layers.0.down", "layers.1.up"]'},
            "lists and holds different layers; the first that differs is 'layers.1.up'",
        ),
        ({"training": "{"}, "has metadata that cannot be read"),
        ({"training": "[1]"}, "has metadata that cannot be read"),
        ({"accuracies": '[{"task": "arithmetic"}]'}, "has metadata that cannot be read"),
        ({"curve": "[[1]]"}, "has metadata that cannot be read"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path, metadata, message):
    file = tmp_path / "math.safetensors"
    save_file(TENSORS, file, METADATA | metadata)
    with pytest.raises(ExpertError, match=message):
        load_expert(file, WEIGHTS)


@pytest.mark.parametrize(
    ("path", "vector", "message"),
    [
        ("layers.9.up", torch.ones(4), "adapts the layer 'layers.9.up', which tiny does not have"),
        ("layers.0.up", torch.ones(5), r"'layers.0.up' has shape \(5,\); \(4,\) was expected"),
        ("layers.0.up", torch.ones(4, 1), r"'layers.0.up' has shape \(4, 1\); \(4,\) was expected"),
        (
            "layers.0.up",
            torch.ones(4, dtype=torch.float16),
            "'layers.0.up' is torch.float16; torch.float32 was expected",
        ),
        ("layers.0.up", torch.tensor([1, 1, 1, torch.nan]), "'layers.0.up' holds values that are not finite"),
        ("layers.0.up", torch.tensor([1, 1, 1, -torch.inf]), "'layers.0.up' holds values that are not finite"),
    ],
)
def test_vector_that_does_not_fit_the_model_is_refused(tmp_path, path, vector, message):
    file = tmp_path / "math.safetensors"
    save_file({path: vector}, file, METADATA | {"modules": json.dumps([path])})
    with pytest.raises(ExpertError, match=message):
        load_expert(file, WEIGHTS)


def test_weight_for_each_block_mixes_each_block_by_its_own():
    weights = WeightsIdentity("tiny", "r1", "a1", {"layers.0.up": 2, "layers.1.up": 2})
    expert = Expert("math", "math", "calculating", weights, {path: torch.full((2,), 3.0) for path in weights.ranks})
    deltas = mix([expert], {"math": [0.5, 0.25]})
    assert {path: delta.tolist() for path, delta in deltas.items()} == {
        "layers.0.up": [1.0, 1.0],
        "layers.1.up": [0.5, 0.5],
    }
    assert list(mix([expert], {"math": [0.0, 1.0]})) == ["layers.1.up"]
    assert share([0.5, 0.25]) == 0.375 and share(1) == 1.0
    with pytest.raises(ExpertError, match="expert 'math' has 3 weights; one for each of its 2 blocks was expected"):
        mix([expert], {"math": [1.0, 1.0, 1.0]})


def test_fingerprint_of_an_expert_is_of_its_numbers_and_not_of_its_name():
    assert replace(MATH, name="sums").fingerprint == MATH.fingerprint != CODE.fingerprint


def test_changes_of_a_mixture_are_the_mean_distance_of_z_from_one():
    deltas = mix([MATH], {"math": -0.5})
    assert mean_changes(deltas) == pytest.approx(
        {path: 0.5 * (MATH.z[path] - 1).abs().mean().item() for path in WEIGHTS.ranks}
    )
    assert mean_changes(None) == {}
