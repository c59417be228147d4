"""Vector-Jacobian products of a graph, and Jacobian-vector products as their transpose."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import (
    Tensors,
    backward,
    has_levels,
    over_basis,
    vector_jacobian,
)

Product = Callable[[Tensor], Tensors]


def of_each(product: Product, vectors: Tensor) -> Tensors:
    """``product`` of each of ``vectors`` ``(k, ...)``; a single one takes no vmap."""
    if vectors.shape[0] == 1:
        return [None if x is None else x.unsqueeze(0) for x in product(vectors.select(0, 0))]
    return over_basis(product, vectors)


def pull(root: Any, inputs: Sequence[Tensor], cotangents: Tensor, *, create_graph: bool) -> Tensors:
    """Gradients ``(k, *x.shape)`` by each input, from cotangents of a place in its graph."""
    product = functools.partial(backward, root, inputs, retain=True, graph=create_graph)
    return of_each(product, cotangents)


def pushforwards(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], *, create_graph: bool
) -> list[Product]:
    """For each input, what takes a tangent of it to tangents of ``outs``.

    The transpose of one vector-Jacobian product: ``u -> J^T u`` is linear, and its own
    vector-Jacobian product is ``J`` (J. Townsend, "A new trick for calculating Jacobian vector
    products", 2017), so that only torch's reverse formulas are used.
    """
    roots = [out for out in outs if out.requires_grad]

    def product(transpose: Product | None, tangent: Tensor) -> Tensors:
        if transpose is None:
            return [None] * len(outs)
        pushed = iter(transpose(tangent))
        return [next(pushed) if out.requires_grad else None for out in outs]

    transposes = _transposes(roots, inputs, create_graph) if roots else [None] * len(inputs)
    return [functools.partial(product, transpose) for transpose in transposes]


def _transposes(
    roots: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool
) -> list[Product | None]:
    """The transpose of ``u -> J^T u`` for each input; ``None`` for zero."""
    vjp = functools.partial(vector_jacobian, retain=True, graph=True)
    if has_levels():  # a tensor of another level must stand for the cotangent
        zeros = [torch.zeros_like(root) for root in roots]
        products = [lambda *u, x=x: vjp(roots, [x], u)[0] for x in inputs]
        grads = vjp(roots, inputs, zeros)
        return [
            None if grad is None else torch.func.vjp(product, *zeros)[1]
            for product, grad in zip(products, grads)
        ]
    with torch.enable_grad():
        zeros = [torch.zeros_like(root, requires_grad=True) for root in roots]
        grads = vjp(roots, inputs, zeros)
    product = functools.partial(backward, retain=True, graph=create_graph)
    return [
        functools.partial(product, grad, zeros) if grad is not None and grad.requires_grad else None
        for grad in grads
    ]
