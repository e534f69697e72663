"""Steps over tensors that stay where they are, on the real embedded model in fp32; recording them takes a GPU."""

import logging

import pytest
import torch
from random_mixtures import random_deltas

from t2app.decoding import Batch
from t2app.decoding.step_graphs import FixedStep, Replay, StepGraphs, cuda_graph_of, recorder_for
from t2app.messages import Sampling

QUESTIONS = ("Compute 12 + 7. Reply with only the number.", "Why is the sky blue?")


class Rehearsal:
    """Records as on a GPU, where a step is run once before, but for the recording: a replay is the step once more."""

    def __init__(self):
        self.made = self.replayed = 0

    def __call__(self, step: FixedStep) -> Replay:
        self.made += 1
        step.run()
        step.rewind()

        def replay() -> torch.Tensor:
            self.replayed += 1
            return step.run()

        return replay


def tokens_of(model, record, tokens: int) -> dict[int, list[int]]:
    """Greedy answers by row: the base model's and an adapted one to one question, 12 steps later those to a longer one,
    and 12 steps later without that one's base row.
    """
    batch = Batch(model.adapted, (), StepGraphs(model.adapted, record))
    prompts = [model.prompt_ids(question) for question in QUESTIONS]
    mixtures = [random_deltas(model.adapted, seed) for seed in range(2)]
    rows: dict[int, list[int]] = {}

    def take(step: dict[int, int]) -> None:
        for row, token in step.items():
            rows.setdefault(row, []).append(token)

    take(batch.admit(prompts[1:] * 2, [None, mixtures[0]], Sampling(tokens)))
    for _ in range(12):
        take(batch.step())
    take(batch.admit(prompts[:1] * 2, [None, mixtures[1]], Sampling(tokens)))
    for _ in range(12):
        take(batch.step())
    batch.drop({2})
    while batch:
        take(batch.step())
    return rows


def test_rows_that_come_and_go_get_the_tokens_of_steps_that_are_not_recorded(real):
    rehearsal = Rehearsal()
    assert tokens_of(real, rehearsal, 34) == tokens_of(real, None, 34)
    # Of every company's steps all but the three before a recording: two rows, four, three, and the one that is left.
    assert rehearsal.made == 4
    assert rehearsal.replayed == 9 + 9 + 6 + 9


def test_a_step_is_recorded_anew_where_its_room_is_full(tiny):
    rehearsal = Rehearsal()
    assert tokens_of(tiny, rehearsal, 300) == tokens_of(tiny, None, 300)
    assert rehearsal.made > 4


def test_what_lies_in_the_room_behind_the_tokens_is_not_seen(tiny):
    batch = Batch(tiny.adapted, (), StepGraphs(tiny.adapted, None))
    first = batch.admit([[5, 6, 7]], [None], Sampling(4))
    context = batch._context
    for layer in context.cache.layers:
        layer.reserve(64)
        for room in layer.extend(0):
            room[..., layer.get_seq_length() :, :] = torch.nan
    step = FixedStep(tiny.adapted, context, [first[0]], [3])
    assert step.run().argmax().item() == batch.step()[0]


def test_where_recording_fails_decoding_goes_on_and_says_why_once(real, caplog):
    tried = []

    def refusing(step: FixedStep) -> Replay:
        tried.append(step)
        step.run()
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        assert tokens_of(real, refusing, 26) == tokens_of(real, None, 26)
    assert len(tried) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "decoding without CUDA graphs: operation not permitted when stream is capturing"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records")
def test_nothing_is_recorded_on_a_cpu(real):
    assert recorder_for(real.adapted) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_recorded_steps_give_the_tokens_of_steps_that_are_not_recorded(real, caplog):
    assert recorder_for(real.adapted) is cuda_graph_of
    assert tokens_of(real, cuda_graph_of, 34) == tokens_of(real, None, 34)
    assert not caplog.records
