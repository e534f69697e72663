"""Answers of the base model by llama.cpp, which a user may pick instead, through its package `llama-cpp-python`.

It reads quantised weights as they are, which are fewer bytes than the bf16 that we hold them in. So it is measured on
the GGUF file that the model is had from, and on the same weights as bf16; how many bytes a token reads stands beside.
"""

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from gguf import GGUFReader

# Token ids that every vocabulary has, as many as a prompt may have.
_TRIED_CONTEXT = range(64)


def llama_cpp_is_there() -> bool:
    """Whether the package is installed; it is compiled as it is installed, and nothing else needs it."""
    return find_spec("llama_cpp") is not None


def llama_cpp_answers(gguf: Path) -> bool:
    """Whether it answers from a file on this CPU, tried in a process of its own, which it may end.

    Version 0.3.36, as pip compiles it for a CPU with AMX, executes an illegal instruction on quantised weights.
    """
    tried = subprocess.run([sys.executable, "-m", __spec__.name, str(gguf)], capture_output=True)
    return tried.returncode == 0


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on as many threads as torch has."""

    def __init__(self, gguf: Path):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._llama = Llama(str(gguf), n_threads=threads, n_threads_batch=threads, verbose=False)

    def answer(self, context: Sequence[int], tokens: int) -> list[int]:
        """A greedy answer of `tokens` tokens; the end of a turn does not end it."""
        self._llama.reset()  # or it would go on from what it has seen of the context before
        return list(islice(self._llama.generate(context, temp=0.0), tokens))


def write_as_bf16(gguf: Path, target: Path) -> None:
    """Write a GGUF file's weights as bf16 into another one.

    Raises:
        RuntimeError: llama.cpp refuses to.
    """
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_BF16
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(bytes(gguf), bytes(target), ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"llama.cpp could not write the weights of {gguf.name} as bf16")


def gguf_bytes(gguf: Path) -> int:
    """What a token reads of a file's weights: all but the embedding, unless that is the output layer too."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(gguf).tensors}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return sum(sizes.values())


if __name__ == "__main__":
    LlamaCpp(Path(sys.argv[1])).answer(_TRIED_CONTEXT, 1)
