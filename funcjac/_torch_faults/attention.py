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


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Softmax of ``scale * query @ key.mT``, times ``value``; zero where the mask hides all."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("attn_mask should not be set with is_causal=True")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        is_visible = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, -math.inf) if is_visible else scores + attn_mask
        is_blind = (scores == -math.inf).all(-1, keepdim=True)
        weights = torch.where(is_blind, 0, torch.where(is_blind, 0, scores).softmax(-1))
    return F.dropout(weights, dropout_p, dropout_p > 0) @ value


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
