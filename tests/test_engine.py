"""The two passes on the real model as the app runs it: dispatch, events, stopping, and prompts that are refused."""

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from t2app.categories import CLASSIFIER, LABELS, OTHER, OTHER_DESCRIPTION
from t2app.cli.output import accuracy_tables
from t2app.decoding import prefix
from t2app.dispatch import PromptDispatch, make_dispatcher
from t2app.dispatch.wordings import CALIBRATIONS
from t2app.engine import Engine, PromptError
from t2app.evaluation import confusion_table, evaluate_dispatch
from t2app.experts import Expert, ExpertError, mix
from t2app.kernels.build import has_bfloat16_arithmetic, has_tiles
from t2app.kernels.linear import runs_by_kernels
from t2app.messages import DISPATCHERS, MANUAL, PROMPT, PROMPT_SOFT, Dispatched, Finished, Sampling, Token, as_json
from t2app.models.model import Model, load_model
from t2app.parts import next_part, whole
from t2app.tasks.dispatch import labelled_prompts

SHORT = Sampling(max_new_tokens=12)
SUM = "Compute 12 + 7. Reply with only the number."


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(load_model())


def answer(engine: Engine, weights: dict[str, float], prompt: str = SUM, sampling: Sampling = SHORT) -> list:
    return list(engine.answer(prompt, engine.dispatcher(MANUAL, weights), sampling))


def test_events_come_in_order_and_add_up(engine):
    events = answer(engine, {"math": 1.0})
    first, *tokens, last = events
    assert isinstance(first, Dispatched) and isinstance(last, Finished)
    assert all(isinstance(event, Token) for event in tokens)
    for stream in ("base", "adapted"):
        pieces = [event for event in tokens if event.stream == stream]
        assert "".join(piece.text for piece in pieces) == getattr(last, stream)
        assert [piece.tokens for piece in pieces] == sorted(piece.tokens for piece in pieces)
    assert last.tokens_per_second == pytest.approx(last.tokens / last.seconds)
    assert any(token.paired for token in tokens)
    for token, next_one in pairwise(tokens):
        together = token.stream != next_one.stream and token.seconds == next_one.seconds
        assert token.paired == together, "a page would show one of the two a step later"


def test_with_all_weights_at_zero_both_answers_are_the_base_models(engine):
    last = answer(engine, {"math": 0.0}, sampling=Sampling(max_new_tokens=24, temperature=0.9, seed=3))[-1]
    assert last.adapted == last.base


def test_expert_changes_the_answer_and_leaves_the_base_alone(engine):
    prompt = "What is 17 minus 9? Answer with just the number."
    with_expert, without = answer(engine, {"math": 1.0}, prompt)[-1], answer(engine, {"math": 0.0}, prompt)[-1]
    assert with_expert.base == without.base
    assert with_expert.adapted != without.adapted


def test_closing_the_stream_stops_the_compute_and_frees_the_engine(engine):
    stream = engine.answer(SUM, engine.dispatcher(MANUAL, {"math": 1.0}), Sampling(max_new_tokens=500))
    for _ in range(3):
        next(stream)
    passes = []
    hook = engine.model.adapted.model.register_forward_hook(lambda *_: passes.append(1))
    stream.close()
    assert isinstance(answer(engine, {}, sampling=Sampling(max_new_tokens=2))[-1], Finished)
    hook.remove()
    # The step that was running, and what the second answer takes: nothing of the 500 tokens.
    assert len(passes) < 8


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_empty_prompt_is_refused_with_a_sentence(engine, prompt):
    with pytest.raises(PromptError, match="Type a prompt first"):
        answer(engine, {}, prompt)


def test_prompt_over_the_models_limit_is_refused_with_both_numbers(engine):
    with pytest.raises(PromptError, match=r"tokens long; with 12 tokens for the answer, .* takes at most 8,180"):
        answer(engine, {}, "word " * 9000)


def test_weight_for_an_unknown_expert_is_refused(engine):
    with pytest.raises(ExpertError, match="there is no expert 'cooking'; this model has: .*math"):
        engine.dispatcher(MANUAL, {"cooking": 1.0})


