"""Products with the Jacobian of a call: pulling back one cotangent, pushing one tangent.

Each comes in two kinds, by plain autograd and by torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._batched import Call, Output
from funcjac._native import Tensors, backward, forward_levels, over_basis
from funcjac._state import RngState, set_rng_state


class Context(NamedTuple):
    """Where a Jacobian is computed.

    Attributes:
        functional: by torch.func transforms (nested, compiled, under vmap), not plain autograd.
        graph: whether the result will be differentiated again.
    """

    functional: bool = False
    graph: bool = False


# --- reverse -----------------------------------------------------------------------------

# output leaf, whether it is the last pass, cotangent -> cotangents of the inputs
Pull = Callable[[int, bool, Tensor], Tensors]


def plain_pullback(call: Call, context: Context) -> tuple[Output, Pull]:
    inputs = plain_inputs(call, context)
    with torch.enable_grad():
        output = call(inputs)

    leaves, graph = output.leaves, context.graph

    def pull(i: int, last: bool, cotangent: Tensor) -> Tensors:
        return backward(leaves[i], inputs, cotangent, retain=graph or not last, graph=graph)

    return output if graph else detached(output), pull


def plain_inputs(call: Call, context: Context) -> list[Tensor]:
    """Inputs that plain autograd can differentiate by, without touching the caller's."""
    return [
        x.view_as(x) if context.graph and x.requires_grad else _own_leaf(x) for x in call.inputs
    ]


def plain_values(call: Call) -> list[Tensor]:
    """Outputs without a graph, of a ``func`` that may differentiate by itself."""
    with torch.enable_grad():
        outs = call._replace(clone=True)(plain_inputs(call, Context())).leaves
    return [out.detach() for out in outs]


def _own_leaf(x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    vars(leaf)["funcjac"] = True  # not the user's: graphs are searched for those
    return leaf


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


def functional_pullback(call: Call, context: Context) -> tuple[Output, Pull]:
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


def pushforward(call: Call, context: Context, replay: RngState | None) -> Push:
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


def transposed(call: Call, context: Context, replay: RngState | None) -> Push:
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

    return output if context.graph else detached(output), transpose


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


def detached(output: Output) -> Output:
    """``output`` without its graph, which would otherwise outlive the pass."""
    aux = _tree.map_tensors(Tensor.detach, output.aux) if output.aux is not None else None
    return Output([out.detach() for out in output.leaves], output.spec, aux)
