"""Decoding steps that a GPU is told of once: as CUDA graphs.

A step is a thousand small operations and more, most of which a GPU has done before Python asks for the next. Where the
rows of a batch stay the same for a few steps, a step is recorded, and asked for as one from then on. What is recorded
reads and writes the same memory each time, so the step is one over tensors that stay where they are: new keys and
values are written to the place that a tensor tells, and attention is given the room behind them too, masked.

A recording is used only where it gave what the same step gave before it; where it cannot be made, steps go on as they
are on a CPU. Tests without a GPU run all but the recording itself.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from t2app.decoding.context import Context, device_of, forward, plain_step
from t2app.decoding.sampling import NextLogits
from t2app.key_values import GrowingLayer
from t2app.spectral import Plan, SpectralModel

# Steps of the same rows before one is recorded. That takes as long as some more of them, which rows that soon come or
# go do not make up for.
_STEPS_BEFORE = 3
# A recorded step's room: for so many tokens at least, in all a number that attention takes a mask of without a copy.
_LEAST_ROOM, _ROOM_UNIT = 128, 16
# By how much of the largest logit a recorded step's may be others: bfloat16 rounds to a 256th.
_TOLERANCE = 0.02

# Gives the logits (rows, vocabulary) of the next step whenever it is called.
Replay = Callable[[], Tensor]


class FixedStep:
    """A decoding step of the rows of a context as one over tensors that stay where they are.

    The context is left as it is, but for what is written in the room behind its tokens.

    Args:
        ids: the token of each row that is taken in first, at these places.
    """

    def __init__(self, adapted: SpectralModel, context: Context, ids: Sequence[int], places: Sequence[int]):
        self._adapted = adapted
        device = device_of(adapted)
        layers = [_with_fixed_room(layer) for layer in context.cache.layers]
        self._ids, self._places = (torch.tensor(of_rows, device=device)[:, None] for of_rows in (ids, places))
        # What attention sees, (rows, 1, 1, room): what the context does, and what is written here.
        seen = torch.zeros(len(ids), 1, 1, layers[0].max_cache_len, dtype=torch.bool, device=device)
        mask = context.whole_mask(device)
        seen[..., : mask.shape[1]] = mask[:, None, None].bool()
        self._context = Context(Cache(layers=layers), seen)

    def take(self, ids: Sequence[int]) -> None:
        """Have the next call of `run` take in these tokens of the rows."""
        self._ids.copy_(torch.tensor(ids)[:, None])

    def run(self) -> Tensor:
        """The logits (rows, vocabulary) after the rows' tokens, which this step's tensors take in."""
        length = self._context.cache.layers[0].cumulative_length
        self._context.mask.index_fill_(-1, length[None], True)
        logits = forward(self._adapted, self._ids, self._context, self._places)[:, -1]
        self._places += 1
        return logits

    def rewind(self) -> None:
        """Have the last step still to come."""
        self._places -= 1
        for layer in self._context.cache.layers:
            layer.cumulative_length -= 1


class StepGraphs:
    """The steps of a batch, recorded where the rows stay the same for long enough.

    Args:
        record: makes a step one that is replayed, and raises RuntimeError where it cannot; None to record nothing.
    """

    def __init__(self, adapted: SpectralModel, record: Callable[[FixedStep], Replay] | None):
        self._adapted, self._record = adapted, record
        self.begin({})

    def begin(self, plan: Plan) -> None:
        """Expect other rows, by this plan, from now on."""
        self._plan = plan
        self._forget()

    def _forget(self) -> None:
        self._steps = 0
        self._replay: Replay | None = None
        self._step: FixedStep | None = None

    def run(self, ids: Sequence[int], places: Sequence[int], context: Context) -> NextLogits:
        """What follows a token of each row at its place, which the context takes in; it is good until the next call."""
        # The plan is in use only while a step runs: a stream that is left half-read leaves the model clean.
        with self._adapted.using(self._plan):
            return self._run(ids, places, context)

    def _run(self, ids: Sequence[int], places: Sequence[int], context: Context) -> NextLogits:
        layers = context.cache.layers
        if self._replay is not None and layers[0].room == 0:
            self._forget()
        if self._record is not None and self._steps == _STEPS_BEFORE and _all_grow(context):
            self._begin(ids, places, context)
        self._steps += 1
        if self._replay is None:
            return plain_step(self._adapted, ids, places, context)
        context.extend(1)
        for layer in layers:
            layer.advance()
        self._step.take(ids)
        return NextLogits(self._replay())

    def _begin(self, ids: Sequence[int], places: Sequence[int], context: Context) -> None:
        for layer in context.cache.layers:
            length = layer.get_seq_length() + _LEAST_ROOM
            layer.reserve(length + -length % _ROOM_UNIT)
        self._adapted.edit_by_matrices()
        self._step = FixedStep(self._adapted, context, ids, places)
        try:
            self._replay = self._record(self._step)
        except RuntimeError as error:
            logging.getLogger(__name__).warning("decoding without CUDA graphs: %s", error)
            self._record = self._step = None


def recorder_for(adapted: SpectralModel) -> Callable[[FixedStep], Replay] | None:
    """What records the steps of a model; None where that cannot be.

    That is on a CPU, where parts of the model are elsewhere than on one GPU, and where its code waits for what the GPU
    has computed, which transformers knows of each model.
    """
    model = adapted.model
    if device_of(adapted).type != "cuda" or len({parameter.device for parameter in model.parameters()}) > 1:
        return None
    masked_by_bools = model.config.get_text_config()._attn_implementation == "sdpa"
    return cuda_graph_of if model._can_compile_fullgraph and masked_by_bools else None


def cuda_graph_of(step: FixedStep) -> Replay:
    """A step as a CUDA graph.

    Raises:
        RuntimeError: it cannot be recorded, or the recording gave other logits than the step.
    """
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    # Once beside the recording, since libraries make what they need in their first call.
    with torch.cuda.stream(stream):
        expected = step.run().float()
    before.wait_stream(stream)
    step.rewind()
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may use the GPU meanwhile, as one that loads a model.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            logits = step.run()
    finally:
        torch.cuda.set_stream(before)  # torch leaves the other one where recording fails
    graph.replay()
    step.rewind()
    difference = (logits.float() - expected).abs().max() / expected.abs().max()
    if not difference <= _TOLERANCE:
        raise RuntimeError(f"a recorded step gave logits that were {difference:.0%} off")

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def _all_grow(context: Context) -> bool:
    return all(isinstance(layer, GrowingLayer) for layer in context.cache.layers)


def _with_fixed_room(layer: GrowingLayer) -> StaticLayer:
    """A layer whose length is a tensor, in the room that `layer` has."""
    keys, values = layer.extend(0)
    for room in (keys, values):
        room[..., layer.get_seq_length() :, :] = 0  # masked or not, it is multiplied
    fixed = StaticLayer(keys.shape[-2])
    fixed.keys, fixed.values, fixed.device = keys, values, keys.device
    fixed.cumulative_length = torch.tensor(layer.get_seq_length(), device=keys.device)
    fixed.is_initialized = True
    return fixed
