"""What the second-order transforms compute of a call: their kernels.

Each is written once, over a *backend* that gives derivatives along directions: Taylor
propagation through the whole batch, or one differentiation nested in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._along import Along, Columns
from funcjac._batched import Call
from funcjac._bind import narrowed
from funcjac._block import added
from funcjac._directions import Spec, basis, directions, row_shape
from funcjac._jets import mixed
from funcjac._linear import Context
from funcjac._modes import Route
from funcjac._nested import hessian_blocks, partials_along
from funcjac._pairs import all_pairs
from funcjac._passes import Jacobian
from funcjac._state import rng_state, set_rng_state
from funcjac._taylor import Recording, propagate, record
from funcjac.errors import refuse


def _entries(call: Call, spec: Spec) -> list[tuple[int, ...]]:
    """By which inputs each of an output's blocks is a derivative with axes of their own."""
    alone = [(j,) for j in range(len(call.inputs))]
    first = alone if call.options.return_value else []
    scalar: list[tuple[int, ...]] = [()]
    return {
        "hessian": [a + b for a in alone for b in alone] + first,
        "diagonal": alone + first,
        "laplacian": scalar * (1 + spec.return_error) + (first if spec.samples is None else []),
        "partials": scalar * len(spec.indices),
        "divergence": scalar * (1 + spec.return_error),
    }[spec.kind]


def _zeros(call: Call, out: Tensor, entry: tuple[int, ...]) -> Tensor:
    inputs = [call.inputs[j] for j in entry]
    rows = [row_shape(x, call.layout.diff_dims[j]) for j, x in zip(entry, inputs)]
    zero = out.new_zeros((*out.shape, *[size for row in rows for size in row]))
    for x in inputs or call.inputs[:1]:
        zero = zero.to(torch.result_type(zero, x))
    return zero


def zeros(call: Call, spec: Spec) -> Jacobian:
    """The result for an empty batch, or rows without elements: ``func`` runs for shapes."""
    output = call(call.inputs)
    outs = (
        output.leaves if spec.kind != "divergence" else [output.leaves[0].flatten(1)[:, :0].sum(1)]
    )
    entries = _entries(call, spec)
    blocks = [[_zeros(call, out, entry) for entry in entries] for out in outs]
    for row, out in zip(blocks, outs):  # the value itself is no derivative
        row[: len(spec.indices)] = [
            zero if index else out for zero, index in zip(row, spec.indices)
        ]
    return Jacobian(blocks, output)


def with_elements(call: Call, layouts: dict[Any, Any]) -> Call:
    """The call by its inputs with elements alone, where others have none."""
    spec, diff = call.options.operator.spec, call.layout.diff
    if len(diff) == 1 or spec is None or spec.kind not in ("hessian", "diagonal", "laplacian"):
        return call
    kept = [j for j, x in enumerate(call.inputs) if x.numel()]
    if len(kept) in (0, len(diff)) or call.batch == 0:
        return call
    probes = len(call.leaves) - call.extra + spec.is_weighted  # one for each input
    others = [j for j in range(len(diff)) if j not in kept]
    dropped = tuple([probes + j for j in others]) if spec.samples is not None else ()
    return narrowed(call, layouts, tuple([diff[j] for j in kept]), dropped)


def with_empty(call: Call, found: Jacobian) -> Jacobian:
    """What was found of :func:`with_elements`, and blocks without elements."""
    kept = {j for j, x in enumerate(call.inputs) if x.numel()}
    entries = _entries(call, call.options.operator.spec)
    blocks = []
    for out, given in zip(found.output.leaves, found.blocks):
        rest = iter(given)
        row = [next(rest) if kept.issuperset(e) else _zeros(call, out, e) for e in entries]
        pairs = zip(entries, row)
        blocks.append([b if e else b.to(torch.result_type(b, call.inputs[0])) for e, b in pairs])
    return Jacobian(blocks, found.output)


def is_empty(call: Call, route: Route) -> bool:
    """Whether there is nothing to differentiate.

    Raises:
        ValueError: some inputs are empty, and others are not.
    """
    empty = [x.numel() == 0 for x in call.inputs]
    if any(empty) and not all(empty) and call.batch:
        shapes = [tuple(x.shape) for x in call.inputs]
        remedy = "Leave the empty ones out of argnums."
        raise refuse(call.options.name, ValueError, "inputs with elements", shapes, remedy)
    return route.mode == "empty" or any(empty)


# --- kernels ------------------------------------------------------------------------------


def diagonal(call: Call, route: Route, context: Context, *, spec: Spec) -> Jacobian:
    if is_empty(call, route):
        return zeros(call, spec)
    along = Along(call, route, context)
    columns: list[list[Tensor]] = []
    slopes: list[list[Tensor]] = []
    for j in range(len(call.inputs)):
        found = Columns(call, j, context)
        first = Columns(call, j, context)
        every = directions(call, spec, j, exact=True)
        for start, stop, firsts, seconds in along.pieces(j, every, total=False):
            found.add(along.output, seconds, start, stop)
            if call.options.return_value:
                first.add(along.output, firsts, start, stop)
        columns.append(found.result(along.output))
        if call.options.return_value:
            slopes.append(first.result(along.output))
    assert along.output is not None
    return Jacobian([list(block) for block in zip(*columns, *slopes)], along.output)


