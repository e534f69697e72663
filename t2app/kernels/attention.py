"""Attention in bfloat16 on a CPU: of one new token a row by a kernel, of a prompt by torch's."""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from t2app.kernels.build import WIDTH
from t2app.kernels.linear import needs_gradient

_NAME = "t2app"
_TORCHS = "sdpa"


def use_fast_attention(model: nn.Module) -> None:
    """Let a transformers model that attends by torch's `scaled_dot_product_attention` do so by `fast_attention`."""
    if not isinstance(model, PreTrainedModel) or model.config._attn_implementation != _TORCHS:
        return
    AttentionInterface.register(_NAME, fast_attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)


def attends_fast(attention: nn.Module) -> bool:
    """Whether a transformers attention does so by `fast_attention`."""
    return attention.config._attn_implementation == _NAME


def fast_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **others,
) -> tuple[Tensor, None]:
    """An attention function as transformers takes them: outputs (rows, tokens, heads, size).

    Args:
        query: (rows, heads, tokens, size).
        key, value: (rows, key heads, all tokens, size).
        attention_mask: true where a token is attended to (1 or rows, 1, tokens, all tokens), or None.
        others: what makes an attention another one; torch's then computes it.
    """
    if query.shape[2] == 1 and _is_plain(query, value, attention_mask, others):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.t2app.attend(query, key, value, attention_mask, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)


def _is_plain(query: Tensor, value: Tensor, mask: Tensor | None, others: dict) -> bool:
    size = query.shape[-1]
    plain_mask = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    grad = needs_gradient(query, value)
    changed = others.get("dropout") or others.get("position_bias") is not None or others.get("softcap") is not None
    return value.shape[-1] == size and size % WIDTH == 0 and plain_mask and not grad and not changed
