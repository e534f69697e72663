"""The identity the program is built on: bases, fingerprints, and rows of a batch that each carry their own z.

On small random models of four architectures, which between them have biases, a fused qkv, and both sides as the narrow
one, and on the real embedded model.
"""

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from random_mixtures import deltas_of_ranks, random_deltas
from torch import Tensor, nn
from torch.func import functional_call

from t2app.models.model import load_model
from t2app.spectral import Basis, Deltas, SpectralModel, basis_of, fingerprint, linear_layer
from t2app.spectral.layer_paths import block_linear_paths, is_mlp_path

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KEEPS = {"all linear layers": lambda path: True, "mlp": is_mlp_path}


@dataclass
class Subject:
    """One model twice, untouched and adapted, and token ids (3, 12) to run both on: a prompt, then a decoding step."""

    plain: nn.Module
    adapted: SpectralModel
    ids: Tensor

    def plain_logits(self) -> Tensor:
        return self._run(self.plain)

    def logits(self, rows: list[Deltas | None]) -> Tensor:
        with self.adapted.rows(rows):
            return self._run(self.adapted.model)

    @torch.no_grad()
    def _run(self, model: nn.Module) -> Tensor:
        prompt = model(self.ids[:, :-1], use_cache=True)
        step = model(self.ids[:, -1:], cache=prompt.cache)
        return torch.cat([prompt.logits, step.logits], dim=1)  # (rows, tokens, vocabulary)

    def random_deltas(self, seed: int) -> Deltas:
        return random_deltas(self.adapted, seed)


def adapt(model: nn.Module, keep=lambda path: True) -> SpectralModel:
    return SpectralModel(
        model, {path: basis_of(linear_layer(model, path).weight) for path in block_linear_paths(model, keep)}
    )


def random_ids(model: nn.Module) -> Tensor:
    ids = torch.randint(3, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(1))
    return ids.to(model.device)


@pytest.fixture(
    scope="module",
    params=[
        f"{model}-{precision}" for model in ("llama", "qwen2", "gpt_neox", "phi", "real") for precision in PRECISIONS
    ],
)
def subject(request, small_model) -> Subject:
    model, precision = request.param.split("-")
    if model != "real":
        untouched = small_model(model).to(PRECISIONS[precision])
        return Subject(untouched, adapt(deepcopy(untouched)), random_ids(untouched))
    if precision == "fp32":
        untouched, adapted = request.getfixturevalue("plain"), request.getfixturevalue("real").adapted
    else:
        untouched = load_model(precision=precision, layers=lambda path: False).adapted.model
        adapted = load_model(precision=precision, layers=lambda path: True).adapted
    return Subject(untouched, adapted, random_ids(untouched))


@dataclass
class Written:
    """For random deltas of every layer, W' = U diag(σ ⊙ z) Vᵀ as torch.linalg.svd gives it, and the falling σ."""

    deltas: dict[str, Tensor]
    weights: dict[str, Tensor]
    singular_values: dict[str, Tensor]


def write(model: nn.Module) -> Written:
    weights = {path: linear_layer(model, path).weight for path in block_linear_paths(model)}
    written = Written(deltas_of_ranks({path: min(weight.shape) for path, weight in weights.items()}, seed=7), {}, {})
    for path, weight in weights.items():
        u, singular_values, vh = torch.linalg.svd(weight.cpu(), full_matrices=False)  # a GPU's is less exact
        written.weights[path] = (u * (singular_values * (1 + written.deltas[path])) @ vh).to(weight.device)
        written.singular_values[path] = singular_values.to(weight.device)
    return written


@pytest.fixture(scope="module")
def real_written(plain) -> Written:
    return write(plain)


