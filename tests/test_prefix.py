"""What prompts begin with, kept for the mixtures that were used last, on the real embedded model in fp32."""

import pytest
import torch
from random_mixtures import random_deltas

from t2app.decoding import collected, decode, prefix
from t2app.decoding.context import Context, forward
from t2app.decoding.prefix import _MOST_KEPT_MIXTURES, Beginnings, compute_prefix
from t2app.messages import Limits, Sampling
from t2app.scheduler import Scheduler

GREEDY = Sampling(max_new_tokens=24)
QUESTIONS = ("Compute 12 + 7. Reply with only the number.", "Why is the sky blue?")


def tokens_run(adapted, run) -> int:
    """How many tokens of all rows together the model was given while `run` was called."""
    counts = []
    hook = adapted.model.register_forward_pre_hook(
        lambda _, arguments, options: counts.append(options["input_ids"].numel()), with_kwargs=True
    )
    run()
    hook.remove()
    return sum(counts)


def test_answers_from_a_kept_beginning_are_those_of_whole_prompts_and_cost_what_follows_it(real):
    mixtures = [None, random_deltas(real.adapted, 0)]
    beginning = real.beginning()
    scheduler = Scheduler(real.adapted, real.eos_ids, Limits(), beginning)
    first = Sampling(max_new_tokens=1)

    def ask(question: str, sampling: Sampling) -> list[list[int]]:
        rows = [[], []]
        with scheduler.caller("somebody") as caller:
            for step in caller.decode(real.prompt_ids(question), mixtures, sampling):
                for row, token in step.items():
                    rows[row].append(token)
        return rows

    try:
        for question in QUESTIONS:
            prompt = real.prompt_ids(question)
            expected = collected(decode(real.adapted, [prompt] * 2, mixtures, GREEDY, real.eos_ids))
            assert prompt[: len(beginning)] == beginning
            assert ask(question, GREEDY) == expected
            assert tokens_run(real.adapted, lambda: ask(question, first)) == 2 * (len(prompt) - len(beginning))  # noqa: B023
    finally:
        scheduler.close()


def test_prompt_that_begins_otherwise_or_ends_there_has_no_prefix(real):
    beginning = real.beginning()
    beginnings = Beginnings(real.adapted, beginning)
    assert beginnings.prefix_of(beginning, [None]) is None
    assert beginnings.prefix_of([beginning[-1], *beginning], [None]) is None
    assert beginnings.prefix_of([*beginning, 5], [None]).length == len(beginning)
    assert Beginnings(real.adapted, []).prefix_of([*beginning, 5], [None]) is None


def test_mixtures_that_were_asked_for_last_are_kept_and_others_computed_again(real):
    adapted, beginning = real.adapted, real.beginning()
    beginnings = Beginnings(adapted, beginning)
    prompt = [*beginning, 5]
    mixtures = [random_deltas(adapted, seed) for seed in range(_MOST_KEPT_MIXTURES)]
    for mixture in mixtures:
        assert tokens_run(adapted, lambda: beginnings.prefix_of(prompt, [None, mixture])) > 0  # noqa: B023
    # The base model's was asked for every time; beside it the first mixture had no room any more.
    assert tokens_run(adapted, lambda: beginnings.prefix_of(prompt, [None, mixtures[-1]])) == 0
    assert tokens_run(adapted, lambda: beginnings.prefix_of(prompt, [mixtures[1]])) == 0
    assert tokens_run(adapted, lambda: beginnings.prefix_of(prompt, [mixtures[0]])) == len(beginning)
    assert len(beginnings.prefix_of(prompt, [None]).mixtures) == _MOST_KEPT_MIXTURES


def test_computation_that_failed_is_done_again(real, monkeypatch):
    beginnings, prompt = Beginnings(real.adapted, real.beginning()), [*real.beginning(), 5]

    def fails(*arguments):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
        patched.setattr(prefix, "forward", fails)
        beginnings.prefix_of(prompt, [None])
    assert len(beginnings.prefix_of(prompt, [None]).cache_for([None])) > 0


def test_rows_that_join_are_copied_once_and_have_room_for_more_tokens(real):
    long, short = (Context(compute_prefix(real.adapted, range(100, 100 + n), [None]).cache, None) for n in (30, 10))
    joined = long.joined(short, [1, 0], torch.device("cpu"))
    for layer, longer, shorter in zip(joined.cache.layers, long.cache.layers, short.cache.layers, strict=True):
        keys = layer.keys
        assert torch.equal(keys[0, :, 20:], shorter.keys[0]) and not keys[0, :, :20].any()
        assert torch.equal(keys[1], longer.keys[0])
        assert layer.extend(1)[0].data_ptr() == keys.data_ptr()
    assert joined.mask.tolist() == [[0] * 20 + [1] * 10, [1] * 30]


def test_copy_of_a_context_goes_on_by_itself(real):
    def row(*tokens: int) -> torch.Tensor:
        return torch.tensor([tokens], device=real.adapted.model.device)

    ids, last = row(*range(100, 140)), row(9)
    context = Context(compute_prefix(real.adapted, ids[0].tolist(), [None]).cache, None)
    copy = context.copy()
    ways = {"own": row(5), "copied": row(7)}
    with torch.inference_mode():
        # In turns: each writes its token where the other would have room for its own.
        forward(real.adapted, ways["own"], context)
        forward(real.adapted, ways["copied"], copy)
        for name, went_on in (("own", context), ("copied", copy)):
            found = forward(real.adapted, last, went_on)
            whole = real.adapted.model(torch.cat([ids, ways[name], last], 1)).logits[:, -1:]
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-3)
