"""Central differences: derivatives that ask the function itself, whatever autograd says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines.run import Derivatives, plain_values
from funcjac._environment.state import rng_state, set_rng_state

Moves = dict[int, Tensor]  # of inputs by their number
# For each output what differences say, and what was computed, each ``(B, *out)``.
Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


def largest_difference(call: Call, result: Derivatives) -> float:
    """How far a result is from central differences, relative to its size."""
    worst = 0.0
    for expected, computed in call.options.operator.differences(call, result):
        for one, other in zip(expected, computed):
            known = one.isfinite() & other.isfinite()  # nothing is known at a pole
            if one.numel() and not known.any():
                return math.nan
            if one.numel():
                size = other[known].abs().max().item() or 1.0
                worst = max(worst, ((one - other)[known].abs().max() / size).item())
    return worst


def difference(call: Call, moves: Sequence[Moves]) -> list[Tensor]:
    """The mixed derivative along ``moves``, of each output."""
    order = len(moves)
    inputs = call.inputs
    if not order:
        return plain_values(call)
    eps = max(torch.finfo(x.dtype).eps for x in inputs)
    size = max(
        1.0, *[x.abs().nan_to_num(0, 0, 0).max().item() if x.numel() else 0.0 for x in inputs]
    )
    h = eps ** (1 / (order + 2)) * size
    rng = rng_state()
    total: list[Tensor] = []
    for signs in itertools.product((1, -1), repeat=order):
        moved = list(inputs)
        for sign, move in zip(signs, moves):
            for j, along in move.items():
                moved[j] = moved[j] + sign * h * along
        set_rng_state(rng)
        sign = math.prod(signs)
        found = [sign * out / (2 * h) ** order for out in plain_values(call.with_inputs(moved))]
        total = [a + b for a, b in zip(total, found)] if total else found
    return total


def random_moves(call: Call) -> Moves:
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = [torch.randn(x.shape, generator=generator, device="cpu") for x in call.inputs]
    return {j: t.to(x) for j, (t, x) in enumerate(zip(drawn, call.inputs))}


def times(block: Tensor, t: Tensor, dim: int | None) -> Tensor:
    """``(B, ..., *in) . t``, with the batch of ``t`` at ``dim``: ``(B, ...)``."""
    batch, rows = len(block), t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    count = rows.shape[1:].numel()
    columns = rows.expand(batch, *rows.shape[1:]).reshape(batch, count, 1).to(block.dtype)
    shape = block.shape[: block.ndim - (rows.ndim - 1)]
    return (block.reshape(batch, shape[1:].numel(), count) @ columns).reshape(shape)
