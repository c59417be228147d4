"""Attention by products and a softmax.

Torch's fused kernels have neither second derivatives nor forward formulas; its own composition
with dropout ends the process in forward mode under vmap.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Torch's composition without dropout; with it, dropout of the weights of a unit value."""

    def attention(value: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, **kwargs
            )

    if not dropout_p:
        return attention(value)
    if kwargs.get("enable_gqa"):
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    unit = torch.eye(key.shape[-2], dtype=key.dtype, device=key.device)
    return F.dropout(attention(unit.expand(*key.shape[:-1], -1)), dropout_p) @ value


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
