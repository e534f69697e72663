"""A decoding step, of both answers or of the base model alone, and the weights that it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from t2app.bench.figure import seconds
from t2app.decoding import Batch
from t2app.decoding.step_graphs import StepGraphs
from t2app.experts import mix
from t2app.kernels.edits import edits_fast_by_matrix
from t2app.messages import Sampling
from t2app.models.model import Model
from t2app.parts import whole
from t2app.spectral import Deltas, SpectralLinear, one_mixture

_CONTEXT_TOKENS = 64
_WARM_UP = 10  # more than precede the recording of a step on a GPU


def even_mixture(model: Model, alpha: float = 1.0) -> Deltas:
    """All of the model's experts at once, each with the same α: what is measured does not depend on which are mixed.

    Raises:
        ValueError: the model has no expert to measure with.
    """
    mixture = mix(model.experts, {expert.name: alpha for expert in model.experts})
    if mixture is None:
        raise ValueError(f"{model.name} has no expert to measure with")
    return mixture


def with_matrices(model: Model, mixture: Deltas) -> Deltas:
    """The same mixture, for which now is made what the app makes of it while it is idle."""
    whole(model.adapted.making_matrices(mixture))
    return mixture


def random_context() -> list[int]:
    """The token ids that are gone on from."""
    return torch.randint(100, 1000, (_CONTEXT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()


def stepper(model: Model, mixtures: Sequence[Deltas | None], steps: int, recorded: bool = True) -> Callable[[], object]:
    """A batch with a row for each mixture, every call of which is a step; it can be called `steps` times.

    What comes before is done: the context is computed, and the first steps, which warm up.

    Args:
        recorded: whether steps are CUDA graphs where they can be.
    """
    # No token ends an answer: all rows go on to the last step.
    batch = Batch(model.adapted, (), None if recorded else StepGraphs(model.adapted, None))
    batch.admit([random_context()] * len(mixtures), mixtures, Sampling(1 + _WARM_UP + steps))
    for _ in range(_WARM_UP):
        batch.step()
    return partial(next, batch.rest())


def step_seconds(step: Callable[[], object]) -> float:
    """Seconds of a step after one of the same rows, as steps of an answer are.

    One step is made before it: it finds the caches, and the kernel that a decoder keeps, as other rows have left them.
    """
    step()
    return seconds(step)


@dataclass(frozen=True)
class WeightBytes:
    """What a step reads of weights, each number once however many rows there are, in bytes.

    Attributes:
        blocks: the weights of the blocks and the norms; head: of the output layer.
        edits: the matrices of the adapted rows' mixture, or singular vectors; none where no row is adapted.
    """

    blocks: int
    head: int
    edits: int

    @property
    def total(self) -> int:
        return self.blocks + self.head + self.edits


def weight_bytes(model: Model, rows: Sequence[Deltas | None]) -> WeightBytes:
    """What a step of a row for each mixture reads, by what it belongs to.

    One row of the embedding, and the keys and values, are too few to count.
    """
    transformer = model.adapted.model
    decoder = transformer.get_decoder()
    embedding = transformer.get_input_embeddings().weight
    head = transformer.get_output_embeddings()
    layers = model.adapted.layers.values() if any(row is not None for row in rows) else ()
    read_of = _read_of_matrix if _by_matrices(model, rows) else _read_of_vectors
    return WeightBytes(
        blocks=sum(weights.nbytes for weights in decoder.parameters() if weights is not embedding),
        head=sum(weights.nbytes for weights in head.parameters()),
        edits=sum(read_of(layer) for layer in layers),
    )


def weight_operations(model: Model, rows: Sequence[Deltas | None]) -> int:
    """The multiplications and additions of a step of a row for each mixture, with all weights and of the edits."""
    transformer = model.adapted.model
    linear = [module for module in transformer.modules() if isinstance(module, nn.Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in linear)
    # An edit's singular vectors are multiplied twice: for the coordinates, and by them.
    products = 1 if _by_matrices(model, rows) else 2
    edits = sum(products * layer.rank**2 for layer in model.adapted.layers.values())
    return 2 * (len(rows) * weights + sum(row is not None for row in rows) * edits)


def _by_matrices(model: Model, rows: Sequence[Deltas | None]) -> bool:
    """Whether the adapted rows have one mixture, and are edited by its matrices."""
    mixture = one_mixture(rows)
    if mixture is None:
        return False
    layers = model.adapted.layers.values()
    if all(layer.takes_whole_matrix for layer in layers):
        return True
    adapted = sum(row is not None for row in rows)
    fast = all(layer.packed is None for layer in layers) or edits_fast_by_matrix(adapted)
    return fast and model.adapted.has_matrices_of(mixture)


def _read_of_vectors(layer: SpectralLinear) -> int:
    return layer.vectors.nbytes if layer.packed is None else sum(tensor.nbytes for tensor in layer.packed)


def _read_of_matrix(layer: SpectralLinear) -> int:
    # Of a whole matrix an entry is a byte.
    return layer.vectors.numel() if layer.takes_whole_matrix else layer.matrix_bytes
