"""`bench model` and `bench shape`: random weights in a small shape, had and answered with as real ones are."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from t2app.bench.model import model_figures
from t2app.bench.random_checkpoint import write_random_checkpoint
from t2app.bench.shape import bench_shape
from t2app.cache import cache_folder
from t2app.models.catalogue import Shape

SMALL = Shape(2048, 64, 192, blocks=2, heads=2, key_value_heads=1)
LIKE_QWEN = Shape(2048, 64, 192, blocks=2, heads=2, key_value_heads=1, tied=True, biases=True)


@pytest.mark.parametrize("shape", [SMALL, LIKE_QWEN], ids=["Llama", "Qwen2"])
def test_random_checkpoint_is_a_model_of_its_shape(shape, tmp_path):
    write_random_checkpoint(shape, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.num_parameters() == shape.parameters and model.dtype == torch.bfloat16
    with torch.inference_mode():
        logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, shape.vocabulary) and bool(logits.isfinite().all()) and logits.std() > 0


def test_figures_of_a_model_hold_its_memory_and_the_speed_of_every_way_and_leave_no_bases_behind(tmp_path):
    write_random_checkpoint(SMALL, tmp_path)
    bases = cache_folder() / "bases"
    before = sorted(bases.iterdir()) if bases.exists() else []
    figures = {figure.figure: figure for figure in model_figures("model", str(tmp_path), "bf16")}
    assert sorted(bases.iterdir() if bases.exists() else []) == before
    assert figures["weights_mb"].value == pytest.approx(2 * SMALL.parameters / 1e6)
    assert figures["prepare_seconds"].value > figures["load_seconds"].value > 0
    # A process holds torch beside the model; what is measured is no share of this one's memory.
    assert 200 < figures["load_host_peak_mb"].value < 4000 and figures["load_host_peak_mb"].n == 3
    rates = [figures[f"{way}_tokens_per_second"].value for way in ("base", "adapted", "both")]
    assert all(rate > 0 for rate in rates) and figures["both_over_base"].n == 40


def test_shape_of_a_model_that_the_catalogue_lacks_is_refused():
    with pytest.raises(ValueError, match="smollm2-135m-instruct"):
        next(bench_shape("nobody/nothing", "bf16"))
