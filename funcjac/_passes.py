"""Pulling back and pushing forward a whole basis: the Jacobian of a batch of independent rows.

This is the sum trick. Where rows do not depend on one another, one vector-Jacobian
product with the same cotangent in every row gives a row of every row's Jacobian at once,
and one Jacobian-vector product with the same tangent in every row gives a column. A batch
of one is always independent, which is how the other engines use this module
(pytorch/functorch issue 328; TensorFlow's ``batch_jacobian``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._basis import seeds
from funcjac._batched import Call, Output
from funcjac._block import Block
from funcjac._modes import Route
from funcjac._native import Tensors, backward, forward_levels, over_basis
from funcjac._state import RngState, rng_state, set_rng_state


class Context(NamedTuple):
    """Where a Jacobian is computed.

    Attributes:
        functional: by torch.func transforms (nested, compiled, under vmap), not plain autograd.
        graph: whether the result will be differentiated again.
    """

    functional: bool = False
    graph: bool = False


class Jacobian(NamedTuple):
    """``blocks[i][j]`` is the derivative of output ``i`` by input ``j``, ``(B, *out, *in)``."""

    blocks: list[list[Tensor]]
    output: Output


def jacobian(call: Call, route: Route, context: Context) -> Jacobian:
    """The Jacobian of each row of ``call``, whose rows must be independent."""
    if any(x.numel() == 0 for x in call.inputs):
        return empty(call)
    return (_reverse if route.mode == "rev" else _forward)(call, route, context)


def empty(call: Call) -> Jacobian:
    """The Jacobian of an empty batch, or of rows without elements: ``func`` runs for shapes."""
    output = call(call.inputs)
    rows = [_row_shape(x, dim) for x, dim in zip(call.inputs, call.layout.diff_dims)]
    blocks = [
        [
            Block((call.batch, *out.shape[1:], *row), 1, False).result(
                (call.batch, *out.shape[1:], *row), out, x
            )
            for x, row in zip(call.inputs, rows)
        ]
        for out in output.leaves
    ]
    return Jacobian(blocks, output)


# --- reverse -----------------------------------------------------------------------------


def _reverse(call: Call, route: Route, context: Context) -> Jacobian:
    inputs, dims = call.inputs, call.layout.diff_dims
    rows = [_row_shape(x, dim) for x, dim in zip(inputs, dims)]
    output, pull = (_functional_pullback if context.functional else _plain_pullback)(call, context)
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


# output leaf, whether it is the last pass, cotangent -> cotangents of the inputs
Pull = Callable[[int, bool, Tensor], Tensors]


def _plain_pullback(call: Call, context: Context) -> tuple[Output, Pull]:
    inputs = plain_inputs(call, context)
    with torch.enable_grad():
        output = call(inputs)

    leaves, graph = output.leaves, context.graph

    def pull(i: int, last: bool, cotangent: Tensor) -> Tensors:
        return backward(leaves[i], inputs, cotangent, retain=graph or not last, graph=graph)

    return output if graph else _detached(output), pull


def plain_inputs(call: Call, context: Context) -> list[Tensor]:
    """Inputs that plain autograd can differentiate by, without touching the caller's."""
    return [
        x.view_as(x) if context.graph and x.requires_grad else x.detach().requires_grad_()
        for x in call.inputs
    ]


