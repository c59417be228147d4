"""One vector-Jacobian product verifies a batched Jacobian.

Draw a random cotangent ``v`` of the output's shape. If rows are independent and the Jacobian is
right, plain ``autograd.grad(y, x, v)`` equals ``v[b] @ J[b]`` in every row ``b``: one backward
pass through the graph of the run, without torch.func, so that an error of torch's batching rules
or formulas shows, and so does a function that mixes rows.

NOTE [Tolerance]
Numbers count as equal up to the square root of the dtype's epsilon, or to ``_ROUNDINGS`` of the
largest number of their row and of what they are differences of. Where they differ by more,
the reference is asked how well it knows itself: the cotangent is multiplied by a few factors that
are no powers of two, which leaves the arithmetic but rounds it in another way. A difference of up
to ``_NOISE`` times what that moves is rounding. A first derivative has one more chance, for
backward passes that are not linear (a hook that clamps): unit cotangents, half of the rows off.

What this can miss: a batch of one cannot show mixing; a derivative that plain reverse mode
itself gets wrong (a custom backward, a partial ``detach``) is wrong on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._engines.basis import identity, spread
from funcjac._engines.run import Derivatives, Run, graph_nodes
from funcjac._verification.probe import Entry, Probe, make_probe, vjp

_SCALES = (1.1, 0.9, 1.3, 0.7, 1.7, 0.6, 1.9)
_NOISE = 32
_ROUNDINGS = 64  # that add up on the way to a derivative
# Numbers in one piece of what is only needed for a moment.
_PIECE = 2**20
_MOST_UNIT_COTANGENTS = 32


def mismatch(run: Run, result: Derivatives, number: int) -> tuple[str | None, bool]:
    """Where a result and plain autograd disagree, in words; and whether anything was compared."""
    with torch.enable_grad():  # references differentiate what they compute
        return _mismatch(run, result, number)


def _mismatch(run: Run, result: Derivatives, number: int) -> tuple[str | None, bool]:
    operator = run.call.options.operator
    probe = make_probe(run, number)
    entries = operator.entries(run, probe)
    is_blind = any(
        e.grad is not None and e.grad.numel() > 0 and not e.grad.isfinite().any() for e in entries
    )
    limit, floor = tolerance_of(run), _floor(run, probe)
    pairs = enumerate(entries)
    worst = max([_excess(result, e, entry, limit, floor) for e, entry in pairs] or [0.0])
    if worst <= 1 or _is_rounding(run, result, number, entries, limit):
        return None, not is_blind
    error = worst * limit
    return f"its product with a random cotangent is off by {error:.2g} of its size", True


def _floor(run: Run, probe: Probe) -> Tensor:
    """Size in each row, ``(B,)``, of what derivatives are differences of, which was rounded."""
    batch = run.call.batch
    floor = torch.zeros(batch, dtype=torch.float64, device=run.inputs[0].device)
    largest = max(
        [1.0, *[x.detach().abs().nan_to_num(0, 0, 0).max().item() for x in run.inputs if x.numel()]]
    )
    for seed, out in zip(probe.seeds, run.output.leaves):
        if out.numel():
            sizes = (wide(seed) * wide(out.detach())).abs().nan_to_num(0, 0, 0)
            floor = floor + sizes.reshape(batch, -1).amax(1) / largest
    if run.call.options.operator.is_second_order:
        for grad, dim in zip(probe.grads, run.dims):
            if grad is not None and grad.numel():
                rows = wide(grad.detach()).abs().nan_to_num(0, 0, 0)
                rows = rows.unsqueeze(0) if dim is None else rows.movedim(dim, 0)
                floor = floor + rows.reshape(len(rows), -1).amax(1)
    return floor


def _excess(result: Derivatives, e: int, entry: Entry, limit: float, floor: Tensor) -> float:
    """Largest difference in entry ``e``, in units of what is tolerated."""
    grad, difference, size = compared(result, e, entry)
    if not grad.numel():
        return 0.0
    scale = torch.where(grad.isfinite(), grad.abs(), 0) + size
    if entry.size is not None:
        scale = scale + wide(entry.size).nan_to_num(0, 0, 0).reshape(grad.shape)
    below = floor.sum() if entry.dim is None else floor.unsqueeze(1)
    rounding = limit * limit * _ROUNDINGS
    bound = limit * scale + rounding * (scale.amax(1, keepdim=True) + below.to(scale.dtype))
    ratio = torch.where(difference == 0, 0, difference / bound)
    return ratio.max().item()


def compared(result: Derivatives, e: int, entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """Of an entry, each ``(B, N)``: plain autograd's, how far off the result is, sizes of terms."""
    grad, shared = grad_rows(entry), entry.dim is None
    if not grad.numel():
        return grad, grad, grad
    if not any(seed.numel() for seed in entry.seeds):
        return grad, grad.abs(), grad
    predicted, size = _contracted(entry.seeds, [blocks[e] for blocks in result.blocks])
    if shared:
        predicted, size = predicted.sum(0, keepdim=True), size.sum(0, keepdim=True)
    difference = (predicted.reshape(grad.shape) - grad).abs()
    # A number on one side and a nan on the other is an error of the result, not of the reference.
    difference = torch.where(grad.isfinite(), difference.nan_to_num(torch.inf, torch.inf), 0)
    return grad, difference, size.nan_to_num(0, 0, 0).reshape(grad.shape)


