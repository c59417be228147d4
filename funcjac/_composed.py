"""Simpler operations for those whose derivatives PyTorch gets wrong, or does not have.

They run in the place of Python's calls, before autograd sees anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name
from torch.overrides import TorchFunctionMode

from funcjac._native import fused_weight_norm


class Composed(TorchFunctionMode):
    """Runs what is fragile as simpler operations, of which all derivatives are right."""

    def __torch_function__(self, func: Any, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        run: Any = _COMPOSED.get(func, func)
        return run(*args, **(kwargs or {}))


class Suspects(TorchFunctionMode):
    """Notes whether anything runs of which even first derivatives may be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen = self.seen or func in _SUSPECT or _drops(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _drops(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it is attention with dropout: PyTorch's own dies in forward mode."""
    if func is F.scaled_dot_product_attention:
        return bool(args[4] if len(args) > 4 else kwargs.get("dropout_p"))
    return (
        func is F.multi_head_attention_forward and bool(args[10]) and kwargs.get("training", True)
    )


# --- normalisation ------------------------------------------------------------------------


def standardized(x: Tensor, dims: list[int], eps: float) -> Tensor:
    return _moments(x, dims, eps)[0]


def _moments(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized over ``dims``, the mean, and one over the deviation."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    return centred * scale, mean, scale


def _scaled(found: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """With a weight and a bias for each channel."""
    shape = (-1, *[1] * (found.ndim - 2))
    found = found if weight is None else found * weight.view(shape)
    return found if bias is None else found + bias.view(shape)


def _native_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    found, mean, scale = _moments(x, list(range(-len(normalized_shape), 0)), eps)
    found = found if weight is None else found * weight
    return found if bias is None else found + bias, mean, scale


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    return _native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scaled(standardized(x, list(range(2, x.ndim)), eps), weight, bias)


def _native_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    n: int,
    channels: int,
    size: int,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    del channels, size
    found, mean, scale = _moments(x.reshape(n, num_groups, -1), [2], eps)
    return _scaled(found.reshape(x.shape), weight, bias), mean.squeeze(2), scale.squeeze(2)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    del cudnn_enabled
    return _native_group_norm(x, weight, bias, x.shape[0], 0, 0, num_groups, eps)[0]


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    words = (training, momentum, eps)
    return _native_batch_norm(x, weight, bias, running_mean, running_var, *words)[0]


def _native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Running statistics stay: they would be put back in any case."""
    del momentum, cudnn_enabled
    if training or running_mean is None or running_var is None:
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        found, mean, scale = _moments(x, [0, *range(2, x.ndim)], eps)
        return _scaled(found, weight, bias), mean.flatten(), scale.flatten()
    scale = (running_var + eps).rsqrt()
    found = _scaled(_scaled(x, None, -running_mean), scale, None)
    return _scaled(found, weight, bias), x.new_zeros(0), x.new_zeros(0)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


# --- the rest -----------------------------------------------------------------------------


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By products and a softmax, which have all derivatives."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        is_seen = attn_mask.dtype == torch.bool
        scores = torch.where(attn_mask, scores, -math.inf) if is_seen else scores + attn_mask
        blind = (scores == -math.inf).all(-1, keepdim=True)  # sees nothing: zero, not NaN
        weights = torch.where(blind, 0, torch.where(blind, 0, scores).softmax(-1))
    return F.dropout(weights, dropout_p, dropout_p > 0) @ value


def _heads(*args: Any, need_weights: bool = True, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Where weights are asked for, no fused kernel runs."""
    found = F.multi_head_attention_forward(*args, need_weights=True, **kwargs)
    return found[0], found[1] if need_weights else None


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    del compute_mode
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1)


def _linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """Not in chunks, whose second derivatives are zero."""
    del options
    return F.linear_cross_entropy(*args, **kwargs)


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Its batching rule has a wrong gradient."""
    size = x.shape[dim]
    index = index % size if -size <= index < size else size  # which narrow refuses
    parts = [x.narrow(dim, 0, index), src.unsqueeze(dim % x.ndim).to(x.dtype)]
    return torch.cat([*parts, x.narrow(dim, index + 1, size - index - 1)], dim)


def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Its backward takes logarithms of the cotangent, and so has no derivative where that is 0."""
    if not x.ndim:
        return x.clone()
    rows = x.movedim(dim, -1)
    size = rows.shape[-1]
    seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    found = torch.where(seen, rows.unsqueeze(-2), -math.inf).logsumexp(-1)
    return found.movedim(-1, dim)


_COMPOSED: dict[Any, Any] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    torch.native_group_norm: _native_group_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: lambda *args, **kwargs: _native_batch_norm(*args, **kwargs)[0],
    torch.native_batch_norm: _native_batch_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _heads,
    torch.cdist: _cdist,
    fused_weight_norm: _weight_norm,
    getattr(F, "linear_cross_entropy", None): _linear_cross_entropy,  # new in PyTorch 2.13
    torch.select_scatter: _select_scatter,
    Tensor.select_scatter: _select_scatter,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
}
# Gradients of the statistics are not there, batching rules are wrong.
_SUSPECT: frozenset[Any] = frozenset(
    {
        torch.native_layer_norm,
        torch.native_group_norm,
        torch.native_batch_norm,
        torch.select_scatter,
        Tensor.select_scatter,
        getattr(F, "linear_cross_entropy", None),
    }
)
