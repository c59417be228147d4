"""From the arguments of a call to its leaves, their batch dimensions and the batch size."""

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._batched import Call, Layout, Options
from funcjac._kinds import check_arguments, check_input
from funcjac._tree import TreeSpec
from funcjac.errors import refuse


def bind(
    func: Callable[..., Any],
    options: Options,
    layouts: dict[Any, Layout],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    """Take the arguments apart; ``layouts`` remembers what their structure settles.

    Raises:
        TypeError, ValueError: the arguments are not those of a batched function.
    """
    if torch.compiler.is_compiling():  # the compiler remembers by itself, and cannot hash a spec
        leaves, spec = _tree.flatten_args(args)
        layout = make_layout(options, args, leaves, spec)
    elif all(type(arg) is Tensor for arg in args):
        leaves = list(args)
        check_arguments(options.name, leaves)
        key = tuple([arg.ndim for arg in args])
        layout = layouts.get(key) or _remembered(options, layouts, key, args)
    else:
        leaves, spec = _tree.flatten_args(args)
        check_arguments(options.name, leaves)
        # True == 1, so what is no tensor must not look like a number of dimensions
        key = (spec, *[x.ndim if isinstance(x, Tensor) else str(x is None) for x in leaves])
        layout = layouts.get(key) or _remembered(options, layouts, key, args)
    if kwargs and not torch.compiler.is_compiling():
        check_arguments(options.name, _tree.tensors(kwargs))
    return Call(func, options, layout, leaves, kwargs, _batch_size(options.name, layout, leaves))


def _remembered(
    options: Options, layouts: dict[Any, Layout], key: Any, args: tuple[Any, ...]
) -> Layout:
    leaves, spec = _tree.flatten_args(args)
    return layouts.setdefault(key, make_layout(options, args, leaves, spec))


def with_extras(
    call: Call, layouts: dict[Any, Layout], extras: list[Any], dims: tuple[int | None, ...]
) -> Call:
    """The call with leaves of the operator's own behind the arguments."""
    key = (id(call.layout), dims)
    layout = layouts.get(key)
    if layout is None:
        old = call.layout
        batched = [i for i, dim in enumerate(dims, len(old.dims)) if dim is not None]
        layout = replace(old, dims=old.dims + dims, batched=(*old.batched, *batched))
        layout = layouts.setdefault(key, layout)
    return call._replace(leaves=[*call.leaves, *extras], layout=layout, extra=len(extras))


def narrowed(
    call: Call, layouts: dict[Any, Layout], diff: tuple[int, ...], dropped: tuple[int, ...]
) -> Call:
    """The call with only some of its leaves to differentiate, without extras that are dropped."""
    key = (id(call.layout), diff, dropped)
    kept = [i for i in range(len(call.leaves)) if i not in dropped]
    layout = layouts.get(key)
    if layout is None:
        old = call.layout
        batched = tuple([kept.index(i) for i in old.batched if i not in dropped])
        dims = tuple([old.dims[i] for i in kept])
        layout = layouts.setdefault(key, replace(old, diff=diff, dims=dims, batched=batched))
    leaves = [call.leaves[i] for i in kept]
    return call._replace(leaves=leaves, layout=layout, extra=call.extra - len(dropped))


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
    sizes = [len(_tree.flatten_args(arg)[0]) for arg in args]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    diff = tuple(
        i for a in argnums for i in range(starts[a], starts[a] + sizes[a]) if leaves[i] is not None
    )
    inputs = args[argnums[0]] if isinstance(options.argnums, int) else [args[a] for a in argnums]
    in_spec = _tree.flatten(inputs if isinstance(options.argnums, int) else tuple(inputs))[1]
    batched = tuple(i for i, dim in enumerate(dims) if dim is not None)
    if not batched:
        raise _nothing_batched(options, leaves)
    if not diff:
        raise refuse(
            options.name,
            ValueError,
            "a tensor to differentiate",
            f"none in argnums={options.argnums!r}",
            "Name in argnums a positional argument that holds tensors.",
        )
    plain = len(leaves) == len(args) and all(map(operator.is_, args, leaves))
    return Layout(spec, tuple(dims), batched, diff, in_spec, plain)


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
        dims = _tree.broadcast(in_dims if isinstance(in_dims, int) else tuple(in_dims), args)
    except ValueError:
        raise refuse(
            options.name,
            ValueError,
            "in_dims to be an int or a prefix tree of the arguments",
            repr(in_dims),
            f"The arguments are {_tree.sketch(args)}.",
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


def _batch_size(name: str, layout: Layout, leaves: list[Any]) -> int:
    first = layout.batched[0]
    batch = leaves[first].shape[layout.dims[first]]
    for i in layout.batched[1:]:
        if leaves[i].shape[layout.dims[i]] != batch:
            sizes = [leaves[i].shape[layout.dims[i]] for i in layout.batched]
            raise refuse(
                name,
                ValueError,
                "all batched arguments to have the same batch size",
                sizes,
                "Set in_dims to None for arguments that all rows share.",
            )
    return batch
