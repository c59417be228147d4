"""What every transform returns: an object that is called, printed, copied and pickled."""

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from funcjac._arguments import pytree
from funcjac._arguments.bind_arguments import bind, with_extras
from funcjac._arguments.call import Call, Options
from funcjac._arguments.check_keywords import check_options
from funcjac._arguments.check_tensors import is_uninitialized
from funcjac._dispatch.attempt import Outcome
from funcjac._dispatch.inside_transforms import solve_inside
from funcjac._dispatch.solve import solve
from funcjac._environment.torch_private import is_functional, is_transformed

P = ParamSpec("P")
R = TypeVar("R")
# What an operator needs beside the arguments: tensors and their batch dimensions.
Extras = Callable[..., tuple[list[Tensor], tuple["int | None", ...]]]
# Levels of torch's forward mode belong to the process: one thread at a time.
DUAL_LEVELS = threading.RLock()


class Transform:
    """A transformed function.

    Attributes:
        func: what it transforms.
        options: its keywords.
        extras: makes what its operator needs beside the arguments.
    """

    def __init__(
        self, func: Callable[..., Any], options: Options, extras: Extras | None = None
    ) -> None:
        check_options(func, options)
        self.func, self.options, self.extras = func, options, extras
        self.__funcjac_key__ = _token(options)
        functools.update_wrapper(self, func, updated=())
        vars(self).pop("__wrapped__", None)  # it would be copied and pickled a second time

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.options.engine == "vmap" and "fwd" in self.options.mode
        if not forward or torch.compiler.is_compiling():
            return self.evaluate(args, kwargs)
        with DUAL_LEVELS:
            return self.evaluate(args, kwargs)

    def evaluate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome | None = None
    ) -> Any:
        """The result; ``outcome`` takes down what happened on the way."""
        token = self.__funcjac_key__
        if is_transformed():
            call = self.bind(args, kwargs)
            return self.options.operator.assemble(call, solve_inside(call, token))
        if torch.is_inference_mode_enabled():
            return self._without_inference(args, kwargs, outcome)
        call = self.bind(args, kwargs)
        if any(map(_is_inference, call.leaves)):
            return self._without_inference(args, kwargs, outcome)
        return self.options.operator.assemble(call, solve(call, token, outcome))

    def _without_inference(self, args: Any, kwargs: Any, outcome: Outcome | None) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            args, kwargs = usable((args, kwargs))
            return self.evaluate(args, kwargs, outcome)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = bind(self.func, self.options, args, kwargs)
        if self.extras is None:
            return call
        leaves, dims = self.extras(call, args, kwargs)
        return with_extras(call, leaves, dims) if leaves else call

    def __repr__(self) -> str:
        name = getattr(self.func, "__qualname__", None) or _brief(self.func)
        own = fields(Options)
        given = [
            f"{f.name}={getattr(self.options, f.name)!r}"
            for f in own
            if f.name not in ("name", "operator") and getattr(self.options, f.name) != f.default
        ]
        return f"{self.options.name}({', '.join([name, *self.options.operator.words(), *given])})"

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Bind like a function where it is an attribute of a class."""
        return self if instance is None else types.MethodType(self, instance)

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        """A copy of the function too, with modules that it closes over as they are copied."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.func = _copied(self.func, memo)
        return new


def _brief(func: Any) -> str:
    if isinstance(func, nn.Module):
        return f"{type(func).__name__}(…)"
    return repr(func).partition("\n")[0]


def _copied(func: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(func, types.FunctionType) or not func.__closure__:
        return copy.deepcopy(func, memo)
    cells = [_copied_cell(cell, memo) for cell in func.__closure__]
    if all(one is other for one, other in zip(cells, func.__closure__)):
        return func
    new = types.FunctionType(
        func.__code__, func.__globals__, func.__name__, func.__defaults__, tuple(cells)
    )
    new.__kwdefaults__ = func.__kwdefaults__
    return functools.update_wrapper(new, func)


def _copied_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # a name that is bound later
        return cell
    if isinstance(content, types.FunctionType):
        copied = _copied(content, memo)
        return cell if copied is content else types.CellType(copied)
    if isinstance(content, nn.Module) or id(content) in memo:
        return types.CellType(copy.deepcopy(content, memo))
    return cell


def _token(options: Options) -> Any:
    """The keywords as part of a key."""
    operator = options.operator
    return (
        options.name,
        options.argnums,
        repr(options.in_dims),
        repr(options.out_dims),
        options.mode,
        options.engine,
        options.chunk_size,
        options.has_aux,
        options.return_value,
        options.randomness,
        tuple(operator.words()),
    )


def transform_of(transformed: Any, name: str) -> Transform:
    """What a transform returned.

    Raises:
        TypeError: it does not come from funcjac.
    """
    if not isinstance(transformed, Transform):
        raise TypeError(
            f"{name}: expected a function returned by a funcjac transform, got "
            f"{type(transformed).__name__}. Wrap it first, as in batch_jacobian(func)."
        )
    return transformed


def _is_inference(leaf: Any) -> bool:
    if type(leaf) is not Tensor and (not isinstance(leaf, Tensor) or is_uninitialized(leaf)):
        return False
    return leaf.is_inference()


def looks(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` raise inside of transforms, where values cannot be looked at."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_functional():
            raise RuntimeError(
                f"{function.__name__}: expected to be called outside of torch.func transforms and "
                "torch.compile, where values can be looked at. Call it on plain tensors."
            )
        return function(*args, **kwargs)

    return outside


def usable(tree: Any) -> Any:
    """Copies of inference tensors, which autograd cannot save."""
    return pytree.map_tensors(lambda x: x.clone() if _is_inference(x) else x, tree)
