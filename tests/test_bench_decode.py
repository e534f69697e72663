"""What `bench decode` compares with gives the answers that ours gives; what `bench profile` sees adds up."""

import logging
from itertools import islice

import pytest
import torch

from t2app.bench.composed import ComposedWeights
from t2app.bench.decode import answering_ways, decode_figures, new_mixture_figures
from t2app.bench.generate import generate, plain_model
from t2app.bench.llama import LlamaCpp, gguf_bytes, llama_cpp_answers, llama_cpp_is_there, write_as_bf16
from t2app.bench.profile import bench_profile, times_by_kind
from t2app.bench.step import even_mixture, random_context, stepper, weight_bytes, weight_operations, with_matrices
from t2app.decoding import collected, decode
from t2app.messages import Sampling
from t2app.models.catalogue import CATALOGUE, DEFAULT_MODEL
from t2app.models.checkpoints import gguf_of
from t2app.models.model import Model, load_model
from t2app.spectral import linear_layer

needs_llama_cpp = pytest.mark.skipif(not llama_cpp_is_there(), reason="llama-cpp-python is not installed")
TOKENS = 12


@pytest.fixture(scope="module")
def mixture(tiny) -> dict[str, torch.Tensor]:
    """z − 1 large enough to change what `tiny` says."""
    generator = torch.Generator().manual_seed(0)
    return {path: 0.5 * torch.randn(rank, generator=generator) for path, rank in tiny.identity.ranks.items()}


@pytest.fixture(scope="module")
def answers(tiny, tiny_folder, mixture) -> dict[str, list[list[int]]]:
    """What every way answers, by name."""
    ways = answering_ways(tiny, plain_model(tiny, str(tiny_folder)), mixture, random_context())
    return {name: way(TOKENS) for name, way in ways.items()}


def test_every_way_gives_the_same_base_answer_of_all_tokens(answers):
    assert set(answers) == {"base", "generate", "both", "reference", "lora"}
    assert all(len(rows[0]) == TOKENS and rows[0] == answers["base"][0] for rows in answers.values())
    assert len(answers["base"]) == len(answers["generate"]) == 1


def test_written_weights_give_the_answer_of_the_edits(answers):
    assert answers["both"][1] == answers["reference"][1] != answers["base"][0]


def test_lora_takes_part_in_its_own_row_only(answers):
    base, adapted = answers["lora"]
    assert base == answers["base"][0] != adapted and len(adapted) == TOKENS


def test_written_weights_are_taken_back(tiny, tiny_folder, mixture):
    plain = plain_model(tiny, str(tiny_folder))
    own = {name: weights.clone() for name, weights in plain.named_parameters()}
    weights = ComposedWeights(plain, tiny.adapted.layers)
    weights.write(mixture)
    assert all(not torch.equal(linear_layer(plain, path).weight, own[f"{path}.weight"]) for path in mixture)
    weights.write(None)
    assert all(torch.equal(value, own[name]) for name, value in plain.named_parameters())


@pytest.fixture(scope="module")
def model() -> Model:
    """The embedded model as the app has it."""
    return load_model(precision="bf16")


def test_plain_model_of_the_real_one_has_nothing_of_ours_and_its_own_weights(model):
    plain = plain_model(model, DEFAULT_MODEL)
    assert not any(type(module).__module__.startswith("t2app") for module in plain.modules())
    assert plain.dtype == torch.bfloat16
    ours = {weights.data_ptr() for weights in model.adapted.model.parameters()}
    assert not any(weights.data_ptr() in ours for weights in plain.parameters())
    assert len(generate(plain, random_context(), 2)[0]) == 2


def test_every_call_of_a_stepper_is_a_step_of_both_rows(model):
    mixtures = [None, even_mixture(model)]
    step = stepper(model, mixtures, 2)
    steps = [step(), step()]
    answers = collected(decode(model.adapted, [random_context()] * 2, mixtures, Sampling(13), ()))
    assert [[tokens[row] for tokens in steps] for row in (0, 1)] == [answer[-2:] for answer in answers]
    with pytest.raises(StopIteration):
        step()


