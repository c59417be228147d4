"""Structure of PyTorch's operations: which are linear, products, elementwise, or taken apart.

No derivatives are listed: those come from PyTorch's own reverse-mode formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Linear in every argument that depends on the input. Other arguments are offsets, which count
# as zero in a derivative, or say where entries go.
LINEAR = frozenset(
    """view _unsafe_view t transpose permute expand unsqueeze squeeze slice select diagonal
    alias detach clone unfold flip roll split split_with_sizes unbind sum mean neg cumsum tril triu
    repeat index index_select gather cat stack index_put scatter scatter_add
    index_add select_scatter slice_scatter diagonal_scatter select_backward slice_backward
    avg_pool2d avg_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d im2col col2im""".split()
)
# Linear ones whose second argument is one dimension or several.
ALONG_DIMENSIONS = frozenset("select unsqueeze squeeze unbind sum mean cat stack".split())
# Overloads of these that write numbers, which a derivative does not have, or reduce.
NUMBERED = frozenset({"value", "reduce", "value_reduce", "int_Scalar"})
# Bilinear in their first two arguments.
PRODUCTS = frozenset({"mul", "mm", "bmm", "mv", "dot", "convolution"})
# ``beta c + alpha a @ b``.
AFFINE = frozenset({"addmm", "baddbmm"})
# Elementwise, although torch does not tag them so.
ELEMENTWISE = frozenset(
    """softplus_backward elu_backward hardswish hardswish_backward
    leaky_relu_backward hardtanh_backward log_sigmoid_backward _prelu_kernel""".split()
)
# Impassable: derivatives of their derivatives are wrong or NaN, autograd hides the history of the
# statistics that they take, or they go by memory, which copies do not have.
OBSTINATE = frozenset(
    """as_strided logcumsumexp _weight_norm_interface native_layer_norm_backward
    native_group_norm_backward native_batch_norm_backward""".split()
)


def _softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    return _log_softmax(x, dim).exp()


def _log_softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    return x - _logsumexp(x, dim, True)


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    largest = x.detach().amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    result = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return result if keepdim else result.squeeze(dim)


def _var(x: Tensor, dim: Any = None, *, correction: Any = 1, keepdim: bool = False) -> Tensor:
    dims = dim or list(range(x.ndim))
    centered = x - x.mean(dims, keepdim=True)
    total = (centered * centered).sum(dims, keepdim=keepdim)
    return total / (x.numel() // max(total.numel(), 1) - (1 if correction is None else correction))


# By simpler operations, which take less than one of unknown structure.
DECOMPOSITIONS: dict[str, Callable[..., Any]] = {
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "var": _var,
}
