"""What must be as before: modules, buffers, random state.

A function run under ``vmap`` may leave dead wrapper tensors in a module, and every
trial run may move running statistics. A :class:`Guard` remembers and puts back.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcjac._native import beside_levels, is_functional, is_wrapped
from funcjac._reach import Reach, reach

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
    flags: list[tuple[Tensor, bool]] = field(default_factory=list)

    def restore(self) -> Restored:
        """Put everything back, and say what had changed."""
        changed, moved = False, self.restore_tensors(self.tensors)
        for module, attributes, inner in self.attributes:
            changed |= _restore_container(vars(module), attributes)
            for container, content in inner:
                changed |= _restore_container(container, content)
        for tensor, flag in self.flags:
            if tensor.requires_grad != flag and tensor.is_leaf:
                tensor.requires_grad_(flag)
                changed = True
        leaked = False
        for container, content in self.containers:
            # A plain list or dict is the user's own record: only dead wrappers are taken out.
            values = container.values() if isinstance(container, dict) else container
            if any(is_wrapped(value) for value in values):
                leaked |= _restore_container(container, content)
        return Restored(changed, moved, leaked)

    def lend(self) -> None:
        """Give modules copies of their buffers, which ``func`` may move.

        A graph keeps these; to put values back into the buffers themselves would break it.
        """
        copies: dict[int, Tensor] = {}  # modules may share one
        for module, _, _ in self.attributes:
            for name, buffer in module._buffers.items():
                if buffer is not None and not is_wrapped(buffer):
                    module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())

    def restarting(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """``func`` from the same state in every run."""

        def restored(*args: Any, **kwargs: Any) -> Any:
            self.restore()
            self.lend()
            return func(*args, **kwargs)

        return restored

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
    parameters = [p for m in found.modules.values() for p in m.parameters(recurse=False)]
    flags: list[tuple[Tensor, bool]] = [(p, p.requires_grad) for p in parameters]
    return Guard(attributes, tensors, containers, flags)


def same_values(one: Tensor, other: Tensor) -> bool:
    if one.is_nested:
        return all(map(same_values, one.unbind(), other.unbind()))
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _versions(tensors: Iterable[Tensor]) -> Iterable[tuple[Tensor, int, Tensor]]:
    for tensor in tensors:
        usual = tensor.layout == torch.strided and not tensor.is_meta and not is_wrapped(tensor)
        if usual and not tensor.is_inference():
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
    if same:
        return False
    if isinstance(container, list):
        container[:] = content
    elif isinstance(container, dict):
        _restore_items(container, content)
    else:
        container.clear()
        container.update(content)
    return True


def _restore_items(container: dict[str, Any], content: dict[str, Any]) -> None:
    """Never empty meanwhile, for other threads may look."""
    container.update(content)
    for key in [key for key in container if key not in content]:
        del container[key]
    if list(container) != list(content):  # the order of layers
        container.clear()
        container.update(content)


def levels_of_others(start: list[Any]) -> AbstractContextManager[None] | None:
    """Where dual levels do not count, if nothing that can be reached is a dual number.

    Levels belong to the process, dual numbers to whoever made them.
    """
    if is_functional():
        return None
    found = reach(start, {})
    inside = [
        t for m in found.modules.values() for t in (*m._parameters.values(), *m._buffers.values())
    ]
    unpack = torch.autograd.forward_ad.unpack_dual
    if any(t is not None and unpack(t).tangent is not None for t in (*found.tensors, *inside)):
        return None
    return beside_levels()


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
