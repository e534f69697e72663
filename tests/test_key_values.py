"""The cache with room for more tokens, against transformers' own."""

import pytest
import torch
from transformers import DynamicCache

from t2app.key_values import GrowingCache


def states(tokens: int, rows: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * tokens + seed)
    return tuple(torch.randn(rows, 3, tokens, 8, generator=generator) for _ in range(2))


@pytest.fixture
def caches(real) -> tuple[GrowingCache, DynamicCache]:
    config = real.adapted.model.config
    return GrowingCache(config), DynamicCache(config=config)


def assert_same(caches, tokens: int, rows: int = 2, seed: int = 0) -> None:
    for found, expected in zip(*(cache.update(*states(tokens, rows, seed), 0) for cache in caches), strict=True):
        assert torch.equal(found, expected)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_it_holds_what_transformers_own_cache_holds_however_it_grows(caches):
    for seed, tokens in enumerate((50, *[1] * 60, 7, 1)):
        assert_same(caches, tokens, seed=seed)


def test_new_tokens_are_written_where_there_is_room(caches):
    growing = caches[0]
    keys, _ = growing.update(*states(50), 0)
    assert growing.update(*states(1), 0)[0].data_ptr() == keys.data_ptr()


def test_rows_that_are_chosen_have_room_of_their_own(caches):
    growing = caches[0]
    whole, _ = growing.update(*states(50), 0)
    before = whole.clone()
    growing.batch_select_indices(torch.tensor([1]))
    chosen = growing.layers[0].keys
    assert growing.update(*states(1, rows=1), 0)[0].data_ptr() == chosen.data_ptr()
    assert torch.equal(whole, before)


def test_rows_that_are_chosen_or_repeated_go_on_by_themselves(caches):
    assert_same(caches, 10)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([1]))
    assert_same(caches, 1, rows=1)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    for seed in range(40):
        assert_same(caches, 1, rows=3, seed=seed)


def test_a_gradient_goes_through_all_tokens(real):
    cache = GrowingCache(real.adapted.model.config)
    first, last = (tuple(state.requires_grad_() for state in states(tokens)) for tokens in (5, 2))
    cache.update(*first, 0)
    keys, values = cache.update(*last, 0)
    (keys.square().sum() + values.square().sum()).backward()
    for state in (*first, *last):
        torch.testing.assert_close(state.grad, 2 * state.detach())