def laplacian(call: Call, route: Route, context: Context, *, spec: Spec) -> Jacobian:
    if is_empty(call, route):
        return zeros(call, spec)
    along = Along(call, route, context)
    exact = call.options.return_value and spec.samples is None
    totals: list[Tensor | None] = []
    slopes: list[list[Tensor]] = []
    for j in range(len(call.inputs)):
        given = directions(call, spec, j, exact=exact)
        first = Columns(call, j, context)
        each = Columns(call, j, context, torch.Size([len(given.left)]))
        for start, stop, firsts, seconds in along.pieces(j, given, total=not spec.return_error):
            if spec.return_error:
                each.add(along.output, seconds, start, stop)
            else:
                totals = _plus(totals, seconds, graph=first.graph)
            if exact:
                first.add(along.output, firsts, start, stop)
        if spec.return_error:
            totals = _plus(totals, each.result(along.output), graph=each.graph)
        if exact:
            slopes.append(first.result(along.output))
    assert along.output is not None
    x = call.inputs[0]
    columns = [_estimates(found, out, x, spec) for found, out in zip(totals, along.output.leaves)]
    rows = [[column[0], *(s[i] for s in slopes), *column[1:]] for i, column in enumerate(columns)]
    return Jacobian(rows, along.output)


def _plus(totals: list[Any], more: Sequence[Tensor | None], *, graph: bool) -> list[Tensor | None]:
    pairs = zip(totals or [None] * len(more), more)
    return [added(one, two, graph=graph) for one, two in pairs]


def _estimates(found: Tensor | None, out: Tensor, x: Tensor, spec: Spec) -> list[Tensor]:
    """The sum ``(1, B, *out)``; of samples ``(B, *out, k)`` their mean and its error."""
    dtype = torch.result_type(out, x)
    if found is None:
        return [out.new_zeros(out.shape, dtype=dtype)]
    if not spec.return_error:
        return [found.sum(0).to(dtype).expand(out.shape).contiguous()]
    mean = found.mean(-1)
    error = found.std(-1) / found.shape[-1] ** 0.5
    return [mean.to(dtype).contiguous(), error.to(dtype).contiguous()]


def hessian(call: Call, route: Route, context: Context, *, spec: Spec) -> Jacobian:
    if is_empty(call, route):
        return zeros(call, spec)
    compute = all_pairs if route.mode == "taylor" else hessian_blocks
    hess, jac, output = compute(call, route, context)
    slopes = jac if call.options.return_value else [[] for _ in hess]
    blocks = [[b for row in found for b in row] + slope for found, slope in zip(hess, slopes)]
    return Jacobian(blocks, output)


def partials(call: Call, route: Route, context: Context, *, spec: Spec) -> Jacobian:
    if is_empty(call, route):
        return zeros(call, spec)
    x, dim = call.inputs[0], call.layout.diff_dims[0]
    step = route.chunk or len(spec.indices)
    columns: list[list[Tensor]] = []
    recording = record(call, context) if route.mode == "taylor" else None
    output = None if recording is None else recording.output
    replay = rng_state() if call.options.randomness != "error" else None
    for start in range(0, len(spec.indices), step):
        group = spec.indices[start : start + step]
        if recording is not None:
            columns += _taylor_partials(recording, group, x, dim)
            continue
        if replay is not None:
            set_rng_state(replay)  # every group sees the same draws
        found, output = partials_along(call, route, context, group)
        columns += [found[tuple(sorted(index))] for index in group]
    assert output is not None
    dtypes = [torch.result_type(out, x) for out in output.leaves]
    # The same index twice, or the value, must not come as one tensor under two names.
    names = [tuple(sorted(index)) for index in spec.indices]
    again = [not name or name in names[:e] for e, name in enumerate(names)]
    rows = [
        [c.to(dtype).clone() if yes else c.to(dtype).contiguous() for c, yes in zip(cs, again)]
        for cs, dtype in zip(zip(*columns), dtypes)
    ]
    return Jacobian(rows, output)


def _taylor_partials(
    recording: Recording, group: Sequence[tuple[int, ...]], x: Tensor, dim: int | None
) -> list[list[Tensor]]:
    used = sorted({i for index in group for i in index})
    names = {coordinate: k for k, coordinate in enumerate(used)}
    indices = [tuple(names[i] for i in index) for index in group]
    outs = recording.output.leaves
    if not used:
        return [list(outs) for _ in group]
    scheme = mixed(indices, x.device)
    places = [scheme.places[tuple(sorted(index))] for index in indices if index]
    start = min(places)
    jets = propagate(recording, {0: basis(x, dim, used)}, scheme, start)
    found = []
    for index in indices:
        place = scheme.places.get(tuple(sorted(index)))
        found.append(
            [
                out if place is None else _entry(jet, place - start, out)
                for jet, out in zip(jets, outs)
            ]
        )
    return found


def _entry(jet: Tensor | None, place: int, out: Tensor) -> Tensor:
    return torch.zeros_like(out) if jet is None or place >= len(jet) else jet[place]
