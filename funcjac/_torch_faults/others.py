"""Scatters, draws, losses and a scan by simpler operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  its usual name


def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """Torch's batching rule of the backward mixes up dimensions."""
    torch.prelu(x.detach(), weight.detach())  # refuses what it cannot take
    shape = (-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else weight.shape
    return torch.where(x > 0, x, weight.view(shape if weight.numel() > 1 else ()) * x)


def select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Torch counts the gradient by ``src`` once for each of its entries, under vmap."""
    size = x.shape[dim]
    index = index % size if -size <= index < size else size  # which narrow refuses
    parts = [x.narrow(dim, 0, index), src.unsqueeze(dim % x.ndim).to(x.dtype)]
    return torch.cat([*parts, x.narrow(dim, index + 1, size - index - 1)], dim)


def as_strided_scatter(
    x: Tensor,
    src: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
) -> Tensor:
    """Torch's backward takes overwritten entries for the others."""
    # The offset is that of the memory, in which ``x`` may begin later.
    start = 0 if storage_offset is None else storage_offset - x.storage_offset()
    if not x.is_contiguous() or start < 0:
        return torch.as_strided_scatter(x, src, size, stride, storage_offset)
    places = torch.arange(x.numel(), device=x.device).as_strided(size, stride, start)
    out = x.reshape(-1).index_put((places.reshape(-1),), src.reshape(-1).to(x.dtype))
    return out.reshape(x.shape)


def max_unpool(dims: int, unpool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of numbers that go to one place the last one counts: torch gives all of them a gradient."""

    def run(x: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        like = unpool(x, indices, *args, **kwargs)
        places, values = indices.flatten(-dims), x.flatten(-dims)
        numbers = torch.arange(places.shape[-1], device=x.device).expand(places.shape)
        empty = torch.zeros_like(like).flatten(-dims)
        last = empty.long().scatter(-1, places, numbers)
        is_last = last.gather(-1, places) == numbers
        return empty.scatter_add(-1, places, torch.where(is_last, values, 0)).reshape(like.shape)

    return run


def normal(mean: Any, std: Any = 1.0, *args: Any, **kwargs: Any) -> Tensor:
    """The same draw, which moves with mean and deviation: torch's gradient of both is zero."""
    if args or not (isinstance(mean, Tensor) or isinstance(std, Tensor)):
        return torch.normal(mean, std, *args, **kwargs)
    size = torch.as_tensor(std).detach()
    torch.normal(0.0, size, generator=torch.Generator(size.device))  # refuses what is negative
    like, dtype = mean + size, mean.dtype if isinstance(mean, Tensor) else std.dtype
    return (mean + std * torch.empty_like(like, dtype=dtype).normal_(**kwargs)).to(dtype)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """Torch's gradient takes the input for the output of ``log_softmax``.

    So that is the input here, and the difference that it makes is subtracted again.
    """
    options = (targets, input_lengths, target_lengths, blank, "none", zero_infinity)
    losses = F.ctc_loss(log_probs.log_softmax(-1), *options)
    sizes = log_probs.logsumexp(-1)  # (T, B), or (T,)
    lengths = torch.as_tensor(input_lengths, device=sizes.device).reshape(sizes.shape[1:])
    steps = torch.arange(len(sizes), device=sizes.device).view(-1, *[1] * (sizes.ndim - 1))
    counts = (steps < lengths) & ~((losses == 0) & zero_infinity)
    losses = losses - torch.where(counts, sizes, 0).sum(0)
    if reduction == "mean":
        lengths = torch.as_tensor(target_lengths, device=sizes.device).reshape(losses.shape)
        return (losses / lengths.clamp_min(1)).mean()
    return losses.sum() if reduction == "sum" else losses


def linear_cross_entropy(*args: Any, options: Any = None, **kwargs: Any) -> Tensor:
    """Without chunks, of which torch's second derivatives are zero."""
    del options
    return F.linear_cross_entropy(*args, **kwargs)


def logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Torch's backward takes logarithms of the cotangent: once differentiated, NaN at zero."""
    if not x.ndim:
        return x.clone()
    rows = x.movedim(dim, -1)
    size = rows.shape[-1]
    is_seen = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
    out = torch.where(is_seen, rows.unsqueeze(-2), -math.inf).logsumexp(-1)
    return out.movedim(-1, dim)


def logaddexp(x: Tensor, other: Tensor) -> Tensor:
    """Torch's second derivative is NaN where the arguments are far apart."""
    dtype = (x + other).dtype  # Dynamo takes no result_type in what is recorded
    pair = torch.broadcast_tensors(x.to(dtype), other.to(dtype))
    return torch.stack(pair).logsumexp(0)


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """Torch has no second derivative."""
    out = F.relu6(x + 3) / 6
    return x.copy_(out) if inplace else out
