"""What `bench start` and `bench first-token` measure is what they say."""

import pytest

from t2app.bench.first_token import _PROMPTS, _prompts, bench_first_token
from t2app.bench.start import _start
from t2app.kernels.build import kernel_folder, load_kernels


def test_cold_start_makes_everything_anew_and_ends_with_an_answer(tiny_folder, tmp_path):
    cache = tmp_path / "cache"
    cold = _start(("--model", str(tiny_folder)), {"T2_CACHE_DIR": str(cache)})
    assert 0 < cold.served < cold.answered and cold.peak_memory > 0
    assert bool(list(cache.glob("kernels/*.so"))) == load_kernels(kernel_folder())


def test_start_without_an_answer_is_no_figure():
    with pytest.raises(RuntimeError, match="the model 'no-such/model' cannot be loaded"):
        _start(("--model", "no-such/model"), {"HF_HUB_OFFLINE": "1"})


def test_prompts_are_different_ones_of_64_tokens(real):
    prompts = list(_prompts(real))
    assert len(set(prompts)) == len(prompts) > _PROMPTS
    assert {len(real.tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts} == {64}


def test_first_token_is_waited_for_as_long_as_for_its_two_parts(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path))
    whole, first_pass, prefill, unprepared = bench_first_token(str(tiny_folder), "fp32")
    assert [figure.figure for figure in (whole, first_pass, prefill, unprepared)] == [
        "seconds",
        "first_pass_seconds",
        "prefill_seconds",
        "unprepared_first_pass_seconds",
    ]
    assert whole.n == first_pass.n == prefill.n == unprepared.n >= 8
    assert max(first_pass.min, prefill.min) < first_pass.min + prefill.min <= whole.min
    assert whole.max <= first_pass.max + prefill.max
