"""A checkpoint of random numbers in a given shape: what a model costs does not depend on what it has learnt."""

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig, Qwen2Config

from t2app.models.catalogue import DEFAULT_MODEL, Shape
from t2app.models.checkpoints import checkpoint_of
from t2app.spectral.layer_paths import block_of

_SPREAD = 0.02


def write_random_checkpoint(shape: Shape, folder: Path) -> None:
    """Write bf16 safetensors as transformers reads them, a file a block, with the embedded model's tokenizer.

    No more than one file's weights are in memory at a time. The end of a turn is the tokenizer's, as far as the
    vocabulary reaches.
    """
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_of(DEFAULT_MODEL, lambda message, share: None).folder)
    tokenizer.save_pretrained(folder)
    config = _config(shape, min(tokenizer.eos_token_id, shape.vocabulary - 1))
    config.save_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # A GPU draws the numbers of an 8B model in a second, a CPU in a minute.
    generator, files = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0), {}
    for number, names in enumerate(_parts(shape, empty.state_dict())):
        file = f"model-{number:05}.safetensors"
        save_file({name: _random(empty.get_parameter(name), generator) for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _config(shape: Shape, eos: int) -> PreTrainedConfig:
    kind = Qwen2Config if shape.biases else LlamaConfig
    return kind(
        architectures=["Qwen2ForCausalLM" if shape.biases else "LlamaForCausalLM"],
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=8192,
        eos_token_id=eos,
        dtype="bfloat16",
    )


def _parts(shape: Shape, names: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names of the weights that lie in one file: those of a block, and those of none."""
    stored = [name for name in names if not (shape.tied and name == "lm_head.weight")]
    for _, part in groupby(stored, lambda name: block_of(name) if ".layers." in name else None):
        yield list(part)


def _random(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """A matrix of small numbers, or a vector of ones, which leaves a norm as it is."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=torch.bfloat16)
    numbers = torch.randn(parameter.shape, generator=generator, device=generator.device)
    return (_SPREAD * numbers).to("cpu", torch.bfloat16)
