"""Decoding steps that are one call of the kernels each, held against passes of the same model."""

from collections.abc import Callable, Sequence

import pytest
import torch
from decoder_models import adapted, decoder_model, mixtures_of

from t2app.decoding import Batch
from t2app.decoding.batch import steps_of
from t2app.decoding.sampling import NextLogits
from t2app.decoding.step_calls import StepCalls
from t2app.decoding.step_graphs import StepGraphs
from t2app.kernels.build import kernel_folder
from t2app.kernels.model import use_kernels
from t2app.kernels.steps import KernelSteps
from t2app.messages import Sampling
from t2app.models.model import Model, load_model
from t2app.spectral import Deltas, SpectralModel

pytestmark = pytest.mark.usefixtures("models_by_kernels")


def small(kind: str, in_bytes: bool = False, **changes) -> SpectralModel:
    model = decoder_model(kind, **changes).bfloat16()
    use_kernels(model, kernel_folder(), in_bytes)
    return adapted(model)


class Seen:
    """Steps that note what follows them, and how many of them were calls."""

    def __init__(self, steps: StepCalls | StepGraphs):
        self._steps = steps
        self.logits: list[torch.Tensor] = []
        self.calls = 0

    def begin(self, plan) -> None:
        self._steps.begin(plan)

    def run(self, *arguments) -> NextLogits:
        following = self._steps.run(*arguments)
        self.logits.append(following.logits.clone())
        self.calls += following.likeliest is not None
        return following


Decoded = tuple[list[dict[int, int]], Seen]


def by_calls_and_by_passes(model: SpectralModel, decode: Callable[[Batch], list[dict[int, int]]]) -> list[Decoded]:
    """What is decoded, and the steps that it took, each way."""
    ways = [Seen(steps) for steps in (StepCalls(model), StepGraphs(model, None))]
    return [(decode(Batch(model, (), steps)), steps) for steps in ways]


def rows_that_come_and_go(mixtures: Sequence[Deltas | None], sampling: Sampling):
    """Two rows; 20 steps later two with a longer prompt beside them, and 20 steps later all but one go."""

    def decode(batch: Batch) -> list[dict[int, int]]:
        steps = [batch.admit([[3, 1, 4]] * 2, [None, mixtures[0]], sampling)]
        steps += [batch.step() for _ in range(20)]
        steps.append(batch.admit([list(range(10, 40))] * 2, [None, mixtures[1]], sampling))
        steps += [batch.step() for _ in range(20)]
        batch.drop({0, 2, 3})
        return steps + list(batch.rest())

    return decode


