"""The divergence of each row through one graph: the trace of its Jacobian, without the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from funcjac._engines.assemble import Block, added
from funcjac._engines.basis import chunks, row_shape
from funcjac._engines.graph import Pushforward, Route
from funcjac._engines.run import Run
from funcjac._environment.torch_private import backward, over_basis

# (start, stop, vectors) of the basis, or of probes
Vectors = Iterator[tuple[int, int, Tensor]]


def divergence(run: Run, route: Route, probes: list[Tensor] | None) -> Tensor:
    """The trace ``(B,)``, or for each of ``probes`` ``(B, k, *in)`` the estimate ``(B, k)``."""
    pushforward = Pushforward(run.output.leaves, run.inputs) if route.mode == "fwd" else None
    total: Tensor | None = None
    for i, out in enumerate(run.output.leaves):
        x, dim = run.inputs[i], run.dims[i]
        if not row_shape(x, dim).numel():
            continue
        drawn = None if probes is None else probes[i].movedim(1, 0)  # (k, B, *in)
        each = Block((run.call.batch, 0 if drawn is None else len(drawn)), -1, run.create_graph)
        like, at = (x, dim) if pushforward else (out, 0)
        for start, stop, vectors in _vectors(drawn, like, row_shape(x, dim), run, at, route.chunk):
            many = route.chunk != 1
            if pushforward is not None:
                graph = run.create_graph
                products = pushforward.push(i, vectors, many=many, create_graph=graph)[i]
            else:
                products = _pull(out, x, vectors, many, run.create_graph)
            where = 0 if pushforward else dim
            probe = None if drawn is None else drawn[start:stop]
            piece = _picked(products, probe, run.call.batch, where, (start, stop), many, out)
            if drawn is None:
                total = added(total, piece, graph=run.create_graph)
            else:
                each.add(piece, None, start, stop, many=True)
        if drawn is not None:
            total = added(total, each.result(each.shape, out, x), graph=run.create_graph)
    assert total is not None
    return total


def _pull(out: Tensor, x: Tensor, vectors: Tensor, many: bool, create_graph: bool) -> Any:
    def pull(cotangent: Tensor) -> Any:
        return backward(out, [x], cotangent, retain=True, graph=create_graph)

    return (over_basis(pull, vectors) if many else pull(vectors))[0]


def _vectors(
    drawn: Tensor | None,
    like: Tensor,
    row: torch.Size,
    run: Run,
    dim: int | None,
    chunk: int | None,
) -> Vectors:
    """The standard basis, or probes, with the batch at ``dim``; a chunk of one without ``k``."""
    if drawn is None:
        yield from chunks(like, row, run.call.batch, dim, chunk)
        return
    rows = drawn.to(like.dtype)
    rows = rows if dim in (0, None) else rows.movedim(1, dim + 1)
    step = chunk or len(rows)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        yield start, start + len(piece), piece[0] if chunk == 1 else piece


def _picked(
    product: Tensor | None,
    probe: Tensor | None,
    batch: int,
    dim: int | None,
    place: tuple[int, int],
    many: bool,
    like: Tensor,
) -> Tensor:
    """Of products ``(k, ..., B, ...)``: the entries of the basis added up, or ``v . J v``."""
    start, stop = place
    if product is None:
        return like.new_zeros(batch if probe is None else (stop - start, batch))
    rows = product if many else product.unsqueeze(0)
    rows = rows.unsqueeze(1) if dim is None else rows.movedim(dim + 1, 1)
    flat = rows.flatten(2) if rows.ndim > 2 else rows.unsqueeze(2)
    flat = flat.expand(stop - start, batch, flat.shape[2])
    if probe is None:
        if stop - start == 1:
            return flat[0, :, start]
        return flat[:, :, start:stop].diagonal(0, 0, 2).sum(-1)
    return (flat * probe.reshape(flat.shape)).sum(-1)
