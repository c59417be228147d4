"""One vector-Jacobian product verifies a batched Jacobian.

Draw a random cotangent ``v`` of the output's shape. If rows are independent and the
Jacobian is right, plain ``autograd.grad(func(x), x, v)`` equals ``v[b] @ J[b]`` in every row
``b``. One forward and one backward, without torch.func, so that an error of torch's batching
rules or forward formulas shows, and so does a function that mixes rows.

What a probe can miss: a batch of one cannot show mixing, nor can mixing that happens only
for other values of the input; a derivative that plain reverse mode itself gets wrong (a
custom backward, a partial ``detach``) is wrong on both sides; and errors below the tolerance
of the dtype pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._linear import Context, plain_values
from funcjac._passes import Jacobian
from funcjac._probe import (
    Entry,
    Probe,
    nested,
    tolerance,
    verifier,
    wide,
)
from funcjac.errors import VerificationError

# Numbers in one piece of what is only needed for a moment.
_PIECE = 2**20
# A mismatch this many times smaller than what rounding the input does is conditioning.
_NOISE = 32
# What is left of slopes in a saturated row is as large as the noise of other rows, where that is
# no more than so many times what rounding its output comes to.
_FLOORS = 100
# Units of rounding by which the input is moved to see that, and what the cotangent is multiplied
# by: where a row is saturated, only the way back rounds in another way.
ROUNDINGS = ((1, 1.1), (-1, 0.9), (2, 1.3), (5, 0.7), (-8, 1.7), (3, 0.6), (-4, 1.9))


# --- the comparison ----------------------------------------------------------------------


def mismatch(found: Probe, result: Jacobian) -> str | None:
    """Where the Jacobian and the probe disagree, in words; ``None`` if they agree."""
    worst = max(_excess(found, result, e) for e in range(len(found.entries)))
    if worst <= 1:
        return None
    error = worst * tolerance_of(found)
    return f"its product with a random cotangent is off by {error:.2g} of its size"


def _excess(found: Probe, result: Jacobian, e: int) -> float:
    """Largest difference in entry ``e``, in units of what is tolerated."""
    grad, difference, size, floor = _compared(found, result, e)
    if not grad.numel():
        return 0.0
    scale = torch.where(grad.isfinite(), grad.abs(), 0) + size
    given = found.entries[e].size
    if given is not None:
        scale = scale + wide(given).nan_to_num(0, 0, 0).reshape(grad.shape)
    # Rounding is relative to the largest entry of the row, all else to the entry itself.
    limit = tolerance_of(found) * scale + rounding_of(found) * scale.amax(1, keepdim=True)
    limit = limit + rounding_of(found) / 10 * floor.to(limit.dtype)
    ratio = torch.where(difference == 0, 0, difference / limit)
    return ratio.max().item()


def _compared(found: Probe, result: Jacobian, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of entry ``e``: the probe's gradient, how far off the result is, and sizes of both sums.

    Each ``(B, N)``; the last, of what slopes are rounded to, ``(B, 1)``.
    """
    entry = found.entries[e]
    grad, shared = _grad_rows(entry), entry.dim is None
    floor = found.floor.sum() if shared else found.floor.unsqueeze(1)
    if not grad.numel():
        return grad, grad, grad, floor
    predicted, size = _contracted(entry.seeds, [blocks[e] for blocks in result.blocks])
    if shared:
        predicted, size = predicted.sum(0, keepdim=True), size.sum(0, keepdim=True)
    difference = (predicted - grad).abs()
    # A number on one side and a nan on the other is an error of the Jacobian, not of the probe.
    difference = torch.where(grad.isfinite(), difference.nan_to_num(torch.inf, torch.inf), 0)
    return grad, difference, size.nan_to_num(0, 0, 0), floor


def _grad_rows(entry: Entry) -> Tensor:
    """What plain autograd has for an entry, ``(B, N)``, or ``(1, N)`` summed over rows."""
    dim, given = entry.dim, entry.grad
    grad = torch.zeros_like(entry.like) if given is None else given.detach()
    grad = grad.unsqueeze(0) if dim is None else grad.movedim(dim, 0)
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
    found = right.new_empty(len(right), right.shape[2])
    for one, two, piece in zip(left.split(step), right.split(step), found.split(step)):
        piece.copy_((one.unsqueeze(2) * two).norm(dim=1))
    return found


def rounding_of(found: Probe) -> float:
    dtypes = _dtypes(found)
    return min(1000 * max(torch.finfo(dtype).eps for dtype in dtypes), tolerance_of(found))


def tolerance_of(found: Probe) -> float:
    return tolerance(_dtypes(found), found.inputs[0].device)


def _dtypes(found: Probe) -> list[torch.dtype]:
    outs = [out.dtype for out in found.output.leaves]
    return [*found.within, *outs, *[x.dtype for x in found.inputs]]


