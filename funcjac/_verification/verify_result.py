"""Verifies a result: one vector-Jacobian product verifies a batched Jacobian.

Draw a random cotangent ``v`` of the output's shape. If rows are independent and the Jacobian is
right, plain ``autograd.grad(y, x, v)`` equals ``v[b] @ J[b]`` in every row ``b``. What this can
miss: a batch of one cannot show mixing; a derivative that plain reverse mode itself gets wrong (a
custom backward, a partial ``detach``) is wrong on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


def problem_of(
    run: Run, result: Derivatives, number: int, modules: Iterable[nn.Module], engine: str = "sum"
) -> tuple[str | None, bool]:
    """What is wrong with a result, in words, and whether anything was compared.

    Raises:
        BatchMixingError: rows depend on one another.
    """
    probe, entries = make_reference(run, number)
    floors = _subtracted(run, probe)
    by_row = [floors.sum() if entry.dim is None else floors.unsqueeze(1) for entry in entries]
    worst, compared = _worst_error(run, result, entries, by_row)
    if worst > 1:
        check_rows(run, modules)
        if not _is_lost_in_run(run, result, probe, entries):
            off = worst * tolerance_of(run)
            return f"its product with a random cotangent is off by {off:.2g} of its size", True
    problem = None if engine == "sum" else _extras_mismatch(run, result)
    if problem is None and run.create_graph:
        problem = backward_mismatch(run, result, entries, number)
    return problem, compared or worst > 1


def _is_lost_in_run(run: Run, result: Derivatives, probe: Probe, entries: list[Entry]) -> bool:
    """Whether a difference is what rounding the numbers inside of ``func`` comes to.

    What cancels leaves nothing else behind; see ``test_constants_by_cancellation``. In a saturated
    row little is left of derivatives that are large in others.
    """
    grads = [grad for grad in (*probe.grads, *[e.grad for e in entries]) if grad is not None]
    floor = max(1.0, largest(saved_tensors(run.output.leaves, run.inputs)), largest(grads))
    floors = [floor * largest(entry.seeds) for entry in entries]
    return _worst_error(run, result, entries, floors)[0] <= 1


def _worst_error(
    run: Run, result: Derivatives, entries: list[Entry], floors: Sequence[Any]
) -> tuple[float, bool]:
    """The largest error as a multiple of its bound, and whether each reference has a number."""
    limit, worst, compared = tolerance_of(run), 0.0, True
    for e, (entry, floor) in enumerate(zip(entries, floors)):
        reference, error, scale = _compare(result, e, entry)
        if reference.numel():
            compared = compared and bool(reference.isfinite().any())
            ratio = error / bound(limit, scale, floor)
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


def _compare(result: Derivatives, e: int, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """Reference, error and size of terms of an entry: ``(B, N)``, or ``(1, N)`` over all rows."""
    grad = torch.zeros_like(entry.like) if entry.grad is None else entry.grad.detach()
    grad = grad.unsqueeze(0) if entry.dim is None else grad.movedim(entry.dim, 0)
    reference = wide(grad).reshape(len(grad), -1)
    computed, scale = torch.zeros_like(reference), magnitude(reference)
    for seed, blocks in zip(entry.seeds, result.blocks):
        if seed.numel() and reference.numel():
            product, norm = _contract(seed, blocks[e], summed=entry.dim is None)
            computed = computed + product.reshape(reference.shape)
            scale = scale + magnitude(norm).reshape(reference.shape)
    if entry.size is not None:
        scale = scale + magnitude(entry.size).reshape(reference.shape)
    return reference, error_of(computed, reference), scale


def _contract(seed: Tensor, block: Tensor, *, summed: bool) -> tuple[Tensor, Tensor]:
    """``sum_m seed[b, m] J[b, m, n]``, and the norm of what is summed: ``(B, N)`` or ``(1, N)``."""
    right = wide(block.detach()).reshape(len(seed), seed[0].numel(), -1)
    left = wide(seed).to(right.dtype).reshape(len(seed), -1, 1)
    step = max(_MOST_PRODUCTS // max(right[0].numel(), 1), 1)
    sums, norms = [], []
    for cotangents, rows in zip(left.split(step), right.split(step)):
        terms = cotangents * rows
        products = terms.sum(1)
        sizes = terms.square_().sum(1).sqrt_()  # ten times as fast as terms.norm(dim=1)
        sums.append(products.sum(0, keepdim=True) if summed else products)
        norms.append(sizes.sum(0, keepdim=True) if summed else sizes)
    if summed:
        return sum(sums[1:], sums[0]), sum(norms[1:], norms[0])
    return torch.cat(sums), torch.cat(norms)


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
