"""A base model made ready to be adapted: its weights, tokenizer and experts, and a basis for every layer to adapt."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from accelerate import PartialState
from PIL.Image import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging

from t2app.experts import Expert, ExpertError, WeightsIdentity, load_expert
from t2app.kernels.build import can_have_kernels, has_bfloat16_arithmetic, kernel_folder, kernels_ahead
from t2app.kernels.model import use_kernels
from t2app.models.bases import CachedBases
from t2app.models.catalogue import (
    DEFAULT_MODEL,
    EIGHT_BIT,
    EXPERTS_FOLDER,
    FOUR_BIT,
    PRECISIONS,
    classifier_file,
    expert_files,
    pool_folder,
    title_of,
)
from t2app.models.checkpoints import ModelError, Progress, checkpoint_of
from t2app.models.vision import PictureInputs, chat_inputs, check_kind, load_processor, takes_pictures
from t2app.models.weights import CheckpointWeights
from t2app.pictures import PictureError
from t2app.spectral import SpectralModel, fingerprint, linear_layer
from t2app.spectral.layer_paths import block_linear_paths


@dataclass(frozen=True)
class Model:
    """A model ready to answer: its layers take mixtures, its tokenizer and experts are with it.

    Attributes:
        name: the catalogue's name, the hub name or the folder's name.
        adapted: the model with a spectral edit beside the layers that its experts (or a training) adapt.
        experts: those that answers are mixed of.
        classifier: the classification expert, which only the first pass asks; None where there is none.
        eos_ids: token ids that end a turn.
        context_length: tokens that prompt and answer may have together.
        parameters: how many the model has, however they are held.
        processor: of pictures and prompts; None where the model takes no pictures.
    """

    name: str
    precision: str
    adapted: SpectralModel
    tokenizer: PreTrainedTokenizerBase
    identity: WeightsIdentity
    experts: tuple[Expert, ...]
    classifier: Expert | None
    eos_ids: tuple[int, ...]
    context_length: int
    parameters: int
    processor: ProcessorMixin | None = None

    @property
    def pool(self) -> tuple[Expert, ...]:
        """All experts there are, the classification expert last."""
        return self.experts if self.classifier is None else (*self.experts, self.classifier)

    @property
    def takes_pictures(self) -> bool:
        return self.processor is not None

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a user's prompt in the model's chat template, up to where the answer begins."""
        if self.takes_pictures:
            return chat_inputs(self.processor, prompt, None)[0]
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt)["input_ids"]
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def beginning(self, form: Callable[[str], str] = str) -> list[int]:
        """Token ids that prompts begin with whatever they are about, where `form` makes a prompt of that."""
        pairs = zip(*(self.prompt_ids(form(about)) for about in ("A", "b")), strict=False)
        return [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]

    def picture_prompt(self, prompt: str, image: Image) -> tuple[list[int], PictureInputs]:
        """Token ids of a user's prompt with a picture before it, and what else the model takes of the picture.

        Raises:
            PictureError: the model takes no pictures, or the prompt's text holds what stands for one.
        """
        if not self.takes_pictures:
            raise PictureError(f"{self.name} takes no pictures; ask without one, or choose a vision-language model")
        return chat_inputs(self.processor, prompt, image)


