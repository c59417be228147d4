"""Elementwise operations, by the chain rule of any order (Faà di Bruno).

Their derivatives are tensors of the result's shape: plain autograd gives them by
differentiating the sum of the result again and again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import backward
from funcjac._taylor.jets import Index, Jet, Scheme, Site, add, aligned, on_one_row, splits
from funcjac._taylor.opaque import rerun, variables

# A summand ``factor * stack * times``.
Term = tuple[Tensor, Tensor, int]


def elementwise(site: Site) -> list[Jet | None]:
    """Propagates through an operation that works on each element by itself."""
    scheme, ndim = site.scheme, len(site.shape)
    jets = [
        tuple([None if stack is None else aligned(stack, ndim) for stack in jet])
        for jet in dict(zip(site.node.slots, site.jets)).values()
    ]
    key = (site.node.outs, site.node.slots, scheme.order)
    partial = site.derivatives.get(key)
    if partial is None:
        partial = site.derivatives[key] = _Partials(site)
    higher = _Higher(scheme, jets, partial)

    def derivative(order: int) -> Tensor | None:
        terms = _terms((partial(v), jet[order - 1], 1) for v, jet in enumerate(jets))
        if order == 2:
            terms += _bends(scheme, jets, partial)
        total = _summed(terms)
        return add(total, higher.stack(order, site.shape)) if order > 2 else total

    return site.jet(derivative)


def _terms(summands: Iterable[tuple[Tensor | None, Tensor | None, int]]) -> list[Term]:
    """Summands that are not zero."""
    return [(a, b, times) for a, b, times in summands if a is not None and b is not None]


def _summed(terms: list[Term]) -> Tensor | None:
    total: Tensor | None = None
    for factor, stack, times in terms:
        if total is None:
            total = factor * stack
            total = total if times == 1 else times * total
        else:
            total = torch.addcmul(total, factor, stack, value=times)
    return total


def _bends(scheme: Scheme, jets: list[Jet], partial: _Partials) -> list[Term]:
    """Second derivatives of the operation times first ones of its arguments."""
    terms: list[Term] = []
    for i, j in itertools.combinations_with_replacement(range(len(jets)), 2):
        a, b = jets[i][0], jets[j][0]
        factor = None if a is None or b is None else partial(i, j)
        if factor is not None:
            rule = functools.partial(scheme.second, product=torch.mul, cross=i != j)
            stacks: Any = (a, b)
            terms.append((factor, on_one_row(rule, *stacks), 1))
    return terms


class _Higher:
    """Derivatives of order three and more, but for the term linear in the highest.

    ``d_Ic f(z)`` is ``d_I (f'(z) d_c z)``: by Leibniz' rule, derivatives of ``z`` times those of
    ``f'(z)``, which many share.
    """

    def __init__(self, scheme: Scheme, jets: list[Jet], partial: _Partials) -> None:
        self.scheme, self.jets, self.partial = scheme, jets, partial
        self.known: dict[tuple[Index, Index], Tensor | None] = {}

    def stack(self, order: int, shape: torch.Size) -> Tensor | None:
        rows = [self._sum((), index, proper=True) for index in self.scheme.indices[order - 1]]
        like = next((row for row in rows if row is not None), None)
        if like is None:
            return None
        return torch.stack([like.new_zeros(shape) if row is None else row for row in rows])

    def _factor(self, variables: Index, index: Index) -> Tensor | None:
        """Derivative by ``index`` of the operation's derivative by ``variables``."""
        if not index:
            return self.partial(*variables)
        key = variables, index
        if key not in self.known:
            self.known[key] = self._sum(variables, index)
        return self.known[key]

    def _sum(self, variables: Index, index: Index, *, proper: bool = False) -> Tensor | None:
        terms = []
        for variable, outer, inner, times in _splits(index, len(self.jets)):
            part = self.scheme.part(self.jets[variable], inner) if outer or not proper else None
            if part is not None:
                factor = self._factor(tuple(sorted((*variables, variable))), outer)
                terms.append((factor, part, times))
        return _summed(_terms(terms))


@functools.lru_cache(256)
def _splits(index: Index, variables: int) -> list[tuple[int, Index, Index, int]]:
    """Splits of ``index`` for each variable, with its last entry in the second part."""
    *before, last = index
    ways = splits(tuple(before))
    return [(v, outer, (*inner, last), n) for outer, inner, n in ways for v in range(variables)]


class _Partials:
    """Partial derivatives of an elementwise operation, by the numbers of its variables."""

    def __init__(self, site: Site) -> None:
        self.create_graph, self.order = site.create_graph, site.scheme.order
        pair = _recorded(site)
        if pair is None:
            with torch.enable_grad():
                copies = {slot: x.expand(site.shape) for slot, x in variables(site).items()}
                out = rerun(site.node, copies)
            pair = out[0] if isinstance(out, (tuple, list)) else out, list(copies.values())
        out, self.inputs = pair
        self.known: dict[Index, Tensor | None] = {(): out}

    def __call__(self, *variables: int) -> Tensor | None:
        if variables not in self.known:
            *before, _ = variables
            grads = self._grad(self(*before), len(variables))
            for i, grad in enumerate(grads):
                self.known[tuple(sorted((*before, i)))] = grad
        return self.known[variables]

    def _grad(self, out: Tensor | None, order: int) -> Sequence[Tensor | None]:
        if out is None:
            return [None] * len(self.inputs)
        more = self.create_graph or order < self.order
        ones = out.new_ones(()).expand(out.shape)
        with torch.set_grad_enabled(more):
            return backward(out, self.inputs, ones, retain=True, graph=more)


def _recorded(site: Site) -> tuple[Tensor, list[Tensor]] | None:
    """Result and argument in the graph of ``func``'s run, where both have one shape."""
    values = site.recorder.values
    if len(site.node.slots) != 1:
        return None
    x, out = values[site.node.slots[0]], values[site.node.outs[0] or 0]
    site.value(0)  # raises where it is overwritten
    if x.tensor is None or out.tensor is None or not out.is_intact or x.shape != out.shape:
        return None
    same = x.tensor.shape == x.shape and out.tensor.shape == out.shape
    attached = x.tensor.requires_grad and out.tensor.requires_grad
    return (out.tensor, [x.tensor]) if same and attached else None
