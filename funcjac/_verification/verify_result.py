"""Verifies a result: one vector-Jacobian product verifies a batched Jacobian.

Draw a random cotangent ``v`` of the output's shape. If rows are independent and the Jacobian is
right, plain ``autograd.grad(y, x, v)`` equals ``v[b] @ J[b]`` in every row ``b``. What this can
miss: a batch of one cannot show mixing; a derivative that plain reverse mode itself gets wrong (a
custom backward, a partial ``detach``) is wrong on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from funcjac._arguments import pytree
from funcjac._engines.run_func import Derivatives, Run
from funcjac._verification.reference_vjp import Entry, Probe, make_reference
from funcjac._verification.row_independence import check_rows
from funcjac._verification.tolerance import (
    bound,
    error_of,
    is_alike,
    largest,
    magnitude,
    saved_tensors,
    tolerance_of,
    wide,
)
from funcjac._verification.verify_backward import backward_mismatch

_MOST_PRODUCTS = 2**14  # held at once, of a cotangent and a block
_FEW = 2**10  # numbers whose norm is taken in no memory of its own


class Comparison(NamedTuple):
    """Of an entry: ``(B, N)`` each, or ``(1, N)`` over all rows."""

    computed: Tensor  # with a graph, if the result has one
    reference: Tensor
    norm: Tensor  # of the terms of what was computed
    size: Tensor | None  # of the terms of the reference


def problem_of(
    run: Run, result: Derivatives, number: int, modules: Iterable[nn.Module], engine: str = "sum"
) -> tuple[str | None, bool]:
    """What is wrong with a result, in words, and whether anything was compared.

    Raises:
        BatchMixingError: rows depend on one another.
    """
    probe, entries = make_reference(run, number)
    limit, worst, compared = tolerance_of(run), 0.0, True
    with torch.set_grad_enabled(run.create_graph):
        comparisons = [_compare(result, e, entry) for e, entry in enumerate(entries)]
    if not all(_is_near(*comparison[:3], limit) for comparison in comparisons):
        by_row = _subtracted(run, probe)
        floors = [by_row.sum() if entry.dim is None else by_row.unsqueeze(1) for entry in entries]
        worst, compared = _worst_error(comparisons, floors, limit)
    if worst > 1:
        check_rows(run, modules)
        floors = _rounded_in_run(run, probe, entries)
        if _worst_error(comparisons, floors, limit)[0] > 1:
            off = worst * limit
            return f"its product with a random cotangent is off by {off:.2g} of its size", True
    problem = None if engine == "sum" else _extras_mismatch(run, result)
    if problem is None and run.create_graph:
        products = [comparison.computed for comparison in comparisons]
        problem = backward_mismatch(run, entries, products, limit, number)
    return problem, compared or worst > 1


def _rounded_in_run(run: Run, probe: Probe, entries: list[Entry]) -> list[float]:
    """Size, for each entry, of the numbers inside of ``func``, which were rounded.

    What cancels leaves nothing else behind; see ``test_constants_by_cancellation``. In a saturated
    row little is left of derivatives that are large in others.
    """
    grads = [grad for grad in (*probe.grads, *[e.grad for e in entries]) if grad is not None]
    floor = max(1.0, largest(saved_tensors(run.output.leaves, run.inputs)), largest(grads))
    return [floor * largest(entry.seeds) for entry in entries]


def _is_near(computed: Tensor, reference: Tensor, norm: Tensor, limit: float) -> bool:
    """Whether all is finite, and errors are small beside what was added up, as they mostly are."""
    if not reference.numel():
        return True
    error = (computed.detach() - reference).abs_()
    return 0 <= (limit * norm).sub_(error).min().item() < math.inf


def _worst_error(
    comparisons: list[Comparison], floors: Sequence[Any], limit: float
) -> tuple[float, bool]:
    """The largest error as a multiple of its bound, and whether each reference has a number."""
    worst, compared = 0.0, True
    for (computed, reference, norm, size), floor in zip(comparisons, floors):
        if reference.numel():
            compared = compared and bool(reference.isfinite().any())
            scale = norm + magnitude(reference)
            scale = scale if size is None else scale + magnitude(size).reshape(scale.shape)
            ratio = error_of(computed.detach(), reference) / bound(limit, scale, floor)
            worst = max(worst, ratio.nan_to_num(0, torch.inf).max().item())
    return worst, compared


def _subtracted(run: Run, probe: Probe) -> Tensor:
    """Size in each row, ``(B,)``, of what derivatives are differences of, which was rounded."""
    batch, step = run.call.batch, max(1.0, largest(run.inputs))
    pairs = zip(probe.seeds, run.output.leaves)
    sizes = [magnitude(seed) * magnitude(out) / step for seed, out in pairs]
    if run.call.options.operator.is_second_order:
        for grad, dim in zip(probe.grads, run.dims):
            if grad is not None:
                rows = magnitude(grad)
                sizes.append(rows.unsqueeze(0) if dim is None else rows.movedim(dim, 0))
    total = torch.zeros(batch, dtype=torch.float64, device=run.inputs[0].device)
    return sum([s.reshape(len(s), -1).amax(1) for s in sizes if s.numel()], total)


def _compare(result: Derivatives, e: int, entry: Entry) -> Comparison:
    grad = torch.zeros_like(entry.like) if entry.grad is None else entry.grad.detach()
    grad = grad.unsqueeze(0) if entry.dim is None else grad.movedim(entry.dim, 0)
    reference = wide(grad).reshape(len(grad), -1)
    products, norms = [], []
    for seed, blocks in zip(entry.seeds, result.blocks):
        if seed.numel() and reference.numel():
            product, norm = _contract(seed, blocks[e], summed=entry.dim is None)
            products.append(product.reshape(reference.shape))
            norms.append(norm.reshape(reference.shape).nan_to_num_(0, 0, 0))
    zeros = [] if products else [torch.zeros_like(reference)]
    return Comparison(_added(products or zeros), reference, _added(norms or zeros), entry.size)


def _contract(seed: Tensor, block: Tensor, *, summed: bool) -> tuple[Tensor, Tensor]:
    """``sum_m seed[b, m] J[b, m, n]``, and the norm of what is summed: ``(B, N)`` or ``(1, N)``."""
    right = wide(block).reshape(len(seed), seed.shape[1:].numel(), -1)
    left = wide(seed).to(right.dtype).reshape(len(seed), -1, 1)
    step = max(_MOST_PRODUCTS // max(right.shape[1:].numel(), 1), 1)
    pairs = [(left, right)] if len(seed) <= step else zip(left.split(step), right.split(step))
    sums, norms = [], []
    for cotangents, rows in pairs:
        terms = cotangents * rows
        products, values = terms.sum(1), terms.detach()
        if values.numel() <= _FEW:
            sizes = vector_norm(values, dim=1)
        else:  # a tenth of the time, of many
            sizes = values.square().sum(1).sqrt()
        sums.append(products.sum(0, keepdim=True) if summed else products)
        norms.append(sizes.sum(0, keepdim=True) if summed else sizes)
    join = _added if summed or len(sums) == 1 else torch.cat
    return join(sums), join(norms)


def _added(tensors: list[Tensor]) -> Tensor:
    return sum(tensors[1:], tensors[0])


def _extras_mismatch(run: Run, result: Derivatives) -> str | None:
    """Whether value or aux of another engine are not what ``func`` returned for the batch."""
    options, limit = run.call.options, tolerance_of(run)
    if options.return_value:
        floor, pairs = largest(run.inputs), zip(run.output.leaves, result.output.leaves)
        if not all(is_alike(e.detach(), c.detach(), limit, floor) for e, c in pairs):
            return "its value is not that of the batch"
    if options.has_aux:
        expected, spec = pytree.flatten(run.output.aux)
        computed, computed_spec = pytree.flatten(result.output.aux)
        same = (_is_same_aux(*pair, limit) for pair in zip(expected, computed))
        if spec != computed_spec or not all(same):
            return "its aux is not that of the batch"
    return None


def _is_same_aux(expected: Any, computed: Any, limit: float) -> bool:
    if not isinstance(expected, Tensor) or not isinstance(computed, Tensor):
        is_plain = isinstance(expected, (bool, int, float, str))
        return type(expected) is type(computed) and not (is_plain and expected != computed)
    if expected.shape != computed.shape or expected.dtype != computed.dtype:
        return False
    return torch.allclose(wide(expected), wide(computed), limit, limit, equal_nan=True)
