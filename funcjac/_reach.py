"""What a function can reach: the modules, functions and tensors it may compute with.

Decisions are remembered per signature, and the modules that ``func`` uses are part of
it: a switch of ``training``, a layer put in another's place or a redefined helper must
not meet a decision made for what was there before.
"""

import collections
import contextlib
import enum
import functools
import itertools
import sys
import types
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Plain objects (a trainer, a config) are looked into this deep and lists up to this length (a
# longer one holds data, unless it begins with layers); and no walk goes on for ever.
_DEPTH = 3
_WIDEST = 256
_MOST = 20_000

# What stays the same from call to call: names in code, and how modules of a class run.
Known = dict[Any, Any]
_CONTAINERS = (tuple, list, dict, set, frozenset, collections.deque)
_DULL = (
    type(None),
    int,
    float,
    complex,
    str,
    bytes,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
)
# What functions find in these modules is no part of a model.
_LIBRARIES = frozenset({"torch", "funcjac", "numpy", "scipy", "builtins", *sys.stdlib_module_names})


@dataclass
class Reach:
    """Everything found on one walk.

    Attributes:
        token: identity of the code and the modules, and the modules' ``training`` flags.
        numbers: integers that functions close over, name or have for defaults.
        requires_grad: whether a tensor among them requires grad.
        tensors: those that are in no module.
        containers: lists, dicts and attributes in which a function may leave tensors.
        scripted: whether TorchScript is among them.
        custom: whether a custom ``torch.autograd.Function`` is.
    """

    token: list[Any] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    requires_grad: bool = False
    modules: dict[int, nn.Module] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    scripted: bool = False
    custom: bool = False


def reach(start: list[Any], known: Known) -> Reach:
    """Walk everything that can be reached from what is in ``start``.

    ``known`` remembers what stays the same from call to call.
    """
    found = Reach()
    seen: set[int] = set()
    stack: list[tuple[Any, int]] = [(item, 0) for item in start]
    while stack and len(seen) < _MOST:
        item, depth = stack.pop()
        if type(item) is bool:
            found.token.append(item)
            continue
        if isinstance(item, enum.Enum):  # which may have no hash
            found.token.append(item.name)
            continue
        if type(item) in _DULL or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.requires_grad |= item.requires_grad
            found.tensors.append(item)
        elif isinstance(item, nn.Module):
            _visit_module(item, known, found, stack)
        elif isinstance(item, types.FunctionType):
            _visit_function(item, known, found, stack)
        elif isinstance(item, types.MethodType):
            stack += ((item.__func__, depth), (item.__self__, depth))
        elif isinstance(item, functools.partial):
            stack += ((item.func, depth), (item.args, depth), (item.keywords, depth))
            found.numbers += [v for v in (*item.args, *item.keywords.values()) if type(v) is int]
        elif isinstance(item, type):
            found.custom |= issubclass(item, torch.autograd.Function)
            stack += [(v, depth) for v in vars(item).values() if isinstance(v, nn.Module)]
        elif isinstance(item, _CONTAINERS):
            found.containers.append(item)
            values: Iterable[Any] = item.values() if isinstance(item, dict) else item
            if len(item) <= _WIDEST or any(map(callable, itertools.islice(values, 8))):
                stack += [(value, depth) for value in values if type(value) not in _DULL]
        else:
            _visit_object(item, depth, found, stack)
    return found


def _visit_module(
    module: nn.Module, known: Known, found: Reach, stack: list[tuple[Any, int]]
) -> None:
    kind = type(module)
    facts = known.get(kind)
    if facts is None or not (facts[1] or facts[0] is kind.forward):
        facts = known[kind] = _facts(kind)
    _, scripted, written = facts
    found.modules[id(module)] = module
    found.token += (weakref.ref(module), module.training)  # an id may be given out again
    if scripted:
        found.scripted = True
        found.requires_grad |= any(parameter.requires_grad for parameter in module.parameters())
        found.token += [child.training for child in module.modules()]
        return
    if not found.requires_grad:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                found.requires_grad = True
                break
    for child in module._modules.values():
        if child is not None:
            stack.append((child, 0))  # noqa: PERF401  no second list on the way of every call
    if written or "forward" in module.__dict__:
        _visit_attributes(module, found, stack)
        for name, value in vars(kind).items():
            if type(value) is types.FunctionType and not name.startswith("__"):
                stack.append((value, 0))
        stack.append((module.__dict__.get("forward", kind.forward), 0))
    if module._forward_hooks or module._forward_pre_hooks:
        stack += ((module._forward_hooks, 0), (module._forward_pre_hooks, 0))


def _facts(kind: type[nn.Module]) -> tuple[Any, bool, bool]:
    """How modules of a class run: ``forward``, whether scripted, whether a user wrote it."""
    if issubclass(kind, torch.jit.ScriptModule):
        return None, True, False
    return kind.forward, False, not kind.forward.__module__.startswith("torch.")


_TORCH_ATTRIBUTES = frozenset(vars(nn.Module()))


def _visit_attributes(module: nn.Module, found: Reach, stack: list[tuple[Any, int]]) -> None:
    """What a user's module holds beside its parameters and children: switches, lists of layers."""
    for name, value in module.__dict__.items():
        if name in _TORCH_ATTRIBUTES:
            continue
        if type(value) is str:
            found.token.append(value)
        elif type(value) not in _DULL:
            stack.append((value, 1))


def _visit_function(
    func: types.FunctionType,
    known: Known,
    found: Reach,
    stack: list[tuple[Any, int]],
) -> None:
    wrapped = func.__dict__.get("__wrapped__")
    if wrapped is not None:
        stack.append((wrapped, 0))
    code = func.__code__
    found.token.append(code)  # equal code is the same function, also when a cell runs again
    if wrapped is None and (func.__module__ or "").startswith("torch."):
        return
    outer = [*map(_content, func.__closure__ or ()), *(func.__defaults__ or ())]
    outer += (func.__kwdefaults__ or {}).values()
    names = known.get(code)
    if names is None:
        names = known[code] = tuple(_names(code))
    scope = func.__globals__
    if not scope.get("__name__", "").startswith(("torch.", "funcjac.")):
        # In a wrapper such as torch.vmap's, what it wraps is in its closure.
        outer += _named(scope, names, set())
    found.token += [item for item in outer if _is_word(item)]
    found.numbers += [item for item in outer if type(item) is int]
    stack += [(item, 0) for item in outer if type(item) not in _DULL]


def _named(scope: dict[str, Any], names: tuple[str, ...], seen: set[int]) -> Iterable[Any]:
    """What names stand for, in a scope and in the modules that they stand for there."""
    for name in names:
        item = scope.get(name)
        if type(item) is not types.ModuleType:
            yield item
        elif id(item) not in seen and not _is_library(item):
            seen.add(id(item))
            yield from _named(vars(item), names, seen)


def _is_library(module: types.ModuleType) -> bool:
    return str(vars(module).get("__name__")).partition(".")[0] in _LIBRARIES


def _is_word(item: Any) -> bool:
    """Whether it is one of a few, which decide what a function does; no method of a tensor."""
    if type(item) is types.BuiltinFunctionType:
        return isinstance(item.__self__, (types.ModuleType, type, type(None)))
    return type(item) is str


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty: a name that is bound later
        return None


def _names(code: types.CodeType) -> Iterable[str]:
    """Names that ``code`` and the functions defined in it look up."""
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _names(const)


def _visit_object(item: Any, depth: int, found: Reach, stack: list[tuple[Any, int]]) -> None:
    if isinstance(item, torch.jit.ScriptFunction):
        found.scripted = True
    elif type(item).__module__.startswith("funcjac."):  # a transform, which remembers a lot
        stack.append((getattr(item, "func", None), depth))
    elif depth < _DEPTH and type(item).__module__ != "torch._ops":  # all of its operations
        values = list(_slots(item))
        if hasattr(item, "__dict__"):
            found.token.append(type(item))
            found.containers.append(vars(item))
            values += vars(item).values()
        stack += [(value, depth + 1) for value in values if type(value) not in _DULL]
        method = vars(type(item)).get("__call__")
        if isinstance(method, types.FunctionType):
            stack.append((method, depth))


def _slots(item: Any) -> Iterable[Any]:
    """Attributes that have no place in ``__dict__``."""
    kinds = [kind for kind in type(item).__mro__ if "__slots__" in vars(kind)]
    for slot in itertools.chain.from_iterable(vars(kind).values() for kind in kinds):
        if type(slot) is types.MemberDescriptorType:
            with contextlib.suppress(AttributeError):  # not set
                yield slot.__get__(item)
