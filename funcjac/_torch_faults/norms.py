"""Normalization by means and products.

Torch has the third reverse derivative of layer and batch norm wrong, the second one too where
cotangents are batched, and their forward formulas once these are differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._torch_faults.checks import refuse_unless, refuse_unless_shaped


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Torch: higher derivatives are wrong, see above."""
    del cudnn_enable
    return native_layer_norm(x, normalized_shape, weight, bias, eps)[0]


def native_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch: as ``layer_norm``; mean and deviation have no gradient."""
    shape = tuple(normalized_shape)
    fits = tuple(x.shape[-len(shape) :]) == shape
    refuse_unless(fits, f"Expected input of shape [*, {shape}], got {tuple(x.shape)}")
    refuse_unless_shaped(shape, weight=weight, bias=bias)
    out, mean, scale = _standardize(x, list(range(-len(shape), 0)), eps)
    out = out if weight is None else out * weight
    return (out if bias is None else out + bias).to(x.dtype), mean, scale


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
    """Torch: the gradient of the mean or the deviation alone is zero."""
    del channels, size
    message = "Expected number of channels in input to be divisible by num_groups"
    refuse_unless(x.shape[1] % num_groups == 0, message)
    groups = x.reshape(n, num_groups, math.prod(x.shape[1:]) // num_groups)
    out, mean, scale = _standardize(groups, [2], eps)
    out = _per_channel(out.reshape(x.shape), weight, bias).to(x.dtype)
    return out, mean.squeeze(2), scale.squeeze(2)


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
    """Torch runs it as batch norm, and has the same derivatives wrong."""
    stats = (running_mean, running_var)
    if not use_input_stats:
        return batch_norm(x, *stats, weight, bias, False, momentum, eps)
    if running_mean is not None or running_var is not None:
        torch.instance_norm(x.detach(), None, None, *stats, True, momentum, eps, False)
    return _per_channel(_standardize(x, list(range(2, x.ndim)), eps)[0], weight, bias).to(x.dtype)


def torch_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """``instance_norm`` with the arguments in the order of ``torch.instance_norm``."""
    del cudnn_enabled
    stats = (running_mean, running_var)
    return instance_norm(x, *stats, weight, bias, use_input_stats, momentum, eps)


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
    """Torch: higher derivatives are wrong, see above."""
    options = (training, momentum, eps)
    return tracked_batch_norm(x, weight, bias, running_mean, running_var, *options)[0]


def torch_batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    """``batch_norm`` with the arguments in the order of ``torch.batch_norm``."""
    return tracked_batch_norm(*args, **kwargs)[0]


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
    """The formula alone: running statistics stay where they are."""
    del momentum, cudnn_enabled
    if training or running_mean is None or running_var is None:
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        out, mean, scale = _standardize(x, [0, *range(2, x.ndim)], eps)
        return _per_channel(out, weight, bias).to(x.dtype), mean.flatten(), scale.flatten()
    refuse_unless_shaped(x.shape[1:2], running_mean=running_mean, running_var=running_var)
    wide = x.float() if x.dtype.itemsize < 4 else x
    scale = (running_var + eps).rsqrt()
    out = _per_channel(_per_channel(wide, None, -running_mean), scale, None)
    return _per_channel(out, weight, bias).to(x.dtype), x.new_zeros(0), x.new_zeros(0)


def tracked_batch_norm(
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
    """``native_batch_norm``, which moves the running statistics in training.

    Torch's own operation moves them, and refuses what it refuses: it writes into buffers below
    the levels of torch.func, which operations in place may not.
    """
    del cudnn_enabled
    stats = (running_mean, running_var)
    outs = native_batch_norm(x, weight, bias, *stats, training, momentum, eps)
    if training and (running_mean is not None or running_var is not None):
        torch.batch_norm(x.detach(), None, None, *stats, True, momentum, eps, False)
    return outs


def legit_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *args: Any) -> Any:
    """``tracked_batch_norm`` with running statistics, or without."""
    args = args if len(args) > 3 else (None, None, *args)
    return tracked_batch_norm(x, weight, bias, *args)


def updating_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``tracked_batch_norm`` in training, with the reserved memory of CUDA kernels, empty."""
    outs = tracked_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
    return *outs, x.new_zeros(0, dtype=torch.uint8)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Torch: the second reverse derivative is wrong where it is differentiated by ``v``."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _standardize(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Standardized over ``dims``, the mean, and one over the deviation; halves in float32."""
    x = x.float() if x.dtype.itemsize < 4 else x
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    scale = ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()
    return centered * scale, mean, scale


def _per_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``x (B, C, ...)`` times ``weight (C,)`` plus ``bias (C,)``."""
    refuse_unless_shaped(x.shape[1:2], weight=weight, bias=bias)
    shape = (-1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
