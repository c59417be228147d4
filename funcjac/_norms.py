"""Normalisation by simpler operations, of which all derivatives are right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def _moments(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized over ``dims``, the mean, and one over the deviation; halves in float32."""
    x = x.float() if x.dtype.itemsize < 4 else x
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = ((centred * centred).mean(dims, keepdim=True) + eps).rsqrt()
    return centred * scale, mean, scale


def refuse_unless(fits: bool, words: str) -> None:
    """What the operation itself would refuse, and a simpler one might stretch.

    Raises:
        RuntimeError: as PyTorch does.
    """
    if not fits:
        raise RuntimeError(words)


def _refuse_unless_alike(shape: Sequence[int], **given: Tensor | None) -> None:
    for name, one in given.items():
        fits = one is None or tuple(one.shape) == tuple(shape)
        refuse_unless(fits, f"Expected {name} to be of shape {tuple(shape)}")


def _scaled(found: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """With a weight and a bias for each channel."""
    _refuse_unless_alike(found.shape[1:2], weight=weight, bias=bias)
    shape = (-1, *[1] * (found.ndim - 2))
    found = found if weight is None else found * weight.view(shape)
    return found if bias is None else found + bias.view(shape)


def native_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = tuple(normalized_shape)
    fits = tuple(x.shape[-len(shape) :]) == shape
    refuse_unless(fits, f"Expected input of shape [*, {shape}], got {tuple(x.shape)}")
    _refuse_unless_alike(shape, weight=weight, bias=bias)
    found, mean, scale = _moments(x, list(range(-len(shape), 0)), eps)
    found = found if weight is None else found * weight
    return (found if bias is None else found + bias).to(x.dtype), mean, scale


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    return native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


def instance_norm(
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
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _scaled(_moments(x, list(range(2, x.ndim)), eps)[0], weight, bias).to(x.dtype)


def native_group_norm(
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
    words = "Expected number of channels in input to be divisible by num_groups"
    refuse_unless(x.shape[1] % num_groups == 0, words)
    groups = x.reshape(n, num_groups, math.prod(x.shape[1:]) // num_groups)
    found, mean, scale = _moments(groups, [2], eps)
    whole = _scaled(found.reshape(x.shape), weight, bias).to(x.dtype)
    return whole, mean.squeeze(2), scale.squeeze(2)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    del cudnn_enabled
    return native_group_norm(x, weight, bias, x.shape[0], 0, 0, num_groups, eps)[0]


def batch_norm(
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
    return native_batch_norm(x, weight, bias, running_mean, running_var, *words)[0]


def native_batch_norm(
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
        return _scaled(found, weight, bias).to(x.dtype), mean.flatten(), scale.flatten()
    _refuse_unless_alike(x.shape[1:2], running_mean=running_mean, running_var=running_var)
    wide = x.float() if x.dtype.itemsize < 4 else x
    scale = (running_var + eps).rsqrt()
    found = _scaled(_scaled(wide, None, -running_mean), scale, None)
    return _scaled(found, weight, bias).to(x.dtype), x.new_zeros(0), x.new_zeros(0)


def legit_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *words: Any) -> Any:
    """With running statistics, or without."""
    words = words if len(words) > 3 else (None, None, *words)
    return native_batch_norm(x, weight, bias, *words)


def updating_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    return *found, x.new_zeros(0, dtype=torch.uint8)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))
