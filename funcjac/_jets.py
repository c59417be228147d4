"""Which derivatives are propagated, and where one operation stands among them.

A *jet* holds the derivatives of a tensor along a few directions, stacked in front: ``(P,
*shape)``. First derivatives come first, then second ones, then those of higher order. A jet
may end after any order; what is missing is zero. A :class:`Scheme` says which they are.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from funcjac._tape import Node, Tape

Jet = Optional[Tensor]  # noqa: UP045  evaluated in Python 3.10
Index = tuple[int, ...]
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scheme:
    """The derivatives of a jet.

    Attributes:
        firsts: number of directions.
        seconds: number of second derivatives.
        left, right: second derivative ``r`` is along directions ``left[r]`` and ``right[r]``.
        weights: where given, second derivatives are added up with these, to one.
        higher: multi-indices of order three and more, by order.
        places: of all multi-indices, where derivatives are named by such.
    """

    firsts: int
    seconds: int
    left: slice | Tensor
    right: slice | Tensor
    weights: Tensor | None = None
    higher: tuple[Index, ...] = ()
    places: dict[Index, int] = field(default_factory=dict)

    def along(self, a: Tensor, b: Tensor, product: Product) -> Tensor:
        """``product(d_i a, d_j b)`` for each second derivative ``ij``."""
        return self.total(on_one_row(product, a[self.left], b[self.right]))

    def total(self, found: Tensor) -> Tensor:
        """Second derivatives as they are kept: each, or their weighted sum."""
        if self.weights is None:
            return found
        return torch.tensordot(self.weights.to(found.dtype), found, 1).unsqueeze(0)

    def crossed(self, a: Tensor, b: Tensor, product: Product) -> Tensor:
        """``product(d_i a, d_j b) + product(d_j a, d_i b)`` for each second derivative."""
        once = self.along(a, b, product)
        if self.left is self.right:
            return 2 * once
        other = Scheme(self.firsts, self.seconds, self.right, self.left, self.weights)
        return once + other.along(a, b, product)


def straight(count: int, weights: Tensor | None = None) -> Scheme:
    """The second derivative along each of ``count`` directions, or their weighted sum."""
    every = slice(0, count)
    return Scheme(count, count if weights is None else 1, every, every, weights)


def paired(count: int, weights: Tensor | None) -> Scheme:
    """The weighted sum of second derivatives along directions ``r`` and ``count + r``."""
    seconds = count if weights is None else 1
    return Scheme(2 * count, seconds, slice(0, count), slice(count, 2 * count), weights)


def mixed(indices: Sequence[Index], device: torch.device) -> Scheme:
    """Mixed derivatives of any order, and all of lower order that they need.

    The entries of an index are directions, counted from 0 without a gap.
    """
    closed = {tuple(sorted(part)) for index in indices for part in _parts(index)}
    ordered = sorted(closed, key=lambda index: (len(index), index))
    pairs = [index for index in ordered if len(index) == 2]
    left, right = (torch.tensor([p[k] for p in pairs], device=device) for k in (0, 1))
    return Scheme(
        firsts=sum(len(index) == 1 for index in ordered),
        seconds=len(pairs),
        left=left.long(),
        right=right.long(),
        higher=tuple(index for index in ordered if len(index) > 2),
        places={index: place for place, index in enumerate(ordered)},
    )


def _parts(index: Index) -> Iterator[Index]:
    for size in range(1, len(index) + 1):
        yield from itertools.combinations(index, size)


@functools.cache
def splits(index: Index) -> list[tuple[Index, Index, int]]:
    """Ways to split an index in two, and how often each occurs: Leibniz' rule."""
    ways: Counter[tuple[Index, Index]] = Counter()
    for chosen in itertools.product((True, False), repeat=len(index)):
        outer = tuple(entry for entry, yes in zip(index, chosen) if yes)
        ways[outer, tuple(entry for entry, yes in zip(index, chosen) if not yes)] += 1
    return [(*parts, times) for parts, times in ways.items()]


def part(scheme: Scheme, jet: Tensor, index: Index) -> Tensor | None:
    """One derivative of a jet, as a stack of one; ``None`` where it is zero or the value."""
    place = scheme.places.get(tuple(sorted(index)), len(jet))
    return jet[place : place + 1] if place < len(jet) else None


def add(a: Jet, b: Jet) -> Jet:
    """The sum of two jets of one shape, of which either may end before the other."""
    if a is None or b is None:
        return a if b is None else b
    if len(a) == len(b):
        return a + b
    longer, shorter = (a, b) if len(a) > len(b) else (b, a)
    return torch.cat([longer[: len(shorter)] + shorter, longer[len(shorter) :]])


