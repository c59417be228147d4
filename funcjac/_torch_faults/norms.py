"""Normalization by means and products.

Torch has the third reverse derivative of layer and batch norm wrong, the second one too where
cotangents are batched, and their forward formulas once these are differentiated again. Instance
norm runs as batch norm. Torch's own functions still refuse what they refuse, and move and return
statistics, without a graph: the output alone is computed here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name

from funcjac._environment.torch_private import updating_batch_norm

Maybe = Tensor | None


def _with_output(formula: Callable[..., Tensor], norm: Any, names: str) -> Callable[..., Any]:
    """``norm``, whose arguments have these ``names``, with the output of ``formula``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        outs = norm(*map(_detached, args), **{k: _detached(x) for k, x in kwargs.items()})
        out = formula(**dict(zip(names.split(), args)), **kwargs)
        if isinstance(outs, Tensor):
            return out.to(outs.dtype)
        return out.to(outs[0].dtype), *outs[1:]

    return run


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, **_) -> Tensor:
    return _affine(_standardize(input, list(range(-len(normalized_shape), 0)), eps), weight, bias)


def _batch_norm(*, training: bool = False, **named: Any) -> Tensor:
    dims = [0, *range(2, named["input"].ndim)]
    return _by_channel(dims if training else [], **named)


def _instance_norm(*, use_input_stats: bool = True, **named: Any) -> Tensor:
    dims = list(range(2, named["input"].ndim))
    return _by_channel(dims if use_input_stats else [], **named)


def _by_channel(
    dims, input, running_mean=None, running_var=None, weight=None, bias=None, eps=1e-5, **_
) -> Tensor:
    """With statistics of ``dims``, or running ones."""
    shape = (-1, *[1] * (input.ndim - 2))
    parts = (running_mean, running_var, weight, bias)
    mean, var, weight, bias = (None if part is None else part.view(shape) for part in parts)
    if dims or mean is None or var is None:
        return _affine(_standardize(input, dims, eps), weight, bias)
    return _affine((_as_wide(input) - mean) * (var + eps).rsqrt(), weight, bias)


def _standardize(x: Tensor, dims: list[int], eps: float) -> Tensor:
    x = _as_wide(x)
    centered = x - x.mean(dims, keepdim=True)
    return centered * ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()


def _as_wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _affine(x: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


_STATISTICS = "input running_mean running_var weight bias {} momentum eps"
_WEIGHTS = "input weight bias running_mean running_var {} momentum eps cudnn_enabled"
_LAYER = "input normalized_shape weight bias eps cudnn_enable"
LAYER_NORMS = {
    norm: _with_output(_layer_norm, norm, _LAYER)
    for norm in (F.layer_norm, torch.layer_norm, torch.native_layer_norm)
}
BATCH_NORMS = {
    norm: _with_output(formula, norm, names.format(flag))
    for formula, flag, norm, names in (
        (_batch_norm, "training", F.batch_norm, _STATISTICS),
        (_batch_norm, "training", torch.batch_norm, _WEIGHTS),
        (_batch_norm, "training", torch.native_batch_norm, _WEIGHTS),
        (_instance_norm, "use_input_stats", F.instance_norm, _STATISTICS),
        (_instance_norm, "use_input_stats", torch.instance_norm, _WEIGHTS),
        (functools.partial(_batch_norm, training=True), "", updating_batch_norm, _WEIGHTS),
    )
}
_moving_batch_norm = BATCH_NORMS[torch.native_batch_norm]


def legit_batch_norm(x: Tensor, weight: Maybe, bias: Maybe, *args: Any) -> Any:
    """With running statistics, or without."""
    return _moving_batch_norm(x, weight, bias, *(args if len(args) > 3 else (None, None, *args)))


def native_group_norm(
    x: Tensor, weight: Maybe, bias: Maybe, n: int, c: int, size: int, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch takes the gradient of the mean or the deviation alone for zero."""
    out, _, _ = torch.native_group_norm(x, weight, bias, n, c, size, groups, eps)
    rows = _as_wide(x).reshape(n, groups, c // groups * size)
    return out, rows.mean(2), (rows.var(2, correction=0) + eps).rsqrt()


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Torch has the second reverse derivative by ``v`` wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