def plain_vjp(
    outs: list[Tensor],
    inputs: list[Tensor],
    seeds: list[Tensor],
    *,
    retain: bool = False,
    graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, with ``None`` for whatever does not depend on an input."""
    live = [(out, seed) for out, seed in zip(outs, seeds) if out.requires_grad]
    if not live:
        return (None,) * len(inputs)
    return torch.autograd.grad(
        [out for out, _ in live],
        inputs,
        [seed for _, seed in live],
        retain_graph=retain,
        create_graph=graph,
        allow_unused=True,
    )


def _functional_pullback(call: Call, context: Context) -> tuple[Output, Pull]:
    del context
    outs, pull_all, output = _vjp(call)

    zeros = [torch.zeros_like(out) for out in outs]

    def pull(i: int, last: bool, cotangent: Tensor) -> Tensors:
        del last  # torch.func keeps the graph
        return pull_all((*zeros[:i], cotangent, *zeros[i + 1 :]))

    return output, pull


# --- forward -----------------------------------------------------------------------------

# tangent -> tangents of the outputs, for one tangent or, under vmap, for many
Push = Callable[[Tensor, bool], tuple[Output, Tensors]]


def _forward(call: Call, route: Route, context: Context) -> Jacobian:
    inputs, dims = call.inputs, call.layout.diff_dims
    make = _transposed if route.transposed else _pushforward
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


def _pushforward(call: Call, context: Context, replay: RngState | None) -> Push:
    """Columns by ``torch.func.jvp``: the function runs once for each pass."""
    (x,) = call.inputs
    if not context.functional and not context.graph:
        x = x.detach()

    def push(seed: Tensor, vectorized: bool) -> tuple[Output, Tensors]:
        primal, kept = _primal(call)
        outputs: list[Output] = []

        def column(tangent: Tensor) -> Tensors:
            found: Any = torch.func.jvp(primal, (x,), (tangent,), has_aux=True)
            outs, tangents, aux = found
            outputs.append(kept(outs, aux))  # the same for every tangent, so not batched
            return tangents

        if replay is not None:
            set_rng_state(replay)  # every column sees the same draws
        with forward_levels():
            tangents = over_basis(column, seed) if vectorized else column(seed)
        return outputs[0], tangents

    return push


def _transposed(call: Call, context: Context, replay: RngState | None) -> Push:
    """Columns as the transpose of a VJP: ``u -> J^T u`` is linear, and its own VJP is ``J``.

    The function runs once for all columns, and no forward formula is used. (J. Townsend,
    "A new trick for calculating Jacobian vector products", 2017.)
    """
    make = _functional_transpose if context.functional else _plain_transpose
    if replay is not None:
        set_rng_state(replay)
    output, transpose = make(call, context)

    def push(seed: Tensor, vectorized: bool) -> tuple[Output, Tensors]:
        return output, over_basis(transpose, seed) if vectorized else transpose(seed)

    return push


Transpose = Callable[[Tensor], Tensors]


def _plain_transpose(call: Call, context: Context) -> tuple[Output, Transpose]:
    inputs = plain_inputs(call, context)
    with torch.enable_grad():
        output = call(inputs)
        seeds = [torch.zeros_like(out, requires_grad=True) for out in output.leaves]
        grads = plain_vjp(output.leaves, inputs, seeds, retain=True, graph=True)
    (grad,) = grads

    def transpose(tangent: Tensor) -> Tensors:
        if grad is None:
            return (None,) * len(seeds)
        return plain_vjp([grad], seeds, [tangent], retain=True, graph=context.graph)

    return output if context.graph else _detached(output), transpose


def _functional_transpose(call: Call, context: Context) -> tuple[Output, Transpose]:
    del context
    outs, pull, output = _vjp(call)
    zeros = [torch.zeros_like(out) for out in outs]
    transposed = torch.func.vjp(lambda *seeds: pull(seeds)[0], *zeros)[1]
    return output, transposed


# --- shared by both ----------------------------------------------------------------------


def _primal(call: Call) -> tuple[Callable[..., Any], Callable[..., Output]]:
    """``call`` as torch.func wants it: flat tuples of tensors in and out, the rest kept aside."""
    rest: list[Any] = []

    def primal(*xs: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        output = call(xs)
        tensors, others = split_tensors(output.aux)
        rest[:] = output.spec, others
        return tuple(output.leaves), tuple(tensors)

    def kept(outs: tuple[Tensor, ...], aux: tuple[Tensor, ...]) -> Output:
        return Output(list(outs), rest[0], join_tensors(rest[1], aux))

    return primal, kept


def _vjp(call: Call) -> tuple[tuple[Tensor, ...], Callable[..., Any], Output]:
    primal, kept = _primal(call)
    found: Any = torch.func.vjp(primal, *call.inputs, has_aux=True)
    outs, pull, aux = found
    return outs, pull, kept(outs, aux)


def split_tensors(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, and what is needed to put it together again."""
    if tree is None:
        return [], None
    leaves, spec = _tree.flatten(tree)
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    others = [None if yes else leaf for leaf, yes in zip(leaves, is_tensor)]
    return [leaf for leaf, yes in zip(leaves, is_tensor) if yes], (spec, is_tensor, others)


def join_tensors(rest: Any, tensors: Iterable[Tensor]) -> Any:
    if rest is None:
        return None
    spec, is_tensor, others = rest
    found = iter(tensors)
    return _tree.unflatten(spec, [next(found) if yes else o for yes, o in zip(is_tensor, others)])


def _call(function: Callable[[Tensor], Tensors], seed: Tensor) -> Tensors:
    return function(seed)


def _row_shape(x: Tensor, dim: int | None) -> torch.Size:
    return x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]


def _detached(output: Output) -> Output:
    """``output`` without its graph, which would otherwise outlive the pass."""
    aux = _tree.map_tensors(Tensor.detach, output.aux) if output.aux is not None else None
    return Output([out.detach() for out in output.leaves], output.spec, aux)
