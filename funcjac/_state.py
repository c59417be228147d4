"""What must be as before: modules, buffers, random state.

A function run under ``vmap`` may leave dead wrapper tensors in a module, and every
trial run may move running statistics. A :class:`Guard` remembers and puts back.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcjac._native import is_wrapped
from funcjac._reach import Reach

_MOST_ELEMENTS = 2**22


class Restored(NamedTuple):
    """Whether attributes or tensors had changed, and whether dead wrappers were taken out."""

    changed: bool = False
    moved: bool = False
    leaked: bool = False


@dataclass(frozen=True)
class Guard:
    """What modules, tensors and containers held when it was taken."""

    attributes: list[tuple[nn.Module, dict[str, Any], list[tuple[Any, Any]]]]
    tensors: list[tuple[Tensor, int, Tensor]]
    containers: list[tuple[Any, Any]]

    def restore(self) -> Restored:
        """Put everything back, and say what had changed."""
        changed, moved = False, self.restore_tensors(self.tensors)
        for module, attributes, inner in self.attributes:
            now = vars(module)
            if not _same_items(now, attributes):
                now.clear()
                now.update(attributes)
                changed = True
            for container, content in inner:
                changed |= _restore_container(container, content)
        leaked = False
        for container, content in self.containers:
            # A plain list or dict is the user's own record: only dead wrappers are taken out.
            values = container.values() if isinstance(container, dict) else container
            if any(is_wrapped(value) for value in values):
                leaked |= _restore_container(container, content)
        return Restored(changed, moved, leaked)

    @staticmethod
    def restore_tensors(tensors: list[tuple[Tensor, int, Tensor]]) -> bool:
        """Put back the values of tensors; whether any had changed."""
        changed = False
        for tensor, version, value in tensors:
            # Batch norm moves its running statistics without a new version.
            moved = tensor._version != version or not isinstance(tensor, nn.Parameter)
            if moved and not same_values(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)
                changed = True
        return changed


def guard(found: Reach, arguments: Iterable[Tensor] = (), *, values: bool = True) -> Guard:
    """Remember the state of everything that was found, and of the arguments.

    ``values`` copies tensors: all of modules, and others unless they look like a data set.
    """
    attributes = []
    given = list(arguments)
    tensors = list(_versions(given)) if values else []
    if values:
        seen = {id(tensor) for tensor in given}
        others = [t for t in found.tensors if t.numel() <= _MOST_ELEMENTS and id(t) not in seen]
        tensors += _versions(others)
    for module in found.modules.values():
        now = dict(vars(module))
        inner = [(v, v.copy()) for v in now.values() if isinstance(v, (dict, list, set))]
        attributes.append((module, now, inner))
        if values:
            tensors += _versions(module.parameters(recurse=False))
            tensors += _versions(module.buffers(recurse=False))
    containers = [(c, c.copy()) for c in found.containers if isinstance(c, (dict, list))]
    return Guard(attributes, tensors, containers)


def same_values(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _versions(tensors: Iterable[Tensor]) -> Iterable[tuple[Tensor, int, Tensor]]:
    for tensor in tensors:
        if not tensor.is_inference() and tensor.layout == torch.strided:
            yield tensor, tensor._version, tensor.detach().clone()


def _same_items(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return len(now) == len(before) and all(
        key in before and before[key] is value for key, value in now.items()
    )


def _restore_container(container: Any, content: Any) -> bool:
    if isinstance(container, dict):
        same = _same_items(container, content)
    elif isinstance(container, list):
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content))
    else:
        same = container == content
    if not same:
        container.clear()
        container.extend(content) if isinstance(container, list) else container.update(content)
    return not same


def has_lazy(found: Reach) -> bool:
    """Whether a module's parameters take their shape from the first input."""
    is_lazy = torch.nn.parameter.is_lazy
    return any(
        is_lazy(tensor)
        for module in found.modules.values()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )


RngState = tuple[Tensor, list[Tensor]]


def rng_state() -> RngState:
    """State of PyTorch's default generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda


def set_rng_state(state: RngState) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def same_rng_state(one: RngState, other: RngState) -> bool:
    return torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))
