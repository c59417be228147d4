"""Second derivatives through one graph: a first differentiation, and another of its results.

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

from funcjac._engines.assemble import Chunks
from funcjac._engines.basis import coordinates, row_shape
from funcjac._engines.graph import Blocks, Pushforward, Route, column_root, jacobian_blocks
from funcjac._engines.run import Run
from funcjac._environment.torch_private import backward, over_basis

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


def along(run: Run, given: Sequence[Directions], route: Route) -> list[Along]:
    """Derivatives along pairs of directions, given for each input."""
    outer, inner = route.mode.split("_over_")
    compute = _along_reverse if inner == "rev" else _along_forward
    return compute(run, given, Route(outer, route.chunk))


def _along_reverse(run: Run, given: Sequence[Directions], outer: Route) -> list[Along]:
    result = [Along([], []) for _ in given]
    for out in run.output.leaves:
        columns: list[list[Any]] = [[] for _ in given]
        for grads in gradients(run, out):
            for j, grad in enumerate(grads):
                columns[j].append(_of_gradient(run, j, grad, given[j], outer))
        for j, pairs in enumerate(columns):
            count = len(given[j].left)
            result[j].firsts.append(_stacked([first for first, _ in pairs], out, count))
            result[j].seconds.append(_stacked([second for _, second in pairs], out, count))
    return result


def gradients(run: Run, out: Tensor) -> Iterator[Sequence[Maybe]]:
    """Of one output after the other in each row: the gradient by each input, with its graph."""
    for m in range(out.shape[1:].numel()):
        root, cotangent = column_root(out, m)
        yield backward(root, run.inputs, cotangent, retain=True, graph=True)


def _of_gradient(
    run: Run, j: int, grad: Maybe, given: Directions, outer: Route
) -> tuple[Maybe, Maybe]:
    """``left . g`` and ``right . H left`` for each pair, ``(K, B)``."""
    if grad is None:
        return None, None
    x, dim = run.inputs[j], run.dims[j]
    firsts = _dot(grad.unsqueeze(0), given, 0, dim, given.left)
    right = given.left if given.right is None else given.right
    step = outer.chunk or max(len(given.left), 1)
    pieces = Chunks(len(given.left), run.create_graph)
    for start in range(0, len(given.left), step):
        stop = min(start + step, len(given.left))
        cotangents = given.left[start:stop]

        def pull(cotangent: Tensor) -> Sequence[Maybe]:
            return backward(grad, [x], cotangent, retain=True, graph=run.create_graph)

        if outer.mode == "fwd":
            pushforward = Pushforward([grad], [x])
            (rows,) = pushforward.push(0, cotangents, many=True, create_graph=run.create_graph)
        elif stop - start == 1:
            (row,) = pull(cotangents[0])
            rows = None if row is None else row.unsqueeze(0)
        else:
            (rows,) = over_basis(pull, cotangents)
        part = None if rows is None else _dot(rows, given, start, dim, right[start:stop])
        if stop - start == len(given.left):
            return firsts, part
        pieces.add(part, stop - start)
    return firsts, pieces.result()


def _dot(rows: Tensor, given: Directions, start: int, dim: int | None, right: Tensor) -> Tensor:
    """``rows[k] . right[k]`` in each row of the batch, ``(K, B)``; rows may be one for all."""
    if given.basis and given.right is None:
        flat = rows.movedim((dim or 0) + 1, 1) if dim is not None else rows.unsqueeze(1)
        flat = flat.flatten(2) if flat.ndim > 2 else flat.unsqueeze(2)  # (k or 1, B, N)
        if len(rows) == 1:
            return flat[0, :, start : start + len(right)].mT
        return flat[:, :, start : start + len(right)].diagonal(0, 0, 2).mT
    product = rows * right
    flat = product.movedim((dim or 0) + 1, 1) if dim is not None else product.unsqueeze(1)
    return flat.flatten(2).sum(2) if flat.ndim > 2 else flat


def _stacked(columns: list[Maybe], out: Tensor, count: int) -> Maybe:
    """``(K, B, *out)`` from ``(K, B)`` for each output of a row."""
    if all(column is None for column in columns):
        return None
    zero = out.new_zeros(count, out.shape[0])
    whole = [zero if column is None else column.expand(zero.shape) for column in columns]
    if len(whole) == 1:
        return whole[0].reshape(count, *out.shape)
    return torch.stack(whole, -1).reshape(count, *out.shape)


def _along_forward(run: Run, given: Sequence[Directions], outer: Route) -> list[Along]:
    first, outs = Pushforward(run.output.leaves, run.inputs), range(len(run.output.leaves))
    result = []
    for j, (lefts, rights, _, _) in enumerate(given):
        pairs = []
        for left, right in zip(lefts, lefts if rights is None else rights):
            tangents = first.push(j, left, many=False, create_graph=True)
            pairs.append((tangents, _again(run, j, tangents, right, outer)))
        firsts = [_stacked_along([one[i] for one, _ in pairs]) for i in outs]
        result.append(Along(firsts, [_stacked_along([two[i] for _, two in pairs]) for i in outs]))
    return result


def _again(
    run: Run, j: int, tangents: Sequence[Maybe], direction: Tensor, outer: Route
) -> Sequence[Maybe]:
    """The derivative of tangents ``(B, *out)`` along a direction of input ``j``."""
    x, dim = run.inputs[j], run.dims[j]
    live = [t for t in tangents if t is not None]
    if outer.mode == "fwd":
        push = Pushforward(live, [x])
        found = iter(push.push(0, direction, many=False, create_graph=run.create_graph))
        return [None if t is None else next(found) for t in tangents]
    route = Route("rev", outer.chunk)
    blocks = iter(jacobian_blocks(live, [x], [dim], run.call.batch, route, run.create_graph))
    result: list[Maybe] = []
    for t in tangents:
        if t is None:
            result.append(None)
            continue
        (block,) = next(blocks)  # (B, *out, *in)
        rows = direction.unsqueeze(0) if dim is None else direction.movedim(dim, 0)
        rows = rows.reshape(len(rows), *[1] * (t.ndim - 1), *rows.shape[1:])
        product = block * rows
        result.append(product.flatten(t.ndim).sum(-1) if product.ndim > t.ndim else product)
    return result


def _stacked_along(columns: list[Maybe]) -> Maybe:
    like = next((column for column in columns if column is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if c is None else c for c in columns])


# --- Hessians ---------------------------------------------------------------------------------


def hessian_blocks(run: Run, route: Route) -> tuple[list[Blocks], Blocks]:
    """``H[i][j][k]`` of shape ``(B, *out, *in_j, *in_k)``, and ``J[i][j]``."""
    outer, inner = route.mode.split("_over_")
    compute = _hessian_reverse if inner == "rev" else _hessian_forward
    return compute(run, Route(outer, route.chunk))


def _hessian_reverse(run: Run, outer: Route) -> tuple[list[Blocks], Blocks]:
    batch, dims = run.call.batch, run.dims
    hess, jac = [], []
    for out in run.output.leaves:
        slopes: list[list[Tensor]] = []
        bends: list[Blocks] = []
        for grads in gradients(run, out):
            rows = [_rows(x, g, dim, batch) for x, g, dim in zip(run.inputs, grads, dims)]
            slopes.append(rows)
            bends.append(jacobian_blocks(rows, run.inputs, dims, batch, outer, run.create_graph))
        count = range(len(run.inputs))
        if not slopes:  # no outputs in a row
            shapes = [row_shape(x, dim) for x, dim in zip(run.inputs, dims)]
            jac.append([out.new_zeros(*out.shape, *row) for row in shapes])
            hess.append([[out.new_zeros(*out.shape, *a, *b) for b in shapes] for a in shapes])
            continue
        jac.append([_by_output([s[j] for s in slopes], out) for j in count])
        hess.append([[_by_output([b[j][k] for b in bends], out) for k in count] for j in count])
    return hess, jac


def _rows(x: Tensor, grad: Maybe, dim: int | None, batch: int) -> Tensor:
    """A gradient with the batch in front, ``(B, *in)``."""
    if grad is None:
        return x.new_zeros((batch, *row_shape(x, dim)))
    return grad.unsqueeze(0)[:batch] if dim is None else grad.movedim(dim, 0)


def _by_output(columns: list[Tensor], out: Tensor) -> Tensor:
    """``(B, *out, *rest)`` from ``(B, *rest)`` for each output of a row."""
    if len(columns) == 1:
        return columns[0].reshape(*out.shape, *columns[0].shape[1:])
    return torch.stack(columns, 1).reshape(*out.shape, *columns[0].shape[1:])


def _hessian_forward(run: Run, outer: Route) -> tuple[list[Blocks], Blocks]:
    first, outs = Pushforward(run.output.leaves, run.inputs), run.output.leaves
    hess: list[Blocks] = [[] for _ in outs]
    jac: Blocks = [[] for _ in outs]
    for j, (x, dim) in enumerate(zip(run.inputs, run.dims)):
        row = row_shape(x, dim)
        tangents, columns = [], []
        if not row.numel():
            for i, out in enumerate(outs):
                jac[i].append(out.new_zeros(*out.shape, *row))
                rest = [row_shape(y, d) for y, d in zip(run.inputs, run.dims)]
                hess[i].append([out.new_zeros(*out.shape, *row, *other) for other in rest])
            continue
        for tangent in coordinates(x, dim):
            pushed = first.push(j, tangent, many=False, create_graph=True)
            whole = [out.new_zeros(out.shape) if t is None else t for t, out in zip(pushed, outs)]
            tangents.append(whole)
            columns.append(
                jacobian_blocks(
                    whole, run.inputs, run.dims, run.call.batch, outer, run.create_graph
                )
            )
        for i, out in enumerate(outs):
            jac[i].append(torch.stack([t[i] for t in tangents], -1).reshape(*out.shape, *row))
            blocks = []
            for k, y in enumerate(run.inputs):
                rest = row_shape(y, run.dims[k])
                whole = torch.stack([c[i][k] for c in columns], out.ndim)
                blocks.append(whole.reshape(*out.shape, *row, *rest))
            hess[i].append(blocks)
    return hess, jac


# --- partial derivatives of any order ---------------------------------------------------------


def nested_partials(
    run: Run, indices: Sequence[Index], place: Callable[[int], tuple[int, int]]
) -> list[list[Maybe]]:
    """For each index and output ``(B, *out)``: one gradient after another, of each output.

    ``place`` maps a coordinate to its input and its number there. What is differentiated
    further is so once, by all coordinates.
    """
    steps = by_order(tuple(indices))
    names = indices  # sorted
    result: list[list[Maybe]] = [[] for _ in indices]
    for out in run.output.leaves:
        count = out.shape[1:].numel()
        fields = [_partials_of_one(run, out, m, steps, place) for m in range(count)]
        for e, name in enumerate(names):
            if not name:
                result[e].append(out)
                continue
            columns = [known.get(name) for known in fields]
            result[e].append(_joined_outputs(columns, out))
    return result


def _joined_outputs(columns: list[Maybe], out: Tensor) -> Maybe:
    if all(column is None for column in columns):  # or no outputs in a row
        return None
    if len(columns) == 1:
        only: Any = columns[0]
        return only if only.shape == out.shape else only.reshape(out.shape)
    zero = out.new_zeros(out.shape[0])
    whole = [zero if c is None else c.squeeze(1) if c.ndim > 1 else c for c in columns]
    stack = torch.stack(whole, -1)  # a further level enters it column by column
    return stack if stack.shape == out.shape else stack.reshape(out.shape)


def _partials_of_one(
    run: Run, out: Tensor, m: int, steps: list[dict[Index, list[int]]], place: Any
) -> dict[Index, Maybe]:
    known: dict[Index, Maybe] = {}
    for order, step in enumerate(steps):
        further = order + 1 < len(steps)
        for index, entries in step.items():
            grads: Sequence[Maybe] = [None] * len(run.inputs)
            if not index:
                root, cotangent = column_root(out, m)
                graph = further or run.create_graph
                grads = backward(root, run.inputs, cotangent, retain=True, graph=graph)
            elif known.get(index) is not None:
                field: Any = known[index]
                ones = field.new_ones(()).expand(field.shape)
                graph = further or run.create_graph
                grads = backward(field, run.inputs, ones, retain=True, graph=graph)
            for entry in entries:
                j, n = place(entry)
                grad, dim = grads[j], run.dims[j]
                name = tuple(sorted((*index, entry)))
                known[name] = None if grad is None else _column(grad, dim, n, run.call.batch)
    return known


def _column(grad: Tensor, dim: int | None, n: int, batch: int) -> Tensor:
    """Coordinate ``n`` of each row, ``(B,)``, or ``(B, 1)`` where that takes one operation."""
    if dim is None:
        return (grad if grad.ndim == 0 else grad[n]).expand(batch)
    if grad.ndim == 1:
        return grad
    return grad.narrow(1, n, 1) if dim == 0 else grad.select(0, n)


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
            ranks = {part: (times, part in needed, part) for part, times in lower.items()}
            best = sorted(ranks, key=ranks.__getitem__)[-1]
            of = [index for index in left if best in _shorter(index)]
            step[best] = [next((Counter(i) - Counter(best)).elements()) for i in of]
            left = [index for index in left if index not in of]
        needed.update(step)
        steps.append(step)
    return steps[::-1]


def _shorter(index: Index) -> list[Index]:
    """Without one of its entries."""
    return [index[:i] + index[i + 1 :] for i in range(len(index))]
