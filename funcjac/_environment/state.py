"""Snapshots and restores random state, and the attributes and buffers of modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from funcjac._environment.torch_private import is_wrapped

RngState = tuple[torch.Generator, list[Tensor]]


def rng_state() -> RngState:
    """State of torch's default generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.default_generator.clone_state(), cuda  # half the bytes of a tensor


def set_rng_state(state: RngState) -> None:
    torch.set_rng_state(state[0].get_state())
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def same_rng_state(first: RngState, second: RngState) -> bool:
    cpu = torch.equal(first[0].get_state(), second[0].get_state())
    return cpu and all(map(torch.equal, first[1], second[1]))


def _with_children(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [child for module in modules for child in module.modules()]


# Attributes of every module that hold hooks and children, and no tensors that a call computes.
_WITHOUT_TENSORS = vars(nn.Module()).keys() - {"_buffers", "_parameters", "training"}
_CONTAINERS = {dict, list}


@contextmanager
def without_wrapped(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Takes tensors of a torch.func transform out of modules that stored them while it ran.

    They are dead once the transform is over. Attributes get their earlier values, and so do entries
    of lists and dicts that are attributes.
    """
    holders: list[Any] = [vars(module) for module in _with_children(modules)]
    for holder in holders.copy():
        inner = [name for name, value in holder.items() if type(value) in _CONTAINERS]
        holders += [holder[name] for name in inner if name not in _WITHOUT_TENSORS]
    earlier = [(holder, holder.copy()) for holder in holders]
    try:
        yield
    finally:
        for holder, before in earlier:
            is_list = isinstance(holder, list)
            if is_list and any(map(is_wrapped, holder)):
                holder[:] = before
            values = () if is_list else (holder.values(), before.values())
            if is_list or (len(holder) == len(before) and all(map(operator.is_, *values))):
                continue
            wrapped = {n for n in holder.keys() - _WITHOUT_TENSORS if is_wrapped(holder[n])}
            holder.update({name: before.get(name) for name in wrapped})
            for name in wrapped - before.keys():
                del holder[name]


def has_lazy(modules: Iterable[nn.Module]) -> bool:
    """Whether a module's parameters take their shape, and their values, from the first input."""
    tensors = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    return any(map(nn.parameter.is_lazy, tensors))


Buffers = list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]]


def buffers_in_training(modules: Iterable[nn.Module]) -> Buffers:
    """Buffers that modules in training mode may move or replace, with copies of their values."""
    return [
        (module._buffers, name, buffer, buffer.clone())
        for module in _with_children(modules)
        if module.training
        for name, buffer in module._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]


@torch.no_grad()
def put_back(buffers: Buffers) -> None:
    for holder, name, buffer, values in buffers:
        if not torch.equal(buffer, values):
            buffer.data.copy_(values)  # the version stays, for a graph that holds it
        holder[name] = buffer
