"""From the arguments of a call to its leaves, their batch dimensions and the batch size."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Layout, Options
from funcjac._arguments.check_tensors import check_arguments, check_input
from funcjac._arguments.pytree import TreeSpec
from funcjac.errors import refuse

# What the structure of arguments settles, for all transforms of the process.
_LAYOUTS: dict[Any, Layout] = {}
_MOST_LAYOUTS = 1024


def bind(
    func: Callable[..., Any], options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Call:
    """Take the arguments apart.

    Raises:
        TypeError, ValueError: the arguments are not those of a batched function.
    """
    if torch.compiler.is_compiling():  # the compiler remembers by itself, and cannot hash a spec
        leaves, spec = pytree.flatten_args(args)
        layout = make_layout(options, args, leaves, spec)
    elif all(type(arg) is Tensor for arg in args):
        leaves = list(args)
        check_arguments(options.name, leaves)
        layout = _remembered(options, tuple([arg.ndim for arg in args]), args, None)
    else:
        leaves, spec = pytree.flatten_args(args)
        check_arguments(options.name, leaves)
        key = (spec, *[_kind(leaf) for leaf in leaves])
        layout = _remembered(options, key, args, (leaves, spec))
    if kwargs and not torch.compiler.is_compiling():
        check_arguments(options.name, pytree.tensors(kwargs))
    return Call(func, options, layout, leaves, kwargs, batch_size(options.name, layout, leaves))


def _kind(leaf: Any) -> Any:
    # True == 1, so what is no tensor must not look like a number of dimensions
    return (leaf.ndim, _is_constant(leaf)) if isinstance(leaf, Tensor) else str(leaf is None)


def _is_constant(leaf: Tensor) -> bool:
    """Whether it is a tensor of integers or booleans, which has no derivative."""
    return not (leaf.is_floating_point() or leaf.is_complex())


def _remembered(options: Options, kinds: Any, args: tuple[Any, ...], flat: Any) -> Layout:
    dims = options.in_dims
    key = (options.argnums, dims if type(dims) is int else repr(dims), kinds)
    layout = _LAYOUTS.get(key)
    if layout is None:
        leaves, spec = pytree.flatten_args(args) if flat is None else flat
        layout = make_layout(options, args, leaves, spec)
        if len(_LAYOUTS) >= _MOST_LAYOUTS:
            _LAYOUTS.clear()
        _LAYOUTS[key] = layout
    return layout


def with_extras(call: Call, extras: list[Any], dims: tuple[int | None, ...]) -> Call:
    """The call with leaves of the operator's own behind the arguments."""
    old = call.layout
    batched = [i for i, dim in enumerate(dims, len(old.dims)) if dim is not None]
    layout = replace(old, dims=old.dims + dims, batched=(*old.batched, *batched))
    return call._replace(leaves=[*call.leaves, *extras], layout=layout, extra=len(extras))


def check_inputs(call: Call) -> None:
    """Refuse arguments that cannot be differentiated.

    Raises:
        TypeError: an input is not a dense tensor of real floating-point dtype.
    """
    for i in call.layout.diff:
        check_input(call.options.name, call.leaves[i])


def make_layout(
    options: Options, args: tuple[Any, ...], leaves: list[Any], spec: TreeSpec
) -> Layout:
    dims = _leaf_dims(options, args, leaves)
    argnums = _as_argnums(options, len(args))
    sizes = [len(pytree.flatten_args(arg)[0]) for arg in args]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    diff = tuple(
        i
        for a in argnums
        for i in range(starts[a], starts[a] + sizes[a])
        if leaves[i] is not None and not (args[a] is not leaves[i] and _is_left_out(leaves[i]))
    )
    trees = [_differentiated(args[a]) for a in argnums]
    in_spec = pytree.flatten(trees[0] if isinstance(options.argnums, int) else tuple(trees))[1]
    batched = tuple(i for i, dim in enumerate(dims) if dim is not None)
    if not batched:
        raise _nothing_batched(options, leaves)
    if not diff and any(isinstance(leaf, Tensor) and _is_left_out(leaf) for leaf in leaves):
        expected = "a differentiated argument of real floating-point dtype"
        remedy = "Pass integers as another argument and leave them out of argnums."
        raise refuse(options.name, TypeError, expected, "integers and booleans only", remedy)
    if not diff:
        raise refuse(
            options.name,
            ValueError,
            "a tensor to differentiate",
            f"none in argnums={options.argnums!r}",
            "Name in argnums a positional argument that holds tensors.",
        )
    plain = len(leaves) == len(args) and all(map(operator.is_, args, leaves))
    diff_dims = tuple([dims[i] for i in diff])
    return Layout(spec, tuple(dims), batched, diff, in_spec, plain, diff_dims)


