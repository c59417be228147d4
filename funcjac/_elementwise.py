"""Operations that work on each element by itself.

Their derivatives of any order are tensors of the result's shape: plain autograd gives them by
differentiating the sum of the result again and again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._formulas import Formula, formula
from funcjac._jets import (
    Index,
    Jet,
    Scheme,
    Site,
    Term,
    aligned,
    combined,
    splits,
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
        terms = [_cut(term, site.start) for term in terms if term.end > site.start]
    # Products by multi-indices are of the jet itself, which must stay until the last.
    overwrite = site.spare and len(jets) == 1 and of is not _of_named
    return [site.cast(combined(terms, site.shape, overwrite=overwrite))]


def _cut(term: Term, start: int) -> Term:
    """What a term adds to derivatives from ``start`` on."""
    begin, found = max(term.begin - start, 0), term.found[max(start - term.begin, 0) :]
    return term._replace(begin=begin, found=found)


def _of_one(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Term]:
    (jet,), second = stacks, found(0, 0)
    terms = _firsts(stacks, found)
    if second is not None and scheme.seconds:
        slope = jet[: scheme.firsts]
        terms.append(Term(scheme.firsts, second, scheme.along(slope, slope, torch.mul)))
    return terms


def _of_many(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Term]:
    n = scheme.firsts
    terms = _firsts(stacks, found)
    for i, j in itertools.combinations_with_replacement(range(len(stacks)), 2):
        factor = found(i, j) if scheme.seconds else None
        if factor is not None:
            rule = scheme.along if i == j else scheme.crossed
            terms.append(Term(n, factor, rule(stacks[i][:n], stacks[j][:n], torch.mul)))
    return terms


def _of_named(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Term]:
    """Of derivatives by multi-indices.

    ``d_Ic f(z)`` is ``d_I (f'(z) d_c z)``: by Leibniz' rule, derivatives of ``z`` times those of
    ``f'(z)``, which many share.
    """
    terms, bends = _firsts(stacks, found), _Bends(scheme, stacks, found)
    lengths = tuple(map(len, stacks))
    for (variable, outer, times), runs in _runs(tuple(scheme.places), lengths).items():
        factor = bends((variable,), outer)
        if factor is not None:
            jet = stacks[variable]
            terms += [Term(place, factor, jet[at : at + n], times) for place, at, n in runs]
    return sorted(terms, key=lambda term: term.begin)


@functools.lru_cache(256)
def _runs(indices: tuple[Index, ...], lengths: tuple[int, ...]) -> dict[Any, list[list[int]]]:
    """By factor (variable, index, and how often): where products go, with what, and how many.

    ``lengths`` are those of the variables' jets.
    """
    found: dict[Any, list[list[int]]] = {}
    for place, index in enumerate(indices):
        for variable, outer, inner, times in _splits(index, len(lengths)):
            source = indices.index(inner)
            if not outer or source >= lengths[variable]:
                continue
            runs = found.setdefault((variable, outer, times), [])
            if runs and place - runs[-1][0] == source - runs[-1][1] == runs[-1][2]:
                runs[-1][2] += 1
            else:
                runs.append([place, source, 1])
    return found


def _firsts(stacks: list[Tensor], found: _Derivatives) -> list[Term]:
    factors = [(found(i), jet) for i, jet in enumerate(stacks)]
    terms = [Term(0, factor, jet) for factor, jet in factors if factor is not None]
    return sorted(terms, key=lambda term: -len(term.found))  # what is added to must be there


def _splits(index: Index, variables: int) -> list[tuple[int, Index, Index, int]]:
    """For each variable, ways to split ``index``, of which the last entry falls to the second."""
    *before, last = index
    ways = splits(tuple(before))
    return [(v, outer, (*inner, last), n) for outer, inner, n in ways for v in range(variables)]


class _Bends:
    """Derivatives of an operation by variables, and of those by multi-indices."""

    def __init__(self, scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> None:
        self.places, self.found = scheme.places, found
        self.parts = [jet.split(1) for jet in stacks]
        self.known: dict[Any, Tensor | None] = {}

    def __call__(self, variables: tuple[int, ...], index: Index) -> Tensor | None:
        if not index:
            return self.found(*variables)
        if (variables, index) not in self.known:
            self.known[variables, index] = self._sum(variables, index)
        return self.known[variables, index]

    def _sum(self, variables: tuple[int, ...], index: Index) -> Tensor | None:
        total: Any = None
        for variable, outer, inner, times in _splits(index, len(self.parts)):
            parts, place = self.parts[variable], self.places[inner]
            factor = self(tuple(sorted((*variables, variable))), outer)
            if factor is None or place >= len(parts):
                continue
            if total is not None:
                total = torch.addcmul(total, factor, parts[place], value=times)
            else:
                total = factor * parts[place]
                total = total if times == 1 else times * total
        return total


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
        self.formula: Formula | None = None  # it is noted by calls of this
        self.formula = self._formula(site, out)

    def _formula(self, site: Site, out: Tensor) -> Formula | None:
        """``None`` where autograd is the way."""
        whole = len(self.inputs) == 1 and self.inputs[0].shape == out.shape
        if self.graph or not whole or self.inputs[0] is not site.value(0):
            return None
        self.ones = out.new_ones(()).expand(out.shape)
        tensors = (self.inputs[0], out, self.ones)
        self.values = dict(enumerate(tensors))
        return formula(site.node, tensors, lambda order: self(*[0] * order), self.order)

    def __call__(self, *index: int) -> Tensor | None:
        if index not in self.found and self.formula is not None:
            self(*index[:-1])
            self.found[index] = self.formula.run(self.values, len(index))
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
