"""Whether a Jacobian that will be differentiated is right there too.

Its derivatives along random directions are held against those of plain double backward, by each
tensor that requires grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from funcjac._linear import Context
from funcjac._passes import Jacobian
from funcjac._probe import (
    Probe,
    graph_leaves,
    is_final,
    outer_product,
    random_like,
    total,
    verifier,
    wide,
)
from funcjac._verify import ROUNDINGS, explains, rounding_of, tolerance_of
from funcjac.errors import brief


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
        right = None  # no second derivative in plain autograd
    try:
        grads = _derivatives(got, leaves)
    except RuntimeError as error:
        if right is None:
            return None  # backward() will say so itself
        return f"it cannot be differentiated: {brief(error)}"
    if (right is None or is_final(wanted)) and not is_final(got):
        return "it has derivatives where plain double backward has none"
    if right is None:
        return None
    errors = _errors(found, right, grads)
    if all(bool((error <= limit).all()) for error, limit in errors):
        return None
    if _is_graph_noise(found, tangents, leaves, right, errors, put_back):
        return None
    return "its derivatives differ from those of plain double backward"


def _errors(found: Probe, right: list[Tensor], grads: list[Tensor]) -> list[tuple[Tensor, float]]:
    """By each leaf how far off the derivatives are, ``(1, N)``, and what is tolerated there."""
    sizes = [_size(entry.grad) for entry in found.entries if entry.grad is not None]
    floor = rounding_of(found) / 10 * (max(sizes, default=0.0) + _size(found.floor))
    floor += rounding_of(found) * max(map(_size, right), default=0.0)
    errors = []
    for r, g in zip(map(wide, right), map(wide, grads)):
        error = (r - g).abs().nan_to_num(torch.inf, torch.inf)
        error = torch.where(r.isfinite(), error, 0).reshape(1, -1)
        errors.append((error, 10 * tolerance_of(found) * _size(r) + floor))
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
    for steps, scale in ROUNDINGS:
        put_back()
        with torch.enable_grad():
            moved = [x * (1 + steps * torch.finfo(x.dtype).eps) for x in found.call.inputs]
            call, context = found.call.with_inputs(moved), Context(graph=True)
            again = verifier(call, context, seed=found.seed, scale=scale)
            others = _derivatives(_along(again, tangents), leaves)
        for i, (r, other) in enumerate(zip(right, others)):
            moves = (wide(r) - wide(other) / scale).abs().reshape(1, -1)
            noise[i] = torch.maximum(noise[i], torch.where(moves.isfinite(), moves, 0))
        if all(explains(n, error, limit) for n, (error, limit) in zip(noise, errors)):
            return True
    return False


def _derivatives(scalar: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of ``scalar``, zero where it does not depend on a leaf; its graph stays."""
    found: Sequence[Tensor | None] = [None] * len(leaves)
    if scalar.requires_grad and leaves:
        found = torch.autograd.grad(scalar, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]
