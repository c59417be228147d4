"""The one rule by which a result and a reference count as equal.

NOTE [Tolerance]
An error is rounding up to the square root of the dtype's epsilon times the terms that a number is
a sum of, and ``_ROUNDINGS`` epsilons of what was subtracted on the way to it, its floor: first
outputs and gradients of the row; once rows are known to be apart, whatever the graph keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from funcjac._engines.run_func import Run, graph_nodes

_ROUNDINGS = 64  # that add up on the way to a derivative


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Relative difference up to which results of these dtypes count as equal."""
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


def tolerance_of(run: Run) -> float:
    """The same for all dtypes that a run computes in."""
    dtypes = {tensor.dtype for tensor in (*run.inputs, *run.output.leaves)}
    for node in graph_nodes(run.output.leaves, run.inputs):
        dtypes |= {metadata.dtype for metadata in node._input_metadata}
    return tolerance(dtype for dtype in dtypes if dtype.is_floating_point)


def bound(limit: float, scale: Any, floor: Any) -> Any:
    """The largest error that is rounding, of numbers or tensors; ``limit`` is the tolerance."""
    return limit * scale + _ROUNDINGS * limit**2 * floor


def error_of(computed: Tensor, reference: Tensor) -> Tensor:
    """How far off a result is where the reference is finite; infinite where it is nan."""
    error = (computed - reference).abs().nan_to_num(torch.inf, torch.inf)
    return torch.where(reference.isfinite(), error, 0)


def error_and_size(computed: Tensor, reference: Tensor) -> tuple[float, float]:
    """The largest error, and the largest number of the reference."""
    if not reference.numel():
        return 0.0, 0.0
    error = vector_norm(computed - reference, math.inf).item()
    if math.isfinite(error):  # then all numbers are
        return error, vector_norm(reference, math.inf).item()
    return error_of(computed, reference).max().item(), largest([reference])


def is_alike(tensor: Tensor, reference: Tensor, limit: float, floor: float = 0.0) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    if tensor.dtype != reference.dtype or tensor.shape != reference.shape:
        return False
    atol = bound(limit, largest([tensor]), floor)
    return torch.allclose(tensor.double(), reference.double(), limit, atol, equal_nan=True)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in a dtype that can be compared."""
    return tensor if tensor.dtype in (torch.float64, torch.float32) else tensor.float()


def magnitude(tensor: Tensor) -> Tensor:
    """Absolute values, zero where they are not finite."""
    return wide(tensor.detach()).abs().nan_to_num(0, 0, 0)


def largest(tensors: Iterable[Tensor]) -> float:
    """The largest finite absolute value, 0.0 for none."""
    return max([magnitude(x).max().item() for x in tensors if x.numel()], default=0.0)


def saved_tensors(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """What the graph from ``inputs`` to ``roots`` keeps."""
    for node in graph_nodes(roots, inputs):
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, Tensor) and value.is_floating_point():
                yield value
