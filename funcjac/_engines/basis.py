"""The standard basis of a row, the same in every row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import is_functional

# A basis larger than this many elements is built chunk by chunk, a smaller one is kept.
_MOST_ELEMENTS = 2**20
_MOST_KEPT = 2**14
_KEPT: dict[Any, Tensor] = {}


def row_shape(x: Tensor, dim: int | None) -> torch.Size:
    return x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]


def row_sizes(inputs: Sequence[Tensor], dims: Sequence[int | None]) -> list[int]:
    """Elements of one row of each input."""
    return [row_shape(x, dim).numel() for x, dim in zip(inputs, dims)]


def elements_of_rows(outs: Sequence[Tensor]) -> int:
    """Elements of one row of all outputs together."""
    return sum([out.shape[1:].numel() for out in outs])


def identity(count: int, like: Tensor) -> Tensor:
    """The identity matrix ``(count, count)``; small ones are made once."""
    if count * count > _MOST_KEPT or is_functional():  # there, what is made belongs to a level
        return torch.eye(count, dtype=like.dtype, device=like.device)
    key = (count, like.dtype, like.device)
    eye = _KEPT.get(key)
    if eye is None:
        eye = torch.eye(count, dtype=like.dtype, device=like.device)
        if type(eye) is Tensor and not eye.is_inference() and len(_KEPT) < 256:
            _KEPT[key] = eye
    return eye


def chunks(
    like: Tensor, row: torch.Size, batch: int, dim: int | None, chunk: int | None
) -> Iterator[tuple[int, int, Tensor]]:
    """The standard basis of one row in chunks, each with its ends.

    A chunk is ``(k, ..., B, ...)`` with the batch at ``dim`` of what follows ``k``; a chunk of
    one comes without ``k``.
    """
    count = row.numel()
    step = count if chunk is None else min(chunk, count)
    whole = None
    if step == count or count * count <= _MOST_ELEMENTS:
        whole = spread(identity(count, like), row, batch, dim)
    if whole is not None and chunk == 1:
        for start, vector in enumerate(whole.unbind(0)):
            yield start, start + 1, vector
        return
    for start in range(0, count, step) if count else ():
        stop = min(start + step, count)
        if whole is not None:
            yield start, stop, whole if step == count else whole[start:stop]
            continue
        rows = torch.zeros(stop - start, count, dtype=like.dtype, device=like.device)
        rows.diagonal(start).fill_(1)
        vectors = spread(rows, row, batch, dim)
        yield start, stop, vectors[0] if chunk == 1 else vectors


def spread(vectors: Tensor, row: torch.Size, batch: int, dim: int | None) -> Tensor:
    """The same vectors in every row: ``(k, N) -> (k, ..., B, ...)``."""
    count = vectors.shape[0]
    if dim is None:
        return vectors.view(count, *row)
    vectors = vectors.view(count, *row[:dim], 1, *row[dim:])
    return vectors.expand(count, *row[:dim], batch, *row[dim:])


def coordinates(x: Tensor, dim: int | None, chosen: list[int] | None = None) -> Tensor:
    """The standard basis of a row, or some of it, the same in all rows: ``(K, *x.shape)``."""
    row = row_shape(x, dim)
    eye = identity(row.numel(), x)
    eye = eye if chosen is None else eye[chosen]
    return spread(eye, row, x.shape[dim] if dim is not None else 0, dim)
