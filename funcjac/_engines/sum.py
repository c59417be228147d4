"""The engine ``sum``: the sum trick, through the graph that one run of the whole batch left.

Where rows do not depend on one another, one vector-Jacobian product with the same cotangent in
every row gives a row of every row's Jacobian at once (pytorch/functorch issue 328; TensorFlow's
``batch_jacobian``), and one Jacobian-vector product a column. A batch of one is always
independent, which is how the loop over rows uses this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from funcjac._engines.basis import (
    basis_chunks,
    flat_rows,
    identity,
    row_shape,
    spread,
)
from funcjac._engines.join_chunks import Chunks, apart_from, as_block
from funcjac._engines.products import Product, of_each, pull, pushforwards
from funcjac._engines.run_func import Derivatives, Route, Run

Blocks = list[list[Tensor]]
# Below this many outputs, starting behind the last layer costs more than it saves.
_FEWEST_PEELED = 16


def jacobian(run: Run, route: Route) -> Derivatives:
    """The Jacobian of each row of a run, whose rows must be independent."""
    return Derivatives(jacobian_blocks(run, run.output.leaves, route), run.output)


def jacobian_blocks(run: Run, outs: Sequence[Tensor], route: Route) -> Blocks:
    """``blocks[i][j]`` of shape ``(B, *out, *in)``, of ``outs`` ``(B, *out)`` by the inputs."""
    if route.mode == "rev":
        return [_rows(run, out, route.chunk) for out in outs]
    products = pushforwards(outs, run.inputs, create_graph=run.create_graph)
    columns = [_columns(run, outs, j, push, route.chunk) for j, push in enumerate(products)]
    return [list(row) for row in zip(*columns)]


def _rows(run: Run, out: Tensor, chunk: int | None) -> list[Tensor]:
    """Derivatives of one output by all inputs, by reverse passes."""
    row, dims, batch, graph = out.shape[1:], run.dims, run.call.batch, run.create_graph
    root, cotangents = _cotangents(run, out, chunk)
    joined = [Chunks(row.numel(), 1, create_graph=graph) for _ in run.inputs]
    for vectors in cotangents:
        grads = pull(root, run.inputs, vectors, create_graph=graph)
        for chunks, grad, dim in zip(joined, grads, dims):
            if batch == 1 and grad is not None:  # a cotangent may come out as it went in
                grad = apart_from(vectors, grad)
            if grad is not None:  # (k, ..., B, ...) -> (B, k, *in)
                grad = grad.unsqueeze(0)[:batch] if dim is None else grad.movedim(dim + 1, 0)
            chunks.add(grad, vectors.shape[0])
    return [
        as_block(chunks.result(), (*out.shape, *row_shape(x, dim)), out, (x,))
        for chunks, x, dim in zip(joined, run.inputs, dims)
    ]


def _columns(
    run: Run, outs: Sequence[Tensor], j: int, push: Product, chunk: int | None
) -> list[Tensor]:
    """Derivatives of all outputs by one input, by forward passes."""
    x, dim = run.inputs[j], run.dims[j]
    row = row_shape(x, dim)
    joined = [Chunks(row.numel(), -1, create_graph=run.create_graph) for _ in outs]
    for vectors in basis_chunks(x, row, run.call.batch, dim, chunk):
        for chunks, tangent in zip(joined, of_each(push, vectors)):  # (k, B, *out) -> (B, *out, k)
            chunks.add(None if tangent is None else tangent.movedim(0, -1), vectors.shape[0])
    return [
        as_block(chunks.result(), (*out.shape, *row), out, (x,))
        for chunks, out in zip(joined, outs)
    ]


# --- where a pass begins ---------------------------------------------------------------------


def _cotangents(run: Run, out: Tensor, chunk: int | None) -> tuple[Any, Iterable[Tensor]]:
    """Where in the graph a pass begins, and cotangents there for all outputs of a row."""
    row, batch = out.shape[1:], run.call.batch
    peeled = peel(out, run.inputs) if row.numel() > _FEWEST_PEELED else None
    if peeled is None:
        return out, basis_chunks(out, row, batch, 0, chunk)
    root, rows = peeled  # (M, K)
    return root, rows.unsqueeze(1).expand(-1, batch, -1).split(chunk or len(rows))


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
    rows = node._saved_mat2.t()
    alpha = node._saved_alpha
    return GradientEdge(left, place), rows if alpha == 1 else alpha * rows


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
    return out, spread(identity(row.numel(), out)[m : m + 1], row, out.shape[0], 0)[0]


# --- products that are contracted at once ----------------------------------------------------


def divergence(run: Run, route: Route, probes: Sequence[Tensor] | None) -> Tensor:
    """The trace ``(B,)``, or for each of ``probes`` ``(B, k, *in)`` the estimate ``(B, k)``."""
    total = None
    for i, (out, x, dim) in enumerate(zip(run.output.leaves, run.inputs, run.dims)):
        row, batch = out.shape[1:], run.call.batch
        if not row.numel():
            continue
        like, at = (x, dim) if route.mode == "fwd" else (out, 0)
        if probes is None:
            basis = basis_chunks(like, row, batch, at, route.chunk)
            trace = contracted(run, out, i, route.mode, basis, row.numel(), None).sum(0)
        else:
            left = probes[i].movedim(1, 0)  # (k, B, *in)
            placed = (left.movedim(1, at + 1) if at else left).to(like.dtype)
            vectors = placed.split(route.chunk or len(left))
            trace = contracted(
                run, out, i, route.mode, vectors, len(left), flat_rows(left, 0, batch)
            ).mT
        total = trace if total is None else total + trace
    assert total is not None
    return total


def contracted(
    run: Run,
    out: Tensor,
    j: int,
    mode: str,
    vectors: Iterable[Tensor],
    count: int,
    left: Tensor | None,
) -> Tensor:
    """``(K, B)``: ``left`` times the Jacobian of ``out`` by input ``j`` times ``vectors``.

    ``left`` is ``(K or 1, B, N)``; ``None`` for the standard basis.
    """
    x, dim, batch, graph = run.inputs[j], run.dims[j], run.call.batch, run.create_graph
    push = pushforwards([out], [x], create_graph=graph)[0] if mode == "fwd" else None
    joined = Chunks(count, 0, create_graph=graph)
    for chunk in vectors:
        (product,) = of_each(push, chunk) if push else pull(out, [x], chunk, create_graph=graph)
        if product is not None:
            start, stop = joined.stop, joined.stop + chunk.shape[0]
            rows = flat_rows(product, 0 if push else dim, batch)  # (k, B, N)
            if left is None:
                product = rows[:, :, start:stop].diagonal(0, 0, 2).mT
            else:
                product = (rows * (left if left.shape[0] == 1 else left[start:stop])).sum(-1)
        joined.add(product, chunk.shape[0])
    result = joined.result()
    return out.new_zeros(count, batch) if result is None else result
