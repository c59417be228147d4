"""One call of a batched function, its arguments taken apart.

Every engine works on calls: the whole batch is a call, and so is a single row, as a batch of one.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.check_tensors import DTYPES, check_arguments, check_input, check_output
from funcjac._arguments.layout import Layout, Options, check_batch_sizes, is_constant, make_layout
from funcjac._arguments.pytree import TreeSpec
from funcjac._torch_faults.replace import UseReplacements
from funcjac.errors import refuse


class Output(NamedTuple):
    """What ``func`` returned: tensors with the batch first, their structure, the rest."""

    leaves: list[Tensor]
    spec: TreeSpec | None
    aux: Any = None


class Call(NamedTuple):
    """One call of a batched function ``func`` with batch size ``batch``."""

    func: Callable[..., Any]
    options: Options
    layout: Layout
    leaves: list[Any]
    kwargs: dict[str, Any]
    batch: int
    clone: bool = False  # ``func`` works in place on its arguments and must be given copies
    replaced: bool = False  # replacements run of what torch differentiates wrongly
    compiles: bool = False  # torch.compile made a part of ``func``
    extra: int = 0  # how many of the last leaves are no arguments of ``func``, but of the operator

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


# What the structure of arguments settles, for all transforms of the process.
_LAYOUTS: dict[Any, Layout] = {}
_MOST_LAYOUTS = 1024


def bind(
    func: Callable[..., Any],
    options: Options,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    compiling: bool = False,
    differentiate: bool = True,
) -> Call:
    """Take the arguments apart; refuse inputs that cannot be differentiated, if they will be."""
    leaves, spec, plain = list(args), None, not compiling and all(map(is_plain, args))
    if not plain and not (compiling and all(isinstance(arg, Tensor) for arg in args)):
        leaves, spec = pytree.flatten_args(args)
    if compiling:  # the compiler remembers by itself, and cannot hash a spec
        layout = make_layout(options, args, leaves, spec)
    else:
        if not plain or kwargs:
            check_arguments(options.name, [*leaves, *pytree.tensors(kwargs)])
        kinds = tuple(map(_ndim, leaves)) if plain else (spec, *map(_kind, leaves))
        dims = options.in_dims
        key = (options.argnums, dims if type(dims) is int else repr(dims), kinds)
        layout = _LAYOUTS.get(key)
        if layout is None:
            layout = make_layout(options, args, leaves, spec)
            if len(_LAYOUTS) >= _MOST_LAYOUTS:
                _LAYOUTS.clear()
            _LAYOUTS[key] = layout
    batch = leaves[layout.batched[0]].shape[layout.dims[layout.batched[0]]]
    if len(layout.batched) > 1:
        check_batch_sizes(options.name, layout, leaves)
    call = Call(func, options, layout, leaves, kwargs, batch)
    if not differentiate:
        return call
    for leaf in [] if plain else call.inputs:
        check_input(options.name, leaf)
    prepare = getattr(options.operator, "prepare", None)
    return call if prepare is None else prepare(call, args, kwargs)


_ndim = operator.attrgetter("ndim")


def _kind(leaf: Any) -> Any:
    # True == 1, so what is no tensor must not look like a number of dimensions
    return (leaf.ndim, is_constant(leaf)) if isinstance(leaf, Tensor) else str(leaf is None)


def with_extras(call: Call, extras: list[Any], dims: tuple[int | None, ...]) -> Call:
    """The call with leaves of the operator's own behind the arguments."""
    layout = call.layout
    batched = [i for i, dim in enumerate(dims, len(layout.dims)) if dim is not None]
    layout = replace(layout, dims=layout.dims + dims, batched=(*layout.batched, *batched))
    extra, leaves = call.extra + len(extras), [*call.leaves, *extras]
    return call._replace(leaves=leaves, layout=layout, extra=extra)


def is_plain(x: Any) -> bool:
    """Whether it is what most arguments and outputs are, and need not be looked at further."""
    return (
        type(x) is Tensor
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and not (x.is_nested or x.is_meta)
    )


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
    dims = _output_dims(name, out_dims, out, len(leaves))
    tensors = [_as_batch_first(name, leaf, dim, batch) for leaf, dim in zip(leaves, dims)]
    return Output(tensors, spec, aux)


def _output_dims(name: str, out_dims: Any, out: Any, count: int) -> list[int]:
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


def _as_batch_first(name: str, leaf: Any, dim: int, batch: int) -> Tensor:
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
