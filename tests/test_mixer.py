"""Mixtures that are known again, with the real model's experts."""

import pytest
import torch

from t2app.experts import mix
from t2app.mixer import _KEPT_MIXTURES, Mixer


@pytest.fixture
def mixer(real) -> Mixer:
    return Mixer(real.experts, real.adapted)


def test_mixture_is_the_same_object_again_in_any_order_and_whoever_takes_no_part(mixer):
    mixture = mixer.mixture({"math": 0.5, "code": 0.0})
    assert mixer.mixture({"math": 0.5}) is mixture
    assert mixer.mixture({"code": 0.1, "math": 0.5}) is mixer.mixture({"math": 0.5, "code": 0.1})
    assert mixer.mixture({"math": 0.25}) is not mixture
    for number in range(_KEPT_MIXTURES):
        mixer.mixture({"code": 1 / (2 + number)})
    assert mixer.mixture({"math": 0.5}) is not mixture, "all of them would be kept"


def test_expert_alone_is_the_same_object_always(mixer, real):
    assert mixer.alone.keys() == {expert.name for expert in real.experts}
    for name, deltas in mixer.alone.items():
        assert mixer.mixture({name: 1.0}) is deltas


def test_mixtures_are_those_of_the_experts(mixer, real):
    blocks = real.experts[0].weights.blocks
    for weights in ({"math": 0.5, "code": 0.25}, {"math": 1.0}, {"math": [0.0] * (blocks - 1) + [1.0], "code": 0.5}):
        found, expected = mixer.mixture(weights), mix(real.experts, weights)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[path], expected[path]) for path in expected)
    assert mixer.mixture({"math": 0.0}) is None and mixer.mixture({}) is None
