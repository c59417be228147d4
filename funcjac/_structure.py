"""What is known of operations: their structure, not their derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcjac._norms import native_batch_norm

# Linear in all that depends on the input. Whatever else they are given is added to the
# result or says where things go: as a tensor of numbers it counts as zero.
LINEAR = frozenset(
    """view _unsafe_view t transpose permute expand unsqueeze squeeze slice select diagonal
    alias detach clone unfold flip roll split split_with_sizes unbind sum mean neg cumsum tril triu
    repeat index index_select gather cat stack index_put scatter scatter_add
    index_add select_scatter slice_scatter diagonal_scatter select_backward slice_backward
    avg_pool2d avg_pool3d _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d
    upsample_linear1d upsample_bilinear2d upsample_bicubic2d reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d im2col col2im""".split()
)
# Overloads of these that write numbers, which a derivative does not have, or reduce.
NUMBERED = frozenset({"value", "reduce", "value_reduce", "int_Scalar"})
# Homogeneous in each of their first two arguments.
PRODUCTS = frozenset({"mul", "mm", "bmm", "mv", "dot", "convolution"})
# ``beta c + alpha a @ b``, and the product in it.
AFFINE = {"addmm": torch.ops.aten.mm.default, "baddbmm": torch.ops.aten.bmm.default}
# On each element by itself, although torch does not tag them so.
ELEMENTWISE = frozenset(
    """softplus_backward elu_backward hardswish hardswish_backward
    leaky_relu_backward hardtanh_backward log_sigmoid_backward""".split()
)

# Operations that are better taken apart, by PyTorch's own decompositions.
TAKEN_APART = frozenset(
    """_safe_softmax native_layer_norm native_group_norm std linalg_vector_norm
    _softmax_backward_data _log_softmax_backward_data _euclidean_dist _prelu_kernel addmv dist
    _scaled_dot_product_flash_attention_for_cpu""".split()
)


# Nothing can be propagated through these: their derivatives are wrong or NaN once more
# differentiated, or they are given statistics whose history autograd keeps to itself.
OBSTINATE = frozenset(
    """logcumsumexp _weight_norm_interface native_layer_norm_backward native_group_norm_backward
    native_batch_norm_backward""".split()
)
# Operations that PyTorch differentiates only once, or of which higher derivatives are wrong: all of
# a name, or one overload.
FRAGILE = frozenset(
    """pow.Tensor_Tensor pow_.Tensor
    native_layer_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm _cdist_forward
    _batch_norm_with_update
    native_group_norm_backward _weight_norm_interface native_group_norm select_scatter logcumsumexp
    _linear_cross_entropy_batch_chunked _linear_cross_entropy_batch_chunked_no_reduction
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention""".split()
)


@functools.cache
def is_mutable(op: Any) -> bool:
    return op._schema.is_mutable


@functools.cache
def out_of_place(op: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``; ``None`` where there is none."""
    space, name = op._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    if packet is None or not name.endswith("_"):
        return None
    # By arguments, not by name: to pow_.Scalar belongs pow.Tensor_Scalar.
    same = (getattr(packet, overload) for overload in packet.overloads())
    return next((one for one in same if _arguments(one) == _arguments(op)), None)


def _arguments(op: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


@functools.cache
def decomposition(op: Any) -> Callable[..., Any] | None:
    """What an operation does, as a function of simpler ones; ``None`` where none is wanted.

    PyTorch's table of decompositions is private: without it such operations count as ones
    of which nothing is known, and layer and batch norm, whose higher derivatives PyTorch gets
    wrong, fail verification.
    """
    name = op.overloadpacket.__name__
    own = _OWN.get(name)
    if own is not None or name not in TAKEN_APART:
        return own
    from torch import _decomp  # noqa: PLC0415  slow to import

    return _decomp.decomposition_table.get(op)


def _softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    found = (x - x.detach().amax(dim, keepdim=True)).exp()
    return found / found.sum(dim, keepdim=True)


def _log_softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    found = x - x.detach().amax(dim, keepdim=True)
    return found - found.exp().sum(dim, keepdim=True).log()


def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    largest = x.detach().amax(dim, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, 0)
    found = (x - largest).exp().sum(dim, keepdim=True).log() + largest
    return found if keepdim else found.squeeze(dim)


def _var(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    dims = dim or list(range(x.ndim))
    centred = x - x.mean(dims, keepdim=True)
    count = x.numel() // max(centred.mean(dims).numel(), 1)
    total = (centred * centred).sum(dims, keepdim=keepdim)
    return total / (count - (1 if correction is None else correction))


def _var_mean(x: Tensor, dim: Any = None, **words: Any) -> tuple[Tensor, Tensor]:
    dims = dim or list(range(x.ndim))
    return _var(x, dims, **words), x.mean(dims, keepdim=words.get("keepdim", False))


# Where PyTorch's decomposition differentiates more than there is, or has no simpler parts.
_OWN: dict[str, Callable[..., Any]] = {
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "logsumexp": _logsumexp,
    "var": _var,
    "var_mean": _var_mean,
    "native_batch_norm": native_batch_norm,
}
