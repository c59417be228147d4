"""What surrounds a call: random state of torch's default generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from funcjac._environment.torch_private import is_wrapped

RngState = tuple[Tensor, list[Tensor]]


def rng_state() -> RngState:
    """State of torch's default generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def set_rng_state(state: RngState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def same_rng_state(one: RngState, other: RngState) -> bool:
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))


class WrappedAttributes:
    """Takes tensors of a torch.func transform out of modules that kept them while it ran.

    They are dead once the transform is over; the attribute is what it was before, and so is what
    stood in a list or a dict of the module's.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = [child for module in modules for child in module.modules()]
        holders = [vars(module) for module in every]
        inner = [v for held in holders for v in held.values() if type(v) in (dict, list)]
        self.before = [(holder, holder.copy()) for holder in (*holders, *inner)]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for holder, before in self.before:
            values = holder.values() if isinstance(holder, dict) else holder
            if not any(is_wrapped(value) for value in values):
                continue
            if isinstance(holder, list):
                holder[:] = before
                continue
            for name, value in list(holder.items()):
                if is_wrapped(value) and name in before:
                    holder[name] = before[name]
                elif is_wrapped(value):
                    del holder[name]


def has_lazy(modules: Iterable[nn.Module]) -> bool:
    """Whether a module's parameters take their shape, and their values, from the first input."""
    is_lazy = nn.parameter.is_lazy
    every = (child for module in modules for child in module.modules())
    return any(
        tensor is not None and is_lazy(tensor)
        for module in every
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


# Module, name, the buffer itself, and a copy of its values.
Buffers = list[tuple[nn.Module, str, Tensor, Tensor]]


def buffers_in_training(modules: Iterable[nn.Module]) -> Buffers:
    """Buffers that modules in training mode may move or replace, with copies of their values."""
    return [
        (child, name, buffer, buffer.clone())
        for module in modules
        for child in module.modules()
        if child.training
        for name, buffer in child._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]


def put_back(buffers: Buffers) -> None:
    with torch.no_grad():
        for module, name, buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)
            module._buffers[name] = buffer
