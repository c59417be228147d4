"""Second and higher derivatives through one graph: what a differentiation gave, differentiated.

In a mode ``"outer_over_inner"`` each differentiation is reverse (a vector-Jacobian product) or
forward (its transpose). With reverse inside, outputs go one by one: their gradients would share
a graph, through which each further pass would pull all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._engines.rows import Directions, batch_first, coordinates, flat_rows, row_shape, units
from funcjac._engines.run_func import Route, Run
from funcjac._engines.sum import Blocks, Maybe, column_root, contracted, jacobian, pushforwards
from funcjac._environment.torch_private import backward, is_functional

Index = tuple[int, ...]
Step = dict[Index, list[tuple[int, Index]]]
# First and second derivatives along directions, ``(K, B, *out)`` for each output.
Along = tuple[list[Maybe], list[Maybe]]


def along(run: Run, pairs: Sequence[Directions], route: Route) -> list[Along]:
    """First and second derivatives along pairs of directions in each input."""
    mode, inner = route.mode.split("_over_")
    outer = Route(mode, route.chunk)

    def further(g: int, n: int, firsts: list[Tensor]) -> list[Any]:
        if inner == "rev":
            return [_of_gradient(run, j, grad, pairs[j], outer) for j, grad in enumerate(firsts)]
        return _of_tangents(run, g, firsts, pairs[g].narrow(n, n + 1), outer)

    result: list[Along] = [([], []) for _ in pairs]
    for i, j, columns in _nested(run, inner, [pair.left for pair in pairs], further):
        out = run.output.leaves[i]
        axis, shape = -1 if inner == "rev" else 0, (len(pairs[j].left), *out.shape)
        result[j][0].append(_stacked([first for first, _ in columns], axis, shape, out))
        result[j][1].append(_stacked([second for _, second in columns], axis, shape, out))
    return result


def hessian_blocks(run: Run, route: Route) -> tuple[list[Blocks], Blocks]:
    """``H[i][j][k]`` of shape ``(B, *out, *in_j, *in_k)``, and ``J[i][j]``."""
    mode, inner = route.mode.split("_over_")
    outer = Route(mode, route.chunk)
    basis = [coordinates(x, dim) for x, dim in zip(run.inputs, run.dims)]
    rows = [(), *[row_shape(x, dim) for x, dim in zip(run.inputs, run.dims)]]

    def further(g: int, n: int, firsts: list[Tensor]) -> list[Any]:
        nested = run._replace(output=run.output._replace(leaves=firsts))
        seconds = jacobian(nested, outer, of_gradients=inner == "rev").blocks
        return [(_released(run, first), *blocks) for first, blocks in zip(firsts, seconds)]

    jac: Blocks = [[] for _ in run.output.leaves]
    hess: list[Blocks] = [[] for _ in run.output.leaves]
    for i, j, columns in _nested(run, inner, basis, further):
        out = run.output.leaves[i]
        axis, shape = 1 if inner == "rev" else out.ndim, (*out.shape, *rows[j + 1])
        first, *blocks = [
            _stacked([column[k] for column in columns], axis, (*shape, *row), out)
            for k, row in enumerate(rows)
        ]
        jac[i].append(first)
        hess[i].append(blocks)
    return hess, jac


def _nested(
    run: Run, inner: str, directions: Sequence[Tensor], further: Callable[..., list[Any]]
) -> Iterator[tuple[int, int, list[Any]]]:
    """For output ``i`` and input ``j``: what ``further`` makes of each inner derivative, in turn.

    Reverse: for each output, gradients ``(B, *in)`` by all inputs of one element of a row after the
    other. Forward: for each input, tangents ``(B, *out)`` of all outputs along one of
    ``directions`` after the other.
    """
    outs, inputs, dims, batch = run.output.leaves, run.inputs, run.dims, run.call.batch
    if inner == "rev":
        for i, out in enumerate(outs):
            columns = []
            for m in range(out.shape[1:].numel()):
                root, cotangent = column_root(out, m)
                grads = backward(root, inputs, cotangent, retain=True, graph=True)
                gradients = [
                    x.new_zeros(batch, *row_shape(x, d)) if g is None else batch_first(g, d, batch)
                    for x, d, g in zip(inputs, dims, grads)
                ]
                columns.append(further(i, m, gradients))
            for j in range(len(inputs)):
                yield i, j, [column[j] for column in columns]
        return
    for j, push in enumerate(pushforwards(outs, inputs, create_graph=True)):
        columns = []
        for n, direction in enumerate(directions[j].unbind()):
            pairs = zip(outs, push(direction))
            tangents = [out.new_zeros(out.shape) if t is None else t for out, t in pairs]
            columns.append(further(j, n, tangents))
        for i in range(len(outs)):
            yield i, j, [column[i] for column in columns]


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
    dim, batch = run.dims[j], run.call.batch
    left = None if pairs.basis else flat_rows(pairs.left, dim, batch)
    right = left if pairs.right is None else flat_rows(pairs.right, dim, batch)
    rows = grad.flatten(1) if grad.ndim > 1 else grad.unsqueeze(1)  # (B, N)
    firsts = rows.mT if left is None else (rows * left).sum(-1)
    return _released(run, firsts), contracted(run, grad, j, outer, pairs.left, right)


def _of_tangents(
    run: Run, j: int, tangents: list[Tensor], pair: Directions, outer: Route
) -> list[tuple[Tensor, Tensor]]:
    """Tangents ``(B, *out)`` along ``left``, and their derivatives along ``right``."""
    right = pair.left if pair.right is None else pair.right
    if outer.mode == "fwd":
        (push,) = pushforwards(tangents, [run.inputs[j]], create_graph=run.create_graph)
        pushed = push(right[0])
        seconds = [torch.zeros_like(t) if s is None else s for t, s in zip(tangents, pushed)]
    else:
        left = flat_rows(right, run.dims[j], run.call.batch)
        columns = [contracted(run, t, j, outer, None, left) for t in tangents]  # (M, B)
        seconds = [column.mT.reshape(t.shape) for column, t in zip(columns, tangents)]
    return [(_released(run, t), second) for t, second in zip(tangents, seconds)]


# --- partial derivatives of any order ---------------------------------------------------------


def nested_partials(
    run: Run, indices: Sequence[Index], places: Sequence[tuple[int, int]]
) -> list[dict[Index, Maybe]]:
    """For each output and sorted index ``(B, *out)``: one gradient after another, of each output.

    ``places`` are inputs of coordinates, and their numbers there. What is differentiated further
    is so once, by all coordinates.
    """
    steps, result = by_order(tuple(indices)), []
    for out in run.output.leaves:
        count = out.shape[1:].numel()
        columns = [_partials_of_one(run, out, m, steps, places) for m in range(count)]
        if count == 1:
            result.append(columns[0])
        else:
            result.append({i: _joined([column[i] for column in columns], out) for i in indices})
    return result


def _joined(columns: list[Maybe], out: Tensor) -> Maybe:
    """``(B, *out)`` of a column ``(B,)`` or ``(B, 1)`` for each output; ``None`` for zero."""
    if all(column is None for column in columns):  # or no outputs in a row
        return None
    zero = out.new_zeros(out.shape[0])
    # A further level enters the stack column by column.
    stack = [zero if c is None else c.squeeze(1) if c.ndim > 1 else c for c in columns]
    return _stacked(stack, -1, out.shape, out)


def _partials_of_one(
    run: Run, out: Tensor, m: int, steps: list[Step], places: Any
) -> dict[Index, Maybe]:
    """Partial derivatives of output ``m`` of each row, by their indices."""
    partials: dict[Index, Maybe] = {}
    # Gradients that are differentiated further, whole, and which column of each.
    roots: dict[Index, tuple[Maybe, int | None]] = {}
    inputs, dims, is_plain = run.inputs, run.call.layout.diff_dims, not is_functional()
    is_copied = is_plain and all(x.ndim == 2 and dim == 0 for x, dim in zip(inputs, dims))
    for order, step in enumerate(steps):
        graph = run.create_graph or order + 1 < len(steps)
        for index, entries in step.items():
            if index:
                root, cotangent = _root(*roots[index], is_copied)
            elif is_copied and out.numel() == out.shape[0]:
                root, cotangent = out, torch.ones_like(out)
            else:
                root, cotangent = column_root(out, m)
            grads: Sequence[Maybe] = [None] * len(inputs)
            if root is not None:
                grads = backward(root, inputs, cotangent, retain=True, graph=graph)
            for entry, name in entries:
                j, n = places[entry]
                grad = grads[j]
                if grad is None or dims[j] != 0 or grad.ndim != 2:
                    partials[name] = _column(grad, dims[j], n, run.call.batch)
                    roots[name] = partials[name], None
                    continue
                roots[name] = grad, n
                # A copy is one node, where a contiguous view has two; vmap knows views only.
                copied = torch.slice_copy(grad, 1, n, n + 1) if is_plain else grad.narrow(1, n, 1)
                partials[name] = copied
    return partials


def _root(grad: Maybe, column: int | None, is_copied: bool) -> tuple[Maybe, Any]:
    """A gradient, and the cotangent of a column of it.

    One that is no view is made and passed on in less time, but two gradients may be that tensor.
    """
    if grad is None:
        return None, None
    if is_copied:
        cotangent = torch.zeros_like(grad)
        cotangent.select(1, column or 0).fill_(1)
        return grad, cotangent
    unit = grad.new_ones(()) if column is None else units(grad.shape[-1], column, 1, grad)
    return grad, unit.expand(grad.shape)


def _column(grad: Maybe, dim: int | None, n: int, batch: int) -> Maybe:
    """Coordinate ``n`` of each row, ``(B,)``."""
    if grad is None:
        return None
    if dim is None:
        return (grad if grad.ndim == 0 else grad[n]).expand(batch)
    return grad if grad.ndim == 1 else grad.select(0, n)


@functools.lru_cache(1024)
def by_order(indices: tuple[Index, ...]) -> list[Step]:
    """By order, what must be differentiated by which coordinates, and what that gives."""
    needed = {tuple(sorted(index)) for index in indices}
    steps: list[Step] = []
    for order in range(max(map(len, needed)), 0, -1):
        left = sorted(index for index in needed if len(index) == order)
        step: Step = {}
        while left:  # first the one that most are derivatives of
            parts = {index: set(itertools.combinations(index, order - 1)) for index in left}
            lower = Counter(itertools.chain(*parts.values()))
            best = max(lower, key=lambda part, n=lower: (n[part], part in needed, part))
            of = [index for index in left if best in parts[index]]
            step[best] = [(next((Counter(i) - Counter(best)).elements()), i) for i in of]
            left = [index for index in left if best not in parts[index]]
        needed.update(step)
        steps.append(step)
    return steps[::-1]
