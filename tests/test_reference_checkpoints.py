"""Checkpoints of the authors' code as experts: the same weights as it composes, and nothing taken that does not fit."""

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from t2app.cli import main
from t2app.experts import ExpertError, load_expert, mix
from t2app.models.model import Model
from t2app.reference_checkpoints import expert_of_checkpoint, read_checkpoint
from t2app.spectral.layer_paths import block_linear_paths, is_mlp_path

# It cancels; a power of two does so exactly in bfloat16, in which the authors multiply by it.
MAX_MULT = 2.0


def reference_vectors(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """p as the authors' policy has it, spread as a long training would."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter((0.1 + 0.5 * torch.randn(min(weight.shape), generator=generator)).to(dtype))
        for name, weight in model.state_dict().items()
        if "mlp" in name
    }


def reference_weights(model: nn.Module, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as the authors' code composes them: decomposed, masked and rescaled to the same sum of σ."""
    weights = {}
    for name, vector in vectors.items():
        u, s, v = torch.svd(model.state_dict()[name])
        mask = torch.sigmoid(vector.detach()) * MAX_MULT
        weights[name] = (u @ torch.diag_embed(s * mask.float()) @ v.T) * (s.sum() / (s * mask).sum())
    return weights


def learnable_params(vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    return vectors


def policy_params(vectors: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    return OrderedDict((f"learnable_params_module_list.{i}", p.detach()) for i, p in enumerate(vectors.values()))


FORMS = {"learnable_params.pt": learnable_params, "policy_params.pt": policy_params}


@pytest.fixture(scope="module")
def plain(tiny_folder) -> nn.Module:
    """The model of `tiny` with nothing adapted."""
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))


def options(model: Path, out: Path) -> list[str]:
    # fp32, for which no kernel is compiled into the test's own cache.
    return ["--model", str(model), "--precision", "fp32", "--out", str(out)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_imported_expert_is_the_model_that_the_authors_code_composes(tiny_folder, tmp_path, tiny, plain, form, dtype):
    vectors = reference_vectors(plain, dtype)
    torch.save(FORMS[form](vectors), tmp_path / form)
    main(["import", str(tmp_path / form), "--name", "math", *options(tiny_folder, tmp_path)])
    expert = load_expert(tmp_path / "math.safetensors", tiny.identity)
    assert len(expert.z) == 2 * 3 and expert.training["imported_from"] == form

    ids = torch.randint(3, 1000, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = functional_call(plain, reference_weights(plain, vectors), (ids,)).logits
        untouched = plain(ids).logits
        with tiny.adapted.rows([None, mix([expert], {"math": 1.0})]):
            logits = tiny.adapted.model(ids.to(tiny.adapted.model.device)).logits.cpu()
    tolerance = 1e-3 * (expected.max() - expected.min())
    assert (logits - expected)[1].abs().max() <= tolerance
    assert (expected - untouched)[1].abs().max() > 10 * tolerance


def test_import_says_where_an_expert_came_from_and_never_replaces_one(tiny_folder, tmp_path, tiny, plain, capsys):
    file = tmp_path / "policy_params.pt"
    torch.save(policy_params(reference_vectors(plain)), file)
    command = ["import", str(file), "--name", "sums", *options(tiny_folder, tmp_path)]
    with pytest.raises(SystemExit, match="'sums' is none of the categories math, code, reasoning"):
        main(command)
    main([*command, "--label", "math", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert (row["event"], row["name"], row["label"], row["layers"]) == ("imported", "sums", "math", 6)
    expert = load_expert(Path(row["file"]), tiny.identity)
    assert expert.label == "math" and expert.description
    assert "SakanaAI/self-adaptive-llms" in expert.training["trained_by"]
    assert expert.training["command"].startswith("python -m t2app import ")
    with pytest.raises(SystemExit, match=r"there is an expert .*sums.safetensors already"):
        main([*command, "--label", "math"])


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig])
def test_order_of_the_numbered_form_is_that_of_the_state_dict_of_an_8b_model(config):
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config(**shape))
    names = [name for name in model.state_dict() if "mlp" in name]
    first = [f"model.layers.0.mlp.{layer}_proj.weight" for layer in ("gate", "up", "down")]
    assert names[:3] == first
    assert names == [f"{path}.weight" for path in block_linear_paths(model, is_mlp_path)] and len(names) == 96


def import_of(content: object, file: Path, model: Model) -> None:
    torch.save(content, file)
    expert_of_checkpoint(read_checkpoint(file), "math", "math", "sums", model)


def with_first(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """The vectors with the first one changed."""
    return lambda vectors: vectors | {next(iter(vectors)): change(next(iter(vectors.values())).detach())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: list(vectors.values()), "holds a list; vectors by name were expected"),
        (lambda vectors: {}, "holds a dict; vectors by name were expected"),
        (lambda vectors: vectors | {"step": 3}, "holds a int as 'step'; vectors by name were expected"),
        (
            lambda vectors: vectors | {"model.layers.0.self_attn.q_proj.weight": torch.ones(32)},
            r"has 1 vectors that are for no MLP matrix of tiny, the first 'model.layers.0.self_attn.q_proj.weight'",
        ),
        (
            lambda vectors: {"adaptive_weights": torch.ones(3, 1)} | policy_params(vectors),
            r"the first 'adaptive_weights'; names such as 'model.layers.0.mlp.gate_proj.weight' were expected",
        ),
        (
            lambda vectors: {name: vector for name, vector in vectors.items() if "1.mlp.up" not in name},
            "lacks 1 of the 6 MLP matrices of tiny, the first 'model.layers.1.mlp.up_proj.weight'",
        ),
        (
            lambda vectors: policy_params(vectors | {"one.more": torch.ones(32)}),
            "numbers 7 vectors from 0 to 6; tiny has 6 MLP matrices, so 0 to 5 was expected",
        ),
        (with_first(lambda p: p[1:]), r"'model.layers.0.mlp.gate_proj' has shape \(31,\); \(32,\) was expected"),
        (with_first(lambda p: p[None]), r"has shape \(1, 32\); \(32,\) was expected"),
        (with_first(lambda p: p.long()), "is torch.int64; floating-point numbers were expected"),
        (with_first(lambda p: p * torch.nan), "holds values that are not finite"),
        (with_first(lambda p: p / 0), "holds values that are not finite"),
        (with_first(lambda p: p * 0 - 1e4), "masks every singular value"),
    ],
)
def test_checkpoint_that_does_not_fit_the_model_is_refused(tmp_path, tiny, plain, change, message):
    with pytest.raises(ExpertError, match=message):
        import_of(change(reference_vectors(plain)), tmp_path / "learnable_params.pt", tiny)


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_checkpoint_with_objects_is_refused_and_never_run(tmp_path):
    trap, file = tmp_path / "sprung", tmp_path / "policy_params.pt"
    torch.save({"learnable_params_module_list.0": torch.ones(4), "trap": Trap(trap)}, file)
    with pytest.raises(ExpertError, match="it is damaged, or it holds objects, which could run code"):
        read_checkpoint(file)
    assert not trap.exists()


@pytest.mark.parametrize("zip_file", [True, False])
def test_damaged_checkpoint_is_refused_wherever_it_is_cut(tmp_path, zip_file):
    file = tmp_path / "policy_params.pt"
    torch.save({"learnable_params_module_list.0": torch.ones(64)}, file, _use_new_zipfile_serialization=zip_file)
    whole = file.read_bytes()
    for kept in range(0, len(whole) - 8, len(whole) // 40):
        file.write_bytes(whole[:kept])
        with pytest.raises(ExpertError, match="policy_params.pt (cannot be read|was not read)"):
            read_checkpoint(file)


def test_checkpoint_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "policy_params.pt", tmp_path):
        with pytest.raises(ExpertError, match="there is no checkpoint file"):
            read_checkpoint(path)
