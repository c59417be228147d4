"""Runs replacements in the place of Python's calls, and tells where they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcjac._environment.torch_private import assumed_constant
from funcjac._torch_faults.table import FAULTS

_REPLACEMENTS = {call: run for row in FAULTS for call, run in row.replacements.items()}
_REPLACEMENTS |= {Tensor.unflatten: torch.unflatten}  # not wrong, but Dynamo takes no super() there
_RUNS: list[Any] = [None, *_REPLACEMENTS.values()]
_PLACES = {call: place for place, call in enumerate(_REPLACEMENTS, 1)}
# Names of the first argument of torch's operations.
_FIRST_ARGUMENTS = ("input", "self", "A")


def wrong_nodes(*derivatives: str) -> frozenset[str]:
    """Names of the nodes that have one of these derivatives wrong."""
    return frozenset(node for row in FAULTS if row.wrong & {*derivatives} for node in row.nodes)


def _ops(*derivatives: str) -> frozenset[str]:
    return frozenset(row.op for row in FAULTS if row.wrong & {*derivatives})


_WRONG_ONCE = wrong_nodes("reverse_1", "batching", "vmap", "single_pass")
_WRONG_AGAIN = _WRONG_ONCE | wrong_nodes("batching_again", "reverse_2", "reverse_3")
_FORWARD_ONCE = _ops("forward", "forward_vmap")
_FORWARD_AGAIN = _FORWARD_ONCE | _ops("forward_again")


@assumed_constant  # each look-up makes all keys of the table guards of a call
def _place(call: Any) -> int:
    """Asked by the compiler, which cannot look up ``x ** y`` itself; 0 for what runs as it is."""
    return _PLACES.get(call, 0)


class UseReplacements(TorchFunctionMode):
    """Runs simpler operations, of which all derivatives are right, for those on the table.

    They run before autograd or torch.func see anything.
    """

    def __torch_function__(self, func: Any, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs, place = kwargs or {}, _place(func)
        is_known = place and "out" not in kwargs
        # Dynamo passes arrays of NumPy, too, of which it would make constants without a word.
        if not is_known or not any(isinstance(x, Tensor) for x in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        first = [kwargs[name] for name in _FIRST_ARGUMENTS if name in kwargs]
        rest = {name: x for name, x in kwargs.items() if name not in _FIRST_ARGUMENTS}
        return _RUNS[place](*first, *args, **rest)


def graph_names(nodes: Iterable[Any], tensors: Iterable[Tensor]) -> frozenset[str]:
    """Names of the nodes of a graph that leads to ``tensors``.

    Of some operations, further outputs alone have a wrong gradient: for those ``name.k``, too.
    """
    edges = [(x.grad_fn, x.output_nr) for x in tensors]
    edges += [edge for node in nodes for edge in node.next_functions]
    names = [(node.name(), k) for node, k in edges if node is not None]
    return frozenset({name for name, _ in names} | {f"{name}.{k}" for name, k in names})


def needs_replacement(node_names: Iterable[str], *, again: bool) -> bool:
    """Whether func must run with replacements; ``again`` for what is differentiated again."""
    return not (_WRONG_AGAIN if again else _WRONG_ONCE).isdisjoint(node_names)


def forward_faults(op_names: Iterable[str], *, again: bool = False) -> frozenset[str]:
    """The ATen operations, with overload or without, whose forward formulas are wrong."""
    return (_FORWARD_AGAIN if again else _FORWARD_ONCE).intersection(op_names)
