"""Directional second derivatives by Taylor propagation or nested differentiation, in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._engines.graph import Route
from funcjac._engines.run import Run
from funcjac._engines.second_order import Along, Directions, along
from funcjac._taylor import Recording, directional, largest, make_recording

# Derivatives of one tensor that are propagated together: 2**23 floats are 32 MiB.
_PASS_ELEMENTS = 2**23


def recording_of(run: Run) -> Recording:
    """What Taylor propagation follows of a run.

    Raises:
        UntraceableError: it does something through which nothing can be propagated.
    """
    return make_recording(run.recorder, run.output.leaves, create_graph=run.create_graph)


def derivatives_along(
    run: Run, given: Sequence[Directions], route: Route, *, firsts: bool, total: bool
) -> list[Along]:
    """First and second derivatives along directions, given for each input.

    With ``total``, second derivatives come as their weighted sum, ``(1, B, *out)``.
    """
    if route.mode == "taylor":
        recording = recording_of(run)
        return [
            _by_taylor(recording, j, pairs, route.chunk, firsts=firsts, total=total)
            for j, pairs in enumerate(given)
        ]
    result = along(run, given, route)
    if not total:
        return result
    return [Along(a.firsts, _weighted(a.seconds, g.weights)) for a, g in zip(result, given)]


def _weighted(seconds: Sequence[Tensor | None], weights: Tensor) -> list[Tensor | None]:
    return [
        None if s is None else torch.tensordot(weights.to(s.dtype), s, 1).unsqueeze(0)
        for s in seconds
    ]


def _by_taylor(
    recording: Recording, j: int, given: Directions, chunk: int | None, *, firsts: bool, total: bool
) -> Along:
    count = len(given.left)
    step = chunk or max(_PASS_ELEMENTS // max(largest(recording), 1), 1)
    pieces = []
    for start in range(0, count, step):
        part = given.narrow(start, min(start + step, count))
        weights = part.weights if total else None
        pair = directional(recording, j, part.left, part.right, weights, firsts=firsts)
        pieces.append(Along(*pair))
    if len(pieces) == 1:
        return pieces[0]
    if not pieces:
        return Along([None] * len(recording.slots), [None] * len(recording.slots))
    outs = range(len(pieces[0].seconds))
    sizes = [min(step, count - start) for start in range(0, count, step)]
    joined = [_concatenated([piece.firsts[i] for piece in pieces], sizes) for i in outs]
    seconds = [[piece.seconds[i] for piece in pieces] for i in outs]
    if total:
        return Along(joined, [_added(columns) for columns in seconds])
    return Along(joined, [_concatenated(columns, sizes) for columns in seconds])


def _concatenated(columns: list[Tensor | None], sizes: list[int]) -> Tensor | None:
    like = next((column for column in columns if column is not None), None)
    if like is None:
        return None
    zero = like.new_zeros(())
    pieces = zip(columns, sizes)
    return torch.cat([zero.expand(n, *like.shape[1:]) if c is None else c for c, n in pieces])


def _added(columns: list[Tensor | None]) -> Tensor | None:
    total = None
    for column in columns:
        if column is not None:
            total = column if total is None else total + column
    return total
