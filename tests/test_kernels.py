"""The kernels and products in bf16 for the CPU, against exact ones in float64."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoder_models import adapted, decoder_model, mixtures_of
from torch import nn
from torch.nn import functional as F

from t2app.kernels.attention import fast_attention
from t2app.kernels.build import (
    INSTRUCTIONS,
    compiler_command,
    cpu_instructions,
    has_bfloat16_arithmetic,
    has_kernels,
    has_tiles,
    kernel_folder,
)
from t2app.kernels.edits import (
    MatrixEdit,
    VectorEdit,
    integers_in_order,
    pack_vectors,
    packed_matrix,
    packed_matrix_bytes,
    sum_of_packed,
)
from t2app.kernels.linear import MANY_ROWS, FastLinear, Kind
from t2app.kernels.model import use_kernels
from t2app.key_values import GrowingCache
from t2app.models.model import load_model
from t2app.spectral import SpectralModel, basis_of
from t2app.spectral.products import edited

BYTE_TESTS = Path(__file__).with_name("test_byte_linear.py")
SHAPES = [(1536, 576), (576, 1536), (192, 576), (41, 48), (7, 48), (5, 30)]


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """Has the kernel compiled and loaded, or skips where this machine would not use it."""
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16))
    use_kernels(model, kernel_folder())
    if not has_kernels():
        pytest.skip("this CPU has no AVX2, or there is no compiler")


@pytest.fixture
def threads(request) -> Iterator[int]:
    """So many threads for the time of a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def fast_layer(weight: torch.Tensor, bias: torch.Tensor | None = None) -> FastLinear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.bfloat16)
    layer.requires_grad_(False).weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return FastLinear(layer)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8, 9, 40, MANY_ROWS, MANY_ROWS + 1])
def test_linear_is_as_exact_as_bfloat16_can_hold(shape, rows):
    x, weight, bias = random(rows, 1, shape[1]), random(*shape), random(shape[0])
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = fast_layer(weight, bias)(x)
    assert found.shape == (rows, 1, shape[0])
    assert relative_error(found, exact) < 2**-8
    assert relative_error(fast_layer(weight)(x), exact - bias.double()) < 2**-8


@pytest.mark.parametrize("kind", Kind)
def test_what_a_row_gets_does_not_depend_on_its_company(kind):
    if kind == Kind.TILES and not has_tiles():
        pytest.skip("this CPU has no tiles")
    kernel, x = fast_layer(random(1536, 576)).kernel(kind), random(20, 1, 576)
    together = kernel(x)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 9), slice(7, 20)):
        assert torch.equal(kernel(x[rows]), together[rows])


# Of these lengths the first is multiplied in another way on a CPU that multiplies bfloat16.
@pytest.mark.parametrize("length", [1536, 48, 16])
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
@pytest.mark.parametrize("kind", [Kind.FEW, Kind.MANY])
def test_products_of_what_is_alike_in_all_places_do_not_overflow(length, size, kind):
    x, weight = (torch.full((rows, length), value).to(torch.bfloat16) for rows, value in ((9, size), (25, -size)))
    exact = F.linear(x.double(), weight.double())
    assert relative_error(fast_layer(weight).kernel(kind)(x), exact) < 2**-8


@pytest.mark.parametrize("length", [1536, 48])
@pytest.mark.parametrize("kind", [Kind.FEW, Kind.MANY])
def test_small_numbers_beside_a_large_one_are_not_lost(length, kind):
    x, weight = random(9, length), random(25, length)
    x[:, 5], weight[:, 5] = 1000, 0
    exact = F.linear(x.double(), weight.double())
    assert relative_error(fast_layer(weight).kernel(kind)(x), exact) < 2**-6


