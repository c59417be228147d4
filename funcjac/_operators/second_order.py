"""Directional second derivatives by Taylor propagation or nested differentiation, in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from funcjac._engines.assemble import Chunks, added
from funcjac._engines.graph import Route
from funcjac._engines.run import Run
from funcjac._engines.second_order import Along, Directions, along
from funcjac._taylor import Recording, directional, largest, make_recording

# Derivatives of one tensor that are propagated together: 2**21 floats are 8 MiB.
_PASS_ELEMENTS = 2**21


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
    if count <= step:
        weights = given.weights if total else None
        pair = directional(recording, j, given.left, given.right, weights, firsts=firsts)
        return Along(*pair)
    outs = len(recording.slots)
    slopes = [Chunks(count, recording.create_graph) for _ in range(outs)]
    bends = [Chunks(count, recording.create_graph) for _ in range(outs)]
    sums: list[Tensor | None] = [None] * outs
    for start in range(0, count, step):
        part = given.narrow(start, min(start + step, count))
        weights = part.weights if total else None
        first, second = directional(recording, j, part.left, part.right, weights, firsts=firsts)
        for i in range(outs):
            slopes[i].add(first[i], len(part.left))
            if total:
                sums[i] = added(sums[i], second[i], graph=recording.create_graph)
            else:
                bends[i].add(second[i], len(part.left))
    return Along([c.result() for c in slopes], sums if total else [c.result() for c in bends])
