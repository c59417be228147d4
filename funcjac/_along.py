"""Derivatives along directions, by Taylor propagation or by nesting, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._batched import Call, Output
from funcjac._block import Block
from funcjac._directions import Directions, row_shape
from funcjac._jets import paired, straight
from funcjac._linear import Context
from funcjac._modes import Route
from funcjac._nested import second_along
from funcjac._state import rng_state, set_rng_state
from funcjac._taylor import Recording, propagate, record

# Derivatives of one tensor that are propagated together: 2**23 floats are 32 MiB.
_PASS_ELEMENTS = 2**23
_MOST_NESTED = 64


class Along:
    """First and second derivatives of a call along directions, by the way that a route says.

    Attributes:
        output: what ``func`` returned, once it has run.
    """

    def __init__(self, call: Call, route: Route, context: Context) -> None:
        self.call, self.route, self.context = call, route, context
        self.replay = rng_state() if call.options.randomness != "error" else None
        self.output: Output | None = None
        self.recording: Recording | None = None
        if route.mode == "taylor":
            self.recording = record(call, context)
            self.output = self.recording.output

    def chunk(self, count: int) -> int:
        if self.route.chunk is not None:
            return min(self.route.chunk, count)
        if self.recording is None:  # which holds all pairs within a chunk
            return min(count, _MOST_NESTED)
        largest = max((shape.numel() for shape in self.recording.tape.shapes), default=1)
        return min(max(_PASS_ELEMENTS // max(largest, 1), 1), count)

    def pieces(
        self, j: int, given: Directions, *, total: bool
    ) -> Iterator[tuple[int, int, list[Tensor | None], list[Tensor | None]]]:
        """Start, stop, and for each output first and second derivatives ``(k, B, *out)``.

        With ``total``, second derivatives come as their weighted sum, ``k = 1``.
        """
        count = len(given.left)
        step = self.chunk(count)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield start, stop, *self._piece(j, given.narrow(start, stop), total=total)

    def _piece(self, j: int, given: Directions, *, total: bool) -> tuple[Any, Any]:
        left, right, weights, _ = given
        if self.recording is None:
            right = left if right is None else right
            if self.replay is not None:
                set_rng_state(self.replay)  # every piece sees the same draws
            firsts, seconds, self.output = second_along(
                self.call, self.route, self.context, j, left, right
            )
            if total:
                seconds = [torch.tensordot(weights.to(s.dtype), s, 1).unsqueeze(0) for s in seconds]
            return firsts, seconds
        count = len(left)
        if right is None:
            scheme, seeds = straight(count, weights if total else None), left
        else:
            scheme = paired(count, weights if total else None)
            seeds = torch.cat([left, right])
        n = scheme.firsts
        if not self.call.options.return_value:  # then nobody asks for first derivatives
            return [None] * len(self.recording.slots), propagate(
                self.recording, {j: seeds}, scheme, n
            )
        jets = propagate(self.recording, {j: seeds}, scheme)
        firsts = [None if jet is None else jet[:count] for jet in jets]
        seconds = [None if jet is None or len(jet) <= n else jet[n:] for jet in jets]
        return firsts, seconds


class Columns:
    """Blocks ``(B, *out, *row)`` of one input, put together from pieces ``(k, B, *out)``.

    A row is one of the input, or has as many entries as there are pieces in all.
    """

    def __init__(self, call: Call, j: int, context: Context, row: torch.Size | None = None) -> None:
        self.x, dim = call.inputs[j], call.layout.diff_dims[j]
        self.row = row_shape(self.x, dim) if row is None else row
        self.graph = context.graph or context.functional
        self.blocks: list[Block] = []

    def add(self, output: Any, pieces: Sequence[Tensor | None], start: int, stop: int) -> None:
        count = self.row.numel()
        self.blocks = self.blocks or [
            Block((*out.shape, count), -1, self.graph) for out in output.leaves
        ]
        for block, piece in zip(self.blocks, pieces):
            block.add(piece, -1, start, stop, True)

    def result(self, output: Any) -> list[Tensor]:
        return [
            block.result((*out.shape, *self.row), out, self.x)
            for block, out in zip(self.blocks, output.leaves)
        ]
