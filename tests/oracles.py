"""Slow derivatives that share nothing with funcjac: rows, one output at a time, and differences.

Each oracle takes a function and its arguments as a batched function has them, and returns what a
transform should: output structure outside, input structure inside. Jacobians come by rows, by the
batch and by differences; higher derivatives by rows, each run as a batch of one, by nested
``torch.autograd.grad``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import functional

from tests.tensors import set_seed

NAMESPACE = "funcjac"
# It added derivatives: of aminmax, the second of grid_sample.
SINCE_2_13 = hasattr(F, "linear_cross_entropy")


# --- Jacobians ---------------------------------------------------------------------------


def by_rows(
    func,
    args,
    kwargs=None,
    *,
    argnums=0,
    in_dims=0,
    out_dims=0,
    seed=None,
    replay=False,
    graph=False,
):
    """One row after the other, each as a batch of one; ``replay`` gives each the same draw."""
    call = _Call(func, args, kwargs or {}, argnums, in_dims, out_dims)
    rows = []
    if seed is not None:
        set_seed(seed)
    for b in range(call.batch):
        if seed is not None and replay:
            set_seed(seed)
        rows.append(call.jacobian(call.row(b), [0], graph)[0])
    return call.stack(rows)


def by_batch(func, args, kwargs=None, *, argnums=0, in_dims=0, out_dims=0, seed=None, graph=False):
    """One forward of the whole batch, then each output of row ``b`` by the input of row ``b``.

    The diagonal blocks by definition. It serves what cannot run on a row alone: random draws
    that belong to the batch, and functions whose state moves with each call.
    """
    call = _Call(func, args, kwargs or {}, argnums, in_dims, out_dims)
    if seed is not None:
        set_seed(seed)
    return call.stack(call.jacobian(call.leaves, range(call.batch), graph))


def by_differences(func, args, kwargs=None, *, argnums=0, in_dims=0, out_dims=0, seed=None):
    """Central differences, moving the same entry in all rows at once."""
    call = _Call(func, args, kwargs or {}, argnums, in_dims, out_dims)
    h = 1e-5
    columns = []  # one list of output leaves for each entry of each input
    for i, shape in zip(call.diff, call.in_shapes()):
        x, dim = call.leaves[i], call.dims[i]
        found = []
        for n in range(shape.numel()):
            step = torch.zeros(shape.numel(), dtype=x.dtype)
            step[n] = h
            step = step.view(shape) if dim is None else step.view(shape).unsqueeze(dim)
            sides = []
            for sign in (1, -1):
                if seed is not None:
                    set_seed(seed)
                leaves = list(call.leaves)
                leaves[i] = x.detach() + sign * step
                with torch.no_grad():
                    sides.append([out.clone() for out in call.run(leaves)])
            found.append([(plus - minus) / (2 * h) for plus, minus in zip(*sides)])
        columns.append((shape, found))
    blocks = []
    for o, out in enumerate(call.run(call.leaves)):
        blocks.append(
            [
                torch.stack([column[o] for column in found], -1).reshape((*out.shape, *shape))
                if found
                else out.new_zeros(*out.shape, *shape)
                for shape, found in columns
            ]
        )
    return call.tree(blocks)


class _Call:
    """Arguments as leaves with their batch dimensions, outputs as leaves with the batch first."""

    def __init__(self, func, args, kwargs, argnums, in_dims, out_dims):
        self.func, self.kwargs, self.out_dims = func, kwargs, out_dims
        self.leaves, self.spec = _flatten(args)
        dims = optree.broadcast_prefix(in_dims, args, none_is_leaf=True, namespace=NAMESPACE)
        self.dims = [
            dim % leaf.ndim if isinstance(leaf, Tensor) and dim is not None else None
            for leaf, dim in zip(self.leaves, dims)
        ]
        wanted = [argnums] if isinstance(argnums, int) else list(argnums)
        wanted = [a % len(args) for a in wanted]
        sizes = [len(_flatten(arg)[0]) for arg in args]
        self.diff = [
            i
            for a in wanted
            for i in range(sum(sizes[:a]), sum(sizes[: a + 1]))
            if isinstance(self.leaves[i], Tensor)
        ]
        inputs = args[wanted[0]] if isinstance(argnums, int) else tuple(args[a] for a in wanted)
        self.in_spec = optree.tree_structure(inputs, namespace=NAMESPACE)
        self.out_spec = None
        first = next(i for i, dim in enumerate(self.dims) if dim is not None)
        self.batch = self.leaves[first].shape[self.dims[first]]

    def row(self, b):
        """Arguments as a batch of one."""
        pairs = zip(self.leaves, self.dims)
        return [x if dim is None else x.narrow(dim, b, 1) for x, dim in pairs]

    def in_shapes(self):
        """Shapes of one row of each differentiated leaf."""
        pairs = [(self.leaves[i].shape, self.dims[i]) for i in self.diff]
        return [s if dim is None else s[:dim] + s[dim + 1 :] for s, dim in pairs]

    def run(self, leaves):
        # func may work in place: it never sees a leaf itself
        given = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        out = self.func(*optree.tree_unflatten(self.spec, given), **self.kwargs)
        outs, self.out_spec = optree.tree_flatten(out, namespace=NAMESPACE)
        if isinstance(self.out_dims, int):
            dims = [self.out_dims] * len(outs)
        else:
            dims = optree.broadcast_prefix(self.out_dims, out, namespace=NAMESPACE)
        return [leaf.movedim(dim, 0) for leaf, dim in zip(outs, dims)]

    def jacobian(self, leaves, rows, graph):
        """For each of ``rows``, ``blocks[i][j]`` by plain ``torch.autograd.grad``."""
        leaves = list(leaves)
        for i in self.diff:
            attached = graph and leaves[i].requires_grad
            leaves[i] = leaves[i].clone() if attached else leaves[i].detach().requires_grad_()
        inputs = [leaves[i] for i in self.diff]
        with torch.enable_grad():
            outs = self.run(leaves)
        return [[self._blocks(out[b], inputs, b, graph) for out in outs] for b in rows]

    def _blocks(self, out, inputs, b, graph):
        grads = [gradients(entry, inputs, create_graph=graph) for entry in out.reshape(-1)]
        blocks = []
        for j, (x, shape) in enumerate(zip(inputs, self.in_shapes())):
            dim = self.dims[self.diff[j]]
            rows = [grad[j] if dim is None else grad[j].select(dim, b) for grad in grads]
            block = torch.stack(rows) if rows else x.new_zeros(0, *shape)
            dtype = torch.promote_types(out.dtype, x.dtype)
            blocks.append(block.reshape((*out.shape, *shape)).to(dtype))
        return blocks

    def stack(self, rows):
        if not rows:  # an empty batch: shapes from the function, nothing to differentiate
            outs = self.run(self.leaves)
            shapes = self.in_shapes()
            return self.tree([[out.new_zeros(*out.shape, *s) for s in shapes] for out in outs])
        return self.tree(
            [
                [torch.stack([row[i][j] for row in rows]) for j in range(len(rows[0][0]))]
                for i in range(len(rows[0]))
            ]
        )

    def tree(self, blocks):
        inner = [optree.tree_unflatten(self.in_spec, found) for found in blocks]
        return optree.tree_unflatten(self.out_spec, inner)


def gradients(out: Tensor, inputs: list[Tensor], *, create_graph: bool) -> list[Tensor]:
    """Derivatives of one number; zeros where it does not depend on an input."""
    if not out.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    grads = torch.autograd.grad(
        out, inputs, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, grads)]


def _flatten(tree):
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)


# --- second and higher derivatives -------------------------------------------------------


class Rows(NamedTuple):
    """A batched function as one of flat vectors for each row: ``run[b]: (N,) -> (M,)``."""

    run: list[Callable[[Tensor], Tensor]]
    flat: list[Tensor]  # one (N,) for each row
    in_spec: Any
    in_shapes: list[torch.Size]
    out_spec: Any
    out_shapes: list[torch.Size]

    def as_output(self, flat: Tensor) -> Any:
        """``(B, M)`` in the structure of the output, ``(B, *out)``."""
        return optree.tree_unflatten(self.out_spec, _split(flat, 1, self.out_shapes))

    def as_jacobian(self, flat: Tensor) -> Any:
        """``(B, M, N)`` with the input structure inside that of the output."""
        outs = _split(flat, 1, self.out_shapes)
        last = [_split(out, out.ndim - 1, self.in_shapes) for out in outs]
        inner = [optree.tree_unflatten(self.in_spec, leaves) for leaves in last]
        return optree.tree_unflatten(self.out_spec, inner)

    def as_hessian(self, flat: Tensor) -> Any:
        """``(B, M, N, N)`` with the input structure twice inside that of the output."""
        trees = []
        for out in _split(flat, 1, self.out_shapes):
            rows = []
            for row in _split(out, out.ndim - 2, self.in_shapes):
                leaves = _split(row, row.ndim - 1, self.in_shapes)
                rows.append(optree.tree_unflatten(self.in_spec, leaves))
            trees.append(optree.tree_unflatten(self.in_spec, rows))
        return optree.tree_unflatten(self.out_spec, trees)


class Derivatives(NamedTuple):
    rows: Rows
    value: Tensor  # (B, M)
    jac: Tensor  # (B, M, N)
    hess: Tensor  # (B, M, N, N)

    def diagonal(self) -> Tensor:
        return self.hess.diagonal(dim1=2, dim2=3)

    def laplacian(self, weight: Tensor | None = None) -> Tensor:
        """``(B, M)``; ``weight`` is a matrix ``(N, N)``, or one for each row."""
        if weight is None:
            return self.diagonal().sum(2)
        return torch.einsum("bmij,bij->bm", self.hess, weight.expand(len(self.hess), -1, -1))


def derivatives(func, args, kwargs=None, *, create_graph=False, **words) -> Derivatives:
    """Value, Jacobian and Hessian of each row; with ``create_graph`` attached to everything."""
    rows = rows_of(func, args, kwargs, create_graph=create_graph, **words)
    values, jacs, hessians = [], [], []
    for run, z in zip(rows.run, rows.flat):
        z = z.clone() if create_graph and z.requires_grad else z.detach().requires_grad_()
        with torch.enable_grad():
            value = run(z)
        size = len(z)
        slopes = [gradients(out, [z], create_graph=True)[0] for out in value]
        bends = [
            gradients(entry, [z], create_graph=create_graph)[0] for jac in slopes for entry in jac
        ]
        values.append(value)
        jacs.append(torch.stack(slopes) if slopes else z.new_zeros(0, size))
        hess = torch.stack(bends) if bends else z.new_zeros(0, size)
        hessians.append(hess.reshape(-1, size, size))
    found = [torch.stack(tensors) for tensors in (values, jacs, hessians)]
    return Derivatives(rows, *(found if create_graph else [x.detach() for x in found]))


def hessian(func, args, kwargs=None, **words):
    derived = derivatives(func, args, kwargs, **words)
    return derived.rows.as_hessian(derived.hess)


def diagonal(func, args, kwargs=None, **words):
    derived = derivatives(func, args, kwargs, **words)
    return derived.rows.as_jacobian(derived.diagonal())


def laplacian(func, args, kwargs=None, *, weight=None, **words):
    derived = derivatives(func, args, kwargs, **words)
    return derived.rows.as_output(derived.laplacian(weight))


def divergence(func, args, kwargs=None, *, create_graph=False, **words) -> Tensor:
    """``(B,)``: the trace of each row's Jacobian."""
    rows = rows_of(func, args, kwargs, create_graph=create_graph, **words)
    return torch.stack(
        [
            functional.jacobian(run, z, create_graph=create_graph).trace()
            for run, z in zip(rows.run, rows.flat)
        ]
    )