def _is_left_out(leaf: Any) -> bool:
    """Whether a leaf inside of a tree is a constant; an argument of its own is refused."""
    return isinstance(leaf, Tensor) and _is_constant(leaf)


def _differentiated(arg: Any) -> Any:
    """An argument with ``None`` for its constants."""
    if isinstance(arg, Tensor):
        return arg
    return pytree.map_leaves(lambda leaf: None if _is_left_out(leaf) else leaf, arg)


def _nothing_batched(options: Options, leaves: list[Any]) -> Exception:
    kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
    got = f"in_dims={options.in_dims!r} and {len(leaves)} argument leaves"
    got += f" of type {', '.join(kinds)}" if kinds else ""
    remedy = "Give every batched argument its dimension in in_dims."
    if any(hasattr(leaf, "__array__") and not isinstance(leaf, Tensor) for leaf in leaves):
        remedy = f"Pass an array x as torch.from_numpy(x). {remedy}"
    elif any(isinstance(leaf, (int, float, complex)) for leaf in leaves):
        remedy = f"Make a tensor of numbers and lists by torch.as_tensor. {remedy}"
    return refuse(options.name, ValueError, "at least one batched tensor argument", got, remedy)


def _leaf_dims(options: Options, args: tuple[Any, ...], leaves: list[Any]) -> list[int | None]:
    """One batch dimension for each leaf, from 0; ``None`` for what all rows share."""
    in_dims = options.in_dims
    if isinstance(in_dims, (tuple, list)) and len(in_dims) != len(args):
        raise refuse(
            options.name,
            ValueError,
            f"in_dims to have one entry for each of the {len(args)} positional arguments",
            f"{len(in_dims)} entries in {in_dims!r}",
            "Give None for an argument that all rows share.",
        )
    try:
        dims = pytree.broadcast(in_dims if isinstance(in_dims, int) else tuple(in_dims), args)
    except ValueError:
        raise refuse(
            options.name,
            ValueError,
            "in_dims to be an int or a prefix tree of the arguments",
            repr(in_dims),
            f"The arguments are {pytree.sketch(args)}.",
        ) from None
    return [_leaf_dim(options.name, leaf, dim) for leaf, dim in zip(leaves, dims)]


def _leaf_dim(name: str, leaf: Any, dim: Any) -> int | None:
    if dim is None or not isinstance(leaf, Tensor):
        return None
    if type(dim) is not int:
        remedy = "Give each argument the number of its batch dimension, or None."
        raise refuse(name, TypeError, "in_dims to hold ints and None", type(dim).__name__, remedy)
    if not -leaf.ndim <= dim < leaf.ndim:
        raise refuse(
            name,
            ValueError,
            f"an argument with a batch dimension {dim}",
            f"shape {tuple(leaf.shape)}",
            "Set its entry of in_dims to None if all rows share it.",
        )
    return dim % leaf.ndim


def _as_argnums(options: Options, count: int) -> tuple[int, ...]:
    given = (options.argnums,) if isinstance(options.argnums, int) else options.argnums
    for argnum in given:
        if not -count <= argnum < count:
            raise refuse(
                options.name,
                ValueError,
                f"argnums to index {count} positional arguments",
                options.argnums,
                "Arguments to differentiate must be passed by position.",
            )
    argnums = tuple(argnum % count for argnum in given)
    if len(set(argnums)) != len(argnums):
        remedy = "Negative numbers count from the last argument."
        raise refuse(options.name, ValueError, "argnums to be unique", options.argnums, remedy)
    return argnums


def batch_size(name: str, layout: Layout, leaves: list[Any]) -> int:
    first = layout.batched[0]
    batch = leaves[first].shape[layout.dims[first]]
    for i in layout.batched[1:]:
        if leaves[i].shape[layout.dims[i]] != batch:
            sizes = [leaves[i].shape[layout.dims[i]] for i in layout.batched]
            shapes = [tuple(leaves[i].shape) for i in layout.batched]
            raise refuse(
                name,
                ValueError,
                "all batched arguments to have the same batch size",
                f"{sizes} of shapes {shapes}",
                "If they are of one sample, give each a batch dimension, as in x.unsqueeze(0). Set "
                "in_dims to None for arguments that all rows share.",
            )
    return batch
