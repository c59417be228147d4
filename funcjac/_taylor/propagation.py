"""Jets, and their propagation through a recording, operation by operation.

A *jet* has one tensor for each order, ``(directions, *shape)``, ``(second derivatives, *shape)``
and so on, with ``None`` for zero. Orders are never joined: each takes one matrix product.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._engines.rows import added
from funcjac._engines.sum import column_root, peel
from funcjac._environment.torch_private import backward, is_traced
from funcjac._taylor.recorder import Node, filled
from funcjac.errors import UntraceableError

Tensors = Sequence["Tensor | None"]
Jet = tuple["Tensor | None", ...]
Jets = dict[int, Jet]  # by slot
Terms = list[tuple[int, Tensor]]  # stacks, behind slots
Index = tuple[int, ...]
Rows = slice | Tensor
# How often each product occurs; a factor is a variable, by its number, derived by part of an index.
Products = Counter[tuple[tuple[int, Index], ...]]
# Derivatives of one order: multi-indices, of all together or of each by itself, and by part of an
# index, rows among the derivatives of the part's order.
Level = tuple[Sequence[Index], dict[Index, Rows]]
# Derivatives of the results of one operation, by order.
Derivative = Callable[[int], Tensors]


class Scheme(NamedTuple):
    """Derivatives that a jet holds: by order; ``weights`` add second ones up to one."""

    levels: Sequence[Level]
    weights: Tensor | None = None

    @property
    def order(self) -> int:
        return len(self.levels)

    def names(self, order: int, variables: int) -> list[Index]:
        """Derivatives of ``f`` that occur in ``f(*variables)``'s, by numbers of variables."""
        (index, *_), _ = self.levels[order - 1]
        return [*[(i,) for i in range(variables)], *_products(index, variables)]

    def coefficient(
        self, order: int, name: Index, jets: Sequence[Jet], multiply: Callable[..., Tensor | None]
    ) -> Tensor | None:
        """What ``f``'s derivative ``name`` adds to one of ``f(*variables)`` (Faà di Bruno).

        ``multiply`` gives ``f``'s derivative along those of its variables that it is called with.
        """
        if len(name) == 1:
            stack = jets[name[0]][order - 1]
            return None if stack is None else multiply(stack)
        indices, rows = self.levels[order - 1]
        sums: list[Tensor | None] = []
        for index in indices:
            total: Tensor | None = None
            for factors, times in _products(index, len(jets))[name].items():
                parts = [(jets[i][len(part) - 1], rows[part]) for i, part in factors]
                stacks = [take(stack, rows) for stack, rows in parts if stack is not None]
                product = multiply(*stacks) if len(stacks) == len(factors) else None
                if product is not None:
                    product = self.weighted(product)
                    total = added(total, product if times == 1 else times * product)
            sums.append(total)
        stacks = _written_out(sums)
        return torch.cat(stacks) if len(stacks) > 1 else sums[0]

    def weighted(self, stack: Tensor) -> Tensor:
        """Second derivatives themselves, or their weighted sum ``(1, *shape)``."""
        if self.weights is None:
            return stack
        weights = self.weights.to(stack.dtype)
        if is_traced():  # a compiler fuses a sum, not a product
            weights = weights.view(-1, *[1] * (stack.ndim - 1))
            return on_one_row(lambda stack: (weights * stack).sum(0, keepdim=True), stack)
        return on_one_row(lambda stack: torch.tensordot(weights, stack, 1).unsqueeze(0), stack)


def second_order(left: Rows, right: Rows, weights: Tensor | None = None) -> Scheme:
    """Second derivatives along directions ``left`` and ``right``, which may be the same object."""
    index = (0, 0) if left is right else (0, 1)
    return Scheme([([(0,)], {}), ([index], {(0,): left, (1,): right})], weights)


def _of_pairs(pairs: Sequence[Sequence[int]], device: torch.device) -> Scheme:
    left = rows_of([i for i, _ in pairs], device)
    is_twice = all(i == j for i, j in pairs)
    return second_order(left, left if is_twice else rows_of([j for _, j in pairs], device))


def mixed(indices: Sequence[Index], device: torch.device) -> tuple[Scheme, dict[Index, int]]:
    """Mixed derivatives of any order with all that they need, and each one's row in its order.

    The entries of a (sorted) index are directions, counted from 0, and each is in some index.
    """
    levels = [
        sorted({part for index in indices for part in itertools.combinations(index, n + 1)})
        for n in range(max(map(len, indices)))
    ]
    numbers = {index: row for level in levels for row, index in enumerate(level)}
    rows: dict[Index, Rows] = {index: slice(row, row + 1) for index, row in numbers.items()}
    pairwise = _of_pairs(levels[1] if len(levels) > 1 else [], device)
    # Of high order each by itself: a direction that repeats makes fewer different products.
    rest: list[Level] = [(level, rows) for level in levels[2:]]
    return Scheme([*pairwise.levels, *rest][: len(levels)]), numbers


