"""Central differences: derivatives that ask the function itself, whatever autograd says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._batched import Call
from funcjac._directions import Spec, basis, directions
from funcjac._linear import plain_values
from funcjac._passes import Jacobian
from funcjac._state import rng_state, set_rng_state

Moves = dict[int, Tensor]  # of inputs by their number
# For each output what differences say, and what was computed, each ``(B, *out)``.
Pair = tuple[Sequence[Tensor], Sequence[Tensor]]


def largest_difference(call: Call, result: Jacobian) -> float:
    """How far a result is from central differences, relative to its size."""
    spec = call.options.operator.spec
    worst = 0.0
    for ours, theirs in _PAIRS["jacobian" if spec is None else spec.kind](call, result, spec):
        for one, other in zip(ours, theirs):
            known = one.isfinite() & other.isfinite()  # nothing is known at a pole
            if one.numel() and not known.any():
                return math.nan
            if one.numel():
                size = other[known].abs().max().item() or 1.0
                worst = max(worst, ((one - other)[known].abs().max() / size).item())
    return worst


def _difference(call: Call, moves: Sequence[Moves]) -> list[Tensor]:
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


def _random(call: Call) -> Moves:
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = [torch.randn(x.shape, generator=generator, device="cpu") for x in call.inputs]
    return {j: t.to(x) for j, (t, x) in enumerate(zip(drawn, call.inputs))}


def _times(block: Tensor, t: Tensor, dim: int | None) -> Tensor:
    """``(B, ..., *in) . t``, with the batch of ``t`` at ``dim``: ``(B, ...)``."""
    batch, rows = len(block), t.unsqueeze(0) if dim is None else t.movedim(dim, 0)
    count = rows.shape[1:].numel()
    columns = rows.expand(batch, *rows.shape[1:]).reshape(batch, count, 1).to(block.dtype)
    shape = block.shape[: block.ndim - (rows.ndim - 1)]
    return (block.reshape(batch, shape[1:].numel(), count) @ columns).reshape(shape)


def _of_jacobian(call: Call, result: Jacobian, spec: Any) -> Iterator[Pair]:
    del spec
    ts, dims = _random(call), call.layout.diff_dims
    products = [
        [_times(block, ts[j], dim) for j, (block, dim) in enumerate(zip(blocks, dims))]
        for blocks in result.blocks
    ]
    yield _difference(call, [ts]), [sum(found[1:], found[0]) for found in products]


def _of_hessian(call: Call, result: Jacobian, spec: Any) -> Iterator[Pair]:
    del spec
    ts, dims = _random(call), call.layout.diff_dims
    n = len(dims)
    ours = []
    for blocks in result.blocks:
        found = [
            _times(_times(blocks[j * n + k], ts[k], dims[k]), ts[j], dims[j])
            for j in range(n)
            for k in range(n)
        ]
        ours.append(sum(found[1:], found[0]))
    yield _difference(call, [ts, ts]), ours


def _of_diagonal(call: Call, result: Jacobian, spec: Any) -> Iterator[Pair]:
    del spec
    for j, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
        found = [_difference(call, [{j: one}, {j: one}]) for one in basis(x, dim)]
        for i, blocks in enumerate(result.blocks):
            stack = torch.stack([piece[i] for piece in found], -1)
            yield [stack], [blocks[j].reshape(stack.shape)]


def _of_laplacian(call: Call, result: Jacobian, spec: Spec) -> Iterator[Pair]:
    total: list[Tensor] = []
    for j in range(len(call.inputs)):
        left, right, weights, _ = directions(call, spec, j, exact=True)
        right = left if right is None else right
        for one, two, weight in zip(left, right, weights):
            found = [weight * out for out in _difference(call, [{j: one}, {j: two}])]
            total = [a + b for a, b in zip(total, found)] if total else found
    yield total, [blocks[0] for blocks in result.blocks]


def _of_partials(call: Call, result: Jacobian, spec: Spec) -> Iterator[Pair]:
    every = basis(call.inputs[0], call.layout.diff_dims[0])
    for e, index in enumerate(spec.indices):
        found = _difference(call, [{0: every[i]} for i in index])
        yield found, [blocks[e] for blocks in result.blocks]


def _of_divergence(call: Call, result: Jacobian, spec: Spec) -> Iterator[Pair]:
    total = torch.zeros_like(result.blocks[0][0])
    for i, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
        if spec.samples is None:
            moves = list(basis(x, dim))
            rows = torch.eye(len(moves), dtype=x.dtype, device=x.device).unsqueeze(1)
        else:
            probes = call.extras[i].movedim(1, 0)  # (k, B, *row)
            moves = list(probes if dim in (0, None) else probes.movedim(1, dim + 1))
            rows = probes.reshape(len(probes), call.batch, -1) / len(probes) ** 0.5
            moves = [move / len(probes) ** 0.5 for move in moves]
        for move, row in zip(moves, rows):
            slope = _difference(call, [{i: move}])[i].reshape(call.batch, -1)
            total = total + (slope * row).sum(1)
    yield [total], [result.blocks[0][0]]


_PAIRS = {
    "jacobian": _of_jacobian,
    "hessian": _of_hessian,
    "diagonal": _of_diagonal,
    "laplacian": _of_laplacian,
    "partials": _of_partials,
    "divergence": _of_divergence,
}
