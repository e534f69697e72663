"""What a vision-language model takes of a picture: its processor, a prompt with a picture in it, and the vision tower's
output for every row of a batch.

The vision tower is never adapted, so it sees a picture once, whatever the mixtures that answer are. This file knows
nothing of mixtures, and `decoding` nothing of processors.
"""

from collections.abc import Mapping
from inspect import signature

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from t2app.models.checkpoints import ModelError
from t2app.pictures import PictureError

# What a processor makes of one picture, beside token ids: what `forward` takes for a batch of one row.
PictureInputs = Mapping[str, Tensor]

# Of the vision tower's output, what the language model does not read.
_INNER_OUTPUTS = ("last_hidden_state", "hidden_states", "attentions")


def takes_pictures(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint's model takes a picture beside the prompt."""
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and getattr(config, "vision_config", None) is not None


def check_kind(model: PreTrainedModel) -> None:
    """Raises ModelError for a vision-language model that cannot be decoded here."""
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ModelError(f"{kind} is an encoder-decoder; a model whose language tower is a decoder was expected")
    # By this argument the vision tower's output is handed in, computed once for all rows.
    if "mm_encoder_outputs" not in signature(model.forward).parameters:
        raise ModelError(
            f"{kind} does not take its vision tower's output as an argument, which this program needs; SmolVLM, "
            "Qwen-VL and LLaVA-NeXT do"
        )


def load_processor(checkpoint: str, config: PreTrainedConfig) -> ProcessorMixin:
    """The processor of a checkpoint without its part for videos, which nothing here uses and which needs torchvision.

    Raises:
        ModelError: it has none, or one that needs a package that is not installed.
        OSError, ValueError: transformers cannot load it.
    """
    if type(config) not in PROCESSOR_MAPPING:
        raise ModelError(f"transformers has no processor of pictures for the model type '{config.model_type}'")
    kind = PROCESSOR_MAPPING[type(config)]
    parts = [name for name in kind.get_attributes() if name != "video_processor"]
    pictures_only = type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: parts)})
    # SmolVLM's has no default for the part that is left out.
    left_out = {name: None for name in kind.get_attributes() if name not in parts}
    try:
        return pictures_only.from_pretrained(checkpoint, **left_out)
    except ImportError as error:
        raise ModelError(f"the processor of {checkpoint} needs a package that is missing: {error}") from None


def chat_inputs(processor: ProcessorMixin, prompt: str, image: Image | None) -> tuple[list[int], PictureInputs]:
    """A user's prompt, with a picture before it or none, in the model's chat template up to where the answer begins.

    Returns:
        the token ids, with as many of the picture's as the model gives it, and what else `forward` takes.

    Raises:
        PictureError: the prompt's text holds what stands for a picture.
    """
    if processor.image_token in prompt:
        raise PictureError(f"the prompt holds “{processor.image_token}”, which stands for a picture; leave it out")
    if processor.chat_template is None and processor.tokenizer.chat_template is None:
        text = prompt if image is None else f"{processor.image_token}\n{prompt}"
        inputs = processor(text=text, images=image, return_tensors="pt")
    else:
        content = [] if image is None else [{"type": "image", "image": image}]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        # Every processor's own way but SmolVLM's, which asks for the part for videos.
        inputs = ProcessorMixin.apply_chat_template(processor, messages, processor.chat_template, **options)
    others = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    return inputs["input_ids"][0].tolist(), {} if image is None else others


def picture_arguments(model: PreTrainedModel, picture: PictureInputs, rows: int) -> dict[str, object]:
    """What `forward` takes of a picture that every row of a batch carries; the vision tower runs once."""
    inputs = {name: value.to(model.device) for name, value in picture.items()}
    named = signature(model.get_image_features).parameters
    seen = model.get_image_features(**{name: inputs[name] for name in inputs if name in named}, return_dict=True)
    output = {name: _for_rows(value, rows) for name, value in seen.items() if name not in _INNER_OUTPUTS}
    # Sizes of pictures and types of tokens belong to the rows; the pixels were seen.
    others = {name: _for_rows(value, rows) for name, value in inputs.items() if not name.startswith("pixel")}
    return {"mm_encoder_outputs": {"image": type(seen)(**output)}, **others}


def take_position_shift(model: PreTrainedModel) -> int:
    """How much the positions of what follows a picture differ from the count of tokens before it.

    Models that give a picture's tokens positions in two dimensions (Qwen-VL) keep that number on themselves after a
    prompt. It is taken away from the model, so that no other stream of tokens goes by it.
    """
    shift = getattr(model.base_model, "rope_deltas", None)
    if shift is None:
        return 0
    model.base_model.rope_deltas = None
    return int(shift.flatten()[0])  # all rows carry one picture


def _for_rows(value: Tensor | list | tuple, rows: int) -> Tensor | list:
    """What belongs to one picture, as it belongs to that picture in every row."""
    if isinstance(value, Tensor):
        return torch.cat([value] * rows)
    return [_for_rows(part, rows) for part in value]
