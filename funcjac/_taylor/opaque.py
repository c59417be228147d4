"""Operations of unknown structure, by transposes of vector-Jacobian products.

No forward-mode formula is used (J. Townsend, "A new trick for calculating Jacobian vector
products", 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._engines.rows import added
from funcjac._environment.torch_private import over_basis, vector_jacobian
from funcjac._taylor.jets import Derivative, Site
from funcjac.errors import UntraceableError

Tensors = Sequence["Tensor | None"]


def opaque(site: Site) -> Derivative:
    """Propagates through any operation, by three reverse passes for a second derivative."""
    if site.scheme.order > 2:
        raise UntraceableError(f"{site.node.op} has no rule for derivatives of order three")
    variables, graph = site.variables(), site.recording.create_graph
    inputs = list(variables.values())
    with torch.enable_grad():
        results = site.node.run(variables)
        places = [
            place for place, out in enumerate(results) if getattr(out, "requires_grad", False)
        ]
        cotangents, grads = _pulled([results[place] for place in places], inputs)
        zeros = [torch.zeros_like(x) for x in inputs]
        is_linear = all(g is None for g in _contracted(grads, zeros, inputs, graph=False))

    def pushed(*tangents: Tensor) -> Tensors:
        return _contracted(grads, tangents, cotangents, graph=graph)

    def derivative(order: int) -> Tensors:
        stacks: Tensors = [None] * len(places)
        with torch.enable_grad():
            if not site.is_zero(order):
                stacks = over_basis(pushed, *site.filled(order).values())
            if order == 2 and not (is_linear or site.is_zero(1)):
                stacks = [added(a, b) for a, b in zip(stacks, _curvature(site, places))]
        by_place = dict(zip(places, stacks))
        return [by_place.get(place) for place in range(len(results))]

    return derivative


def _curvature(site: Site, places: list[int]) -> Tensors:
    """Second derivatives of the results, each pair of directions with copies of its own."""
    scheme, variables = site.scheme, site.variables()
    left, right = zip(*[scheme.pairs(stack) for stack in site.filled(1).values()])
    copies = [x.expand(len(stack), *x.shape) for x, stack in zip(variables.values(), left)]

    def run(*rows: Tensor) -> Tensors:
        results = site.node.run(dict(zip(variables, rows)))
        return [results[place] for place in places]

    cotangents, grads = _pulled(over_basis(run, *copies), copies)
    slopes = _contracted(grads, left, copies, graph=True)
    seconds = _contracted(slopes, right, cotangents, graph=site.recording.create_graph)
    return [None if second is None else scheme.weighted(second) for second in seconds]


def _pulled(outs: Sequence[Any], inputs: list[Tensor]) -> tuple[list[Tensor], Tensors]:
    """Cotangents, and the vector-Jacobian products as linear functions of them."""
    cotangents = [torch.zeros_like(out, requires_grad=True) for out in outs]
    return cotangents, vector_jacobian(outs, inputs, cotangents, retain=True, graph=True)


def _contracted(
    outs: Tensors, vectors: Sequence[Tensor], inputs: list[Tensor], *, graph: bool
) -> Tensors:
    """Gradient of ``sum(outs * vectors)`` by ``inputs``."""
    pairs = [(out, v) for out, v in zip(outs, vectors) if out is not None and out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    live, vectors = zip(*pairs)
    return vector_jacobian(live, inputs, vectors, retain=True, graph=graph)
