"""Verifies that a result which will be differentiated is right there too.

Its derivatives along random directions are held against those of plain double backward, by each
input and each tensor that requires grad, but for those whose hooks would see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcjac._engines.run_func import Derivatives, Run, graph_leaves, graph_nodes
from funcjac._verification.reference_vjp import RNG_SEED, Entry, outer_product, random_like, vjp
from funcjac._verification.tolerance import (
    bound,
    error_of,
    largest,
    saved_tensors,
    tolerance_of,
    wide,
)
from funcjac.errors import brief


def backward_mismatch(
    run: Run, result: Derivatives, entries: list[Entry], number: int
) -> str | None:
    """Where derivatives of a result and of plain autograd disagree, in words."""
    expected, computed = _scalars(entries, result, number)
    leaves = [x for x in graph_leaves([expected, computed], run.inputs) if not x._backward_hooks]
    leaves = [x for x in {id(x): x for x in (*run.inputs, *leaves)}.values() if x.requires_grad]
    reference, grads = _derivatives(expected, leaves), _derivatives(computed, leaves)
    if isinstance(grads, RuntimeError):
        fails = isinstance(reference, RuntimeError)
        return None if fails else f"it cannot be differentiated: {brief(grads)}"
    if isinstance(reference, RuntimeError) or _raises_in_backward(expected):
        if computed.requires_grad and not _raises_in_backward(computed):
            return "it has derivatives where plain double backward has none"
        return None
    limit, sizes = tolerance_of(run), [largest([derivative]) for derivative in reference]
    errors = list(map(error_of, grads, reference))
    for subtracted in (reference, saved_tensors([expected], [])):
        floor = largest(subtracted)
        if all(bool((e <= bound(limit, s, floor)).all()) for e, s in zip(errors, sizes)):
            return None
    return "its derivatives differ from those of plain double backward"


@torch.enable_grad()
def _scalars(entries: list[Entry], result: Derivatives, number: int) -> tuple[Tensor, Tensor]:
    """The references along random tangents, added up, and the same of the blocks of a result."""
    generator = torch.Generator("cpu").manual_seed(RNG_SEED - number)
    expected = computed = torch.zeros((), device="cpu")
    for e, entry in enumerate(entries):
        tangent = random_like(entry.like, generator)
        if entry.grad is not None:
            expected = expected + (entry.grad * tangent).sum()
        for seed, blocks in zip(entry.seeds, result.blocks):
            weights = outer_product(seed, tangent, entry.dim).to(blocks[e].dtype)
            computed = computed + (weights * blocks[e]).sum()
    return expected, computed


def _derivatives(scalar: Tensor, leaves: list[Tensor]) -> list[Tensor] | RuntimeError:
    """Derivatives by each leaf, or what differentiating raises."""
    try:
        grads = vjp([scalar], leaves, [torch.ones_like(scalar)], create_graph=False)
    except RuntimeError as error:
        return error
    return [wide(torch.zeros_like(x) if g is None else g) for g, x in zip(grads, leaves)]


def _raises_in_backward(root: Tensor) -> bool:
    """Whether ``backward()`` raises, by a node that says that it has no derivative."""
    return any(node.name().endswith("::Error") for node in graph_nodes([root], []))
