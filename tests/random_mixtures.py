"""Mixtures at random, of which no test needs to know more than that they change an answer."""

from collections.abc import Mapping

import torch

from t2app.spectral import Deltas, SpectralModel


def random_deltas(adapted: SpectralModel, seed: int = 0) -> Deltas:
    """z − 1 of all layers of a model."""
    return deltas_of_ranks({path: layer.rank for path, layer in adapted.layers.items()}, seed)


def deltas_of_ranks(ranks: Mapping[str, int], seed: int = 0) -> Deltas:
    """z − 1 (rank,) of layers, by their paths."""
    generator = torch.Generator().manual_seed(seed)
    return {path: 0.1 * torch.randn(rank, generator=generator) for path, rank in ranks.items()}
