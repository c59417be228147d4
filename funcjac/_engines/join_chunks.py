"""A result put together from what passes gave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._environment.torch_private import is_functional


class Chunks:
    """Tensors joined along ``axis`` to ``count`` entries; ``None`` stands for zeros.

    Without a graph they go into one preallocated tensor: small ones that are kept each for itself,
    among large ones that come and go, would keep the C library from using the memory of those
    again. With one they are joined at the end: every write into a slice would add a node that
    copies the whole backwards.
    """

    def __init__(self, count: int, axis: int, *, create_graph: bool) -> None:
        self.count, self.axis, self.create_graph = count, axis, create_graph
        self.stop = 0
        self.whole: Tensor | None = None
        self.pieces: list[tuple[int, Tensor | None]] = []

    def add(self, piece: Tensor | None, size: int) -> None:
        """Take in the next ``size`` entries."""
        start, self.stop = self.stop, self.stop + size
        if size == self.count:
            self.whole = piece
        elif self.create_graph:
            self.pieces.append((size, piece))
        elif piece is not None:
            if self.whole is None:
                new = piece.new_zeros if start else piece.new_empty
                self.whole = new(_resized(piece, self.axis, self.count))
            piece = piece.detach() if piece.requires_grad else piece
            self.whole.narrow(self.axis, start, size).copy_(piece)
        elif self.whole is not None:
            self.whole.narrow(self.axis, start, size).zero_()

    def result(self) -> Tensor | None:
        like = next((piece for _, piece in self.pieces if piece is not None), None)
        if like is None:
            return self.whole
        parts = [
            like.new_zeros(_resized(like, self.axis, size)) if piece is None else piece
            for size, piece in self.pieces
        ]
        return torch.cat(parts, self.axis)


def _resized(like: Tensor, axis: int, size: int) -> list[int]:
    shape = list(like.shape)
    shape[axis] = size
    return shape


def apart_from(vectors: Tensor, tensor: Tensor) -> Tensor:
    """A copy, if a tensor lies in the memory of basis vectors, which are kept for other calls."""
    if is_functional() or type(tensor) is not Tensor or type(vectors) is not Tensor:
        return tensor
    shared = tensor.untyped_storage().data_ptr() == vectors.untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor


def added(total: Tensor | None, piece: Tensor | None) -> Tensor | None:
    """The sum of pieces so far; ``None`` for zero."""
    if total is None or piece is None:
        return piece if total is None else total
    return total + piece


def block_dtype(out: Tensor, inputs: Sequence[Tensor]) -> torch.dtype:
    """The type that an output and inputs promote to."""
    dtype = out.dtype
    for x in inputs:
        if x.dtype != dtype and x.ndim:  # a number does not widen a tensor
            dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def as_block(
    value: Tensor | None, shape: Sequence[int], out: Tensor, inputs: Sequence[Tensor]
) -> Tensor:
    """A contiguous block of the type that ``out`` and ``inputs`` promote to; ``None`` for zeros."""
    dtype = block_dtype(out, inputs)
    if value is None:
        return out.new_zeros(shape, dtype=dtype)
    value = value if value.dtype == dtype else value.to(dtype)
    value = value if value.shape == shape else value.reshape(shape)  # no node of its own
    return value.contiguous()
