"""Jets: derivatives of a tensor along directions, and the products that make higher ones.

A *jet* has one tensor for each order, ``(directions, *shape)``, ``(second derivatives, *shape)``
and so on, with ``None`` for zero. Orders are never joined: each takes one matrix product.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from funcjac._engines.join_chunks import added
from funcjac._environment.torch_private import is_traced
from funcjac._taylor.recording import Node, Recording

Jet = tuple["Tensor | None", ...]
# Derivatives of the results of one operation, by order.
Derivative = Callable[[int], Sequence["Tensor | None"]]
Index = tuple[int, ...]
Rows = slice | Tensor
# Derivative of a variable, by its number, along a part of an index.
Factor = tuple[int, Index]
# How often each product occurs.
Products = Counter[tuple[Factor, ...]]


class Level(NamedTuple):
    """Derivatives of one order, and where to find the lower ones that make them.

    Attributes:
        indices: multi-indices; of all derivatives, or of each by itself.
        rows: by part of an index, rows among the derivatives of the part's order.
    """

    indices: Sequence[Index]
    rows: dict[Index, Rows]


@dataclass(frozen=True, eq=False)
class Scheme:
    """Derivatives that a jet holds.

    Attributes:
        levels: by order.
        weights: of second derivatives, which are then added up to one.
    """

    levels: Sequence[Level]
    weights: Tensor | None = None

    @property
    def order(self) -> int:
        """The highest."""
        return len(self.levels)

    def higher(
        self,
        order: int,
        jets: Sequence[Jet],
        multiply: Callable[[Tensor, Tensor], Tensor],
        vanishes: Callable[[Index], bool],
    ) -> Iterator[tuple[Index, Tensor]]:
        """Coefficients of ``f``'s derivatives in those of ``f(*variables)`` (Faà di Bruno).

        From the second derivative on, named by numbers of variables, without those that vanish.
        """
        indices, rows = self.levels[order - 1]
        sums = [_products(index, len(jets)) for index in indices]
        known: dict[tuple[Factor, ...], Tensor] = {}  # products share their beginnings

        # Not by recursion: a function that refers to itself would keep all of this alive.
        def product(factors: tuple[Factor, ...]) -> Tensor:
            for n, (variable, part) in enumerate(factors, 1):
                first, last = factors[:n], factors[n - 1 : n]
                if last not in known:
                    stack = jets[variable][len(part) - 1]
                    assert stack is not None
                    known[last] = take(stack, rows[part])
                if first not in known:
                    known[first] = multiply(known[first[:-1]], known[last])
            return known[factors]

        def total(products: Products) -> Tensor | None:
            result: Tensor | None = None
            for factors, times in products.items():
                if all(jets[variable][len(part) - 1] is not None for variable, part in factors):
                    stack = self.weighted(product(factors))
                    result = added(result, stack if times == 1 else times * stack)
            return result

        for numbers in sums[0]:
            stacks = [] if vanishes(numbers) else [total(products[numbers]) for products in sums]
            stack = _joined(stacks)
            if stack is not None:
                yield numbers, stack

    def pairs(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """First derivatives along the two directions of each second derivative."""
        (index,), rows = self.levels[1]
        left, right = (take(stack, rows[(k,)]) for k in index)
        return left, right

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
    return Scheme([Level([(0,)], {}), Level([index], {(0,): left, (1,): right})], weights)


def mixed(indices: Sequence[Index], device: torch.device) -> tuple[Scheme, dict[Index, int]]:
    """Mixed derivatives of any order, with all lower ones that they need.

    The entries of a (sorted) index are directions, counted from 0, and each is in some index.

    Returns:
        The scheme, and the row of each index among the derivatives of its order.
    """
    levels = [
        sorted({part for index in indices for part in itertools.combinations(index, n + 1)})
        for n in range(max(map(len, indices)))
    ]
    numbers = {index: row for level in levels for row, index in enumerate(level)}
    rows: dict[Index, Rows] = {index: slice(row, row + 1) for index, row in numbers.items()}
    pairs = levels[1] if len(levels) > 1 else []
    left, right = (rows_of([pair[k] for pair in pairs], device) for k in (0, 1))
    pairwise = second_order(left, left if all(i == j for i, j in pairs) else right)
    # Of high order each by itself: a direction that repeats makes fewer different products.
    rest = [Level(level, rows) for level in levels[2:]]
    return Scheme([*pairwise.levels, *rest][: len(levels)]), numbers


@functools.lru_cache(256)
def _products(index: Index, variables: int) -> dict[Index, Products]:
    """Products of two and more derivatives in the derivative of ``f(*variables)`` by ``index``."""
    result: dict[Index, Products] = {}
    for parts in _partitions(index):
        for way in itertools.product(range(variables), repeat=len(parts)):
            if len(way) > 1:
                products = result.setdefault(tuple(sorted(way)), Counter())
                products[tuple(sorted(zip(way, parts)))] += 1
    return result


def _partitions(index: Index) -> list[list[Index]]:
    """Ways to part an index, ``[(0, 1)]`` and ``[(0,), (1,)]`` for two entries."""
    if not index:
        return [[]]
    result = []
    for parts in _partitions(index[:-1]):
        places = enumerate(parts)
        result += [[*parts[:k], (*part, index[-1]), *parts[k + 1 :]] for k, part in places]
        result.append([*parts, index[-1:]])
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


def _joined(stacks: Sequence[Tensor | None]) -> Tensor | None:
    like = next((stack for stack in stacks if stack is not None), None)
    if like is None or len(stacks) == 1:
        return like
    return torch.cat([torch.zeros_like(like) if stack is None else stack for stack in stacks])


def on_one_row(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """``function`` of stacks ``(K, B, ...)``; of one row if all repeat one, as at the input."""
    if any(s.ndim < 2 or s.shape[1] < 2 or s.stride(1) != 0 for s in stacks):
        return function(*stacks)
    result = function(*[stack[:, :1] for stack in stacks])
    return result.expand(-1, stacks[0].shape[1], *result.shape[2:])


def spread(jet: Jet, shape: Sequence[int]) -> Jet:
    """A jet expanded to the shape of a result, as its value is."""
    return tuple([None if stack is None else _expanded(stack, shape) for stack in jet])


def _expanded(stack: Tensor, shape: Sequence[int]) -> Tensor:
    count, *sizes = stack.shape
    return stack.reshape(count, *[1] * (len(shape) - len(sizes)), *sizes).expand(count, *shape)


class Site(NamedTuple):
    """One operation, and the jets that reach it, by slot.

    Attributes:
        lowest: order of the lowest derivatives that are wanted of the results.
    """

    node: Node
    recording: Recording
    jets: dict[int, Jet]
    scheme: Scheme
    lowest: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the first result."""
        return self.recording.values[self.node.outs[0] or 0].shape

    def is_zero(self, order: int) -> bool:
        """Whether all derivatives of one order are zero."""
        return all(jet[order - 1] is None for jet in self.jets.values())

    def filled(self, order: int) -> dict[int, Tensor]:
        """Derivatives of one order, zeros written out."""
        stacks = {slot: jet[order - 1] for slot, jet in self.jets.items()}
        count = next(len(stack) for stack in stacks.values() if stack is not None)
        values = self.recording.values
        return {
            slot: values[slot].new_zeros((count, *values[slot].shape)) if stack is None else stack
            for slot, stack in stacks.items()
        }

    def variables(self) -> dict[int, Tensor]:
        """Values, cut off from the operations that made them unless a graph is wanted."""
        values = {slot: self.recording.value(slot) for slot in self.jets}
        if not self.recording.create_graph:
            return {slot: value.detach().requires_grad_() for slot, value in values.items()}
        with torch.enable_grad():
            return {slot: value.view_as(value) for slot, value in values.items()}