@pytest.mark.parametrize("length", [1536, 48])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("kind", [Kind.FEW, Kind.MANY])
def test_what_is_no_number_stays_so_in_its_row_alone(length, value, kind):
    kernel, x = fast_layer(random(25, length), random(25)).kernel(kind), random(9, length)
    expected = kernel(x)
    x[4, 7] = value
    found = kernel(x)
    assert not found[4].isfinite().any()
    others = [row for row in range(9) if row != 4]
    assert torch.equal(found[others], expected[others])


@pytest.mark.parametrize("length", [1536, 48])
@pytest.mark.parametrize("kind", [Kind.FEW, Kind.MANY])
def test_rows_of_zeros_give_the_bias(length, kind):
    weight, bias = random(25, length), random(25)
    weight[3] = 0
    x = random(9, length)
    x[4] = 0
    found = fast_layer(weight, bias).kernel(kind)(x)
    assert torch.equal(found[4], bias) and torch.equal(found[:, 3], bias[3].expand(9))


def test_kernel_for_many_rows_rounds_what_real_layers_meet_as_its_result_is_rounded():
    model, met = load_model(precision="bf16", layers=lambda path: False), []
    layers = [module for module in model.adapted.model.modules() if isinstance(module, FastLinear)]
    hooks = [layer.register_forward_hook(lambda layer, given, _: met.append((layer, given[0][0]))) for layer in layers]
    prompt = model.prompt_ids("The sum of 12, 35 and 7 is found step by step. " * 3)
    with torch.inference_mode():
        model.adapted.model(input_ids=torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    assert len(met) == len(layers)
    typical, worst = [], []
    for layer, x in met:
        exact = F.linear(x.double(), layer.weight.double())
        errors = (layer.kernel(Kind.MANY)(x) - exact).norm(dim=1) / (exact.to(torch.bfloat16) - exact).norm(dim=1)
        typical.append(errors.median().item())
        worst.append(errors.max().item())
    # The worst are of tokens of which one number is larger than all others together.
    assert max(typical) < 1.1 and max(worst) < 4


@pytest.mark.parametrize("narrow", [576, 30])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), torch.tensor([0, 2])], ids=["first", "last", "apart"])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_edit_is_as_exact_as_its_roundings_and_leaves_the_other_rows(narrow, rows, tokens, shared, biased):
    side, vectors = random(3, tokens, narrow), random(narrow, narrow)
    bias = random(narrow) if biased else None
    count = len(torch.arange(3)[rows])
    delta = torch.randn(1 if shared else count, narrow, generator=torch.Generator().manual_seed(0))
    exact = edited(side.double(), rows, vectors.double(), delta.double(), None if bias is None else bias.double())
    found = edited(side, rows, vectors, delta, bias)
    assert found.shape == side.shape and found.dtype == torch.bfloat16
    # A CPU with 16-bit arithmetic rounds the coordinates and the change too, not only their sum.
    assert relative_error(found, exact) < (2**-7 if has_bfloat16_arithmetic() else 2**-8)
    others = [row for row in range(3) if row not in torch.arange(3)[rows]]
    assert torch.equal(found[others], side[others])


