"""Batch dimensions of arguments and outputs, and the batch size that arguments share."""

from typing import Any

from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.check_tensors import check_output
from funcjac.errors import refuse


def argument_dims(
    name: str, in_dims: Any, args: tuple[Any, ...], leaves: list[Any]
) -> list[int | None]:
    """One batch dimension for each leaf, from 0; ``None`` for what all rows share."""
    if isinstance(in_dims, int):
        return [_argument_dim(name, leaf, in_dims) for leaf in leaves]
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


def check_batch_sizes(name: str, layout: Any, leaves: list[Any]) -> None:
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


def output_dims(name: str, out_dims: Any, out: Any, count: int) -> list[int]:
    """One batch dimension for each leaf of an output."""
    if type(out_dims) is int:
        return [out_dims] * count
    try:
        pairs = zip(pytree.broadcast(out_dims, out), pytree.flatten_args(out)[0])
        return [dim for dim, leaf in pairs if leaf is not None]
    except ValueError:
        expected = "out_dims to be an int or a prefix tree of func's output"
        remedy = f"The output is {pytree.sketch(out)}."
        raise refuse(name, ValueError, expected, repr(out_dims), remedy) from None


def as_batch_first(name: str, leaf: Any, dim: int, batch: int) -> Tensor:
    """An output with its batch dimension first."""
    check_output(name, leaf)
    if not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != batch:
        expected = f"func to return a batch of {batch} in dimension {dim}"
        remedy = (
            "A batched function returns one row for each row of its input; "
            "wrap a function of one sample in torch.vmap."
        )
        raise refuse(name, ValueError, expected, f"shape {tuple(leaf.shape)}", remedy)
    return leaf if dim == 0 else leaf.movedim(dim, 0)