def load_model(
    name: str = DEFAULT_MODEL,
    precision: str = "auto",
    many_rows: bool = False,
    layers: Callable[[str], bool] | None = None,
    progress: Progress = lambda message, share: None,
    experts_folder: Path = EXPERTS_FOLDER,
    experts_of: str | None = None,
) -> Model:
    """Load a model with its tokenizer, its experts and the bases of the layers to adapt.

    Args:
        name: a name of the catalogue, a hub name, a local folder, or a GGUF file (a path, or `owner/repository/file`).
        precision: fp32, bf16, 8bit, 4bit, or auto (see `resolve_precision`).
        many_rows: whether dozens of rows will be decoded at once, as in training, or only the answers to one prompt.
        layers: says of a layer's path whether to adapt it; None adapts what the model's experts adapt.
        experts_of: the name of another model, whose experts are taken as this model's (see `load_expert`).

    Raises:
        ModelError: the model cannot be had or has nothing to adapt.
        WeightsError: its checkpoint does not hold the full-precision weights.
        ExpertError: one of its experts is not usable, or the other model has none.
    """
    together = processes()
    precision = resolve_precision(precision, many_rows)
    transformers_logging.disable_progress_bar()
    kernels = kernels_ahead(precision)
    checkpoint = checkpoint_of(name, progress)
    progress("Loading the model", None)
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
        kind = AutoModelForImageTextToText if takes_pictures(config) else AutoModelForCausalLM
        model = kind.from_pretrained(checkpoint.folder, **_held_in(precision, together)).eval()
        processor = load_processor(checkpoint.folder, config) if takes_pictures(config) else None
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder) if processor is None else processor.tokenizer
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"the model '{name}' cannot be loaded: {error}") from None
    if processor is not None:
        check_kind(model)
    model.requires_grad_(False)
    parameters = model.num_parameters()
    weights = CheckpointWeights(checkpoint.folder, model)
    identity = identity_of(model, weights, title_of(name), checkpoint.revision)
    pool, adopted = experts_of or name, experts_of is not None
    experts = tuple(load_expert(file, identity, adopted) for file in expert_files(pool, experts_folder))
    if adopted and not experts:
        raise ExpertError(f"there are no experts of '{experts_of}' in {pool_folder(pool, experts_folder)}")
    file = classifier_file(pool, experts_folder)
    classifier = None if file is None else load_expert(file, identity, adopted)
    if layers is None:
        adapted_by_experts = {path for expert in (*experts, classifier) if expert is not None for path in expert.z}
        layers = adapted_by_experts.__contains__
    paths = [path for path in identity.ranks if layers(path)]
    bases = CachedBases(model, weights, identity.fingerprint, paths, together.device)
    bases.prepare(progress)
    if kernels is not None and not kernels.done():
        progress("Compiling the kernels (once)", None)
        kernels.result()
    try:
        use_kernels(model, kernel_folder(), in_bytes=precision == EIGHT_BIT)
    except ValueError as error:
        raise ModelError(f"{error}: load the model with --precision bf16") from None
    # It is handed the last token of every row as a slice, which torch would multiply by a copy of the weights a row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(),))
    eos = model.generation_config.eos_token_id
    return Model(
        name=identity.model,
        precision=precision,
        adapted=SpectralModel(model, bases, many_rows),
        tokenizer=tokenizer,
        identity=identity,
        experts=experts,
        classifier=classifier,
        eos_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        context_length=model.config.get_text_config().max_position_embeddings,
        parameters=parameters,
        processor=processor,
    )


def processes() -> PartialState:
    """The processes that train together, and which of them this is; mostly there is one."""
    # Without a GPU it has to be told, or it sees no others.
    return PartialState(cpu=not torch.cuda.is_available())


def resolve_precision(precision: str, many_rows: bool = False) -> str:
    """What `auto` stands for: bf16, but fp32 for many rows on a CPU without 16-bit arithmetic (`bench products`).

    Raises:
        ModelError: there is no such precision, or not on this machine.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"there is no precision '{precision}'; choose one of {', '.join(PRECISIONS)}")
    if precision == EIGHT_BIT and not can_have_kernels():
        raise ModelError("weights are held in 8 bits on a CPU with AVX2 alone; on a GPU choose bf16 or 4bit")
    if precision != "auto":
        return precision
    return "fp32" if many_rows and not torch.cuda.is_available() and not has_bfloat16_arithmetic() else "bf16"


def _held_in(precision: str, together: PartialState) -> dict[str, object]:
    """What transformers is asked for, to hold a model's weights in a precision, on the GPUs where there are any."""
    arguments: dict[str, object] = {}
    if together.device.type == "cuda":
        # "auto" spreads a model over all GPUs, and what does not fit there over the host's memory. Of several processes
        # that train together, each has the whole model on a GPU of its own.
        arguments["device_map"] = "auto" if together.num_processes == 1 else {"": together.device}
    if precision != FOUR_BIT:
        return arguments | {"dtype": torch.float32 if precision == "fp32" else torch.bfloat16}
    # It would advise every user of a CPU to install another package.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return arguments | {"dtype": torch.bfloat16, "quantization_config": four_bit}


def identity_of(model: PreTrainedModel, weights: CheckpointWeights, name: str, revision: str) -> WeightsIdentity:
    """The identity of a model's full-precision weights, over all the linear layers of its blocks: of its language
    tower's, if it has others.
    """
    tower = model.get_decoder()
    paths = block_linear_paths(model, within=next(path for path, module in model.named_modules() if module is tower))
    layers = {path: linear_layer(model, path) for path in paths}
    ranks = {path: min(layer.in_features, layer.out_features) for path, layer in layers.items()}
    return WeightsIdentity(name, revision, fingerprint(weights.items(paths)), ranks)
