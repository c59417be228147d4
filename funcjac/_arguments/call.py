"""What a batched function is: arguments, their batch dimensions, its outputs.

A :class:`Call` is one call of a batched function with its arguments taken
apart. Every engine works on calls: the whole batch is a call, and so is a single
row, as a batch of one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.check_tensors import check_output
from funcjac._arguments.pytree import Tree, TreeSpec
from funcjac._torch_faults import UseReplacements
from funcjac.errors import refuse

ENGINES = ("sum", "vmap", "loop")


@dataclass(frozen=True)
class Options:
    """The words of one transform, checked when it is made."""

    name: str
    argnums: int | tuple[int, ...] = 0
    in_dims: Tree = 0
    out_dims: Tree = 0
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
        in_spec: how blocks, one for each of ``diff``, become the structure of the input.
        plain: whether the leaves are the arguments.
        diff_dims: batch dimensions of the leaves to differentiate.
    """

    spec: TreeSpec
    dims: tuple[int | None, ...]
    batched: tuple[int, ...]
    diff: tuple[int, ...]
    in_spec: TreeSpec
    plain: bool
    diff_dims: tuple[int | None, ...]


class Output(NamedTuple):
    """What ``func`` returned: tensors with the batch first, their structure, the rest."""

    leaves: list[Tensor]
    spec: TreeSpec | None
    aux: Any = None


class Call(NamedTuple):
    """One call of a batched function ``func`` with batch size ``batch``.

    Attributes:
        clone: whether ``func`` works in place on its arguments and must be given copies.
        extra: how many of the last leaves are no arguments of ``func``, but of the operator.
        replaced: whether ``func`` runs with replacements of what torch differentiates wrongly.
    """

    func: Callable[..., Any]
    options: Options
    layout: Layout
    leaves: list[Any]
    kwargs: dict[str, Any]
    batch: int
    clone: bool = False
    replaced: bool = False
    extra: int = 0

    @property
    def extras(self) -> list[Any]:
        """What the operator was given: weights, probes."""
        return self.leaves[len(self.leaves) - self.extra :]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors to differentiate."""
        return [self.leaves[i] for i in self.layout.diff]

    def with_inputs(self, inputs: list[Tensor] | tuple[Tensor, ...]) -> "Call":
        leaves = list(self.leaves)
        for i, leaf in zip(self.layout.diff, inputs):
            leaves[i] = leaf
        return self._replace(leaves=leaves)

    def one_row(self, rows: list[Tensor] | tuple[Tensor, ...]) -> "Call":
        """The call on a batch of one; ``rows`` are the batched leaves, of batch size one."""
        leaves = list(self.leaves)
        for i, row in zip(self.layout.batched, rows):
            leaves[i] = row
        return self._replace(leaves=leaves, batch=1)

    def __call__(self, inputs: list[Tensor] | tuple[Tensor, ...]) -> Output:
        """Run ``func`` with ``inputs`` in the place of the differentiated leaves."""
        leaves, kwargs = list(self.leaves), self.kwargs
        for i, leaf in zip(self.layout.diff, inputs):
            leaves[i] = leaf
        if self.extra:
            leaves = leaves[: -self.extra]
        if self.clone:
            leaves, kwargs = pytree.map_tensors(Tensor.clone, (leaves, kwargs))
        args = leaves if self.layout.plain else pytree.unflatten(self.layout.spec, leaves)
        if self.replaced:
            with UseReplacements():
                out = self.func(*args, **kwargs)
        else:
            out = self.func(*args, **kwargs)
        return as_output(self.options, out, self.batch)


def as_output(options: Options, out: Any, batch: int) -> Output:
    """Take apart what ``func`` returned, and refuse what has no Jacobian."""
    if type(out) is Tensor and type(options.out_dims) is int and not options.has_aux:
        return Output([_as_batch_first(options.name, out, options.out_dims, batch)], None)
    aux = None
    if options.has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise refuse(
                options.name,
                TypeError,
                "func to return a pair (output, aux) with has_aux=True",
                type(out).__name__,
                "Return the pair, or drop has_aux.",
            )
        out, aux = out
    leaves, spec = pytree.flatten(out)
    dims = _out_dims(options, out, len(leaves))
    tensors = [_as_batch_first(options.name, leaf, dim, batch) for leaf, dim in zip(leaves, dims)]
    if not tensors:
        raise refuse(
            options.name,
            TypeError,
            "func to return at least one tensor",
            type(out).__name__,
            "Return what is to be differentiated.",
        )
    return Output(tensors, spec, aux)


def _out_dims(options: Options, out: Tree, count: int) -> list[int]:
    if type(options.out_dims) is int:
        return [options.out_dims] * count
    try:
        dims = pytree.broadcast(options.out_dims, out)
    except ValueError:
        raise refuse(
            options.name,
            ValueError,
            "out_dims to be an int or a prefix tree of func's output",
            repr(options.out_dims),
            f"The output is {pytree.sketch(out)}.",
        ) from None
    return dims


def _as_batch_first(name: str, leaf: Any, dim: int, batch: int) -> Tensor:
    check_output(name, leaf)
    if not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != batch:
        raise refuse(
            name,
            ValueError,
            f"func to return a batch of {batch} in dimension {dim}",
            f"shape {tuple(leaf.shape)}",
            "A batched function returns one row for each row of its input; "
            "wrap a function of one sample in torch.vmap.",
        )
    return leaf if dim == 0 else leaf.movedim(dim, 0)
