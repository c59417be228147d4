"""Central differences: derivatives that ask the function itself, whatever autograd says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines.run_func import Derivatives, plain_values
from funcjac._environment.state import rng_state, set_rng_state
from funcjac._verification.reference_vjp import RNG_SEED, random_like
from funcjac._verification.tolerance import largest

Moves = dict[int, Tensor]  # of inputs by their number
# For each output what differences say, and what was computed, each ``(B, *out)``.
Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


def largest_difference(call: Call, result: Derivatives) -> float:
    """How far a result is from central differences, relative to its size."""
    worst = 0.0
    for pair in call.options.operator.differences(call, result):
        for expected, computed in zip(*pair):
            known = expected.isfinite() & computed.isfinite()  # nothing is known at a pole
            if known.numel() and not known.any():
                return math.nan
            size = largest([computed[known]]) or 1.0
            worst = max(worst, largest([(expected - computed)[known]]) / size)
    return worst


def difference(call: Call, moves: Sequence[Moves]) -> list[Tensor]:
    """The mixed derivative along ``moves``, of each output."""
    order, inputs = len(moves), call.inputs
    if not order:
        return plain_values(call)
    eps = max(torch.finfo(x.dtype).eps for x in inputs)
    step = eps ** (1 / (order + 2)) * max(1.0, largest(inputs))
    rng = rng_state()
    terms: list[list[Tensor]] = []
    for signs in itertools.product((1, -1), repeat=order):
        moved = list(inputs)
        for sign, move in zip(signs, moves):
            for j, along in move.items():
                moved[j] = moved[j] + sign * step * along
        set_rng_state(rng)
        factor = math.prod(signs) / (2 * step) ** order
        terms.append([factor * out for out in plain_values(call.with_inputs(moved))])
    return [torch.stack(outs).sum(0) for outs in zip(*terms)]


def random_moves(call: Call) -> Moves:
    generator = torch.Generator("cpu").manual_seed(RNG_SEED)
    return {j: random_like(x, generator) for j, x in enumerate(call.inputs)}


def times(block: Tensor, t: Tensor, dim: int | None) -> Tensor:
    """``(B, ..., *in) . t``, with the batch of ``t`` at ``dim``: ``(B, ...)``."""
    rows = t.expand(len(block), *t.shape) if dim is None else t.movedim(dim, 0)
    shape, count = block.shape[: block.ndim - rows.ndim + 1], rows.shape[1:].numel()
    columns = rows.reshape(len(block), count, 1).to(block.dtype)
    return (block.reshape(len(block), shape[1:].numel(), count) @ columns).reshape(shape)
