"""Second derivatives by nesting two differentiations, in any of four ways."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._batched import Call, Layout, Output
from funcjac._directions import basis
from funcjac._jets import Index
from funcjac._linear import Context, detached
from funcjac._modes import Route
from funcjac._native import is_transformed
from funcjac._passes import Jacobian, jacobian
from funcjac._state import rng_state, set_rng_state

Blocks = list[list[Tensor]]


def reframed(
    call: Call, func: Callable[..., Any], inputs: Sequence[Tensor], dims: tuple[int | None, ...]
) -> Call:
    """A call of ``func(*inputs) -> (outputs, aux)``, all inputs differentiated."""
    every = tuple(range(len(inputs)))
    batched = tuple(i for i in every if dims[i] is not None)
    spec = _tree.flatten(())[1]
    layout = Layout(spec, dims, batched, every, spec, plain=True)
    options = replace(call.options, in_dims=0, out_dims=0, has_aux=True)
    return Call(func, options, layout, list(inputs), {}, call.batch)


def jacobian_of_jacobian(
    call: Call,
    route: Route,
    context: Context,
    inner: tuple[Sequence[Tensor], tuple[int | None, ...]],
    outer: tuple[Sequence[Tensor], tuple[int | None, ...]],
    func: Callable[[Sequence[Tensor], Sequence[Tensor]], Output],
) -> tuple[Jacobian, Blocks, Output]:
    """Differentiate ``func(inner, outer)`` by ``inner`` and then by ``outer``, at their values.

    Returns:
        The outer Jacobian, whose outputs are the inner blocks one after the other; the inner
        blocks; and what ``func`` returned.
    """
    outer_mode, inner_mode = route.mode.split("_over_")
    within = Route("sum", inner_mode, route.chunk, route.vectorized, route.transposed)

    def first(*moved: Tensor) -> tuple[list[Tensor], Any]:
        def value(*xs: Tensor) -> tuple[list[Tensor], Any]:
            output = func(xs, moved)
            return output.leaves, (output.spec, output.aux)

        at = Context(functional=is_transformed(), graph=True)
        found = jacobian(reframed(call, value, *inner), within, at)
        return [b for blocks in found.blocks for b in blocks], (
            found.output.leaves,
            found.output.aux,
        )

    second = Route("sum", outer_mode, route.chunk, route.vectorized, route.transposed)
    found = jacobian(reframed(call, first, *outer), second, context)
    leaves, (spec, aux) = found.output.aux
    count = len(inner[0])
    flat = found.output.leaves
    blocks = [flat[i * count : (i + 1) * count] for i in range(len(leaves))]
    output = Output(list(leaves), spec, aux)
    return found, blocks, output


def hessian_blocks(call: Call, route: Route, context: Context) -> tuple[Any, Blocks, Output]:
    """``H[i][j][k]`` and ``J[i][j]``; blocks below the diagonal are those above it, transposed."""
    call = call._replace(composed=True)  # whatever func comes to do later
    inputs, dims = call.inputs, call.layout.diff_dims
    replay = rng_state() if call.options.randomness != "error" else None
    bands, jac, output = [], [], None
    for j in range(len(inputs)):
        if replay is not None:
            set_rng_state(replay)  # every block sees the same draws
        zero = ((torch.zeros_like(inputs[j]),), dims[j : j + 1])
        rest = (inputs[j:], dims[j:])
        func = functools.partial(_moved, call, j)
        found, blocks, output = jacobian_of_jacobian(call, route, context, zero, rest, func)
        bands.append(found.blocks)
        jac.append(blocks)
    assert output is not None
    ranks = [x.ndim - (dim is not None) for x, dim in zip(inputs, dims)]
    hess = [
        _square([band[i] for band in bands], out.ndim, ranks) for i, out in enumerate(output.leaves)
    ]
    return hess, [[b for blocks in jac for b in blocks[i]] for i in range(len(hess))], output


def _moved(call: Call, j: int, shift: Sequence[Tensor], given: Sequence[Tensor]) -> Output:
    """``call`` with inputs from ``j`` on given, the first of them moved."""
    return call([*call.inputs[:j], given[0] + shift[0], *given[1:]])


def _square(bands: list[list[Tensor]], start: int, ranks: list[int]) -> Blocks:
    """``H[j][k]`` from ``bands[j][k - j]``."""

    def block(j: int, k: int) -> Tensor:
        return bands[j][k - j] if k >= j else swapped(bands[k][j - k], start, start + ranks[k])

    return [[block(j, k) for k in range(len(bands))] for j in range(len(bands))]


def swapped(block: Tensor, start: int, middle: int) -> Tensor:
    """``(B, *out, *one, *two) -> (B, *out, *two, *one)``."""
    order = [*range(start), *range(middle, block.ndim), *range(start, middle)]
    return block.permute(order).contiguous()


def second_along(
    call: Call, route: Route, context: Context, j: int, left: Tensor, right: Tensor
) -> tuple[list[Tensor], list[Tensor], Output]:
    """First derivatives along ``left`` and second ones along pairs, each ``(K, B, *out)``."""
    call = call._replace(composed=True)  # whatever func comes to do later
    x, dim = call.inputs[j], call.layout.diff_dims[j]

    def func(one: Sequence[Tensor], two: Sequence[Tensor]) -> Output:
        moved = x + _shift(one[0], left, dim) + _shift(two[0], right, dim)
        return call([*call.inputs[:j], moved, *call.inputs[j + 1 :]])

    zeros = ((x.new_zeros(call.batch, len(left)),), (0,))
    found, blocks, output = jacobian_of_jacobian(call, route, context, zeros, zeros, func)
    firsts = [block.movedim(-1, 0) for (block,) in blocks]
    seconds = [block.diagonal(0, -2, -1).movedim(-1, 0) for (block,) in found.blocks]
    return firsts, seconds, output


def _shift(steps: Tensor, along: Tensor, dim: int | None) -> Tensor:
    """``sum_r steps[b, r] along[r]``, in the form of the input."""
    if dim is None:
        return torch.tensordot(steps[0], along, 1)
    shape = [len(along)] + [1] * (along.ndim - 1)
    shape[dim + 1] = steps.shape[0]
    return (steps.mT.reshape(shape) * along).sum(0)


def partials_along(
    call: Call, route: Route, context: Context, indices: Sequence[Index]
) -> tuple[dict[Index, list[Tensor]], Output]:
    """Mixed derivatives by ``(B, d)``, of each sorted index: an order nested in the next.

    What is differentiated further is so once, by all coordinates.
    """
    call = call._replace(composed=True)
    x, dim = call.inputs[0], call.layout.diff_dims[0]
    level = Route("sum", route.mode, 1, vectorized=False, transposed=route.transposed)
    orders = _by_order(indices)

    def at(shift: Tensor, order: int, here: Context) -> tuple[dict[Index, list[Tensor]], Output]:
        if not order:
            output = call([x + shift])
            return {(): output.leaves}, output
        further = orders[order - 1]
        used = sorted({entry for entries in further.values() for entry in entries})
        along = basis(x, dim, used)

        def func(steps: Tensor) -> tuple[list[Tensor], Any]:
            inside = Context(functional=is_transformed(), graph=True)
            known, output = at(shift + _shift(steps, along, dim), order - 1, inside)
            outs = [leaf for index in further for leaf in known[index]]
            return outs, (known, output.leaves, output.spec, output.aux)

        zeros = x.new_zeros(call.batch, len(used))
        found = jacobian(reframed(call, func, [zeros], (0,)), level, here)
        known, leaves, spec, aux = found.output.aux
        blocks = iter(found.blocks)
        for index, entries in further.items():
            slopes = [next(blocks)[0] for _ in leaves]
            for entry in entries:
                place = used.index(entry)
                known[tuple(sorted((*index, entry)))] = [s.select(-1, place) for s in slopes]
        return known, Output(list(leaves), spec, aux)

    known, output = at(torch.zeros_like(x), len(orders), context)
    if not orders and not (context.graph or context.functional):
        output = detached(output)
        known = {(): output.leaves}
    return known, output


def _by_order(indices: Sequence[Index]) -> list[dict[Index, list[int]]]:
    """By order, what must be differentiated by which coordinates."""
    needed = {tuple(sorted(index)) for index in indices}
    found: list[dict[Index, list[int]]] = []
    for order in range(max(map(len, needed)), 0, -1):
        left = sorted(index for index in needed if len(index) == order)
        step: dict[Index, list[int]] = {}
        while left:  # first the one that most are derivatives of
            lower = Counter(part for index in left for part in set(_shorter(index)))
            best = max(lower, key=lambda part: (lower[part], part in needed, part))
            of = [index for index in left if best in _shorter(index)]
            step[best] = [next((Counter(i) - Counter(best)).elements()) for i in of]
            left = [index for index in left if index not in of]
        needed.update(step)
        found.append(step)
    return found[::-1]


def _shorter(index: Index) -> list[Index]:
    """Without one of its entries."""
    return [index[:i] + index[i + 1 :] for i in range(len(index))]
