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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._linear import Context
from funcjac._passes import Jacobian
from funcjac._probe import (
    Entry,
    Probe,
    graph_leaves,
    nested,
    outer_product,
    random_like,
    tolerance,
    total,
    verifier,
    wide,
)
from funcjac.errors import VerificationError, brief

# A mismatch this many times smaller than what rounding the input does is conditioning.
_NOISE = 32
# Units of rounding by which the input is moved to see that.
_ROUNDINGS = (1, -1, 2, 5, -8)


# --- the comparison ----------------------------------------------------------------------


def mismatch(found: Probe, result: Jacobian) -> str | None:
    """Where the Jacobian and the probe disagree, in words; ``None`` if they agree."""
    worst = max(_excess(found, result, e) for e in range(len(found.entries)))
    if worst <= 1:
        return None
    error = worst * _tolerance(found)
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
    limit = _tolerance(found) * scale + _rounding(found) * scale.amax(1, keepdim=True)
    limit = limit + _rounding(found) / 10 * floor.to(limit.dtype)
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
        sizes.append(right.norm(dim=1) * left.norm(dim=2).to(right.dtype))
    return sum(parts[1:], parts[0]), sum(sizes[1:], sizes[0])


def _rounding(found: Probe) -> float:
    dtypes = _dtypes(found)
    return min(1000 * max(torch.finfo(dtype).eps for dtype in dtypes), _tolerance(found))


def _tolerance(found: Probe) -> float:
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
    for steps in _ROUNDINGS:  # one alone may happen to round to the same
        put_back()
        moved = [x.detach() * (1 + steps * torch.finfo(x.dtype).eps) for x in found.inputs]
        again = verifier(found.call.with_inputs(moved), Context(), seed=found.seed)
        for e, (row, entry) in enumerate(zip(rows, again.entries)):
            moves = (row - _grad_rows(entry)).abs()
            noise[e] = torch.maximum(noise[e], torch.where(moves.isfinite(), moves, 0))
        if all(_is_within(found, result, e, noise[e]) for e in range(len(rows))):
            return True
    return False


def _is_within(found: Probe, result: Jacobian, e: int, noise: Tensor) -> bool:
    """Whether no difference in entry ``e`` is larger than noise explains."""
    grad, difference, size, floor = _compared(found, result, e)
    return _explains(noise, difference, _tolerance(found) * (grad.abs() + size + floor))


def _explains(noise: Tensor, difference: Tensor, limit: Tensor | float) -> bool:
    """Whether no difference, ``(B, N)``, is larger than noise makes it."""
    if not difference.numel():
        return True
    # What is small is rounding, and as large anywhere in a row; at a kink it is not.
    small = torch.where(noise <= limit, noise, 0).amax(1, keepdim=True)
    return bool((difference <= _NOISE * torch.maximum(noise, small)).all())


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


# --- derivatives of the result -----------------------------------------------------------


def graph_mismatch(
    found: Probe, result: Jacobian, put_back: Callable[[], None] = lambda: None
) -> str | None:
    """Like :func:`mismatch`, for the derivatives of the Jacobian by whatever requires grad.

    ``put_back`` comes before ``func`` runs once more.
    """
    tangents = _tangents(found)
    ours = [
        (outer_product(seed, t, entry.dim).to(blocks[e].dtype) * blocks[e]).sum()
        for e, (entry, t) in enumerate(zip(found.entries, tangents))
        for seed, blocks in zip(entry.seeds, result.blocks)
    ]
    wanted, got = _along(found, tangents), total(ours)
    given = {id(leaf) for leaf in found.call.leaves}
    theirs = {id(leaf): leaf for leaf in graph_leaves(wanted)}
    theirs |= {id(leaf): leaf for leaf in graph_leaves(got) if id(leaf) in given}
    leaves = list(theirs.values())
    try:
        right = _derivatives(wanted, leaves)
    except RuntimeError:
        return None  # no second derivative in plain autograd: backward() will say so itself
    try:
        grads = _derivatives(got, leaves)
    except RuntimeError as error:
        return f"it cannot be differentiated: {brief(error)}"
    errors = _errors(found, right, grads)
    if all(bool((error <= limit).all()) for error, limit in errors):
        return None
    if _is_graph_noise(found, tangents, leaves, right, errors, put_back):
        return None
    return "its derivatives differ from those of plain double backward"


def _errors(found: Probe, right: list[Tensor], grads: list[Tensor]) -> list[tuple[Tensor, float]]:
    """By each leaf how far off the derivatives are, ``(1, N)``, and what is tolerated there."""
    sizes = [_size(entry.grad) for entry in found.entries if entry.grad is not None]
    floor = _rounding(found) / 10 * (max(sizes, default=0.0) + _size(found.floor))
    errors = []
    for r, g in zip(map(wide, right), map(wide, grads)):
        error = (r - g).abs().nan_to_num(torch.inf, torch.inf)
        error = torch.where(r.isfinite(), error, 0).reshape(1, -1)
        errors.append((error, 10 * _tolerance(found) * _size(r) + floor))
    return errors


def _size(x: Tensor) -> float:
    return wide(x.detach()).abs().nan_to_num(0, 0, 0).max().item() if x.numel() else 0.0


def _tangents(found: Probe) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(found.seed)
    return [random_like(entry.like, generator) for entry in found.entries]


def _along(found: Probe, tangents: list[Tensor]) -> Tensor:
    pairs = [(entry.grad, t) for entry, t in zip(found.entries, tangents)]
    return total((g * t).sum() for g, t in pairs if g is not None)


def _is_graph_noise(
    found: Probe,
    tangents: list[Tensor],
    leaves: list[Tensor],
    right: list[Tensor],
    errors: list[tuple[Tensor, float]],
    put_back: Callable[[], None],
) -> bool:
    """Whether rounding the input moves plain second derivatives as much as they are off."""
    noise = [torch.zeros_like(error) for error, _ in errors]
    for steps in _ROUNDINGS:
        put_back()
        with torch.enable_grad():
            moved = [x * (1 + steps * torch.finfo(x.dtype).eps) for x in found.call.inputs]
            again = verifier(found.call.with_inputs(moved), Context(graph=True), seed=found.seed)
            others = _derivatives(_along(again, tangents), leaves)
        for i, (r, other) in enumerate(zip(right, others)):
            moves = (wide(r) - wide(other)).abs().reshape(1, -1)
            noise[i] = torch.maximum(noise[i], torch.where(moves.isfinite(), moves, 0))
        if all(_explains(n, error, limit) for n, (error, limit) in zip(noise, errors)):
            return True
    return False


def _derivatives(scalar: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of ``scalar``, zero where it does not depend on a leaf; its graph stays."""
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if scalar.requires_grad and leaves:
        found = torch.autograd.grad(scalar, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def aux_mismatch(found: Probe, result: Jacobian) -> str | None:
    """Whether the aux of rows, put together, is not what ``func`` returns for the batch."""
    wanted, spec = _tree.flatten(found.output.aux)
    given, other = _tree.flatten(result.output.aux)
    if spec != other:
        return "its aux has another structure than that of the batch"
    limit = _tolerance(found)
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