def is_noise(found: Probe, result: Jacobian, put_back: Callable[[], None]) -> bool:
    """Whether rounding the input moves the VJP as much as the mismatch: bad conditioning.

    ``put_back`` comes before ``func`` runs once more.
    """
    rows = [_grad_rows(entry) for entry in found.entries]
    noise = [torch.zeros_like(row) for row in rows]
    for steps, scale in ROUNDINGS:  # one alone may happen to round to the same
        put_back()
        moved = [x.detach() * (1 + steps * torch.finfo(x.dtype).eps) for x in found.inputs]
        call = found.call.with_inputs(moved)
        again = verifier(call, Context(), seed=found.seed, scale=scale)
        for e, (row, entry) in enumerate(zip(rows, again.entries)):
            moves = (row - _grad_rows(entry) / scale).abs()
            noise[e] = torch.maximum(noise[e], torch.where(moves.isfinite(), moves, 0))
        if all(_is_within(found, result, e, noise[e]) for e in range(len(rows))):
            return True
    return False


def _is_within(found: Probe, result: Jacobian, e: int, noise: Tensor) -> bool:
    """Whether no difference in entry ``e`` is larger than noise explains."""
    grad, difference, size, floor = _compared(found, result, e)
    limit = tolerance_of(found) * (grad.abs() + size + floor)
    return explains(noise, difference, limit, _FLOORS * rounding_of(found) / 10 * floor)


def explains(
    noise: Tensor, difference: Tensor, limit: Tensor | float, floor: Tensor | float = 0.0
) -> bool:
    """Whether no difference, ``(B, N)``, is larger than noise makes it.

    ``limit`` is up to where noise is small, ``floor`` up to where that of other rows counts.
    """
    if not difference.numel():
        return True
    # What is small is rounding, and as large anywhere in a row; at a kink it is not.
    small = torch.where(noise <= limit, noise, 0)
    here = _NOISE * torch.maximum(noise, small.amax(1, keepdim=True))
    elsewhere = torch.clamp(torch.as_tensor(floor), max=_NOISE * small.amax().item())
    return bool((difference <= torch.maximum(here, elsewhere.to(here))).all())


# --- what autograd cannot see ------------------------------------------------------------


def check_attached(found: Probe) -> None:
    """Raise if an output depends on the inputs in a way that autograd cannot see.

    Raises:
        VerificationError: an output has no graph, and most of it moves with the inputs.
    """
    loose = [i for i, out in enumerate(found.output.leaves) if not out.requires_grad]
    if not loose or nested(found.call, found.inputs) is not None:
        return
    steps = [torch.finfo(x.dtype).eps ** (1 / 3) * (1 + x.detach().abs()) for x in found.inputs]
    moved = [x.detach() + step for x, step in zip(found.inputs, steps)]
    with torch.no_grad():
        again = found.call(moved)
    for i in loose:
        before, after = found.output.leaves[i].detach(), again.leaves[i]
        # Comparisons and roundings move here and there, a detached function everywhere.
        if before.numel() and (before != after).double().mean() > 0.5:
            raise VerificationError(
                f"{found.call.options.name}: expected autograd to see how func's output depends on "
                "its input, got an output without a graph that moves when the input does. Look for "
                "detach(), .item(), NumPy, torch.tensor(...) or a no_grad block in func; pass "
                "check=False if the derivative is meant to be zero."
            )


# --- what is returned besides --------------------------------------------------------------


def extras_mismatch(found: Probe, result: Jacobian, put_back: Callable[[], None]) -> str | None:
    """Whether value or aux of rows, put together, are not what ``func`` returns for the batch."""
    options = found.call.options
    if options.return_value and not _is_value(found, result.output.leaves, put_back):
        return "its value is not that of the batch"
    if not options.has_aux:
        return None
    wanted, spec = _tree.flatten(found.output.aux)
    given, other = _tree.flatten(result.output.aux)
    if spec != other:
        return "its aux has another structure than that of the batch"
    limit = tolerance_of(found)
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


def alike(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same values, but for what is rounded."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    limit = tolerance([one.dtype], one.device)
    size = one.detach().double().nan_to_num(0, 0, 0).abs().max().item() if one.numel() else 0.0
    return torch.allclose(one.double(), two.double(), limit, limit * size, equal_nan=True)


def _is_value(found: Probe, leaves: list[Tensor], put_back: Callable[[], None]) -> bool:
    """Whether ``leaves`` are what ``func`` returned, but for what rounding or its draws change."""
    wanted = [out.detach() for out in found.output.leaves]
    if all(alike(one, two) for one, two in zip(wanted, leaves)):
        return True
    if any(one.shape != two.shape for one, two in zip(wanted, leaves)):
        return False
    noise = [0.0] * len(wanted)
    for steps in (0, *[steps for steps, _ in ROUNDINGS]):  # 0 for draws that are not torch's
        put_back()
        moved = [x.detach() * (1 + steps * torch.finfo(x.dtype).eps) for x in found.inputs]
        again = plain_values(found.call.with_inputs(moved))
        noise = [max(n, _largest(w, a, 0)) for n, w, a in zip(noise, wanted, again)]
        off = [_largest(w, leaf, torch.inf) for w, leaf in zip(wanted, leaves)]
        if all(o <= _NOISE * n for o, n in zip(off, noise)):
            return True
    return False


def _largest(one: Tensor, two: Tensor, unknown: float) -> float:
    """The largest difference where ``one`` is a number; ``unknown`` where ``two`` is none."""
    known = one.isfinite()
    found = (wide(one) - wide(two))[known].abs().nan_to_num(unknown, unknown)
    return found.max().item() if found.numel() else 0.0
