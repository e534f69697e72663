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
from t2app.kernels.linear import packed_matrix_bytes
from t2app.messages import Sampling
from t2app.models import Model
from t2app.parts import whole
from t2app.spectral import Deltas, SpectralLinear

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
        bases: the singular vectors of the adapted layers, which a step of rows of several mixtures reads.
        matrices: of one mixture, which a step reads in their place; the same where there are none.
    """

    blocks: int
    head: int
    bases: int
    matrices: int

    @property
    def base(self) -> int:
        """Of a step of the base model alone."""
        return self.blocks + self.head

    @property
    def both(self) -> int:
        """Of a step of both answers."""
        return self.base + self.matrices

    @property
    def mixtures(self) -> int:
        """Of a step of several users' both answers, each by a mixture of its own."""
        return self.base + self.bases


def weight_bytes(model: Model) -> WeightBytes:
    """The bytes by what they belong to; one row of the embedding and the keys and values are too few to count."""
    transformer = model.adapted.model
    decoder = transformer.get_decoder()
    embedding = transformer.get_input_embeddings().weight
    head = transformer.get_output_embeddings().weight
    layers = model.adapted.layers.values()
    return WeightBytes(
        blocks=sum(weights.nbytes for weights in decoder.parameters() if weights is not embedding),
        head=head.nbytes,
        bases=sum(_read_of_vectors(layer) for layer in layers),
        matrices=sum(_read_of_matrix(layer) for layer in layers),
    )


def weight_operations(model: Model, rows: int, edited_rows: int, by_matrices: bool = False) -> int:
    """The multiplications and additions of a step of so many rows with all weights, and of its edits.

    Args:
        by_matrices: whether all edited rows have one mixture, and are edited by its matrices.
    """
    transformer = model.adapted.model
    linear = [module for module in transformer.modules() if isinstance(module, nn.Linear)]
    weights = sum(layer.in_features * layer.out_features for layer in linear)
    # An edit's singular vectors are multiplied twice: for the coordinates, and by them.
    products = 1 if by_matrices else 2
    edits = sum(products * layer.rank**2 for layer in model.adapted.layers.values())
    return 2 * (rows * weights + edited_rows * edits)


def _read_of_vectors(layer: SpectralLinear) -> int:
    return layer.vectors.nbytes if layer.packed is None else sum(tensor.nbytes for tensor in layer.packed)


def _read_of_matrix(layer: SpectralLinear) -> int:
    if layer.packed is not None:
        return packed_matrix_bytes(layer.rank)
    # Of a whole matrix an entry is a byte.
    return layer.vectors.numel() if layer.takes_whole_matrix else layer.vectors.nbytes
