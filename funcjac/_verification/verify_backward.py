"""Verifies that a result which will be differentiated is right there too.

Its derivatives along random directions are held against those of plain double backward, by each
input and each tensor that requires grad, but for those whose hooks would see it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from funcjac._engines.run_func import Run, graph_leaves, graph_nodes
from funcjac._verification.reference_vjp import RNG_SEED, Entry, random_like, vjp
from funcjac._verification.tolerance import bound, error_and_size, largest, saved_tensors, wide
from funcjac.errors import brief


def backward_mismatch(
    run: Run, entries: list[Entry], products: list[Tensor], limit: float, number: int
) -> str | None:
    """Where derivatives of a result and of plain autograd disagree, in words.

    ``products`` are those of the result that the entries are the references of.
    """
    expected, computed = _scalars(entries, products, number)
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
    pairs = list(map(error_and_size, grads, reference))
    for roots in ([], [expected]):
        floor = max([largest(saved_tensors(roots, [])), *[size for _, size in pairs]])
        if all(error <= bound(limit, size, floor) for error, size in pairs):
            return None
    return "its derivatives differ from those of plain double backward"


@torch.enable_grad()
def _scalars(entries: list[Entry], products: list[Tensor], number: int) -> tuple[Tensor, Tensor]:
    """The references along random tangents, added up, and the same of the products."""
    generator = torch.Generator("cpu").manual_seed(RNG_SEED - number)
    expected = computed = torch.zeros((), device="cpu")
    for entry, product in zip(entries, products):
        tangent = random_like(entry.like, generator)
        if entry.grad is not None:
            expected = expected + (entry.grad * tangent).sum()
        if product.requires_grad:
            rows = tangent.unsqueeze(0) if entry.dim is None else tangent.movedim(entry.dim, 0)
            computed = computed + (product * rows.reshape(product.shape)).sum()
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
