"""Training: that it teaches the real model, and on a small random Llama a step, a whole run, and one that was cut off.

No answer of a random model is ever right, so its task rewards something that about half of its answers do.
"""

import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from t2app.decoding.likelihood import _PART_RATIO, _PART_TOKENS, parts_by_length
from t2app.experts import load_expert
from t2app.models.model import load_model
from t2app.spectral import SpectralModel, basis_of, linear_layer
from t2app.spectral.layer_paths import block_linear_paths
from t2app.tasks import Example
from t2app.training.settings import TrainingSettings
from t2app.training.trainer import Trainer, _advantages


class EvenLength:
    """Says that an answer is right where its length is even."""

    name = "even-length"
    label = "reasoning"
    description = "answers of an even length"
    max_new_tokens = 6

    def examples(self, split: str) -> list[Example]:
        return [
            Example(f"{split} " * (1 + number % 3) + str(number), "", f"{number} and a few words more")
            for number in range(8)
        ]

    def is_right(self, example: Example, answer: str) -> bool:
        return len(answer) % 2 == 0


class Never(EvenLength):
    """Takes no answer for right."""

    name = "never"

    def is_right(self, example: Example, answer: str) -> bool:
        return False


class BeginsWithThe(EvenLength):
    """Says that an answer of one token is right where it is "The", which the real model now and then begins with."""

    name = "begins-with-the"
    max_new_tokens = 1

    def examples(self, split: str) -> list[Example]:
        return [
            Example(f"Tell me about {thing}.", "The", "The") for thing in ("dogs", "Paris", "bread", "winter", "music")
        ]

    def is_right(self, example: Example, answer: str) -> bool:
        return answer == example.answer


SETTINGS = TrainingSettings(
    warm_start_steps=0, steps=4, prompts=3, samples=4, learning_rate=0.05, decay_steps=0, validate_every=2
)


def values(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {path: delta.detach().clone() for path, delta in trainer.parameters.items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(value.cpu(), second[path].cpu()) for path, value in first.items())


def logged_steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tiny, tmp_path_factory) -> tuple[Trainer, list]:
    """A training of 4 steps in one go, and its steps."""
    trainer = Trainer(tiny, EvenLength(), SETTINGS, tmp_path_factory.mktemp("whole"), "even")
    return trainer, list(trainer.run())


def test_training_that_starts_from_an_expert_goes_on_from_it(tiny, whole_run, tmp_path):
    first, _ = whole_run
    expert = load_expert(first.file, tiny.identity)
    further = Trainer(tiny, EvenLength(), replace(SETTINGS, steps=2), tmp_path, "even", expert)
    begun = {path: z - 1 for path, z in expert.z.items()}
    assert_same(values(further), begun)
    start, *steps = further.run()
    assert start.validation == first.best and further.base_validation == first.base_validation
    assert len(steps) == 2 and further.best >= first.best
    assert any(not torch.equal(value.cpu(), begun[path]) for path, value in values(further).items())
    assert load_expert(further.file, tiny.identity).training["start"].startswith("even (")
    with pytest.raises(ValueError, match="other settings"):
        Trainer(tiny, EvenLength(), replace(SETTINGS, steps=2), tmp_path, "even")


def test_expert_of_other_layers_than_are_trained_is_refused_as_a_start(tiny, whole_run, tmp_path):
    expert = load_expert(whole_run[0].file, tiny.identity)
    fewer = replace(expert, z=dict(islice(expert.z.items(), 3)))
    with pytest.raises(ValueError, match="adapts 3 layers"):
        Trainer(tiny, EvenLength(), SETTINGS, tmp_path, "even", fewer)


def test_group_advantage_is_the_reward_against_its_group_in_units_of_its_spread():
    right = torch.tensor([[True, False, False, False], [True, True, True, True], [False] * 4])
    advantages = _advantages(right, "group")
    expected = torch.tensor([3.0, -1.0, -1.0, -1.0]) / 3**0.5
    torch.testing.assert_close(advantages[0], expected)
    assert torch.equal(advantages[1:], torch.zeros(2, 4))


