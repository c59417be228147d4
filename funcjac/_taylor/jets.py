"""Jets: derivatives of a tensor along directions, and the operation that they pass through.

A *jet* has one tensor for each order, ``(directions, *shape)``, ``(second derivatives, *shape)``
and so on, with ``None`` for zero. Orders are never joined: each takes one matrix product.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._taylor.recorder import Node, Recorder

Jet = tuple["Tensor | None", ...]
Index = tuple[int, ...]
Rows = slice | Tensor
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scheme:
    """Derivatives that a jet holds.

    Attributes:
        order: the highest.
        left, right: second derivative ``r`` is along directions ``left[r]`` and ``right[r]``;
            ``right`` is ``None`` where both are the same.
        weights: of second derivatives, which are then added up to one.
        indices: multi-indices of each order; only mixed derivatives above order two need them.
        rows: of a multi-index in the tensor of its order.
    """

    order: int
    left: Rows
    right: Rows | None = None
    weights: Tensor | None = None
    indices: tuple[tuple[Index, ...], ...] = ()
    rows: dict[Index, int] = field(default_factory=dict)

    def pairs(self, stack: Tensor) -> tuple[Tensor, Tensor]:
        """First derivatives along the two directions of each second derivative."""
        left = _take(stack, self.left)
        return left, left if self.right is None else _take(stack, self.right)

    def second(self, a: Tensor, b: Tensor, product: Product, *, cross: bool) -> Tensor:
        """``product(d_i a, d_j b)`` for each second derivative ``ij``.

        With ``cross`` it is added up with ``product(d_j a, d_i b)``.
        """
        (a_left, a_right), (b_left, b_right) = self.pairs(a), self.pairs(b)
        stack = product(a_left, b_right)
        if cross and self.right is not None:
            stack = stack + product(a_right, b_left)
        stack = self.weighted(stack)
        return 2 * stack if cross and self.right is None else stack

    def weighted(self, stack: Tensor) -> Tensor:
        """Second derivatives themselves, or their weighted sum ``(1, *shape)``."""
        if self.weights is None:
            return stack
        return torch.tensordot(self.weights.to(stack.dtype), stack, 1).unsqueeze(0)

    def part(self, jet: Jet, index: Index) -> Tensor | None:
        """One derivative of a jet, ``(*shape)``."""
        stack = jet[len(index) - 1]
        return None if stack is None else stack[self.rows[tuple(sorted(index))]]


def mixed(indices: Sequence[Index], device: torch.device) -> Scheme:
    """Mixed derivatives of any order, with all lower ones that they need.

    The entries of an index are directions, counted from 0.
    """
    closed = {tuple(sorted(part)) for index in indices for part in _parts(index)}
    closed |= {(k,) for k in range(max(map(max, closed), default=-1) + 1)}
    order = max(map(len, closed), default=0)
    levels = tuple(tuple(sorted(i for i in closed if len(i) == n + 1)) for n in range(order))
    pairs = levels[1] if order > 1 else ()
    left, right = ([pair[k] for pair in pairs] for k in (0, 1))
    return Scheme(
        order,
        _rows(left, device),
        None if left == right else _rows(right, device),
        indices=levels,
        rows={index: row for level in levels for row, index in enumerate(level)},
    )


def _parts(index: Index) -> Iterator[Index]:
    for size in range(1, len(index) + 1):
        yield from itertools.combinations(index, size)


def _rows(numbers: Sequence[int], device: torch.device) -> Rows:
    """Rows as a slice, which copies nothing, where they follow one another."""
    start = numbers[0] if numbers else 0
    if list(numbers) == list(range(start, start + len(numbers))):
        return slice(start, start + len(numbers))
    return torch.tensor(numbers, device=device)


def _take(stack: Tensor, rows: Rows) -> Tensor:
    return stack[rows] if isinstance(rows, slice) else stack.index_select(0, rows)


@functools.cache
def splits(index: Index) -> list[tuple[Index, Index, int]]:
    """Ways to split an index in two, and how often each occurs (Leibniz' rule)."""
    ways: Counter[tuple[Index, Index]] = Counter()
    for chosen in itertools.product((True, False), repeat=len(index)):
        outer = tuple(entry for entry, yes in zip(index, chosen) if yes)
        ways[outer, tuple(entry for entry, yes in zip(index, chosen) if not yes)] += 1
    return [(*parts, times) for parts, times in ways.items()]


def on_one_row(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """``function`` of stacks ``(K, B, ...)``; of one row if all repeat one, as at the input."""
    if any(s.ndim < 2 or s.shape[1] < 2 or s.stride(1) != 0 for s in stacks):
        return function(*stacks)
    result = function(*[stack[:, :1] for stack in stacks])
    return result.expand(-1, stacks[0].shape[1], *result.shape[2:])


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def aligned(stack: Tensor, ndim: int) -> Tensor:
    """A stack that broadcasts as its value does against a tensor of ``ndim`` dimensions."""
    missing = ndim - (stack.ndim - 1)
    return stack.reshape(len(stack), *[1] * missing, *stack.shape[1:]) if missing > 0 else stack


def spread(stack: Tensor, shape: Sequence[int]) -> Tensor:
    return aligned(stack, len(shape)).expand(len(stack), *shape)


class Site(NamedTuple):
    """One operation, and the jets that reach it.

    Attributes:
        jets: of the node's slots, all of which have one.
        lowest: order of the lowest derivatives that are wanted of the results.
        derivatives: of elementwise operations, which serve all directions.
    """

    node: Node
    recorder: Recorder
    jets: list[Jet]
    scheme: Scheme
    lowest: int
    create_graph: bool
    derivatives: dict[Any, Any]

    @property
    def orders(self) -> range:
        return range(self.lowest, self.scheme.order + 1)

    @property
    def shape(self) -> torch.Size:
        """Shape of the first result."""
        return self.recorder.values[self.node.outs[0] or 0].shape

    def value(self, i: int) -> Tensor:
        """Value of the ``i``-th argument that depends on the input."""
        return self.recorder.value(self.node.slots[i])

    def level(self, order: int) -> list[Tensor | None]:
        """Derivatives of one order of all arguments."""
        return [jet[order - 1] for jet in self.jets]

    def jet(self, derivative: Callable[[int], Tensor | None]) -> list[Jet | None]:
        """Jet of the one result from its derivatives by order, in its dtype."""
        dtype = self.recorder.values[self.node.outs[0] or 0].dtype
        stacks = [derivative(order) for order in self.orders]
        if all(stack is None for stack in stacks):
            return [None]
        cast = [None if stack is None else stack.to(dtype) for stack in stacks]
        return [(*[None] * (self.lowest - 1), *cast)]

    def filled(self, order: int) -> list[Tensor]:
        """Derivatives of one order of all arguments, zeros written out."""
        level = self.level(order)
        like = next(stack for stack in level if stack is not None)
        values = [self.recorder.values[slot] for slot in self.node.slots]
        return [
            like.new_zeros((len(like), *v.shape), dtype=v.dtype) if stack is None else stack
            for stack, v in zip(level, values)
        ]