def grad_rows(entry: Entry) -> Tensor:
    """What plain autograd has for an entry, ``(B, N)``, or ``(1, N)`` summed over rows."""
    grad = torch.zeros_like(entry.like) if entry.grad is None else entry.grad.detach()
    grad = grad.unsqueeze(0) if entry.dim is None else grad.movedim(entry.dim, 0)
    return wide(grad).reshape(grad.shape[0], -1)


def _contracted(seeds: list[Tensor], blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``sum_m seed[b, m] J[b, m, n]``, and the size of what was summed, each ``(B, N)``."""
    parts, sizes = [], []
    for seed, block in zip(seeds, blocks):
        if not seed.numel():
            continue
        batch = seed.shape[0]
        left = wide(seed).reshape(batch, 1, -1)
        right = wide(block.detach()).reshape(batch, left.shape[2], -1)
        parts.append((left.to(right.dtype) @ right).squeeze(1))
        sizes.append(_size_of_product(left.to(right.dtype).squeeze(1), right))
    return sum(parts[1:], parts[0]), sum(sizes[1:], sizes[0])


def _size_of_product(left: Tensor, right: Tensor) -> Tensor:
    """The norm of what ``sum_m left[b, m] right[b, m, n]`` sums, without a copy of all of it."""
    step = max(_PIECE // max(right[0].numel(), 1), 1) if len(right) else 1
    norms = right.new_empty(len(right), right.shape[2])
    for one, two, piece in zip(left.split(step), right.split(step), norms.split(step)):
        piece.copy_((one.unsqueeze(2) * two).norm(dim=1))
    return norms


def _is_rounding(
    run: Run, result: Derivatives, number: int, entries: list[Entry], limit: float
) -> bool:
    """Whether plain autograd knows itself no better; see NOTE [Tolerance]."""
    rows = [grad_rows(entry) for entry in entries]
    noise = [torch.zeros_like(row) for row in rows]
    differences = [compared(result, e, entry)[1:] for e, entry in enumerate(entries)]
    for scale in _SCALES:
        probe = make_probe(run, number, scale)
        for e, entry in enumerate(run.call.options.operator.entries(run, probe)):
            moves = (grad_rows(entry) / scale - rows[e]).abs()
            noise[e] = torch.maximum(noise[e], torch.where(moves.isfinite(), moves, 0))
    return all(
        is_explained(n, difference, limit * (row.abs().nan_to_num(0, 0, 0) + size))
        for n, row, (difference, size) in zip(noise, rows, differences)
    )


def is_explained(noise: Tensor, difference: Tensor, limit: Tensor | float) -> bool:
    """Whether no difference, ``(B, N)``, is larger than noise makes it."""
    if not difference.numel():
        return True
    # Noise within the limit is rounding, and as large anywhere in a row; a kink is not.
    small = torch.where(noise <= limit, noise, 0)
    here = _NOISE * torch.maximum(noise, small.amax(1, keepdim=True))
    return bool((difference <= torch.maximum(here, torch.as_tensor(limit).to(here))).all())


def agrees_with_units(run: Run, result: Derivatives) -> bool:
    """Whether unit cotangents in half of the rows give the rows of the Jacobian there.

    To be asked once rows are known to be apart; see NOTE [Tolerance].
    """
    limit = tolerance_of(run)
    batch = run.call.batch
    on = torch.arange(batch, device=run.inputs[0].device) % 2 == 0
    for i, out in enumerate(run.output.leaves):
        row = out.shape[1:]
        step = max(row.numel() // _MOST_UNIT_COTANGENTS, 1)
        for m in range(0, row.numel(), step):
            unit = spread(identity(row.numel(), out)[m : m + 1], row, batch, 0)[0]
            blocks = [b.detach().reshape(batch, row.numel(), -1)[:, m] for b in result.blocks[i]]
            patterns = (on, ~on) if batch > 1 else (on,)
            if not all(_agrees(run, out, unit, rows, blocks, limit) for rows in patterns):
                return False
    return True


def _agrees(
    run: Run, out: Tensor, unit: Tensor, rows: Tensor, blocks: list[Tensor], limit: float
) -> bool:
    """Whether a unit cotangent in some rows gives their part of each block, and zero elsewhere."""
    batch = run.call.batch
    cotangent = unit * rows.view(-1, *[1] * (unit.ndim - 1)).to(unit.dtype)
    grads = vjp([out], run.inputs, [cotangent], create_graph=False)
    for grad, x, dim, block in zip(grads, run.inputs, run.dims, blocks):
        if not x.numel():
            continue
        grad = wide(torch.zeros_like(x) if grad is None else grad)
        grad = grad.movedim(dim or 0, 0).reshape(batch, -1)
        expected = wide(block) * rows.unsqueeze(1)
        error = torch.where(grad.isfinite(), (grad - expected).abs(), 0)
        size = expected.abs().nan_to_num(0, 0, 0).amax()
        if not bool((error.nan_to_num(torch.inf) <= limit * size).all()):
            return False
    return True


def is_lost_in_run(run: Run, result: Derivatives, number: int) -> bool:
    """Whether a difference is what rounding the numbers inside of ``func`` comes to.

    To be asked once rows are known to be apart: what cancels leaves nothing else behind.
    """
    with torch.enable_grad():
        probe = make_probe(run, number)
        entries = run.call.options.operator.entries(run, probe)
    largest = max([1.0, *_saved_sizes(run)])
    eps = tolerance_of(run) ** 2
    for e, entry in enumerate(entries):
        _, difference, _ = compared(result, e, entry)
        seeds = max([s.abs().max().item() for s in entry.seeds if s.numel()], default=0.0)
        if difference.numel() and difference.max().item() > _ROUNDINGS * eps * largest * seeds:
            return False
    return True


def _saved_sizes(run: Run) -> Iterator[float]:
    """The largest number of each tensor that the graph of a run keeps."""
    for node in graph_nodes(run.output.leaves, run.inputs):
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    yield value.detach().abs().nan_to_num(0, 0, 0).max().item()


# --- what is returned besides ------------------------------------------------------------------


def extras_mismatch(run: Run, result: Derivatives) -> str | None:
    """Whether value or aux of another engine are not what ``func`` returned for the batch."""
    options, limit = run.call.options, tolerance_of(run)
    if options.return_value:
        pairs = zip(run.output.leaves, result.output.leaves)
        inputs = [x.detach().abs().max().item() for x in run.inputs if x.numel()]
        least = _ROUNDINGS * limit * limit * max(inputs, default=0.0)
        if not all(is_alike(one.detach(), two.detach(), limit, least) for one, two in pairs):
            return "its value is not that of the batch"
    if not options.has_aux:
        return None
    wanted, spec = pytree.flatten(run.output.aux)
    given, other = pytree.flatten(result.output.aux)
    if spec != other:
        return "its aux has another structure than that of the batch"
    for one, two in zip(wanted, given):
        if not isinstance(one, Tensor) or not isinstance(two, Tensor):
            plain = isinstance(one, (bool, int, float, str))
            if type(one) is not type(two) or (plain and one != two):
                return f"its aux holds {two!r}, that of the batch {one!r}"
            continue
        if one.shape != two.shape or one.dtype != two.dtype:
            return f"its aux has shape {tuple(two.shape)}, that of the batch {tuple(one.shape)}"
        if not torch.allclose(wide(one), wide(two), limit, limit, equal_nan=True):
            return "its aux has other values than that of the batch"
    return None


def is_alike(one: Tensor, two: Tensor, limit: float, least: float = 0.0) -> bool:
    """Whether two tensors have the same values, but for what is rounded, ``least`` or more."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    size = one.detach().double().nan_to_num(0, 0, 0).abs().max().item() if one.numel() else 0.0
    return torch.allclose(one.double(), two.double(), limit, limit * size + least, equal_nan=True)


def wide(tensor: Tensor) -> Tensor:
    """In a dtype that can be compared."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tolerance(dtypes: list[torch.dtype]) -> float:
    """Relative difference up to which results of these dtypes count as equal."""
    return max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5


def tolerance_of(run: Run) -> float:
    """The same for all dtypes that a run computes in."""
    dtypes = {x.dtype for x in run.inputs} | {out.dtype for out in run.output.leaves}
    for node in graph_nodes(run.output.leaves, run.inputs):
        dtypes |= {m.dtype for m in node._input_metadata if m.dtype.is_floating_point}
    return tolerance([dtype for dtype in dtypes if dtype.is_floating_point])
