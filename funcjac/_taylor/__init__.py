"""Taylor propagation: first and higher derivatives in one pass through the operations of a run.

``func`` runs once under a :class:`Recorder`. Then derivatives along directions are pushed through
the recorded operations, each by its rule. A second derivative costs one more number for each
element, instead of another differentiation of a whole differentiation. (A. Griewank, J. Utke,
A. Walther, "Evaluating higher derivative tensors by forward propagation of univariate Taylor
series", 2000; J. Bettencourt, M. Johnson, D. Duvenaud, "Taylor-mode automatic differentiation
for higher-order derivatives in JAX", 2019; R. Li et al., "A computational framework for neural
network-based variational Monte Carlo with forward Laplacian", 2024.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._taylor.jets import Jet, mixed, on_one_row, rows_of, second_order, take
from funcjac._taylor.propagation import by_adjoints, keeps_rows, make_recording, propagate
from funcjac._taylor.recorder import Recorder
from funcjac._taylor.recording import Recording

__all__ = [
    "Recorder",
    "Recording",
    "all_pairs",
    "directional",
    "keeps_rows",
    "largest",
    "make_recording",
    "mixed_partials",
    "rows_of",
    "take",
]

Tensors = list["Tensor | None"]


def largest(recording: Recording) -> int:
    """Elements of the largest recorded value."""
    return max((value.numel() for value in recording.values), default=1)


def directional(
    recording: Recording,
    j: int,
    left: Tensor,
    right: Tensor | None,
    weights: Tensor | None,
    *,
    firsts: bool,
) -> tuple[Tensors, Tensors]:
    """First derivatives along ``left``, and second ones along ``left`` and ``right``.

    Args:
        recording: the run of ``func``.
        j: number of the input that moves.
        left: directions ``(K, *x.shape)``.
        right: second directions, ``None`` for the same ones.
        weights: ``(K,)``, with which second derivatives are added up.
        firsts: whether first derivatives are wanted.

    Returns:
        For each output first derivatives ``(K, B, *out)`` and second ones, ``(K, B, *out)`` or
        with weights ``(1, B, *out)``; ``None`` for zero, and for first ones that are not wanted.
    """
    count = len(left)
    if right is None:
        every = slice(0, count)
        scheme, seeds = second_order(every, every, weights), left
    else:
        scheme = second_order(slice(count), slice(count, None), weights)
        seeds = on_one_row(lambda *stacks: torch.cat(stacks), left, right)
    pairs = [(k, k if right is None else count + k) for k in range(count if weights is None else 0)]
    jets = by_adjoints(recording, {j: seeds}, pairs)
    jets = jets or propagate(recording, {j: (seeds, None)}, scheme, 1 if firsts else 2)
    slopes = [first[:count] if firsts and first is not None else None for first, _ in jets]
    return slopes, [second for _, second in jets]


def mixed_partials(
    recording: Recording, j_seeds: dict[int, Tensor], indices: Sequence[tuple[int, ...]]
) -> list[Tensors]:
    """Mixed partial derivatives of any order, with lower orders shared.

    Args:
        recording: the run of ``func``.
        j_seeds: by number of an input, directions ``(D, *x.shape)``, zero where a direction
            belongs to another input.
        indices: multi-indices, which count the directions; each direction is in one of them.

    Returns:
        For each index and output ``(B, *out)``; ``None`` for zero, and for the index ``()``.
    """
    named = [tuple(sorted(index)) for index in indices]
    device = next(iter(j_seeds.values())).device
    scheme, rows = mixed([index for index in named if index], device)
    seeds: dict[int, Jet] = {j: (seed, *[None] * (scheme.order - 1)) for j, seed in j_seeds.items()}
    lowest = min(len(index) for index in named if index)
    jets = None
    if scheme.order == 2:
        pairs: Any = sorted({index for index in named if len(index) == 2})
        jets = by_adjoints(recording, j_seeds, pairs)
    jets = jets or propagate(recording, seeds, scheme, lowest)

    def partial(jet: Jet, index: tuple[int, ...]) -> Tensor | None:
        stack = jet[len(index) - 1] if index else None
        return None if stack is None else stack[rows[index]]

    return [[partial(jet, index) for jet in jets] for index in named]


def all_pairs(
    recording: Recording, j_seeds: dict[int, Tensor], total: int
) -> list[tuple[Tensor | None, Tensor | None]]:
    """First derivatives along ``total`` directions, and second ones along all pairs of them.

    ``j_seeds`` holds directions ``(total, *x.shape)`` by number of an input, zero where a
    direction belongs to another input.

    Returns:
        For each output ``(N, B, *out)`` and ``(N (N + 1) / 2, B, *out)``, in the order of
        ``torch.triu_indices``; ``None`` for zero.
    """
    device = next(iter(j_seeds.values())).device
    left, right = torch.triu_indices(total, total, device=device)
    seeds: dict[int, Jet] = {j: (seed, None) for j, seed in j_seeds.items()}
    pairs = list(itertools.combinations_with_replacement(range(total), 2))
    jets = by_adjoints(recording, j_seeds, pairs)
    jets = jets or propagate(recording, seeds, second_order(left, right))
    return [(first, second) for first, second in jets]
