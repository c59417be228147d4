"""Second and higher derivatives through one graph: what a differentiation gave, differentiated.

In a mode ``"outer_over_inner"`` each differentiation is reverse (a vector-Jacobian product) or
forward (its transpose). With reverse inside, outputs go one by one: their gradients would share
a graph, through which each further pass would pull all of them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._engines.rows import (
    basis_chunks,
    batch_at,
    coordinates,
    flat_rows,
    identity,
    row_shape,
)
from funcjac._engines.run_func import Route, Run
from funcjac._engines.sum import (
    Blocks,
    Product,
    column_root,
    contracted,
    jacobian,
    pushforwards,
)
from funcjac._environment.torch_private import backward, is_functional

Index = tuple[int, ...]
Maybe = Tensor | None


class Directions(NamedTuple):
    """Pairs of directions in one input: ``(K, *x.shape)`` with the batch where the input has it.

    Attributes:
        right: second directions, ``None`` for the same ones.
        basis: whether ``left`` is the standard basis.
    """

    left: Tensor
    right: Tensor | None
    weights: Tensor
    basis: bool

    def narrow(self, start: int, stop: int) -> Directions:
        right = None if self.right is None else self.right[start:stop]
        return Directions(self.left[start:stop], right, self.weights[start:stop], self.basis)


class Along(NamedTuple):
    """First and second derivatives along directions, ``(K, B, *out)`` for each output."""

    firsts: list[Maybe]
    seconds: list[Maybe]


def along(run: Run, pairs: Sequence[Directions], route: Route) -> list[Along]:
    """First and second derivatives along pairs of directions in each input."""
    mode, inner = route.mode.split("_over_")
    outer, outs, by_output = Route(mode, route.chunk), run.output.leaves, inner == "rev"
    result = [Along([None] * len(outs), [None] * len(outs)) for _ in pairs]
    for g, passes in enumerate(_passes(run, inner, [pair.left for pair in pairs])):
        columns = [
            [_of_gradient(run, j, grad, pairs[j], outer) for j, grad in enumerate(firsts)]
            if by_output
            else _of_tangents(run, g, firsts, pairs[g].narrow(number, number + 1), outer)
            for number, firsts in enumerate(passes)
        ]
        for e in range(len(pairs if by_output else outs)):
            i, j = (g, e) if by_output else (e, g)
            axis, shape = -1 if by_output else 0, (len(pairs[j].left), *outs[i].shape)
            result[j].firsts[i] = _stacked([c[e][0] for c in columns], axis, shape, outs[i])
            result[j].seconds[i] = _stacked([c[e][1] for c in columns], axis, shape, outs[i])
    return result


def hessian_blocks(run: Run, route: Route) -> tuple[list[Blocks], Blocks]:
    """``H[i][j][k]`` of shape ``(B, *out, *in_j, *in_k)``, and ``J[i][j]``."""
    mode, inner = route.mode.split("_over_")
    outs, by_output = run.output.leaves, inner == "rev"
    rows = [row_shape(x, dim) for x, dim in zip(run.inputs, run.dims)]
    basis = [coordinates(x, dim) for x, dim in zip(run.inputs, run.dims)]
    jac: Blocks = [[] for _ in outs]
    hess: list[Blocks] = [[] for _ in outs]
    for g, passes in enumerate(_passes(run, inner, basis)):
        firsts, seconds = [], []
        for tensors in passes:
            output = run.output._replace(leaves=tensors)
            seconds.append(jacobian(run._replace(output=output), Route(mode, route.chunk)).blocks)
            firsts.append([_released(run, t) for t in tensors])
        for e in range(len(rows if by_output else outs)):
            i, j = (g, e) if by_output else (e, g)
            axis, shape = 1 if by_output else outs[i].ndim, (*outs[i].shape, *rows[j])
            jac[i].append(_stacked([f[e] for f in firsts], axis, shape, outs[i]))
            hess[i].append(
                [
                    _stacked([s[e][k] for s in seconds], axis, (*shape, *row), outs[i])
                    for k, row in enumerate(rows)
                ]
            )
    return hess, jac


def _passes(run: Run, inner: str, directions: Sequence[Tensor]) -> Iterator[Iterator[list[Tensor]]]:
    """The inner differentiation, with its graph.

    Reverse: for each output in turn, gradients ``(B, *in)`` by all inputs of one element of a row
    after the other. Forward: for each input, tangents ``(B, *out)`` of all outputs along one of
    ``directions`` after the other.
    """
    if inner == "rev":
        yield from (_gradients(run, out) for out in run.output.leaves)
        return
    products = pushforwards(run.output.leaves, run.inputs, create_graph=True)
    yield from (_tangents(run, push, left) for push, left in zip(products, directions))


def _gradients(run: Run, out: Tensor) -> Iterator[list[Tensor]]:
    dims, batch = run.dims, run.call.batch
    for m in range(out.shape[1:].numel()):
        root, cotangent = column_root(out, m)
        grads = backward(root, run.inputs, cotangent, retain=True, graph=True)
        yield [
            x.new_zeros(batch, *row_shape(x, dim)) if g is None else batch_at(0, g, dim, batch)
            for x, dim, g in zip(run.inputs, dims, grads)
        ]


def _tangents(run: Run, push: Product, directions: Tensor) -> Iterator[list[Tensor]]:
    for direction in directions.unbind():
        pairs = zip(run.output.leaves, push(direction))
        yield [out.new_zeros(out.shape) if t is None else t for out, t in pairs]


def _released(run: Run, first: Tensor) -> Tensor:
    """A first derivative without the graph of its pass, where nobody needs that any more."""
    return first if run.create_graph else first.detach()


def _stacked(columns: list[Tensor], axis: int, shape: Sequence[int], like: Tensor) -> Tensor:
    """Tensors along a new axis, viewed in ``shape``; zeros of none."""
    if not columns:
        return like.new_zeros(shape)
    whole = columns[0] if len(columns) == 1 else torch.stack(columns, axis)
    return whole if whole.shape == shape else whole.reshape(shape)


def _of_gradient(
    run: Run, j: int, grad: Tensor, pairs: Directions, outer: Route
) -> tuple[Tensor, Tensor]:
    """``left . g`` and ``right . H left`` for each pair, ``(K, B)``."""
    left, right, _, basis = pairs
    dim, batch, count = run.dims[j], run.call.batch, len(left)
    flat = None if basis else flat_rows(left, dim, batch)
    rows = grad.flatten(1) if grad.ndim > 1 else grad.unsqueeze(1)  # (B, N)
    firsts = rows.mT if flat is None else (rows * flat).sum(-1)
    against = flat if right is None else flat_rows(right, dim, batch)
    vectors = left if outer.mode == "fwd" else batch_at(1, left, dim, batch, skip=1)
    chunks = vectors.split(outer.chunk or count) if count else ()
    seconds = contracted(run, grad, j, outer.mode, chunks, count, against)
    return _released(run, firsts), seconds


def _of_tangents(
    run: Run, j: int, tangents: list[Tensor], pair: Directions, outer: Route
) -> list[tuple[Tensor, Tensor]]:
    """Tangents ``(B, *out)`` along ``left``, and their derivatives along ``right``."""
    x, dim, batch = run.inputs[j], run.dims[j], run.call.batch
    right = pair.left if pair.right is None else pair.right
    firsts = [_released(run, t) for t in tangents]
    if outer.mode == "fwd":
        (push,) = pushforwards(tangents, [x], create_graph=run.create_graph)
        pairs = zip(firsts, push(right[0]))
        return [(t, torch.zeros_like(t) if s is None else s) for t, s in pairs]
    against, result = flat_rows(right, dim, batch), []
    for first, t in zip(firsts, tangents):
        basis, count = basis_chunks(t, t.shape[1:], batch, 0, outer.chunk), t.shape[1:].numel()
        second = contracted(run, t, j, "rev", basis, count, against)  # (M, B)
        result.append((first, second.mT.reshape(t.shape)))
    return result


# --- partial derivatives of any order ---------------------------------------------------------


def nested_partials(
    run: Run, indices: Sequence[Index], place: Callable[[int], tuple[int, int]]
) -> list[list[Maybe]]:
    """For each sorted index and output ``(B, *out)``: one gradient after another, of each output.

    ``place`` maps a coordinate to its input and its number there. What is differentiated
    further is so once, by all coordinates.
    """
    steps = by_order(tuple(indices))
    result: list[list[Maybe]] = [[] for _ in indices]
    for out in run.output.leaves:
        count = out.shape[1:].numel()
        partials = [_partials_of_one(run, out, m, steps, place) for m in range(count)]
        for blocks, index in zip(result, indices):
            columns = [part[index] for part in partials]
            blocks.append(columns[0] if count == 1 else _joined(columns, out))
    return result


def _joined(columns: list[Maybe], out: Tensor) -> Maybe:
    """``(B, *out)`` of a column ``(B,)`` or ``(B, 1)`` for each output; ``None`` for zero."""
    if all(column is None for column in columns):  # or no outputs in a row
        return None
    zero = out.new_zeros(out.shape[0])
    columns = [zero if c is None else c.squeeze(1) if c.ndim > 1 else c for c in columns]
    # A further level enters the stack column by column.
    return _stacked(columns, -1, out.shape, out)  # type: ignore[arg-type]


def _partials_of_one(
    run: Run, out: Tensor, m: int, steps: list[dict[Index, list[int]]], place: Any
) -> dict[Index, Maybe]:
    """Partial derivatives of output ``m`` of each row, by their indices."""
    partials: dict[Index, Maybe] = {}
    roots: dict[Index, tuple[Maybe, int | None]] = {}
    inputs, dims = run.inputs, run.call.layout.diff_dims
    copies = not is_functional()
    for order, step in enumerate(steps):
        graph = run.create_graph or order + 1 < len(steps)
        for index, entries in step.items():
            grads: Sequence[Maybe] = [None] * len(inputs)
            root, cotangent = _unit(*roots[index]) if index else column_root(out, m)
            if root is not None:
                grads = backward(root, inputs, cotangent, retain=True, graph=graph)
            for entry in entries:
                j, n = place(entry)
                grad, dim, name = grads[j], dims[j], tuple(sorted((*index, entry)))
                if copies and dim == 0 and grad is not None and grad.ndim == 2:
                    # One node, where a contiguous view has two; what follows begins before it.
                    partials[name] = torch.slice_copy(grad, 1, n, n + 1)
                    roots[name] = grad, n
                else:
                    column = None if grad is None else _column(grad, dim, n, run.call.batch)
                    partials[name], roots[name] = column, (column, None)
    return partials


def _unit(root: Maybe, n: int | None) -> tuple[Any, Any]:
    """Where a column, or column ``n`` of rows, enters the graph, and its cotangent."""
    if root is None:
        return None, None
    unit = root.new_ones(()) if n is None else identity(root.shape[1], root, plain=True)[n]
    return root, unit.expand(root.shape)


def _column(grad: Tensor, dim: int | None, n: int, batch: int) -> Tensor:
    """Coordinate ``n`` of each row, ``(B,)``, or ``(B, 1)`` where that takes one operation."""
    if dim is None:
        return (grad if grad.ndim == 0 else grad[n]).expand(batch)
    if grad.ndim == 1:
        return grad
    if dim != 0:
        return grad.select(0, n)
    return grad.narrow(1, n, 1)


@functools.lru_cache(1024)
def by_order(indices: tuple[Index, ...]) -> list[dict[Index, list[int]]]:
    """By order, what must be differentiated by which coordinates."""
    needed = {tuple(sorted(index)) for index in indices}
    steps: list[dict[Index, list[int]]] = []
    for order in range(max(map(len, needed)), 0, -1):
        left = sorted(index for index in needed if len(index) == order)
        step: dict[Index, list[int]] = {}
        while left:  # first the one that most are derivatives of
            lower = Counter(part for index in left for part in set(_shorter(index)))
            best = max(lower, key=lambda part, n=lower: (n[part], part in needed, part))
            of = [index for index in left if best in _shorter(index)]
            step[best] = [next((Counter(i) - Counter(best)).elements()) for i in of]
            left = [index for index in left if index not in of]
        needed.update(step)
        steps.append(step)
    return steps[::-1]


def _shorter(index: Index) -> list[Index]:
    """Without one of its entries."""
    return [index[:i] + index[i + 1 :] for i in range(len(index))]
