"""The bases of a model's layers in the cache, computed several at a time, of a small random model."""

from itertools import count

import pytest
import torch
from conftest import SMALL_CONFIGS

from t2app.models import bases
from t2app.models.bases import CachedBases
from t2app.models.families import random_model
from t2app.models.weights import CheckpointWeights
from t2app.spectral import basis_of, linear_layer
from t2app.spectral.layer_paths import block_linear_paths


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the bases of one model anew, from the same cache."""
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    model = random_model(SMALL_CONFIGS["llama"])
    model.save_pretrained(tmp_path / "model")
    weights = CheckpointWeights(tmp_path / "model", model)
    paths = block_linear_paths(model)
    return lambda: CachedBases(model, weights, "0" * 64, paths, torch.device("cpu"))


def test_bases_are_those_of_the_weights_and_torch_has_its_threads_again(made):
    found, threads = made(), torch.get_num_threads()
    shares = []
    found.prepare(lambda message, share: shares.append(share))
    assert torch.get_num_threads() == threads
    assert shares == [None, *(n / len(found) for n in range(1, len(found) + 1))]
    for path in found:
        expected = basis_of(linear_layer(found._model, path).weight)
        torch.testing.assert_close(found[path].singular_values, expected.singular_values)
        # A vector's sign is nobody's choice.
        torch.testing.assert_close((found[path].vectors * expected.vectors).sum(0).abs(), torch.ones(expected.rank))


def test_preparation_that_was_cut_off_goes_on_with_the_layers_that_are_missing(made, monkeypatch):
    layers, numbers = len(made()), count()

    def cut_off(weight):
        if next(numbers) == layers // 2:
            raise KeyboardInterrupt
        return basis_of(weight)

    monkeypatch.setattr(bases, "basis_of", cut_off)
    with pytest.raises(KeyboardInterrupt):
        made().prepare(lambda message, share: None)
    missing = made()._missing()
    assert 0 < len(missing) <= layers / 2
    computed = []
    monkeypatch.setattr(bases, "basis_of", lambda weight: computed.append(weight) or basis_of(weight))
    made().prepare(lambda message, share: None)
    assert len(computed) == len(missing)
    assert made()._missing() == []


@pytest.mark.parametrize(("most_bytes", "at_once"), [(2**40, 4), (2 * 80 * 32 * 8, 2), (1, 1)])
def test_no_more_are_computed_at_a_time_than_there_are_threads_and_memory_holds(made, monkeypatch, most_bytes, at_once):
    monkeypatch.setattr(bases, "_MOST_BYTES_AT_ONCE", most_bytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    found = made()
    assert found._at_once(list(found)) == at_once
