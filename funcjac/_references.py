"""What second-order blocks must come to, by plain double backward and nothing else.

A random cotangent makes one scalar of each row's output. Its gradient is differentiated once
more, by ``torch.autograd.grad`` of the whole batch: along a random tangent for Hessians, along
each coordinate for their diagonals and traces. The same blind spots as those of one
vector-Jacobian product remain: what plain double backward gets wrong is wrong on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._batched import Call
from funcjac._directions import Spec, directions, row_shape
from funcjac._probe import Entry, Probe, outer_product, random_like
from funcjac._trace import check_square


def hessian_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    del spec
    inputs, dims = found.inputs, found.call.layout.diff_dims
    entries = []
    for j, x in enumerate(inputs):
        tangent = random_like(x, found.draw.generator)
        rows = _grad(found.grads[j], inputs, tangent, graph=graph)
        seeds = [outer_product(seed, tangent, dims[j]) for seed in found.seeds]
        entries += [Entry(seeds, row, x, dim) for row, x, dim in zip(rows, inputs, dims)]
    return entries + _slopes(found)


def diagonal_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    del spec
    entries = []
    for j, (x, dim) in enumerate(zip(found.inputs, found.call.layout.diff_dims)):
        basis = directions(found.call.with_inputs(found.inputs), Spec("diagonal"), j, exact=True)
        pieces = [_bent(found, j, one, one, graph=graph) for one in basis.left]
        row = row_shape(x, dim)
        if dim is None:
            entries.append(Entry(found.seeds, torch.stack(pieces).sum(1).view(row), x, None))
            continue
        like = x.movedim(dim, 0)
        grad = torch.stack(pieces, -1).view(-1, *row)
        entries.append(Entry(found.seeds, grad, like, 0))
    return entries + _slopes(found)


def laplacian_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    call = found.call.with_inputs(found.inputs)
    batch = found.seeds[0].shape[0]
    total = found.inputs[0].new_zeros(batch)
    size = total.detach()
    for j in range(len(found.inputs)):
        left, right, weights, _ = directions(call, spec, j, exact=True)
        right = left if right is None else right
        for one, two, weight in zip(left, right, weights):
            term = weight * _bent(found, j, one, two, graph=graph)
            total, size = total + term, size + term.detach().abs()
    shared = None in call.layout.diff_dims
    grad, dim = (total.sum(), None) if shared else (total, 0)
    size = size.sum() if shared else size
    first = _slopes(found) if spec.samples is None else []
    return [Entry(found.seeds, grad, grad.detach(), dim, size), *first]


def partials_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    (x,), (dim,) = found.inputs, found.call.layout.diff_dims
    batch = found.seeds[0].shape[0]
    known: dict[tuple[int, ...], Tensor | None] = {}

    def derivative(index: tuple[int, ...]) -> Tensor | None:
        """The gradient of a partial derivative of the scalar of each row."""
        if index not in known:
            before = (
                found.grads[0] if not index else _of_rows(derivative(index[:-1]), dim, index[-1])
            )
            known[index] = before if not index else _grad(before, [x], None, graph=True)[0]
        return known[index]

    entries = []
    for index in spec.indices:
        if not index:
            pairs = zip(found.seeds, found.output.leaves)
            rows = [(s.to(o.dtype) * o).reshape(batch, -1).sum(1) for s, o in pairs]
            value = sum(rows[1:], rows[0])
        else:
            value = _of_rows(derivative(index[:-1]), dim, index[-1])
        grad = x.new_zeros(batch) if value is None else value
        if dim is None and index:
            entries.append(Entry(found.seeds, grad.sum(), grad.detach().sum(), None))
        else:
            entries.append(Entry(found.seeds, grad, grad.detach(), 0))
    return entries


def _of_rows(grad: Tensor | None, dim: int | None, coordinate: int) -> Tensor | None:
    if grad is None:
        return None
    return grad[coordinate].unsqueeze(0) if dim is None else grad.movedim(dim, 0)[:, coordinate]


def divergence_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    call, output = found.call, found.output
    check_square(call, output)
    batch = output.leaves[0].shape[0]
    total = output.leaves[0].new_zeros(batch)
    size = total.detach()
    for i, (x, dim) in enumerate(zip(found.inputs, call.layout.diff_dims)):
        flat = output.leaves[i].reshape(batch, -1)
        count = flat.shape[1] if spec.samples is None else spec.samples
        for n in range(count):
            probe = None if spec.samples is None else call.extras[i][:, n].reshape(batch, -1)
            scalar = flat[:, n] if probe is None else (flat * probe).sum(1)
            (grad,) = _grad(scalar, [x], None, graph=graph)
            if grad is None:
                continue
            rows = grad.expand(batch, *grad.shape) if dim is None else grad.movedim(dim, 0)
            rows = rows.reshape(batch, -1)
            term = rows[:, n] if probe is None else (rows * probe).sum(1) / count
            total, size = total + term, size + term.detach().abs()
    seed = random_like(total, found.draw.generator)
    return [Entry([seed], seed * total, total.detach(), 0, size * seed.abs())]


# --- one more backward --------------------------------------------------------------------


def _bent(found: Probe, j: int, one: Tensor, two: Tensor, *, graph: bool) -> Tensor:
    """``two . H one`` in each row, ``(B,)``; the sum over rows ``(1,)`` of a shared input."""
    x, dim = found.inputs[j], found.call.layout.diff_dims[j]
    (row,) = _grad(found.grads[j], [x], one, graph=graph)
    if row is None:
        return x.new_zeros(1 if dim is None else x.shape[dim])
    product = row * two
    return product.sum().view(1) if dim is None else product.movedim(dim, 0).reshape(x.shape[dim], -1).sum(1)


def _grad(
    out: Tensor | None, inputs: list[Tensor], cotangent: Tensor | None, *, graph: bool
) -> Sequence[Tensor | None]:
    if out is None or not out.requires_grad:
        return [None] * len(inputs)
    cotangent = torch.ones_like(out) if cotangent is None else cotangent
    return torch.autograd.grad(
        out, inputs, cotangent, retain_graph=True, create_graph=graph, allow_unused=True
    )


def _slopes(found: Probe) -> list[Entry]:
    """The first derivatives, where they are given as well."""
    if not found.call.options.return_value:
        return []
    dims = found.call.layout.diff_dims
    return [
        Entry(found.seeds, None if g is None else g, x, dim)
        for g, x, dim in zip(found.grads, found.inputs, dims)
    ]


__all__ = [
    "Call",
    "diagonal_entries",
    "divergence_entries",
    "hessian_entries",
    "laplacian_entries",
    "partials_entries",
]
