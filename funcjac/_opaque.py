"""Operations of which nothing is known but how to differentiate them.

Derivatives along directions are transposes of vector-Jacobian products, so that no
forward-mode formula is used (J. Townsend, "A new trick for calculating Jacobian vector
products", 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._jets import Jet, Site, extend, filled
from funcjac._native import over_basis
from funcjac.errors import UntraceableError

Variables = dict[int, Tensor]


def opaque(site: Site) -> list[Jet]:
    """An operation of which nothing is known: three reverse passes for a second derivative."""
    if site.scheme.higher:
        raise UntraceableError(f"{site.node.op} has no rule for derivatives of order three")
    jets = {slot: jet for slot, jet in zip(site.node.slots, site.jets) if jet is not None}
    n, longest = site.scheme.firsts, max(map(len, jets.values()))
    slots = list(jets)
    stacks = [filled(jet, longest) for jet in jets.values()]
    own = variables(site, slots)
    with torch.enable_grad():
        outs = _differentiable(rerun(site, own))
        seeds = [torch.zeros_like(out, requires_grad=True) for _, out in outs]
        grads = _grad([out for _, out in outs], list(own.values()), seeds, graph=True)
        tangents = _pushed(grads, seeds, stacks, graph=site.graph)
        curved = _depends_on(grads, list(own.values()))
        bends: list[Jet] = [None] * len(outs)
        if curved and site.scheme.seconds:
            bends = _second(site, slots, [stack[:n] for stack in stacks], [p for p, _ in outs])
    found: list[Jet] = [None] * len(site.node.outs)
    for (place, out), tangent, bend in zip(outs, tangents, bends):
        if site.node.outs[place] is None or tangent is None:
            continue
        jet = tangent if site.graph else tangent.detach()
        if bend is not None:
            jet = extend(jet.clone(), bend if site.graph else bend.detach(), n)
        found[place] = jet.to(out.dtype)
    return found


def _pushed(
    grads: list[Tensor | None], seeds: list[Tensor], stacks: list[Tensor], *, graph: bool
) -> Sequence[Tensor | None]:
    live = [k for k, g in enumerate(grads) if g is not None and g.requires_grad]
    if not live:
        return [None] * len(seeds)
    outs = [g for g in grads if g is not None and g.requires_grad]

    def pull(*tangents: Tensor) -> Sequence[Tensor | None]:
        return _grad(outs, seeds, list(tangents), graph=graph)

    return over_basis(pull, *[stacks[k] for k in live])


def _depends_on(grads: list[Tensor | None], inputs: list[Tensor]) -> bool:
    live = [g for g in grads if g is not None and g.requires_grad]
    ones = [torch.zeros_like(g) for g in live]
    return bool(live) and any(g is not None for g in _grad(live, inputs, ones, graph=False))


def _second(site: Site, slots: list[int], firsts: list[Tensor], places: list[int]) -> list[Jet]:
    """Second derivatives of each result, each pair of directions with copies of its own."""
    scheme = site.scheme
    left = [first[scheme.left] for first in firsts]
    right = [first[scheme.right] for first in firsts]
    copies = {
        slot: x.expand(len(t), *x.shape)
        for (slot, x), t in zip(variables(site, slots).items(), left)
    }
    outs = _mapped(site, copies, places)
    seeds = [torch.zeros_like(out, requires_grad=True) for out in outs]
    inputs = list(copies.values())
    grads = _grad(outs, inputs, seeds, graph=True)
    live = [k for k, g in enumerate(grads) if g is not None and g.requires_grad]
    again = _grad([grads[k] for k in live], inputs, [left[k] for k in live], graph=True)
    live = [k for k, g in enumerate(again) if g is not None and g.requires_grad]
    if not live:
        return [None] * len(outs)
    bends = _grad([again[k] for k in live], seeds, [right[k] for k in live], graph=site.graph)
    return [None if bend is None else scheme.total(bend) for bend in bends]


def _mapped(site: Site, copies: Variables, places: list[int]) -> list[Tensor]:
    slots = list(copies)

    def one(*xs: Tensor) -> list[Tensor]:
        out = rerun(site, dict(zip(slots, xs)))
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        return [outs[place] for place in places]

    return [out for out in over_basis(one, *copies.values()) if out is not None]


# --- running an operation again -----------------------------------------------------------


def variables(site: Site, slots: list[int]) -> Variables:
    """The values of slots, to differentiate by apart from whatever made them."""
    values = {slot: site.value(site.node.slots.index(slot)) for slot in slots}
    if site.graph:
        with torch.enable_grad():
            return {slot: value.view_as(value) for slot, value in values.items()}
    return {slot: value.detach().requires_grad_() for slot, value in values.items()}


def rerun(site: Site, own: Variables) -> Any:
    slots = site.node.slots
    given = [own[s] if s in own else site.value(i) for i, s in enumerate(slots)]
    return site.node(given)


def first(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, list)) else out


def _differentiable(out: Any) -> list[tuple[int, Tensor]]:
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    return [
        (place, tensor)
        for place, tensor in enumerate(outs)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.requires_grad
    ]


def _grad(outs: Any, inputs: list[Tensor], seeds: list[Tensor], *, graph: bool) -> Any:
    return torch.autograd.grad(
        outs, inputs, seeds, retain_graph=True, create_graph=graph, allow_unused=True
    )
