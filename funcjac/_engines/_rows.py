"""Three ways to keep rows apart, each running the sum trick on rows that are independent.

``sum`` runs it on the batch itself, ``vmap`` on every row as a batch of one under
``torch.vmap``, ``loop`` on one row after the other. Inside ``vmap`` and ``loop`` the
function sees a batch of size one, so that ``Flatten`` or ``x.shape[0]`` mean what their
author meant.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac._batched import Call, Output
from funcjac._bind import bind
from funcjac._linear import Context, join_tensors, split_tensors
from funcjac._modes import Route
from funcjac._native import vmap_fallback
from funcjac._passes import Jacobian
from funcjac._state import rng_state, set_rng_state


def by_sum(call: Call, route: Route, context: Context) -> Jacobian:
    """The sum trick on the whole batch: right if and only if rows are independent."""
    return call.options.operator.kernel(call, route, context)


def by_vmap(call: Call, route: Route, context: Context) -> Jacobian:
    """Every row as a batch of one, under one ``torch.vmap``."""
    layout = call.layout
    in_dims = tuple(layout.dims[i] for i in layout.batched)
    context = context._replace(functional=True)
    kept: list[Any] = []

    def row(*leaves: Tensor) -> tuple[Tensor, ...]:
        rows = [leaf.unsqueeze(dim) for leaf, dim in zip(leaves, in_dims) if dim is not None]
        found = by_sum(call.one_row(rows), route, context)
        tensors, rest = _flatten_row(found)
        kept[:] = [rest]
        return tensors

    tensors = torch.vmap(row, in_dims, 0, randomness=call.options.randomness)(
        *[call.leaves[i] for i in layout.batched]
    )
    return _unflatten_rows(kept[0], tensors)


def by_loop(call: Call, route: Route, context: Context) -> Jacobian:
    """One row after the other; the reference, and the last resort."""
    if call.batch == 0:
        return by_sum(call, Route("sum", "empty"), context)
    same = rng_state() if call.options.randomness == "same" else None
    pieces: list[list[Tensor]] = []
    whole: list[Tensor] = []
    rest: Any = None
    for b in range(call.batch):
        if same is not None:
            set_rng_state(same)
        tensors, rest = _flatten_row(by_sum(call.one_row(row_of(call, b)), route, context))
        if context.graph:
            pieces.append(list(tensors))
            continue
        whole = whole or [t.new_empty(call.batch, *t.shape) for t in tensors]
        for found, tensor in zip(whole, tensors):
            found[b] = tensor
    return _unflatten_rows(rest, whole or [torch.stack(found) for found in zip(*pieces)])


def row_of(call: Call, b: int) -> list[Tensor]:
    """The batched leaves of row ``b``, as a batch of one."""
    layout = call.layout
    return [call.leaves[i].narrow(layout.dims[i] or 0, b, 1) for i in layout.batched]


BY_ENGINE: dict[str, Callable[[Call, Route, Context], Jacobian]] = {
    "vmap": by_vmap,
    "sum": by_sum,
    "loop": by_loop,
}


def run(call: Call, route: Route, context: Context, *, strict: bool = False) -> Jacobian:
    """Take a route; with ``strict``, an operation without a batching rule raises."""
    call = call._replace(direct=True, simply=not route.vectorized)
    if strict or route.slow:
        with vmap_fallback(allowed=route.slow):
            return BY_ENGINE[route.engine](call, route, context)
    return BY_ENGINE[route.engine](call, route, context)


def synchronize(call: Call) -> None:
    """Wait for the device, so that a clock sees what ran."""
    if torch.cuda.is_initialized() and any(x.is_cuda for x in call.inputs):
        torch.cuda.synchronize()


def executed(call: Call, engine: str) -> Call:
    """``call`` with its function run on rows the way an engine does.

    A function that draws random numbers draws others when its rows run in another way, so
    what verifies an engine must run them in the same way.
    """
    if engine == "sum":
        return call
    options = replace(call.options, out_dims=0)
    by_rows = _vmapped if engine == "vmap" else _looped

    def func(*args: Any, **kwargs: Any) -> Any:
        return by_rows(_bound(call, args, kwargs))

    return call._replace(func=func, options=options)


def _bound(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    bound = bind(call.func, call.options, {}, args, kwargs)
    return bound._replace(clone=call.clone, direct=True)  # the draws of the very same run


def _vmapped(call: Call) -> Any:
    layout = call.layout
    in_dims = tuple(layout.dims[i] for i in layout.batched)

    def row(*leaves: Tensor) -> tuple[Tensor, ...]:
        one = call.one_row([x.unsqueeze(d) for x, d in zip(leaves, in_dims) if d is not None])
        return tuple(out.squeeze(0) for out in one(one.inputs).leaves)

    outs = torch.vmap(row, in_dims, 0, randomness=call.options.randomness)(
        *[call.leaves[i] for i in layout.batched]
    )
    return (list(outs), None) if call.options.has_aux else list(outs)


def _looped(call: Call) -> Any:
    same = rng_state() if call.options.randomness == "same" else None
    rows = []
    for b in range(call.batch):
        if same is not None:
            set_rng_state(same)
        one = call.one_row(row_of(call, b))
        rows.append(one(one.inputs).leaves)
    outs = [torch.cat(found) for found in zip(*rows)]
    return (outs, None) if call.options.has_aux else outs


def _flatten_row(found: Jacobian) -> tuple[tuple[Tensor, ...], Any]:
    """Tensors of a batch of one without their batch dimension, and what is not a tensor."""
    aux, rest = split_tensors(found.output.aux)
    if any(leaf.ndim == 0 or leaf.shape[0] != 1 for leaf in aux):
        raise ValueError(
            "expected aux tensors with a batch dimension in front where rows run one by one, got "
            f"shapes {[tuple(leaf.shape) for leaf in aux]} for a batch of one"
        )
    rows = [leaf[0] for leaf in aux]
    blocks = [block[0] for blocks in found.blocks for block in blocks]
    outs = [out[0] for out in found.output.leaves]
    counts = (len(found.blocks), len(found.blocks[0]), len(outs))
    return (*blocks, *outs, *rows), (counts, found.output.spec, rest)


def _unflatten_rows(rest: Any, tensors: Iterable[Tensor]) -> Jacobian:
    (outputs, inputs, leaves), spec, aux = rest
    flat = list(tensors)
    # What does not depend on the row came out of vmap as one row, expanded.
    blocks = [[b.contiguous() for b in flat[i * inputs : (i + 1) * inputs]] for i in range(outputs)]
    outs, more = flat[outputs * inputs :][:leaves], flat[outputs * inputs + leaves :]
    return Jacobian(blocks, Output(outs, spec, join_tensors(aux, more)))
