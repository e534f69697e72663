"""The matrices that experts' and mixtures' rows are edited by, on the real model by the kernels and by torch."""

from types import SimpleNamespace

import pytest
import torch
from random_mixtures import random_deltas
from torch import Tensor

from t2app import machine
from t2app.bench.edit import _log_probabilities
from t2app.decoding import collected, decode
from t2app.experts import mix
from t2app.kernels.edits import MatrixEdit, PackedMatrix, VectorEdit, edits_fast_by_matrix
from t2app.kernels.linear import runs_by_kernels
from t2app.messages import Sampling
from t2app.models import model as models
from t2app.models.model import Model, load_model
from t2app.parts import next_part, whole
from t2app.spectral import Deltas, SpectralModel
from t2app.spectral import model as spectral_model
from t2app.spectral.dense_matrix import DenseMatrix
from t2app.spectral.plan import Matrix


@pytest.fixture(scope="module")
def by_kernels() -> Model:
    """The model as the app has it, not loaded for anybody else, where it runs by the kernels."""
    model = load_model(precision="bf16")
    if not runs_by_kernels(model.adapted.model):
        pytest.skip("this CPU has no AVX2, or there is no compiler")
    return model


@pytest.fixture(scope="module")
def by_torch() -> Model:
    """The model as the app has it where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "use_kernels", lambda model, folder, in_bytes: None)
        return load_model(precision="bf16")


@pytest.fixture(params=["by_kernels", "by_torch"])
def model(request) -> Model:
    return request.getfixturevalue(request.param)


@pytest.fixture
def adapted(model) -> SpectralModel:
    """Of that model, with no matrices yet."""
    model.adapted._made, model.adapted._sums = [], []
    return model.adapted


def with_matrices(adapted: SpectralModel, seed: int) -> Deltas:
    deltas = random_deltas(adapted, seed)
    whole(adapted.making_matrices(deltas))
    return deltas


def summed(adapted: SpectralModel, terms: list[tuple[Deltas, float]]) -> Deltas:
    """A mixture by the sum of these, each times a factor, and their matrices added up where they have theirs."""
    deltas = {path: sum(factor * term[path] for term, factor in terms) for path in terms[0][0]}
    whole(adapted.adding_matrices(deltas, [(term, dict.fromkeys(term, factor)) for term, factor in terms]))
    return deltas


def edited_by_matrices(adapted: SpectralModel, rows: list[Deltas | None], tokens: int) -> bool:
    """Whether the kernels edit all layers so, in a batch of so many tokens a row."""
    with adapted.rows(rows):
        edits = [layer.edited_layer(len(rows), tokens).edit for layer in adapted.layers.values()]
    by_matrices = {isinstance(edit, MatrixEdit) for edit in edits}
    assert len(by_matrices) == 1
    return by_matrices.pop()


def change_by(matrix: Matrix, side: Tensor) -> Tensor:
    """What a matrix adds to a narrow side (rows, 1, narrow)."""
    by_torch = isinstance(matrix, DenseMatrix)
    edited = matrix.edited(side, slice(0, 1)) if by_torch else MatrixEdit(matrix, False, slice(0, 1))(side)
    return edited.float() - side.float()


PROMPTS = {"math": "Compute 12 + 7.", "code": "Write a function that adds.", "reasoning": "Is ice cold? yes or no"}


@pytest.mark.parametrize("expert", PROMPTS)
def test_answers_by_matrices_are_the_adapted_models(real, model, adapted, expert):
    ids = model.prompt_ids(PROMPTS[expert])
    forced, mixture = ids[-12:], mix(model.experts, {expert: 1.0})
    right, base = (_log_probabilities(real, ids, forced, deltas) for deltas in (mixture, None))
    by_vectors = _log_probabilities(model, ids, forced, mixture)
    whole(adapted.making_matrices(mixture))
    by_matrices = _log_probabilities(model, ids, forced, mixture)
    prompt_by_matrices = not torch.equal(by_matrices[0], by_vectors[0])
    fast = runs_by_kernels(model.adapted.model) and edits_fast_by_matrix(len(ids))
    assert prompt_by_matrices == fast, "the prompt is edited in the slower way"
    assert not torch.equal(by_matrices[1:], by_vectors[1:]), "the matrices were not used for the answer"
    error, change = ((right.exp() * (right - found)).sum(1).mean() for found in (by_matrices, base))
    assert error < 0.05 * change


MIXED = {"math": 0.6, "code": 0.3, "reasoning": 0.1}


@torch.no_grad()
def sides_of(real: Model, prompt: str) -> dict[str, Tensor]:
    """What edits of all layers meet in a prompt, (tokens, narrow) by the layer's path."""
    sides, handles = {}, []
    for path, layer in real.adapted.layers.items():

        def keep(_, inputs, output, path=path, layer=layer):
            sides[path] = (inputs[0] if layer.edits_input else output)[0]

        handles.append(layer.base.register_forward_hook(keep))
    real.adapted.model(torch.tensor([real.prompt_ids(prompt)]))
    for handle in handles:
        handle.remove()
    return sides


