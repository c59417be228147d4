"""Propagation of jets through a recording, operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._taylor.jets import Jet, Scheme, Site
from funcjac._taylor.opaque import rerun, variables
from funcjac._taylor.operations import decomposition
from funcjac._taylor.recorder import Node, Recorder
from funcjac._taylor.rules import is_linear, rule_of
from funcjac.errors import UntraceableError


class Recording(NamedTuple):
    """One run of ``func``, ready for propagation.

    Attributes:
        slots: of the outputs; ``None`` for one that does not depend on the input.
        steps: operations that the outputs need, each with the slots that nobody uses after it.
        bent: slots from which an operation that is not linear leads to outputs; elsewhere, lower
            derivatives serve nothing but themselves.
        derivatives: of elementwise operations, which serve all directions.
    """

    recorder: Recorder
    slots: list[int | None]
    steps: list[tuple[Node, tuple[int, ...]]]
    bent: set[int]
    create_graph: bool
    derivatives: dict[Any, Any]


def make_recording(
    recorder: Recorder, outputs: Sequence[Tensor], *, create_graph: bool
) -> Recording:
    """Prepares what a :class:`Recorder` saw for propagation to ``outputs``.

    Raises:
        UntraceableError: a tensor was overwritten, a gradient hook is at work, or an output has
            a history that was not recorded.
    """
    if recorder.failure is not None:
        raise recorder.failure
    recorder.settle()
    for slot in recorder.copies if create_graph else ():
        recorder.values[slot] = recorder.values[slot]._replace(tensor=None)
    slots = [recorder.slot(out) for out in outputs]
    steps = _needed(recorder, slots)
    bent: set[int] = set()
    for node, _ in reversed(steps):
        if not (is_linear(node) and bent.isdisjoint(node.outs)):
            bent.update(node.slots)
    return Recording(recorder, slots, steps, bent, create_graph, {})


def _needed(
    recorder: Recorder, outputs: Sequence[int | None]
) -> list[tuple[Node, tuple[int, ...]]]:
    """Operations that ``outputs`` are computed from, each with the slots that it uses last."""
    used = {slot for slot in outputs if slot is not None}
    steps = []
    for node in reversed(recorder.nodes):
        if used.isdisjoint(node.outs):
            continue
        if any(tensor._version != version for tensor, version in node.versions):
            raise UntraceableError(f"an argument of {node.op} was overwritten later on")
        tensors = [recorder.values[slot].tensor for slot in node.outs if slot is not None]
        if any(getattr(tensor, "_backward_hooks", None) for tensor in tensors):
            raise UntraceableError("a gradient hook changes derivatives on their way back")
        steps.append((node, tuple({slot for slot in node.slots if slot not in used})))
        used.update(node.slots)
    return steps[::-1]


def propagate(
    recording: Recording, jets: dict[int, Jet], scheme: Scheme, lowest: int = 1
) -> list[Jet | None]:
    """Jets of the outputs, from jets of inputs by their number.

    Derivatives of an order below ``lowest`` may be missing.
    """
    live: dict[int, Jet] = dict(jets)
    with torch.set_grad_enabled(recording.create_graph):
        for node, done in recording.steps:
            if not live.keys().isdisjoint(node.slots):
                low = lowest if recording.bent.isdisjoint(node.outs) else 1
                site = _site(recording, node, live, scheme, low)
                rule = rule_of(node.op)
                results = zip(node.outs, _taken_apart(site) if rule is None else rule(site))
                live.update({slot: jet for slot, jet in results if slot is not None and jet})
            for slot in done:
                live.pop(slot, None)
    return [None if slot is None else live.get(slot) for slot in recording.slots]


def _site(
    recording: Recording, node: Node, live: dict[int, Jet], scheme: Scheme, lowest: int
) -> Site:
    """A node with jets for all of its slots; arguments without one become constants."""
    recorder = recording.recorder
    jets = [live[slot] for slot in node.slots if slot in live]
    if len(jets) < len(node.slots):
        args = node.with_args([recorder.value(slot) for slot in node.slots])
        pairs = [(p, slot) for p, slot in zip(node.places, node.slots) if slot in live]
        places, slots = zip(*pairs)
        node = node._replace(args=args, places=places, slots=slots)
    return Site(node, recorder, jets, scheme, lowest, recording.create_graph, recording.derivatives)


def _taken_apart(site: Site) -> list[Jet | None]:
    """Propagates through the decomposition of an operation."""
    function: Callable[..., Any] | None = decomposition(site.node.op)
    assert function is not None
    values = variables(site)
    recorder = Recorder(list(values.values()))
    with torch.enable_grad(), recorder:
        out = rerun(site.node._replace(op=function), values)
    outs: Sequence[Any] = out if isinstance(out, (tuple, list)) else [out]
    if len(outs) != len(site.node.outs):
        raise UntraceableError(f"{site.node.op} does not return what its decomposition does")
    inner = make_recording(recorder, outs, create_graph=site.create_graph)
    numbers = {slot: number for number, slot in enumerate(values)}
    jets = {numbers[slot]: jet for slot, jet in zip(site.node.slots, site.jets)}
    return propagate(inner, jets, site.scheme, site.lowest)
