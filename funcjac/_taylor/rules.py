"""Rules by which derivatives pass through one operation.

Derivatives come from PyTorch's own reverse-mode formulas; only structure is listed. Forward-mode
formulas are not used, so none of their errors can enter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._engines.join_chunks import added
from funcjac._environment.torch_private import over_basis
from funcjac._taylor.elementwise import elementwise
from funcjac._taylor.jets import Derivative, Jet, Site, on_one_row, spread
from funcjac._taylor.opaque import opaque
from funcjac._taylor.operations import (
    AFFINE,
    ALONG_DIMENSIONS,
    ELEMENTWISE,
    LINEAR,
    NUMBERED,
    OBSTINATE,
    PRODUCTS,
    decomposition,
)
from funcjac._taylor.recording import Node
from funcjac.errors import UntraceableError

Rule = Callable[[Site], Derivative]


@functools.cache
def rule_of(op: Any) -> Rule | None:
    """Rule of an operation; ``None`` for one that is taken apart by its decomposition."""
    name = op.overloadpacket.__name__
    if op.namespace != "aten":
        return opaque
    if torch.Tag.nondeterministic_seeded in op.tags or name in OBSTINATE:
        return _impassable
    known: dict[str, Rule] = {"_to_copy": _sum, "add": _sum, "sub": _sum}
    known |= dict.fromkeys(LINEAR, _linear)
    known |= dict.fromkeys((*PRODUCTS, *AFFINE), _product)
    if name in known and op._overloadname not in NUMBERED:
        return known[name]
    if torch.Tag.pointwise in op.tags or name in ELEMENTWISE:
        return elementwise
    return opaque if decomposition(op) is None else None


def is_linear(node: Node) -> bool:
    """Whether an operation is linear in all of its arguments that depend on the input."""
    rule = rule_of(node.op)
    if rule is _product:
        return sum(i > 0 or node.name not in AFFINE for i, _ in node.places) < 2
    return rule in (_linear, _sum)


def node_keeps_rows(node: Node, values: Sequence[Tensor]) -> bool:
    """Whether rows stay in dimension 0, each by itself; ``False`` where nobody has looked."""
    xs, outs = ([values[s] for s in slots if s is not None] for slots in (node.slots, node.outs))
    if not outs or not all(t.ndim and t.shape[0] == outs[0].shape[0] for t in (*outs, *xs)):
        return False
    rule, name = rule_of(node.op), node.name
    if rule is _product and name != "mul":
        left = name in AFFINE
        return name in ("bmm", "baddbmm") or [*node.places] == [(int(left), None)]
    if rule in (_sum, _product, elementwise) or name in ("expand", "clone", "neg"):
        return all(t.ndim == outs[0].ndim for t in xs)
    if name not in ALONG_DIMENSIONS:
        return name in ("view", "_unsafe_view", "slice")  # which keep the first of as many rows
    ndim = max(t.ndim for t in (*xs, *outs))
    dims = node.args[1] if len(node.args) > 1 else 0
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return bool(dims) and all(isinstance(dim, int) and dim % ndim for dim in dims)


def _impassable(site: Site) -> Derivative:
    drawn = torch.Tag.nondeterministic_seeded in site.node.op.tags
    reason = "draws random numbers" if drawn else "has no second derivatives along directions"
    raise UntraceableError(f"{site.node.op} {reason}")


def _linear(site: Site) -> Derivative:
    """Runs the operation on the derivatives, with zeros for constants that are added."""
    node = site.node
    args = [_bare(arg, (i, None), node.places) for i, arg in enumerate(node.args)]
    # Strides may be others than those that a view asks for.
    op = torch.ops.aten.reshape.default if node.name == "view" else node.op
    bare = node._replace(op=op, args=args)

    def derivative(order: int) -> Sequence[Tensor | None]:
        if site.is_zero(order):
            return [None] * len(node.outs)
        stacks = site.filled(order)
        return over_basis(lambda *rows: bare.run(dict(zip(stacks, rows))), *stacks.values())

    return derivative


def _bare(arg: Any, place: Any, active: Sequence[Any]) -> Any:
    """An argument without what it adds to the result."""
    if type(arg) in (list, tuple) and any(isinstance(item, Tensor) for item in arg):
        return [_bare(item, (place[0], j), active) for j, item in enumerate(arg)]
    if place in active or not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return torch.zeros_like(arg)


def _sum(site: Site) -> Derivative:
    """``a + alpha b`` or ``a - alpha b``; of one argument, a change of dtype."""
    node = site.node
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    factors = (1, -alpha if node.name == "sub" else alpha)
    jets = [spread(site.jets[slot], site.shape) for slot in node.slots]

    def derivative(order: int) -> Sequence[Tensor | None]:
        total: Tensor | None = None
        for (i, _), jet in zip(node.places, jets):
            total = added(total, _scaled(factors[i], jet[order - 1]))
        return [total]

    return derivative


def _scaled(factor: Any, stack: Tensor | None) -> Tensor | None:
    return stack if stack is None or factor == 1 else factor * stack


def _product(site: Site) -> Derivative:
    """Leibniz' rule for ``a @ b`` and ``beta c + alpha a @ b``, by the operation itself."""
    node, scheme = site.node, site.scheme
    offset = node.name in AFFINE
    jets = {i - offset: site.jets[slot] for (i, _), slot in zip(node.places, node.slots)}
    if max(jets) > 1:  # the bias of a convolution
        return opaque(site)
    if node.name == "mul":
        jets = {i: spread(jet, site.shape) for i, jet in jets.items()}
    zero: Jet = (None,) * scheme.order
    a, b, c = (jets.get(i, zero) for i in (0, 1, -1))
    c = spread(c, site.shape)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    multiply = _multiplication(site, offset)

    def derivative(order: int) -> Sequence[Tensor | None]:
        x, y = a[order - 1], b[order - 1]
        total = None if x is None else multiply(x, None)
        total = added(total, None if y is None else multiply(None, y))
        for _, stack in scheme.higher(order, (a, b), multiply, lambda numbers: numbers != (0, 1)):
            total = added(total, stack)
        return [added(_scaled(alpha, total), _scaled(beta, c[order - 1]))]

    return derivative


def _multiplication(site: Site, offset: int) -> Callable[[Any, Any], Tensor]:
    """Multiplies two stacks; with ``None`` for a stack, the argument's value takes its place."""
    node = site.node
    is_convolution = node.name == "convolution"
    rest = [None, *node.args[3:]] if is_convolution else node.args[2:]  # without the bias

    def value(i: int) -> Any:
        slots = dict(zip(node.places, node.slots))
        slot = slots.get((i + offset, None))
        return node.args[i + offset] if slot is None else site.recording.value(slot)

    def multiply(x: Tensor | None, y: Tensor | None) -> Tensor:
        a, b = value(0) if x is None else x, value(1) if y is None else y
        if node.name == "mul":
            return a * b
        if node.name in ("mm", "bmm", *AFFINE):
            is_layer = y is None and b.ndim == 2
            return on_one_row(lambda stack: stack @ b, a) if is_layer else a @ b

        def run(*rows: Tensor) -> list[Tensor]:
            return [node.op(a if x is None else rows[0], b if y is None else rows[-1], *rest)]

        (product,) = over_basis(run, *[stack for stack in (x, y) if stack is not None])
        assert product is not None
        return product

    return multiply