@functools.lru_cache(256)
def _products(index: Index, variables: int) -> dict[Index, Products]:
    """Products of two and more derivatives in the derivative of ``f(*variables)`` by ``index``."""
    terms: Products = Counter({(): 1})
    for entry in index:  # which derives f by each variable, and each factor once more
        derived: Products = Counter()
        for factors, times in terms.items():
            for i in range(variables):
                derived[tuple(sorted((*factors, (i, (entry,)))))] += times
            for k, (i, part) in enumerate(factors):
                longer = i, (*part, entry)
                derived[tuple(sorted((*factors[:k], longer, *factors[k + 1 :])))] += times
        terms = derived
    result: dict[Index, Products] = {}
    for factors, times in terms.items():
        if len(factors) > 1:
            result.setdefault(tuple([i for i, _ in factors]), Counter())[factors] = times
    return result


def rows_of(numbers: Sequence[int], device: torch.device) -> Rows:
    """Rows as a slice, which copies nothing, where they follow one another."""
    start = numbers[0] if numbers else 0
    follow = list(numbers) == list(range(start, start + len(numbers)))
    return slice(start, start + len(numbers)) if follow else torch.tensor(numbers, device=device)


def take(stack: Tensor, rows: Rows) -> Tensor:
    """Some of ``(K, ...)``, without a copy where that can be."""
    if isinstance(rows, slice):
        return stack if rows == slice(0, stack.shape[0]) else stack[rows]
    return on_one_row(lambda stack: stack.index_select(0, rows), stack)


