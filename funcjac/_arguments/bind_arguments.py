"""Binds the arguments of a call: their leaves, and which of them are batched and differentiated."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.batch_sizes import argument_dims, check_batch_sizes
from funcjac._arguments.call import Call, Layout, Options
from funcjac._arguments.check_tensors import check_arguments, check_input, is_plain
from funcjac._arguments.pytree import TreeSpec
from funcjac.errors import refuse

# What the structure of arguments settles, for all transforms of the process.
_LAYOUTS: dict[Any, Layout] = {}
_MOST_LAYOUTS = 1024


def bind(
    func: Callable[..., Any],
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    differentiate: bool = True,
) -> Call:
    """Take the arguments apart; refuse inputs that cannot be differentiated, if they will be.

    Raises:
        TypeError, ValueError: the arguments are not those of a batched function.
    """
    if torch.compiler.is_compiling():  # the compiler remembers by itself, and cannot hash a spec
        leaves, spec = pytree.flatten_args(args)
        layout, plain = make_layout(options, args, leaves, spec), False
    else:
        leaves, plain, dims = list(args), all(map(is_plain, args)), options.in_dims
        kinds: Any = tuple(map(_ndim, args)) if plain else None
        if not plain:
            leaves, spec = pytree.flatten_args(args)
            check_arguments(options.name, leaves)
            kinds = (spec, *map(_kind, leaves))
        key = (options.argnums, dims if type(dims) is int else repr(dims), kinds)
        layout = _LAYOUTS.get(key) or _remember(key, options, args)
        if kwargs:
            check_arguments(options.name, pytree.tensors(kwargs))
    batch = leaves[layout.batched[0]].shape[layout.dims[layout.batched[0]]]
    if len(layout.batched) > 1:
        check_batch_sizes(options.name, layout, leaves)
    call = Call(func, options, layout, leaves, kwargs, batch)
    if not differentiate:
        return call
    if not plain:
        check_inputs(call)
    prepare = getattr(options.operator, "prepare", None)
    return call if prepare is None else prepare(call, args, kwargs)


_ndim = operator.attrgetter("ndim")


def _kind(leaf: Any) -> Any:
    # True == 1, so what is no tensor must not look like a number of dimensions
    return (leaf.ndim, _is_constant(leaf)) if isinstance(leaf, Tensor) else str(leaf is None)


def _is_constant(leaf: Any) -> bool:
    """Whether it is a tensor of integers or booleans, which has no derivative."""
    return isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())


def _remember(key: Any, options: Options, args: tuple[Any, ...]) -> Layout:
    layout = make_layout(options, args, *pytree.flatten_args(args))
    if len(_LAYOUTS) >= _MOST_LAYOUTS:
        _LAYOUTS.clear()
    _LAYOUTS[key] = layout
    return layout


def with_extras(call: Call, extras: list[Any], dims: tuple[int | None, ...]) -> Call:
    """The call with leaves of the operator's own behind the arguments."""
    layout = call.layout
    batched = [i for i, dim in enumerate(dims, len(layout.dims)) if dim is not None]
    layout = replace(layout, dims=layout.dims + dims, batched=(*layout.batched, *batched))
    return call._replace(leaves=[*call.leaves, *extras], layout=layout, extra=len(extras))


def check_inputs(call: Call) -> None:
    """Refuse arguments that cannot be differentiated."""
    for i in call.layout.diff:
        check_input(call.options.name, call.leaves[i])


def make_layout(
    options: Options, args: tuple[Any, ...], leaves: list[Any], spec: TreeSpec
) -> Layout:
    dims = argument_dims(options.name, options.in_dims, args, leaves)
    argnums = _as_argnums(options, len(args))
    sizes = [len(pytree.flatten_args(arg)[0]) for arg in args]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    # Constants inside of a tree are left out; an argument of its own is refused later.
    diff = tuple(
        i
        for a in argnums
        for i in range(starts[a], starts[a] + sizes[a])
        if leaves[i] is not None and (args[a] is leaves[i] or not _is_constant(leaves[i]))
    )
    batched = tuple(i for i, dim in enumerate(dims) if dim is not None)
    if not batched:
        raise _nothing_batched(options, leaves)
    if not diff:
        raise _nothing_differentiated(options, leaves)
    trees = tuple([_without_constants(args[a]) for a in argnums])
    in_spec = pytree.flatten(trees[0] if isinstance(options.argnums, int) else trees)[1]
    plain = len(leaves) == len(args) and all(map(operator.is_, args, leaves))
    return Layout(spec, tuple(dims), batched, diff, in_spec, plain, tuple([dims[i] for i in diff]))


def _without_constants(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg
    return pytree.map_tensors(lambda leaf: None if _is_constant(leaf) else leaf, arg)


def _nothing_batched(options: Options, leaves: list[Any]) -> Exception:
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    got = f"in_dims={options.in_dims!r} and {len(leaves)} argument leaves"
    if others:
        got += f" of type {', '.join(sorted({type(leaf).__name__ for leaf in others}))}"
    remedy = "Give every batched argument its dimension in in_dims."
    if any(hasattr(leaf, "__array__") for leaf in others):
        remedy = f"Pass an array x as torch.from_numpy(x). {remedy}"
    elif any(isinstance(leaf, (int, float, complex)) for leaf in others):
        remedy = f"Make a tensor of numbers and lists by torch.as_tensor. {remedy}"
    return refuse(options.name, ValueError, "at least one batched tensor argument", got, remedy)


def _nothing_differentiated(options: Options, leaves: list[Any]) -> Exception:
    if any(map(_is_constant, leaves)):
        expected = "a differentiated argument of real floating-point dtype"
        remedy = "Pass integers as another argument and leave them out of argnums."
        return refuse(options.name, TypeError, expected, "integers and booleans only", remedy)
    got = f"none in argnums={options.argnums!r}"
    remedy = "Name in argnums a positional argument that holds tensors."
    return refuse(options.name, ValueError, "a tensor to differentiate", got, remedy)


def _as_argnums(options: Options, count: int) -> tuple[int, ...]:
    name, argnums = options.name, options.argnums
    numbers = (argnums,) if isinstance(argnums, int) else argnums
    if any(not -count <= number < count for number in numbers):
        expected = f"argnums to index {count} positional arguments"
        remedy = "Arguments to differentiate must be passed by position."
        raise refuse(name, ValueError, expected, argnums, remedy)
    numbers = tuple([number % count for number in numbers])
    if len(set(numbers)) != len(numbers):
        remedy = "Negative numbers count from the last argument."
        raise refuse(name, ValueError, "argnums to be unique", argnums, remedy)
    return numbers