def rows_of(prompts: list[list[int]], mixtures: Sequence[Deltas | None], tokens: int):
    """So many tokens of each."""
    return lambda batch: [batch.admit(prompts, mixtures, Sampling(tokens)), *batch.rest()]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("in_bytes", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_rows_that_come_and_go_get_the_logits_and_tokens_of_passes(kind, in_bytes, temperature):
    model = small(kind, in_bytes)
    decode = rows_that_come_and_go(mixtures_of(model), Sampling(60, temperature=temperature, seed=3))
    (by_calls, calls), (by_passes, passes) = by_calls_and_by_passes(model, decode)
    assert by_calls == by_passes
    assert all(map(torch.equal, calls.logits, passes.logits)) and len(calls.logits) == len(passes.logits)
    assert (calls.calls, passes.calls) == (len(calls.logits), 0)


def test_greedy_and_drawn_rows_share_a_step():
    model = small("llama")

    def decode(batch: Batch) -> list[dict[int, int]]:
        batch.admit([[3, 1, 4]], [None], Sampling(40))
        batch.admit([[3, 1, 4]], [mixtures_of(model)[1]], Sampling(40, temperature=1.0, top_p=0.9, seed=1))
        return list(batch.rest())

    (by_calls, calls), (by_passes, _) = by_calls_and_by_passes(model, decode)
    assert by_calls == by_passes and calls.calls == len(by_calls)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_of_other_kinds_are_those_of_passes(rope):
    model = small("llama", max_position_embeddings=32, rope_parameters={"rope_theta": 1e4, **rope})
    decode = rows_that_come_and_go(mixtures_of(model), Sampling(60))
    (by_calls, calls), (by_passes, passes) = by_calls_and_by_passes(model, decode)
    assert by_calls == by_passes and all(map(torch.equal, calls.logits, passes.logits))
    # Those of the dynamic kind depend on how many there are.
    assert bool(calls.calls) == (rope["rope_type"] != "dynamic")


@pytest.mark.parametrize("changes", [{"sliding_window": 8}, {"hidden_act": "gelu"}], ids=str)
def test_steps_that_no_kernel_knows_are_passes(changes):
    model = small("mistral", **changes)
    decode = rows_that_come_and_go(mixtures_of(model), Sampling(50))
    (by_calls, calls), (by_passes, _) = by_calls_and_by_passes(model, decode)
    assert by_calls == by_passes and calls.calls == 0


@pytest.fixture(scope="module", params=["bf16", "8bit"])
def real_by_kernels(request, models_by_kernels) -> Model:
    return load_model(precision=request.param)


def test_real_answers_are_those_of_passes(real_by_kernels):
    model = real_by_kernels
    prompt = model.prompt_ids("Compute 12 + 7. Reply with only the number.")
    deltas = {path: z.float() - 1 for path, z in model.experts[0].z.items()}
    decode = rows_of([prompt] * 2, [None, deltas], 40)
    (by_calls, calls), (by_passes, passes) = by_calls_and_by_passes(model.adapted, decode)
    assert by_calls == by_passes and all(map(torch.equal, calls.logits, passes.logits))
    assert calls.calls == 39
    assert isinstance(steps_of(model.adapted), StepCalls)


def test_after_a_layer_was_replaced_new_rows_are_decoded_by_the_new_one():
    model = small("llama")
    decode = rows_of([[3, 1, 4]], [None], 12)
    before, _ = by_calls_and_by_passes(model, decode)
    layer = model.layers["model.layers.1.mlp.up_proj"]
    layer.base = layer.base.with_weight(-3 * layer.base.weight.float())
    (by_calls, calls), (by_passes, passes) = by_calls_and_by_passes(model, decode)
    assert by_calls == by_passes and calls.calls == 11
    assert all(map(torch.equal, calls.logits, passes.logits))
    assert not torch.equal(calls.logits[-1], before[1].logits[-1])


@pytest.fixture
def steps() -> KernelSteps:
    """Of two rows of a small model, with 5 tokens in the cache and room for 16 more."""
    model = small("llama")
    batch = Batch(model, ())
    batch.admit([[5, 6, 7, 8, 9]] * 2, [None, None], Sampling(4))
    return KernelSteps.of(model.model, batch._context.cache, [5, 5], None)


@pytest.mark.parametrize(
    "ids, length", [([1], 6), ([1, 2, 3], 6), ([1, 50], 6), ([-1, 1], 6), ([1, 2], 5), ([1, 2], 22)]
)
def test_tokens_that_are_none_and_places_without_room_are_refused(steps, ids, length):
    with pytest.raises(RuntimeError, match="was expected"):
        steps(ids, length)
    logits, likeliest = steps([1, 2], 6)
    assert logits.shape == (2, 50) and likeliest == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocabulary", [1, 7, 63, 64, 200, 1000])
@pytest.mark.parametrize("rows", [1, 5])
def test_likeliest_tokens_are_the_first_of_the_largest_logits(vocabulary, rows):
    model = small("llama", vocab_size=vocabulary, tie_word_embeddings=False)
    head = model.model.lm_head
    # Logits of few values, many of which are alike, and in the end all of them.
    head.weight.data = head.weight.data.sign() * (torch.arange(192) == 0)
    batch = Batch(model, ())
    batch.admit([[0]] * rows, [None] * rows, Sampling(4))
    steps = KernelSteps.of(model.model, batch._context.cache, [1] * rows, None)
    logits, likeliest = steps([0] * rows, 2)
    assert len(set(logits[0].tolist())) < 4
    assert likeliest == [row.index(max(row)) for row in logits.tolist()]
