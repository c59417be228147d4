"""The trace of each row's Jacobian, without the Jacobian."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from funcjac._basis import seeds
from funcjac._batched import Call, Output
from funcjac._block import Block, added
from funcjac._directions import Spec, row_shape
from funcjac._linear import (
    Context,
    functional_pullback,
    plain_pullback,
    pushforward,
    transposed,
)
from funcjac._modes import Route
from funcjac._native import over_basis
from funcjac._passes import Jacobian
from funcjac._state import rng_state
from funcjac.errors import refuse


def divergence(call: Call, route: Route, context: Context, *, spec: Spec) -> Jacobian:
    """``sum_n d f_n / d x_n``, chunk by chunk, or an estimate of it from probes."""
    if route.mode == "empty" or not call.batch or not any(x.numel() for x in call.inputs):
        output = call(call.inputs)
        check_square(call, output)
        out = output.leaves[0]
        zero = out.new_zeros(call.batch)
        return Jacobian([[zero] * (1 + spec.return_error)], output)
    run = _pulled if route.mode == "rev" else _pushed
    found = _Sum(call.batch, spec.samples, context.graph or context.functional)
    output = run(call, route, context, spec, found)
    total = found.total
    assert total is not None
    total = total.to(torch.result_type(output.leaves[0], call.inputs[0]))
    if spec.samples is None:
        return Jacobian([[total.contiguous()]], output)
    blocks = [total.mean(-1).contiguous()]
    if spec.return_error:
        blocks.append((total.std(-1) / spec.samples**0.5).contiguous())
    return Jacobian([blocks], output)


class _Sum:
    """The trace so far, ``(B,)``; of samples each, ``(B, k)``."""

    def __init__(self, batch: int, samples: int | None, graph: bool) -> None:
        self.batch, self.samples, self.graph = batch, samples, graph
        self.total: Tensor | None = None
        self.each = self._block()  # samples of one input

    def _block(self) -> Block:
        return Block((self.batch, self.samples or 0), -1, self.graph)

    def add(self, piece: Tensor, start: int, stop: int) -> None:
        """A part of the trace, or samples ``(k, B)`` from ``start`` to ``stop``."""
        if self.samples is not None:
            self.each.add(piece, None, start, stop, many=True)
            if stop < self.samples:
                return
            piece = self.each.result(self.each.shape, piece, piece)
            self.each = self._block()
        self.total = added(self.total, piece, graph=self.graph)


def check_square(call: Call, output: Output) -> None:
    """Raise unless outputs and inputs have rows of the same shapes.

    Raises:
        ValueError: they do not, or rows share an input of an estimate.
    """
    if call.extra and None in call.layout.diff_dims:
        remedy = "Expand it over the batch and give it its dimension in in_dims."
        expected = "batched inputs with samples"
        raise refuse(call.options.name, ValueError, expected, "a shared one", remedy)
    rows = [tuple(row_shape(x, dim)) for x, dim in zip(call.inputs, call.layout.diff_dims)]
    outs = [tuple(out.shape[1:]) for out in output.leaves]
    if rows != outs:
        raise refuse(
            call.options.name,
            ValueError,
            f"func to return rows of the shapes of its input, {rows}",
            outs,
            "A divergence is the trace of a square Jacobian.",
        )


def _pulled(call: Call, route: Route, context: Context, spec: Spec, found: _Sum) -> Output:
    make = functional_pullback if context.functional else plain_pullback
    output, pull = make(call, context)
    check_square(call, output)
    run = over_basis if route.vectorized else _call
    for i, out in enumerate(output.leaves):
        x, dim = call.inputs[i], call.layout.diff_dims[i]
        if not x.numel():
            continue
        for start, stop, seed in _seeds(call, spec, i, out, 0, route):
            last = i + 1 == len(output.leaves) and stop == _count(call, spec, i)
            grad = run(functools.partial(pull, i, last), seed)[i]
            piece = _picked(grad, seed, x, dim, (start, stop), route, spec)
            found.add(piece, start, stop)
    return output


def _pushed(call: Call, route: Route, context: Context, spec: Spec, found: _Sum) -> Output:
    make = transposed if route.transposed else pushforward
    replay = rng_state() if call.options.randomness != "error" else None
    output: Any = None
    for i, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
        if not x.numel():
            continue
        push = make(call.only(i), context, replay)
        for start, stop, seed in _seeds(call, spec, i, x, dim, route):
            new, tangents = push(seed, route.vectorized)
            if output is None:
                output = new
                check_square(call, output)
            like, place = output.leaves[i], (start, stop)
            rows = seed.movedim(dim + route.vectorized, int(route.vectorized)) if dim else seed
            found.add(_picked(tangents[i], rows, like, 0, place, route, spec), *place)
    return output


def _count(call: Call, spec: Spec, i: int) -> int:
    row = row_shape(call.inputs[i], call.layout.diff_dims[i])
    return row.numel() if spec.samples is None else spec.samples


def _seeds(call: Call, spec: Spec, i: int, like: Tensor, dim: int | None, route: Route) -> Any:
    """The standard basis, or probes, with the batch at ``dim``, in chunks with their ends."""
    if spec.samples is None:
        row = row_shape(call.inputs[i], call.layout.diff_dims[i])
        yield from seeds(like, row, call.batch, dim, route)
        return
    probes = call.extras[i].movedim(1, 0).to(like.dtype)  # (k, B, *row)
    probes = probes if dim in (0, None) else probes.movedim(1, dim + 1)
    step = route.chunk or len(probes)
    for start in range(0, len(probes), step):
        piece = probes[start : start + step]
        yield start, start + len(piece), piece if route.vectorized else piece[0]


def _picked(
    product: Tensor | None,
    seed: Tensor,
    like: Tensor,
    dim: int | None,
    place: tuple[int, int],
    route: Route,
    spec: Spec,
) -> Tensor:
    """Of products ``(k, ..., B, ...)``: the entries of the basis added up, or ``v . J v``."""
    batch = like.shape[dim or 0]
    start, stop = place
    if product is None:
        return (
            like.new_zeros(batch) if spec.samples is None else like.new_zeros(stop - start, batch)
        )
    many = product if route.vectorized else product.unsqueeze(0)
    flat = many.movedim((dim or 0) + 1, 1).reshape(stop - start, batch, -1)  # (k, B, N)
    if spec.samples is None:
        return flat[:, :, start:stop].diagonal(0, 0, 2).sum(-1)
    probes = seed if route.vectorized else seed.unsqueeze(0)
    return (flat * probes.reshape(flat.shape)).sum(-1)


def _call(function: Any, seed: Tensor) -> Any:
    return function(seed)
