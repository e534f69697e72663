"""Searching a mixture: the method on functions whose best point is known, the scores, and what is found and kept."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from t2app.bench.search import ComposedModel
from t2app.decoding import answer_log_probabilities, collected, decode
from t2app.dispatch import FewShotDispatch, make_dispatcher
from t2app.engine import Engine
from t2app.experts import Expert, mix
from t2app.found_mixtures import (
    MixtureError,
    check_name,
    kept_mixtures,
    mixture_file,
    read_mixture,
    write_mixture,
)
from t2app.messages import EXACT, LIKELIHOOD, SCORES, Reevaluated, Sampling, Searched, SearchSettings, as_json
from t2app.models.model import Model, load_model
from t2app.search import CrossEntropy, MixtureSearch, by_neighbourhood, scorer
from t2app.search.cross_entropy import apart, smoothed
from t2app.search.scores import Score, answers_and_likelihoods, log_likelihoods, right_answers
from t2app.search.search import chosen, finalists
from t2app.tasks import Example
from t2app.tasks.registry import task_named
from t2app.tasks.shots import Shots, pick_shots

PAIRS = [("Say one.", "one"), ("Say two, and then three, please.", "two three"), ("Four?", "4"), ("Five", "it is five")]
SHOTS = Shots("counting", PAIRS)


@pytest.fixture(scope="module")
def model(tiny) -> Model:
    """A small random model with two experts that change it visibly."""
    draw = torch.Generator().manual_seed(0)
    experts = tuple(
        Expert(
            name,
            name,
            f"what {name} is for",
            tiny.identity,
            {path: 1 + 0.5 * torch.randn(rank, generator=draw) for path, rank in tiny.identity.ranks.items()},
        )
        for name in ("one", "two")
    )
    return replace(tiny, experts=experts)


@pytest.fixture(scope="module")
def mixtures(model) -> list:
    return [mix(model.experts, weights) for weights in ({}, {"one": 1.0}, {"one": 0.3, "two": 0.6})]


class EvenAnswers(Shots):
    """An answer of an even number of characters is right, which a random model gives now and then."""

    def is_right(self, example: Example, answer: str) -> bool:
        return len(answer) % 2 == 0


EVEN = EvenAnswers("even", PAIRS)


def run(model: Model, **settings) -> MixtureSearch:
    search = MixtureSearch(model, EVEN, EVEN.examples("train"), SearchSettings(**{"population": 8} | settings))
    for _ in search.run():
        pass
    return search


def test_method_finds_the_best_point_of_a_function_that_has_one():
    method = CrossEntropy(3, population=32, elite_fraction=0.2, seed=0)
    target, scores = np.array([0.25, 0.9, 0.0]), {}
    while not method.settled:
        scores |= {point: -float(np.square(point - target).sum()) for point in method.ask()}
        best = method.tell(scores)
    assert np.abs(np.array(best) - target).max() <= 0.05
    assert len(scores) < 32 * 30


def test_population_begins_with_the_starts_and_stays_in_the_cube_on_a_grid():
    method = CrossEntropy(2, population=16, elite_fraction=0.2, seed=3, starts=[(0.0, 0.0), (1.0, 0.0)])
    assert method.ask()[:2] == [(0.0, 0.0), (1.0, 0.0)]
    for _ in range(4):
        population = method.ask()
        assert len(population) == 16
        assert all(0 <= value <= 1 and round(value, 2) == value for point in population for value in point)
        method.tell({point: point[0] for point in population} | dict.fromkeys([(1.0, 0.0)], 1.0))


def test_best_point_is_kept_however_bad_what_follows_is():
    method = CrossEntropy(2, population=8, elite_fraction=0.25, seed=0, starts=[(1.0, 1.0)])
    scores = dict.fromkeys(method.ask(), 0.0) | {(1.0, 1.0): 1.0}
    for _ in range(3):
        assert method.tell(scores) == (1.0, 1.0)
        scores |= {point: -1.0 for point in method.ask() if point not in scores}


def test_smoothed_score_of_a_point_is_a_mean_in_which_its_neighbours_count_most():
    scores = {(0.0, 0.0): 5.0, (0.3, 0.4): 1.0, (1.0, 1.0): 9.0}
    # Mean square distances from the first point: 0.125 and 1.
    weights = np.exp(-np.array([0, 0.125, 1]) / (2 * 0.5**2))
    assert smoothed(scores, 0.5)[0.0, 0.0] == pytest.approx((weights @ [5, 1, 9]) / weights.sum())
    assert smoothed(scores, 0.01) == pytest.approx(scores)
    assert smoothed(scores, 1e3) == pytest.approx(dict.fromkeys(scores, 5.0), rel=1e-4)


def test_points_apart_are_the_first_of_those_that_lie_together():
    points = [(0.0, 0.0), (0.1, 0.1), (0.5, 0.0), (0.5, 0.1), (1.0, 1.0)]
    assert apart(points, 0.15) == [(0.0, 0.0), (0.5, 0.0), (1.0, 1.0)]
    assert apart(points, 0.15, taken=[(0.9, 1.0)]) == [(0.0, 0.0), (0.5, 0.0)]
    assert apart(points, 0.0) == points


def test_candidate_that_is_lucky_among_bad_ones_is_not_the_first_by_its_neighbourhood():
    good = {
        (1.0, 0.0): Score(6, -2.0),
        (0.9, 0.1): Score(6, -1.0),
        (0.9, 0.0): Score(7, -3.0),
        (1.0, 0.1): Score(6, -2.5),
    }
    lucky = {(0.0, 1.0): Score(8, -0.5), (0.1, 0.9): Score(1, -0.5), (0.0, 0.8): Score(2, -0.5)}
    assert max(good | lucky, key=(good | lucky).__getitem__) in lucky
    assert by_neighbourhood(good | lucky)[0] in good


def test_likeliest_candidate_is_the_first_where_none_was_answered():
    scores = {(0.0, 0.0): Score(0, -3.0), (0.5, 0.5): Score(0, -1.0), (1.0, 0.0): Score(0, -2.0)}
    assert by_neighbourhood(scores)[0] == (0.5, 0.5)


def test_finalists_are_those_alone_however_bad_and_the_best_others_that_are_not_like_them():
    alone = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    near, good, like_it, fair = (0.95, 0.05), (0.5, 0.5), (0.5, 0.6), (0.9, 0.9)
    scores = dict.fromkeys(alone, Score(0, -2.0)) | {
        near: Score(9, -1.0),
        good: Score(9, -1.0),
        like_it: Score(8, -1.0),
        fair: Score(5, -1.0),
    }
    assert finalists(scores, alone) == [*alone, good, fair]


@pytest.mark.parametrize("name", ["model", "real"])
def test_likelihood_is_the_mean_over_the_examples_each_scored_alone(request, name):
    model = request.getfixturevalue(name)
    mixture = mix(model.experts, {model.experts[0].name: 0.7})
    shots = SHOTS.examples("train")
    alone = []
    with torch.inference_mode():
        for shot in shots:
            solution = model.tokenizer(shot.solution, add_special_tokens=False)["input_ids"] + [model.eos_ids[0]]
            logs, mask = answer_log_probabilities(
                model.adapted, [model.prompt_ids(shot.prompt)], [[solution]], [mixture]
            )
            assert mask.all()
            alone.append(logs.mean().item())
    base, mixed = log_likelihoods(model, shots, [None, mixture])
    assert mixed == pytest.approx(sum(alone) / len(alone), rel=1e-3)
    assert base != pytest.approx(mixed, rel=1e-3)


def test_weights_composed_and_written_score_as_the_edits_do_and_are_taken_back(model, mixtures):
    shots = SHOTS.examples("train")
    ours = log_likelihoods(model, shots, mixtures)
    assert ComposedModel(model).log_likelihoods(shots, mixtures) == pytest.approx(ours, rel=1e-3)
    assert log_likelihoods(model, shots, mixtures) == ours
    assert len({round(value, 3) for value in ours}) == 3


def test_exact_score_counts_right_answers_first_and_breaks_ties_by_likelihood(model, mixtures):
    shots = SHOTS.examples("train")
    answered = [Example(shot.prompt, "", shot.solution) for shot in shots]

    class Task(Shots):
        def is_right(self, example: Example, answer: str) -> bool:
            return example.prompt != "Four?"

    by_likelihood = scorer(LIKELIHOOD, model, SHOTS, shots)(mixtures).scores
    by_answers = scorer(EXACT, model, Task("counting", PAIRS), answered)(mixtures).scores
    assert [score.right for score in by_answers] == [3, 3, 3]
    assert [score.right for score in by_likelihood] == [0, 0, 0]
    best = max(score.log_likelihood for score in by_likelihood)
    assert max(by_answers).log_likelihood == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("name", ["model", "real"])
def test_answers_and_likelihoods_of_prompts_run_once_are_those_of_each_alone(request, name, monkeypatch):
    model = request.getfixturevalue(name)
    shots = EVEN.examples("train")
    monkeypatch.setattr(EVEN, "max_new_tokens", 8)
    mixtures = [None, *(mix(model.experts, {expert.name: 0.7}) for expert in model.experts)]
    sampling = Sampling(max_new_tokens=EVEN.max_new_tokens)
    right = [
        EVEN.is_right(shot, model.tokenizer.decode(ids, skip_special_tokens=True))
        for mixture in mixtures
        for shot in shots
        for ids in collected(decode(model.adapted, [model.prompt_ids(shot.prompt)], [mixture], sampling, model.eos_ids))
    ]
    likelihoods = log_likelihoods(model, shots, mixtures)
    for tokens in (16384, 600):  # in one batch, and in some that split a mixture's rows
        monkeypatch.setattr("t2app.search.scores._BATCH_TOKENS", tokens)
        found = answers_and_likelihoods(model, EVEN, shots, mixtures)
        assert found.right.flatten().tolist() == right
        assert [score.right for score in found.scores] == found.right.sum(1).tolist()
        assert [score.log_likelihood for score in found.scores] == pytest.approx(likelihoods, rel=1e-4)
    assert 0 < found.right.sum() < found.right.size


def test_finalist_that_is_kept_is_the_best_alone_or_one_that_is_better_beyond_doubt():
    base, expert, mixed, other = (0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.5, 0.0)
    scores = dict.fromkeys((base, expert, mixed, other), Score(5, -1.0))
    right = {base: np.array([2, 0, 1, 0]), expert: np.array([3, 1, 2, 2])}
    assert chosen(right, scores, [base, expert]) == expert
    # Better in all by one example, though worse on others; then by one answer to three examples of four, for which the
    # chance of as much is one in thirty-five; then by one to each.
    assert chosen(right | {mixed: np.array([6, 0, 2, 1])}, scores, [base, expert]) == expert
    assert chosen(right | {mixed: np.array([4, 1, 3, 3])}, scores, [base, expert]) == expert
    assert chosen(right | {mixed: np.array([4, 2, 3, 3])}, scores, [base, expert]) == mixed
    # The best of those, and not the surest.
    ahead = {mixed: np.array([4, 2, 3, 3]), other: np.array([5, 4, 4, 4])}
    assert chosen(right | ahead, scores, [base, expert]) == other
    assert chosen({base: np.array([2]), expert: np.array([3]), mixed: np.array([8])}, scores, [base, expert]) == expert


def test_best_alone_of_as_many_right_answers_is_the_one_with_the_better_score():
    base, expert = (0.0,), (1.0,)
    right = {base: np.array([1, 1]), expert: np.array([2, 0])}
    assert chosen(right, {base: Score(1, -2.0), expert: Score(1, -1.0)}, [base, expert]) == expert
    assert chosen(right, {base: Score(2, -2.0), expert: Score(1, -1.0)}, [base, expert]) == base


def test_sampled_answers_are_counted_as_when_each_is_given_alone(model, mixtures, monkeypatch):
    shots = EVEN.examples("train")
    sampling = Sampling(max_new_tokens=EVEN.max_new_tokens, temperature=1.5)
    alone = []
    for mixture in mixtures:
        for i, shot in enumerate(shots):
            right = 0
            for sample in range(3):
                steps = decode(
                    model.adapted,
                    [model.prompt_ids(shot.prompt)],
                    [mixture],
                    sampling,
                    model.eos_ids,
                    seeds=[3 * i + sample],
                )
                [ids] = collected(steps)
                right += EVEN.is_right(shot, model.tokenizer.decode(ids, skip_special_tokens=True))
            alone.append(right)
    assert right_answers(model, EVEN, shots, mixtures, 3, 1.5).flatten().tolist() == alone
    # In more and smaller batches too, which split a mixture's rows.
    monkeypatch.setattr("t2app.search.scores._BATCH_TOKENS", 600)
    assert right_answers(model, EVEN, shots, mixtures, 3, 1.5).flatten().tolist() == alone
    assert len(set(alone)) > 1


def test_search_by_answers_ends_with_its_best_tried_again_and_keeps_the_best_of_them(model):
    search = MixtureSearch(model, EVEN, EVEN.examples("train"), SearchSettings(population=8, rounds=2))
    *rounds, last = search.run()
    assert [type(event) for event in rounds] == [Searched] * 2 and isinstance(last, Reevaluated)
    assert as_json(last)["event"] == "reevaluated"
    found = search.found("x")
    assert found.weights == last.best and found.reevaluated == last and found.trace == tuple(rounds)
    points = finalists(search.scores, [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
    sampled = last.answers // len(EVEN.examples("train")) - 1
    assert last.finalists == len(points) and sampled > 1
    asked = model, EVEN, EVEN.examples("train"), [mix(model.experts, search.weights(point)) for point in points]
    again = answers_and_likelihoods(*asked).right + right_answers(*asked, sampled, temperature=0.5)
    right = dict(zip(points, again, strict=True))
    assert search.best == chosen(right, search.scores, points[:3]) and last.right == right[search.best].sum()
    assert last.alone == dict(zip(("base", "one", "two"), again.sum(1).tolist(), strict=False))
    assert last.right >= max(last.alone.values())


def test_search_by_likelihood_decodes_nothing_and_tries_nothing_again(model, monkeypatch):
    for name in ("decode", "decode_prefilled"):
        monkeypatch.setattr(f"t2app.search.scores.{name}", None)
    assert run(model, score=LIKELIHOOD, rounds=1).found("x").reevaluated is None


def test_search_finds_nothing_worse_than_the_base_model_and_each_expert_alone(model):
    found = run(model, score=LIKELIHOOD, rounds=3).found("x")
    shots = SHOTS.examples("train")
    rivals = log_likelihoods(model, shots, [None, *(mix(model.experts, {e.name: 1.0}) for e in model.experts)])
    [best] = log_likelihoods(model, shots, [mix(model.experts, found.weights)])
    assert best >= max(rivals) and best == pytest.approx(found.trace[-1].log_likelihood, rel=1e-4)


def test_rounds_of_one_seed_are_the_same_and_the_best_never_gets_worse(model):
    first, again, other = (run(model, score=LIKELIHOOD, rounds=4, seed=seed).found("x").trace for seed in (1, 1, 2))
    assert [replace(row, seconds=0) for row in first] == [replace(row, seconds=0) for row in again]
    assert [row.mean for row in first] != [row.mean for row in other]
    scores = [row.log_likelihood for row in first]
    assert scores == sorted(scores)


def test_candidate_that_is_known_is_not_evaluated_again(model, monkeypatch):
    evaluated = []

    def counted(model, shots, mixtures):
        evaluated.extend(mixtures)
        return log_likelihoods(model, shots, mixtures)

    monkeypatch.setattr("t2app.search.scores.log_likelihoods", counted)
    trace = run(model, score=LIKELIHOOD, rounds=40, population=16, elite_fraction=0.5).found("x").trace
    # Rounds near the end draw points that were drawn before, and when nothing else is left the search ends.
    assert len(evaluated) == trace[-1].evaluations < 16 * len(trace) - 5
    assert len(trace) < 40


def test_search_that_is_stopped_has_the_best_so_far_and_none_before_its_first_round(model):
    search = MixtureSearch(model, SHOTS, SHOTS.examples("train"), SearchSettings(population=4, score=LIKELIHOOD))
    with pytest.raises(ValueError, match="nothing was found yet"):
        search.found("x")
    events = search.run()
    first = next(events)
    events.close()
    assert search.found("x").trace == (first,)


def test_search_that_is_asked_to_stop_tries_its_best_again_and_ends(model):
    search = MixtureSearch(model, EVEN, EVEN.examples("train"), SearchSettings(population=4))
    events = search.run()
    first = next(events)
    search.stop()
    [last] = events
    assert isinstance(last, Reevaluated) and search.found("x").trace == (first,)


def test_search_that_is_interrupted_keeps_the_best_so_far_as_it_is(model):
    search = MixtureSearch(model, EVEN, EVEN.examples("train"), SearchSettings(population=4))
    events = search.run()
    first = next(events)
    events.close()
    found = search.found("x")
    assert found.weights == first.best and found.reevaluated is None


def test_search_by_layer_finds_a_weight_for_each_expert_and_block(model):
    found = run(model, score=LIKELIHOOD, rounds=2, per_layer=True).found("x")
    assert {name: len(alphas) for name, alphas in found.weights.items()} == {"one": 2, "two": 2}
    assert mix(model.experts, found.weights) is not None
    assert found.trace[-1].best["one"] == pytest.approx(sum(found.weights["one"]) / 2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"population": 1}, "population is 1; at least 2"),
        ({"seed": -1}, "the seed is -1; a whole number from 0 on"),
        ({"population": 2}, "so more was expected"),
        ({"elite_fraction": 0}, "elite_fraction is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"score": "taste"}, "there is no score 'taste'; choose one of exact, likelihood"),
    ],
)
def test_search_that_makes_no_sense_is_refused(model, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(model, **settings)


def test_search_without_experts_or_examples_is_refused(model):
    with pytest.raises(ValueError, match="has no experts to mix"):
        run(replace(model, experts=()))
    with pytest.raises(ValueError, match="at least one solved example"):
        MixtureSearch(model, SHOTS, [], SearchSettings())


@pytest.mark.parametrize("score", SCORES)
def test_kept_mixture_is_read_back_and_decides_every_prompt(model, tmp_path, score):
    found = run(model, score=score, rounds=2, seed=5).found("mine")
    file = mixture_file(model.name, "mine", tmp_path)
    write_mixture(found, file)
    assert read_mixture(file) == found
    assert kept_mixtures(model.name, tmp_path) == ["mine"]
    dispatch = FewShotDispatch(model, read_mixture(file))
    assert dispatch.name == "few-shot:mine"
    assert dispatch.decide("anything").weights == found.weights
    assert "found on 4 examples of even" in dispatch.decide("anything").note


def test_kept_mixture_of_other_weights_or_other_experts_is_refused(model):
    found = run(model, score=LIKELIHOOD, rounds=1).found("mine")
    with pytest.raises(MixtureError, match=r"found on other weights .* search anew"):
        FewShotDispatch(model, replace(found, fingerprint="0" * 64))
    trained_anew = tuple(replace(e, z={path: z + 0.1 for path, z in e.z.items()}) for e in model.experts)
    with pytest.raises(MixtureError, match=r"expert 'one' \(.*\), which is another one now"):
        FewShotDispatch(replace(model, experts=trained_anew), found)
    with pytest.raises(MixtureError, match=r"expert 'two' \(.*\), which is not there"):
        FewShotDispatch(replace(model, experts=model.experts[:1]), found)


def test_expert_that_came_after_the_search_takes_no_part(model):
    found = run(model, score=LIKELIHOOD, rounds=1).found("mine")
    third = replace(model.experts[0], name="three", label="three")
    weights = FewShotDispatch(replace(model, experts=(*model.experts, third)), found).decide("x").weights
    assert weights == {**found.weights, "three": 0.0}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as a kept mixture"),
        ("[]", "cannot be read as a kept mixture"),
        (json.dumps({"format_version": 7}), "has mixture format 7; this program reads format 2"),
        (json.dumps({"format_version": 2, "trace": [], "reevaluated": None}), "cannot be read as a kept mixture"),
    ],
)
def test_file_that_is_no_kept_mixture_is_refused(tmp_path, text, sentence):
    file = tmp_path / "broken.json"
    file.write_text(text)
    with pytest.raises(MixtureError, match=sentence):
        read_mixture(file)


def test_mixture_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(MixtureError, match="there is no mixture 'mine'; kept for this model: other"):
        read_mixture(tmp_path / "mine.json")


@pytest.mark.parametrize("name", ["", "../x", "a b", "a/b", "x" * 61])
def test_name_that_cannot_be_a_files_is_refused(name):
    with pytest.raises(MixtureError, match="is no name for a mixture"):
        check_name(name)


def test_real_search_is_at_least_as_good_as_the_best_expert_and_answers_by_it(tmp_path):
    model = load_model(many_rows=True)
    task = task_named("chain-sum")
    shots = pick_shots(task, 4, seed=0)
    settings = SearchSettings(population=6, rounds=1, score=LIKELIHOOD)
    search = MixtureSearch(model, task, shots, settings)
    engine = Engine(model)
    [event] = engine.search(search)
    assert as_json(event)["event"] == "searched" and event.evaluations == 6
    rivals = log_likelihoods(model, shots, [None, *(mix(model.experts, {e.name: 1.0}) for e in model.experts)])
    # In bf16 a batch of other rows moves it by some hundredths of a nat.
    assert event.log_likelihood >= max(rivals) - 0.05
    dispatch = FewShotDispatch(model, search.found("sums"))
    dispatched, *_ = engine.answer("What is 2 plus 3?", dispatch, Sampling(max_new_tokens=4))
    assert dispatched.weights == pytest.approx(event.best) and dispatched.changes
    assert dispatched.trace == (event,) and "trace" not in as_json(dispatched)


def test_real_search_by_answers_keeps_the_expert_for_sums_or_better_on_sums():
    model = load_model(many_rows=True)
    task = task_named("chain-sum")
    search = MixtureSearch(model, task, pick_shots(task, 4, seed=0), SearchSettings(population=6, rounds=1))
    _, again = Engine(model).search(search)
    assert list(again.alone) == ["base", *(expert.name for expert in model.experts)]
    assert again.right >= again.alone["math"] == max(again.alone.values())


def test_shots_are_drawn_from_what_is_there_to_train_on():
    task = task_named("needle")
    shots = pick_shots(task, 10, seed=1)
    assert len(shots) == 10 and shots == pick_shots(task, 10, seed=1) != pick_shots(task, 10, seed=2)
    assert {shot.prompt for shot in shots} <= {example.prompt for example in task.examples("train")}


def test_dispatch_by_a_mixture_that_is_not_kept_is_refused(model):
    with pytest.raises(MixtureError, match="there is no mixture 'nothing-of-this-name'"):
        make_dispatcher("few-shot:nothing-of-this-name", model)