def test_plain_advantage_is_plus_or_minus_one():
    assert torch.equal(_advantages(torch.tensor([[True, False]]), "plain"), torch.tensor([[1.0, -1.0]]))


def test_a_step_changes_every_z_and_nothing_else(tiny, tmp_path):
    before = {name: value.clone() for name, value in tiny.adapted.model.state_dict().items()}
    trainer = Trainer(tiny, EvenLength(), SETTINGS, tmp_path, "even")
    assert all(not delta.any() for delta in trainer.parameters.values())
    first = list(islice(trainer.run(), 2))[1]
    assert 0 < first.reward < 1 and first.gradient_norm > 0
    assert all(delta.any() and delta.isfinite().all() for delta in trainer.parameters.values())
    assert trainer.parameters.keys() == tiny.adapted.layers.keys()
    assert_same(tiny.adapted.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in tiny.adapted.model.parameters())


def test_training_teaches_the_real_model_what_is_rewarded(real, tmp_path):
    settings = replace(SETTINGS, samples=16, learning_rate=5e-3, validate_every=9, validation_limit=1)
    trainer = Trainer(real, BeginsWithThe(), settings, tmp_path, "the")
    rewards = [step.reward for step in trainer.run()][1:]
    assert rewards[0] < 0.3 and rewards[-1] > 0.8
    [the] = real.tokenizer("The", add_special_tokens=False)["input_ids"]
    unseen = torch.tensor([real.prompt_ids("Tell me about mountains.")] * 2, device=real.adapted.model.device)
    with torch.no_grad(), real.adapted.rows([None, values(trainer)]):
        base, trained = real.adapted.model(unseen).logits[:, -1].softmax(-1)[:, the]
    assert base < 0.3 and trained > 0.8


def test_warm_start_imitates_the_solutions_before_anything_is_sampled(tiny, tmp_path):
    settings = replace(SETTINGS, warm_start_steps=6, steps=1, prompts=8, warm_start_learning_rate=0.05)
    trainer = Trainer(tiny, EvenLength(), settings, tmp_path, "even")
    base, *warm, sampled = trainer.run()
    assert (base.reward, base.imitation_loss) == (None, None)
    losses = [step.imitation_loss for step in warm]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    assert all(step.reward is None for step in warm)
    assert sampled.reward is not None and sampled.imitation_loss is None
    assert [step.step for step in (base, *warm, sampled)] == logged_steps(tmp_path) == list(range(8))


def test_imitation_loss_is_the_models_cross_entropy_of_the_solutions_and_their_end(tiny, tmp_path):
    settings = replace(SETTINGS, warm_start_steps=1, prompts=8)
    first = list(islice(Trainer(tiny, EvenLength(), settings, tmp_path, "even").run(), 2))[1]
    nats, tokens = 0.0, 0
    for example in EvenLength().examples("train"):
        prompt = tiny.prompt_ids(example.prompt)
        solution = [*tiny.tokenizer(example.solution)["input_ids"], tiny.eos_ids[0]]
        with torch.no_grad():
            ids = torch.tensor([prompt + solution], device=tiny.adapted.model.device)
            logs = tiny.adapted.model(ids).logits[0].log_softmax(-1)
        nats -= sum(logs[len(prompt) + i - 1, token].item() for i, token in enumerate(solution))
        tokens += len(solution)
    assert first.imitation_loss == pytest.approx(nats / tokens, rel=1e-4)


