"""Weights held in 8 bits: their layers against exact products in float64, and a model that is loaded so."""

from collections.abc import Sequence

import pytest
import torch
from test_kernels import fast_layer, kernel, random, relative_error, threads  # noqa: F401
from torch import nn
from torch.nn import functional as F

from t2app.experts import mix
from t2app.kernels.build import can_have_kernels, has_tiles
from t2app.kernels.byte_linear import (
    SCALED_TOGETHER,
    ByteLinear,
    PackedWeight,
    hold_in_bytes,
    multiplies_bytes,
    pack_weight,
    unpack_weight,
)
from t2app.kernels.edits import MatrixEdit, VectorEdit, pack_vectors, packed_matrix
from t2app.kernels.linear import MANY_ROWS, FastLinear, Kind, Layer
from t2app.key_values import GrowingCache
from t2app.models.catalogue import CATALOGUE, DEFAULT_MODEL, EIGHT_BIT
from t2app.models.checkpoints import ModelError
from t2app.models.model import Model, load_model, resolve_precision
from t2app.spectral import Deltas, SpectralModel, basis_of, linear_layer
from t2app.tasks.registry import task_named

# With some rows and columns that no tile divides.
SHAPES = [(1536, 576), (576, 1536), (192, 576), (41, 32), (7, 128), (203, 224)]


def byte_layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> ByteLinear:
    return ByteLinear(fast_layer(weight, bias))


def packed_numbers(layer: ByteLinear) -> torch.Tensor:
    """What the integers and scales of a layer stand for, in float64."""
    return layer.weight.double() * layer.scales.double().repeat_interleave(SCALED_TOGETHER, 1)


# The form


def test_packed_weight_is_the_weight_within_half_a_step_of_its_scale():
    weight = random(41, 192) * torch.logspace(-20, 20, 41)[:, None]
    packed = pack_weight(weight)
    steps = packed.scales.repeat_interleave(SCALED_TOGETHER, 1)
    assert packed.integers.dtype == torch.int8 and packed.integers.abs().max() == 127
    assert ((packed.integers * steps - weight.float()).abs() <= 0.5001 * steps).all()


def test_packed_weight_is_had_back_as_bfloat16_holds_it():
    packed = pack_weight(random(41, 192))
    numbers = packed.integers * packed.scales.repeat_interleave(SCALED_TOGETHER, 1)
    assert torch.equal(unpack_weight(packed), numbers.to(torch.bfloat16))


def test_numbers_that_are_all_zeros_stay_so():
    weight = random(9, 192)
    weight[4, 64:96] = 0
    assert not unpack_weight(pack_weight(weight))[4, 64:96].any()


# Products


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 40, MANY_ROWS, MANY_ROWS + 1])
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_products_are_as_exact_as_bfloat16_can_hold(shape, rows, threads):  # noqa: F811
    x, bias = random(rows, 1, shape[1]), random(shape[0])
    layer = byte_layer(random(*shape), bias)
    numbers = packed_numbers(layer) if multiplies_bytes(rows) else layer.whole_weight.double()
    exact = F.linear(x.double(), numbers, bias.double())
    found = layer(x)
    assert found.shape == (rows, 1, shape[0])
    assert relative_error(found, exact) < 2**-8
    assert relative_error(byte_layer(random(*shape))(x), exact - bias.double()) < 2**-8


@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_few_rows_get_does_not_depend_on_their_company(shape):
    layer, x = byte_layer(random(*shape)).kernel(Kind.FEW), random(20, 1, shape[1])
    together = layer(x)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 7), slice(5, 9), slice(7, 20)):
        assert torch.equal(layer(x[rows]), together[rows])


