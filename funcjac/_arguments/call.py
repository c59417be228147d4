"""One call of a batched function, its arguments taken apart.

Every engine works on calls: the whole batch is a call, and so is a single row, as a batch of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.batch_sizes import as_batch_first, output_dims
from funcjac._arguments.check_tensors import is_plain
from funcjac._arguments.pytree import Tree, TreeSpec
from funcjac._torch_faults import UseReplacements
from funcjac.errors import refuse

ENGINES = ("sum", "vmap", "loop")


@dataclass(frozen=True)
class Options:
    """The keywords of one transform."""

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

    def with_inputs(self, inputs: Sequence[Tensor]) -> "Call":
        return self._replace(leaves=self._with(self.layout.diff, inputs))

    def one_row(self, rows: Sequence[Tensor]) -> "Call":
        """The call on a batch of one; ``rows`` are the batched leaves, of batch size one."""
        return self._replace(leaves=self._with(self.layout.batched, rows), batch=1)

    def _with(self, places: tuple[int, ...], tensors: Sequence[Tensor]) -> list[Any]:
        """The leaves, with ``tensors`` in some places."""
        leaves = list(self.leaves)
        for i, tensor in zip(places, tensors):
            leaves[i] = tensor
        return leaves

    def __call__(self, inputs: Sequence[Tensor]) -> Output:
        """Run ``func`` with ``inputs`` in the place of the differentiated leaves."""
        leaves, kwargs = self.leaves[: len(self.leaves) - self.extra], self.kwargs
        for i, x in zip(self.layout.diff, inputs):
            leaves[i] = x
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
    name, out_dims, aux = options.name, options.out_dims, None
    if is_plain(out) and out_dims == 0 and not options.has_aux and out.shape[:1] == (batch,):
        return Output([out], None)
    if options.has_aux:
        if not (isinstance(out, tuple) and len(out) == 2):
            expected = "func to return a pair (output, aux) with has_aux=True"
            remedy = "Return the pair, or drop has_aux."
            raise refuse(name, TypeError, expected, type(out).__name__, remedy)
        out, aux = out
    leaves, spec = pytree.flatten(out)
    if not leaves:
        expected, remedy = "func to return at least one tensor", "Return what to differentiate."
        raise refuse(name, TypeError, expected, type(out).__name__, remedy)
    dims = output_dims(name, out_dims, out, len(leaves))
    tensors = [as_batch_first(name, leaf, dim, batch) for leaf, dim in zip(leaves, dims)]
    return Output(tensors, spec, aux)
