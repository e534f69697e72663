"""Which architectures can be adapted: every promise about an adapted model, checked on small random checkpoints.

A checkpoint of each family is written to a temporary folder and loaded from there as a user's would be. What a family
must keep is in `CHECKS`; the table of `python -m t2app families` and the tests run the same.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging as transformers_logging

from t2app.models.catalogue import FOUR_BIT
from t2app.models.model import load_model
from t2app.models.vision import takes_pictures
from t2app.spectral import Basis, Deltas, SpectralModel, basis_of, linear_layer
from t2app.spectral.layer_paths import block_linear_paths, is_mlp_path

# Error over effect, both as norms of logits, that rounding may make in fp32 and in 4 bits.
EXACT = 1e-3
EXACT_4BIT = 0.1

_VOCABULARY = 96
# Wide enough a spread that the blocks, and what an expert does to them, show in the logits. Matrices are whole numbers
# of the 64 entries that NF4 scales together.
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_EXPERTS = _GROUPED | {"num_experts_per_tok": 2}
FAMILIES: Mapping[str, PreTrainedConfig] = {
    "Llama": LlamaConfig(**_GROUPED),
    "Mistral": MistralConfig(**_GROUPED),
    "Qwen2": Qwen2Config(**_GROUPED),
    "Qwen3": Qwen3Config(head_dim=16, **_GROUPED),
    "Gemma 3": Gemma3TextConfig(head_dim=16, **_GROUPED),
    "Phi-3": Phi3Config(**_GROUPED),
    "Phi": PhiConfig(**_SIZES),
    "GPT-NeoX": GPTNeoXConfig(**_SIZES),
}
REFUSED: Mapping[str, PreTrainedConfig] = {
    "Mixtral": MixtralConfig(num_local_experts=4, **_EXPERTS),
    "Qwen3-MoE": Qwen3MoeConfig(head_dim=16, num_experts=4, moe_intermediate_size=64, **_EXPERTS),
    "GPT-2": GPT2Config(
        vocab_size=_VOCABULARY, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Whether a family keeps a promise, and what was seen."""

    kept: bool
    seen: str