def partials(func, args, indices, kwargs=None, *, create_graph=False, **words) -> tuple:
    """Mixed partials of any order by nested ``torch.autograd.grad``, one output at a time."""
    rows = rows_of(func, args, kwargs, create_graph=create_graph, **words)
    found = []
    for index in indices:
        flat = []
        for run, z in zip(rows.run, rows.flat):
            attached = create_graph and z.requires_grad
            z = z.clone() if attached else z.detach().requires_grad_()
            with torch.enable_grad():
                outs = [out if out.requires_grad else out + 0 * z.sum() for out in run(z)]
                for i in index:
                    outs = [_slope(out, z)[i] for out in outs]
            flat.append(torch.stack(outs) if create_graph else torch.stack(outs).detach())
        found.append(rows.as_output(torch.stack(flat)))
    return tuple(found)


def _slope(out: Tensor, z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(out, z, create_graph=True, materialize_grads=True)
    return grad if grad.requires_grad else grad + 0 * z  # a constant has derivatives too


def rows_of(
    func, args, kwargs=None, *, argnums=0, in_dims=0, out_dims=0, create_graph=False
) -> Rows:
    call = _Call(func, args, kwargs or {}, argnums, in_dims, out_dims)
    shapes = {}

    def row_of(b):
        row = call.row(b)
        pieces = [row[i] for i in call.diff]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])

        def run(z):
            leaves = list(row)
            for i, part in zip(call.diff, z.split([piece.numel() for piece in pieces])):
                leaves[i] = part.reshape(row[i].shape)
            outs = [out[0] for out in call.run(leaves)]
            shapes["out"] = [out.shape for out in outs]
            return torch.cat([out.reshape(-1) for out in outs])

        return run, flat if create_graph else flat.detach()

    runs, flat = zip(*map(row_of, range(call.batch)))
    runs[0](flat[0])  # for the structure of the output
    return Rows(
        list(runs), list(flat), call.in_spec, call.in_shapes(), call.out_spec, shapes["out"]
    )


def _split(flat: Tensor, dim: int, shapes: list[torch.Size]) -> list[Tensor]:
    """Take dimension ``dim`` apart into one tensor for each of ``shapes``."""
    parts = flat.split([shape.numel() for shape in shapes], dim)
    return [
        part.reshape(*part.shape[:dim], *shape, *part.shape[dim + 1 :])
        for part, shape in zip(parts, shapes)
    ]


# --- functions of one row ----------------------------------------------------------------


def stacked(row):
    """The batched function of a function of one row."""
    return lambda *args: torch.stack([row(*rows) for rows in zip(*args)])


def jacobian_by_rows(row, x, *, create_graph=False):
    """``(B, *out, *in)`` of ``row``: ``(*in) -> (*out)``."""
    return torch.stack([functional.jacobian(row, z, create_graph=create_graph) for z in x])


def hessian_by_rows(row, x):
    """``(B, M, N, N)`` of ``row``: ``(N,) -> (M,)``."""
    size = len(row(x[0]))
    hessian = lambda z: torch.stack(
        [functional.hessian(lambda z: row(z)[m], z) for m in range(size)]
    )
    return torch.stack([hessian(z) for z in x])
