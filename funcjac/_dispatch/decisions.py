"""What is remembered of calls, by key: no batch size, no values, for all transforms."""

from __future__ import annotations

import enum
import functools
import itertools
import operator
import types
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from funcjac._arguments import pytree
from funcjac._arguments.call import Call
from funcjac._engines.rows import row_shape

_MOST, _MOST_ROUTES = 1024, 256


@dataclass
class Decision:
    """What earlier calls of a key have shown."""

    calls: int = 0
    clone: bool = False  # ``func`` writes into its arguments, and is given copies
    replaced: bool = False  # replacements run of what torch differentiates wrongly
    has_run: bool = False  # ``func`` came to its end once
    records: bool | None = None  # operations are recorded for Taylor propagation, once known
    # By kinds of runs, the route that works, and what runs where it gives no numbers.
    routes: dict[Any, Any] = field(default_factory=dict)
    left: dict[Any, str] = field(default_factory=dict)  # engines and routes that failed, and why
    # Signatures that were looked through for what torch differentiates wrongly, and whether for
    # what is wrong once differentiated again.
    graphs: set[tuple[int, bool]] = field(default_factory=set)
    signatures: set[tuple[int, str]] = field(default_factory=set)  # verified ones, with their mode
    rows: bool = False  # a batch of two rows or more was verified
    failed: bool = False  # the last verification failed: the next call is verified again

    def remember(self, kind: Any, routes: Any) -> None:
        """Remember routes of a kind of runs, which names the batch size."""
        if len(self.routes) >= _MOST_ROUTES:
            self.routes.clear()
        self.routes[kind] = routes

    def is_due(self, check: bool | str, batch: int) -> bool:
        """Whether this call is verified: calls 1, 2, 4, 8, …, and the first with two rows."""
        power = self.calls & (self.calls - 1) == 0
        unseen = power or self.failed or (batch > 1 and not self.rows)
        return check is True or (check == "auto" and unseen)


def decision_of(key: Any) -> Decision:
    """The decision of a key; a new one makes go what was used longest ago."""
    try:
        return _decision(key)
    except TypeError:  # something in it has no hash: nothing is remembered
        return Decision()


@functools.lru_cache(_MOST)
def _decision(_: Any) -> Decision:
    return Decision()


# --- the key ---------------------------------------------------------------------------

# Functions, objects and containers are looked into this deep; longer containers hold data.
_DEPTH = 4
_NESTED = 8  # functions that close over one another, such as decorated ones: a short list of cells
_LONGEST = 16
_FUNCTIONS = 32  # of so many, each is looked into; of more, one of each code
_AUTOCAST = ("cpu", "cuda")
_SWITCHES = (bool, int, str)
_is_training = operator.attrgetter("training")
_UNBOUND = types.CellType()  # of a name that is bound later
# What names in a function's module are looked up for.
_NAMED = (nn.Module, Tensor, types.FunctionType, torch.jit.ScriptFunction, *_SWITCHES)

# Of modules: their children, and whether TorchScript is among them.
_CHILDREN: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


