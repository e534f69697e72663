"""A GGUF file as a folder of bf16 safetensors."""

import struct
from functools import cache
from pathlib import Path
from unittest.mock import patch

import gguf
import numpy as np
import torch
from gguf import GGUFEndian, GGUFValueType
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def convert(file: Path, target: Path) -> None:
    """Write a GGUF checkpoint as a bf16 safetensors checkpoint, which loads some thirty times faster.

    Raises:
        OSError, ValueError: the file is no GGUF file, not a whole one, or of a kind that transformers does not read.
    """
    try:
        model, tokenizer = _read(file)
    except struct.error:
        raise ValueError(f"{file.name} ends in the middle of its header") from None
    # transformers keeps a dequantized model marked as quantized, and would refuse to save it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.config._name_or_path = ""
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    AutoConfig.from_pretrained(target)


def _read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # transformers reads the file's header three times and makes the table of tensor names once for every module, which
    # takes longer than all the rest of a small model's conversion.
    with patch.multiple(gguf, GGUFReader=cache(_GGUFReader), get_tensor_name_map=cache(gguf.get_tensor_name_map)):
        arguments = {"gguf_file": file.name, "quantization_config": GgufConfig(gguf_file=file.name, dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **arguments)
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


class _GGUFReader(gguf.GGUFReader):
    """Reads an array of a header as a whole: item by item, those of a vocabulary take seconds.

    A string is `bytes`, which is enough for transformers.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list[int], list[GGUFValueType]]:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        kind = GGUFValueType(self._get(orig_offs, np.uint32)[0])
        begin = orig_offs + 4
        count = int(self._get(begin, np.uint64)[0])
        begin += 8
        if kind == GGUFValueType.STRING:
            items, end = self._strings(begin, count)
        elif kind in self.gguf_scalar_to_np:
            numbers = self._get(begin, self.gguf_scalar_to_np[kind], count)
            items, end = list(numbers.reshape(-1, 1)), begin + numbers.nbytes
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return end - orig_offs, items, list(range(count)), [GGUFValueType.ARRAY, kind]

    def _strings(self, offset: int, count: int) -> tuple[list[bytes], int]:
        """So many strings from an offset on, and the offset behind them."""
        data, items = memoryview(self.data), []
        length_of = struct.Struct("<Q" if self.endianess == GGUFEndian.LITTLE else ">Q").unpack_from
        for _ in range(count):
            (length,) = length_of(data, offset)
            offset += 8
            items.append(bytes(data[offset : offset + length]))
            offset += length
        return items, offset