@pytest.mark.parametrize("narrow", [64, 576])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), slice(0, 3)], ids=["first", "last", "all"])
@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_edit_of_a_layer_that_has_no_kernel_is_as_exact_and_leaves_the_other_rows(narrow, rows, tokens, shared, biased):
    side, bias = random(3, tokens, narrow), random(narrow) if biased else None
    vectors = torch.linalg.qr(random(narrow, narrow).float()).Q.to(torch.bfloat16)
    count = rows.stop - rows.start
    delta = 0.1 * torch.randn(1 if shared else count, narrow, generator=torch.Generator().manual_seed(0))
    exact = edited(side.double(), rows, vectors.double(), delta.double(), None if bias is None else bias.double())
    found = VectorEdit(pack_vectors(vectors), False, rows, delta)(side, bias)
    assert found.shape == side.shape and found.dtype == torch.bfloat16
    # Beside the result's own rounding there is that of the vectors, or of coordinates and side.
    assert relative_error(found, exact) < 2**-7
    others = [row for row in range(3) if row not in range(rows.start, rows.stop)]
    assert torch.equal(found[others], side[others])


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (192, 576), (64, 192), (576, 576)])
@pytest.mark.parametrize("first, count, rows", [(0, 1, 1), (1, 1, 2), (1, 2, 3), (5, 7, 12), (0, 11, 12)])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_adapted_layer_is_as_exact_as_its_roundings_and_leaves_the_other_rows(
    shape, first, count, rows, tokens, shared, biased
):
    layer = fast_layer(random(*shape) / shape[1] ** 0.5, random(shape[0]) if biased else None)
    basis = basis_of(layer.weight)
    x = random(rows, tokens, shape[1])
    delta = 0.1 * torch.randn(1 if shared else count, basis.rank, generator=torch.Generator().manual_seed(0))
    z = torch.ones(rows, basis.rank).index_add_(0, torch.arange(first, first + count), delta.expand(count, -1))
    edited_rows = slice(first, first + count)
    vectors = basis.vectors.T.to(torch.bfloat16).contiguous()
    packed = pack_vectors(vectors)
    edit = VectorEdit(packed, basis.edits_input, edited_rows, delta)
    kernel = layer.kernel_for(rows * tokens)
    found = kernel(x, edit)

    u, s, vt = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    exact = torch.stack([row @ (u * s * z_row @ vt).T for row, z_row in zip(x.double(), z.double(), strict=True)])
    exact = exact + (layer.bias.double() if biased else 0)
    assert found.shape == (rows, tokens, shape[0]) and found.dtype == torch.bfloat16
    # Beside the result's own rounding there is that of the vectors, or of coordinates and edited side.
    assert relative_error(found, exact) < 2**-7
    others = [row for row in range(rows) if not first <= row < first + count]
    assert torch.equal(found[others], kernel(x)[others])


def test_packed_vectors_are_the_vectors_within_half_a_step_with_even_places_first():
    vectors = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    integers, scales = pack_vectors(vectors)
    order = [block + place for block in (0, 16, 32, 48) for place in (*range(0, 16, 2), *range(1, 16, 2))]
    assert ((integers * scales[:, None] - vectors[:, order]).abs() <= 0.5001 * scales[:, None]).all()


