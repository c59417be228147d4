"""Recorder of the operations that one run of ``func`` does.

It watches the run from below autograd. Python runs in full at every call and sees true values,
so a recording is never older than its call: a changed closure, global, attribute or flag, a
replaced parameter or another branch is simply recorded.

NOTE [autograd decides what depends on the input]
A tensor that does not require grad when it is used is a constant (``detach``, ``no_grad``,
comparisons). One that does, although no recorded operation made it, stops the recording if
autograd leads from it to an input (a custom ``torch.autograd.Function``, TorchScript, an
extension).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from funcjac._engines.run_func import graph_nodes
from funcjac._environment.torch_private import EagerMode, with_memory
from funcjac.errors import UntraceableError

Note = Callable[[list[Any]], Any]  # of the results
_DETACH, _CLONE = torch.ops.aten.detach.default, torch.ops.aten.clone.default


class Slot(int):
    """Number of a value that depends on the input, in the place of an argument."""


class Node(NamedTuple):
    """One operation that depends on the input.

    Attributes:
        args: with a :class:`Slot` for each that depends on the input; ``slots`` are all of them.
        outs: slots of the results, ``None`` for a result without derivative.
    """

    op: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    slots: tuple[int, ...]
    outs: tuple[int | None, ...] = ()

    @property
    def name(self) -> str:
        return self.op.overloadpacket.__name__

    def run(self, values: dict[int, Any]) -> list[Any]:
        """Results, with ``values`` in the slots."""
        return as_list(self.op(*filled(self.args, values), **self.kwargs))


def as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def filled(arg: Any, values: dict[int, Any]) -> Any:
    """Arguments, with ``values`` in the place of their slots."""
    if type(arg) is list:
        return [filled(item, values) for item in arg]
    return values.get(arg, arg) if type(arg) is Slot else arg


class Recorder(EagerMode):
    """Records the operations of one run of ``func``, as far as they depend on ``inputs``.

    Args:
        inputs: leaves that require grad, or aliases that have a ``grad_fn``; strided, and
            materialized (``resolve_neg``).

    Attributes:
        failure: why the run cannot be followed, from the first operation that could not be
            recorded on.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.failure: UntraceableError | None = None
        self.nodes: list[Node] = []
        self.values: list[Tensor] = []
        # Tensors in slots, and constants without one; alive, as no id may be given out twice.
        self._tensors: dict[int, tuple[Tensor, Slot | None]] = {}
        # Constants whose history leads to no input.
        self._constants: dict[int, Tensor] = {}
        self._leaves = {id(x): Slot(j) for j, x in enumerate(inputs)}
        self._roots = {x.grad_fn for x in inputs} - {None}
        for x in inputs:
            self._new(x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs, note = with_memory(args), kwargs or {}, None
        # What cannot be recorded must not stop func, which runs just this once.
        if self.failure is None:
            try:
                note = self._before(func, args, kwargs)
            except Exception as error:
                self._fail(error)
        out = func(*args, **kwargs)
        if note is not None:
            try:
                note(as_list(out))
            except Exception as error:
                self._fail(error)
        return out

    def _fail(self, error: Exception) -> None:
        text = str(error) if isinstance(error, UntraceableError) else repr(error)
        self.failure = UntraceableError(text)
        self._tensors.clear()

    def _before(self, op: Any, args: Any, kwargs: Any) -> Note | None:
        """What to note of an operation once it has run."""
        if op is _DETACH:  # autograd's copies of results, which get their history back later
            _, slot = self._tensors.get(id(args[0]), (None, None))
            return None if slot is None else lambda out: self._name(out[0], slot)
        if op is _CLONE and args[0].is_neg() and args[0].requires_grad:  # by torch, below autograd
            raise UntraceableError("a negative view is copied: call resolve_neg() on it")
        if any(self.slot(value) is not None for value in kwargs.values()):
            raise UntraceableError(f"{op} depends on the input by keyword")
        slots: list[int] = []
        node = Node(op, self._with_slots(args, slots), kwargs, tuple(slots))
        is_active = bool(slots) and torch.is_grad_enabled()
        targets = [args[i] if i < len(args) else kwargs.get(name) for i, name in _written(op)]
        if tensors := [x for item in targets for x in as_list(item) if isinstance(x, Tensor)]:
            return self._in_place(node, tensors, is_active=is_active)
        if is_active:
            return lambda out: self._record(node, out)
        return self._note_constants if torch.is_grad_enabled() else None

    def _note_constants(self, results: list[Any]) -> None:
        """Keep what was made of constants alone, whatever history it gets (tangents of a jvp)."""
        self._constants.update({id(x): x for x in results if isinstance(x, Tensor)})

    def _with_slots(self, args: Sequence[Any], slots: list[int]) -> list[Any]:
        """Arguments with slots, which are noted, in the place of what depends on the input."""
        result: list[Any] = []
        for arg in args:
            if type(arg) in (list, tuple):
                result.append(self._with_slots(arg, slots))
                continue
            slot = self.slot(arg)
            result.append(arg if slot is None else slot)
            slots += [] if slot is None else [slot]
        return result

    def slot(self, value: Any) -> Slot | None:
        """Slot of a tensor, ``None`` if it does not depend on the input.

        See NOTE [autograd decides what depends on the input].
        """
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        if value.grad_fn is None:  # a parameter, or one that func made, if no input
            return self._leaves.get(id(value))
        is_custom = isinstance(value.grad_fn, BackwardCFunction)  # not what its forward did
        if id(value) in self._tensors and not is_custom:
            return self._tensors[id(value)][1]
        if id(value) not in self._constants or is_custom:
            for node in graph_nodes([value], []):
                if node in self._roots or id(getattr(node, "variable", None)) in self._leaves:
                    raise UntraceableError(
                        "func computes with something whose parts have no history (a custom "
                        "autograd.Function, TorchScript, an extension, a kernel that hides its "
                        "gradients)"
                    )
            self._constants[id(value)] = value
        return None

    def _record(self, node: Node, results: list[Any]) -> None:
        for item in [item for arg in node.args for item in as_list(arg)]:
            if isinstance(item, Tensor):  # a constant, where it is new
                self._tensors.setdefault(id(item), (item, None))
        outs: list[Slot | None] = []
        for x in results:
            if isinstance(x, Tensor) and x.is_complex():
                raise UntraceableError(f"{node.op} returns complex numbers")
            outs.append(self._new(x) if isinstance(x, Tensor) and x.is_floating_point() else None)
        self.nodes.append(node._replace(outs=tuple(outs)))

    def _new(self, tensor: Tensor) -> Slot:
        self.values.append(tensor)
        return self._name(tensor, Slot(len(self.values) - 1))

    def _name(self, tensor: Tensor, slot: Slot) -> Slot:
        self._tensors[id(tensor)] = tensor, slot
        return slot

    def _in_place(self, node: Node, targets: list[Tensor], *, is_active: bool) -> Note | None:
        """Record an operation on a tensor that nothing shares as its version out of place."""
        first, target = node.args[0], targets[0]
        is_value = is_active and type(first) is Slot
        if any(self._is_used(target, itself=not is_value) for target in targets):
            raise UntraceableError(f"{node.op} overwrites what other operations have used")
        if not is_active:
            return None
        functional = _out_of_place(node.op)
        if functional is None or not (is_value or first is target):
            raise UntraceableError(f"{node.op} writes into several tensors")
        old = target.detach().clone()
        if is_value:
            self.values[first] = old
        node = node._replace(op=functional, args=[first if is_value else old, *node.args[1:]])
        return lambda _: self._record(node, [target])

    def _is_used(self, target: Tensor, *, itself: bool) -> bool:
        """Whether a tensor that an operation uses or makes lies in the memory of ``target``."""
        storage = target.untyped_storage().data_ptr()
        _, slot = self._tensors.get(id(target), (None, None))
        if slot is not None:
            itself = itself and any(slot in node.slots for node in self.nodes)
        used = [t for t, _ in self._tensors.values() if itself or t is not target]
        strided = [t for t in used if t.layout == torch.strided]
        return any(t.untyped_storage().data_ptr() == storage for t in strided)


@functools.cache
def _written(op: Any) -> list[tuple[int, str]]:
    """Places and names of the arguments that an operation writes into."""
    arguments = enumerate(op._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]


@functools.cache
def _out_of_place(op: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``; ``None`` where there is none."""
    space, name = op._schema.name.split("::")
    packet = getattr(getattr(torch.ops, space), name[:-1], None) if name.endswith("_") else None
    overloads = [] if packet is None else [getattr(packet, name) for name in packet.overloads()]

    def arguments(op: Any) -> list[tuple[str, str]]:  # as to pow_.Scalar belongs pow.Tensor_Scalar
        return [(argument.name, str(argument.type)) for argument in op._schema.arguments]

    return next((same for same in overloads if arguments(same) == arguments(op)), None)
