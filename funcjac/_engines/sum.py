"""The engine ``sum``: the sum trick, through the graph that one run of the whole batch left.

Where rows do not depend on one another, one vector-Jacobian product with the same cotangent in
every row gives a row of every row's Jacobian at once (pytorch/functorch issue 328; TensorFlow's
``batch_jacobian``), and one Jacobian-vector product a column. A batch of one is always
independent, which is how the loop over rows uses this file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from funcjac._engines.rows import (
    as_block,
    basis_chunks,
    batch_first,
    flat_rows,
    join,
    mirrored,
    row_shape,
    spread,
    units,
)
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._environment.torch_private import (
    Tensors,
    backward,
    has_levels,
    is_traced,
    over_basis,
    sees_values,
    vector_jacobian,
)

Product = Callable[[Tensor], Tensors]
Maybe = Tensor | None
Blocks = list[list[Tensor]]
# Up to this many outputs, starting behind the last layer costs plain code more than it saves.
_FEWEST_PEELED = 16


def jacobian(run: Run, route: Route, *, of_gradients: bool = False) -> Derivatives:
    """The Jacobian of each row, ``(B, *out, *in)``; ``of_gradients`` by the inputs: a Hessian."""
    outs = run.output.leaves
    if route.mode == "rev":
        return Derivatives(list(map(functools.partial(_rows, run, route.chunk), outs)), run.output)
    products = pushforwards(outs, run.inputs, create_graph=run.create_graph)
    columns = [_columns(run, j, push, route.chunk) for j, push in enumerate(products)]
    blocks = list(map(list, zip(*columns)))
    if of_gradients:
        blocks = mirrored(blocks, [out.ndim - 1 for out in outs])
    elif not is_traced() and sees_values():
        blocks = [_without_spread_poles(run, *pair) for pair in zip(outs, blocks)]
    return Derivatives(blocks, run.output)


def _rows(run: Run, chunk: int | None, out: Tensor) -> list[Tensor]:
    """Derivatives of one output by all inputs, by reverse passes."""
    inputs, dims, batch = run.inputs, run.call.layout.diff_dims, run.call.batch
    row, root = out.shape[1:], out
    peeled = peel(out, inputs) if row.numel() > _FEWEST_PEELED or is_traced() else None
    if peeled is None:
        cotangents = basis_chunks(out, row, batch, 0, chunk)
    else:
        root, vectors = peeled  # (M, K)
        cotangents = vectors.unsqueeze(1).expand(-1, batch, -1).split(chunk or len(vectors))
    product = functools.partial(backward, root, inputs, retain=True, graph=run.create_graph)

    def passes() -> Iterator[tuple[int, list[Maybe]]]:
        for vectors in cotangents:
            grads = list(of_each(product, vectors))  # (k, ..., B, ...) -> (B, k, *in)
            for j, (grad, dim) in enumerate(zip(grads, dims)):
                if grad is not None:
                    grads[j] = grad[None][:batch] if dim is None else grad.movedim(dim + 1, 0)
            yield vectors.shape[0], grads

    blocks = []
    joined = join(passes(), row.numel(), 1, len(inputs), create_graph=run.create_graph)
    for block, x, dim in zip(joined, inputs, dims):
        blocks.append(as_block(block, (*out.shape, *row_shape(x, dim)), out, (x,)))
    return blocks


def _columns(run: Run, j: int, push: Product, chunk: int | None) -> list[Tensor]:
    """Derivatives of all outputs by one input, by forward passes."""
    x, dim, outs = run.inputs[j], run.dims[j], run.output.leaves
    row = row_shape(x, dim)

    def passes() -> Iterator[tuple[int, list[Maybe]]]:
        for vectors in basis_chunks(x, row, run.call.batch, dim, chunk):
            tangents = of_each(push, vectors)  # (k, B, *out) -> (B, *out, k)
            yield vectors.shape[0], [None if t is None else t.movedim(0, -1) for t in tangents]

    joined = join(passes(), row.numel(), -1, len(outs), create_graph=run.create_graph)
    pairs = zip(joined, outs)
    return [as_block(block, (*out.shape, *row), out, (x,)) for block, out in pairs]


def _without_spread_poles(run: Run, out: Tensor, blocks: list[Tensor]) -> list[Tensor]:
    """Derivatives of one output; by reverse passes of elements that have NaN among theirs.

    Zero times infinity is NaN: in forward mode a pole of one element reaches others.
    """
    if all(math.isfinite(block.detach().sum()) for block in blocks):
        return blocks
    batch, count, rows = run.call.batch, out.shape[1:].numel(), []
    has_value = ~out.detach().reshape(batch, count, 1).isnan()  # what is NaN has no derivative
    flat = [block.detach().reshape(batch, count, block[:1].numel() // count) for block in blocks]
    elements = (torch.cat(flat, 2).isnan() & has_value).any(2).any(0).nonzero().flatten()
    for m in elements.tolist():
        root, cotangent = column_root(out, m)
        rows.append(backward(root, run.inputs, cotangent, retain=True, graph=run.create_graph))
    for j, (x, dim) in enumerate(zip(run.inputs, run.dims)) if rows else ():
        shape = (batch, *row_shape(x, dim))
        grads = [None if row[j] is None else batch_first(row[j], dim, batch) for row in rows]
        stack = torch.stack([as_block(grad, shape, out, (x,)) for grad in grads], 1)
        whole = blocks[j].reshape(batch, count, *shape[1:]).index_copy(1, elements, stack)
        blocks[j] = whole.view(blocks[j].shape)
    return blocks


# --- products ----------------------------------------------------------------------------------


def of_each(product: Product, vectors: Tensor) -> Tensors:
    """``product`` of each of ``vectors`` ``(k, ...)``; a single one takes no vmap."""
    if vectors.shape[0] == 1:
        return [None if x is None else x.unsqueeze(0) for x in product(vectors.select(0, 0))]
    return over_basis(product, vectors)


def pushforwards(
    outs: Sequence[Tensor], inputs: Sequence[Tensor], *, create_graph: bool
) -> list[Product]:
    """For each input, what takes a tangent of it to tangents of ``outs``.

    The transpose of one vector-Jacobian product: ``u -> J^T u`` is linear, and its own
    vector-Jacobian product is ``J`` (J. Townsend, "A new trick for calculating Jacobian vector
    products", 2017), so that only torch's reverse formulas are used.
    """
    roots = [out for out in outs if out.requires_grad]
    vjp = functools.partial(vector_jacobian, roots, retain=True, graph=True)
    levels = has_levels()  # a tensor of another level must stand for the cotangent
    with torch.set_grad_enabled(torch.is_grad_enabled() or not levels):
        zeros = [torch.zeros_like(root, requires_grad=not levels) for root in roots]
        grads = vjp(inputs, zeros) if roots else [None] * len(inputs)

    def product(transpose: Product | None, tangent: Tensor) -> Tensors:
        if transpose is None:
            return [None] * len(outs)
        pushed = iter(transpose(tangent))
        return [next(pushed) if out.requires_grad else None for out in outs]

    products = []
    for x, grad in zip(inputs, grads):
        transpose: Product | None = None
        if levels and grad is not None:
            transpose = torch.func.vjp(lambda *u, x=x: vjp([x], u)[0], *zeros)[1]
        elif grad is not None and grad.requires_grad:
            transpose = functools.partial(backward, grad, zeros, retain=True, graph=create_graph)
        products.append(functools.partial(product, transpose))
    return products


# --- where a pass begins ---------------------------------------------------------------------


def peel(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Any, Tensor] | None:
    """The input of a last linear layer ``c + a W``, and the rows of ``W^T`` as its cotangents.

    A cotangent that is the same in all rows would go through that layer once for every row.
    """
    node: Any = out.grad_fn
    if node is None or node.name() != "AddmmBackward0" or out.ndim != 2 or out._backward_hooks:
        return None
    (bias, _), (left, place), (weight, _) = node.next_functions
    if left is None or not (_is_constant(bias, inputs) and _is_constant(weight, inputs)):
        return None
    # A product: in a batch of one, results may lie in the memory of cotangents.
    return GradientEdge(left, place), node._saved_alpha * node._saved_mat2.t()


def _is_constant(node: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether a node leads to no input, as far as one transposition hides it.

    A compiler puts error nodes in the place of whatever enters its graph; inputs are copies.
    """
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    if node is None or node.name() == "torch::autograd::Error":
        return True
    variable = getattr(node, "variable", None)
    return variable is not None and not any(variable is x for x in inputs)


def column_root(out: Tensor, m: int) -> tuple[Any, Tensor]:
    """Where output ``m`` of every row enters the graph, and its cotangent.

    Columns that were stacked are entered one by one: through the stack, each would pull all.
    """
    node: Any = out.grad_fn
    if node is not None and node.name() == "StackBackward0" and not out._backward_hooks:
        edge = node.next_functions[m] if out.ndim == 2 and node._saved_dim in (1, 2**64 - 1) else ()
        if edge and edge[0] is not None:
            return GradientEdge(*edge), out.new_ones(()).expand(out.shape[0])
    row = out.shape[1:]
    if row.numel() == 1:
        return out, out.new_ones(()).expand(out.shape)
    return out, spread(units(row.numel(), m, 1, out), row, out.shape[0], 0)[0]


# --- products that are contracted at once ----------------------------------------------------


def divergence(run: Run, route: Route, probes: Sequence[Tensor] | None) -> Tensor:
    """The trace ``(B,)``, or for each of ``probes`` ``(B, k, *in)`` the estimate ``(B, k)``."""
    total = None
    for i, (out, dim) in enumerate(zip(run.output.leaves, run.dims)):
        if not out.shape[1:].numel():
            continue
        if probes is None:
            trace = contracted(run, out, i, route).sum(0)
        else:
            rows = probes[i].movedim(1, 0)  # (k, B, *in)
            vectors = rows.movedim(1, dim + 1) if dim else rows
            left = flat_rows(rows, 0, run.call.batch)
            trace = contracted(run, out, i, route, vectors, left).mT
        total = trace if total is None else total + trace
    assert total is not None
    return total


def contracted(
    run: Run, out: Tensor, j: int, route: Route, vectors: Maybe = None, left: Maybe = None
) -> Tensor:
    """``(K, B)``: ``left`` times the Jacobian of ``out`` by input ``j`` times ``vectors``.

    ``left`` is ``(K or 1, B, N)`` and ``vectors`` are ``(K, *x.shape)``; ``None`` for the standard
    basis. A reverse pass takes the two the other way around.
    """
    x, dim, batch, graph = run.inputs[j], run.dims[j], run.call.batch, run.create_graph
    if route.mode == "fwd":
        (product,) = pushforwards([out], [x], create_graph=graph)
        like, at, dim = x, dim, 0
    else:
        product = functools.partial(backward, out, [x], retain=True, graph=graph)
        like, at = out, 0
        vectors = None if vectors is None else batch_first(vectors, dim, batch, skip=1)
    if vectors is None:
        row = row_shape(like, at)
        count, chunks = row.numel(), basis_chunks(like, row, batch, at, route.chunk)
    else:
        count, chunks = len(vectors), vectors.to(like.dtype).split(route.chunk or len(vectors))

    def passes() -> Iterator[tuple[int, list[Maybe]]]:
        start = 0
        for chunk in chunks:
            (rows,) = of_each(product, chunk)
            stop = start + chunk.shape[0]
            if rows is not None:
                rows = flat_rows(rows, dim, batch)  # (k, B, N)
                if left is None:
                    rows = rows[:, :, start:stop].diagonal(0, 0, 2).mT
                else:
                    rows = (rows * (left if left.shape[0] == 1 else left[start:stop])).sum(-1)
            yield stop - start, [rows]
            start = stop

    (result,) = join(passes(), count, 0, 1, create_graph=graph)
    return out.new_zeros(count, batch) if result is None else result
