"""Whether a result that will be differentiated is right there too.

Its derivatives along random directions are held against those of plain double backward, by each
input and each tensor that requires grad, but for those whose hooks would see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcjac._engines.run import Derivatives, Run, graph_leaves, graph_nodes
from funcjac._verification.compare import _SCALES, is_explained, tolerance_of, wide
from funcjac._verification.probe import Entry, make_probe, outer_product, random_like, vjp
from funcjac.errors import brief


def backward_mismatch(run: Run, result: Derivatives, number: int) -> str | None:
    """Where derivatives of a result and of plain autograd disagree, in words."""
    with torch.enable_grad():
        expected, got = _scalars(run, result, number)
    leaves = _leaves(run, [expected, got])
    right = _derivatives_or_error(expected, leaves)
    grads = _derivatives_or_error(got, leaves)
    if isinstance(grads, RuntimeError):
        return (
            None
            if isinstance(right, RuntimeError)
            else f"it cannot be differentiated: {brief(grads)}"
        )
    if isinstance(right, RuntimeError) or _raises_in_backward(expected):
        if got.requires_grad and not _raises_in_backward(got):
            return "it has derivatives where plain double backward has none"
        return None
    limit = tolerance_of(run)
    errors = [_error(r, g) for r, g in zip(right, grads)]
    sizes = [_size(r) for r in right]
    largest = max(sizes, default=0.0)
    bounds = [10 * limit * size + limit * limit * largest for size in sizes]
    if all(bool((error <= bound).all()) for error, bound in zip(errors, bounds)):
        return None
    noise = _noise(run, number, leaves, right)
    if noise and all(map(is_explained, noise, errors, bounds)):
        return None
    return "its derivatives differ from those of plain double backward"


def _scalars(run: Run, result: Derivatives, number: int) -> tuple[Tensor, Tensor]:
    entries = run.call.options.operator.entries(run, make_probe(run, number))
    tangents = _tangents(entries, number)
    ours = [
        (outer_product(seed, t, entry.dim).to(blocks[e].dtype) * blocks[e]).sum()
        for e, (entry, t) in enumerate(zip(entries, tangents))
        for seed, blocks in zip(entry.seeds, result.blocks)
    ]
    return _contracted(entries, tangents), _total(ours)


def _tangents(entries: list[Entry], number: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(number)
    return [random_like(entry.like, generator) for entry in entries]


def _contracted(entries: list[Entry], tangents: list[Tensor]) -> Tensor:
    pairs = [(entry.grad, t) for entry, t in zip(entries, tangents)]
    return _total([(g * t).sum() for g, t in pairs if g is not None])


def _total(parts: list[Tensor]) -> Tensor:
    return sum(parts, torch.zeros((), device="cpu"))


def _leaves(run: Run, roots: list[Tensor]) -> list[Tensor]:
    """What to differentiate by: the inputs of the run, and parameters without hooks."""
    inputs = list(run.inputs)
    seen = {id(x) for x in inputs}
    for leaf in graph_leaves(roots, run.inputs):
        if id(leaf) not in seen and not leaf._backward_hooks:
            seen.add(id(leaf))
            inputs.append(leaf)
    return [x for x in inputs if x.requires_grad]


def _derivatives_or_error(scalar: Tensor, leaves: list[Tensor]) -> list[Tensor] | RuntimeError:
    try:
        grads = vjp([scalar], leaves, [torch.ones_like(scalar)], create_graph=False)
    except RuntimeError as error:
        return error
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves)]


def _error(right: Tensor, grad: Tensor) -> Tensor:
    """How far off derivatives are, ``(1, N)``."""
    error = (wide(right) - wide(grad)).abs().nan_to_num(torch.inf, torch.inf)
    return torch.where(right.isfinite(), error, 0).reshape(1, -1)


def _size(x: Tensor) -> float:
    return wide(x.detach()).abs().nan_to_num(0, 0, 0).max().item() if x.numel() else 0.0


def _noise(run: Run, number: int, leaves: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """How far plain second derivatives move as their cotangent is rounded in other ways."""
    noise = [torch.zeros_like(wide(r)).reshape(1, -1) for r in right]
    for scale in _SCALES:
        with torch.enable_grad():
            entries = run.call.options.operator.entries(run, make_probe(run, number, scale))
            scalar = _contracted(entries, _tangents(entries, number))
        grads = _derivatives_or_error(scalar, leaves)
        if isinstance(grads, RuntimeError):
            return []
        for i, (r, g) in enumerate(zip(right, grads)):
            moves = (wide(r) - wide(g) / scale).abs().reshape(1, -1)
            noise[i] = torch.maximum(noise[i], torch.where(moves.isfinite(), moves, 0))
    return noise


def _raises_in_backward(root: Tensor) -> bool:
    """Whether ``backward()`` raises, by a node that says that it has no derivative."""
    return any(node.name().endswith("::Error") for node in graph_nodes([root], []))
