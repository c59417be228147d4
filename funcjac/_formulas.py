"""Derivatives of operations on each element, as PyTorch computes them: noted once, then repeated.

Differentiated again and again, PyTorch's reverse-mode formulas multiply by ones and compute the
same things anew, and autograd itself takes longer than the arithmetic. What they run depends
neither on values nor on shapes, so a list without what is idle serves all tensors of a dtype.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcjac._state import same_values
from funcjac._structure import is_mutable, out_of_place
from funcjac._tape import Node

Derivative = Callable[[int], "Tensor | None"]  # by its order
_ONES = 2
_MOST = 512
_KNOWN: dict[Any, Any] = {}


class _Slot(NamedTuple):
    """A tensor: 0 is the argument, 1 the result, 2 ones for each of its elements."""

    number: int


class Step(NamedTuple):
    """One operation; ``done`` are slots that nobody uses after it."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: int
    done: tuple[int, ...] = ()


class Formula(NamedTuple):
    """For each order, the steps that lead on to it, and its slot: ``None`` where it is zero."""

    orders: list[tuple[list[Step], int | None]]

    def run(self, values: dict[int, Tensor], order: int) -> Tensor | None:
        """The derivative of one order, after those of all lower ones."""
        steps, slot = self.orders[order - 1]
        for op, args, kwargs, out, done in steps:
            given = [values[arg.number] if type(arg) is _Slot else arg for arg in args]
            values[out] = op(*given, **kwargs)
            for number in done:
                del values[number]
        return None if slot is None else values[slot]


def formula(
    node: Node, tensors: Sequence[Tensor], derivative: Derivative, most: int
) -> Formula | None:
    """How an operation on one tensor is differentiated, up to order ``most``.

    Args:
        node: the operation.
        tensors: what it was given, what it returned, and ones for each element of that.
        derivative: computes one, after those of lower orders.
        most: the highest order.

    Returns:
        ``None`` where other operations could run another time.
    """
    if not tensors[1].numel():
        return None  # nothing lies anywhere
    constants = [*node.args[1:], *node.kwargs.values()]
    if node.places != ((0, None),) or any(isinstance(c, (Tensor, list, tuple)) for c in constants):
        return None
    kinds = [(tensor.dtype, tensor.device) for tensor in tensors]
    key = (node.op, repr(constants), tuple(node.kwargs), *kinds, most)
    if key not in _KNOWN:
        if len(_KNOWN) >= _MOST:
            _KNOWN.clear()
        _KNOWN[key] = _noted(node, tensors, derivative, most)
    return _KNOWN.get(key)


def _noted(
    node: Node, tensors: Sequence[Tensor], derivative: Derivative, most: int
) -> Formula | None:
    found, ends = [], []
    try:
        with _Notes(node, tensors) as notes:
            for order in range(1, most + 1):
                found.append(derivative(order))
                ends.append(len(notes.steps))
    except RuntimeError:  # of an order that may not be asked for
        return None
    slots = [None if one is None else notes.slot(one) for one in found]
    if notes.unclear or -1 in slots:
        return None
    noted = _of_use(notes.steps, ends, slots)
    with torch.no_grad():
        values = dict(enumerate(tensors))
        again = [noted.run(values, order + 1) for order in range(most)]
    pairs = [(a, f) for a, f in zip(again, found) if a is not None and f is not None]
    return noted if all(same_values(a, f) for a, f in pairs) else None


def _of_use(steps: Sequence[Step], ends: Sequence[int], slots: Sequence[int | None]) -> Formula:
    """Without steps that lead nowhere, and with what is done after each."""
    kept = {0, 1, _ONES, *slots}
    seen = set(kept)
    orders: list[tuple[list[Step], int | None]] = [([], slot) for slot in slots]
    for i in reversed(range(len(steps))):
        step = steps[i]
        if step.out not in seen:
            continue
        used = {arg.number for arg in step.args if type(arg) is _Slot}
        done = tuple(used - seen)
        seen |= used
        orders[bisect.bisect_right(ends, i)][0].insert(0, step._replace(done=done))
    return Formula(orders)


class _Notes(TorchDispatchMode):
    """What runs, its tensors told by where they lie: autograd hands them on as new objects."""

    def __init__(self, node: Node, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.unclear = False
        self.steps: list[Step] = []
        self._kept: list[Any] = list(tensors)  # their memory must not be given out again
        self._slots = {_place(tensor): number for number, tensor in enumerate(tensors)}
        self._known = {_words(node.op, (_Slot(0), *node.args[1:]), node.kwargs): 1}
        self._count = len(tensors)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def slot(self, tensor: Tensor) -> int:
        return self._slots.get(_place(tensor), -1)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        given = tuple([_Slot(self.slot(a)) if isinstance(a, Tensor) else a for a in args])
        out = func(*args, **kwargs)
        self._kept.append(out)
        self.unclear = self.unclear or not self._is_clear(func, args, kwargs, given, out)
        if not self.unclear:
            self._note(func, args, kwargs, given, out)
        return out

    def _is_clear(self, op: Any, args: Any, kwargs: Any, given: Any, out: Any) -> bool:
        """Whether it would be the same operation for other values and shapes."""
        plain = type(out) is Tensor and out.data_ptr() != 0
        random = torch.Tag.nondeterministic_seeded in op.tags
        varied = any(isinstance(a, (list, tuple)) for a in (*args, *kwargs.values()))
        hidden = any(isinstance(a, Tensor) for a in kwargs.values()) or _Slot(-1) in given
        fixed = is_mutable(op) and (out is not args[0] or out_of_place(op) is None)
        return plain and not (random or varied or hidden or fixed)

    def _note(self, op: Any, args: Any, kwargs: Any, given: Any, out: Tensor) -> None:
        if op in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return  # in the same place
        op = out_of_place(op) if is_mutable(op) else op
        words = _words(op, given, kwargs)
        number = self._known.get(words, _idle(op, args, given, out))
        if number is None:
            number = self._known[words] = self._count
            self._count += 1
            self.steps.append(Step(op, given, kwargs, number))
        self._slots[_place(out)] = number


def _place(tensor: Tensor) -> Any:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg()


def _words(op: Any, given: Any, kwargs: Any) -> Any:
    return op, repr(given), repr(kwargs)


def _idle(op: Any, args: Any, given: Any, out: Tensor) -> int | None:
    """What an operation leaves as it is: times one."""
    if op not in (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar):
        return None
    for tensor, this, other in ((args[0], given[0], given[1]), (args[1], given[1], given[0])):
        by_one = other == _Slot(_ONES) or (type(other) in (int, float) and other == 1)
        if (
            by_one
            and type(this) is _Slot
            and (tensor.shape, tensor.dtype) == (out.shape, out.dtype)
        ):
            return this.number
    return None