@pytest.mark.parametrize(
    ("name", "weights", "sentence"),
    [
        (
            "psychic",
            None,
            "there is no dispatch 'psychic'; choose one of classifier, prompt, prompt-soft, manual, few-shot:NAME",
        ),
        (MANUAL, None, "needs weights, for instance math=0.7"),
        (PROMPT, {"math": 1.0}, "the prompt dispatch decides them itself"),
    ],
)
def test_dispatch_that_cannot_be_made_is_refused_with_a_sentence(engine, name, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        engine.dispatcher(name, weights)


def test_every_dispatch_of_the_menu_can_be_had_by_its_name(engine):
    for name in DISPATCHERS:
        assert make_dispatcher(name, engine.model, {} if name == MANUAL else None).name == name


def test_json_of_an_event_holds_its_name_and_no_probabilities_that_are_not_there(engine):
    first, *_, last = [as_json(event) for event in answer(engine, {"math": 0.5})]
    weights = {expert.name: 0.0 for expert in engine.model.experts} | {"math": 0.5}
    assert first == {"event": "dispatched", "label": None, "weights": weights, "seconds": first["seconds"]}
    assert set(last) == {"event", "base", "adapted", "tokens", "seconds", "tokens_per_second"}


def test_prompt_dispatch_gives_probabilities_over_all_labels_and_the_named_experts_weight(engine):
    decision = engine.dispatcher(PROMPT).decide(SUM)
    assert set(decision.probabilities) == {*(expert.label for expert in engine.model.experts), OTHER}
    assert sum(decision.probabilities.values()) == pytest.approx(1)
    assert decision.label == max(decision.probabilities, key=decision.probabilities.get)
    assert decision.weights["math"] == float(decision.label == "math")


def test_prompt_dispatch_names_most_prompts_rightly(engine):
    dispatcher, prompts = engine.dispatcher(PROMPT), labelled_prompts("train")
    some = [row for label in LABELS for row in [row for row in prompts if row[1] == label][:6]]
    right = sum(dispatcher.decide(prompt).label == label for prompt, label in some)
    # One label in four is what chance gives.
    assert right / len(some) > 0.6


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("A baker sells 12 rolls at 40 cents each and 3 loaves at $2.50. How much does she take in?", "math"),
        ("Write a function that removes every third element of a list.", "code"),
        ("Tim left before Sue, and Sue left before Ron. Who left last?", "reasoning"),
        ("Which of these do plants need to grow? A. sunlight B. plastic C. iron D. noise", "reasoning"),
        ("Tell me about the history of tea.", OTHER),
    ],
)
def test_classification_expert_names_the_category_where_it_was_not_trained_on_the_prompt(engine, prompt, label):
    decision = engine.dispatcher(CLASSIFIER).decide(prompt)
    assert set(decision.probabilities) == set(LABELS) and sum(decision.probabilities.values()) == pytest.approx(1)
    assert decision.label == label and decision.note is None
    named = {expert.name for expert in engine.model.experts if expert.label == label}
    assert {name for name, weight in decision.weights.items() if weight} == named


@pytest.fixture
def merging() -> Model:
    """The model, not loaded for anybody else, on a CPU: elsewhere nothing is merged."""
    model = load_model()
    if torch.cuda.is_available():
        pytest.skip("on a GPU nothing is merged")
    return model


def test_merged_classification_expert_decides_as_it_did_and_others_are_left_alone(merging):
    model, adapted, dispatch = merging, merging.adapted, make_dispatcher(CLASSIFIER, merging)
    prompts = [prompt for prompt, _ in labelled_prompts("validation")[::5]]
    ids = torch.tensor([model.prompt_ids(SUM)] * 2)
    others = [None, mix(model.experts, {"math": 1.0})]

    def logits() -> torch.Tensor:
        with torch.inference_mode(), adapted.rows(others):
            return adapted.model(ids).logits

    before, as_they_were = [dispatch.decide(prompt) for prompt in prompts], logits()
    whole(dispatch.speeding_up())
    assert all(layer.merged is not None for layer in adapted.layers.values())
    assert torch.equal(logits(), as_they_were)
    after = [dispatch.decide(prompt) for prompt in prompts]
    for was, became in zip(before, after, strict=True):
        assert became.label == was.label
        assert became.probabilities == pytest.approx(was.probabilities, abs=0.05)
    assert before != after, "the merged weights were not used"


