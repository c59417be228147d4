"""Rules by which derivatives pass through one operation.

Derivatives come from PyTorch's own reverse-mode formulas; only structure is listed. Forward-mode
formulas are not used, so none of their errors can enter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import over_basis
from funcjac._taylor.elementwise import elementwise
from funcjac._taylor.jets import Jet, Scheme, Site, add, aligned, on_one_row, splits, spread
from funcjac._taylor.opaque import opaque
from funcjac._taylor.operations import (
    AFFINE,
    ELEMENTWISE,
    LINEAR,
    NUMBERED,
    OBSTINATE,
    PRODUCTS,
    decomposition,
)
from funcjac._taylor.recorder import Node
from funcjac.errors import UntraceableError

_RESHAPE = torch.ops.aten.reshape.default
Rule = Callable[[Site], "list[Jet | None]"]


@functools.cache
def rule_of(op: Any) -> Rule | None:
    """Rule of an operation; ``None`` for one that is taken apart by its decomposition."""
    name = op.overloadpacket.__name__
    if op.namespace != "aten":
        return opaque
    if torch.Tag.nondeterministic_seeded in op.tags or name in OBSTINATE:
        return _impassable
    known: dict[str, Rule] = {"_to_copy": _sum, "div": _quotient, "add": _sum, "sub": _sum}
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
    if rule is _quotient:
        return node.places == ((0, None),) and not node.kwargs
    if rule is _product:
        return sum(i > 0 or node.name not in AFFINE for i, _ in node.places) < 2
    return rule in (_linear, _sum)


def _impassable(site: Site) -> list[Jet | None]:
    drawn = torch.Tag.nondeterministic_seeded in site.node.op.tags
    reason = "draws random numbers" if drawn else "has no second derivatives along directions"
    raise UntraceableError(f"{site.node.op} {reason}")


def _quotient(site: Site) -> list[Jet | None]:
    if not is_linear(site.node):
        return elementwise(site)
    (jet,), divisor = site.jets, site.node.args[1]

    def derivative(order: int) -> Tensor | None:
        stack = jet[order - 1]
        return None if stack is None else aligned(stack, len(site.shape)) / divisor

    return site.jet(derivative)


def _linear(site: Site) -> list[Jet | None]:
    """Runs the operation on the derivatives, with zeros for constants that are added."""
    active = set(site.node.places)
    args = tuple([_bare(arg, (i, None), active) for i, arg in enumerate(site.node.args)])
    op = _RESHAPE if site.node.name == "view" else site.node.op  # strides may be others
    bare = site.node._replace(op=op, args=args)

    def run(*tangents: Tensor) -> Any:
        out = bare(tangents)
        return list(out) if isinstance(out, (tuple, list)) else [out]

    nothing = [None] * len(site.node.outs)
    levels: list[Any] = [nothing] * (site.lowest - 1)
    for order in site.orders:
        zero = all(stack is None for stack in site.level(order))
        levels.append(nothing if zero else over_basis(run, *site.filled(order)))
    jets = zip(*levels)
    return [None if all(stack is None for stack in jet) else jet for jet in jets]


def _bare(arg: Any, place: Any, active: set[Any]) -> Any:
    """An argument without what it adds to the result."""
    if type(arg) in (list, tuple) and any(isinstance(item, Tensor) for item in arg):
        return [_bare(item, (place[0], j), active) for j, item in enumerate(arg)]
    if place in active or not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return torch.zeros_like(arg)


def _sum(site: Site) -> list[Jet | None]:
    """``a + alpha b`` or ``a - alpha b``; of one argument, a change of dtype."""
    node = site.node
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    factors = (1, -alpha if node.name == "sub" else alpha)

    def derivative(order: int) -> Tensor | None:
        total: Tensor | None = None
        for (i, _), stack in zip(node.places, site.level(order)):
            if stack is not None:
                stack = stack if factors[i] == 1 else factors[i] * stack
                total = add(total, spread(stack, site.shape))
        return total

    return site.jet(derivative)


# --- products -----------------------------------------------------------------------------

# Of two stacks, or of a stack and a value; the flags say which are stacks.
Many = Callable[[Any, Any, bool, bool], Tensor]


def _product(site: Site) -> list[Jet | None]:
    """Leibniz' rule for ``a @ b`` and ``beta c + alpha a @ b``, by the operation itself."""
    node, scheme = site.node, site.scheme
    offset = node.name in AFFINE
    jets = {i - offset: jet for (i, _), jet in zip(node.places, site.jets)}
    if max(jets) > 1:  # the bias of a convolution
        return opaque(site)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    many, (c, a, b) = _many(site), [jets.get(i) for i in (-1, 0, 1)]
    left = None if b is None else _argument(site, offset)
    right = None if a is None else _argument(site, offset + 1)

    def derivative(order: int) -> Tensor | None:
        x, y = (None if jet is None else jet[order - 1] for jet in (a, b))
        total = None if x is None else many(x, right, True, False)
        total = add(total, None if y is None else many(left, y, False, True))
        if a is not None and b is not None and order > 1:
            total = add(total, _leibniz(scheme, a, b, order, many))
        total = total if total is None or alpha == 1 else alpha * total
        if c is None or (shift := c[order - 1]) is None:
            return total
        return add(total, spread(shift if beta == 1 else beta * shift, site.shape))

    return site.jet(derivative)


def _argument(site: Site, position: int) -> Any:
    place = (position, None)
    if place in site.node.places:
        return site.value(site.node.places.index(place))
    return site.node.args[position]


def _many(site: Site) -> Many:
    op, rest = site.node.op, list(site.node.args[2:])
    if site.node.name == "mul":
        ndim = len(site.shape)
        return lambda x, y, xs, ys: (
            (aligned(x, ndim) if xs else x) * (aligned(y, ndim) if ys else y)
        )
    if site.node.name in ("mm", "bmm", *AFFINE):
        return _matmul
    if site.node.name == "convolution":
        rest[0] = None  # the bias

    def many(x: Any, y: Any, xs: bool, ys: bool) -> Tensor:
        stacks = [stack for stack, yes in ((x, xs), (y, ys)) if yes]

        def run(*rows: Tensor) -> list[Tensor]:
            return [op(rows[0] if xs else x, rows[-1] if ys else y, *rest)]

        (result,) = over_basis(run, *stacks)
        assert result is not None
        return result

    return many


def _matmul(x: Tensor, y: Tensor, xs: bool, ys: bool) -> Tensor:
    if xs and not ys and y.ndim == 2:
        return on_one_row(lambda stack: torch.matmul(stack, y), x)
    return torch.matmul(x, y)


def _leibniz(scheme: Scheme, a: Jet, b: Jet, order: int, many: Many) -> Tensor | None:
    """Products of lower derivatives, for all derivatives of one order."""

    def product(x: Tensor, y: Tensor) -> Tensor:
        return many(x, y, True, True)

    if order == 2:
        x, y = a[0], b[0]
        return None if x is None or y is None else scheme.second(x, y, product, cross=True)
    rows: list[Any] = []
    for index in scheme.indices[order - 1]:
        row = None
        for outer, inner, times in splits(index):
            x, y = (scheme.part(jet, i) if i else None for jet, i in ((a, outer), (b, inner)))
            if x is not None and y is not None:
                row = add(row, times * product(x.unsqueeze(0), y.unsqueeze(0)))
        rows.append(row)
    like = next((row for row in rows if row is not None), None)
    if like is None:
        return None
    return torch.cat([torch.zeros_like(like) if row is None else row for row in rows])
