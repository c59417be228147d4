"""Operations that are not linear: on each element by itself, and all others.

On each element, derivatives of any order are tensors of the result's shape: plain autograd
gives them by differentiating the sum of the result again and again. What is left is an
operation of which nothing is known but how to differentiate it: there, derivatives along
directions are transposes of vector-Jacobian products (J. Townsend, "A new trick for
calculating Jacobian vector products", 2017).
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from funcjac._jets import (
    Jet,
    Scheme,
    Site,
    aligned,
    combined,
    extend,
    filled,
    part,
    partitions,
)
from funcjac._native import backward, over_basis
from funcjac.errors import UntraceableError

Variables = dict[int, Tensor]


def elementwise(site: Site) -> list[Jet]:
    """The chain rule of any order (Faà di Bruno) for each element."""
    jets = {slot: jet for slot, jet in zip(site.node.slots, site.jets) if jet is not None}
    key = (site.node.outs, site.node.slots)
    found = site.known.get(key)
    if found is None:
        found = site.known[key] = _Derivatives(site, list(jets))
    if len(jets) == 1 and not site.scheme.higher:
        (stack,) = (aligned(jet, site.ndim) for jet in jets.values())
        terms = _of_one(site.scheme, stack, found)
    else:
        terms = _of_many(site.scheme, [aligned(jet, site.ndim) for jet in jets.values()], found)
    if site.start:
        terms = [_cut(term, site.start) for term in terms if term[0] + len(term[2]) > site.start]
    return [site.cast(combined(terms, site.shape, overwrite=site.spare and len(jets) == 1))]


def _cut(term: Any, start: int) -> Any:
    """What a term adds to derivatives from ``start`` on."""
    begin, factor, found = term
    return max(begin - start, 0), factor, found[max(start - begin, 0) :]


def _of_one(scheme: Scheme, jet: Tensor, found: _Derivatives) -> list[Any]:
    first, second = found(0), found(0, 0)
    terms = [] if first is None else [(0, first, jet)]
    if second is not None and scheme.seconds:
        slope = jet[: scheme.firsts]
        terms.append((scheme.firsts, second, scheme.along(slope, slope, torch.mul)))
    return terms


def _of_many(scheme: Scheme, stacks: list[Tensor], found: _Derivatives) -> list[Any]:
    n = scheme.firsts
    terms: list[Any] = [(0, found(i), jet) for i, jet in enumerate(stacks)]
    terms.sort(key=lambda term: -len(term[2]))  # what is added to must be there
    for i, j in itertools.combinations_with_replacement(range(len(stacks)), 2):
        factor = found(i, j) if scheme.seconds else None
        if factor is not None:
            rule = scheme.along if i == j else scheme.crossed
            terms.append((n, factor, rule(stacks[i][:n], stacks[j][:n], torch.mul)))
    for begin, index in enumerate(scheme.higher, n + scheme.seconds):
        terms += [(begin, found(*key), sum_) for key, sum_ in _products(scheme, index, stacks)]
    return [term for term in terms if term[1] is not None]


def _products(
    scheme: Scheme, index: tuple[int, ...], stacks: list[Tensor]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """What the derivatives of the operation are multiplied with: for each of them, by variables.

    A sum over all ways to split ``index`` into two or more blocks, each of which falls to a
    variable.
    """
    sums: dict[tuple[int, ...], dict[Any, int]] = {}
    for blocks in partitions(index):
        for chosen in itertools.product(range(len(stacks)), repeat=len(blocks)):
            key, factors = tuple(sorted(chosen)), tuple(sorted(zip(chosen, blocks)))
            found = sums.setdefault(key, {})
            found[factors] = found.get(factors, 0) + 1
    for key, found in sums.items():
        if len(key) > 1:
            total = _polynomial(scheme, found, stacks)
            if total is not None:
                yield key, total


def _polynomial(scheme: Scheme, found: dict[Any, int], stacks: list[Tensor]) -> Tensor | None:
    total = None
    for factors, count in found.items():
        pieces = [part(scheme, stacks[variable], block) for variable, block in factors]
        if any(piece is None for piece in pieces):
            continue
        term: Any = functools.reduce(operator.mul, cast(Any, pieces))
        if total is None:
            total = term if count == 1 else count * term
        else:
            total = torch.add(total, term, alpha=count)
    return total


class _Derivatives:
    """Partial derivatives of an operation on each element: called with the variables' numbers."""

    def __init__(self, site: Site, slots: list[int]) -> None:
        self.graph = site.graph
        self.ones: Tensor | None = None
        self.order = max((len(index) for index in site.scheme.higher), default=2)
        out, inputs = _already_there(site) if len(site.node.slots) == 1 else (None, [])
        if out is None:
            variables = _variables(site, slots)
            inputs = list(variables.values())
            with torch.enable_grad():
                shape = site.shape
                spread = {slot: x.expand(shape) for slot, x in variables.items()}
                inputs = list(spread.values())
                out = _first(_rerun(site, spread))
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
        with torch.enable_grad():
            if more and len(self.inputs) == 1:
                node = _only_node(out, self.inputs[0])
                if node is not None:  # the engine takes longer than the operation
                    return [node(self.ones)]
            return backward(out, self.inputs, self.ones, retain=True, graph=more)


def _only_node(out: Tensor, x: Tensor) -> Any:
    """The function of the graph that leads from ``out`` to ``x`` alone, in one step."""
    node = out.grad_fn
    if node is None or out._backward_hooks or len(node.next_functions) != 1:
        return None
    before, place = node.next_functions[0]
    direct = before is x.grad_fn if x.grad_fn is not None else getattr(before, "variable", 0) is x
    return node if direct and (x.grad_fn is None or place == x.output_nr) else None


