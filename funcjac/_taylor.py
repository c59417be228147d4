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
from funcjac._rules import makes_new, push
from funcjac._tape import Node, Tape
from funcjac.errors import UntraceableError


class Recording(NamedTuple):
    """One run of ``func``, and what there is to propagate through."""

    output: Output
    tape: Tape
    slots: list[int | None]
    nodes: list[tuple[Node, tuple[int, ...]]]
    graph: bool
    known: dict[int, Any]


def record(call: Call, context: Context) -> Recording:
    """Run ``func`` once.

    Raises:
        UntraceableError: it does something through which nothing can be propagated.
    """
    keep_memory()
    inputs = plain_inputs(call, context)
    tape = Tape(inputs, graph=context.graph)
    with torch.enable_grad(), tape:
        output = call(inputs)
    slots = [tape.slot(out) for out in output.leaves]
    nodes = tape.needed(slots)
    output = output if context.graph else detached(output)
    return Recording(output, tape, slots, nodes, context.graph, {})


def propagate(recording: Recording, jets: dict[int, Tensor], scheme: Scheme) -> list[Jet]:
    """Jets of the outputs, from those of inputs, by their number."""
    found: dict[int, Any] = dict(jets)
    own: set[int] = set()  # slots with a jet that is no part of another
    with nullcontext() if recording.graph else torch.no_grad():
        for node, done in recording.nodes:
            given = [found.get(slot) for slot in node.slots]
            if given.count(None) < len(given):
                _step(recording, scheme, node, done, given, found, own)
            for slot in done:
                found.pop(slot, None)
    return [None if slot is None else found.get(slot) for slot in recording.slots]


def _step(
    recording: Recording,
    scheme: Scheme,
    node: Node,
    done: tuple[int, ...],
    given: list[Any],
    found: dict[int, Any],
    own: set[int],
) -> None:
    """Push jets through one operation."""
    spare = not recording.graph and len(done) == 1 and own.issuperset(node.slots)
    site = _site(recording, node, given, scheme, spare)
    for slot, jet in zip(node.outs, push(site)):
        if slot is None or jet is None:
            continue
        found[slot] = jet
        if makes_new(node.op) and jet.is_contiguous():
            own.add(slot)


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
    found = [tape.slot(out) for out in outs]
    jets = {slots.index(s): jet for s, jet in zip(site.node.slots, site.jets) if jet is not None}
    inner = Recording(Output([], None), tape, found, tape.needed(found), site.graph, {})
    return propagate(inner, jets, site.scheme)