def test_integers_of_packed_vectors_are_had_back_in_order():
    vectors = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    packed = pack_vectors(vectors)
    found = integers_in_order(packed, torch.bfloat16).double() * packed.scales[:, None]
    assert ((found - vectors).abs() <= 0.5001 * packed.scales[:, None]).all()


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536)])
@pytest.mark.parametrize("rows", [[1], [0, 2]], ids=str)
def test_packed_vectors_alone_serve_a_long_prompt_and_a_gradient(shape, rows):
    layer = fast_layer(random(*shape) / shape[1] ** 0.5)
    basis = basis_of(layer.weight)
    delta = 0.1 * torch.randn(basis.rank, generator=torch.Generator().manual_seed(0))
    whole = nn.Linear(shape[1], shape[0], bias=False, dtype=torch.float64).requires_grad_(False)
    whole.weight.copy_(layer.weight)
    exact = SpectralModel(nn.Sequential(whole), {"0": basis})
    model = SpectralModel(nn.Sequential(layer), {"0": basis})
    assert model.layers["0"].vectors is None
    x = random(3, MANY_ROWS // 2, shape[1])
    prompt, found, gradients = {}, {}, {}
    for name, adapted_model, given in (("exact", exact, x.double()), ("packed", model, x)):
        deltas = {row: delta.clone().requires_grad_() for row in rows}
        with adapted_model.rows([{"0": deltas[row]} if row in rows else None for row in range(3)]):
            found[name] = adapted_model.model(given)
            with torch.no_grad():
                prompt[name] = adapted_model.model(given)
        found[name].double().square().sum().backward()
        gradients[name] = torch.stack([of_row.grad for of_row in deltas.values()])
    assert relative_error(prompt["packed"], prompt["exact"]) < 2**-7
    assert relative_error(found["packed"], found["exact"]) < 2**-7
    assert relative_error(gradients["packed"], gradients["exact"].double()) < 2**-6


@pytest.mark.parametrize("length", [30, 48])
def test_vectors_that_the_kernel_cannot_read_are_not_packed(length):
    assert pack_vectors(torch.eye(length)) is None


def test_edit_of_the_largest_bytes_is_as_exact_as_its_roundings():
    signs = [torch.randint(0, 2, (64, 64), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1 for seed in (0, 1)]
    side, vectors = signs[0][:3, None].to(torch.bfloat16), signs[1] / 8  # each of them is ±127 in 8 bits
    delta = 0.1 * torch.ones(1, 64)
    exact = edited(side.double(), slice(0, 3), vectors.double(), delta.double())
    found = VectorEdit(pack_vectors(vectors.to(torch.bfloat16)), False, slice(0, 3), delta)(side)
    assert relative_error(found, exact) < 2**-7


@pytest.mark.parametrize("narrow", [16, 64, 192, 576])
@pytest.mark.parametrize("rows", [slice(0, 1), slice(1, 3), slice(0, 5)], ids=["first", "middle", "all"])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_edit_by_a_matrix_is_as_exact_as_its_roundings_and_leaves_the_other_rows(narrow, rows, tokens, biased, threads):
    side, bias = random(5, tokens, narrow), random(narrow) if biased else None
    vectors = torch.linalg.qr(random(narrow, narrow).float()).Q
    delta = 0.1 + 0.1 * torch.randn(narrow, generator=torch.Generator().manual_seed(0))
    exact = edited(side.double(), rows, vectors.double(), delta[None].double(), None if bias is None else bias.double())
    found = MatrixEdit(packed_matrix(vectors, delta), False, rows)(side, bias)
    assert found.shape == side.shape and found.dtype == torch.bfloat16
    # Rounding the result alone makes an error of 1 % of such an edit.
    assert (found - exact)[rows].norm() < 0.02 * (exact - side)[rows].norm()
    others = [row for row in range(5) if row not in range(5)[rows]]
    assert torch.equal(found[others], side[others])


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (192, 576), (64, 192), (576, 576)])
@pytest.mark.parametrize("first, count, rows", [(0, 1, 1), (1, 1, 2), (1, 3, 5)])
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_adapted_by_a_matrix_is_as_exact_as_its_roundings_and_leaves_the_other_rows(
    shape, first, count, rows, tokens, biased
):
    layer = fast_layer(random(*shape) / shape[1] ** 0.5, random(shape[0]) if biased else None)
    basis = basis_of(layer.weight)
    x, delta = random(rows, tokens, shape[1]), 0.1 * torch.randn(basis.rank, generator=torch.Generator().manual_seed(0))
    edited_rows, kernel = slice(first, first + count), layer.kernel_for(rows * tokens)
    found = kernel(x, MatrixEdit(packed_matrix(basis.vectors.T, delta), basis.edits_input, edited_rows))
    u, s, vt = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    exact = x.double() @ (u * s * (1 + delta) @ vt).T + (layer.bias.double() if biased else 0)
    assert relative_error(found[edited_rows], exact[edited_rows]) < 2**-7
    others = [row for row in range(rows) if not first <= row < first + count]
    assert torch.equal(found[others], kernel(x)[others])


def test_matrix_of_no_change_changes_nothing():
    side = random(2, 1, 64)
    matrix = packed_matrix(torch.linalg.qr(random(64, 64).float()).Q, torch.zeros(64))
    assert torch.equal(MatrixEdit(matrix, False, slice(0, 2))(side), side)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [1, 11])
