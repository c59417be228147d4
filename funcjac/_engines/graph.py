"""Jacobians of tensors that exist, through the graph that made them: the sum trick.

Where rows do not depend on one another, one vector-Jacobian product with the same cotangent in
every row gives a row of every row's Jacobian at once (pytorch/functorch issue 328; TensorFlow's
``batch_jacobian``). Forward mode is the transposed VJP: ``u -> J^T u`` is linear, and its own VJP
is ``J`` (J. Townsend, "A new trick for calculating Jacobian vector products", 2017), so that only
torch's reverse formulas are used. A batch of one is always independent, which is how the loop
over rows uses this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from funcjac._engines.assemble import Block
from funcjac._engines.basis import chunks, identity, row_shape, spread
from funcjac._engines.run import Derivatives, Run
from funcjac._environment.torch_private import (
    Tensors,
    backward,
    has_levels,
    over_basis,
    vector_jacobian,
)

Blocks = list[list[Tensor]]
Product = Callable[[Tensor], Tensors]
# Below this many outputs, starting behind the last layer costs more than it saves.
_FEWEST_PEELED = 16


class Route(NamedTuple):
    """How derivatives are computed.

    Attributes:
        mode: ``"rev"``, ``"fwd"``, a nested mode, or ``"taylor"``.
        chunk: basis vectors per pass, ``None`` for all.
    """

    mode: str
    chunk: int | None = None


def jacobian(run: Run, route: Route) -> Derivatives:
    """The Jacobian of each row of a run, whose rows must be independent."""
    blocks = jacobian_blocks(
        run.output.leaves, run.inputs, run.dims, run.call.batch, route, run.create_graph
    )
    return Derivatives(blocks, run.output)


def jacobian_blocks(
    outs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dims: Sequence[int | None],
    batch: int,
    route: Route,
    create_graph: bool,
) -> Blocks:
    """``blocks[i][j]`` of shape ``(B, *out, *in)``, of outputs ``(B, *out)`` by inputs."""
    compute = _reverse if route.mode == "rev" else _forward
    return compute(outs, inputs, dims, batch, route.chunk, create_graph)


def _reverse(
    outs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dims: Sequence[int | None],
    batch: int,
    chunk: int | None,
    create_graph: bool,
) -> Blocks:
    rows = [row_shape(x, dim) for x, dim in zip(inputs, dims)]
    blocks = []
    for out in outs:
        shape = out.shape[1:]
        count = shape.numel()
        parts = [Block((batch, count, *row), 1, create_graph) for row in rows]
        for start, stop, root, cotangent in _cotangents(out, shape, batch, chunk, inputs):
            pull = functools.partial(_pull, root, inputs, create_graph)
            many = chunk != 1 and count > 0
            grads = over_basis(pull, cotangent) if many else pull(cotangent)
            for part, grad, dim in zip(parts, grads, dims):
                part.add(grad, dim, start, stop, many)  # (k, ..., B, ...) -> (B, k, *in)
        shapes = [(batch, *shape, *row) for row in rows]
        blocks.append([p.result(s, out, x) for p, s, x in zip(parts, shapes, inputs)])
    return blocks


def _pull(root: Any, inputs: Sequence[Tensor], create_graph: bool, cotangent: Tensor) -> Tensors:
    return backward(root, inputs, cotangent, retain=True, graph=create_graph)


# --- where a pass begins ---------------------------------------------------------------------


def _cotangents(
    out: Tensor, row: torch.Size, batch: int, chunk: int | None, inputs: Sequence[Tensor]
) -> Any:
    """Chunks of the basis of an output row, and where in the graph each enters."""
    peeled = _peel(out, inputs) if row.numel() > _FEWEST_PEELED else None
    if peeled is None:
        for start, stop, cotangent in chunks(out, row, batch, 0, chunk):
            yield start, stop, out, cotangent
        return
    root, rows = peeled  # (M, K)
    step = len(rows) if chunk is None else chunk
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        cotangent = rows[start:stop].unsqueeze(1).expand(-1, batch, -1)
        yield start, stop, root, cotangent[0] if chunk == 1 else cotangent


def _peel(out: Tensor, inputs: Sequence[Tensor]) -> tuple[Any, Tensor] | None:
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
    """Whether a node leads to no input, as far as one transposition hides it."""
    if node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    return node is None or (variable is not None and not any(variable is x for x in inputs))


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


# --- forward, as a transposed VJP -------------------------------------------------------------


class Pushforward:
    """Columns of the Jacobian of ``outs``, as the transpose of one vector-Jacobian product."""

    def __init__(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.outs, self.live = outs, [out for out in outs if out.requires_grad]
        self.inputs = inputs
        self.pulls: dict[int, Any] = {}
        self.grads: Sequence[Any] = [None] * len(inputs)
        if self.live and not has_levels():
            with torch.enable_grad():
                self.seeds = [torch.zeros_like(out, requires_grad=True) for out in self.live]
                self.grads = _vjp(self.live, inputs, self.seeds)

    def push(self, j: int, tangents: Tensor, *, many: bool, create_graph: bool) -> Tensors:
        """Tangents of all outputs from tangents of input ``j``; ``None`` for zero."""
        transpose = self._functional(j) if has_levels() else self._plain(j, create_graph)
        if transpose is None:
            return [None] * len(self.outs)
        pushed = iter(over_basis(transpose, tangents) if many else transpose(tangents))
        return [next(pushed) if out.requires_grad else None for out in self.outs]

    def _plain(self, j: int, create_graph: bool) -> Product | None:
        grad = self.grads[j]
        if grad is None or not grad.requires_grad:
            return None
        return lambda tangent: backward(grad, self.seeds, tangent, retain=True, graph=create_graph)

    def _functional(self, j: int) -> Product | None:
        """Under torch.func a tensor of another level must stand for the cotangent."""
        if j not in self.pulls:
            x, zeros = self.inputs[j], [torch.zeros_like(out) for out in self.live]
            depends = bool(self.live) and _vjp(self.live, [x], zeros)[0] is not None
            pull = lambda *seeds: _vjp(self.live, [x], seeds)[0]  # noqa: E731
            self.pulls[j] = torch.func.vjp(pull, *zeros)[1] if depends else None
        return self.pulls[j]


def _vjp(outs: Any, inputs: Any, cotangents: Any) -> Sequence[Any]:
    return vector_jacobian(outs, inputs, cotangents, retain=True, graph=True)


def _forward(
    outs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    dims: Sequence[int | None],
    batch: int,
    chunk: int | None,
    create_graph: bool,
) -> Blocks:
    pushforward = Pushforward(outs, inputs)
    columns = []
    for j, (x, dim) in enumerate(zip(inputs, dims)):
        row = row_shape(x, dim)
        parts = [Block((*out.shape, row.numel()), -1, create_graph) for out in outs]
        for start, stop, tangents in chunks(x, row, batch, dim, chunk):
            many = chunk != 1
            pushed = pushforward.push(j, tangents, many=many, create_graph=create_graph)
            for part, tangent in zip(parts, pushed):
                part.add(tangent, -1, start, stop, many)  # (k, B, *out) -> (B, *out, k)
        columns.append([p.result((*out.shape, *row), out, x) for p, out in zip(parts, outs)])
    return [list(row) for row in zip(*columns)]