def _already_there(site: Site) -> tuple[Tensor | None, list[Tensor]]:
    """The result and the argument in the graph of ``func``'s own run, where both are whole."""
    (slot,), out = site.node.slots, site.tape.values[site.node.outs[0] or 0]
    value = site.value(0)
    whole = value is site.tape.values[slot] and value.shape == site.shape
    if out is None or not whole or not out.requires_grad or not value.requires_grad:
        return None, []
    return out, [value]


# --- all others ---------------------------------------------------------------------------


def opaque(site: Site) -> list[Jet]:
    """An operation of which nothing is known: three reverse passes for a second derivative."""
    if site.scheme.higher:
        raise UntraceableError(f"{site.node.op} has no rule for derivatives of order three")
    jets = {slot: jet for slot, jet in zip(site.node.slots, site.jets) if jet is not None}
    n, longest = site.scheme.firsts, max(map(len, jets.values()))
    slots = list(jets)
    stacks = [filled(jet, longest) for jet in jets.values()]
    variables = _variables(site, slots)
    with torch.enable_grad():
        outs = _differentiable(_rerun(site, variables))
        seeds = [torch.zeros_like(out, requires_grad=True) for _, out in outs]
        grads = _grad([out for _, out in outs], list(variables.values()), seeds, graph=True)
        tangents = _pushed(grads, seeds, stacks, graph=site.graph)
        curved = _depends_on(grads, list(variables.values()))
        bends: list[Jet] = [None] * len(outs)
        if curved and site.scheme.seconds:
            bends = _second(site, slots, [stack[:n] for stack in stacks], [p for p, _ in outs])
    found: list[Jet] = [None] * len(site.node.outs)
    for (place, out), tangent, bend in zip(outs, tangents, bends):
        if site.node.outs[place] is None or tangent is None:
            continue
        jet = tangent if site.graph else tangent.detach()
        if bend is not None:
            jet = extend(jet.clone(), bend if site.graph else bend.detach(), n)
        found[place] = jet.to(out.dtype)
    return found


def _pushed(
    grads: list[Tensor | None], seeds: list[Tensor], stacks: list[Tensor], *, graph: bool
) -> Sequence[Tensor | None]:
    live = [k for k, g in enumerate(grads) if g is not None and g.requires_grad]
    if not live:
        return [None] * len(seeds)
    outs = [g for g in grads if g is not None and g.requires_grad]

    def pull(*tangents: Tensor) -> Sequence[Tensor | None]:
        return _grad(outs, seeds, list(tangents), graph=graph)

    return over_basis(pull, *[stacks[k] for k in live])


def _depends_on(grads: list[Tensor | None], inputs: list[Tensor]) -> bool:
    live = [g for g in grads if g is not None and g.requires_grad]
    ones = [torch.zeros_like(g) for g in live]
    return bool(live) and any(g is not None for g in _grad(live, inputs, ones, graph=False))


def _second(site: Site, slots: list[int], firsts: list[Tensor], places: list[int]) -> list[Jet]:
    """Second derivatives of each result, each pair of directions with copies of its own."""
    scheme = site.scheme
    left = [first[scheme.left] for first in firsts]
    right = [first[scheme.right] for first in firsts]
    copies = {
        slot: x.expand(len(t), *x.shape)
        for (slot, x), t in zip(_variables(site, slots).items(), left)
    }
    outs = _mapped(site, copies, places)
    seeds = [torch.zeros_like(out, requires_grad=True) for out in outs]
    inputs = list(copies.values())
    grads = _grad(outs, inputs, seeds, graph=True)
    live = [k for k, g in enumerate(grads) if g is not None and g.requires_grad]
    again = _grad([grads[k] for k in live], inputs, [left[k] for k in live], graph=True)
    live = [k for k, g in enumerate(again) if g is not None and g.requires_grad]
    if not live:
        return [None] * len(outs)
    bends = _grad([again[k] for k in live], seeds, [right[k] for k in live], graph=site.graph)
    return [None if bend is None else scheme.total(bend) for bend in bends]


def _mapped(site: Site, copies: Variables, places: list[int]) -> list[Tensor]:
    slots = list(copies)

    def one(*xs: Tensor) -> list[Tensor]:
        out = _rerun(site, dict(zip(slots, xs)))
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        return [outs[place] for place in places]

    return [out for out in over_basis(one, *copies.values()) if out is not None]


# --- running an operation again -----------------------------------------------------------


def _variables(site: Site, slots: list[int]) -> Variables:
    """The values of slots, to differentiate by apart from whatever made them."""
    values = {slot: site.value(site.node.slots.index(slot)) for slot in slots}
    if site.graph:
        with torch.enable_grad():
            return {slot: value.view_as(value) for slot, value in values.items()}
    return {slot: value.detach().requires_grad_() for slot, value in values.items()}


def _rerun(site: Site, variables: Variables) -> Any:
    slots = site.node.slots
    given = [variables[s] if s in variables else site.value(i) for i, s in enumerate(slots)]
    return site.node(given)


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, list)) else out


def _differentiable(out: Any) -> list[tuple[int, Tensor]]:
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    return [
        (place, tensor)
        for place, tensor in enumerate(outs)
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.requires_grad
    ]


def _grad(outs: Any, inputs: list[Tensor], seeds: list[Tensor], *, graph: bool) -> Any:
    return torch.autograd.grad(
        outs, inputs, seeds, retain_graph=True, create_graph=graph, allow_unused=True
    )
