"""The engine ``sum``: the sum trick, through the graph that one run of the whole batch left.

Where rows do not depend on one another, one vector-Jacobian product with the same cotangent in
every row gives a row of every row's Jacobian at once (pytorch/functorch issue 328; TensorFlow's
``batch_jacobian``), and one Jacobian-vector product a column. A batch of one is always
independent, which is how the loop over rows uses this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from funcjac._engines.rows import (
    apart_from,
    as_block,
    basis_chunks,
    flat_rows,
    identity,
    join,
    row_shape,
    spread,
)
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._environment.torch_private import (
    Tensors,
    backward,
    has_levels,
    is_traced,
    over_basis,
    vector_jacobian,
)

Product = Callable[[Tensor], Tensors]
Maybe = Tensor | None
Blocks = list[list[Tensor]]
# Up to this many outputs, starting behind the last layer costs plain code more than it saves.
_FEWEST_PEELED = 16


def jacobian(run: Run, route: Route) -> Derivatives:
    """The Jacobian of each row, ``(B, *out, *in)`` of each output by each input."""
    outs = run.output.leaves
    if route.mode == "rev":
        return Derivatives(list(map(functools.partial(_rows, run, route.chunk), outs)), run.output)
    products = pushforwards(outs, run.inputs, create_graph=run.create_graph)
    columns = [_columns(run, outs, j, push, route.chunk) for j, push in enumerate(products)]
    return Derivatives([list(row) for row in zip(*columns)], run.output)


def _rows(run: Run, chunk: int | None, out: Tensor) -> list[Tensor]:
    """Derivatives of one output by all inputs, by reverse passes."""
    passes, count, inputs = _reverse(run, out, chunk), out.shape[1:].numel(), run.inputs
    joined = join(passes, count, 1, len(inputs), create_graph=run.create_graph)
    result = []
    for block, x, dim in zip(joined, inputs, run.call.layout.diff_dims):
        result.append(as_block(block, (*out.shape, *row_shape(x, dim)), out, (x,)))
    return result


def _reverse(run: Run, out: Tensor, chunk: int | None) -> Iterator[tuple[int, list[Maybe]]]:
    """Gradients ``(B, k, *in)`` by all inputs, from one chunk of cotangents after the other."""
    call, inputs, _, graph, _ = run
    row, root = out.shape[1:], out
    peeled = peel(out, inputs) if row.numel() > _FEWEST_PEELED or is_traced() else None
    if peeled is None:
        cotangents = basis_chunks(out, row, call.batch, 0, chunk)
    else:
        root, vectors = peeled  # (M, K)
        cotangents = vectors.unsqueeze(1).expand(-1, call.batch, -1).split(chunk or len(vectors))
    product = functools.partial(backward, root, inputs, retain=True, graph=graph)
    for vectors in cotangents:
        rows = []
        for grad, dim in zip(of_each(product, vectors), call.layout.diff_dims):
            if grad is not None:
                if call.batch == 1:  # a cotangent may come out as it went in
                    grad = apart_from(vectors, grad)
                # (k, ..., B, ...) -> (B, k, *in)
                grad = grad.unsqueeze(0)[: call.batch] if dim is None else grad.movedim(dim + 1, 0)
            rows.append(grad)
        yield vectors.shape[0], rows


def _columns(
    run: Run, outs: Sequence[Tensor], j: int, push: Product, chunk: int | None
) -> list[Tensor]:
    """Derivatives of all outputs by one input, by forward passes."""
    x, dim = run.inputs[j], run.dims[j]
    row = row_shape(x, dim)

    def forward() -> Iterator[tuple[int, list[Maybe]]]:
        for vectors in basis_chunks(x, row, run.call.batch, dim, chunk):
            tangents = of_each(push, vectors)  # (k, B, *out) -> (B, *out, k)
            yield vectors.shape[0], [None if t is None else t.movedim(0, -1) for t in tangents]

    joined = join(forward(), row.numel(), -1, len(outs), create_graph=run.create_graph)
    pairs = zip(joined, outs)
    return [as_block(block, (*out.shape, *row), out, (x,)) for block, out in pairs]


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

    def product(transpose: Product | None, tangent: Tensor) -> Tensors:
        if transpose is None:
            return [None] * len(outs)
        pushed = iter(transpose(tangent))
        return [next(pushed) if out.requires_grad else None for out in outs]

    transposes = _transposes(roots, inputs, create_graph) if roots else [None] * len(inputs)
    return [functools.partial(product, transpose) for transpose in transposes]


def _transposes(
    roots: Sequence[Tensor], inputs: Sequence[Tensor], create_graph: bool
) -> list[Product | None]:
    """The transpose of ``u -> J^T u`` for each input; ``None`` for zero."""
    vjp = functools.partial(vector_jacobian, retain=True, graph=True)
    if has_levels():  # a tensor of another level must stand for the cotangent
        zeros = [torch.zeros_like(root) for root in roots]
        products = [lambda *u, x=x: vjp(roots, [x], u)[0] for x in inputs]
        grads = vjp(roots, inputs, zeros)
        return [
            None if grad is None else torch.func.vjp(product, *zeros)[1]
            for product, grad in zip(products, grads)
        ]
    with torch.enable_grad():
        zeros = [torch.zeros_like(root, requires_grad=True) for root in roots]
        grads = vjp(roots, inputs, zeros)
    product = functools.partial(backward, retain=True, graph=create_graph)
    return [
        functools.partial(product, grad, zeros) if grad is not None and grad.requires_grad else None
        for grad in grads
    ]


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
    if mode == "fwd":
        (product,), dim = pushforwards([out], [x], create_graph=graph), 0
    else:
        product = functools.partial(backward, out, [x], retain=True, graph=graph)

    def passes() -> Iterator[tuple[int, list[Maybe]]]:
        start = 0
        for chunk in vectors:
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
