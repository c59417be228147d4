"""What a function can reach: the modules, functions and tensors it may compute with.

Decisions are remembered per signature, and the modules that ``func`` uses are part of
it: a switch of ``training``, a layer put in another's place or a redefined helper must
not meet a decision made for what was there before.
"""

import functools
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

# Plain objects (a trainer, a config) are looked into this deep, and no walk goes on for ever.
_DEPTH = 2
_MOST = 20_000
_CONTAINERS = (tuple, list, dict, set, frozenset)
_DULL = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
)


@dataclass
class Reach:
    """Everything found on one walk.

    Attributes:
        token: identity of the code and the modules, and the modules' ``training`` flags.
        requires_grad: whether a tensor among them requires grad.
        tensors: those that are in no module.
        containers: lists, dicts and attributes in which a function may leave tensors.
        scripted: whether TorchScript is among them.
        custom: whether a custom ``torch.autograd.Function`` is.
    """

    token: list[Any] = field(default_factory=list)
    requires_grad: bool = False
    modules: dict[int, nn.Module] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    containers: list[Any] = field(default_factory=list)
    scripted: bool = False
    custom: bool = False


def reach(func: Callable[..., Any], codes: dict[types.CodeType, tuple[str, ...]]) -> Reach:
    """Walk everything that ``func`` can reach; ``codes`` remembers the names in code."""
    found = Reach()
    seen: set[int] = set()
    stack: list[tuple[Any, int]] = [(func, 0)]
    while stack and len(seen) < _MOST:
        item, depth = stack.pop()
        if type(item) in _DULL or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.requires_grad |= item.requires_grad
            found.tensors.append(item)
        elif isinstance(item, nn.Module):
            _visit_module(item, found, stack)
        elif isinstance(item, types.FunctionType):
            _visit_function(item, codes, found, stack)
        elif isinstance(item, types.MethodType):
            stack += ((item.__func__, depth), (item.__self__, depth))
        elif isinstance(item, functools.partial):
            stack += ((item.func, depth), (item.args, depth), (item.keywords, depth))
        elif isinstance(item, type):
            found.custom |= issubclass(item, torch.autograd.Function)
        elif isinstance(item, _CONTAINERS):
            found.containers.append(item)
            values: Iterable[Any] = item.values() if isinstance(item, dict) else item
            stack += [(value, depth) for value in values if type(value) not in _DULL]
        else:
            _visit_object(item, depth, found, stack)
    return found


def _visit_module(module: nn.Module, found: Reach, stack: list[tuple[Any, int]]) -> None:
    found.modules[id(module)] = module
    found.token += (weakref.ref(module), module.training)  # an id may be given out again
    if isinstance(module, torch.jit.ScriptModule):
        found.scripted = True
        return
    if not found.requires_grad:
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                found.requires_grad = True
                break
    forward = type(module).forward
    if not forward.__module__.startswith("torch."):
        stack.append((forward, 0))
    stack += [(child, 0) for child in module._modules.values() if child is not None]
    if module._forward_hooks or module._forward_pre_hooks:
        stack += ((module._forward_hooks, 0), (module._forward_pre_hooks, 0))


def _visit_function(
    func: types.FunctionType,
    codes: dict[types.CodeType, tuple[str, ...]],
    found: Reach,
    stack: list[tuple[Any, int]],
) -> None:
    wrapped = func.__dict__.get("__wrapped__")
    if wrapped is not None:
        stack.append((wrapped, 0))
    elif (func.__module__ or "").startswith("torch."):
        return
    code = func.__code__
    found.token.append(id(code))
    if func.__closure__:
        stack += [(_content(cell), 0) for cell in func.__closure__]
    if func.__defaults__:
        stack.append((func.__defaults__, 0))
    names = codes.get(code)
    if names is None:
        names = codes[code] = tuple(_names(code))
    scope = func.__globals__
    if scope.get("__name__", "").startswith("torch."):
        return  # a wrapper such as torch.vmap's: what it wraps is in its closure
    for name in names:
        item = scope.get(name)
        if type(item) not in _DULL:
            stack.append((item, 0))


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
    elif depth < _DEPTH and hasattr(item, "__dict__"):
        found.token.append(id(type(item)))
        found.containers.append(vars(item))
        stack += [(value, depth + 1) for value in vars(item).values() if type(value) not in _DULL]
        method = vars(type(item)).get("__call__")
        if isinstance(method, types.FunctionType):
            stack.append((method, depth))