def test_steps_of_reinforcement_learning_do_not_compete_with_those_of_the_warm_start(tiny, tmp_path):
    class WorsensThenRecovers(EvenLength):
        """Right for all answers of the warm start's validation, and for half of those of the last step's."""

        calls = 0

        def is_right(self, example, answer):
            self.calls += 1
            return 8 < self.calls <= 16 or (self.calls > 16 + 12 and self.calls % 2 == 0)

    settings = replace(SETTINGS, warm_start_steps=1, steps=1, validate_every=1)
    trainer = Trainer(tiny, WorsensThenRecovers(), settings, tmp_path, "even")
    assert [step.validation for step in trainer.run()] == [0, 1, 0.5]
    expert = load_expert(trainer.file, tiny.identity)
    assert expert.training["best_step"] == 2
    assert [row.correct for row in expert.accuracies] == [0, 4]


@pytest.mark.parametrize("cut", [1, 3], ids=["in the warm start", "after it"])
def test_training_with_a_warm_start_that_was_cut_off_ends_as_if_it_had_not_been(tiny, tmp_path, cut):
    settings = replace(SETTINGS, warm_start_steps=2, steps=2, decay_steps=1, validate_every=1)
    whole = Trainer(tiny, EvenLength(), settings, tmp_path / "whole", "even")
    list(whole.run())
    list(islice(Trainer(tiny, EvenLength(), settings, tmp_path / "cut", "even").run(), cut + 1))
    resumed = Trainer(tiny, EvenLength(), settings, tmp_path / "cut", "even")
    assert resumed.step == cut
    list(resumed.run())
    assert_same(values(resumed), values(whole))


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"steps": 3, "decay_steps": 0}, [0.05, 0.05, 0.05]),
        ({"steps": 3, "decay_steps": 2}, [0.05, 0.05 * 2 / 3, 0.05 / 3]),
        ({"warm_start_steps": 3, "steps": 1}, [6e-3, 6e-3, 3e-3, 0.05]),
    ],
    ids=["constant", "falling", "after a warm start"],
)
def test_learning_rate_of_every_step(tiny, tmp_path, settings, rates):
    trainer = Trainer(tiny, EvenLength(), replace(SETTINGS, prompts=8, **settings), tmp_path, "even")
    used = []
    for step in trainer.run():
        if step.step:
            used.append(trainer.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx(rates)


def test_answers_without_a_difference_in_reward_teach_nothing_by_group_but_do_plainly(tiny, tmp_path):
    for advantage, moves in (("group", False), ("plain", True)):
        settings = replace(SETTINGS, steps=1, advantage=advantage)
        trainer = Trainer(tiny, Never(), settings, tmp_path / advantage, "never")
        list(trainer.run())
        assert any(delta.any() for delta in trainer.parameters.values()) is moves


def test_kl_weight_adds_the_gradient_of_the_divergence_of_the_expert_from_the_base_model(tiny, small_model, tmp_path):
    """On one-token answers of a small vocabulary, where KL(π_z ‖ π_base) and its gradient can be had exactly."""
    transformer = small_model("llama")
    bases = {path: basis_of(linear_layer(transformer, path).weight) for path in block_linear_paths(transformer)}
    model = replace(tiny, adapted=SpectralModel(transformer, bases))
    trainer = Trainer(model, Never(), replace(SETTINGS, kl_weight=1.0), tmp_path, "never")
    generator = torch.Generator().manual_seed(0)
    for delta in trainer.parameters.values():
        delta.data.copy_(0.3 * torch.randn(delta.shape, generator=generator))
    prompt = [5, 6, 7, 8]

    with model.adapted.rows([None, trainer.parameters]):
        base, expert = transformer(torch.tensor([prompt, prompt])).logits[:, -1].log_softmax(-1)
    (expert.exp() * (expert - base)).sum().backward()
    expected = torch.cat([delta.grad for delta in trainer.parameters.values()])

    trainer.optimizer.zero_grad()
    answers = torch.multinomial(expert.detach().exp(), 20_000, replacement=True, generator=generator)
    # Without an advantage the loss is its KL term alone.
    loss = trainer._loss([prompt], [answers[:, None].tolist()], torch.zeros(1, len(answers))) / len(answers)
    loss.backward()
    gradient = torch.cat([delta.grad for delta in trainer.parameters.values()])
    assert (gradient - expected).norm() < 0.1 * expected.norm()


def test_equal_seeds_train_equally_and_other_seeds_otherwise(tiny, tmp_path, whole_run):
    for seed, same in ((0, True), (1, False)):
        trainer = Trainer(tiny, EvenLength(), replace(SETTINGS, seed=seed), tmp_path / str(seed), "even")
        list(trainer.run())
        path = next(iter(trainer.parameters))
        assert torch.equal(trainer.parameters[path], whole_run[0].parameters[path]) is same


def test_run_yields_and_logs_every_step_with_the_base_model_as_step_0(whole_run):
    trainer, steps = whole_run
    assert [step.step for step in steps] == logged_steps(trainer.out) == [0, 1, 2, 3, 4]
    assert [step.step for step in steps if step.validation is not None] == [0, 2, 4]
    assert sorted(path.name for path in trainer.out.iterdir()) == [
        "checkpoint.pt",
        "even.md",
        "even.safetensors",
        "log.jsonl",
        "tensorboard",
    ]


def test_expert_that_is_written_is_the_best_by_validation_and_loads(tiny, whole_run):
    trainer, steps = whole_run
    validated = {step.step: step.validation for step in steps if step.validation is not None}
    best_step = max(validated, key=validated.get)
    expert = load_expert(trainer.file, tiny.identity)
    assert (expert.name, expert.label, expert.description) == ("even", EvenLength.label, EvenLength.description)
    assert expert.training["best_step"] == best_step
    assert expert.training["learning_rate"] == 0.05 and expert.training["task"] == "even-length"
    base, trained = expert.accuracies
    assert (base.mixture, base.correct, base.n) == ("base", round(validated[0] * 8), 8)
    assert (trained.mixture, trained.correct, trained.n) == ("even", round(validated[best_step] * 8), 8)


def test_expert_that_is_written_holds_one_plus_the_trained_deltas(tiny, tmp_path):
    class Improves(EvenLength):
        """Right for every answer from the second validation on, so that the last step is the best."""

        calls = 0

        def is_right(self, example, answer):
            self.calls += 1
            return self.calls > 8 and (self.calls % 2 == 0 or self.calls > 8 + 2 * 12)

    trainer = Trainer(tiny, Improves(), replace(SETTINGS, steps=2), tmp_path, "even")
    list(trainer.run())
    expert = load_expert(trainer.file, tiny.identity)
    assert expert.training["best_step"] == 2
    assert_same(dict(expert.z), {path: 1 + delta for path, delta in values(trainer).items()})
    assert all((z != 1).any() for z in expert.z.values())


def test_training_in_two_runs_ends_as_in_one(tiny, tmp_path, whole_run):
    list(Trainer(tiny, EvenLength(), replace(SETTINGS, steps=2), tmp_path, "even").run())
    trainer = Trainer(tiny, EvenLength(), SETTINGS, tmp_path, "even")
    assert trainer.step == 2
    assert [step.step for step in trainer.run()] == [3, 4]
    assert_same(values(trainer), values(whole_run[0]))
    assert (trainer.best, trainer.base_validation) == (whole_run[0].best, whole_run[0].base_validation)
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("done", [1, 2, 4], ids=["before step 1", "before a checkpoint", "after a checkpoint"])
def test_training_that_was_cut_off_ends_as_if_it_had_not_been_and_logs_each_step_once(tiny, tmp_path, whole_run, done):
    list(islice(Trainer(tiny, EvenLength(), SETTINGS, tmp_path, "even").run(), done))
    trainer = Trainer(tiny, EvenLength(), SETTINGS, tmp_path, "even")
    list(trainer.run())
    assert_same(values(trainer), values(whole_run[0]))
    assert logged_steps(tmp_path) == [0, 1, 2, 3, 4]


def test_training_that_is_finished_does_nothing_more(tiny, whole_run):
    trainer = Trainer(tiny, EvenLength(), SETTINGS, whole_run[0].out, "even")
    assert list(trainer.run()) == []
    assert_same(values(trainer), values(whole_run[0]))


@pytest.mark.parametrize(
    ("task", "change"),
    [(EvenLength(), {"learning_rate": 0.1}), (EvenLength(), {"seed": 5}), (Never(), {})],
    ids=["learning rate", "seed", "task"],
)
def test_folder_of_a_training_with_other_settings_is_refused(tiny, whole_run, task, change):
    with pytest.raises(ValueError, match="holds a training with other settings"):
        Trainer(tiny, task, replace(SETTINGS, **change), whole_run[0].out, "even")


def test_folder_of_a_training_of_other_layers_is_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))

    def model(*names: str):
        return load_model(str(tiny_folder), "fp32", layers=lambda path: path.endswith(names))

    settings = replace(SETTINGS, steps=1)
    list(Trainer(model("q_proj"), EvenLength(), settings, tmp_path / "run", "even").run())
    with pytest.raises(ValueError, match="holds a training with other settings"):
        Trainer(model("k_proj"), EvenLength(), settings, tmp_path / "run", "even")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage": "best"}, "there is no advantage 'best'; choose one of group, plain"),
        ({"samples": 1}, "a group advantage needs at least 2 samples"),
        ({"samples": 0, "advantage": "plain"}, "samples is 0; at least 1"),
        ({"steps": -1}, "steps is -1; 0 or more"),
        ({"steps": 0, "warm_start_steps": 0}, "without any step"),
        ({"warm_start_steps": -1}, "warm_start_steps is -1; 0 or more"),
        ({"decay_steps": -1}, "decay_steps is -1; 0 or more"),
        ({"prompts": 0}, "prompts is 0; at least 1"),
        ({"validate_every": 0}, "validate_every is 0; at least 1"),
        ({"validation_limit": 0}, "validation_limit is 0; at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**settings)


def test_one_sample_a_prompt_is_enough_for_the_plain_advantage():
    assert TrainingSettings(samples=1, advantage="plain").samples == 1


def test_parts_of_an_update_hold_every_row_once_and_waste_and_hold_little():
    lengths = [40, 30, 41, 3000, 5000, 60, 31, 2000, 2000, 2000]
    parts = list(parts_by_length(range(len(lengths)), lengths))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        longest, shortest = max(lengths[row] for row in part), min(lengths[row] for row in part)
        assert longest <= _PART_RATIO * shortest
        assert len(part) == 1 or len(part) * longest <= _PART_TOKENS
    assert len(parts) == 6
    assert list(parts_by_length([], lengths)) == []


def test_update_does_not_depend_on_how_it_is_cut_into_parts(tiny, tmp_path, monkeypatch):
    settings = replace(SETTINGS, warm_start_steps=1, steps=1, prompts=8, advantage="plain")
    runs = []
    for tokens in (1, 100_000):
        monkeypatch.setattr("t2app.decoding.likelihood._PART_TOKENS", tokens)
        monkeypatch.setattr("t2app.decoding.likelihood._PART_RATIO", tokens)
        trainer = Trainer(tiny, EvenLength(), settings, tmp_path / str(tokens), "even")
        list(trainer.run())
        runs.append(values(trainer))
    for path, value in runs[0].items():
        torch.testing.assert_close(runs[1][path], value, rtol=1e-3, atol=1e-4)


def test_finished_expert_tells_the_steps_that_were_made_and_not_those_once_asked_for(tiny, tmp_path):
    settings = replace(SETTINGS, warm_start_steps=2, steps=4)
    list(islice(Trainer(tiny, EvenLength(), settings, tmp_path, "even").run(), 3))
    trainer = Trainer(tiny, EvenLength(), replace(settings, steps=0), tmp_path, "even")
    assert list(trainer.run()) == []
    trainer.add_test([], "python -m t2app train")
    training = load_expert(trainer.file, tiny.identity).training
    assert (training["warm_start_steps"], training["steps"]) == (2, 0)
