"""Simpler operations for those whose derivatives PyTorch gets wrong, or does not have.

They run in the place of Python's calls, before autograd sees anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from funcjac import _algebra, _native, _norms


class Composed(TorchFunctionMode):
    """Runs what is fragile as simpler operations, of which all derivatives are right."""

    def __torch_function__(self, func: Any, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        # The compiler cannot look up what belongs to classes, such as x ** y.
        known = _COMPOSED if torch.compiler.is_compiling() else _EVERY
        run: Any = known.get(func, func)
        if run is func or "out" in kwargs:
            return func(*args, **kwargs)
        name = next((name for name in ("input", "self", "A") if name in kwargs), None)
        if name is not None:
            kwargs = dict(kwargs)
            args = (kwargs.pop(name), *args)
        return run(*args, **kwargs)


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
        _norms.refuse_unless(attn_mask is None, "attn_mask should not be set with is_causal=True")
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
    """Where weights are asked for, no fused kernel runs; but rows that see nothing become NaN."""
    if not need_weights and not (args[10] and kwargs.get("training", True)):
        with sdpa_kernel(SDPBackend.MATH):
            return F.multi_head_attention_forward(*args, need_weights=False, **kwargs)
    found = F.multi_head_attention_forward(*args, need_weights=True, **kwargs)
    return found[0], found[1] if need_weights else None


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    del compute_mode
    _norms.refuse_unless(p >= 0, "cdist only supports non-negative p values")
    fits = min(x.ndim, y.ndim) > 1 and x.shape[-1] == y.shape[-1]
    _norms.refuse_unless(fits, "cdist needs matrices with the same number of columns")
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


def _as_strided_scatter(
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """Its backward takes what was overwritten for what was kept."""
    # The offset is that of the memory, in which ``x`` may begin later.
    start = 0 if storage_offset is None else storage_offset - x.storage_offset()
    if not x.is_contiguous() or start < 0:
        return torch.as_strided_scatter(x, src, size, stride, storage_offset)
    places = torch.arange(x.numel(), device=x.device).as_strided(size, stride, start)
    found = x.reshape(-1).index_put((places.reshape(-1),), src.reshape(-1).to(x.dtype))
    return found.reshape(x.shape)


def _max_unpool(dims: int, unpool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Where windows overlap, several numbers go to one place: only one has a derivative."""

    def run(x: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        like = unpool(x, indices, *args, **kwargs)
        places, values = indices.flatten(-dims), x.flatten(-dims)
        numbers = torch.arange(places.shape[-1], device=x.device).expand(places.shape)
        empty = torch.zeros_like(like).flatten(-dims)
        last = empty.long().scatter(-1, places, numbers)
        kept = last.gather(-1, places) == numbers
        return empty.scatter_add(-1, places, torch.where(kept, values, 0)).reshape(like.shape)

    return run


def _normal(mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    """The same draw, which moves with mean and deviation."""
    if args or not (isinstance(mean, Tensor) or isinstance(std, Tensor)):
        return torch.normal(mean, std, *args, **kwargs)
    if isinstance(std, Tensor):  # torch.vmap shows its values to operations alone: let one refuse
        torch.normal(0.0, std.detach(), generator=torch.Generator(std.device))
    elif std < 0:
        return torch.normal(mean, std)
    like = torch.as_tensor(mean) + torch.as_tensor(std)
    dtype = mean.dtype if isinstance(mean, Tensor) else std.dtype
    return (mean + std * torch.empty_like(like, dtype=dtype).normal_(**kwargs)).to(dtype)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """PyTorch's gradient takes the input for the output of ``log_softmax``.

    So that is what it is given, and what it changes is taken off again.
    """
    words = (targets, input_lengths, target_lengths, blank, "none", zero_infinity)
    found = F.ctc_loss(log_probs.log_softmax(-1), *words)
    sizes = log_probs.logsumexp(-1)  # (T, B), or (T,)
    lengths = torch.as_tensor(input_lengths, device=sizes.device).reshape(sizes.shape[1:])
    steps = torch.arange(len(sizes), device=sizes.device).view(-1, *[1] * (sizes.ndim - 1))
    counts = (steps < lengths) & ~((found == 0) & zero_infinity)
    found = found - torch.where(counts, sizes, 0).sum(0)
    if reduction == "mean":
        lengths = torch.as_tensor(target_lengths, device=sizes.device).reshape(found.shape)
        return (found / lengths.clamp_min(1)).mean()
    return found.sum() if reduction == "sum" else found


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
    F.layer_norm: _norms.layer_norm,
    torch.layer_norm: _norms.layer_norm,
    torch.native_layer_norm: _norms.native_layer_norm,
    F.instance_norm: _norms.instance_norm,
    F.group_norm: _norms.group_norm,
    torch.group_norm: _norms.group_norm,
    torch.native_group_norm: _norms.native_group_norm,
    F.batch_norm: _norms.batch_norm,
    torch.batch_norm: lambda *args, **kwargs: _norms.native_batch_norm(*args, **kwargs)[0],
    torch.native_batch_norm: _norms.native_batch_norm,
    _native.legit_batch_norm: _norms.legit_batch_norm,
    _native.updating_batch_norm: _norms.updating_batch_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _heads,
    torch.cdist: _cdist,
    _native.fused_weight_norm: _norms.weight_norm,
    getattr(F, "linear_cross_entropy", None): _linear_cross_entropy,  # new in PyTorch 2.13
    torch.select_scatter: _select_scatter,
    Tensor.select_scatter: _select_scatter,
    torch.as_strided_scatter: _as_strided_scatter,
    Tensor.as_strided_scatter: _as_strided_scatter,
    torch.normal: _normal,
    F.max_unpool1d: _max_unpool(1, F.max_unpool1d),
    F.max_unpool2d: _max_unpool(2, F.max_unpool2d),
    F.max_unpool3d: _max_unpool(3, F.max_unpool3d),
    F.ctc_loss: _ctc_loss,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
}
_EVERY: dict[Any, Any] = {
    **_COMPOSED,
    torch.pow: _algebra.power,
    Tensor.pow: _algebra.power,
    Tensor.__pow__: _algebra.power,
    Tensor.pow_: _algebra.pow_in_place,
    Tensor.__ipow__: _algebra.pow_in_place,
    torch.float_power: _algebra.float_power,
    Tensor.float_power: _algebra.float_power,
    torch.det: _algebra.det,
    Tensor.det: _algebra.det,
    torch.linalg.det: _algebra.det,
}
# Of these, even first derivatives may be wrong: gradients of statistics and of parameters of a
# draw are zero, batching rules and a backward are mistaken.
_SUSPECT: frozenset[Any] = frozenset(
    {
        torch.native_layer_norm,
        torch.native_group_norm,
        torch.native_batch_norm,
        torch.det,
        Tensor.det,
        torch.linalg.det,
        torch.select_scatter,
        Tensor.select_scatter,
        torch.as_strided_scatter,
        Tensor.as_strided_scatter,
        torch.normal,
        F.max_unpool1d,
        F.max_unpool2d,
        F.max_unpool3d,
        F.ctc_loss,
        getattr(F, "linear_cross_entropy", None),
    }
)
