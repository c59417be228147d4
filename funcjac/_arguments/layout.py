"""The keywords of a transform, and the layout of arguments: batched leaves, differentiated ones."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.pytree import TreeSpec
from funcjac.errors import refuse

ENGINES = ("sum", "vmap", "loop")


@dataclass(frozen=True)
class Options:
    """The keywords of one transform."""

    name: str
    argnums: int | tuple[int, ...] = 0
    in_dims: Any = 0
    out_dims: Any = 0
    mode: str = "auto"
    engine: str = "auto"
    chunk_size: int | None = None
    has_aux: bool = False
    return_value: bool = False
    randomness: str = "error"
    check: bool | str = "auto"
    operator: Any = None


@dataclass(frozen=True)
class Layout:
    """What the structure of the arguments settles, whatever their values.

    Attributes:
        dims: batch dimension of each leaf, ``None`` for what all rows share.
        batched: the leaves that have one.
        diff: the leaves to differentiate, in the order of ``argnums``.
        in_spec: how blocks, one for each of ``diff``, become the structure of the input;
            ``None`` for the one block itself.
        plain: whether the leaves are the arguments.
        diff_dims: batch dimensions of the leaves to differentiate.
    """

    spec: TreeSpec | None
    dims: tuple[int | None, ...]
    batched: tuple[int, ...]
    diff: tuple[int, ...]
    in_spec: TreeSpec | None
    plain: bool
    diff_dims: tuple[int | None, ...]


def as_constants(value: Any) -> Any:
    """Numbers in tuples as constants: Dynamo takes attributes for sizes that may change."""
    if isinstance(value, tuple):
        return tuple([as_constants(entry) for entry in value])
    return operator.index(value) if type(value) is int else value


def make_layout(
    options: Options, args: tuple[Any, ...], leaves: list[Any], spec: TreeSpec | None
) -> Layout:
    dims = _argument_dims(options, args, leaves)
    argnums = _as_argnums(options, len(args))
    plain = len(leaves) == len(args) and all(map(operator.is_, args, leaves))
    sizes = [1 if plain else len(pytree.flatten_args(arg)[0]) for arg in args]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    # Constants inside of a tree are left out; an argument of its own is refused later.
    diff = tuple(
        i
        for a in argnums
        for i in range(starts[a], starts[a] + sizes[a])
        if leaves[i] is not None and (args[a] is leaves[i] or not is_constant(leaves[i]))
    )
    batched = tuple(i for i, dim in enumerate(dims) if dim is not None)
    if not batched:
        raise _nothing_batched(options, leaves)
    if not diff:
        raise _nothing_differentiated(options, leaves)
    trees = tuple([_without_constants(args[a]) for a in argnums])
    tree = trees[0] if isinstance(options.argnums, int) else trees
    in_spec = None if isinstance(tree, Tensor) else pytree.flatten(tree)[1]
    return Layout(spec, tuple(dims), batched, diff, in_spec, plain, tuple([dims[i] for i in diff]))


def _argument_dims(options: Options, args: tuple[Any, ...], leaves: list[Any]) -> list[int | None]:
    """One batch dimension for each leaf, from 0; ``None`` for what all rows share."""
    name, in_dims, dims = options.name, options.in_dims, [options.in_dims] * len(leaves)
    if not isinstance(in_dims, int):
        if len(in_dims) != len(args):
            expected = f"in_dims to have one entry for each of the {len(args)} positional arguments"
            got = f"{len(in_dims)} entries in {in_dims!r}"
            remedy = "Give None for an argument that all rows share."
            raise refuse(name, ValueError, expected, got, remedy)
        try:
            dims = pytree.broadcast(tuple(in_dims), args)
        except ValueError:
            expected = "in_dims to be an int or a prefix tree of the arguments"
            remedy = f"The arguments are {pytree.sketch(args)}."
            raise refuse(name, ValueError, expected, repr(in_dims), remedy) from None
    return [_argument_dim(name, leaf, dim) for leaf, dim in zip(leaves, dims)]


def _argument_dim(name: str, leaf: Any, dim: Any) -> int | None:
    if dim is None or not isinstance(leaf, Tensor):
        return None
    if type(dim) is not int:
        remedy = "Give each argument the number of its batch dimension, or None."
        raise refuse(name, TypeError, "in_dims to hold ints and None", type(dim).__name__, remedy)
    if not -leaf.ndim <= dim < leaf.ndim:
        expected, got = f"an argument with a batch dimension {dim}", f"shape {tuple(leaf.shape)}"
        remedy = "Set its entry of in_dims to None if all rows share it."
        raise refuse(name, ValueError, expected, got, remedy)
    return dim % leaf.ndim


def _without_constants(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg
    return pytree.map_tensors(lambda leaf: None if is_constant(leaf) else leaf, arg)


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
    if any(map(is_constant, leaves)):
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


def check_batch_sizes(name: str, layout: Layout, leaves: list[Any]) -> None:
    """Refuse batched arguments of unequal batch sizes."""
    sizes = [leaves[i].shape[layout.dims[i]] for i in layout.batched]
    for size in sizes[1:]:
        if size != sizes[0]:
            expected = "all batched arguments to have the same batch size"
            got = f"{sizes} of shapes {[tuple(leaves[i].shape) for i in layout.batched]}"
            remedy = (
                "If they are of one sample, give each a batch dimension, as in x.unsqueeze(0). Set "
                "in_dims to None for arguments that all rows share."
            )
            raise refuse(name, ValueError, expected, got, remedy)


def is_constant(leaf: Any) -> bool:
    """Whether it is a tensor of integers or booleans, which has no derivative."""
    return isinstance(leaf, Tensor) and not (leaf.is_floating_point() or leaf.is_complex())
