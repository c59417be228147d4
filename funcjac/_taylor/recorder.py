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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import EagerMode, with_memory
from funcjac._taylor.operations import out_of_place, written
from funcjac._taylor.recording import Node, Place, as_list
from funcjac.errors import UntraceableError

_DETACH = torch.ops.aten.detach.default


class Recorder(EagerMode):
    """Records the operations of one run of ``func``, as far as they depend on ``inputs``.

    ``func`` is run under ``torch.enable_grad()`` and this mode, once.

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
        # Tensors in slots, and constants without one, which stay alive: an id must not be given
        # out twice.
        self._tensors: dict[int, tuple[Tensor, int | None]] = {}
        self._constants: dict[int, Tensor] = {}
        self._unused: set[int] = set()  # of results: what no recorded operation has read
        self._leaves = {id(x): slot for slot, x in enumerate(inputs)}
        self._roots = {x.grad_fn for x in inputs} - {None}
        self._independent: set[Any] = set()
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
            if note is not None:
                note(as_list(out))
        except Exception as error:
            self._fail(error)
        return out

    def _fail(self, error: Exception) -> None:
        text = str(error) if isinstance(error, UntraceableError) else repr(error)
        self.failure = UntraceableError(text)
        self._tensors.clear()

    def _before(self, op: Any, args: Any, kwargs: Any) -> Callable[[Any], Any] | None:
        """What to note of an operation once it has run."""
        if op is _DETACH:  # autograd's copies of results, which get their history back later
            _, slot = self._tensors.get(id(args[0]), (None, None))
            return None if slot is None else lambda out: self._name(out[0], slot)
        if any(self.slot(value) is not None for value in kwargs.values()):
            raise UntraceableError(f"{op} depends on the input by keyword")
        node = self._node(op, args, kwargs)
        is_active = bool(node.slots) and torch.is_grad_enabled()
        if targets := written(op, args, kwargs):
            return self._in_place(node, targets, is_active=is_active)
        if is_active:
            return lambda out: self._record(node, out)
        return self._note_constants if torch.is_grad_enabled() else None

    def _note_constants(self, results: list[Any]) -> None:
        """Keep what was made of constants alone, whatever history it gets (tangents of a jvp)."""
        self._constants.update({id(x): x for x in results if isinstance(x, Tensor)})

    def _node(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Node:
        places: list[Place] = []
        slots: list[int] = []
        for i, arg in enumerate(args):
            inside = type(arg) in (list, tuple)
            for j, item in enumerate(arg) if inside else ((None, arg),):
                slot = self.slot(item)
                if slot is not None:
                    places.append((i, j))
                    slots.append(slot)
        return Node(op, args, kwargs, tuple(places), tuple(slots))

    def slot(self, value: Any) -> int | None:
        """Slot of a tensor, ``None`` if it does not depend on the input.

        See NOTE [autograd decides what depends on the input].
        """
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        leaf = value.grad_fn is None  # a parameter, or one that func made, if no input
        if leaf or id(value) in self._tensors:
            return self._leaves.get(id(value)) if leaf else self._tensors[id(value)][1]
        if id(value) not in self._constants and _depends(
            value.grad_fn, self._roots, self._leaves, self._independent
        ):
            raise UntraceableError(
                "func computes with something whose parts have no history (a custom "
                "autograd.Function, TorchScript, an extension, a kernel that hides its gradients)"
            )
        return None

    def _record(self, node: Node, results: list[Any]) -> None:
        for item in (item for arg in node.args for item in as_list(arg)):
            if isinstance(item, Tensor):  # a constant, where it is new
                self._tensors.setdefault(id(item), (item, None))
                self._unused.discard(id(item))
        outs: list[int | None] = []
        for tensor in results:
            if isinstance(tensor, Tensor) and tensor.is_complex():
                raise UntraceableError(f"{node.op} returns complex numbers")
            is_real = isinstance(tensor, Tensor) and tensor.is_floating_point()
            outs.append(self._new(tensor) if is_real else None)
            self._unused.add(id(tensor))
        self.nodes.append(node._replace(outs=tuple(outs)))

    def _new(self, tensor: Tensor) -> int:
        self.values.append(tensor)
        return self._name(tensor, len(self.values) - 1)

    def _name(self, tensor: Tensor, slot: int) -> int:
        self._tensors[id(tensor)] = tensor, slot
        return slot

    def _in_place(
        self, node: Node, targets: list[Tensor], *, is_active: bool
    ) -> Callable[[Any], None] | None:
        """Record an operation on a tensor that nothing shares as its version out of place."""
        is_value = is_active and node.places[0] == (0, None)
        if any(self._is_used(target, itself=not is_value) for target in targets):
            raise UntraceableError(f"{node.op} overwrites what other operations have used")
        if not is_active:
            return None
        target, functional = node.args[0], out_of_place(node.op)
        if functional is None or target is not targets[0]:
            raise UntraceableError(f"{node.op} writes into several tensors")
        old = target.detach().clone()
        if is_value:
            self.values[node.slots[0]] = old
        node = node._replace(op=functional, args=(old, *node.args[1:]))
        return lambda _: self._record(node, [target])

    def _is_used(self, target: Tensor, *, itself: bool) -> bool:
        """Whether a tensor that an operation uses or makes lies in the memory of ``target``."""
        storage = target.untyped_storage().data_ptr()
        itself = itself and id(target) not in self._unused
        used = [t for t, _ in self._tensors.values() if itself or t is not target]
        used = [t.untyped_storage() for t in used if t.layout == torch.strided]
        return any(memory.data_ptr() == storage for memory in used)


def _depends(node: Any, roots: set[Any], leaves: dict[int, int], independent: set[Any]) -> bool:
    """Whether autograd leads from a node to roots or leaves; takes down nodes that do not."""
    stack, seen = [node], set[Any]()
    while stack:
        node = stack.pop()
        if node in roots or id(getattr(node, "variable", None)) in leaves:
            return True
        if node is not None and node not in independent and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    independent |= seen
    return False
