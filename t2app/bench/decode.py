"""What the second answer of the page costs, and what both cost elsewhere.

A step with both rows is measured against one of the base model alone. Whole answers are measured against those by
transformers' `generate`: the base model's against its own; both against the authors' way, which writes W' into the
weights for the one answer and W back for the other, and against a LoRA of rank 16 in a mixed batch of peft's. The base
model's answer is measured against llama.cpp's too.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from t2app.bench.composed import ComposedWeights
from t2app.bench.figure import Figure, figure_of, in_turns, seconds
from t2app.bench.generate import LoraBeside, generate, generate_composed, plain_model
from t2app.bench.llama import LlamaCpp, gguf_bytes, llama_cpp_answers, llama_cpp_is_there, write_as_bf16
from t2app.bench.step import even_mixture, random_context, step_seconds, stepper, weight_bytes, with_matrices
from t2app.decoding import collected, decode
from t2app.decoding.step_graphs import recorder_for
from t2app.messages import Sampling
from t2app.mixer import Mixer
from t2app.models.catalogue import EIGHT_BIT, FOUR_BIT
from t2app.models.checkpoints import ModelError, gguf_of
from t2app.models.model import Model, load_model
from t2app.parts import whole
from t2app.spectral import Deltas

# Answers of so many tokens to the context that it was made with: the token ids of every row.
Way = Callable[[int], list[list[int]]]

_WARM_UP_TOKENS = 8
_NEW_MIXTURES = 20
# Of the times of two steps, and of two ways, the first over the second.
_STEP_RATIOS = {
    "both_over_base": ("both_step", "base_step"),
    "base_over_bf16": ("base_step_in_bf16", "base_step"),
    "both_over_bf16": ("both_step_in_bf16", "both_step"),
}
_RATIOS = {
    "base_over_generate": ("generate", "base"),
    "both_over_reference": ("reference", "both"),
    "both_over_lora": ("lora", "both"),
    "base_over_llama_cpp": ("llama_cpp", "base"),
    "base_over_llama_cpp_bf16": ("llama_cpp_bf16", "base"),
    "lora_over_generate": ("lora", "generate"),
}


def bench_decode(
    model_name: str, precision: str, steps: int = 60, tokens: int = 128, rounds: int = 5
) -> Iterator[Figure]:
    """A decoding step with both answers over one of the plain base model, and whole answers ours and elsewhere.

    `both_over_base` is what a step with both costs of one without, and `lora_over_generate` what both answers cost of
    one where a LoRA gives the second. The other ratios tell how many times faster ours is than what stands after
    `over`, to the same context and of as many tokens. All ways take turns, so that a slow moment of the machine meets
    each. `new_mixture` is what an answer by a mixture that was not asked for before waits for its matrices, where edits
    are by these. On a GPU `…_step_unrecorded` is a step that is no CUDA graph. Beside weights in 8 bits steps are
    measured in bf16 too, as `…_step_in_bf16`, and what is not ours answers in bf16. `…_read` is what a token reads of
    weights; llama.cpp answers from the file as it is quantised, and as bf16.

    Args:
        steps: how many are measured; tokens: of an answer; rounds: in how many every way answers once.

    Raises:
        ValueError: the model has no expert to measure with.
    """
    model = load_model(model_name, precision)
    yield from new_mixture_figures(model)
    mixture = with_matrices(model, even_mixture(model))
    yield from decode_figures(model, model_name, mixture, steps, tokens, rounds)


def new_mixture_figures(model: Model) -> Iterator[Figure]:
    """How long matrices are added up to those of another mixture of all experts, where these have theirs."""
    mixer, times = Mixer(model.experts, model.adapted), []
    whole(mixer.making_matrices())
    for number in range(1 + _NEW_MIXTURES):
        weights = {expert.name: 1 / (2 + number) for expert in model.experts}
        if (mixture := mixer.mixture(weights)) is None:
            return
        times.append(seconds(lambda new=mixture, of=weights: whole(mixer.making_matrices_of(new, of))))
        if not model.adapted.has_matrices_of(mixture):
            return
    yield figure_of("decode", "new_mixture", [1e3 * value for value in times[1:]], "ms")


def decode_figures(
    model: Model, model_name: str, mixture: Deltas, steps: int, tokens: int, rounds: int
) -> Iterator[Figure]:
    """The figures of `bench_decode` for a model that is loaded, and a mixture of its layers."""
    rows = {"base": [None], "both": [None, mixture]}
    streams = {f"{name}_step": stepper(model, mixtures, 2 * steps) for name, mixtures in rows.items()}
    if model.precision == EIGHT_BIT:
        in_bf16 = load_model(model_name, "bf16")
        own = with_matrices(in_bf16, dict(mixture))  # to that model, another mixture
        for name, mixtures in {"base": [None], "both": [None, own]}.items():
            streams[f"{name}_step_in_bf16"] = stepper(in_bf16, mixtures, 2 * steps)
    if recorder_for(model.adapted) is not None:
        for name, mixtures in rows.items():
            streams[f"{name}_step_unrecorded"] = stepper(model, mixtures, 2 * steps, recorded=False)
    times = in_turns({name: partial(step_seconds, step) for name, step in streams.items()}, steps)
    for name, values in times.items():
        yield figure_of("decode", name, [1e3 * value for value in values], "ms")
    for figure, (over, under) in _STEP_RATIOS.items():
        if over in times:
            yield figure_of("decode", figure, _ratios(times[over], times[under]), "ratio")
    if model.precision == FOUR_BIT:
        logging.getLogger(__name__).warning(
            "whole answers are not compared: in 4-bit no W' can be written into the weights; give --precision bf16"
        )
        return
    context = random_context()
    ways = answering_ways(model, plain_model(model, model_name), mixture, context)
    read = {"base": weight_bytes(model, [None]).total}
    with tempfile.TemporaryDirectory() as folder:
        for name, gguf in _gguf_files(model_name, Path(folder)):
            ways[name] = partial(_llama_cpp_answer, LlamaCpp(gguf), context)
            read[name] = gguf_bytes(gguf)
        yield from _answer_figures(_times(ways, tokens, rounds), read, tokens)


def answering_ways(model: Model, plain: PreTrainedModel, mixture: Deltas, context: Sequence[int]) -> dict[str, Way]:
    """The ways to answer in this process, by name: the base model alone, or it and the adapted one.

    Args:
        plain: the model without anything of ours, see `plain_model`.
    """
    paths = list(model.adapted.layers)
    return {
        "base": partial(_decoded, model, [None], context),
        "generate": partial(generate, plain, context),
        "both": partial(_decoded, model, [None, mixture], context),
        "reference": partial(generate_composed, plain, ComposedWeights(plain, paths), mixture, context),
        "lora": partial(LoraBeside(plain, paths).generate, context),
    }


def _decoded(model: Model, mixtures: Sequence[Deltas | None], context: Sequence[int], tokens: int) -> list[list[int]]:
    # No token ends an answer: all ways then answer at the same length.
    return collected(decode(model.adapted, [context] * len(mixtures), mixtures, Sampling(tokens), ()))


def _llama_cpp_answer(llama: LlamaCpp, context: Sequence[int], tokens: int) -> list[list[int]]:
    return [llama.answer(context, tokens)]


def _gguf_files(model_name: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """The files that llama.cpp answers from, by the name of the way; none, and a sentence why, where it can't."""
    log = logging.getLogger(__name__)
    if not llama_cpp_is_there():
        log.warning("llama.cpp is not compared with: its package llama-cpp-python is not installed")
        return
    try:
        gguf = gguf_of(model_name, folder, lambda message, share: None)
    except ModelError as error:
        log.warning("llama.cpp is not compared with: %s", error)
        return
    if gguf is None:
        log.warning("llama.cpp is not compared with: it takes GGUF files, and %s is had from safetensors", model_name)
        return
    as_bf16 = folder / "bf16.gguf"
    write_as_bf16(gguf, as_bf16)
    for name, file in (("llama_cpp", gguf), ("llama_cpp_bf16", as_bf16)):
        if llama_cpp_answers(file):
            yield name, file
        else:
            log.warning("llama.cpp is not compared with on %s: it fails on this machine", file.name)


def _times(ways: Mapping[str, Way], tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way's answers, a value a round."""
    for way in ways.values():
        way(_WARM_UP_TOKENS)
    return in_turns({name: partial(seconds, partial(way, tokens)) for name, way in ways.items()}, rounds)


def _answer_figures(times: Mapping[str, list[float]], read: Mapping[str, int], tokens: int) -> Iterator[Figure]:
    for name, measured in times.items():
        yield figure_of("decode", f"{name}_seconds", measured, "s")
    for name, bytes_ in read.items():
        yield figure_of("decode", f"{name}_tokens_per_second", [tokens / value for value in times[name]], "tokens/s")
        yield figure_of("decode", f"{name}_read", [bytes_ / 1e6], "MB")
    for figure, (over, under) in _RATIOS.items():
        if over in times:
            yield figure_of("decode", figure, _ratios(times[over], times[under]), "ratio")


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [first / second for first, second in zip(over, under, strict=True)]
