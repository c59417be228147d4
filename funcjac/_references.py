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

from funcjac._block import Block
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
    factors, seeds = _row_factors(found)
    for j, (x, dim) in enumerate(zip(found.inputs, found.call.layout.diff_dims)):
        call = found.call.with_inputs(found.inputs)
        basis = directions(call, Spec("diagonal"), j, exact=True).left
        bent = _bent(found, j, basis, basis, factors, graph=graph)
        row = row_shape(x, dim)
        if dim is None:
            entries.append(Entry(found.seeds, bent.view(row), x, None))
        else:
            grad = bent.movedim(0, -1).reshape(-1, *row)
            entries.append(Entry(seeds, grad, x.movedim(dim, 0), 0))
    return entries + _slopes(found)


def laplacian_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    call = found.call.with_inputs(found.inputs)
    shared = None in call.layout.diff_dims
    factors, seeds = (None, found.seeds) if shared else _row_factors(found)
    total = found.inputs[0].new_zeros(() if shared else call.batch)
    size = total.detach()
    for j in range(len(found.inputs)):
        left, right, weights, _ = directions(call, spec, j, exact=True)
        right = left if right is None else right
        bent = _bent(found, j, left, right, factors, graph=graph)
        terms = weights.view(-1, *[1] * (bent.ndim - 1)) * bent
        over = list(range(terms.ndim)) if shared else 0
        total, size = total + terms.sum(over), size + terms.detach().abs().sum(over)
    first = _slopes(found) if spec.samples is None else []
    return [Entry(seeds, total, total.detach(), None if shared else 0, size), *first]


def partials_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    (x,), (dim,) = found.inputs, found.call.layout.diff_dims
    batch = found.seeds[0].shape[0]
    factors, _ = (None, None) if dim is None else _row_factors(found)
    known: dict[tuple[int, ...], Tensor | None] = {(): found.grads[0]}

    def derivative(index: tuple[int, ...]) -> Tensor | None:
        """The gradient of a partial derivative of each row's scalar, times a factor."""
        if index not in known:
            before = _of_rows(derivative(index[:-1]), dim, index[-1])
            known[index] = _grad(before, [x], factors, graph=True)[0]
        return known[index]

    entries = []
    for index in spec.indices:
        if not index:
            pairs = zip(found.seeds, found.output.leaves)
            rows = [(s.to(o.dtype) * o).reshape(batch, -1).sum(1) for s, o in pairs]
            entries.append(Entry(found.seeds, sum(rows[1:], rows[0]), rows[0].detach(), 0))
            continue
        value = _of_rows(derivative(index[:-1]), dim, index[-1])
        grad = x.new_zeros(1 if dim is None else batch) if value is None else value
        if dim is None:
            entries.append(Entry(found.seeds, grad.sum(), grad.detach().sum(), None))
            continue
        times = x.new_ones(batch) if factors is None else factors ** (len(index) - 1)
        seeds = [_times(seed, times) for seed in found.seeds]
        entries.append(Entry(seeds, grad, grad.detach(), 0))
    return entries if graph else [entry._replace(grad=_cut(entry.grad)) for entry in entries]


def _cut(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach()


def _of_rows(grad: Tensor | None, dim: int | None, coordinate: int) -> Tensor | None:
    if grad is None:
        return None
    return grad[coordinate].unsqueeze(0) if dim is None else grad.movedim(dim, 0)[:, coordinate]


def divergence_entries(found: Probe, *, graph: bool, spec: Spec) -> list[Entry]:
    call, output = found.call, found.output
    check_square(call, output)
    batch = call.batch
    factors, _ = _row_factors(found)
    factors = found.draw.scale * factors.to(output.leaves[0].dtype)  # they are its seeds
    shared = None in call.layout.diff_dims  # then only the sum over rows is known
    total = output.leaves[0].new_zeros(() if shared else batch)
    size = total.detach()
    for i, (x, dim) in enumerate(zip(found.inputs, call.layout.diff_dims)):
        if not x.numel():
            continue
        flat = output.leaves[i].reshape(batch, -1)
        count = flat.shape[1] if spec.samples is None else spec.samples
        block = Block((count, 1 if dim is None else batch), 0, graph)
        for n in range(count):
            probe = None if spec.samples is None else call.extras[i][:, n].reshape(batch, -1)
            scalar = flat[:, n] if probe is None else (flat * probe).sum(1)
            (grad,) = _grad(scalar, [x], factors, graph=graph)
            if grad is not None:
                rows = grad.unsqueeze(0) if dim is None else grad.movedim(dim, 0)
                rows = rows.reshape(len(rows), -1)
                grad = rows[:, n] if probe is None else (rows * probe).sum(1) / count
            block.add(grad, 0, n, n + 1, many=False)
        terms = block.result(block.shape, x, x)
        over = [0, 1] if shared else 0
        total, size = total + terms.sum(over), size + terms.detach().abs().sum(over)
    return [Entry([factors], total, total.detach(), None if shared else 0, size)]


# --- rows apart ---------------------------------------------------------------------------


def _row_factors(found: Probe) -> tuple[Tensor, list[Tensor]]:
    """Another factor for each row, so that what leaks from row to row shows, and seeds with it.

    Equal directions in all rows are what the sum trick uses itself.
    """
    x, batch = found.inputs[0], found.seeds[0].shape[0]
    drawn = torch.rand(batch, generator=found.draw.generator, device="cpu", dtype=torch.float64)
    factors = (drawn + 0.5).to(x.device, x.dtype)
    return factors, [_times(seed, factors) for seed in found.seeds]


def _times(seed: Tensor, factors: Tensor) -> Tensor:
    return seed * factors.to(seed.dtype).view(-1, *[1] * (seed.ndim - 1))


# --- one more backward --------------------------------------------------------------------


def _bent(
    found: Probe, j: int, left: Tensor, right: Tensor, factors: Tensor | None, *, graph: bool
) -> Tensor:
    """``right . H left`` in each row for each pair ``(K, B)``, ``(K,)`` of a shared input."""
    x, dim = found.inputs[j], found.call.layout.diff_dims[j]
    if dim is not None and factors is not None:
        factors = factors.view(*[1] * dim, -1, *[1] * (x.ndim - 1 - dim))
    block = Block((len(left), *([] if dim is None else [x.shape[dim]])), 0, graph)
    for k, (one, two) in enumerate(zip(left, right)):
        tangent = one if dim is None or factors is None else one * factors
        (row,) = _grad(found.grads[j], [x], tangent, graph=graph)
        if row is not None:
            row = row * two
            row = row.sum() if dim is None else row.movedim(dim, 0).reshape(x.shape[dim], -1).sum(1)
        block.add(row, 0, k, k + 1, many=False)
    return block.result(block.shape, x, x)


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
    return [Entry(found.seeds, g, x, dim) for g, x, dim in zip(found.grads, found.inputs, dims)]