@pytest.mark.parametrize("weights", [{"math": 1.0}, {"code": 1.0}, {"reasoning": 1.0}, MIXED], ids=str)
def test_edits_of_what_real_layers_meet_are_more_exact_by_matrices_than_by_vectors(real, by_kernels, weights):
    adapted = by_kernels.adapted
    sides, errors = sides_of(real, PROMPTS[max(weights, key=weights.get)]), {"vectors": [], "matrices": []}
    alone = [mix(by_kernels.experts, {name: 1.0}) for name in weights]
    for path, delta in mix(by_kernels.experts, weights).items():
        layer, side, vectors = adapted.layers[path], sides[path].bfloat16(), real.adapted.layers[path].vectors
        rows = slice(0, len(side))
        change = side.float() @ vectors.T * delta @ vectors
        matrices = [layer.matrix(deltas[path]) for deltas in alone]
        matrix = matrices[0] if len(matrices) == 1 else layer.sum_of_matrices(matrices, list(weights.values()))
        edits = {
            "vectors": VectorEdit(layer.packed, layer.edits_input, rows, delta[None]),
            "matrices": MatrixEdit(matrix, layer.edits_input, rows),
        }
        for way, edit in edits.items():
            found = edit(side[:, None])[:, 0].float()
            errors[way].append((found - (side.float() + change)).norm() / change.norm())
    mean = {way: sum(values) / len(values) for way, values in errors.items()}
    assert mean["matrices"] < mean["vectors"] < 0.1


def test_base_answer_does_not_depend_on_the_answer_beside_it(by_kernels):
    model = by_kernels
    ids = model.prompt_ids("Compute 12 + 7 * 3.")
    answers, sampling = set(), Sampling(96)
    for mixture in (None, mix(model.experts, {"math": 1.0}), mix(model.experts, {"code": 0.5})):
        base, _ = collected(decode(model.adapted, [ids] * 2, [None, mixture], sampling, model.eos_ids))
        answers.add(tuple(base))
    answers.add(tuple(*collected(decode(model.adapted, [ids], [None], sampling, model.eos_ids))))
    assert len(answers) == 1 and len(answers.pop()) > 64


@torch.no_grad()
@pytest.mark.parametrize("edited", [[1], [0, 2]], ids=["together", "apart"])
def test_base_rows_stay_bit_for_bit_as_they_are_beside_rows_that_matrices_edit(adapted, edited):
    ids, deltas = torch.full((3, 1), 504), random_deltas(adapted, 0)
    rows = [deltas if row in edited else None for row in range(3)]
    untouched, found = adapted.model(ids, use_cache=True).logits, {}
    for way in ("vectors", "matrices"):
        with adapted.rows(rows):
            found[way] = adapted.model(ids, use_cache=True).logits
        whole(adapted.making_matrices(deltas))
    others = [row for row in range(3) if row not in edited]
    assert torch.equal(found["matrices"][others], untouched[others])
    assert not torch.equal(found["matrices"][edited], found["vectors"][edited]), "the matrices were not used"
    change = (found["vectors"] - untouched)[edited].float().norm()
    assert (found["matrices"] - found["vectors"])[edited].float().norm() < 0.2 * change


