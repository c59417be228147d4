"""Propagation of jets through a recording, operation by operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._taylor.jets import Jet, Scheme
from funcjac._taylor.operations import decomposition
from funcjac._taylor.recorder import Node, Recorder, filled, make_node
from funcjac._taylor.rules import Derivative, Recording, Site, is_linear, rule_of
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