def on_one_row(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """``function`` of stacks ``(K, B, ...)``; of one row if all repeat one, as at the input."""
    if any(s.ndim < 2 or s.shape[1] < 2 or s.stride(1) != 0 for s in stacks):
        return function(*stacks)
    result = function(*[stack[:, :1] for stack in stacks])
    return result.expand(-1, stacks[0].shape[1], *result.shape[2:])


def _written_out(stacks: Tensors) -> list[Tensor]:
    """Stacks of one shape with zeros written out; nothing if all are zero."""
    like = next((stack for stack in stacks if stack is not None), None)
    return [torch.zeros_like(like) if s is None else s for s in stacks] if like is not None else []


# --- recordings --------------------------------------------------------------------------------


class Recording(NamedTuple):
    """One run of ``func``, ready for propagation.

    Attributes:
        values: by slot.
        slots: of the outputs; ``None`` for one that does not depend on the input.
        steps: operations that the outputs need.
        keeps_rows: whether rows stay in dimension 0 of all that is recorded.
        basis: first derivatives of the input, where they are its standard basis in each row.
    """

    values: list[Tensor]
    slots: Sequence[int | None]
    steps: list[Step]
    create_graph: bool
    keeps_rows: Callable[[], bool]
    basis: Tensor | None = None

    def value(self, slot: int) -> Tensor:
        """Tensor in a slot, unless it is a copy of an overwritten one, to which no graph leads."""
        value = self.values[slot]
        if self.create_graph and not value.requires_grad:
            raise UntraceableError("a tensor that depends on the input was overwritten later on")
        return value


class Site(NamedTuple):
    """One operation, and the jets that reach it, by slot."""

    node: Node
    recording: Recording
    jets: Jets
    scheme: Scheme

    @property
    def shapes(self) -> list[Any]:
        """Shapes of the results, ``None`` for one without derivative."""
        values = self.recording.values
        return [None if slot is None else values[slot].shape for slot in self.node.outs]

    def stacks(self, order: int) -> dict[int, Tensor]:
        """Derivatives of one order, zeros written out; nothing if all are zero."""
        stacks = {slot: jet[order - 1] for slot, jet in self.jets.items()}
        counts = [len(stack) for stack in stacks.values() if stack is not None]
        for slot in [slot for slot, stack in stacks.items() if stack is None and counts]:
            value = self.recording.values[slot]
            stacks[slot] = value.new_zeros((counts[0], *value.shape))
        return {slot: stack for slot, stack in stacks.items() if stack is not None}

    def variables(self) -> dict[int, Tensor]:
        """Values, cut off from the operations that made them unless a graph is wanted."""
        values = {slot: self.recording.value(slot) for slot in self.jets}
        if not self.recording.create_graph:
            return {slot: value.detach().requires_grad_() for slot, value in values.items()}
        with torch.enable_grad():
            return {slot: value.view_as(value) for slot, value in values.items()}


class Step(NamedTuple):
    """One operation of a recording.

    Attributes:
        rule: gives the derivatives of its results.
        done: slots that nobody uses after it.
    """

    node: Node
    rule: Callable[[Site], Derivative]
    done: set[int]


# --- propagation -------------------------------------------------------------------------------


def along_directions(
    recording: Recording,
    seeds: dict[int, Tensor],
    scheme: Scheme,
    pairs: Sequence[tuple[int, ...]] = (),
) -> list[Jet]:
    """Jets of the outputs, from directions ``(K, *x.shape)`` by the numbers of inputs.

    Args:
        recording: the run of ``func``.
        seeds: zero where a direction belongs to another input.
        scheme: what the jets hold.
        pairs: of directions, where these make up all of the second derivatives, the highest.
    """
    jets = by_adjoints(recording, seeds, pairs) if pairs else None
    zeros = [None] * (scheme.order - 1)
    inputs: Jets = {j: (seed, *zeros) for j, seed in seeds.items()}
    return jets or propagate(recording, inputs, scheme)


def propagate(
    recording: Recording, jets: Jets, scheme: Scheme, sources: Terms | None = None
) -> list[Jet]:
    """Jets of the outputs, from jets of inputs by their number.

    Second derivatives that operations make of first ones are added to ``sources``, where that is a
    list, and go no further.
    """
    live, zero = dict(jets), (None,) * scheme.order
    with torch.set_grad_enabled(recording.create_graph):
        for step in recording.steps:
            if not live.keys().isdisjoint(step.node.slots):
                results = _results(recording, step, live, scheme)
                if sources is not None:
                    sources += [(slot, s) for slot, (_, s) in results.items() if s is not None]
                    results = {slot: (first, None) for slot, (first, _) in results.items()}
                live.update(results)
            for slot in step.done:
                live.pop(slot, None)
    return [zero if slot is None else live.get(slot, zero) for slot in recording.slots]


def _results(recording: Recording, step: Step, live: Jets, scheme: Scheme) -> Jets:
    """Jets of the results of an operation, by slot, in the dtypes of their values."""
    node = step.node
    jets = {slot: live[slot] for slot in node.slots if slot in live}
    constants = {slot: recording.value(slot) for slot in node.slots if slot not in live}
    if constants:
        slots = tuple([slot for slot in node.slots if slot in live])
        node = node._replace(args=filled(node.args, constants), slots=slots)
    derivative = step.rule(Site(node, recording, jets, scheme))
    orders = [derivative(order) for order in range(1, scheme.order + 1)]
    results: Jets = {}
    for slot, *stacks in zip(node.outs, *orders):
        if slot is not None and any(stack is not None for stack in stacks):
            dtype = recording.values[slot].dtype
            results[slot] = tuple([None if stack is None else stack.to(dtype) for stack in stacks])
    return results


# NOTE [second derivatives by adjoints]
# The second derivative of an output is a sum over operations that are not linear: its gradient by
# the result, times the second derivative that the operation makes of first ones. One pass back for
# each output gives all gradients, first derivatives among them, so that second ones need not go
# through linear operations, nor first ones along directions that no pair has. Sums are over a row:
# they need its place in each result, which is known where it stays in dimension 0.


def by_adjoints(
    recording: Recording, seeds: dict[int, Tensor], pairs: Sequence[tuple[int, ...]]
) -> list[Jet] | None:
    """First derivatives along all seeds, and second ones along pairs of them.

    ``None`` where that takes no less than propagation, or cannot be done.
    See NOTE [second derivatives by adjoints].
    """
    if None in recording.slots:
        return None
    outs = [recording.values[slot] for slot in recording.slots if slot is not None]
    moving = sorted({direction for pair in pairs for direction in pair})
    count = sum(out.shape[1:].numel() for out in outs)
    total = len(next(iter(seeds.values())))
    if count + len(moving) >= total + len(pairs) or not recording.keeps_rows():
        return None
    sources: Terms = []
    scheme = _of_pairs([[moving.index(k) for k in pair] for pair in pairs], outs[0].device)
    moved = rows_of(moving, outs[0].device)
    jets: Jets = {j: (take(seed, moved), None) for j, seed in seeds.items()}
    propagate(recording, jets, scheme, sources)
    if not all(recording.values[slot].requires_grad for slot, _ in sources):
        return None  # overwritten later on
    terms = [*seeds.items(), *sources]
    with torch.set_grad_enabled(recording.create_graph):
        return [_contracted(recording, out, terms, len(seeds)) for out in outs]


def _contracted(recording: Recording, out: Tensor, terms: Terms, firsts: int) -> Jet:
    """Sums over each row of gradients times stacks: of the first terms, and of the others."""
    values, graph = [recording.values[slot] for slot, _ in terms], recording.create_graph
    columns: list[list[Tensor | None]] = []
    peeled = peel(out, recording.values[:firsts])
    for m in range(out.shape[1:].numel()):
        if peeled is None:
            root, cotangent = column_root(out, m)
        else:
            root, cotangent = peeled[0], peeled[1][m].expand(out.shape[0], -1)
        grads = backward(root, values, cotangent, retain=True, graph=graph)
        sums: list[Tensor | None] = [None, None]
        for n, ((_, stack), grad) in enumerate(zip(terms, grads)):
            if grad is not None:
                product = (stack * grad).unsqueeze(-1).flatten(2).sum(2)
                sums[n >= firsts] = added(sums[n >= firsts], product)
        columns.append(sums)
    jet: list[Tensor | None] = []
    for stacks in map(_written_out, zip(*(columns or [(None, None)]))):  # (K, B) for each output
        whole = torch.stack(stacks, -1) if stacks else None
        jet.append(None if whole is None else whole.reshape(len(whole), *out.shape).to(out.dtype))
    return tuple(jet)
