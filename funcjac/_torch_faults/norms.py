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

Maybe = Tensor | None
# The output, the mean, and one over the deviation.
Normalized = tuple[Tensor, Tensor, Tensor]


def native_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Normalized:
    """Torch gives the mean and the deviation no gradient."""
    del cudnn_enable
    shape = tuple(normalized_shape)
    if x.shape[-len(shape) :] != shape:
        return torch.native_layer_norm(x, shape, weight, bias, eps)  # refuses it
    _check_shapes(shape, weight=weight, bias=bias)
    out, mean, scale = _standardize(x, list(range(-len(shape), 0)), eps)
    return _affine(out, weight, bias).to(x.dtype), mean, scale


def layer_norm(*args: Any, **kwargs: Any) -> Tensor:
    return native_layer_norm(*args, **kwargs)[0]


def native_group_norm(
    x: Tensor, weight: Maybe, bias: Maybe, n: int, c: int, size: int, num_groups: int, eps: float
) -> Normalized:
    """Torch takes the gradient of the mean or the deviation alone for zero."""
    if x.shape[1] % num_groups:
        return torch.native_group_norm(x, weight, bias, n, c, size, num_groups, eps)  # refuses it
    groups = x.reshape(n, num_groups, math.prod(x.shape[1:]) // num_groups)
    out, mean, scale = _standardize(groups, [2], eps)
    out = _affine_per_channel(out.reshape(x.shape), weight, bias).to(x.dtype)
    return out, mean.squeeze(2), scale.squeeze(2)


def native_batch_norm(
    x: Tensor,
    weight: Maybe,
    bias: Maybe,
    running_mean: Maybe,
    running_var: Maybe,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
    move_statistics: bool = False,
) -> Normalized:
    """Running statistics stay as they are, unless ``move_statistics``."""
    del cudnn_enabled
    if training or running_mean is None or running_var is None:
        if x.numel() == x.shape[1]:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size {x.shape}"
            )
        out, mean, scale = _standardize(x, [0, *range(2, x.ndim)], eps)
        outs = _affine_per_channel(out, weight, bias).to(x.dtype), mean.flatten(), scale.flatten()
        if training and move_statistics:
            _move(torch.batch_norm, x, running_mean, running_var, momentum, eps)
        return outs
    _check_shapes(x.shape[1:2], running_mean=running_mean, running_var=running_var)
    out = _affine_per_channel(_as_wide(x), None, -running_mean)
    out = _affine_per_channel(out, (running_var + eps).rsqrt(), None)
    return _affine_per_channel(out, weight, bias).to(x.dtype), x.new_zeros(0), x.new_zeros(0)


def tracked_batch_norm(*args: Any, **kwargs: Any) -> Normalized:
    """``native_batch_norm``, which moves the running statistics in training."""
    return native_batch_norm(*args, **kwargs, move_statistics=True)


def torch_batch_norm(*args: Any, **kwargs: Any) -> Tensor:
    return tracked_batch_norm(*args, **kwargs)[0]


def batch_norm(x, running_mean, running_var, weight=None, bias=None, *args, **kwargs) -> Tensor:
    """``torch_batch_norm`` with the arguments in the order of ``torch.nn.functional``."""
    return torch_batch_norm(x, weight, bias, running_mean, running_var, *args, **kwargs)


def legit_batch_norm(x: Tensor, weight: Maybe, bias: Maybe, *args: Any) -> Normalized:
    """``tracked_batch_norm`` with running statistics, or without."""
    args = args if len(args) > 3 else (None, None, *args)
    return tracked_batch_norm(x, weight, bias, *args)


def updating_batch_norm(x, weight, bias, running_mean, running_var, *args, **kwargs) -> Any:
    """``tracked_batch_norm`` in training, with the reserved memory of CUDA kernels, empty."""
    outs = tracked_batch_norm(x, weight, bias, running_mean, running_var, True, *args, **kwargs)
    return *outs, x.new_zeros(0, dtype=torch.uint8)


def instance_norm(
    x: Tensor,
    running_mean: Maybe = None,
    running_var: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Torch runs it as batch norm, with the same derivatives wrong."""
    del cudnn_enabled
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    _move(torch.instance_norm, x, running_mean, running_var, momentum, eps)
    out = _standardize(x, list(range(2, x.ndim)), eps)[0]
    return _affine_per_channel(out, weight, bias).to(x.dtype)


def torch_instance_norm(x, weight, bias, running_mean, running_var, *args, **kwargs) -> Tensor:
    """``instance_norm`` with the arguments in the order of ``torch.instance_norm``."""
    return instance_norm(x, running_mean, running_var, weight, bias, *args, **kwargs)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Torch has the second reverse derivative by ``v`` wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _standardize(x: Tensor, dims: list[int], eps: float) -> Normalized:
    x = _as_wide(x)
    mean = x.mean(dims, keepdim=True)
    centered = x - mean
    scale = ((centered * centered).mean(dims, keepdim=True) + eps).rsqrt()
    return centered * scale, mean, scale


def _as_wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _move(norm: Any, x: Tensor, mean: Maybe, var: Maybe, momentum: float, eps: float) -> None:
    """Move running statistics, if there are some, and refuse what ``norm`` of torch refuses.

    It writes into buffers below the levels of torch.func, which operations in place may not.
    """
    if mean is not None or var is not None:
        norm(x.detach(), None, None, mean, var, True, momentum, eps, False)


def _affine_per_channel(x: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    """``x (B, C, ...)`` times ``weight (C,)`` plus ``bias (C,)``."""
    _check_shapes(x.shape[1:2], weight=weight, bias=bias)
    shape = (-1, *[1] * (x.ndim - 2))
    weight, bias = (None if part is None else part.view(shape) for part in (weight, bias))
    return _affine(x, weight, bias)


def _affine(x: Tensor, weight: Maybe, bias: Maybe) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _check_shapes(shape: Sequence[int], **tensors: Maybe) -> None:
    """Raise for shapes that torch refuses, and simpler operations would broadcast.

    Raises:
        RuntimeError: as PyTorch does.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise RuntimeError(f"Expected {name} to be of shape {tuple(shape)}")
