"""Operations that work on each element by itself.

Their derivatives of any order are tensors of the result's shape: plain autograd gives them by
differentiating the sum of the result again and again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._jets import (
    Jet,
    Scheme,
    Site,
    aligned,
    combined,
    part,
    partitions,
)
from funcjac._native import backward
from funcjac._opaque import first, rerun, variables


def elementwise(site: Site) -> list[Jet]:
    """The chain rule of any order (Faà di Bruno) for each element."""
    jets = {slot: jet for slot, jet in zip(site.node.slots, site.jets) if jet is not None}
    order = len(site.scheme.higher[-1]) if site.scheme.higher else 2
    key = (site.node.outs, site.node.slots, order)
    found = site.known.get(key)
    if found is None:
        found = site.known[key] = _Derivatives(site, list(jets), order)
    stacks = [aligned(jet, site.ndim) for jet in jets.values()]
    of = _of_named if site.scheme.places else _of_one if len(stacks) == 1 else _of_many
    terms = of(site.scheme, stacks, found)
    if site.start:
        terms = [_cut(term, site.start) for term in terms if term[0] + len(term[2]) > site.start]
    return [site.cast(combined(terms, site.shape, overwrite=site.spare and len(jets) == 1))]


def _cut(term: Any, start: int) -> Any:
    """What a term adds to derivatives from ``start`` on."""
    begin, factor, found = term
    return max(begin - start, 0), factor, found[max(start - begin, 0) :]


def _of_one(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Any]:
    (jet,), slope_of, second = stacks, found(0), found(0, 0)
    terms = [] if slope_of is None else [(0, slope_of, jet)]
    if second is not None and scheme.seconds:
        slope = jet[: scheme.firsts]
        terms.append((scheme.firsts, second, scheme.along(slope, slope, torch.mul)))
    return terms


def _of_many(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Any]:
    n = scheme.firsts
    terms = _firsts(stacks, found)
    for i, j in itertools.combinations_with_replacement(range(len(stacks)), 2):
        factor = found(i, j) if scheme.seconds else None
        if factor is not None:
            rule = scheme.along if i == j else scheme.crossed
            terms.append((n, factor, rule(stacks[i][:n], stacks[j][:n], torch.mul)))
    return terms


def _of_named(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Any]:
    """Of derivatives by multi-indices, one by one."""
    terms, known = _firsts(stacks, found), {}
    for index, place in scheme.places.items():
        for key, sum_ in _products(scheme, index, stacks, known):
            factor = found(*key)
            if factor is not None:
                terms.append((place, factor, sum_))
    return terms


def _firsts(stacks: list[Tensor], found: _Derivatives) -> list[Any]:
    terms = [(0, found(i), jet) for i, jet in enumerate(stacks)]
    terms = [term for term in terms if term[1] is not None]
    return sorted(terms, key=lambda term: -len(term[2]))  # what is added to must be there


def _products(
    scheme: Scheme, index: tuple[int, ...], stacks: list[Tensor], known: dict[Any, Any]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """What the derivatives of the operation are multiplied with: for each of them, by variables.

    A sum over all ways to split ``index`` into two or more blocks, each of which falls to a
    variable. ``known`` are products that were computed before.
    """
    for key, found in _splits(index, len(stacks)).items():
        total: Any = None
        for factors, count in found.items():
            term = _monomial(scheme, factors, stacks, known)
            if term is not None and total is None:
                total = term if count == 1 else count * term
            elif term is not None:
                total = torch.add(total, term, alpha=count)
        if total is not None:
            yield key, total


@functools.cache
def _splits(index: tuple[int, ...], variables: int) -> dict[tuple[int, ...], dict[Any, int]]:
    """How often each product of variables' derivatives occurs, by variables."""
    sums: dict[tuple[int, ...], dict[Any, int]] = {}
    for blocks in partitions(index):
        for chosen in itertools.product(range(variables), repeat=len(blocks)):
            key, factors = tuple(sorted(chosen)), tuple(sorted(zip(chosen, blocks)))
            if len(key) > 1:
                found = sums.setdefault(key, {})
                found[factors] = found.get(factors, 0) + 1
    return sums


def _monomial(scheme: Scheme, factors: Any, stacks: list[Tensor], known: Any) -> Tensor | None:
    """A product of derivatives, from that of all but the last."""
    if factors not in known:
        variable, block = factors[-1]
        last = part(scheme, stacks[variable], block)
        before = _monomial(scheme, factors[:-1], stacks, known) if len(factors) > 1 else None
        if len(factors) > 1:
            last = None if last is None or before is None else before * last
        known[factors] = last
    return known[factors]


class _Derivatives:
    """Partial derivatives of an operation on each element: called with the variables' numbers."""

    def __init__(self, site: Site, slots: list[int], order: int) -> None:
        self.graph = site.graph
        self.ones: Tensor | None = None
        self.order = order
        out, inputs = _already_there(site) if len(site.node.slots) == 1 else (None, [])
        if out is None:
            own = variables(site, slots)
            with torch.enable_grad():
                shape = site.shape
                spread = {slot: x.expand(shape) for slot, x in own.items()}
                inputs = list(spread.values())
                out = first(rerun(site, spread))
        self.inputs = inputs
        self.found: dict[tuple[int, ...], Tensor | None] = {(): out}

    def __call__(self, *index: int) -> Tensor | None:
        if index not in self.found:
            before = self(*index[:-1])
            more = self.graph or len(index) < self.order
            row = [None] * len(self.inputs) if before is None else self._grad(before, more)
            for i, grad in enumerate(row):
                self.found[tuple(sorted((*index[:-1], i)))] = grad
        return self.found[index]

    def _grad(self, out: Tensor, more: bool) -> Sequence[Tensor | None]:
        if self.ones is None or self.ones.dtype != out.dtype:
            self.ones = out.new_ones(()).expand(out.shape)
        steps = _chain(out, self.inputs[0]) if len(self.inputs) == 1 else None
        with torch.enable_grad() if more else torch.no_grad():
            if steps is None:
                return backward(out, self.inputs, self.ones, retain=True, graph=more)
            grad = self.ones
            for node, place in steps:  # autograd's engine takes longer than the operations
                found = node(grad)
                grad = found[place] if isinstance(found, tuple) else found
            return [grad]


# A derivative of a simple operation has so many steps at most.
_MOST_STEPS = 4


def _chain(out: Tensor, x: Tensor) -> list[tuple[Any, int]] | None:
    """Functions of the graph, and which of their results goes on, where one way leads to ``x``."""
    steps: list[tuple[Any, int]] = []
    node = None if out._backward_hooks else out.grad_fn
    while node is not None and len(steps) < _MOST_STEPS:
        ways = [(i, *edge) for i, edge in enumerate(node.next_functions) if edge[0] is not None]
        if len(ways) != 1:
            return None
        i, before, place = ways[0]
        steps.append((node, i))
        if before is x.grad_fn if x.grad_fn else getattr(before, "variable", None) is x:
            return steps if place == x.output_nr else None
        node = before if place == 0 else None
    return None


def _already_there(site: Site) -> tuple[Tensor | None, list[Tensor]]:
    """The result and the argument in the graph of ``func``'s own run, where both are whole."""
    (slot,), out = site.node.slots, site.tape.values[site.node.outs[0] or 0]
    value = site.value(0)
    whole = value is site.tape.values[slot] and value.shape == site.shape
    if out is None or not whole or not site.tape.is_as_recorded(site.node.outs[0] or 0):
        return None, []
    return (out, [value]) if out.requires_grad and value.requires_grad else (None, [])
