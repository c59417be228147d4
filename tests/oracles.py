"""Slow Jacobians that share nothing with funcjac: rows, one output at a time, and differences.

Each takes a function and its arguments as a batched function has them, and returns what
``batch_jacobian`` should: output structure outside, input structure inside, ``(B, *out, *in)``.
"""

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

NAMESPACE = "funcjac"
# It added derivatives: of aminmax, the second of grid_sample.
SINCE_2_13 = hasattr(F, "linear_cross_entropy")


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
    for b in range(call.batch):
        if seed is not None and (b == 0 or replay):
            torch.manual_seed(seed)
        leaves = [
            x if dim is None else x.narrow(dim, b, 1) for x, dim in zip(call.leaves, call.dims)
        ]
        rows.append(call.jacobian(leaves, [0], graph)[0])
    return call.stack(rows)


def by_batch(func, args, kwargs=None, *, argnums=0, in_dims=0, out_dims=0, seed=None, graph=False):
    """One forward of the whole batch, then each output of row ``b`` by the input of row ``b``.

    The diagonal blocks by definition. It serves what cannot run on a row alone: random draws
    that belong to the batch, and functions whose state moves with each call.
    """
    call = _Call(func, args, kwargs or {}, argnums, in_dims, out_dims)
    if seed is not None:
        torch.manual_seed(seed)
    return call.stack(call.jacobian(call.leaves, range(call.batch), graph))


def by_differences(func, args, kwargs=None, *, argnums=0, in_dims=0, out_dims=0, seed=None):
    """Central differences, moving the same entry in all rows at once."""
    call = _Call(func, args, kwargs or {}, argnums, in_dims, out_dims)
    h = 1e-5
    columns = []  # one list of output leaves for each entry of each input
    for i in call.diff:
        x, dim = call.leaves[i], call.dims[i]
        shape = x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]
        found = []
        for n in range(shape.numel()):
            step = torch.zeros(shape.numel(), dtype=x.dtype)
            step[n] = h
            step = step.view(shape) if dim is None else step.view(shape).unsqueeze(dim)
            sides = []
            for sign in (1, -1):
                if seed is not None:
                    torch.manual_seed(seed)
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
        grads = [
            [None] * len(inputs)
            if not entry.requires_grad
            else torch.autograd.grad(
                entry, inputs, retain_graph=True, create_graph=graph, allow_unused=True
            )
            for entry in out.reshape(-1)
        ]
        blocks = []
        for j, x in enumerate(inputs):
            dim = self.dims[self.diff[j]]
            zero = torch.zeros_like(x)
            rows = [zero if grad[j] is None else grad[j] for grad in grads]
            rows = [row if dim is None else row.select(dim, b) for row in rows]
            shape = (zero if dim is None else zero.select(dim, b)).shape
            block = torch.stack(rows) if rows else zero.new_zeros(0, *shape)
            dtype = torch.promote_types(out.dtype, x.dtype)
            blocks.append(block.reshape((*out.shape, *shape)).to(dtype))
        return blocks

    def stack(self, rows):
        if not rows:  # an empty batch: shapes from the function, nothing to differentiate
            outs = self.run(self.leaves)
            shapes = [
                x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]
                for x, dim in ((self.leaves[i], self.dims[i]) for i in self.diff)
            ]
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


def _flatten(tree):
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)