@pytest.mark.parametrize("kind", [Kind.MANY, Kind.TILES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [5, 21, 64])
def test_many_rows_get_what_the_widened_weight_gives(kind, shape, rows):
    if kind == Kind.TILES and not has_tiles():
        pytest.skip("this CPU has no tiles")
    x, bias = random(rows, shape[1]), random(shape[0])
    layer = byte_layer(random(*shape), bias)
    widened = fast_layer(layer.whole_weight, bias)
    assert torch.equal(layer.kernel(kind)(x), widened.kernel(kind)(x))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_products_of_what_is_alike_in_all_places_do_not_overflow(sign, size):
    x, weight = (torch.full((rows, 1536), value).to(torch.bfloat16) for rows, value in ((3, size), (25, sign * size)))
    assert relative_error(byte_layer(weight)(x), F.linear(x.double(), weight.double())) < 2**-8


def test_small_numbers_beside_a_large_one_are_not_lost():
    x, layer = random(3, 576), byte_layer(random(25, 576))
    x[:, 5] = 1000
    layer.weight[:, 5] = 0
    assert relative_error(layer(x), F.linear(x.double(), packed_numbers(layer))) < 2**-6


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_stays_so_in_its_row_alone(value):
    layer, x = byte_layer(random(25, 576), random(25)), random(3, 576)
    expected = layer(x)
    x[1, 7] = value
    found = layer(x)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_rows_of_zeros_give_the_bias():
    weight, bias, x = random(25, 576), random(25), random(3, 576)
    weight[3], x[1] = 0, 0
    found = byte_layer(weight, bias)(x)
    assert torch.equal(found[1], bias) and torch.equal(found[:, 3], bias[3].expand(3))


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (192, 576), (64, 192), (576, 576)])
@pytest.mark.parametrize("by", ["vectors", "matrix"])
@pytest.mark.parametrize("first, count, rows", [(0, 1, 1), (1, 1, 2), (1, 2, 3), (5, 7, 12)])
@pytest.mark.parametrize("biased", [True, False])
def test_adapted_layer_is_as_exact_as_its_roundings_and_leaves_the_other_rows(shape, by, first, count, rows, biased):
    bias = random(shape[0]) if biased else None
    layer = byte_layer(random(*shape) / shape[1] ** 0.5, bias)
    basis = basis_of(layer.whole_weight)
    x = random(rows, 1, shape[1])
    delta = 0.1 * torch.randn(basis.rank, generator=torch.Generator().manual_seed(0))
    own, edited_rows = layer.kernel_for(rows), slice(first, first + count)
    if by == "vectors":
        packed = pack_vectors(basis.vectors.T.to(torch.bfloat16).contiguous())
        edit = VectorEdit(packed, basis.edits_input, edited_rows, delta[None])
    else:
        edit = MatrixEdit(packed_matrix(basis.vectors.T, delta), basis.edits_input, edited_rows)
    found = own(x, edit)
    vectors, exact = basis.vectors.double(), packed_numbers(layer)
    change = vectors * delta @ vectors.T  # as the basis of the full-precision weights says, not one of the packed
    exact = exact + (exact @ change if basis.edits_input else change @ exact)
    exact = F.linear(x.double(), exact, None if bias is None else bias.double())
    assert relative_error(found[edited_rows], exact[edited_rows]) < 2**-7
    others = [row for row in range(rows) if not first <= row < first + count]
    assert torch.equal(found[others], own(x)[others])


def test_gradient_goes_through_the_weight():
    layer, x = byte_layer(random(192, 576), random(192)), random(3, 576)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    layer(found).square().sum().backward()
    F.linear(expected, layer.whole_weight, layer.bias).square().sum().backward()
    assert torch.equal(found.grad, expected.grad)


def test_merged_weight_is_held_in_bytes_too():
    layer = byte_layer(random(192, 576) / 24, random(192))
    basis = basis_of(layer.whole_weight)
    deltas = {"0": 0.3 * torch.randn(basis.rank, generator=torch.Generator().manual_seed(0))}
    whole = nn.Sequential(layer)
    whole.dtype = torch.bfloat16  # as a transformers model has it
    model = SpectralModel(whole, {"0": basis})
    x = random(2, 3, 576)
    with model.rows([deltas, deltas]):
        beside = model.model(x)
    for _ in model.merging(deltas):
        pass
    assert type(model.layers["0"].merged.layer) is ByteLinear
    assert model.merged_bytes(deltas) == layer.weight.nbytes + layer.scales.nbytes + layer.bias.nbytes
    with model.rows([deltas, deltas]):
        assert relative_error(model.model(x), beside.double()) < 2**-6