def assert_row_is_the_written_model(plain: nn.Module, adapted: SpectralModel, written: Written, keep) -> None:
    ids = random_ids(plain)
    deltas = {path: delta for path, delta in written.deltas.items() if keep(path)}
    with torch.no_grad():
        expected = functional_call(plain, {f"{path}.weight": written.weights[path] for path in deltas}, (ids,)).logits
        untouched = plain(ids).logits
        with adapted.rows([None, deltas, deltas]):
            logits = adapted.model(ids).logits
    tolerance = 1e-3 * (expected.max() - expected.min())
    assert (logits - expected)[1:].abs().max() <= tolerance
    # The expert is no matter of rounding: it moves the logits by far more than the tolerance.
    assert (expected - untouched)[1:].abs().max() > 10 * tolerance


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_adapted_row_is_a_small_model_with_the_scaled_weights_written_into_it(small, keep):
    plain = deepcopy(small)
    assert_row_is_the_written_model(plain, adapt(small, keep), write(plain), keep)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi"])
def test_batch_of_edited_rows_is_the_same_by_the_factors_of_the_weight(small_model, name):
    model = small_model(name)
    bases = {path: basis_of(linear_layer(model, path).weight) for path in block_linear_paths(model)}
    beside, by_factors = SpectralModel(deepcopy(model), bases), SpectralModel(deepcopy(model), bases, many_rows=True)
    ids = random_ids(model)
    mixtures = [deltas_of_ranks({path: basis.rank for path, basis in bases.items()}, seed) for seed in range(3)]
    products = []
    for adapted in (beside, by_factors):
        for layer in adapted.layers.values():
            layer.base.register_forward_hook(lambda layer, arguments, y: products.append(layer))
    with torch.no_grad(), beside.rows(mixtures), by_factors.rows(mixtures):
        expected = beside.model(ids).logits
        assert products and not products.clear()
        logits = by_factors.model(ids).logits
    assert not products, "the layer's own product was taken beside its factors'"
    assert (logits - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_base_row_of_a_model_for_many_rows_is_bit_identical_to_the_plain_model(small_model):
    plain = small_model("qwen2")
    bases = {path: basis_of(linear_layer(plain, path).weight) for path in block_linear_paths(plain)}
    adapted = SpectralModel(deepcopy(plain), bases, many_rows=True)
    subject = Subject(plain, adapted, random_ids(plain))
    mixed = subject.logits([None, subject.random_deltas(0), subject.random_deltas(1)])
    assert torch.equal(mixed[0], subject.plain_logits()[0])
    assert not torch.allclose(mixed[1], subject.plain_logits()[1])


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_adapted_row_is_the_real_model_with_the_scaled_weights_written_into_it(real, plain, real_written, keep):
    assert_row_is_the_written_model(plain, real.adapted, real_written, keep)


def test_adapted_row_in_bf16_is_the_one_in_fp32_but_for_rounding(real, plain):
    ids = random_ids(plain)
    exact = Subject(plain, real.adapted, ids)
    rounded = Subject(plain, load_model(precision="bf16", layers=lambda path: True).adapted, ids)
    untouched = exact.plain_logits()
    errors, effects = [], []
    # Of several mixtures, since rounding meets each another way: a tenth to a third of what a strong one does.
    for seed in range(0, 6, 2):
        rows = [exact.random_deltas(seed), None, exact.random_deltas(seed + 1)]
        expected = exact.logits(rows)
        errors.append((rounded.logits(rows).float() - expected)[[0, 2]])
        effects.append((expected - untouched)[[0, 2]])
    # The prompt and the decoding step may take different kernels, for each of which an edit is far more than rounding.
    for row in (0, 1):
        for tokens in (slice(0, 11), slice(11, 12)):
            error, effect = (torch.stack(values)[:, row, tokens].norm() for values in (errors, effects))
            assert error < 0.3 * effect, (row, tokens, error / effect)


def test_base_row_is_bit_identical_to_the_plain_model(subject):
    deltas = subject.random_deltas(0)
    logits, expected = subject.logits([deltas, None, deltas]), subject.plain_logits()
    assert torch.equal(logits[1], expected[1])
    assert not torch.equal(logits[0], expected[0])


def test_row_with_every_z_at_one_is_bit_identical_to_the_plain_model(subject):
    deltas = subject.random_deltas(0)
    ones = {path: torch.zeros_like(delta) for path, delta in deltas.items()}
    assert torch.equal(subject.logits([deltas, ones, None])[1], subject.plain_logits()[1])


def test_outside_of_the_block_that_sets_rows_the_model_is_the_plain_one(subject):
    subject.logits([subject.random_deltas(0)] * 3)
    with torch.no_grad():
        assert torch.equal(subject.adapted.model(subject.ids).logits, subject.plain(subject.ids).logits)


def test_one_rows_z_leaves_the_other_rows_bit_identical(subject):
    first, second, third = (subject.random_deltas(seed) for seed in range(3))
    before, after = subject.logits([first, second, None]), subject.logits([first, third, None])
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


def test_row_in_a_mixed_batch_is_bit_identical_to_the_row_in_a_batch_of_its_own_z(subject):
    mixtures = [subject.random_deltas(seed) for seed in range(3)]
    mixed = subject.logits(mixtures)
    for row, deltas in enumerate(mixtures):
        assert torch.equal(mixed[row], subject.logits([deltas] * 3)[row])


def test_detach_gives_a_small_model_back_with_its_own_modules_and_bits(small):
    assert_detach_gives_back(small, block_linear_paths(small))


def test_detach_gives_the_real_model_back_with_its_own_modules_and_bits():
    model = load_model(precision="bf16", layers=lambda path: False).adapted.model
    assert_detach_gives_back(model, block_linear_paths(model, lambda path: ".layers.3." in path))


def assert_detach_gives_back(model: nn.Module, paths: list[str]) -> None:
    ids = random_ids(model)
    modules = dict(model.named_modules())
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        logits = model(ids).logits
        adapted = SpectralModel(model, {path: basis_of(linear_layer(model, path).weight) for path in paths})
        deltas = deltas_of_ranks({path: min(modules[path].weight.shape) for path in paths}, 0)
        with adapted.rows([deltas] * 3):
            assert not torch.equal(model(ids).logits, logits)
        assert adapted.detach() is model
        assert torch.equal(model(ids).logits, logits)
    assert list(model.state_dict()) == list(bits)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    now = dict(model.named_modules())
    assert list(now) == list(modules)
    assert all(now[name] is module for name, module in modules.items())


def assert_orthonormal(vectors: Tensor) -> None:
    # (rank, rank): the columns' products with one another, in float64 so that only the basis errs.
    products = vectors.double().T @ vectors.double()
    assert (products - torch.eye(len(products)).to(products)).abs().max() <= 1e-4


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_basis_is_orthonormal_with_the_singular_values_of_the_matrix(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    basis = basis_of(weight)
    assert basis.vectors.shape == (min(shape), min(shape))
    assert basis.edits_input == (shape[1] <= shape[0])
    assert_orthonormal(basis.vectors)
    torch.testing.assert_close(basis.singular_values, torch.linalg.svdvals(weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (40, 70), (71, 41)])
def test_basis_reads_no_memory_that_was_not_written(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = basis_of(weight)
    torch.use_deterministic_algorithms(True, warn_only=True)  # such memory is full of NaN then
    try:
        assert weight.new_empty(3).isnan().all()
        basis = basis_of(weight)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(basis.vectors, expected.vectors)
    assert torch.equal(basis.singular_values, expected.singular_values)


def test_basis_of_a_matrix_of_low_rank_is_still_orthonormal():
    generator = torch.Generator().manual_seed(0)
    basis = basis_of(torch.randn(40, 3, generator=generator) @ torch.randn(3, 24, generator=generator))
    assert_orthonormal(basis.vectors)
    assert basis.singular_values[3:].max() < 1e-4 * basis.singular_values[0]


def test_real_bases_are_orthonormal_with_the_singular_values_of_the_weights(real, real_written):
    assert list(real.adapted.layers) == list(real_written.weights)
    for path, layer in real.adapted.layers.items():
        assert_orthonormal(layer.vectors.T)
        # σ as the weights have it along the basis: the norms of W V, or of Uᵀ W.
        weight = layer.base.weight
        spread = (layer.vectors @ (weight.T if layer.edits_input else weight)).norm(dim=1)
        expected = real_written.singular_values[path]
        torch.testing.assert_close(spread, expected, rtol=1e-3, atol=1e-4 * expected[0].item())


def test_fingerprint_is_the_same_at_every_precision_the_real_checkpoint_is_loaded_in(real):
    in_bf16 = load_model(precision="bf16", layers=lambda path: False)
    assert in_bf16.adapted.model.dtype == torch.bfloat16 and real.adapted.model.dtype == torch.float32
    assert in_bf16.identity == real.identity


def test_fingerprint_changes_with_one_sampled_weight_a_name_or_a_shape_but_not_with_rounding_to_bf16():
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    original = fingerprint([("a", weight)])
    assert fingerprint([("a", weight.bfloat16())]) == original
    for entry in (0, -3):  # the first and the last of the 1024 entries sampled from 3072
        changed = weight.clone()
        changed.view(-1)[entry] += 0.5
        assert fingerprint([("a", changed)]) != original
    assert fingerprint([("b", weight)]) != original
    assert fingerprint([("a", weight.view(48, 64))]) != original


def test_batch_of_another_size_than_the_rows_set_is_refused(subject):
    with pytest.raises(ValueError, match="its mixtures are for 2 rows"):
        subject.logits([subject.random_deltas(0), None])


def test_path_that_names_no_linear_layer_is_refused(small):
    basis = Basis(torch.eye(32), torch.ones(32), edits_input=True)
    with pytest.raises(ValueError, match="the model has no module 'model.layers.0.nothing'"):
        SpectralModel(small, {"model.layers.0.nothing": basis})
    norm = next(name for name, module in small.named_modules() if "Norm" in type(module).__name__)
    with pytest.raises(ValueError, match=f"'{norm}' is a .*; only linear layers can be adapted"):
        SpectralModel(small, {norm: basis})


def test_basis_that_does_not_fit_its_layer_is_refused_and_the_model_left_whole(small):
    first, second = block_linear_paths(small)[:2]
    bases = {first: basis_of(linear_layer(small, first).weight), second: basis_of(torch.ones(3, 5))}
    with pytest.raises(ValueError, match=f"the basis for '{second}' has rank 3"):
        SpectralModel(small, bases)
    assert isinstance(small.get_submodule(first), nn.Linear)


def test_model_without_blocks_or_without_linear_layers_in_them_is_refused():
    with pytest.raises(ValueError, match="no list of blocks"):
        block_linear_paths(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="no linear layer"):
        block_linear_paths(nn.Sequential(nn.ModuleList([nn.LayerNorm(2)])))


def test_gradient_of_z_is_that_of_the_written_weights_and_no_weight_gets_one(small):
    plain, ids = deepcopy(small), random_ids(small)
    adapted = adapt(small)
    start = write(plain).deltas
    deltas = {path: delta.clone().requires_grad_() for path, delta in start.items()}
    with adapted.rows([deltas] * 3):
        small(ids).logits.log_softmax(-1)[..., 5].sum().backward()

    reference = {path: delta.clone().requires_grad_() for path, delta in start.items()}
    weights = {}
    for path, delta in reference.items():
        u, singular_values, vh = torch.linalg.svd(linear_layer(plain, path).weight, full_matrices=False)
        weights[f"{path}.weight"] = u * (singular_values * (1 + delta)) @ vh
    functional_call(plain, weights, (ids,)).logits.log_softmax(-1)[..., 5].sum().backward()

    for path, delta in deltas.items():
        torch.testing.assert_close(delta.grad, reference[path].grad, rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in small.parameters())


def test_gradient_reaches_every_z_of_the_real_model_and_no_weight(real):
    ranks = {path: layer.rank for path, layer in real.adapted.layers.items()}
    deltas = {path: delta.requires_grad_() for path, delta in deltas_of_ranks(ranks, 0).items()}
    with real.adapted.rows([None, deltas, None]):
        logits = real.adapted.model(random_ids(real.adapted.model)).logits
    logits.log_softmax(-1)[..., 5].sum().backward()
    assert all(delta.grad.isfinite().all() and delta.grad.abs().max() > 0 for delta in deltas.values())
    assert all(parameter.grad is None for parameter in real.adapted.model.parameters())
