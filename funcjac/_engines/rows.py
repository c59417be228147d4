"""Rows of tensors: the standard basis of a row, directions, blocks joined from what passes gave."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._environment.torch_private import is_functional

# Making a small identity matrix takes 5 microseconds, of 100 that a small call takes.
_MOST_CACHED = 2**14
_CACHE: dict[Any, Tensor] = {}


def row_shape(x: Tensor, dim: int | None) -> torch.Size:
    if dim == 0:
        return x.shape[1:]
    return x.shape if dim is None else x.shape[:dim] + x.shape[dim + 1 :]


def row_sizes(inputs: Sequence[Tensor], dims: Sequence[int | None]) -> list[int]:
    return [row_shape(x, dim).numel() for x, dim in zip(inputs, dims)]


def identity(count: int, like: Tensor) -> Tensor:
    """The identity matrix ``(count, count)``; small ones are made once, where no transform is.

    Nothing that is returned to the user may lie in the memory of one that is kept.
    """
    is_kept = count > 1 and count * count <= _MOST_CACHED and not is_functional()
    key = (count, like.dtype, like.device) if is_kept else None
    eye = _CACHE.get(key)
    if eye is None:
        eye = torch.eye(count, dtype=like.dtype, device=like.device)
        if is_kept and type(eye) is Tensor and not eye.is_inference() and len(_CACHE) < 256:
            _CACHE[key] = eye
    return eye


def basis_chunks(
    like: Tensor, row: torch.Size, batch: int, dim: int | None, chunk: int | None
) -> Iterable[Tensor]:
    """The standard basis of one row, ``(k, ..., B, ...)`` at a time with the batch at ``dim``."""
    count = row.numel()
    # In a batch of one, a cotangent may come out as it went in.
    if batch != 1 and (chunk is None or chunk >= count):
        return [spread(identity(count, like), row, batch, dim)] if count else []
    size = chunk or count or 1
    return (spread(units(count, i, size, like), row, batch, dim) for i in range(0, count, size))


def units(count: int, start: int, size: int, like: Tensor) -> Tensor:
    """Up to ``size`` rows of the identity matrix ``(count, count)`` from ``start`` on, new ones."""
    rows = torch.zeros(min(size, count - start), count, dtype=like.dtype, device=like.device)
    rows.diagonal(start).fill_(1)
    return rows


def spread(vectors: Tensor, row: torch.Size, batch: int, dim: int | None) -> Tensor:
    """The same vectors in every row: ``(k, N) -> (k, ..., B, ...)``."""
    count = len(vectors)
    if dim is None:
        return vectors.view(count, *row)
    vectors = vectors.view(count, *row[:dim], 1, *row[dim:])
    return vectors.expand(count, *row[:dim], batch, *row[dim:])


def coordinates(x: Tensor, dim: int | None) -> Tensor:
    """The standard basis of a row, the same in all rows: ``(N, *x.shape)``."""
    row = row_shape(x, dim)
    return spread(identity(row.numel(), x), row, x.shape[dim] if dim is not None else 0, dim)


class Directions(NamedTuple):
    """Pairs of directions in one input: ``(K, *x.shape)`` with the batch where the input has it."""

    left: Tensor
    right: Tensor | None  # None for the same ones
    weights: Tensor
    basis: bool  # whether ``left`` is the standard basis

    def narrow(self, start: int, stop: int) -> Directions:
        right = None if self.right is None else self.right[start:stop]
        return Directions(self.left[start:stop], right, self.weights[start:stop], self.basis)


def batch_first(x: Tensor, dim: int | None, batch: int, *, skip: int = 0) -> Tensor:
    """``x`` with the batch moved from ``dim`` to the front, behind ``skip`` other dimensions.

    What has no batch is that of one row, or of none.
    """
    if dim is None:
        return x.unsqueeze(skip).narrow(skip, 0, batch)
    return x.movedim(dim + skip, skip) if dim else x


def flat_rows(stack: Tensor, dim: int | None, batch: int) -> Tensor:
    """``(k, ..., B, ...) -> (k, B, N)``."""
    rows = batch_first(stack, dim, batch, skip=1)
    return rows.flatten(2) if rows.ndim > 2 else rows.unsqueeze(2)


# --- blocks ------------------------------------------------------------------------------------


def join(
    passes: Iterable[tuple[int, Sequence[Tensor | None]]],
    count: int,
    axis: int,
    width: int,
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    """``width`` tensors of ``count`` entries along ``axis``; ``None`` stands for zeros.

    A pass brings a number of entries of each. Without a graph they go into one preallocated
    tensor: small ones that are kept each for itself, among large ones that come and go, would keep
    the C library from using the memory of those again. With one they are joined at the end: every
    write into a slice would add a node that copies the whole backwards.
    """
    start, sizes, parts = 0, [], []
    wholes: list[Tensor | None] = [None] * width
    for size, pieces in passes:
        if size == count:
            return list(pieces)
        sizes.append(size)
        if create_graph:
            parts.append(pieces)
            continue
        for i, piece in enumerate(pieces):
            if piece is not None:
                whole = wholes[i]
                if whole is None:
                    whole = wholes[i] = _zeros(piece, axis, count)
                whole.narrow(axis, start, size).copy_(piece.detach())
        start += size
    return [_concatenated(column, sizes, axis) for column in zip(*parts)] if parts else wholes


def _concatenated(pieces: Sequence[Tensor | None], sizes: list[int], axis: int) -> Tensor | None:
    like = next((piece for piece in pieces if piece is not None), None)
    if like is None:
        return None
    pairs = zip(pieces, sizes)
    return torch.cat([_zeros(like, axis, n) if p is None else p for p, n in pairs], axis)


def _zeros(like: Tensor, axis: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[axis] = size
    return like.new_zeros(shape)


def mirrored(hess: Sequence[Sequence[Tensor]], ndims: Sequence[int]) -> list[list[Tensor]]:
    """``H[k][j]`` as ``H[j][k]``: ``(..., *in_k, *in_j) -> (..., *in_j, *in_k)``, of columns.

    Zero times a pole is NaN in any pass: in the row of one entry by plain autograd, in a column by
    forward mode. What is finite is symmetric.
    """

    def swapped(block: Tensor, first: int, second: int) -> Tensor:
        return block.movedim([*range(-second, 0)], [*range(-first - second, -first)])

    return [[swapped(hess[k][j], n, m) for k, n in enumerate(ndims)] for j, m in enumerate(ndims)]


def added(total: Tensor | None, piece: Tensor | None) -> Tensor | None:
    """The sum of pieces so far; ``None`` for zero."""
    if total is None or piece is None:
        return piece if total is None else total
    return total + piece


def as_block(
    value: Tensor | None, shape: Sequence[int], out: Tensor, inputs: Sequence[Tensor]
) -> Tensor:
    """A contiguous block of the type that ``out`` and ``inputs`` promote to; ``None`` for zeros."""
    dtype = out.dtype
    for x in inputs:
        if x.dtype != dtype and x.ndim:  # a number does not widen a tensor
            dtype = torch.promote_types(dtype, x.dtype)
    if value is None:
        return out.new_zeros(shape, dtype=dtype)
    value = value if value.dtype == dtype else value.to(dtype)
    value = value if value.shape == shape else value.reshape(shape)  # no node of its own
    return value.contiguous()