def filled(jet: Tensor, length: int) -> Tensor:
    """A jet with zeros up to ``length`` derivatives."""
    if len(jet) >= length:
        return jet
    return torch.cat([jet, jet.new_zeros(length - len(jet), *jet.shape[1:])])


def extend(jet: Tensor, found: Tensor, start: int) -> Tensor:
    """A jet with ``found`` added to its derivatives from ``start`` on."""
    stop = start + len(found)
    if len(jet) <= start:
        return torch.cat([jet, found.expand(len(found), *jet.shape[1:])])
    if len(jet) < stop:
        jet = filled(jet, stop)
    if start == 0 and len(jet) == stop:
        return jet + found
    return torch.cat([jet[:start], jet[start:stop] + found, jet[stop:]])


class Term(NamedTuple):
    """``times * factor * found``, added to derivatives from ``begin`` on."""

    begin: int
    factor: Tensor
    found: Tensor
    times: int = 1

    @property
    def end(self) -> int:
        return self.begin + len(self.found)


def combined(terms: list[Term], shape: torch.Size, *, overwrite: bool) -> Jet:
    """The sum of terms, which come in the order of where they begin.

    Fresh memory costs more than the arithmetic: with ``overwrite``, the jet of the first term,
    which nobody needs any more, gives its own.
    """
    if not terms:
        return None
    if torch.is_grad_enabled():
        return _summed(terms)
    first, length = terms[0].found, max(term.end for term in terms)
    dtypes = {tensor.dtype for term in terms for tensor in (term.factor, term.found)}
    dtype = functools.reduce(torch.promote_types, dtypes)
    fits = overwrite and first.shape == (length, *shape) and first.dtype == dtype
    whole = first if fits else first.new_empty((length, *shape), dtype=dtype)
    end = 0  # of what has been written; the rest is not added to but written
    for begin, factor, found, times in terms:
        stop = begin + len(found)
        if end > begin:
            middle = min(end, stop)
            whole[begin:middle].addcmul_(factor, found[: middle - begin], value=times)
            begin, found = middle, found[middle - begin :]
        elif end < begin:
            whole[end:begin].zero_()
        if stop > begin:
            torch.mul(factor, found if times == 1 else times * found, out=whole[begin:stop])
            end = stop
    return whole


def _summed(terms: list[Term]) -> Tensor:
    """The same out of place."""
    total: Any = None
    for begin, factor, found, times in terms:
        term = factor * found if times == 1 else times * (factor * found)
        if total is None and begin == 0:
            total = term
        else:
            total = term[:0] if total is None else total
            total = extend(filled(total, begin), term, begin)
    return total


def aligned(jet: Tensor, ndim: int) -> Tensor:
    """A jet that broadcasts as its value does against one of ``ndim`` dimensions."""
    missing = ndim - (jet.ndim - 1)
    return jet.reshape(len(jet), *[1] * missing, *jet.shape[1:]) if missing > 0 else jet


def on_one_row(product: Product, a: Tensor, b: Tensor) -> Tensor:
    """``product(a, b)``; of one row, where both are the same in all rows."""
    alike = product is torch.mul and a.shape == b.shape and a.ndim > 1
    if alike and a.shape[1] > 1 and a.stride(1) == b.stride(1) == 0:
        return product(a[:, :1], b[:, :1]).expand(a.shape)
    return product(a, b)


def spread(jet: Tensor, shape: Sequence[int]) -> Tensor:
    return aligned(jet, len(shape)).expand(len(jet), *shape)


class Site(NamedTuple):
    """One operation with what reaches it.

    Attributes:
        jets: of the node's slots; ``None`` where nothing depends on the directions.
        graph: whether the result will be differentiated.
        spare: whether nobody else needs the memory of the one jet.
        known: derivatives of operations, which serve all directions.
        start: of the derivatives that are wanted: lower ones serve nobody.
        inline: propagates through a function of the same arguments instead of the operation.
    """

    node: Node
    tape: Tape
    jets: list[Jet]
    scheme: Scheme
    graph: bool
    spare: bool
    known: dict[Any, Any]
    inline: Callable[[Site, Callable[..., Any]], list[Jet]]
    start: int = 0

    @property
    def name(self) -> str:
        return self.node.op.overloadpacket.__name__

    @property
    def shape(self) -> torch.Size:
        """Of the first result."""
        return self.tape.shapes[self.node.outs[0] or 0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def value(self, i: int) -> Tensor:
        """Of the argument that is ``i``-th among those that depend on the input."""
        return self.tape.value(self.node.slots[i])

    def cast(self, jet: Jet) -> Jet:
        """In the dtype of the first result."""
        return None if jet is None else jet.to(self.tape.dtypes[self.node.outs[0] or 0])