def test_classification_expert_is_merged_once_it_was_asked_and_nobody_asks_for_more(merging):
    engine, layers = Engine(merging), merging.adapted.layers.values()
    assert isinstance(list(engine.answer(SUM, engine.dispatcher(CLASSIFIER), SHORT))[-1], Finished)
    deadline = time.monotonic() + 120
    while any(layer.merged is None for layer in layers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(layer.merged is not None for layer in layers)


def test_memory_that_is_short_is_not_spent_on_a_merged_expert(merging, monkeypatch):
    available = merging.adapted.merged_bytes(mix([merging.classifier], {CLASSIFIER: 1.0})) * 9
    monkeypatch.setattr("t2app.machine.psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    whole(make_dispatcher(CLASSIFIER, merging).speeding_up())
    assert all(layer.merged is None for layer in merging.adapted.layers.values())


def test_matrices_of_each_expert_are_made_while_nobody_asks(merging):
    engine, adapted = Engine(merging), merging.adapted
    engine.dispatcher(CLASSIFIER)
    deadline = time.monotonic() + 120
    while not all(map(adapted.has_matrices_of, engine.mixer.alone.values())) and time.monotonic() < deadline:
        time.sleep(0.05)
    decided = next(iter(engine.answer(SUM, engine.dispatcher(CLASSIFIER), SHORT))).weights
    assert any(engine.mixer.mixture(decided) is deltas for deltas in engine.mixer.alone.values())


def test_mixture_has_its_matrices_before_its_first_answer_which_is_then_given_again(merging):
    engine, weights = Engine(merging), {"math": 0.5, "code": 0.2, "reasoning": 0.0}
    mixture, experts = engine.mixer.mixture(weights), engine.mixer.alone
    events = engine.answer(SUM, engine.dispatcher(MANUAL, weights), Sampling(64))
    assert isinstance(next(events), Dispatched) and not merging.adapted.has_matrices_of(mixture)
    assert isinstance(next(events), Token) and merging.adapted.has_matrices_of(mixture)
    made = [merging.adapted.has_matrices_of(experts[name]) for name in ("math", "code", "reasoning")]
    assert made == [True, True, False]
    first = list(events)[-1].adapted
    assert first == answer(engine, weights, sampling=Sampling(64))[-1].adapted


def test_answer_does_not_wait_for_the_matrices_of_a_large_models_experts(merging, monkeypatch):
    monkeypatch.setattr("t2app.mixer._MOST_MULTIPLICATIONS", 10**9)
    engine = Engine(merging)
    answer(engine, {"math": 0.5})
    assert not any(map(merging.adapted.has_matrices_of, engine.mixer.alone.values()))


@pytest.mark.skipif(not has_bfloat16_arithmetic() or has_tiles(), reason="this CPU takes another kernel for many rows")
def test_answers_in_company_are_those_alone(merging):
    if not runs_by_kernels(merging.adapted.model):
        pytest.skip("torch's products round otherwise in company")
    engine = Engine(merging)
    prompts = [prompt for prompt, _ in labelled_prompts("train")[::80]][:5]

    def asked(prompt: str) -> Finished:
        return answer(engine, {"math": 1.0}, prompt, Sampling(64))[-1]

    alone = [asked(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        together = list(threads.map(asked, prompts))
    assert len({len(engine.model.prompt_ids(prompt)) for prompt in prompts}) > 2
    for own, in_company in zip(alone, together, strict=True):
        assert (own.base, own.adapted) == (in_company.base, in_company.adapted)


def test_classification_expert_is_no_part_of_the_mixture(engine):
    assert engine.model.classifier.label == CLASSIFIER
    assert CLASSIFIER not in engine.dispatcher(CLASSIFIER).decide(SUM).weights
    with pytest.raises(ExpertError, match="there is no expert 'classifier'"):
        engine.dispatcher(MANUAL, {CLASSIFIER: 1.0})


def test_without_a_classification_expert_the_base_model_is_asked_and_the_event_says_so(tiny):
    first = next(Engine(tiny).answer(SUM, make_dispatcher(CLASSIFIER, tiny), SHORT))
    asked = make_dispatcher(PROMPT, tiny).decide(SUM)
    assert (first.label, first.probabilities) == (asked.label, asked.probabilities)
    assert first.note == "tiny has no classification expert: the base model was asked instead."
    assert as_json(first)["note"] == first.note


def test_soft_dispatch_takes_the_probabilities_of_the_hard_one_as_weights(engine):
    hard, soft = engine.dispatcher(PROMPT).decide(SUM), engine.dispatcher(PROMPT_SOFT).decide(SUM)
    assert soft.probabilities == pytest.approx(hard.probabilities) and soft.label == hard.label
    by_label = {expert.name: soft.probabilities[expert.label] for expert in engine.model.experts}
    assert soft.weights == by_label and 0 < sum(by_label.values()) < 1
    assert sorted(hard.weights.values()) == [0.0] * (len(by_label) - 1) + [1.0]


def test_expert_of_ones_own_takes_part_by_its_label_and_description(tiny):
    z = {path: torch.ones(rank) for path, rank in tiny.identity.ranks.items()}
    experts = tuple(
        Expert(name, label, description, tiny.identity, z)
        for name, label, description in (("mine", "cooking", "recipes and meals"), ("maths", "math", "sums"))
    )
    decision = make_dispatcher(PROMPT, replace(tiny, experts=experts)).decide("How long must an egg boil?")
    assert set(decision.probabilities) == {"cooking", "math", OTHER}
    assert set(decision.weights) == {"mine", "maths"}


@pytest.mark.parametrize("name", [CLASSIFIER, PROMPT])
def test_long_prompt_is_decided_on_in_parts_as_it_is_without_a_break(real, monkeypatch, name):
    device = real.adapted.model.device.type
    monkeypatch.setitem(prefix._PART_TOKENS, device, 256)
    dispatcher, prompt, parts = make_dispatcher(name, real), " ".join([SUM] * 50), 1
    deciding = dispatcher.deciding(prompt)
    while not (done := next_part(deciding))[0]:
        parts += 1
    assert parts > 2
    monkeypatch.setitem(prefix._PART_TOKENS, device, 10_000)
    ended, expected = next_part(dispatcher.deciding(prompt))
    assert ended and done[1].probabilities == pytest.approx(expected.probabilities, abs=1e-4)


def test_labels_score_as_in_one_text_with_the_question(real):
    dispatcher = PromptDispatch(real, wordings=["list"], calibration="none")
    tokenizer = real.tokenizer
    categories = {expert.label: expert.description for expert in real.experts} | {OTHER: OTHER_DESCRIPTION}
    lines = "".join(f"- {label}: {description}\n" for label, description in categories.items())
    before = tokenizer(f"Categories:\n{lines}\nText: ")["input_ids"]
    asked = before + tokenizer(f"{SUM}\nCategory of the text:", add_special_tokens=False)["input_ids"]
    scores = []
    for label in categories:
        ids = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        whole = torch.tensor([asked + ids], device=real.adapted.model.device)
        with torch.inference_mode():
            logs = real.adapted.model(whole).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        scores.append(logs.gather(1, whole[0, len(asked) :, None]).sum())
    expected = dict(zip(categories, torch.stack(scores).softmax(0).tolist(), strict=True))
    assert dispatcher.decide(SUM).probabilities == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("calibration", [name for name, texts in CALIBRATIONS.items() if texts])
def test_calibration_makes_its_own_texts_even_over_the_labels(real, calibration):
    dispatcher = PromptDispatch(real, wordings=["examples"], calibration=calibration)
    logs = [[math.log(p) for p in dispatcher.decide(text).probabilities.values()] for text in CALIBRATIONS[calibration]]
    # A mean of log-probabilities is taken off: over the texts the labels' means are alike but for a constant a text.
    spread = torch.tensor(logs).mean(0)
    assert (spread - spread.mean()).abs().max() < 1e-3


def test_dispatch_accuracy_counts_what_was_named_by_the_right_category(engine):
    dispatcher = engine.dispatcher(CLASSIFIER)
    prompts = [(SUM, "math"), ("Write a function that doubles every number of a list.", "code"), (SUM, "code")]
    measured = evaluate_dispatch("dispatch", prompts, dispatcher)
    assert (measured.correct, measured.n, measured.mixture) == (2, 3, CLASSIFIER)
    assert measured.confusion == {"code": {"code": 1, "math": 1}, "math": {"math": 1}}
    assert "| code | 1 | 1 |" in confusion_table(measured)
    assert confusion_table(measured) in accuracy_tables([measured])
    with pytest.raises(ValueError, match="names no category"):
        evaluate_dispatch("dispatch", prompts, engine.dispatcher(MANUAL, {}))


def test_event_tells_where_the_model_is_changed_and_its_json_does_not(engine):
    first, *_ = answer(engine, {"math": 0.5})
    expert = next(expert for expert in engine.model.experts if expert.name == "math")
    assert first.changes == pytest.approx({path: 0.5 * (z - 1).abs().mean().item() for path, z in expert.z.items()})
    assert answer(engine, {})[0].changes == {}
    assert "changes" not in as_json(first)
