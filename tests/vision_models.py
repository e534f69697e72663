"""Small random vision-language checkpoints with processors of their own, built without the hub."""

import copy
from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3Processor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    PreTrainedTokenizerBase,
    Qwen2VLConfig,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION_CLASSES = ("idefics3", "qwen2_vl", "llava_next")
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The vision towers have more blocks than the language towers: the longest list of modules is the wrong one.
_VISION_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}


def save_vision_parts(kind: str, text: dict, tokenizer: PreTrainedTokenizerBase, folder: Path):
    """Write tokenizer and processor of a class of VISION_CLASSES to `folder`; returns the config of a model for them.

    Args:
        text: sizes of the language tower, as a Llama's config takes them.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if kind == "idefics3":
        tokens = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
        image_token = "<image>"
    elif kind == "qwen2_vl":
        tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        image_token = "<|image_pad|>"
    else:
        tokens = ["<image>"]
        image_token = "<image>"
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    picture = f"<|vision_start|>{image_token}<|vision_end|>" if kind == "qwen2_vl" else image_token
    tokenizer.chat_template = _CHAT.replace("IMAGE", picture)
    text = text | {"vocab_size": len(tokenizer), "pad_token_id": 0}
    vision = {**_VISION_SIZES, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}
    if kind == "idefics3":
        images = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        template = tokenizer.chat_template
        Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template).save_pretrained(folder)
        return Idefics3Config(
            vision_config=vision, text_config=LlamaConfig(**text), scale_factor=2, image_token_id=ids["<image>"]
        )
    if kind == "llava_next":
        pinpoints = [[32, 64], [64, 32], [64, 64]]
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        )
        LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=tokenizer.chat_template,
        ).save_pretrained(folder)
        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(**vision),
            text_config=LlamaConfig(**text),
            image_grid_pinpoints=pinpoints,
            image_token_index=ids["<image>"],
            image_token_id=ids["<image>"],
        )
    # Its processor cannot be made as a whole without the package that its part for videos needs.
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, min_pixels=16 * 16, max_pixels=16 * 16 * 24).save_pretrained(folder)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return Qwen2VLConfig(
        text_config=text | {"rope_parameters": rope, "bos_token_id": 1},
        vision_config={
            "depth": 4,
            "embed_dim": 32,
            "hidden_size": text["hidden_size"],
            "num_heads": 4,
            "patch_size": 8,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
