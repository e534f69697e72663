"""Decoding and scoring on the real embedded model in fp32, with transformers' own `generate` as the reference."""

import pytest
import torch
from random_mixtures import random_deltas
from scipy.stats import chisquare
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

from t2app.decoding import (
    TextStream,
    answer_log_probabilities,
    choice_log_probabilities,
    collected,
    compute_prefix,
    decode,
)
from t2app.decoding.sampling import nucleus
from t2app.messages import Sampling
from t2app.models.model import Model
from t2app.spectral import Deltas

QUESTIONS = (
    "Compute 12 + 7. Reply with only the number.",
    "Why is the sky blue?",
    "Write one short sentence about a cat, a dog and the sea in winter, please.",
)
GREEDY = Sampling(max_new_tokens=40)
SAMPLED = Sampling(max_new_tokens=24, temperature=0.8, top_p=0.9, seed=11)


@pytest.fixture(scope="module")
def prompts(real) -> list[list[int]]:
    return [real.prompt_ids(question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def mixtures(real) -> list[Deltas]:
    return [random_deltas(real.adapted, seed) for seed in range(2)]


@pytest.fixture(scope="module")
def greedy_alone(real, prompts) -> list[list[int]]:
    """The base model's greedy answer to each prompt, decoded by itself."""
    return [answers(real, [prompt], [None], GREEDY)[0] for prompt in prompts]


def answers(model: Model, prompts, mixtures, sampling: Sampling, **arguments) -> list[list[int]]:
    return collected(decode(model.adapted, prompts, mixtures, sampling, model.eos_ids, **arguments))


def generate(plain, prompt: list[int], **arguments) -> list[int]:
    output = plain.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **arguments)
    return output[0, len(prompt) :].tolist()


def test_greedy_base_row_is_what_generate_gives_token_for_token(plain, prompts, greedy_alone):
    assert greedy_alone == [generate(plain, prompt, max_new_tokens=40, do_sample=False) for prompt in prompts]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampled_tokens_follow_the_distribution_that_generate_draws_from(real, plain, prompts, top_p):
    draws = 1000
    generated = plain.generate(
        torch.tensor([prompts[2]]),
        max_new_tokens=1,
        do_sample=True,
        temperature=0.8,
        top_p=top_p,
        top_k=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = draws * generated.scores[0][0].double().softmax(-1)
    sampling = Sampling(max_new_tokens=1, temperature=0.8, top_p=top_p, seed=11)
    rows = collected(decode(real.adapted, [prompts[2]], [None], sampling, real.eos_ids, samples=draws))
    found = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(expected))
    assert not found[expected == 0].any()
    # The rarer tokens count together: the test needs some draws of each.
    order = expected.argsort(descending=True)
    common, rest = order[:8], order[8:]
    counts, means = ([*of[common].tolist(), of[rest].sum().item()] for of in (found, expected))
    assert min(means) > 5 and chisquare(counts, means).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_tokens_that_transformers_keeps(plain, prompts, temperature, top_p):
    ids = [torch.tensor([prompt], device=plain.device) for prompt in prompts[:2]]
    scores = torch.cat([plain(prompt).logits[0] for prompt in ids]).detach() / temperature
    kept, expected = nucleus(scores, top_p), TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(kept.isinf(), expected.isinf())
    assert torch.equal(kept, expected)


def test_rows_stop_on_their_own_at_their_end_of_turn(real, prompts):
    rows: dict[int, list[int]] = {0: [], 1: []}
    for step in decode(real.adapted, prompts[:2], [None, None], GREEDY, real.eos_ids):
        for row, token in step.items():
            rows[row].append(token)
    assert rows[0][-1] in real.eos_ids
    assert len(rows[0]) < len(rows[1])
    assert all(token not in real.eos_ids for row in rows.values() for token in row[:-1])


def test_no_more_tokens_come_than_were_asked_for(real, prompts):
    rows = answers(real, prompts[1:], [None, None], Sampling(max_new_tokens=3))
    assert [len(row) for row in rows] == [3, 3]


def test_prompts_of_different_lengths_give_what_they_give_alone(real, prompts, greedy_alone):
    assert len({len(prompt) for prompt in prompts}) == len(prompts)
    assert answers(real, prompts, [None] * 3, GREEDY) == greedy_alone


def test_rows_of_different_mixtures_give_what_they_give_alone(real, prompts, mixtures, greedy_alone):
    sampling = Sampling(max_new_tokens=16)
    together = answers(real, [prompts[1]] * 3, [mixtures[0], None, mixtures[1]], sampling)
    assert together[1] == greedy_alone[1][:16]
    for row, mixture in ((0, mixtures[0]), (2, mixtures[1])):
        assert together[row] == answers(real, [prompts[1]], [mixture], sampling)[0]
    assert len(set(map(tuple, together))) == 3


def test_sample_s_of_a_prompt_is_what_its_seed_plus_s_gives_alone(real, prompts, mixtures):
    sampling = Sampling(max_new_tokens=10, temperature=1.0)
    rows = answers(real, prompts[:2], [None, mixtures[0]], sampling, samples=3, seeds=[100, 200])
    assert len(rows) == 6
    for row, prompt, mixture, seed in ((2, 0, None, 102), (4, 1, mixtures[0], 201)):
        assert rows[row] == answers(real, [prompts[prompt]], [mixture], sampling, seeds=[seed])[0]
    assert len(set(map(tuple, rows[3:]))) == 3


def test_equal_seeds_and_mixtures_give_equal_rows_and_other_seeds_others(real, prompts, mixtures):
    sampling = Sampling(max_new_tokens=10, temperature=1.0)
    rows = answers(real, [prompts[1]] * 3, [mixtures[0]] * 3, sampling, seeds=[5, 5, 6])
    assert rows[0] == rows[1] != rows[2]


def test_no_product_copies_the_weights_for_every_row(real, prompts):
    with torch.profiler.profile(profile_memory=True) as profile:
        answers(real, prompts, [None] * 3, Sampling(max_new_tokens=2))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < real.adapted.model.lm_head.weight.nbytes


def test_between_steps_and_after_closing_the_model_is_the_plain_one(real, plain, prompts, mixtures):
    ids = torch.tensor([prompts[0]] * 4, device=plain.device)  # another number of rows than the stream's

    def assert_plain() -> None:
        assert torch.equal(real.adapted.model(ids).logits, expected)

    with torch.no_grad():
        expected = plain(ids).logits
        stream = decode(real.adapted, prompts[:2], mixtures, GREEDY, real.eos_ids)
        next(stream)
        assert_plain()
        next(stream)
        stream.close()
        assert list(stream) == []
        assert_plain()


def test_two_streams_read_in_turns_give_what_each_gives_alone(real, prompts, mixtures, greedy_alone):
    streams = [
        decode(real.adapted, [prompts[1]], [mixture], Sampling(max_new_tokens=8), real.eos_ids)
        for mixture in (None, mixtures[0])
    ]
    turns = [[step[0] for step in turn] for turn in zip(*streams, strict=True)]
    assert [base for base, _ in turns] == greedy_alone[1][:8]
    assert [base for base, _ in turns] != [adapted for _, adapted in turns]


def test_inference_mode_does_not_leak_to_the_reader_of_a_stream(real, prompts):
    stream = decode(real.adapted, prompts[:1], [None], GREEDY, real.eos_ids)
    for _ in range(2):
        next(stream)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    stream.close()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1; 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; more than 0"),
        ({"top_p": 1.1}, "top_p is 1.1; more than 0 and at most 1"),
        ({"seed": -1}, "the seed is -1; a whole number from 0 on"),
        ({"seed": 2**63}, "the seed is 9223372036854775808; .* below 2"),
    ],
)
def test_sampling_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("prompts", "mixtures", "message"),
    [
        ([], [], "at least one prompt"),
        ([[1], []], [None, None], "none that is empty"),
        ([[1], [2]], [None], "2 prompts came with 1 mixtures"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_refused(real, prompts, mixtures, message):
    with pytest.raises(ValueError, match=message):
        answers(real, prompts, mixtures, GREEDY)


@pytest.mark.parametrize(
    "text", ["Well 👩‍👩‍👧‍👦, done 🎉!", "你好，世界。学习奇异值", "naïve – “quoted” ✓ Ελληνικά\n\tend "]
)
def test_stream_of_text_shows_whole_characters_only_and_adds_up_to_the_text(real, text):
    tokens = real.tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(real.tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert "" in pieces  # some token ends within a character, or this tests nothing
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == real.tokenizer.decode(tokens) == text == stream.text


def test_stream_that_ends_within_a_character_adds_up_to_the_full_decode(real):
    tokens = real.tokenizer("ok 🎉", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(real.tokenizer)
    pieces = [stream.push(token) for token in tokens]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.finish() == real.tokenizer.decode(tokens)


def test_stream_of_text_leaves_out_the_end_of_turn(real):
    stream = TextStream(real.tokenizer)
    tokens = [*real.tokenizer("Hi", add_special_tokens=False)["input_ids"], *real.eos_ids]
    assert "".join(map(stream.push, tokens)) + stream.finish() == "Hi"


def one_by_one(adapted, prompt: list[int], answer: list[int], mixture: Deltas | None) -> Tensor:
    """Log-probabilities of an answer the plain way: prompt and answer in one pass, no cache and no padding."""
    with adapted.rows([mixture]):
        return log_probabilities(adapted.model, prompt, answer)


def log_probabilities(model, prompt: list[int], answer: list[int]) -> Tensor:
    ids = torch.tensor([prompt + answer], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


@pytest.mark.parametrize("lengths", [((3, 7), (1, 5)), ((1, 1), (1, 1))], ids=["many tokens", "one token"])
@pytest.mark.parametrize("name", ["real", "tiny"])
def test_answers_score_and_learn_as_the_plain_way_does(request, name, lengths):
    model = request.getfixturevalue(name)
    prompts = [model.prompt_ids(question) for question in QUESTIONS[:2]]
    generator = torch.Generator().manual_seed(0)
    groups = [
        [torch.randint(3, 49000, (length,), generator=generator).tolist() for length in group] for group in lengths
    ]
    deltas = {path: delta.requires_grad_() for path, delta in random_deltas(model.adapted, 3).items()}
    logs, mask = answer_log_probabilities(model.adapted, prompts, groups, [deltas] * len(prompts))
    assert mask.sum(1).tolist() == [length for group in lengths for length in group]
    # Every token weighs differently, as advantages make them.
    weights = torch.randn(logs.shape, generator=generator).to(logs.device) * mask
    (logs * weights).sum().backward()

    reference = {path: delta.detach().clone().requires_grad_() for path, delta in deltas.items()}
    answers = [(prompt, answer) for prompt, group in zip(prompts, groups, strict=True) for answer in group]
    for row, (prompt, answer) in enumerate(answers):
        expected = one_by_one(model.adapted, prompt, answer, reference)
        torch.testing.assert_close(logs[row, : len(answer)], expected, rtol=1e-4, atol=1e-4)
        (expected * weights[row, : len(answer)]).sum().backward()
    for path, delta in deltas.items():
        scale = reference[path].grad.abs().max().item()
        torch.testing.assert_close(delta.grad, reference[path].grad, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize(
    ("choices", "tokens"),
    [([[5], [7, 8, 9], [7, 10], [7]], [2]), ([[5], [7, 8], [6, 9]], [0, 3])],
    ids=["one goes on from another", "two go on apart"],
)
def test_choices_score_as_each_does_alone_in_one_pass_where_that_can_be(real, choices, tokens):
    prompt, mixture = real.prompt_ids(QUESTIONS[0]), random_deltas(real.adapted, 3)
    prefix = compute_prefix(real.adapted, prompt[:10], [mixture])
    seen = []
    hook = real.adapted.model.register_forward_pre_hook(
        lambda _, arguments, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    with torch.inference_mode():
        found = choice_log_probabilities(real.adapted, prompt[10:], choices, mixture, prefix)
        hook.remove()
        expected = [one_by_one(real.adapted, prompt, choice, mixture).sum() for choice in choices]
    first, *rest = tokens
    assert seen == [len(prompt) - 10 + first, *rest]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_base_answers_score_as_the_plain_model_scores_them(real, plain, prompts, greedy_alone):
    with torch.no_grad():
        logs, _ = answer_log_probabilities(real.adapted, [prompts[0]], [[greedy_alone[0]]], [None])
        expected = log_probabilities(plain, prompts[0], greedy_alone[0])
    torch.testing.assert_close(logs[0], expected, rtol=1e-4, atol=1e-4)