class FunctionKey:
    """What is found behind a function: code, modules, switches."""

    __slots__ = ("_seen", "compiles", "modules", "parts", "scripted", "tensors")

    def __init__(self, func: Any) -> None:
        self.parts: list[Any] = []  # of the key
        self.modules: list[nn.Module] = []  # that were met, not their children
        self.tensors: list[Tensor] = []  # that were met, but those of modules
        self.scripted = False  # whether TorchScript is among them
        self.compiles = False  # whether something that torch.compile made is among them
        self._seen: set[int] = set()  # functions that were met
        self._describe(func, 0)

    def _describe(self, item: Any, depth: int) -> None:
        kind = type(item)
        if kind in _SWITCHES:
            self.parts.append(item if kind is not bool else (item,))
        elif kind is types.FunctionType:
            self._describe_function(item, depth)
        elif isinstance(item, nn.Module):
            self.modules.append(item)
            self.parts.append(weakref.ref(item))  # an id may be given out again
            children, scripted, compiles = _CHILDREN.get(item) or _children(item)
            self.parts.append(bytes((item.training, *map(_is_training, children))))
            self.scripted |= scripted
            self.compiles |= compiles
        elif kind is types.MethodType:
            self._describe(item.__func__, depth)
            self._describe(item.__self__, depth + 1)
        elif kind is functools.partial:
            self._describe(item.func, depth)
            self.parts.append(tuple(item.keywords))
            for value in (*item.args, *item.keywords.values()):
                self._describe(value, depth + 1)
        elif isinstance(item, enum.Enum):
            self.parts.append((kind, item.name))
        elif kind in (list, tuple, dict):
            if depth < _DEPTH and len(item) <= _LONGEST:
                for value in (*item, *item.values()) if kind is dict else item:
                    self._describe(value, depth + 1)
        elif isinstance(item, Tensor):
            self.tensors.append(item)  # not in the key: it may be fresh at each call
        elif hasattr(item, "__funcjac_key__"):
            self.parts.append(item.__funcjac_key__)
            self._describe(item.func, depth + 1)
        else:
            self._describe_object(item, depth)

    def _describe_object(self, item: Any, depth: int) -> None:
        self.scripted = self.scripted or isinstance(item, torch.jit.ScriptFunction)
        if depth == 0:
            self.parts.append(weakref.ref(item) if type(item).__weakrefoffset__ else type(item))
        self.parts.append(type(item))
        is_opaque = isinstance(item, (types.BuiltinFunctionType, type))
        if not is_opaque and ((depth < _DEPTH and callable(item)) or depth == 1):
            for value in list(getattr(item, "__dict__", {}).values())[:_LONGEST]:
                if isinstance(value, (nn.Module, bool, str)):  # an int may count calls
                    self._describe(value, depth + 1)

    def _describe_function(self, func: types.FunctionType, depth: int) -> None:
        code = func.__code__
        if id(func) in self._seen or (len(self._seen) >= _FUNCTIONS and code in self.parts):
            return
        self._seen.add(id(func))
        self.parts.append(code)
        self.compiles |= hasattr(func, "_torchdynamo_orig_callable")
        if depth >= _NESTED:
            return
        cells = [cell.cell_contents for cell in func.__closure__ or () if cell != _UNBOUND]
        named, scope = [], func.__globals__
        own = not str(scope.get("__name__", "")).startswith(("torch.", "funcjac."))
        if own and depth < _DEPTH:
            named = [scope.get(name) for name in _names(code)]
        named = [value for value in named if isinstance(value, _NAMED)]
        for value in (*cells, *(func.__defaults__ or ()), *named):
            self._describe(value, depth + 1)


@functools.lru_cache(_MOST)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that ``code`` and the functions defined in it look up."""
    inner = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple({*code.co_names, *itertools.chain(*inner)})


def _children(module: nn.Module) -> tuple[list[nn.Module], bool, bool]:
    children = list(module.modules())[1:]  # without the module itself, which would never go
    scripted = any(isinstance(m, torch.jit.ScriptModule) for m in (module, *children))
    compiles = any("_orig_mod" in m._modules or m._compiled_call_impl for m in (module, *children))
    _CHILDREN[module] = children, scripted, compiles
    return children, scripted, compiles


def forget_children(modules: list[nn.Module]) -> None:
    """Forget which children modules had."""
    for module in modules:
        _CHILDREN.pop(module, None)


def make_key(token: Any, function: FunctionKey, call: Call) -> Any:
    """The key of a call; hashable."""
    layout = call.layout
    metas = []
    for leaf, dim in zip(call.leaves, layout.dims):
        if dim == 0 and type(leaf) is Tensor:
            metas.append((leaf.shape[1:], leaf.dtype, leaf.device, leaf.requires_grad))
        else:
            metas.append(_meta(leaf, dim))
    modes: list[Any] = [torch.is_grad_enabled()]
    if any(map(torch.is_autocast_enabled, _AUTOCAST)):
        modes += [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _AUTOCAST]
    if call.kwargs:
        leaves, spec = pytree.flatten_args(call.kwargs)
        modes += [spec, *[_meta(leaf, None) for leaf in leaves]]
    structure = None if layout.plain else layout.spec, layout.dims, layout.diff
    return token, tuple(function.parts), structure, tuple(metas), tuple(modes)


def _meta(leaf: Any, dim: int | None) -> Any:
    if isinstance(leaf, Tensor):
        return row_shape(leaf, dim), leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, enum.Enum):  # which may have no hash
        return type(leaf), leaf.name
    if callable(leaf):
        return tuple(FunctionKey(leaf).parts)
    return (type(leaf), leaf) if isinstance(leaf, (bool, int, str, type(None))) else type(leaf)
