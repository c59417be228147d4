"""Runs replacements in the place of Python's calls, and tells where they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcjac._environment import torch_private
from funcjac._torch_faults.table import FAULTS

# Functions that run instead of each call: in plain code, in torch.func, and in compiled code, where
# the compiler cannot look up calls that belong to classes, such as x ** y.
_PLAIN = {call: run for row in FAULTS for call, run in row.replacements.items()}
_IN_TRANSFORMS = _PLAIN | {call: run for row in FAULTS for call, run in row.in_transforms.items()}
_COMPILED = {call: _IN_TRANSFORMS[call] for row in FAULTS if row.compiles for call in row.calls}
# Names of the first argument of torch's operations.
_FIRST_ARGUMENTS = ("input", "self", "A")


def _nodes(*derivatives: str) -> frozenset[str]:
    """The autograd nodes of operations that have one of ``derivatives`` wrong."""
    rows = (row for row in FAULTS if not row.wrong.isdisjoint(derivatives))
    return frozenset(node for row in rows for node in row.nodes)


def _ops(*derivatives: str) -> frozenset[str]:
    """The operations that have one of ``derivatives`` wrong."""
    return frozenset(row.op for row in FAULTS if not row.wrong.isdisjoint(derivatives))


_WRONG_ONCE = _nodes("reverse_1", "batching", "vmap", "single_pass")
_WRONG_AGAIN = _WRONG_ONCE | _nodes("batching_again", "reverse_2", "reverse_3")
_FORWARD_ONCE = _ops("forward", "forward_vmap")
_FORWARD_AGAIN = _FORWARD_ONCE | _ops("forward_again")


class UseReplacements(TorchFunctionMode):
    """Runs simpler operations, of which all derivatives are right, for those on the table.

    They run before autograd or torch.func see anything. Attention is always replaced: torch's own
    composition, where there is dropout, ends the process in forward mode under vmap.

    Args:
        forward: whether operations are replaced as in torch.func in plain code too, to see which
            remain that have a wrong forward formula.
    """

    def __init__(self, *, forward: bool = False) -> None:
        super().__init__()
        self.forward = forward

    def __torch_function__(self, func: Any, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        run = self._replacements().get(func)
        if run is None or "out" in kwargs:
            return func(*args, **kwargs)
        for name in _FIRST_ARGUMENTS:
            if name in kwargs:
                kwargs = dict(kwargs)
                args = (kwargs.pop(name), *args)
                break
        return run(*args, **kwargs)

    def _replacements(self) -> dict[Any, Any]:
        if torch.compiler.is_dynamo_compiling():
            return _COMPILED
        return _IN_TRANSFORMS if self.forward or torch_private.is_functional() else _PLAIN


def graph_names(tensors: Iterable[Tensor]) -> frozenset[str]:
    """Names of the nodes in the autograd graph of ``tensors``.

    A node whose output ``k > 0`` is used also counts as ``name.k``: of some operations, only
    further outputs have a wrong gradient.
    """
    names: set[str] = set()
    seen: set[Any] = set()
    edges: list[tuple[Any, int]] = [(x.grad_fn, x.output_nr) for x in tensors]
    while edges:
        node, k = edges.pop()
        if node is None:
            continue
        if k:
            names.add(f"{node.name()}.{k}")
        if node not in seen:
            seen.add(node)
            names.add(node.name())
            edges += node.next_functions
    return frozenset(names)


def needs_replacement(node_names: Iterable[str], *, again: bool) -> bool:
    """Whether func must run again with replacements, after a plain run with these graph nodes.

    Args:
        node_names: the names of the nodes, as ``graph_names`` gives them.
        again: whether the derivative is differentiated again, or of second order itself.
    """
    return not (_WRONG_AGAIN if again else _WRONG_ONCE).isdisjoint(node_names)


def forward_faults(op_names: Iterable[str], *, again: bool = False) -> frozenset[str]:
    """Names of the ATen operations, among ``op_names``, whose forward formulas are wrong.

    Args:
        op_names: names of operations, with and without overload, of a run with
            ``UseReplacements(forward=True)``.
        again: whether the forward formulas are differentiated again.
    """
    return (_FORWARD_AGAIN if again else _FORWARD_ONCE).intersection(op_names)
