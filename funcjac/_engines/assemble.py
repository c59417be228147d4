"""One block of a result, put together from passes, or their sum.

Small results that are kept each for itself, among large tensors that come and go, would keep the
C library from using the memory of those again: without a graph they go to one place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Block:
    """One block of the result, filled along ``axis``.

    Without a graph, chunks go into one preallocated tensor. With one they are joined at
    the end: every write into a slice would add a node that copies the whole block backwards.
    """

    def __init__(self, shape: tuple[int, ...], axis: int, graph: bool) -> None:
        self.shape, self.axis, self.graph = shape, axis, graph
        self.value: Tensor | None = None
        self.slots: Sequence[Tensor] = ()
        self.pieces: list[tuple[int, int, Tensor]] = []
        self.zeros: list[tuple[int, int]] = []  # what does not depend on the input

    def add(self, piece: Tensor | None, dim: int | None, start: int, stop: int, many: bool) -> None:
        """Take in basis vectors ``start`` to ``stop``.

        ``dim`` is where ``piece`` has the batch: that goes to the front, and where there are
        ``many`` vectors, their dimension goes from the front to ``axis``.
        """
        if piece is None:
            self.zeros.append((start, stop))
            return
        if many:
            piece = self._placed(piece, dim)
            if stop - start == self.shape[self.axis]:
                self.value = piece
            elif self.graph:
                self.pieces.append((start, stop, piece))
            else:
                value = self._allocated(piece)
                value.narrow(self.axis, start, stop - start).copy_(piece)
            return
        if dim is None:  # a batch of one, or of none
            piece = piece.unsqueeze(0)[: self.shape[0]] if self.axis == 1 else piece.unsqueeze(0)
        elif dim > 0:
            piece = piece.movedim(dim, 0)
        if self.graph:
            self.pieces.append((start, stop, piece.unsqueeze(self.axis)))
        else:
            self.slots = self.slots or self._allocated(piece).unbind(self.axis)
            self.slots[start].copy_(piece)

    def _placed(self, piece: Tensor, dim: int | None) -> Tensor:
        if self.axis == -1:
            return piece.movedim(0, -1)  # (k, B, *out) -> (B, *out, k)
        return piece.unsqueeze(0)[: self.shape[0]] if dim is None else piece.movedim(dim + 1, 0)

    def _allocated(self, like: Tensor) -> Tensor:
        if self.value is None:
            self.value = like.new_empty(self.shape)
        return self.value

    def result(self, shape: tuple[int, ...], out: Tensor, x: Tensor) -> Tensor:
        """The block, contiguous, of the result type of ``out`` and ``x``."""
        value = self._joined() if self.pieces else self.value
        dtype = out.dtype if out.dtype == x.dtype else torch.result_type(out, x)
        if value is None:
            return x.new_zeros(shape, dtype=dtype)
        if not self.pieces:
            for start, stop in self.zeros:
                value.narrow(self.axis, start, stop - start).zero_()
        value = (value if value.dtype == dtype else value.to(dtype)).contiguous()
        return value if value.shape == shape else value.view(shape)

    def _joined(self) -> Tensor:
        found, end = [], 0
        first = self.pieces[0][2]
        for start, stop, piece in [*self.pieces, (self.shape[self.axis],) * 2 + (None,)]:
            if start > end:  # rows that do not depend on the input
                shape = list(self.shape)
                shape[self.axis] = start - end
                found.append(first.new_zeros(shape))
            if piece is not None:
                found.append(piece)
            end = stop
        return torch.cat(found, self.axis)


def added(total: Tensor | None, piece: Tensor | None, *, graph: bool) -> Tensor | None:
    """The sum of pieces so far; ``None`` for zero."""
    if total is None or piece is None:
        return total if piece is None else piece if graph else piece.clone()
    alone = not graph and total.dtype == piece.dtype
    return total.add_(piece) if alone else total + piece


class Columns:
    """Tensors of one shape, stacked; without a graph they are written to one place.

    Small tensors that live on among large ones that come and go would keep the C library from
    using the memory of those again.
    """

    def __init__(self, shape: tuple[int, ...], *, create_graph: bool) -> None:
        self.shape, self.create_graph = shape, create_graph
        self.count = 0
        self.whole: Tensor | None = None
        self.pieces: list[Tensor] = []

    def add(self, piece: Tensor) -> None:
        if self.create_graph:
            self.pieces.append(piece)
            return
        if self.whole is None:
            self.whole = piece.new_empty(self.shape)
        self.whole[self.count].copy_(piece.detach())
        self.count += 1

    def result(self, like: Tensor) -> Tensor:
        if self.pieces:
            return torch.stack(self.pieces)
        return like.new_zeros(self.shape) if self.whole is None else self.whole


class Chunks:
    """Stacks ``(k, ...)`` joined along their first dimension; ``None`` stands for zeros."""

    def __init__(self, count: int, create_graph: bool) -> None:
        self.count, self.create_graph = count, create_graph
        self.start = 0
        self.whole: Tensor | None = None
        self.pieces: list[tuple[int, int, Tensor]] = []

    def add(self, piece: Tensor | None, size: int) -> None:
        start, self.start = self.start, self.start + size
        if piece is None:
            return
        if self.create_graph:
            self.pieces.append((start, self.start, piece))
            return
        if self.whole is None:
            self.whole = piece.new_zeros(self.count, *piece.shape[1:])
        self.whole[start : self.start].copy_(piece.detach())

    def result(self) -> Tensor | None:
        if not self.pieces:
            return self.whole
        like, end, parts = self.pieces[0][2], 0, []
        for start, stop, piece in [*self.pieces, (self.count, self.count, None)]:
            if start > end:
                parts.append(like.new_zeros(start - end, *like.shape[1:]))
            if piece is not None:
                parts.append(piece)
            end = stop
        return torch.cat(parts)
