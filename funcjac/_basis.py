"""The standard basis of a row, the same in every row."""

from collections.abc import Iterator

import torch
from torch import Tensor

from funcjac._modes import Route

# A basis larger than this many elements is built chunk by chunk.
_MOST_ELEMENTS = 2**22


def seeds(
    like: Tensor, row: torch.Size, batch: int, dim: int | None, route: Route
) -> Iterator[tuple[int, int, Tensor]]:
    """The standard basis of one row, the same in every row, in chunks with their ends.

    A chunk is ``(k, ..., B, ...)`` with the batch at ``dim`` of what follows ``k``; without
    ``k`` where basis vectors run one by one.
    """
    count = row.numel()
    if count == 0:
        return
    chunk = count if route.chunk is None else min(route.chunk, count)
    whole = None
    if chunk == count or count * count <= _MOST_ELEMENTS:
        whole = _spread(_rows(like, 0, count, count), row, batch, dim)
    if whole is not None and not route.vectorized:
        for start, seed in enumerate(whole.unbind(0)):
            yield start, start + 1, seed
        return
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        if whole is not None:
            yield start, stop, whole if chunk == count else whole[start:stop]
        else:
            seed = _spread(_rows(like, start, stop, count), row, batch, dim)
            yield start, stop, seed if route.vectorized else seed[0]


def _rows(like: Tensor, start: int, stop: int, count: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the identity ``(count, count)``."""
    if stop - start == count:
        return torch.eye(count, dtype=like.dtype, device=like.device)
    rows = torch.zeros(stop - start, count, dtype=like.dtype, device=like.device)
    rows.diagonal(start).fill_(1)
    return rows


def _spread(vectors: Tensor, row: torch.Size, batch: int, dim: int | None) -> Tensor:
    """The same basis vectors in every row: ``(k, N) -> (k, ..., B, ...)``."""
    count = vectors.shape[0]
    if dim is None:
        return vectors.view(count, *row)
    vectors = vectors.view(count, *row[:dim], 1, *row[dim:])
    return vectors.expand(count, *row[:dim], batch, *row[dim:])
