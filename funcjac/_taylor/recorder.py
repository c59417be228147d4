"""Recorder of the operations that one run of ``func`` does.

It watches the run from below autograd. Python runs in full at every call and sees true values,
so a recording is never older than its call: a changed closure, global, attribute or flag, a
replaced parameter or another branch is simply recorded.

NOTE [autograd decides what depends on the input]
A tensor that does not require grad when it is used is a constant (``detach``, ``no_grad``,
comparisons). One that does, although no recorded operation made it, stops the recording (a
custom ``torch.autograd.Function``, TorchScript, an extension).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._environment.torch_private import EagerMode, with_memory
from funcjac._taylor.operations import is_mutable, out_of_place
from funcjac.errors import UntraceableError

_CONSTANT, _HIDDEN = -1, -2
_DETACH = torch.ops.aten.detach.default
# Position of an argument, and its position in the list that stands there.
Place = tuple[int, "int | None"]


class Active(NamedTuple):
    """Arguments that depend on the input, by place and slot, and constant tensors."""

    places: tuple[Place, ...]
    slots: tuple[int, ...]
    constants: list[Tensor]


class Node(NamedTuple):
    """One operation that depends on the input.

    Attributes:
        places: of the arguments that depend on the input; ``slots`` name their values.
        outs: slots of the results, ``None`` for a result without derivative.
        versions: constants among the arguments, which must not change after the operation.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[Place, ...]
    slots: tuple[int, ...]
    outs: tuple[int | None, ...]
    versions: tuple[tuple[Tensor, int], ...] = ()

    @property
    def name(self) -> str:
        return self.op.overloadpacket.__name__

    def __call__(self, tensors: Sequence[Any]) -> Any:
        """Run the operation with ``tensors`` as the arguments that depend on the input."""
        return self.op(*self.with_args(tensors), **self.kwargs)

    def with_args(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        args = list(self.args)
        for (i, j), tensor in zip(self.places, tensors):
            args[i] = tensor if j is None else [*args[i][:j], tensor, *args[i][j + 1 :]]
        return tuple(args)


class Value(NamedTuple):
    """Tensor in a slot, ``None`` once it is overwritten."""

    tensor: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    version: int

    @property
    def is_intact(self) -> bool:
        return self.tensor is not None and self.tensor._version == self.version


class Recorder(EagerMode):
    """Records the operations of one run of ``func``, as far as they depend on ``inputs``.

    ``func`` is run under ``torch.enable_grad()`` and this mode, once.

    Args:
        inputs: leaves that require grad, or aliases that have a ``grad_fn``; strided, and
            materialized (``resolve_neg``).

    Attributes:
        copies: slots of values that were overwritten, and are in no graph.
        failure: why the run cannot be followed, from the first operation that could not be
            recorded on.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.failure: UntraceableError | None = None
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.copies: set[int] = set()
        self._slots: dict[int, int] = {}
        self._fresh: list[int] = []
        self._alive: list[Any] = []  # an id must not be given out twice
        self._inputs = list(inputs)
        if any(x.is_neg() for x in inputs):  # made up for above this mode: a constant below
            self.failure = UntraceableError("an input is a lazy negation")
        else:
            for x in inputs:
                self._new(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = with_memory(args), kwargs or {}
        if self.failure is not None:
            return func(*args, **kwargs)
        # What cannot be recorded must not stop func, which runs just this once.
        try:
            note = self._before(func, args, kwargs)
        except Exception as error:
            self._fail(error)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        try:
            note(out)
        except Exception as error:
            self._fail(error)
        return out

    def _fail(self, error: Exception) -> None:
        text = str(error) if isinstance(error, UntraceableError) else repr(error)
        self.failure = UntraceableError(text)
        self._alive.clear()

    def _before(self, func: Any, args: Any, kwargs: Any) -> Callable[[Any], None]:
        """What to note of an operation once it has run."""
        self.settle()
        if func is _DETACH:  # autograd's copies of results, which get their history back later
            mark = self._slots.get(id(args[0]), _CONSTANT)
            return lambda out: self._mark(out, mark)
        active = _active(self, args)
        if kwargs and any(self.slot(value) is not None for value in kwargs.values()):
            raise UntraceableError(f"{func} depends on the input by keyword")
        recording = torch.is_grad_enabled()
        if is_mutable(func):
            if not isinstance(args[0], Tensor):
                raise UntraceableError(f"{func} works in place on several tensors")
            if not recording and _share_memory(args[0], self._alive):
                raise UntraceableError(f"{func} overwrites what depends on the input, without grad")
            if active.slots and recording:
                return _in_place(self, func, args, kwargs, active)
        if active.slots and recording:
            return lambda out: self._record(func, args, kwargs, active, out)
        mark = _CONSTANT if recording else _HIDDEN
        return lambda out: self._mark_all(out, mark)

    def settle(self) -> None:
        """Take down versions of what the last operation made: they count up only after it."""
        for slot in self._fresh:
            value = self.values[slot]
            if value.tensor is not None:
                self.values[slot] = value._replace(version=value.tensor._version)
        self._fresh.clear()

    def _mark_all(self, out: Any, mark: int) -> None:
        for tensor in _tensors(out):
            self._mark(tensor, mark)

    def slot(self, value: Any) -> int | None:
        """Slot of a tensor, ``None`` if it does not depend on the input.

        See NOTE [autograd decides what depends on the input].
        """
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        mark = self._slots.get(id(value))
        if value.grad_fn is None and (mark is None or mark >= len(self._inputs)):
            return None  # a parameter, or a leaf that func made
        if mark is None:
            mark = _HIDDEN if _depends(value, self._inputs) else _CONSTANT
            self._mark(value, mark)
        if mark == _HIDDEN:
            raise UntraceableError(
                "func computes with something whose parts have no history (a custom "
                "autograd.Function, TorchScript, an extension, a kernel that hides its gradients)"
            )
        return None if mark == _CONSTANT else mark

    def value(self, slot: int) -> Tensor:
        """Tensor that a slot held; raises :class:`UntraceableError` if it is overwritten."""
        value = self.values[slot]
        if value.tensor is None or not value.is_intact:
            raise UntraceableError("a tensor that depends on the input was overwritten later on")
        same = value.tensor.shape == value.shape
        return value.tensor if same else value.tensor.view(value.shape)

    def _mark(self, tensor: Tensor, mark: int) -> None:
        self._slots[id(tensor)] = mark
        self._alive.append(tensor)

    def _new(self, tensor: Tensor) -> int:
        self.values.append(Value(tensor, tensor.shape, tensor.dtype, tensor._version))
        self._fresh.append(len(self.values) - 1)
        self._mark(tensor, len(self.values) - 1)
        return len(self.values) - 1

    def _record(self, op: Any, args: Any, kwargs: Any, active: Active, out: Any) -> None:
        outs: list[int | None] = []
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.is_complex():
                raise UntraceableError(f"{op} returns complex numbers")
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                outs.append(self._new(tensor))
            else:
                outs.append(None)
                for constant in _tensors(tensor):
                    self._mark(constant, _CONSTANT)
        versions = tuple([(t, t._version) for t in active.constants if not t.is_inference()])
        node = Node(op, args, kwargs, active.places, active.slots, tuple(outs), versions)
        self.nodes.append(node)


def _active(recorder: Recorder, args: Sequence[Any]) -> Active:
    places: list[Place] = []
    slots: list[int] = []
    constants: list[Tensor] = []
    for i, arg in enumerate(args):
        inside = type(arg) in (list, tuple)
        for j, item in enumerate(arg) if inside else ((None, arg),):
            if not isinstance(item, Tensor):
                continue
            slot = recorder.slot(item)
            if slot is None:
                constants.append(item)
            else:
                places.append((i, j))
                slots.append(slot)
    return Active(tuple(places), tuple(slots), constants)


def _in_place(
    recorder: Recorder, op: Any, args: Any, kwargs: Any, active: Active
) -> Callable[[Any], None]:
    """Record an operation on a tensor that nothing shares as its version out of place."""
    target = args[0]
    functional = out_of_place(op)
    reshapes = op.overloadpacket.__name__ in ("squeeze_", "unsqueeze_")
    unshared = reshapes or (target._base is None and not _share_memory(target, recorder._alive))
    if functional is None or not unshared:
        raise UntraceableError(f"{op} works in place on what other tensors may share")
    old = target if reshapes else target.detach().clone()

    def note(_: Any) -> None:
        if (0, None) in active.places:
            slot = active.slots[active.places.index((0, None))]
            value = recorder.values[slot]
            recorder.values[slot] = value._replace(tensor=old, version=old._version)
            if not reshapes:
                recorder.copies.add(slot)
        if reshapes:  # which moves no number
            slots = enumerate(recorder.values)
            recorder._fresh += [slot for slot, value in slots if value.tensor is target]
        constants = [old if tensor is target else tensor for tensor in active.constants]
        changed = active._replace(constants=constants)
        recorder._record(functional, (old, *args[1:]), kwargs, changed, target)

    return note


def _share_memory(target: Tensor, tensors: Sequence[Any]) -> bool:
    """Whether another one of ``tensors`` lies in the memory of ``target``."""
    storage = target.untyped_storage().data_ptr()
    rest = (t for t in tensors if t is not target and t.layout == torch.strided)
    return any(t.untyped_storage().data_ptr() == storage for t in rest)


def _depends(value: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether plain autograd leads from ``value`` to one of ``inputs``."""
    leaves = {id(x) for x in inputs}
    roots = {x.grad_fn for x in inputs} - {None}
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in roots or id(getattr(node, "variable", None)) in leaves:
            return True
        stack += [parent for parent, _ in node.next_functions]
    return False


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