def test_edit_by_a_matrix_of_the_largest_bytes_is_exact(sign, tokens):
    narrow = 576
    nothing = packed_matrix(torch.eye(narrow), torch.zeros(narrow))
    matrix = nothing._replace(integers=torch.full_like(nothing.integers, sign * 127), scales=torch.ones(narrow))
    signs = torch.randint(0, 2, (3, tokens, narrow), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    signs[0] = 1  # no two products cancel out
    found = MatrixEdit(matrix, False, slice(0, 3))(signs.to(torch.bfloat16))
    exact = signs + sign * 127 * signs.sum(-1, keepdim=True)
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_matrix_that_is_not_whole_is_refused():
    matrix = packed_matrix(torch.eye(64), torch.ones(64))
    for broken in (
        matrix._replace(integers=matrix.integers[:-1]),
        matrix._replace(diagonal=matrix.diagonal[:-1]),
        matrix._replace(scales=matrix.scales.double()),
    ):
        with pytest.raises(RuntimeError, match="expected"):
            MatrixEdit(broken, False, slice(0, 1))


@pytest.mark.parametrize("narrow", [16, 64, 576])
@pytest.mark.parametrize("factors", [[1.0], [0.6, -0.3], [0.5, 0.3, 0.0, 2.0]])
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_edit_by_a_sum_of_matrices_is_as_exact_as_its_roundings(narrow, factors, threads):
    side, rows = random(3, 1, narrow), slice(0, 3)
    vectors = torch.linalg.qr(random(narrow, narrow).float()).Q
    generator = torch.Generator().manual_seed(0)
    deltas = [1 + torch.randn(narrow, generator=generator) for _ in factors]
    delta = sum(factor * own for factor, own in zip(factors, deltas, strict=True))
    exact = edited(side.double(), rows, vectors.double(), delta[None].double())
    summed = sum_of_packed([packed_matrix(vectors, own) for own in deltas], factors)
    found, made = (MatrixEdit(matrix, False, rows)(side) for matrix in (summed, packed_matrix(vectors, delta)))
    change, error = (exact - side).norm(), (made - exact).norm()
    assert error < 0.02 * change and (found - exact).norm() < 0.02 * change + error


def test_matrices_are_rounded_to_what_fills_their_bytes():
    matrix = packed_matrix(torch.linalg.qr(random(64, 64).float()).Q, torch.linspace(-1, 1, 64))
    for packed in (matrix, sum_of_packed([matrix, matrix], [0.5, 0.25])):
        assert packed.integers.abs().max() == 127
    doubled = sum_of_packed([matrix], [-2.0])
    entries = [of.integers * of.scales.max() ** 2 for of in (matrix, doubled)]
    assert torch.allclose(-2 * entries[0], entries[1], atol=0.02 * float(entries[1].abs().max()))


def test_sum_of_no_change_changes_nothing():
    side = random(2, 1, 64)
    nothing = packed_matrix(torch.eye(64), torch.zeros(64))
    assert torch.equal(MatrixEdit(sum_of_packed([nothing] * 2, [1.0, 1.0]), False, slice(0, 2))(side), side)


def test_matrices_that_do_not_fit_each_other_are_not_added():
    small, large = (packed_matrix(torch.eye(narrow), torch.ones(narrow)) for narrow in (48, 64))
    for broken in (large._replace(integers=small.integers), large._replace(integers=large.integers.float())):
        with pytest.raises(RuntimeError, match="triangles in int8 were expected, of matrices of the same size"):
            sum_of_packed([large, broken], [1.0, 1.0])


def test_packed_matrix_takes_what_is_said(real):
    for layer in list(real.adapted.layers.values())[:7]:
        matrix = packed_matrix(layer.vectors, torch.ones(layer.rank))
        assert sum(tensor.nbytes for tensor in matrix) == packed_matrix_bytes(layer.rank)


@pytest.mark.parametrize("edits_input", [True, False])
def test_what_an_edited_row_is_changed_by_does_not_depend_on_its_company(edits_input):
    vectors = pack_vectors(torch.linalg.qr(random(128, 128).float()).Q.to(torch.bfloat16))
    side, delta = random(13, 1, 128), torch.randn(13, 128, generator=torch.Generator().manual_seed(0))
    together = VectorEdit(vectors, edits_input, slice(0, 13), delta)(side)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 9), slice(2, 13)):
        alone = VectorEdit(vectors, edits_input, slice(0, rows.stop - rows.start), delta[rows])
        assert torch.equal(alone(side[rows]), together[rows])


