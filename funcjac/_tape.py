"""What ``func`` computes, operation by operation, while it runs.

A :class:`Tape` watches one plain run of ``func`` from below autograd. Python runs in full at
every call and sees true values, so a tape is never older than the call that it belongs to: a
changed closure, global, attribute or flag, a replaced parameter or another branch is simply
what is recorded. No tape is kept between calls.

Plain autograd is the referee of what depends on the input: a tensor that does not require
grad when it is used is a constant (``detach``, ``no_grad``, comparisons), and one that does,
although no recorded operation made it, stops the recording (a custom
``torch.autograd.Function``, TorchScript, an extension).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcjac._native import with_memory
from funcjac._structure import is_mutable, out_of_place
from funcjac.errors import UntraceableError

_CONSTANT, _HIDDEN = -1, -2
_DETACH = torch.ops.aten.detach.default
# Where an argument is: its position, and its position in the list that stands there.
Place = tuple[int, "int | None"]


class Node(NamedTuple):
    """One operation that depends on the input.

    Attributes:
        places: of the arguments that depend on the input, and ``slots``, their values.
        outs: slots of what it returned, ``None`` for what has no derivative.
        versions: of the constants it was given, which must not have changed since.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: tuple[Place, ...]
    slots: tuple[int, ...]
    outs: tuple[int | None, ...]
    versions: tuple[tuple[Tensor, int], ...]

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        """Run the operation with ``tensors`` in the place of what depends on the input."""
        return self.op(*self.with_args(tensors), **self.kwargs)

    def with_args(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        args = list(self.args)
        for (i, j), tensor in zip(self.places, tensors):
            if j is None:
                args[i] = tensor
            else:
                args[i] = [*args[i][:j], tensor, *args[i][j + 1 :]]
        return tuple(args)


class Tape(TorchDispatchMode):
    """Records what runs under it, as far as it depends on ``inputs``.

    Attributes:
        values: of each slot, or ``None`` where it was overwritten.
        graph: whether values must keep their graphs.
    """

    def __init__(self, inputs: Sequence[Tensor], *, graph: bool) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.values: list[Tensor | None] = []
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.graph = graph
        self._versions: list[int] = []
        self._slots: dict[int, int] = {}
        self._kept: list[Any] = []  # an id must not be given out again
        self._changed: int | None = None  # what was written in place gets its version later
        self._inputs = [x for x in inputs if self._new(x) >= 0]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing of this is compiled; PyTorch's own guard against it takes time at each call."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = with_memory(args), kwargs or {}
        self._settle()
        if func is _DETACH:  # autograd's own copies of results, which get their history back later
            out = func(*args)
            self._mark(out, self._slots.get(id(args[0]), _CONSTANT))
            return out
        places, slots, constants = self._active(args)
        if kwargs and any(self.slot(value) is not None for value in kwargs.values()):
            raise UntraceableError(f"{func} depends on the input by keyword")
        recording = torch.is_grad_enabled()
        if is_mutable(func):
            if not isinstance(args[0], Tensor):
                raise UntraceableError(f"{func} works in place on several tensors")
            if not recording and self._shares_memory(args[0]):
                raise UntraceableError(f"{func} overwrites what depends on the input, without grad")
            if slots and recording:
                return self._in_place(func, args, kwargs, places, slots, constants)
        out = func(*args, **kwargs)
        if not slots or not recording:
            for tensor in _tensors(out):
                self._mark(tensor, _CONSTANT if recording else _HIDDEN)
            return out
        self._record(func, args, kwargs, places, slots, constants, out)
        return out

    # --- which tensor is what

    def slot(self, value: Any) -> int | None:
        """Where a tensor's value is kept, ``None`` for what does not depend on the input."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return None
        found = self._slots.get(id(value))
        if value.grad_fn is None and (found is None or found >= len(self._inputs)):
            return None  # a parameter, or a leaf of the function's own
        if found is None:
            found = _HIDDEN if _depends(value, self._inputs) else _CONSTANT
            self._mark(value, found)
        if found == _HIDDEN:
            raise UntraceableError(
                "func computes with something whose parts have no history (a custom "
                "autograd.Function, TorchScript, an extension, a kernel that hides its gradients)"
            )
        return None if found == _CONSTANT else found

    def _active(
        self, args: Sequence[Any]
    ) -> tuple[tuple[Place, ...], tuple[int, ...], list[Tensor]]:
        """Where arguments depend on the input, their slots, and the constants."""
        places: list[Place] = []
        slots: list[int] = []
        constants: list[Tensor] = []
        for i, arg in enumerate(args):
            inside = type(arg) in (list, tuple)
            for j, item in enumerate(arg) if inside else ((None, arg),):
                if not isinstance(item, Tensor):
                    continue
                found = self.slot(item)
                if found is None:
                    constants.append(item)
                else:
                    places.append((i, j))
                    slots.append(found)
        return tuple(places), tuple(slots), constants

    def _mark(self, tensor: Tensor, mark: int) -> None:
        self._slots[id(tensor)] = mark
        self._kept.append(tensor)

    def _new(self, tensor: Tensor) -> int:
        found = len(self.values)
        self.values.append(tensor)
        self.shapes.append(tensor.shape)
        self.dtypes.append(tensor.dtype)
        self._versions.append(tensor._version)
        self._mark(tensor, found)
        return found

    def _record(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: tuple[Place, ...],
        slots: tuple[int, ...],
        constants: list[Tensor],
        out: Any,
    ) -> None:
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
        versions = tuple([(t, t._version) for t in constants if not t.is_inference()])
        self.nodes.append(Node(op, args, kwargs, places, slots, tuple(outs), versions))

    # --- operations that work in place

    def _in_place(
        self,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        places: tuple[Place, ...],
        slots: tuple[int, ...],
        constants: list[Tensor],
    ) -> Any:
        """Record an operation on a tensor of its own as the same one out of place."""
        target = args[0]
        functional = out_of_place(op)
        reshapes = op.overloadpacket.__name__ in ("squeeze_", "unsqueeze_")
        own = reshapes or (target._base is None and not self._shares_memory(target))
        if functional is None or not own:
            raise UntraceableError(f"{op} works in place on what other tensors may share")
        old = target if reshapes else target.detach().clone()
        out = op(*args, **kwargs)
        if (0, None) in places:
            slot = slots[places.index((0, None))]
            # The old value belongs to a graph, to which a copy made here would not.
            self.values[slot] = None if self.graph and not reshapes else old
            self._versions[slot] = old._version
        constants = [old if tensor is target else tensor for tensor in constants]
        self._record(functional, (old, *args[1:]), kwargs, places, slots, constants, target)
        self._changed = len(self.values) - 1
        return out

    def _settle(self) -> None:
        value = None if self._changed is None else self.values[self._changed]
        if self._changed is not None and value is not None:
            self._versions[self._changed] = value._version
        self._changed = None

    def _shares_memory(self, target: Tensor) -> bool:
        """Whether another tensor that was seen lies in the memory of ``target``."""
        storage = target.untyped_storage().data_ptr()
        others = (t for t in self._kept if t is not target and t.layout == torch.strided)
        return any(t.untyped_storage().data_ptr() == storage for t in others)

    # --- afterwards

    def value(self, slot: int) -> Tensor:
        """What a slot held; raises :class:`UntraceableError` if it has been overwritten."""
        found = self.values[slot]
        if found is None or found._version != self._versions[slot]:
            raise UntraceableError("a tensor that depends on the input was overwritten later on")
        return found if found.shape == self.shapes[slot] else found.view(self.shapes[slot])

    def is_as_recorded(self, slot: int) -> bool:
        found = self.values[slot]
        if found is None or found._version != self._versions[slot]:
            return False
        return found.shape == self.shapes[slot]

    def needed(self, outputs: Sequence[int | None]) -> list[tuple[Node, tuple[int, ...]]]:
        """Nodes that ``outputs`` are computed from, each with slots that nobody uses after it."""
        self._settle()
        used = {slot for slot in outputs if slot is not None}
        found = []
        for node in reversed(self.nodes):
            if used.isdisjoint(node.outs):
                continue
            if any(tensor._version != version for tensor, version in node.versions):
                raise UntraceableError(f"an argument of {node.op} was overwritten later on")
            if any(getattr(self.values[slot or 0], "_backward_hooks", None) for slot in node.outs):
                raise UntraceableError("a gradient hook changes derivatives on their way back")
            found.append((node, tuple({slot for slot in node.slots if slot not in used})))
            used.update(node.slots)
        return found[::-1]


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