def test_bytes_of_a_step_are_those_of_the_whole_model_and_of_what_edits_read(model):
    base, shape = weight_bytes(model, [None]), CATALOGUE[DEFAULT_MODEL].shape
    assert base.head == 2 * shape.vocabulary * shape.width
    assert base.total == 2 * shape.parameters and base.edits == 0
    ranks = [len(layer.singular_values) for layer in model.adapted.layers.values()]
    packed = all(layer.packed is not None for layer in model.adapted.layers.values())
    # With the kernels a byte an entry and a float32 a vector, without them bfloat16.
    bases = sum(rank**2 + 4 * rank if packed else 2 * rank**2 for rank in ranks)
    first, second = even_mixture(model), even_mixture(model)
    for rows in ([None, first], [first, second]):
        assert weight_bytes(model, rows).total - base.total == bases > 0
    # A matrix is its lower triangle, in blocks of 16, and two float32 a row.
    matrices = sum(rank * (rank + 16) // 2 + 8 * rank for rank in ranks) if packed else bases
    assert weight_bytes(model, [None, with_matrices(model, first)]).edits == matrices > 0
    assert weight_bytes(model, [first, second]).edits == bases


def test_operations_of_a_step_are_two_for_each_weight_and_row(model):
    shape, ranks = CATALOGUE[DEFAULT_MODEL].shape, [layer.rank for layer in model.adapted.layers.values()]
    # Norms are multiplied too, but by no matrix.
    norms = (2 * shape.blocks + 1) * shape.width
    base, mixture = 2 * 3 * (shape.parameters - norms), even_mixture(model)
    assert weight_operations(model, [None] * 3) == base
    edits = 2 * 2 * 2 * sum(rank**2 for rank in ranks)
    assert weight_operations(model, [None, mixture, mixture]) - base == edits > 0
    with_matrices(model, mixture)
    by_matrices = model.adapted.has_matrices_of(mixture)
    assert weight_operations(model, [None, mixture, mixture]) - base == (edits // 2 if by_matrices else edits)


def test_times_of_a_step_are_seen_by_kind_and_leave_the_model_as_it_was(model):
    # As many rows, each with a mixture of its own: their edits take more than a busy machine adds to the same products.
    adapted = [even_mixture(model, number / 8) for number in range(1, 9)]
    steps = {name: stepper(model, rows, 3) for name, rows in (("plain", [None] * 8), ("adapted", adapted))}
    times = [{name: times_by_kind(model, step) for name, step in steps.items()} for _ in range(3)]
    assert all(seconds > 0 for turn in times for kinds in turn.values() for seconds in kinds.values())
    linear = {name: min(turn[name]["linear"] for turn in times) for name in steps}
    assert linear["plain"] < linear["adapted"]
    assert not any(module._forward_hooks for module in model.adapted.model.modules())


def test_profile_prints_shares_that_make_a_whole_step():
    figures = {figure.figure: figure for figure in bench_profile(DEFAULT_MODEL, "bf16", steps=1)}
    kinds = ["products", "attention", "head", "elementwise", "choice", "rest"]
    for row, of_row in (("base", kinds), ("both", [*kinds, "edits"]), ("eight", [*kinds, "edits"])):
        shares = {kind: figures[f"{row}_{kind}_share"].value for kind in of_row}
        assert sum(shares.values()) == pytest.approx(1)
        floor, step = figures[f"{row}_floor"].value, figures[f"{row}_step"].value
        assert figures[f"{row}_bandwidth_share"].value == pytest.approx(floor / step)
        arithmetic_floor = figures[f"{row}_arithmetic_floor"].value
        assert figures[f"{row}_arithmetic_share"].value == pytest.approx(arithmetic_floor / step)
    read = figures["blocks_read"].value + figures["head_read"].value
    assert figures["base_floor"].value == pytest.approx(read / figures["read_bandwidth"].value)


def test_decode_tells_what_a_new_mixture_waits_for_where_edits_are_by_matrices(model, tiny):
    by_matrices = all(layer.takes_matrix for layer in model.adapted.layers.values())
    assert [figure.figure for figure in new_mixture_figures(model)] == ["new_mixture"] * by_matrices
    assert not list(new_mixture_figures(tiny)), "in fp32 there are none"


def test_decode_prints_its_ratios_and_says_what_it_leaves_out(tiny, tiny_folder, mixture, caplog):
    with caplog.at_level(logging.WARNING):
        figures = {row.figure: row for row in decode_figures(tiny, str(tiny_folder), mixture, 3, tokens=2, rounds=1)}
    assert figures["both_over_base"].n == 3
    for ratio, over, under in (
        ("base_over_generate", "generate", "base"),
        ("both_over_reference", "reference", "both"),
        ("both_over_lora", "lora", "both"),
        ("lora_over_generate", "lora", "generate"),
    ):
        times = [figures[f"{way}_seconds"].value for way in (over, under)]
        assert figures[ratio].value == pytest.approx(times[0] / times[1])
    assert figures["base_tokens_per_second"].value == pytest.approx(2 / figures["base_seconds"].value)
    assert "base_over_llama_cpp" not in figures
    reason = "is had from safetensors" if llama_cpp_is_there() else "llama-cpp-python is not installed"
    assert reason in caplog.text


def test_steps_in_8bit_are_held_against_those_in_bf16(real_8bit):
    rows = decode_figures(real_8bit, DEFAULT_MODEL, even_mixture(real_8bit), 1, tokens=2, rounds=1)
    figures = {figure.figure: figure.value for figure in islice(rows, 7)}  # no whole answers
    for name in ("base", "both"):
        ratio = figures[f"{name}_step_in_bf16"] / figures[f"{name}_step"]
        assert figures[f"{name}_over_bf16"] == pytest.approx(ratio)


def test_decode_says_that_packed_weights_cannot_be_written(real_4bit, caplog):
    with caplog.at_level(logging.WARNING):
        figures = list(decode_figures(real_4bit, DEFAULT_MODEL, even_mixture(real_4bit), 1, tokens=2, rounds=1))
    assert [figure.figure for figure in figures] == ["base_step", "both_step", "both_over_base"]
    assert "give --precision bf16" in caplog.text


def test_bytes_of_a_gguf_file_leave_out_an_embedding_that_is_not_the_output_layer(gguf):
    vocabulary, width, mlp_width, blocks = 96, 32, 64, 2
    block = 4 * width**2 + 3 * width * mlp_width + 2 * width
    assert gguf_bytes(gguf) == 4 * (blocks * block + width + vocabulary * width)


def test_gguf_file_is_had_where_a_model_comes_from_one(gguf, tiny_folder, tmp_path):
    assert gguf_of(str(gguf), tmp_path, lambda message, share: None) == gguf
    assert gguf_of(str(tiny_folder), tmp_path, lambda message, share: None) is None


@needs_llama_cpp
def test_llama_cpp_answers_as_ours_does(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    adapted, context = load_model(str(gguf), "fp32", layers=lambda path: False).adapted, list(range(5, 25))
    ours = collected(decode(adapted, [context], [None], Sampling(TOKENS), ()))
    llama = LlamaCpp(gguf)
    assert [llama.answer(context, TOKENS)] == [llama.answer(context, TOKENS)] == ours


@needs_llama_cpp
def test_weights_as_bf16_are_half_as_many_bytes(gguf, tmp_path):
    write_as_bf16(gguf, tmp_path / "bf16.gguf")
    assert gguf_bytes(tmp_path / "bf16.gguf") == pytest.approx(gguf_bytes(gguf) / 2, rel=0.05)


@needs_llama_cpp
def test_file_that_llama_cpp_fails_on_is_known_before_it_is_measured(gguf, tmp_path):
    assert llama_cpp_answers(gguf)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:-100_000])
    assert not llama_cpp_answers(broken)