class Subject:
    """A small random checkpoint of a family, and the models that are loaded from it on demand."""

    def __init__(self, folder: Path):
        self.folder = folder

    @cached_property
    def plain(self) -> nn.Module:
        """The model in fp32 as transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def adapted(self) -> SpectralModel:
        """The model in fp32 as the app loads it, with all linear layers of its blocks adapted."""
        return load_model(str(self.folder), "fp32", layers=lambda path: True).adapted

    @cached_property
    def bases(self) -> dict[str, Basis]:
        """The bases of the full-precision weights."""
        return {path: basis_of(linear_layer(self.plain, path).weight) for path in block_linear_paths(self.plain)}

    @cached_property
    def ids(self) -> Tensor:
        """Token ids (3, 12)."""
        return torch.randint(3, _VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))

    def deltas(self, seed: int, keep: Callable[[str], bool] = lambda path: True) -> dict[str, Tensor]:
        """A random expert's z − 1 by layer."""
        generator = torch.Generator().manual_seed(seed)
        deltas = {path: 0.3 * torch.randn(basis.rank, generator=generator) for path, basis in self.bases.items()}
        return {path: delta for path, delta in deltas.items() if keep(path)}

    @torch.no_grad()
    def logits(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits (3, 12, vocabulary) of a prompt and then a decoding step, with `weights` written into the model."""
        run = model if weights is None else lambda *given, **named: functional_call(model, weights, given, named)
        ids = self.ids.to(model.device)  # the app loads onto a GPU where there is one
        prompt = run(ids[:, :-1], use_cache=True)
        step = run(ids[:, -1:], cache=prompt.cache)
        return torch.cat([prompt.logits, step.logits], dim=1).cpu()

    def adapted_logits(self, adapted: SpectralModel, rows: list[Deltas | None]) -> Tensor:
        with adapted.rows(rows):
            return self.logits(adapted.model)


def _load(subject: Subject) -> Outcome:
    """All linear layers of the blocks are adapted, those of the MLP among them."""
    paths = list(subject.adapted.layers)
    mlp = sum(map(is_mlp_path, paths))
    return Outcome(paths == block_linear_paths(subject.plain) and mlp > 0, f"{len(paths)} layers, {mlp} of the MLP")


def _exactness(subject: Subject) -> Outcome:
    """An adapted row is the model with W' = U diag(σ ⊙ z) Vᵀ, as torch.linalg.svd gives it, written into it; the error
    over the effect, as norms of logits."""
    errors = []
    for keep in (lambda path: True, is_mlp_path):
        deltas, written = subject.deltas(0, keep), {}
        for path, delta in deltas.items():
            u, s, vt = torch.linalg.svd(linear_layer(subject.plain, path).weight.detach().double(), full_matrices=False)
            written[f"{path}.weight"] = ((u * s * (1 + delta)) @ vt).float()
        expected = subject.logits(subject.plain, written)
        adapted = subject.adapted_logits(subject.adapted, [None, deltas, deltas])
        errors.append(_error(adapted[1:], expected[1:], subject.logits(subject.plain)[1:]))
    return Outcome(max(errors) <= EXACT, f"{max(errors):.1e}")


def _both_rows(subject: Subject) -> Outcome:
    """The base row is bit-identical to the plain model and each adapted row to that of a batch without another z."""
    for dtype in (torch.float32, torch.bfloat16):
        plain = deepcopy(subject.plain).to(dtype)
        adapted = SpectralModel(deepcopy(plain), subject.bases)
        if not _rows_keep_apart(subject, plain, adapted):
            return Outcome(False, f"rows differ in {dtype}")
    return Outcome(True, "bit-identical in fp32 and bf16")


def _four_bits(subject: Subject) -> Outcome:
    """NF4 with double quantisation: the base row is bit-identical to the 4-bit model, and an adapted row is that model
    with the edit by the full-precision basis written into it; the error over the effect. A CPU with 16-bit arithmetic
    multiplies 4-bit weights in bfloat16."""
    plain, adapted = (
        load_model(str(subject.folder), FOUR_BIT, layers=lambda path, kept=kept: kept).adapted for kept in (False, True)
    )
    deltas = subject.deltas(0)
    # Before it first runs: bitsandbytes may then pack its weights in another way.
    unpacked = {path: _dequantized(layer.base).float().cpu() for path, layer in adapted.layers.items()}
    base, written = {}, {}
    for path, basis in subject.bases.items():
        edit = torch.eye(basis.rank) + (basis.vectors * deltas[path]) @ basis.vectors.T
        base[f"{path}.weight"] = unpacked[path]
        written[f"{path}.weight"] = unpacked[path] @ edit if basis.edits_input else edit @ unpacked[path]
    logits = subject.adapted_logits(adapted, [None, deltas, deltas])
    error = _error(logits[1:], subject.logits(subject.plain, written)[1:], subject.logits(subject.plain, base)[1:])
    apart = _rows_keep_apart(subject, plain.model, adapted)
    return Outcome(apart and error <= EXACT_4BIT, f"{error:.1e}" if apart else "rows differ")


def _detach(subject: Subject) -> Outcome:
    """The model is given back with its own modules and bits."""
    model = deepcopy(subject.plain)
    modules = dict(model.named_modules())
    adapted = SpectralModel(model, subject.bases)
    subject.adapted_logits(adapted, [subject.deltas(0)] * 3)
    given_back = adapted.detach()
    same_modules = dict(given_back.named_modules()) == modules
    same_bits = all(torch.equal(value, subject.plain.state_dict()[name]) for name, value in model.state_dict().items())
    same_logits = torch.equal(subject.logits(given_back), subject.logits(subject.plain))
    kept = given_back is model and same_modules and same_bits and same_logits
    return Outcome(kept, "same modules, bits and logits" if kept else "the model is not what it was")


def _rows_keep_apart(subject: Subject, plain: nn.Module, adapted: SpectralModel) -> bool:
    first, second = subject.deltas(0), subject.deltas(1)
    mixed = subject.adapted_logits(adapted, [first, None, second])
    # As many rows are edited: of another count a library may round a product otherwise, as torch's on an Intel Xeon.
    alone = {row: subject.adapted_logits(adapted, [deltas, None, deltas]) for row, deltas in ((0, first), (2, second))}
    moved = not torch.equal(mixed[0], subject.logits(plain)[0])
    return (
        moved
        and torch.equal(mixed[1], subject.logits(plain)[1])
        and all(torch.equal(mixed[row], logits[row]) for row, logits in alone.items())
    )


def _error(logits: Tensor, expected: Tensor, untouched: Tensor) -> float:
    """How far logits are from what was expected, over how far that is from the untouched model's."""
    return float((logits - expected).norm() / (expected - untouched).norm())


def _dequantized(layer: nn.Module) -> Tensor:
    """The weight (out, in) that a 4-bit layer stands for."""
    from bitsandbytes.functional import dequantize_4bit  # here, because it takes seconds to import

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


CHECKS: Mapping[str, Callable[[Subject], Outcome]] = {
    "load": _load,
    "exactness of the edit": _exactness,
    "both rows": _both_rows,
    "4-bit": _four_bits,
    "detach": _detach,
}


def check_family(name: str) -> dict[str, Outcome]:
    """What a family keeps of every promise, by the names in `CHECKS`."""
    with _checkpoint(FAMILIES[name]) as folder:
        subject = Subject(folder)
        return {check: _outcome(run, subject) for check, run in CHECKS.items()}


def _outcome(run: Callable[[Subject], Outcome], subject: Subject) -> Outcome:
    try:
        return run(subject)
    except (ValueError, RuntimeError) as error:
        return Outcome(False, str(error))


def refusal(name: str) -> str | None:
    """The sentence that a model of a family in `REFUSED` is refused with; None where it is not refused."""
    with _checkpoint(REFUSED[name]) as folder:
        try:
            load_model(str(folder), "fp32")
        except ValueError as error:
            return str(error)
        return None


def families_table(kept: Mapping[str, Mapping[str, Outcome]], refused: Mapping[str, str | None]) -> str:
    """Both tables in Markdown: what the families keep, and how the others are refused."""
    lines = [f"| family | {' | '.join(CHECKS)} |", "| --- |" + " --- |" * len(CHECKS)]
    for name, outcomes in kept.items():
        cells = [f"{'✓' if outcome.kept else '✗'} {outcome.seen}" for outcome in outcomes.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {check}: {' '.join(run.__doc__.split())}" for check, run in CHECKS.items())]
    lines += ["", "| family | is refused with |", "| --- | --- |"]
    lines += [
        f"| {name} | {'✗ nothing' if sentence is None else f'✓ {sentence}'} |" for name, sentence in refused.items()
    ]
    return "\n".join(lines) + "\n"


def random_model(config: PreTrainedConfig) -> nn.Module:
    """A frozen model with random weights and random biases, always the same ones."""
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if takes_pictures(config) else AutoModelForCausalLM
    model = kind.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.normal_(std=0.3)
    return model


@contextmanager
def _checkpoint(config: PreTrainedConfig) -> Iterator[Path]:
    """The folder of a small random checkpoint with a tokenizer, and a cache of its own for as long."""
    usual = os.environ.get("T2_CACHE_DIR")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / config.model_type
        transformers_logging.disable_progress_bar()
        random_model(config).save_pretrained(folder)
        words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"word{number}": number for number in range(3, _VOCABULARY)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        os.environ["T2_CACHE_DIR"] = str(Path(scratch) / "cache")
        try:
            yield folder
        finally:
            del os.environ["T2_CACHE_DIR"]
            if usual is not None:
                os.environ["T2_CACHE_DIR"] = usual
