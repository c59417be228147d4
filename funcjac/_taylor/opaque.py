"""Operations of unknown structure, by transposes of vector-Jacobian products.

No forward-mode formula is used (J. Townsend, "A new trick for calculating Jacobian vector
products", 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import over_basis, vector_jacobian
from funcjac._taylor.jets import Jet, Site, add
from funcjac._taylor.recorder import Node
from funcjac.errors import UntraceableError


def opaque(site: Site) -> list[Jet | None]:
    """Propagates through any operation, by three reverse passes for a second derivative."""
    if site.scheme.order > 2:
        raise UntraceableError(f"{site.node.op} has no rule for derivatives of order three")
    copies = variables(site)
    inputs = list(copies.values())
    with torch.enable_grad():
        outs = _differentiable(rerun(site.node, copies))
        seeds = [torch.zeros_like(out, requires_grad=True) for out in outs.values()]
        grads = _grad(list(outs.values()), inputs, seeds, create_graph=True)
        levels = [_pushed(site, grads, seeds, order) for order in range(1, site.scheme.order + 1)]
        if len(levels) > 1 and _depends_on(grads, inputs):
            bends = _bends(site, list(outs))
            levels[1] = [add(tangent, bend) for tangent, bend in zip(levels[1], bends)]
    jets: list[Jet | None] = [None] * len(site.node.outs)
    for (place, out), *stacks in zip(outs.items(), *levels):
        if any(stack is not None for stack in stacks):
            cast = [None if stack is None else stack.to(out.dtype) for stack in stacks]
            jets[place] = tuple(cast if site.create_graph else map(_detached, cast))
    return jets


def _detached(stack: Tensor | None) -> Tensor | None:
    return None if stack is None else stack.detach()


def _pushed(
    site: Site, grads: list[Tensor | None], seeds: list[Tensor], order: int
) -> Sequence[Tensor | None]:
    """Jacobian-vector products with the derivatives of one order."""
    live = [k for k, grad in enumerate(grads) if grad is not None and grad.requires_grad]
    if not live or all(stack is None for stack in site.level(order)):
        return [None] * len(seeds)
    slots = list(dict.fromkeys(site.node.slots))
    stacks = dict(zip(site.node.slots, site.filled(order)))

    def pull(*tangents: Tensor) -> Sequence[Tensor | None]:
        outs = [grads[k] for k in live]
        return _grad(outs, seeds, list(tangents), create_graph=site.create_graph)

    return over_basis(pull, *[stacks[slots[k]] for k in live])


def _depends_on(grads: list[Tensor | None], inputs: list[Tensor]) -> bool:
    live = [grad for grad in grads if grad is not None and grad.requires_grad]
    zeros = [torch.zeros_like(grad) for grad in live]
    if not live:
        return False
    return any(grad is not None for grad in _grad(live, inputs, zeros, create_graph=False))


def _bends(site: Site, places: list[int]) -> list[Tensor | None]:
    """Second derivatives of each result, each pair of directions with copies of its own."""
    scheme, nothing = site.scheme, list["Tensor | None"]([None] * len(places))
    if all(stack is None for stack in site.level(1)):
        return nothing
    slots = site.node.slots
    tangents = dict(zip(slots, site.filled(1)))
    pairs = [scheme.pairs(stack) for stack in tangents.values()]
    copies = [
        value.expand(len(left), *value.shape)
        for value, (left, _) in zip(variables(site).values(), pairs)
    ]

    def run(*rows: Tensor) -> list[Tensor]:
        out = rerun(site.node, dict(zip(tangents, rows)))
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        return [outs[place] for place in places]

    outs = [out for out in over_basis(run, *copies) if out is not None]
    seeds = [torch.zeros_like(out, requires_grad=True) for out in outs]
    grads = _grad(outs, copies, seeds, create_graph=True)
    slopes = _contracted(grads, [left for left, _ in pairs], copies, create_graph=True)
    graph = site.create_graph
    bends = _contracted(slopes, [right for _, right in pairs], seeds, create_graph=graph)
    return [None if bend is None else scheme.weighted(bend) for bend in bends]


def _contracted(
    grads: list[Tensor | None], tangents: list[Tensor], inputs: list[Tensor], *, create_graph: bool
) -> Any:
    """Gradient of ``sum(grads * tangents)`` by ``inputs``."""
    live = [k for k, grad in enumerate(grads) if grad is not None and grad.requires_grad]
    if not live:
        return [None] * len(inputs)
    outs, cotangents = [grads[k] for k in live], [tangents[k] for k in live]
    return _grad(outs, inputs, cotangents, create_graph=create_graph)


# --- running an operation a second time ---------------------------------------------------


def variables(site: Site) -> dict[int, Tensor]:
    """Values of the slots, cut off from the operations that made them unless a graph is wanted."""
    values = {slot: site.recorder.value(slot) for slot in site.node.slots}
    if not site.create_graph:
        return {slot: value.detach().requires_grad_() for slot, value in values.items()}
    with torch.enable_grad():
        return {slot: value.view_as(value) for slot, value in values.items()}


def rerun(node: Node, values: dict[int, Tensor]) -> Any:
    return node([values[slot] for slot in node.slots])


def _differentiable(out: Any) -> dict[int, Tensor]:
    """Results that have derivatives, by their place."""
    outs = enumerate(out if isinstance(out, (tuple, list)) else [out])
    return {
        place: tensor
        for place, tensor in outs
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.requires_grad
    }


def _grad(outs: Any, inputs: list[Tensor], seeds: list[Tensor], *, create_graph: bool) -> Any:
    return vector_jacobian(outs, inputs, seeds, retain=True, graph=create_graph)
