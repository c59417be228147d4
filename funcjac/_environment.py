"""What surrounds a call: random state of torch's default generators."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from funcjac._native import is_wrapped

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

    They are dead once the transform is over; the attribute is what it was before.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = [child for module in modules for child in module.modules()]
        self.before = [(module, dict(vars(module))) for module in every]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for module, before in self.before:
            for name, value in list(vars(module).items()):
                if is_wrapped(value):
                    if name in before:
                        vars(module)[name] = before[name]
                    else:
                        del vars(module)[name]
