"""The ways that `bench training` compares do the same work: they have the same gradient of z."""

import pytest
import torch

from t2app.bench.training import _WAYS, _batch
from t2app.models.model import load_model


@pytest.fixture
def gradient(tiny_folder, tmp_path, monkeypatch):
    """The gradient of z in one update of a way, at the same z for every way."""
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))

    def gradient(way_name: str) -> dict[str, torch.Tensor]:
        way = _WAYS[way_name](load_model(str(tiny_folder), "fp32", layers=lambda path: True))
        generator = torch.Generator().manual_seed(0)
        for parameter in way.parameters.values():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        batch = _batch(way.model)
        way.sample(batch)
        way.update(batch)
        return {path: parameter.grad for path, parameter in way.parameters.items()}

    return gradient


@pytest.mark.parametrize("way", ["repeated", "composed"])
def test_update_of_a_way_has_the_gradient_of_ours(gradient, way):
    ours, other = gradient("shared"), gradient(way)
    assert ours.keys() == other.keys()
    for path, value in ours.items():
        assert value.any()
        torch.testing.assert_close(other[path], value, rtol=1e-3, atol=1e-6)


def test_composed_weights_have_gradients_of_their_own_and_ours_have_none(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    with_gradient = {}
    for name in ("shared", "composed"):
        way = _WAYS[name](load_model(str(tiny_folder), "fp32", layers=lambda path: True))
        with_gradient[name] = [p for p in way.model.adapted.model.parameters() if p.requires_grad]
    assert with_gradient["shared"] == [] and len(with_gradient["composed"]) == 2 * 7