def test_weights_that_fit_no_scales_are_refused():
    integers, scales = pack_weight(random(25, 128))
    for broken in (
        PackedWeight(integers, scales[:-1]),
        PackedWeight(integers, scales.double()),
        PackedWeight(integers.float(), scales),
        PackedWeight(integers[:, :112].contiguous(), scales),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            Layer(*broken, None, Kind.FEW)


def test_layers_whose_rows_are_no_multiple_stay_as_they_are():
    model = nn.Sequential(fast_layer(random(25, 128)), fast_layer(random(25, 48)))
    hold_in_bytes(model)
    assert [type(layer) for layer in model] == [ByteLinear, FastLinear]


# A model


def test_embedded_model_takes_the_memory_that_the_catalogue_says(real_8bit, real):
    entry = CATALOGUE[DEFAULT_MODEL]
    assert sum(p.nbytes for p in real_8bit.adapted.model.parameters()) == entry.memory_bytes(EIGHT_BIT)
    assert real_8bit.parameters == real.parameters == entry.shape.parameters
    layers = [linear_layer(real_8bit.adapted.model, path) for path in real_8bit.identity.ranks]
    head = real_8bit.adapted.model.get_output_embeddings()
    assert {type(layer) for layer in (*layers, head)} == {ByteLinear}
    assert real_8bit.identity == real.identity


@torch.inference_mode()
def log_probabilities(model: Model, prompt: Sequence[int], mixture: Deltas | None, at_once: int) -> torch.Tensor:
    """Of what could come after each token of a prompt (tokens, vocabulary), so many tokens computed at once."""
    cache, logits = GrowingCache(model.adapted.model.config), []
    with model.adapted.rows([mixture]):
        for first in range(0, len(prompt), at_once):
            ids = torch.tensor([prompt[first : first + at_once]])
            logits.append(model.adapted.model(input_ids=ids, cache=cache).logits[0].float())
    return torch.cat(logits).log_softmax(-1)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("at_once", [1, 40, 400], ids=["a token at a time", "some", "all"])
def test_distributions_are_nearly_those_of_the_exact_model(real_8bit, real, adapted, at_once):
    mixture = mix(real.experts, {"math": 1.0}) if adapted else None
    text = " ".join(example.prompt for example in task_named("arithmetic").examples("validation")[:20])
    prompt = real.prompt_ids(text)
    assert 256 < len(prompt) < 400
    exact = log_probabilities(real, prompt, mixture, len(prompt))
    found = log_probabilities(real_8bit, prompt, mixture, at_once)
    # bfloat16 alone makes a quarter of it; LLM.int8's products five times as much.
    assert (exact.exp() * (exact - found)).sum(1).mean() < 0.006


def test_training_has_the_gradients_of_the_exact_model(models_by_kernels, real):
    gradients = []
    model = load_model(precision=EIGHT_BIT, layers=lambda path: ".29." in path)
    ids = torch.tensor([model.prompt_ids("Compute 12 + 7.")])
    for adapted in (model.adapted, real.adapted):
        deltas = {path: delta for path, delta in adapted.trainable().items() if path in model.adapted.layers}
        with adapted.rows([deltas]):
            logits = adapted.model(input_ids=ids).logits
        F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
        gradients.append(torch.cat([delta.grad for delta in deltas.values()]))
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_what_this_machine_cannot_hold_in_8bit_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setattr("t2app.kernels.model.load_kernels", lambda folder: False)  # as without a compiler
    with pytest.raises(ModelError, match=r"take AVX2 and a C\+\+ compiler: load the model with --precision bf16"):
        load_model(str(tiny_folder), EIGHT_BIT, layers=lambda path: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not can_have_kernels()
    with pytest.raises(ModelError, match="on a GPU choose bf16 or 4bit"):
        resolve_precision(EIGHT_BIT)
