"""What several test files share: the real embedded model, and small random models of every architecture tested.

The real model is loaded once a session; its first load on a machine downloads and converts it.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose functions are then made otherwise

from gguf import GGUFWriter
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, PhiConfig, Qwen2Config
from vision_models import save_vision_parts

from t2app.kernels.build import can_have_kernels, kernel_folder, load_kernels
from t2app.models.catalogue import EIGHT_BIT, FOUR_BIT
from t2app.models.families import random_model
from t2app.models.model import Model, load_model

# Wide enough a spread that the blocks, and what an expert does to them, show in the logits.
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}
SMALL_CONFIGS = {
    "llama": LlamaConfig(vocab_size=96, num_key_value_heads=2, **_SIZES),
    "qwen2": Qwen2Config(vocab_size=96, num_key_value_heads=2, **_SIZES),
    "gpt_neox": GPTNeoXConfig(vocab_size=96, **_SIZES),
    "phi": PhiConfig(vocab_size=96, **_SIZES),
}


def pytest_configure(config: pytest.Config) -> None:
    """Share the processors among the processes that test side by side: threads without one wait for each other."""
    workers = config.getoption("numprocesses", None)
    if workers:
        # They and what they start inherit it.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.fixture(scope="session")
def real() -> Model:
    """The embedded model in fp32 with all linear layers of its blocks adapted."""
    return load_model(precision="fp32", layers=lambda path: True)


@pytest.fixture(scope="session")
def plain() -> nn.Module:
    """The embedded model in fp32 with nothing adapted, a second copy of it."""
    return load_model(precision="fp32", layers=lambda path: False).adapted.model


@pytest.fixture(scope="session")
def models_by_kernels() -> None:
    """Skips where no model runs by the kernels."""
    if not can_have_kernels() or not load_kernels(kernel_folder()):
        pytest.skip("there is a GPU, or no AVX2, or no compiler")


@pytest.fixture(scope="session")
def real_8bit(models_by_kernels) -> Model:
    """The embedded model in 8-bit with its experts."""
    return load_model(precision=EIGHT_BIT)


@pytest.fixture(scope="session")
def real_4bit() -> Model:
    """The embedded model in 4-bit with its experts."""
    return load_model(precision=FOUR_BIT)


@pytest.fixture(scope="session")
def small_model() -> Callable[[str], nn.Module]:
    """Makes a small random model of an architecture of `SMALL_CONFIGS`."""
    return lambda architecture: random_model(SMALL_CONFIGS[architecture])


@pytest.fixture(params=SMALL_CONFIGS)
def small(request, small_model) -> nn.Module:
    """A small random model of each architecture, new for each test."""
    return small_model(request.param)


@pytest.fixture(scope="session")
def tiny_folder(real, tmp_path_factory) -> Path:
    """A checkpoint of a small random Llama with the real tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    random_model(LlamaConfig(vocab_size=len(real.tokenizer), num_key_value_heads=2, **_SIZES)).save_pretrained(folder)
    real.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder, tmp_path_factory) -> Model:
    """The model of `tiny_folder` in fp32 with all linear layers of its blocks adapted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return load_model(str(tiny_folder), precision="fp32", layers=lambda path: True)


@pytest.fixture(scope="session")
def gguf(tmp_path_factory) -> Path:
    """A small random Llama as a GGUF file in float32, with a tokenizer of single characters."""
    width, mlp_width, blocks, heads = 32, 64, 2, 2
    tokens = ["<|endoftext|>", *map(chr, range(33, 127)), "ab"]
    file = tmp_path_factory.mktemp("gguf") / "tiny-llama.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_block_count(blocks)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(mlp_width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    draw = numpy.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), width), "output": (len(tokens), width), "output_norm": (width,)}
    for block in range(blocks):
        shapes |= {f"blk.{block}.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.ffn_{name}": (mlp_width, width) for name in ("gate", "up")}
        shapes |= {f"blk.{block}.ffn_down": (width, mlp_width)}
        shapes |= {f"blk.{block}.{name}_norm": (width,) for name in ("attn", "ffn")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="session")
def vision_folder(real, tmp_path_factory) -> Callable[[str], Path]:
    """Makes the checkpoint of a small random model of a class of `VISION_CLASSES`; its language tower is as `tiny`."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(kind: str) -> Path:
        text = _SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 2048}
        config = save_vision_parts(kind, text, real.tokenizer, folder / kind)
        model = random_model(config)
        # What the vision tower says has to be as loud as the words.
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith(("lm_head", "model.language_model", "model.text_model")):
                parameter.normal_(std=0.3)
        model.save_pretrained(folder / kind)
        return folder / kind

    return make