def test_answers_in_float32_go_by_vectors_as_they_do_in_company(real):
    mixture = random_deltas(real.adapted)
    whole(real.adapted.making_matrices(mixture))
    assert not real.adapted.has_matrices_of(mixture)


@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("model", ["by_kernels"], indirect=True)
def test_matrices_edit_rows_of_one_mixture(adapted, tokens):
    first, second = with_matrices(adapted, 0), with_matrices(adapted, 1)
    for rows in ([first], [None, first], [None, second, second], [None] * 4 + [first] * 4):
        edited = sum(row is not None for row in rows)
        assert edited_by_matrices(adapted, rows, tokens) == edits_fast_by_matrix(edited * tokens)
    for rows in ([first, second], [None, dict(first)]):
        assert not edited_by_matrices(adapted, rows, tokens)


def test_matrices_are_there_once_all_are_made(adapted):
    first = random_deltas(adapted, 0)
    parts = adapted.making_matrices(first)
    next_part(parts)
    assert not adapted.has_matrices_of(first)
    whole(parts)
    assert adapted.has_matrices_of(first)
    assert next_part(adapted.making_matrices(first)) == (True, None), "they were made again"


def test_matrices_of_a_mixture_are_added_up_where_all_of_it_have_theirs(adapted):
    first, second = with_matrices(adapted, 0), random_deltas(adapted, 1)
    assert not adapted.has_matrices_of(summed(adapted, [(first, 0.5), (second, 0.5)]))
    whole(adapted.making_matrices(second))
    mixture = summed(adapted, [(first, 0.5), (second, 0.5)])
    assert adapted.has_matrices_of(mixture)
    with adapted.rows([None, mixture]):
        assert all(layer.rows.matrix is not None for layer in adapted.layers.values())
    if runs_by_kernels(adapted.model):
        assert edited_by_matrices(adapted, [None, mixture], 1)


def test_matrices_of_a_mixture_that_has_an_expert_in_some_layers_are_added_up_there(adapted):
    first, second = with_matrices(adapted, 0), with_matrices(adapted, 1)
    *some, last = first
    factors = [(first, dict.fromkeys(some, 1.0)), (second, {last: 1.0})]
    mixture = {path: (second if path == last else first)[path] for path in first}
    whole(adapted.adding_matrices(mixture, factors))
    matrices = adapted._matrices_of(mixture).by_layer
    for path in (some[0], last):
        right, side = adapted.layers[path].matrix(mixture[path]), torch.randn(1, 1, adapted.layers[path].rank)
        if isinstance(right, PackedMatrix):
            assert torch.allclose(matrices[path].diagonal, right.diagonal)
        found, expected = (change_by(matrix, side.bfloat16()) for matrix in (matrices[path], right))
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert matrices.keys() == first.keys()


def test_sums_that_were_used_last_are_kept_and_what_they_are_made_of_always(adapted, monkeypatch):
    few = dict(list(random_deltas(adapted, 0).items())[:2])
    whole(adapted.making_matrices(few))
    monkeypatch.setattr(spectral_model, "_SUMS_BYTES", 4 * sum(adapted.layers[path].matrix_bytes for path in few))
    sums = [summed(adapted, [(few, 0.5)]) for _ in range(4)]
    adapted.plan([None, sums[0]])
    for _ in sums[1:]:
        summed(adapted, [(few, 0.5)])
        assert adapted.has_matrices_of(sums[0])
    assert not any(adapted.has_matrices_of(deltas) for deltas in sums[1:])
    summed(adapted, [(few, 0.5)])
    assert not adapted.has_matrices_of(sums[0]) and adapted.has_matrices_of(few)
    monkeypatch.setattr(spectral_model, "_SUMS_BYTES", 0)
    last = summed(adapted, [(few, 0.5)])
    assert adapted.has_matrices_of(last) and len(adapted._sums) == 1


def test_memory_that_is_short_is_not_spent_on_matrices(adapted, monkeypatch):
    size = sum(tensor.nbytes for layer in adapted.layers.values() for tensor in layer.matrix(torch.ones(layer.rank)))
    for available, made in ((9 * size, False), (11 * size, True)):
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda there=available: SimpleNamespace(available=there))
        assert adapted.has_matrices_of(with_matrices(adapted, 0)) == made
