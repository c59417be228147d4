"""Jets: derivatives of a tensor along directions, and the products that make higher ones.

A *jet* has one tensor for each order, ``(directions, *shape)``, ``(second derivatives, *shape)``
and so on, with ``None`` for zero. Orders are never joined: each takes one matrix product.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcjac._engines.rows import added
from funcjac._environment.torch_private import is_traced

Jet = tuple["Tensor | None", ...]
Index = tuple[int, ...]
Rows = slice | Tensor
# How often each product occurs; a factor is a variable, by its number, derived by part of an index.
Products = Counter[tuple[tuple[int, Index], ...]]
# Derivatives of one order: multi-indices, of all together or of each by itself, and by part of an
# index, rows among the derivatives of the part's order.
Level = tuple[Sequence[Index], dict[Index, Rows]]


class Scheme(NamedTuple):
    """Derivatives that a jet holds: by order; ``weights`` add second ones up to one."""

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

        def total(products: Products) -> Tensor | None:
            result: Tensor | None = None
            for factors, times in products.items():
                stacks = [(jets[i][len(part) - 1], rows[part]) for i, part in factors]
                taken = [take(stack, rows) for stack, rows in stacks if stack is not None]
                if len(taken) == len(factors):
                    product = self.weighted(functools.reduce(multiply, taken))
                    result = added(result, product if times == 1 else times * product)
            return result

        for numbers in sums[0]:
            stacks = [] if vanishes(numbers) else [total(products[numbers]) for products in sums]
            like = next((stack for stack in stacks if stack is not None), None)
            if like is not None:
                stacks = [torch.zeros_like(like) if stack is None else stack for stack in stacks]
                yield numbers, torch.cat(stacks) if len(stacks) > 1 else like

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
    return Scheme([([(0,)], {}), ([index], {(0,): left, (1,): right})], weights)


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


def spread(jet: Jet, shape: torch.Size) -> Jet:
    """A jet expanded to the shape of a result, as its value is."""
    ones = [1] * len(shape)
    return tuple(
        s
        if s is None or s.shape[1:] == shape
        else s.reshape(len(s), *ones[s.ndim - 1 :], *s.shape[1:]).expand(-1, *shape)
        for s in jet
    )
