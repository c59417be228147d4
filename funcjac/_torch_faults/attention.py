"""Attention by products and a softmax.

Torch's fused kernels have neither second derivatives nor forward formulas; its own composition
with dropout ends the process in forward mode under vmap.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcjac._environment.torch_private import composed_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Torch's composition without dropout, and dropout of the weights that it returns."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # which it would add as numbers
        hidden = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = hidden.masked_fill(~attn_mask, -math.inf)
    out, weights = composed_attention(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
    if not dropout_p:
        return out
    if kwargs.get("enable_gqa"):
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return F.dropout(weights, dropout_p) @ value


def multi_head_attention_forward(
    *args: Any, need_weights: bool = True, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Where weights are asked for, no fused kernel runs; but rows that see nothing become NaN."""
    dropout_p = args[10] if len(args) > 10 else kwargs["dropout_p"]
    if not need_weights and not (dropout_p and kwargs.get("training", True)):
        with sdpa_kernel(SDPBackend.MATH):
            return F.multi_head_attention_forward(*args, need_weights=False, **kwargs)
    out, weights = F.multi_head_attention_forward(*args, need_weights=True, **kwargs)
    return out, weights if need_weights else None
