"""Pulling back and pushing forward a whole basis: the Jacobian of a batch of independent rows.

This is the sum trick. Where rows do not depend on one another, one vector-Jacobian
product with the same cotangent in every row gives a row of every row's Jacobian at once,
and one Jacobian-vector product with the same tangent in every row gives a column. A batch
of one is always independent, which is how the other engines use this module
(pytorch/functorch issue 328; TensorFlow's ``batch_jacobian``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._basis import seeds
from funcjac._batched import Call, Output
from funcjac._block import Block
from funcjac._linear import (
    Context,
    functional_pullback,
    plain_pullback,
    pushforward,
    transposed,
)
from funcjac._modes import Route
from funcjac._native import Tensors, over_basis
from funcjac._state import rng_state


class Jacobian(NamedTuple):
    """``blocks[i][j]`` is the derivative of output ``i`` by input ``j``, ``(B, *out, *in)``."""

    blocks: list[list[Tensor]]
    output: Output


def jacobian(call: Call, route: Route, context: Context) -> Jacobian:
    """The Jacobian of each row of ``call``, whose rows must be independent."""
    sizes = [x.numel() for x in call.inputs]
    if route.mode == "empty" or not any(sizes):
        return empty(call)
    if not all(sizes):
        return _without_empty(call, route, context, sizes)
    return (_reverse if route.mode == "rev" else _forward)(call, route, context)


def _without_empty(call: Call, route: Route, context: Context, sizes: list[int]) -> Jacobian:
    """Where some inputs have no elements, the others are differentiated alone."""
    kept = tuple(i for i, size in zip(call.layout.diff, sizes) if size)
    found = jacobian(call._replace(layout=replace(call.layout, diff=kept)), route, context)
    rows = [_row_shape(x, dim) for x, dim in zip(call.inputs, call.layout.diff_dims)]
    blocks = []
    for out, given in zip(found.output.leaves, found.blocks):
        rest = iter(given)
        pairs = zip(rows, sizes)
        blocks.append([next(rest) if n else out.new_zeros((*out.shape, *r)) for r, n in pairs])
    return Jacobian(blocks, found.output)


def empty(call: Call) -> Jacobian:
    """The Jacobian of an empty batch, or of rows without elements: ``func`` runs for shapes."""
    output = call(call.inputs)
    rows = [_row_shape(x, dim) for x, dim in zip(call.inputs, call.layout.diff_dims)]
    blocks = [
        [
            x.new_zeros((call.batch, *out.shape[1:], *row), dtype=torch.result_type(out, x))
            for x, row in zip(call.inputs, rows)
        ]
        for out in output.leaves
    ]
    return Jacobian(blocks, output)


# --- reverse -----------------------------------------------------------------------------


def _reverse(call: Call, route: Route, context: Context) -> Jacobian:
    inputs, dims = call.inputs, call.layout.diff_dims
    rows = [_row_shape(x, dim) for x, dim in zip(inputs, dims)]
    output, pull = (functional_pullback if context.functional else plain_pullback)(call, context)
    run = over_basis if route.vectorized else _call
    blocks = []
    for i, out in enumerate(output.leaves):
        shape = out.shape[1:]
        count = shape.numel()
        parts = [Block((call.batch, count, *row), 1, context.graph) for row in rows]
        for start, stop, seed in seeds(out, shape, call.batch, 0, route):  # (k, B, *out)
            last = stop == count and i + 1 == len(output.leaves)
            grads = run(functools.partial(pull, i, last), seed)
            for part, grad, dim in zip(parts, grads, dims):
                # (k, ..., B, ...) -> (B, k, *in)
                part.add(grad, dim, start, stop, route.vectorized)
        blocks.append(
            [
                part.result((call.batch, *shape, *row), out, x)
                for part, row, x in zip(parts, rows, inputs)
            ]
        )
    return Jacobian(blocks, output)


# --- forward -----------------------------------------------------------------------------


def _forward(call: Call, route: Route, context: Context) -> Jacobian:
    inputs, dims = call.inputs, call.layout.diff_dims
    make = transposed if route.transposed else pushforward
    columns: list[list[Tensor]] = []
    output: Any = None
    replay = rng_state() if call.options.randomness != "error" else None  # for every run
    for j, (x, dim) in enumerate(zip(inputs, dims)):
        shape = _row_shape(x, dim)
        count = shape.numel()
        parts: list[Block] = []
        push = make(call.only(j), context, replay)
        for start, stop, seed in seeds(x, shape, call.batch, dim, route):  # (k, *x.shape)
            found, tangents = push(seed, route.vectorized)
            output = output or found
            parts = parts or [
                Block((*out.shape, count), -1, context.graph) for out in output.leaves
            ]
            for part, tangent in zip(parts, tangents):
                part.add(tangent, -1, start, stop, route.vectorized)  # (k, B, *out) -> (B, *out, k)
        columns.append(
            [part.result((*out.shape, *shape), out, x) for part, out in zip(parts, output.leaves)]
        )
    return Jacobian([list(block) for block in zip(*columns)], output)


def _call(function: Callable[[Tensor], Tensors], seed: Tensor) -> Tensors:
    return function(seed)


def _row_shape(x: Tensor, dim: int | None) -> torch.Size:
    return x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]
