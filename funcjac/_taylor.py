"""Taylor propagation: values, first and higher derivatives in one pass through ``func``.

``func`` runs once, as it is today, and a :class:`Tape` notes what it does. Then derivatives
along directions are pushed through what was noted, operation by operation, each by its rule.
A second derivative costs one more number for each element, instead of another differentiation
of a whole differentiation. (A. Griewank, J. Utke, A. Walther, "Evaluating higher derivative
tensors by forward propagation of univariate Taylor series", 2000; J. Bettencourt, M. Johnson,
D. Duvenaud, "Taylor-mode automatic differentiation for higher-order derivatives in JAX", 2019;
R. Li et al., "A computational framework for neural network-based variational Monte Carlo with
forward Laplacian", 2024.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._batched import Call, Output
from funcjac._jets import Jet, Scheme, Site
from funcjac._linear import Context, detached, plain_inputs
from funcjac._native import keep_memory
from funcjac._rules import is_linear, makes_new, push
from funcjac._tape import Node, Tape
from funcjac.errors import UntraceableError


class Recording(NamedTuple):
    """One run of ``func``, and what there is to propagate through.

    Attributes:
        slots: of the outputs.
        nodes: with the slots that nobody uses after each.
        tail: slots from which only linear operations lead to outputs: there, lower
            derivatives serve nothing but themselves.
        graph: whether results will be differentiated.
        known: derivatives of operations, which serve all directions.
    """

    output: Output
    tape: Tape
    slots: list[int | None]
    nodes: list[tuple[Node, tuple[int, ...]]]
    tail: set[int]
    graph: bool
    known: dict[Any, Any]


def record(call: Call, context: Context) -> Recording:
    """Run ``func`` once.

    Raises:
        UntraceableError: it does something through which nothing can be propagated.
    """
    if all(x.device.type == "cpu" for x in call.inputs):
        keep_memory()
    # A negation that is a mere bit would be made up for above the tape, and look like a constant.
    call = call.with_inputs([x.resolve_neg() for x in call.inputs])
    inputs = plain_inputs(call, context)
    tape = Tape(inputs, graph=context.graph)
    with torch.enable_grad(), tape:
        output = call(inputs)
    outs = output.leaves
    return _recording(output if context.graph else detached(output), tape, outs, context.graph)


def _recording(output: Output, tape: Tape, outs: Sequence[Any], graph: bool) -> Recording:
    slots = [tape.slot(out) for out in outs]
    nodes = tape.needed(slots)
    bent: set[int] = set()
    for node, _ in reversed(nodes):
        if not (is_linear(node) and bent.isdisjoint(node.outs)):
            bent.update(node.slots)
    return Recording(output, tape, slots, nodes, set(range(len(tape.values))) - bent, graph, {})


def propagate(
    recording: Recording, jets: dict[int, Tensor], scheme: Scheme, start: int = 0
) -> list[Jet]:
    """Derivatives of the outputs from ``start`` on, from jets of inputs by their number."""
    found: dict[int, Any] = dict(jets)
    for slot in recording.tail.intersection(found):
        found[slot] = _from(found[slot], start)
    own: set[int] = set()  # slots with a jet that is no part of another
    with nullcontext() if recording.graph else torch.no_grad():
        for node, done in recording.nodes:
            given = [found.get(slot) for slot in node.slots]
            if any(jet is not None for jet in given):
                _step(recording, scheme, (node, done, given), found, own, start)
            for slot in done:
                found.pop(slot, None)
    outs = [(slot, None if slot is None else found.get(slot)) for slot in recording.slots]
    return [jet if slot in recording.tail else _from(jet, start) for slot, jet in outs]


def _from(jet: Jet, start: int) -> Jet:
    return None if jet is None or len(jet) <= start else jet[start:]


def _step(
    recording: Recording,
    scheme: Scheme,
    at: tuple[Node, tuple[int, ...], list[Any]],
    found: dict[int, Any],
    own: set[int],
    start: int,
) -> None:
    """Push jets through one operation."""
    node, done, given = at
    spare = not recording.graph and len(done) == 1 and own.issuperset(node.slots)
    ends = start > 0 and all(slot is None or slot in recording.tail for slot in node.outs)
    straight = ends and is_linear(node)
    if straight:  # lower derivatives are not needed any more
        pairs = zip(node.slots, given)
        given = [jet if slot in recording.tail else _from(jet, start) for slot, jet in pairs]
        if all(jet is None for jet in given):
            return
    site = _site(recording, node, given, scheme, spare)
    cut = start if ends and not straight else 0
    for slot, jet in zip(node.outs, push(site._replace(start=cut) if cut else site)):
        if slot is None or jet is None:
            continue
        found[slot] = jet
        if makes_new(node) and jet.is_contiguous():
            own.add(slot)
    if not makes_new(node):
        own.difference_update(node.slots)  # of which something else is a view now


def _site(recording: Recording, node: Node, jets: list[Jet], scheme: Scheme, spare: bool) -> Site:
    """A node without the arguments through which nothing comes."""
    tape = recording.tape
    if any(jet is None for jet in jets):
        kept = [k for k, jet in enumerate(jets) if jet is not None]
        values = {place: tape.value(slot) for place, slot in zip(node.places, node.slots)}
        args = node.with_args([values[place] for place in node.places])
        places, slots = ([found[k] for k in kept] for found in (node.places, node.slots))
        node = node._replace(args=args, places=tuple(places), slots=tuple(slots))
        jets = [jets[k] for k in kept]
    return Site(node, tape, jets, scheme, recording.graph, spare, recording.known, _inline)


def _inline(site: Site, function: Callable[..., Any]) -> list[Jet]:
    """Propagate through ``function`` of the node's arguments."""
    slots = list(dict.fromkeys(site.node.slots))
    with torch.enable_grad():
        values = [site.tape.value(slot) for slot in slots]
        own = [v.view_as(v) if site.graph else v.detach().requires_grad_() for v in values]
        tape = Tape(own, graph=site.graph)
        with tape:
            out = site.node._replace(op=function)([own[slots.index(s)] for s in site.node.slots])
    outs: Sequence[Any] = out if isinstance(out, (tuple, list)) else [out]
    if len(outs) != len(site.node.outs):
        raise UntraceableError(f"{site.node.op} does not return what its decomposition does")
    jets = {slots.index(s): jet for s, jet in zip(site.node.slots, site.jets) if jet is not None}
    inner = _recording(Output([], None), tape, outs, site.graph)
    return propagate(inner, jets, site.scheme, site.start)
