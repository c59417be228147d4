"""How derivatives pass through one operation.

There is no table of derivatives: those come from PyTorch's own reverse-mode formulas. What is
listed is structure: which operations are linear, which are products, and which are better
taken apart. Forward-mode formulas are not used, so none of their errors can enter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._elementwise import elementwise
from funcjac._jets import Jet, Scheme, Site, add, aligned, extend, filled, part, splits, spread
from funcjac._native import matmul, over_basis
from funcjac._opaque import opaque
from funcjac._structure import (
    AFFINE,
    ELEMENTWISE,
    LINEAR,
    NUMBERED,
    OBSTINATE,
    PRODUCTS,
    decomposition,
)
from funcjac._tape import Node
from funcjac.errors import UntraceableError


def push(site: Site) -> list[Jet]:
    """Derivatives of what a node returned, from ``site.start`` on; ``None`` where zero."""
    rule = rule_of(site.node.op)
    if rule is _quotient and not is_linear(site.node):
        rule = elementwise
    found = rule(site)
    if not site.start or rule is elementwise or rule is inlined:
        return found  # which is cut already
    cut = [None if jet is None else jet[site.start :] for jet in found]
    return [None if jet is None or not len(jet) else jet for jet in cut]


@functools.cache
def rule_of(op: Any) -> Callable[[Site], list[Jet]]:
    """How derivatives pass through an operation."""
    name = op.overloadpacket.__name__
    if op.namespace != "aten":
        return opaque
    if torch.Tag.nondeterministic_seeded in op.tags or name in OBSTINATE:
        return _impassable
    known = {"_to_copy": _cast, "div": _quotient, "add": _sum, "sub": _sum}
    known |= dict.fromkeys(LINEAR, _linear) | dict.fromkeys(AFFINE, _affine)
    known |= dict.fromkeys(PRODUCTS, _product)
    if name in known and op._overloadname not in NUMBERED:
        return known[name]
    if torch.Tag.pointwise in op.tags or name in ELEMENTWISE:
        return elementwise
    return opaque if decomposition(op) is None else inlined


def inlined(site: Site) -> list[Jet]:
    taken_apart = decomposition(site.node.op)
    assert taken_apart is not None
    return site.inline(site, taken_apart)


def is_linear(node: Node) -> bool:
    """Whether an operation is linear in all of its arguments that depend on the input."""
    rule = rule_of(node.op)
    if rule is _quotient:
        return node.places == ((0, None),) and not node.kwargs
    if rule is _product:
        return len(node.places) == 1
    if rule is _affine:
        return sum(i > 0 for i, _ in node.places) < 2
    return rule in (_linear, _cast, _sum)


def makes_new(node: Node) -> bool:
    """Whether jets that come out lie in no memory that was there before."""
    rule = rule_of(node.op)
    return rule in (elementwise, _product) or (rule is _affine and node.places[-1][0] > 0)


def _impassable(site: Site) -> list[Jet]:
    drawn = torch.Tag.nondeterministic_seeded in site.node.op.tags
    reason = "draws random numbers" if drawn else "has no second derivatives along directions"
    raise UntraceableError(f"{site.node.op} {reason}")


def _cast(site: Site) -> list[Jet]:
    return [site.cast(site.jets[0])]


def _quotient(site: Site) -> list[Jet]:
    """Divided by a constant."""
    jet = site.jets[0]
    found = None if jet is None else aligned(jet, site.ndim) / site.node.args[1]
    return [site.cast(found)]


# --- linear -------------------------------------------------------------------------------


def _linear(site: Site) -> list[Jet]:
    active = set(site.node.places)
    args = [_bare(arg, (i, None), active) for i, arg in enumerate(site.node.args)]
    bare = site.node._replace(args=tuple(args))
    found = over_basis(lambda *tangents: _listed(bare(tangents)), *_of_one_length(site))
    return [jet if slot is not None else None for jet, slot in zip(found, site.node.outs)]


def _bare(arg: Any, place: Any, active: set[Any]) -> Any:
    """An argument that adds nothing to the result."""
    if type(arg) in (list, tuple) and any(isinstance(item, Tensor) for item in arg):
        return [_bare(item, (place[0], j), active) for j, item in enumerate(arg)]
    if place in active or not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return torch.zeros_like(arg)


def _of_one_length(site: Site) -> list[Tensor]:
    """Jets with zeros for what is missing."""
    longest = max(len(jet) for jet in site.jets if jet is not None)
    like = next(jet for jet in site.jets if jet is not None)
    found = []
    for slot, jet in zip(site.node.slots, site.jets):
        if jet is None:
            shape, dtype = site.tape.shapes[slot], site.tape.dtypes[slot]
            jet = like.new_zeros((longest, *shape), dtype=dtype)
        found.append(filled(jet, longest))
    return found


def _listed(out: Any) -> Sequence[Tensor]:
    return list(out) if isinstance(out, (tuple, list)) else [out]


def _sum(site: Site) -> list[Jet]:
    """``a + alpha b`` or ``a - alpha b``."""
    alpha = site.node.kwargs.get("alpha", site.node.args[2] if len(site.node.args) > 2 else 1)
    factors = (1, alpha if site.name == "add" else -alpha)
    total = None
    for (i, _), jet in zip(site.node.places, site.jets):
        if jet is not None:
            jet = jet if factors[i] == 1 else factors[i] * jet
            total = add(total, spread(jet, site.shape))
    return [site.cast(total)]


# --- products -----------------------------------------------------------------------------

# Of two stacks, or of a stack and a value: which of the two are stacks is told.
Many = Callable[[Any, Any, bool, bool], Tensor]


def _product(site: Site) -> list[Jet]:
    """Leibniz' rule, by the operation itself."""
    if site.node.places[-1][0] > 1:  # a bias
        return opaque(site)
    jets = {i: jet for (i, _), jet in zip(site.node.places, site.jets)}
    a, b = jets.get(0), jets.get(1)
    many = _many(site)
    total = None
    if a is not None:
        total = many(a, _value(site, 1), True, False)
    if b is not None:
        total = add(total, many(_value(site, 0), b, False, True))
    if a is not None and b is not None and total is not None:
        total = _leibniz(site.scheme, total, a, b, lambda x, y: many(x, y, True, True))
    return [site.cast(total)]


