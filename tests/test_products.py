"""The bf16 products for the CPU, against exact ones in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from t2app.checkpoints import cache_folder
from t2app.products import (
    FastLinear,
    edited,
    fast_edited,
    fast_linear,
    few_rows,
    has_bfloat16_arithmetic,
    use_fast_products,
)

SHAPES = [(1536, 576), (576, 1536), (192, 576), (7, 48), (5, 30)]


@pytest.fixture(scope="module", autouse=True)
def kernel():
    """Has the kernel compiled and loaded, or skips where this machine would not use it."""
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16))
    use_fast_products(model, cache_folder() / "kernels")
    if not isinstance(model[0], FastLinear):
        pytest.skip("this CPU has no AVX2, or there is no compiler")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(torch.bfloat16)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 40])
def test_linear_is_as_exact_as_bfloat16_can_hold(shape, rows):
    x, weight, bias = random(rows, 1, shape[1]), random(*shape), random(shape[0])
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert relative_error(fast_linear(x, weight, bias), exact) < 2**-8
    assert fast_linear(x, weight).shape == (rows, 1, shape[0])


def test_what_a_row_gets_does_not_depend_on_its_company():
    x, weight = random(few_rows(), 1, 576), random(1536, 576)
    together = fast_linear(x, weight)
    for row in range(few_rows()):
        assert torch.equal(fast_linear(x[row : row + 1], weight), together[row : row + 1])


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
    found = fast_edited(side, rows, vectors, delta, bias)
    assert found.shape == side.shape and found.dtype == torch.bfloat16
    # A CPU with 16-bit arithmetic rounds the coordinates and the change too, not only their sum.
    assert relative_error(found, exact) < (2**-7 if has_bfloat16_arithmetic() else 2**-8)
    others = [row for row in range(3) if row not in torch.arange(3)[rows]]
    assert torch.equal(found[others], side[others])


def test_gradient_reaches_what_asks_for_one():
    x, weight = random(2, 1, 576).requires_grad_(), random(1536, 576)
    fast_linear(x, weight).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_fast_linear_shares_the_weights_of_the_layer_it_stands_for():
    model = nn.Sequential(nn.Linear(16, 32, dtype=torch.bfloat16))
    weight = model[0].weight
    use_fast_products(model, cache_folder() / "kernels")
    assert model[0].weight is weight


def test_float32_models_keep_their_layers():
    model = nn.Sequential(nn.Linear(16, 32))
    layer = model[0]
    use_fast_products(model, cache_folder() / "kernels")
    assert model[0] is layer


def test_machine_without_a_compiler_keeps_torchs_own_products(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    model = nn.Sequential(nn.Linear(16, 32, dtype=torch.bfloat16))
    use_fast_products(model, tmp_path / "kernels")
    assert type(model[0]) is nn.Linear
    assert "could not be compiled" in caplog.text
    assert list((tmp_path / "kernels").iterdir()) == []
