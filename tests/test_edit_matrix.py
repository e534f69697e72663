"""Edits by a matrix against those by singular vectors. Without a GPU the kernel is interpreted."""

from copy import deepcopy

import pytest
import torch
from random_mixtures import random_deltas
from torch import Tensor

from t2app.spectral import SpectralLinear, SpectralModel, basis_of, linear_layer
from t2app.spectral import edit_matrix as module
from t2app.spectral import model as spectral_model
from t2app.spectral.edit_matrix import edit_matrix, why_not
from t2app.spectral.layer_paths import block_linear_paths
from t2app.spectral.products import edited

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def forget_what_works() -> None:
    why_not.cache_clear()
    spectral_model._warn_once.cache_clear()


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_edits_as(vectors: Tensor, rows: slice, count: int, biased: bool) -> None:
    """By a matrix some of `count` rows are edited as by the vectors that it is made of."""
    rank, narrow = vectors.shape
    side, delta = normal(count, 1, narrow, seed=1), 0.1 + 0.05 * normal(rank, seed=2)
    bias = normal(narrow, seed=3) if biased else None
    expected = edited(side, rows, vectors.float(), delta[None], bias)
    found = edit_matrix(vectors, delta).edited(side, rows, bias)
    error, edit = found - expected, expected - side
    assert error[rows].norm() <= 0.01 * edit[rows].norm()
    others = [row for row in range(count) if row not in range(count)[rows]]
    assert torch.equal(found[others], side[others])


@pytest.mark.parametrize("layer", ["self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_rows_of_the_real_model_are_edited_as_by_their_singular_vectors(real, layer):
    vectors = real.adapted.layers[f"model.layers.7.{layer}"].vectors.bfloat16()
    assert_edits_as(vectors, slice(1, 2), 2, biased=False)


@pytest.mark.parametrize("narrow", [8, 96, 128, 1100])
@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 3), slice(0, 1)])
def test_any_width_and_rows_are_edited_beside_a_bias(narrow, rows):
    basis = basis_of(normal(narrow + 1, narrow, seed=0))
    assert_edits_as(basis.vectors.T.contiguous().bfloat16(), rows, 3, biased=True)


@pytest.fixture
def adapted(small, monkeypatch) -> SpectralModel:
    """A small model in bfloat16 that is taken for one on a GPU."""
    monkeypatch.setattr(SpectralLinear, "takes_whole_matrix", True)
    monkeypatch.setattr(spectral_model, "gpu_can_spare", lambda size, device: True)
    bases = {path: basis_of(linear_layer(small, path).weight) for path in block_linear_paths(small)}
    return SpectralModel(deepcopy(small).to(DEVICE, torch.bfloat16), bases)


def matrices(adapted: SpectralModel, rows: list) -> dict[str, bool]:
    """Which layers edit these rows by a matrix."""
    with adapted.rows(rows):
        adapted.edit_by_matrices()
        return {
            path: layer.rows is not None and layer.rows.matrix is not None for path, layer in adapted.layers.items()
        }


@torch.no_grad()
def test_steps_by_matrices_are_those_by_vectors_and_the_base_row_stays_as_it_is(adapted):
    ids, rows = torch.tensor([[7], [7]], device=DEVICE), [None, random_deltas(adapted)]
    untouched = adapted.model(ids).logits.float()
    with adapted.rows(rows):
        by_vectors = adapted.model(ids).logits.float()
        adapted.edit_by_matrices()
        assert all(layer.rows.matrix is not None for layer in adapted.layers.values())
        by_matrices = adapted.model(ids).logits.float()
        adapted.model(ids.expand(2, 5))  # of more tokens each is edited by the vectors
    assert torch.equal(by_matrices[0], untouched[0])
    assert (by_matrices - by_vectors).norm() <= 0.2 * (by_vectors - untouched).norm()
    assert torch.equal(adapted.model(ids).logits.float(), untouched)


def test_matrices_are_made_for_few_rows_of_one_mixture_where_memory_allows(adapted, monkeypatch):
    first, second = random_deltas(adapted, 0), random_deltas(adapted, 1)
    assert all(matrices(adapted, [None, first, first]).values())
    for rows in ([None], [first, second], [first, None, first], [None] + 5 * [first]):
        assert not any(matrices(adapted, rows).values())
    some = dict(list(first.items())[:2])
    assert [path for path, made in matrices(adapted, [None, some]).items() if made] == list(some)
    sizes = []
    monkeypatch.setattr(spectral_model, "gpu_can_spare", lambda size, device: sizes.append(size))
    assert not any(matrices(adapted, [None, first]).values())
    assert sizes == [sum(layer.rank**2 for layer in adapted.layers.values())]


def fails(*arguments, **options) -> None:
    raise RuntimeError("no C compiler")


def does_nothing(*arguments, **options) -> None:
    pass


@pytest.mark.parametrize(
    ("kernel", "reason"), [(fails, "no C compiler"), (does_nothing, "a kernel gave another product than torch")]
)
def test_where_the_kernel_is_of_no_use_edits_go_by_vectors_and_the_log_says_why_once(
    adapted, monkeypatch, caplog, kernel, reason
):
    class Kernel:
        def __getitem__(self, grid):
            return kernel

    monkeypatch.setattr(module, "_edited", Kernel())
    # What memory holds by chance would be no product either.
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    rows = [None, random_deltas(adapted)]
    assert not any(matrices(adapted, rows).values()) and not any(matrices(adapted, rows).values())
    assert [reason in record.getMessage() for record in caplog.records] == [True]


def test_the_kernel_works_here():
    assert why_not(576, False, DEVICE) is None and why_not(40, True, DEVICE) is None