def _value(site: Site, position: int) -> Any:
    places = [i for i, _ in site.node.places]
    if position in places:
        return site.value(places.index(position))
    return site.node.args[position]


def _many(site: Site) -> Many:
    op, rest = site.node.op, list(site.node.args[2:])
    if site.name == "mul":
        ndim = site.ndim
        return lambda x, y, xs, ys: (
            (aligned(x, ndim) if xs else x) * (aligned(y, ndim) if ys else y)
        )
    if site.name in ("mm", "bmm"):
        return _matmul
    if site.name == "convolution":
        rest[0] = None  # the bias

    def many(x: Any, y: Any, xs: bool, ys: bool) -> Tensor:
        if xs and ys:
            found = over_basis(lambda s, t: [op(s, t, *rest)], x, y)
        elif xs:
            found = over_basis(lambda s: [op(s, y, *rest)], x)
        else:
            found = over_basis(lambda t: [op(x, t, *rest)], y)
        assert found[0] is not None
        return found[0]

    return many


def _matmul(x: Tensor, y: Tensor, xs: bool, ys: bool) -> Tensor:
    if not xs or ys or y.ndim > 2:
        return torch.matmul(x, y)
    if x.stride(1) == 0 and x.shape[1] > 1:
        # The same tangents in every row, as they are at the input: one row is enough.
        return matmul(x[:, :1], y).expand(-1, x.shape[1], -1)
    return matmul(x, y)


def _leibniz(scheme: Scheme, total: Tensor, a: Tensor, b: Tensor, product: Any) -> Tensor:
    n, start = scheme.firsts, scheme.firsts + scheme.seconds
    if scheme.seconds:
        total = extend(total, scheme.crossed(a[:n], b[:n], product), n)
    rows = []
    for index in scheme.higher:
        row = torch.zeros_like(total[:1])
        for outer, inner, times in splits(index):
            x, y = part(scheme, a, outer), part(scheme, b, inner)
            if x is not None and y is not None:
                row = row + times * product(x, y)
        rows.append(row)
    return extend(filled(total, start), torch.cat(rows), start) if rows else total


def _affine(site: Site) -> list[Jet]:
    """``beta c + alpha a @ b``."""
    node = site.node
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    inner = [k for k, (i, _) in enumerate(node.places) if i > 0]
    total = None
    if inner:
        product = node._replace(
            op=AFFINE[site.name],
            args=node.args[1:3],
            kwargs={},
            places=tuple([(node.places[k][0] - 1, None) for k in inner]),
            slots=tuple([node.slots[k] for k in inner]),
        )
        (total,) = _product(site._replace(node=product, jets=[site.jets[k] for k in inner]))
        total = total if alpha == 1 or total is None else alpha * total
    if len(inner) < len(node.places) and site.jets[0] is not None:
        total = add(total, spread(site.jets[0] if beta == 1 else beta * site.jets[0], site.shape))
    return [total]