@pytest.mark.parametrize("heads, key_heads, size", [(9, 3, 64), (4, 4, 16), (8, 1, 48), (14, 2, 64)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_one_token_is_as_exact_as_bfloat16_can_hold(heads, key_heads, size, masked):
    rows, tokens = 3, 37
    query = random(rows, heads, 1, size)
    # As a growing cache hands them over: the beginning of a tensor with room for more tokens.
    keys, values = (random(rows, key_heads, tokens + extra, size)[:, :, :tokens] for extra in (5, 6))
    mask = None
    if masked:
        mask = torch.ones(rows, 1, 1, tokens, dtype=torch.bool)
        mask[1, ..., :20] = False
    attention = nn.Module()
    found, _ = fast_attention(attention, query, keys, values, mask, scaling=0.2)
    wide = [tensor.double().repeat_interleave(heads // key_heads, 1) for tensor in (keys, values)]
    exact = F.scaled_dot_product_attention(query.double(), *wide, attn_mask=mask, scale=0.2).transpose(1, 2)
    assert found.shape == (rows, 1, heads, size)
    assert relative_error(found, exact) < 2**-8


@pytest.mark.parametrize("padding", [1, 16, 19, 36])
def test_attention_of_a_padded_row_is_as_without_its_padding_which_is_not_read(padding):
    query = random(1, 4, 1, 64)
    keys, values = random(1, 2, 37, 64), random(1, 2, 38, 64)[:, :, :37]
    mask = torch.ones(1, 1, 1, 37, dtype=torch.bool)
    mask[..., :padding] = False
    cut = [tensor[:, :, padding:].contiguous() for tensor in (keys, values)]
    expected, _ = fast_attention(nn.Module(), query, *cut, None)
    keys[:, :, :padding] = values[:, :, :padding] = torch.nan
    assert torch.equal(fast_attention(nn.Module(), query, keys, values, mask)[0], expected)


def test_attention_of_a_prompt_and_one_that_needs_a_gradient_are_torchs():
    query, keys = random(1, 2, 5, 16), random(1, 2, 5, 16)
    module = nn.Module()
    module.is_causal = True
    expected = F.scaled_dot_product_attention(query, keys, keys, is_causal=True).transpose(1, 2)
    assert torch.equal(fast_attention(module, query, keys, keys, None)[0], expected)
    last = query[:, :, -1:].clone().requires_grad_()
    fast_attention(module, last, keys, keys, None)[0].sum().backward()
    assert last.grad.abs().sum() > 0


# New tokens a row of passes one after another: a prompt, more of it, and steps.
PASSES = (40, 2, *[1] * 8)


def passes_logits(model: SpectralModel, rows: list, padded: bool = True) -> torch.Tensor:
    """Of each pass's last tokens, (passes, rows, vocabulary); `padded`: the second row begins later than the others."""
    tokens = torch.randint(0, 50, (len(rows), sum(PASSES)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1:2, :1] = 0
    cache = GrowingCache(model.model.config)
    logits, end = [], 0
    with model.rows(rows):
        for new in PASSES:
            end += new
            context = {"cache": cache, "use_cache": True}
            if padded:
                context["attention_mask"] = mask[:, :end]
                context["position_ids"] = (mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, -new:]
            logits.append(model.model(tokens[:, end - new : end], **context).logits[:, -1])
    return torch.stack(logits)


def errors_of_rows(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Of logits (passes, rows, vocabulary), the root of the mean square error over that of the logits, (rows,)."""
    return ((found.double() - exact).square().mean((0, 2)) / exact.square().mean((0, 2))).sqrt()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("edited_rows", [[], [1], [1, 2], [2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@torch.inference_mode()
def test_decoder_in_one_call_is_as_exact_as_transformers_own(kind, edited_rows, padded, threads):
    plain = decoder_model(kind)
    fast = copy.deepcopy(plain).bfloat16()
    torchs = adapted(copy.deepcopy(fast))
    exact = adapted(copy.deepcopy(fast).double())
    use_kernels(fast, kernel_folder())
    fast = adapted(fast)
    first, second = mixtures_of(fast)
    rows = [None] * 6 if len(edited_rows) > 2 else [None] * 3
    for row in edited_rows:
        rows[row] = second if row % 2 else first
    fast.model.model.forward._own = None  # a pass that the kernel does not take fails
    expected, found, by_torch = (passes_logits(model, rows, padded) for model in (exact, fast, torchs))
    assert (errors_of_rows(found, expected) < 2 * errors_of_rows(by_torch, expected)).all()


@torch.inference_mode()
def test_decoder_follows_the_plan_that_is_in_use():
    model = decoder_model("llama").bfloat16()
    use_kernels(model, kernel_folder())
    model = adapted(model)
    first, second = mixtures_of(model)
    alone = [passes_logits(model, [None, mixture]) for mixture in (first, second)]
    assert not torch.equal(*alone)
    # The same again after another plan, after one of more rows, and with nothing adapted.
    assert torch.equal(passes_logits(model, [None, first]), alone[0])
    passes_logits(model, [None, None, first])
    assert torch.equal(passes_logits(model, [None, second]), alone[1])
    base = passes_logits(model, [None, None])
    assert torch.equal(base[:, 0], alone[0][:, 0])
    model.detach()
    assert torch.equal(passes_logits(SpectralModel(model.model, {}), [None, None]), base)


@torch.inference_mode()
def test_decoder_sees_that_a_layer_was_replaced():
    model = decoder_model("llama").bfloat16()
    use_kernels(model, kernel_folder())
    model = SpectralModel(model, {})
    before = passes_logits(model, [None])
    path = "model.layers.1.mlp.up_proj"
    replaced = nn.Linear(192, 320, bias=False, dtype=torch.bfloat16)
    replaced.weight.copy_(2 * model.model.get_submodule(path).weight)
    model.model.set_submodule(path, replaced)
    found = passes_logits(model, [None])
    assert not torch.equal(found, before)
    expected = decoder_model("llama").bfloat16()
    expected.get_submodule(path).weight.mul_(2)
    assert relative_error(found, passes_logits(SpectralModel(expected, {}), [None])) < 2**-5


@torch.inference_mode()
def test_decoder_goes_on_from_embeddings_as_from_tokens():
    model = decoder_model("llama").bfloat16()
    use_kernels(model, kernel_folder())
    token, outputs = torch.tensor([[7]]), []
    for last in ({"input_ids": token}, {"inputs_embeds": model.model.embed_tokens(token)}):
        cache = GrowingCache(model.config)
        model(torch.tensor([[3, 1, 4]]), cache=cache, use_cache=True)
        outputs.append(model(**last, cache=cache, use_cache=True).logits)
    assert torch.equal(*outputs)
    whole = model(torch.tensor([[3, 1, 4, 7]])).logits[:, -1:]
    assert relative_error(outputs[0], whole) < 2**-5


def test_decoder_that_needs_a_gradient_is_transformers_own():
    model = decoder_model("llama").bfloat16()
    use_kernels(model, kernel_folder())
    model = adapted(model)
    z, cache = model.trainable(), GrowingCache(model.model.config)
    with torch.no_grad():
        model.model(torch.tensor([[3, 1, 4]]), cache=cache, use_cache=True)
    with model.rows([z]):
        model.model(torch.tensor([[7]]), cache=cache, use_cache=True).logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in z.values())


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 24}),
        ("qwen3", {}),
    ],
    ids=["other activation", "narrow heads", "other block"],
)
def test_decoders_of_another_kind_stay_transformers_own(kind, changes):
    model = decoder_model(kind, **changes).bfloat16()
    use_kernels(model, kernel_folder())
    assert "forward" not in vars(model.model)


@torch.inference_mode()
def test_sliding_window_is_attended_to_as_transformers_does():
    plain = decoder_model("mistral", sliding_window=4).bfloat16()
    fast = copy.deepcopy(plain)
    use_kernels(fast, kernel_folder())
    found, expected = (passes_logits(adapted(model), [None, None, None]) for model in (fast, plain))
    assert relative_error(found, expected) < 2**-5


def test_gradient_reaches_what_asks_for_one():
    x = random(2, 1, 576).requires_grad_()
    fast_layer(random(1536, 576))(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_fast_linear_shares_the_weights_of_the_layer_it_stands_for():
    model = nn.Sequential(nn.Linear(16, 32, dtype=torch.bfloat16))
    weight = model[0].weight
    use_kernels(model, kernel_folder())
    assert model[0].weight is weight


def test_float32_models_keep_their_layers():
    model = nn.Sequential(nn.Linear(16, 32))
    layer = model[0]
    use_kernels(model, kernel_folder())
    assert model[0] is layer


def test_machine_without_a_compiler_multiplies_by_torch(tmp_path):
    # In a process of its own: this one has loaded the kernels.
    script = """
import sys
from pathlib import Path
import torch
from torch import nn
from t2app.kernels.linear import runs_by_kernels
from t2app.kernels.model import use_kernels
model = nn.Sequential(nn.Linear(48, 32, dtype=torch.bfloat16)).requires_grad_(False)
inputs = [torch.randn(rows, 2, 48).bfloat16() for rows in (1, 4, 5, 40)]
expected = [model.double()(x.double()) for x in inputs]
use_kernels(model.bfloat16(), Path(sys.argv[1]))
errors = [(model(x) - exact).norm() / exact.norm() for x, exact in zip(inputs, expected)]
print(not runs_by_kernels(model) and bool(max(errors) < 2**-7))
"""
    folder, environment = tmp_path / "kernels", os.environ | {"CXX": str(tmp_path / "no-such-compiler")}
    ended = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment)
    assert ended.stdout == "True\n", ended.stderr
    assert "could not be compiled" in ended.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX-512")
def test_kernels_of_a_cpu_without_avx512():
    here = ["-k", "not without_avx512 and not every_kind", "-p", "no:cacheprovider", __file__, str(BYTE_TESTS)]
    # torch's own variable, and oneDNN's: on a CPU with tiles torch's attention would fail with the one alone.
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", *here], env=environment, check=True)


@pytest.mark.parametrize("lacking", ["VNNI", "bfloat16"])
def test_products_of_a_cpu_with_less_of_avx512(lacking):
    if lacking not in cpu_instructions():
        pytest.skip("the other tests run on such a CPU, or on a lesser one")
    asked = {"VNNI": "_is_vnni_supported", "bfloat16": "_is_avx512_bf16_supported"}[lacking]
    names = "as_exact_as or company or overflow or small_numbers or no_number or zeros or many_rows or matri"
    here = ["-q", "-k", names, "-p", "no:cacheprovider", __file__, str(BYTE_TESTS)]
    script = f"import sys, pytest, torch; torch.cpu.{asked} = lambda: False; sys.exit(pytest.main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", script, *here], check=True)


@pytest.mark.parametrize("newest", INSTRUCTIONS)
def test_kernels_compile_for_every_kind_of_cpu(newest):
    instructions = list(INSTRUCTIONS)[: list(INSTRUCTIONS).index(newest) + 1]
    if instructions == cpu_instructions():
        pytest.skip("what the other tests run on this CPU is compiled so")
    subprocess.run(compiler_command(instructions, "-fsyntax-only", "-Werror"), check=True)
