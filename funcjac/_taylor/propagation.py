"""Propagation of jets through a recording, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._engines.rows import added
from funcjac._engines.sum import column_root, peel
from funcjac._environment.torch_private import backward
from funcjac._taylor.jets import Jet, Scheme, rows_of, second_order, take
from funcjac._taylor.operations import decomposition
from funcjac._taylor.recorder import Node, Recorder, filled, make_node
from funcjac._taylor.rules import (
    Derivative,
    Recording,
    Site,
    is_linear,
    node_keeps_rows,
    rule_of,
)
from funcjac.errors import UntraceableError


def make_recording(
    recorder: Recorder, outputs: Sequence[Tensor], *, create_graph: bool
) -> Recording:
    """Prepares what a :class:`Recorder` saw for propagation to ``outputs``.

    Raises:
        UntraceableError: a gradient hook is at work, or something has a history that was not
            recorded.
    """
    if recorder.failure is not None:
        raise recorder.failure
    values, slots = recorder.values, [recorder.slot(out) for out in outputs]
    used, curved = set[int](slot for slot in slots if slot is not None), set[int]()
    steps: list[tuple[Node, set[int], bool]] = []
    for node in reversed(recorder.nodes):
        if used.isdisjoint(node.outs):
            continue
        if any(values[slot]._backward_hooks for slot in node.outs if slot is not None):
            raise UntraceableError("a gradient hook changes derivatives on their way back")
        is_curved = not curved.isdisjoint(node.outs)
        steps.append((node, {*node.slots} - used, is_curved))
        used.update(node.slots)
        if is_curved or not is_linear(node):
            curved.update(node.slots)
    return Recording(values, slots, steps[::-1], create_graph, {})


def along_directions(
    recording: Recording,
    seeds: dict[int, Tensor],
    scheme: Scheme,
    pairs: Sequence[tuple[int, ...]] = (),
    lowest: int = 1,
    *,
    basis: bool = False,
) -> list[Jet]:
    """Jets of the outputs, from directions ``(K, *x.shape)`` by the numbers of inputs.

    Args:
        recording: the run of ``func``.
        seeds: zero where a direction belongs to another input.
        scheme: what the jets hold.
        pairs: of directions, where these make up all of the second derivatives, the highest.
        lowest: the order below which derivatives may be missing.
        basis: whether the directions, of one input, are of its standard basis.
    """
    recording = recording._replace(basis=next(iter(seeds.values())) if basis else None)
    jets = by_adjoints(recording, seeds, pairs) if pairs else None
    zeros = [None] * (scheme.order - 1)
    inputs: dict[int, Jet] = {j: (seed, *zeros) for j, seed in seeds.items()}
    return jets or propagate(recording, inputs, scheme, lowest)


def propagate(
    recording: Recording, jets: dict[int, Jet], scheme: Scheme, lowest: int = 1
) -> list[Jet]:
    """Jets of the outputs, from jets of inputs by their number.

    Derivatives of an order below ``lowest`` may be missing.
    """
    live, zero = dict(jets), (None,) * scheme.order
    with torch.set_grad_enabled(recording.create_graph):
        for node, done, is_curved in recording.steps:
            if not live.keys().isdisjoint(node.slots):
                site = _site(recording, node, live, scheme)
                live.update(_results(site, 1 if is_curved else lowest))
            for slot in done:
                live.pop(slot, None)
    return [zero if slot is None else live.get(slot, zero) for slot in recording.slots]


# NOTE [second derivatives by adjoints]
# The second derivative of an output is a sum over operations that are not linear: its gradient by
# the result, times the second derivative that the operation makes of first ones. One pass back for
# each output gives all gradients, first derivatives among them, so that second ones need not go
# through linear operations, nor first ones along directions that no pair has. Sums are over a row:
# they need its place in each result, which is known where it stays in dimension 0.


def keeps_rows(recording: Recording) -> bool:
    """Whether rows stay in dimension 0 of all that is recorded."""
    return all(node_keeps_rows(node, recording.values) for node, _, _ in recording.steps)


def by_adjoints(
    recording: Recording, seeds: dict[int, Tensor], pairs: Sequence[tuple[int, ...]]
) -> list[Jet] | None:
    """First derivatives along all seeds, and second ones along pairs of them.

    See NOTE [second derivatives by adjoints].

    Returns:
        Jets of the outputs; ``None`` where it takes no less than propagation, or cannot be done.
    """
    if None in recording.slots:
        return None
    outs = [recording.values[slot] for slot in recording.slots if slot is not None]
    moving = sorted({direction for pair in pairs for direction in pair})
    count = sum(out.shape[1:].numel() for out in outs)
    total = len(next(iter(seeds.values())))
    if count + len(moving) >= total + len(pairs) or not keeps_rows(recording):
        return None
    left, right = ([moving.index(pair[k]) for pair in pairs] for k in (0, 1))
    device = outs[0].device
    rows = rows_of(left, device)
    scheme = second_order(rows, rows if left == right else rows_of(right, device))
    moved = rows_of(moving, device)
    jets: dict[int, Jet] = {j: (take(seed, moved), None) for j, seed in seeds.items()}
    sources = _sources(recording, jets, scheme)
    if not all(recording.values[slot].requires_grad for slot, _ in sources):
        return None  # overwritten later on
    terms = [*seeds.items(), *sources]
    with torch.set_grad_enabled(recording.create_graph):
        return [_contracted(recording, out, terms, len(seeds)) for out in outs]


def _sources(
    recording: Recording, live: dict[int, Jet], scheme: Scheme
) -> list[tuple[int, Tensor]]:
    """Second derivatives that each operation makes of first ones, by slot of its result."""
    sources: list[tuple[int, Tensor]] = []
    with torch.set_grad_enabled(recording.create_graph):
        for node, done, is_curved in recording.steps:
            if not live.keys().isdisjoint(node.slots):
                site = _site(recording, node, live, scheme)
                for slot, (first, second) in _results(site, 1 if is_curved else 2).items():
                    live[slot] = (first, None)
                    sources += [] if second is None else [(slot, second)]
            for slot in done:
                live.pop(slot, None)
    return sources


def _contracted(
    recording: Recording, out: Tensor, terms: Sequence[tuple[int, Tensor]], firsts: int
) -> Jet:
    """Sums over each row of gradients times stacks: of the first terms, and of the others."""
    values, graph = [recording.values[slot] for slot, _ in terms], recording.create_graph
    columns: list[tuple[Tensor | None, ...]] = []
    peeled = peel(out, recording.values[:firsts])
    for m in range(out.shape[1:].numel()):
        root, cotangent = column_root(out, m) if peeled is None else (peeled[0], peeled[1][m])
        cotangent = cotangent if peeled is None else cotangent.expand(out.shape[0], -1)
        grads = backward(root, values, cotangent, retain=True, graph=graph)
        sums: list[Tensor | None] = [None, None]
        for n, ((_, stack), grad) in enumerate(zip(terms, grads)):
            if grad is not None:
                product = (stack * grad).unsqueeze(-1).flatten(2).sum(2)
                sums[n >= firsts] = added(sums[n >= firsts], product)
        columns.append(tuple(sums))
    return tuple([_joined(stacks, out) for stacks in zip(*(columns or [(None, None)]))])


def _joined(stacks: Sequence[Tensor | None], out: Tensor) -> Tensor | None:
    """``(K, B, *out)`` from ``(K, B)`` for each output of a row; ``None`` for zero."""
    like = next((stack for stack in stacks if stack is not None), None)
    if like is None:
        return None
    columns = [torch.zeros_like(like) if stack is None else stack for stack in stacks]
    return torch.stack(columns, -1).reshape(like.shape[0], *out.shape).to(out.dtype)


def _site(recording: Recording, node: Node, live: dict[int, Jet], scheme: Scheme) -> Site:
    """A node with jets for all of its slots; arguments without one become constants."""
    jets = {slot: live[slot] for slot in node.slots if slot in live}
    rest = {slot: recording.value(slot) for slot in node.slots if slot not in live}
    if rest:
        node = make_node(node.op, filled(node.args, rest), node.kwargs)._replace(outs=node.outs)
    return Site(node, recording, jets, scheme)


def _results(site: Site, lowest: int) -> dict[int, Jet]:
    """Jets of the results, by slot, in the dtypes of their values."""
    derivative = (rule_of(site.node.op) or _taken_apart)(site)
    levels = [derivative(order) for order in range(lowest, site.scheme.order + 1)]
    jets: dict[int, Jet] = {}
    for slot, *stacks in zip(site.node.outs, *levels):
        if slot is not None and any(stack is not None for stack in stacks):
            dtype = site.recording.values[slot].dtype
            cast = [None if stack is None else stack.to(dtype) for stack in stacks]
            jets[slot] = (*[None] * (lowest - 1), *cast)
    return jets


def _taken_apart(site: Site) -> Derivative:
    """Propagates through the decomposition of an operation."""
    values = site.variables()
    recorder = Recorder(list(values.values()))
    with torch.enable_grad(), recorder:
        outs = site.node._replace(op=decomposition(site.node.op)).run(values)
    if len(outs) != len(site.node.outs):
        raise UntraceableError(f"{site.node.op} does not return what its decomposition does")
    inner = make_recording(recorder, outs, create_graph=site.recording.create_graph)
    seeds = {number: site.jets[slot] for number, slot in enumerate(values)}
    jets = propagate(inner, seeds, site.scheme)
    return lambda order: [jet[order - 1] for jet in jets]
