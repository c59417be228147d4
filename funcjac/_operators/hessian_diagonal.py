"""``batch_hessian_diagonal``: the second derivative of each row along each input coordinate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines import vmap
from funcjac._engines.nesting import Along, Directions, along
from funcjac._engines.rows import added, coordinates, join
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._operators.operator import Dims, SecondOrder, Tensors
from funcjac._operators.transform import documented, make_transform
from funcjac._taylor import Recording, along_directions, make_recording, on_one_row, second_order
from funcjac._verification.central_differences import Pair, difference
from funcjac._verification.reference_vjp import Entry, Probe, curvature, row_factors

Maybe = Tensor | None
# Derivatives of one tensor that are propagated together: 2**21 floats are 8 MiB.
_PASS_ELEMENTS = 2**21


@dataclass(frozen=True)
class HessianDiagonal(SecondOrder):
    """``blocks[i][j]``: second derivatives by input ``j``, then first ones where returned.

    Subclasses state other directions, and how their derivatives become blocks.
    """

    order: ClassVar[int] = 1

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        return inputs, inputs, inputs

    def directions(self, call: Call, xs: Tensors, dims: Dims, extras: Tensors) -> list[Directions]:
        """Directions in each input; of one row if no input has a batch dimension."""
        bases = [coordinates(x, dim) for x, dim in zip(xs, dims)]
        return [Directions(left, None, left.new_ones(len(left)), basis=True) for left in bases]

    def adds_up(self) -> bool:
        """Whether second derivatives are added up on the way, by weights."""
        return False

    def combine(self, seconds: Sequence[Maybe]) -> Sequence[Maybe]:
        """Blocks, from second derivatives ``(K, ...)`` along the directions of each input."""
        return list(map(_axis_last, seconds))

    def derivatives(self, run: Run, route: Route) -> list[list[Any]]:
        directions = self.directions(run.call, run.inputs, run.dims, run.call.extras)
        if route.mode != "taylor":
            pairs = zip(along(run, directions, route), directions)
            return self._by_output([(f, self._summed(s, d.weights)) for (f, s), d in pairs])
        outs, firsts, total = run.output.leaves, self.adds_jac(run.call), self.adds_up()
        recording = make_recording(run.recorder, outs, create_graph=run.create_graph)
        inputs = enumerate(directions)
        columns = [_by_taylor(recording, j, d, route.chunk, firsts, total) for j, d in inputs]
        return self._by_output(columns)

    def row_derivatives(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        derivatives, come_along, chunk = [], None, call.options.chunk_size
        for j, pairs in enumerate(self.directions(call, xs, [None] * len(xs), extras)):
            slopes, seconds, come_along = vmap.along(f, xs, j, _both(pairs), mode, chunk)
            derivatives.append((slopes, self._summed(seconds, pairs.weights)))
        return self._by_output(derivatives), come_along

    def _by_output(self, derivatives: Sequence[Any]) -> list[list[Any]]:
        slopes, seconds = zip(*derivatives)
        rows = zip(zip(*seconds), zip(*slopes))
        return [[*self.combine(second), *map(_axis_last, first)] for second, first in rows]

    def _summed(self, seconds: Sequence[Maybe], weights: Tensor) -> list[Maybe]:
        """Second derivatives ``(K, ...)``, or ``(1, ...)`` where they are added up."""
        if not self.adds_up():
            return list(seconds)
        return [
            None if s is None else torch.tensordot(weights.to(s.dtype), s, 1).unsqueeze(0)
            for s in seconds
        ]

    def curvatures(self, run: Run, probe: Probe, factors: Tensor | None) -> Iterator[Tensor]:
        """Weighted double backward along each direction of an input, ``(B, K)`` or ``(K,)``."""
        directions = self.directions(run.call, run.inputs, run.dims, run.call.extras)
        for j, pairs in enumerate(directions):
            columns = curvature(run, probe.grads[j], j, *_both(pairs), factors)
            yield columns.movedim(0, -1) * pairs.weights

    def own_entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along each coordinate, other rows by another factor."""
        entries = []
        factors, seeds = row_factors(run, probe)
        for x, dim, rows in zip(run.inputs, run.dims, self.curvatures(run, probe, factors)):
            if dim is None:
                entries.append(Entry(probe.seeds, rows.view(x.shape), x, None))
            else:
                like = x.movedim(dim, 0)
                entries.append(Entry(seeds, rows.reshape(like.shape), like, 0))
        return entries

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along each pair of directions."""
        seconds = []
        directions = self.directions(call, call.inputs, call.layout.diff_dims, call.extras)
        for j, pairs in enumerate(directions):
            rows = [difference(call, [{j: u}, {j: v}]) for u, v in zip(*_both(pairs))]
            stacks = list(map(torch.stack, zip(*rows))) or [None] * len(result.blocks)
            seconds.append(self._summed(stacks, pairs.weights))
        for expected, blocks in zip(map(self.combine, zip(*seconds)), result.blocks):
            for value, block in zip(expected, blocks):
                if value is not None:
                    yield [value.reshape(block.shape)], [block]


def _both(pairs: Directions) -> tuple[Tensor, Tensor]:
    return pairs.left, pairs.left if pairs.right is None else pairs.right


def _axis_last(columns: Maybe) -> Maybe:
    return None if columns is None else columns.movedim(0, -1)


def _by_taylor(
    recording: Recording, j: int, pairs: Directions, chunk: int | None, firsts: bool, total: bool
) -> Along:
    """Derivatives along directions in input ``j``; their weighted sum ``(1, B, *out)`` if total."""
    count, graph = len(pairs.left), recording.create_graph
    largest = max((value.numel() for value in recording.values), default=0)
    step = chunk or max(_PASS_ELEMENTS // max(largest, 1), 1)
    outputs = len(recording.slots)
    sums: list[Maybe] = [None] * outputs

    def passes() -> Iterator[tuple[int, list[Maybe]]]:
        for start in range(0, max(count, 1), step):
            part = pairs.narrow(start, min(start + step, count))
            seeds, size = part.left, len(part.left)
            left = right = slice(size)
            if part.right is not None:
                seeds = on_one_row(lambda *stacks: torch.cat(stacks), part.left, part.right)
                right = slice(size, None)
            scheme = second_order(left, right, part.weights if total else None)
            each = [] if total else [(k, k + (right.start or 0)) for k in range(size)]
            jets = along_directions(recording, {j: seeds}, scheme, each, 1 if firsts else 2)
            slopes = [f[:size] if firsts and f is not None else None for f, _ in jets]
            seconds = [second for _, second in jets]
            if total:
                sums[:] = map(added, sums, seconds)
            yield size, slopes if total else [*slopes, *seconds]

    joined = join(passes(), count, 0, outputs * (1 if total else 2), create_graph=graph)
    return Along(joined[:outputs], sums if total else joined[outputs:])


@documented
def batch_hessian_diagonal(  # noqa: D417  documented once, for all
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    in_dims: Any = 0,
    out_dims: Any = 0,
    mode: str = "auto",
    engine: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    return_value: bool = False,
    randomness: str = "error",
    check: bool | str = "auto",
) -> Callable[..., Any]:
    """Computes the second derivative of each row along each of its inputs.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``d^2 func(x)[b] / d
    x[b, i]^2`` for every ``i``, of shape ``(B, *out, *in)``, without the Hessian. Derivatives are
    pushed through the operations of the one run of ``func`` (Taylor propagation). Where that is
    not possible (GRUs, custom ``autograd.Function``, writes into slices), two differentiations
    are nested on that run.

    Args:
        func: a batched function.
        argnums: positional argument or arguments to differentiate; a tuple adds a tuple inside
            each output leaf.
        mode: ``"taylor"``; one of the nested modes of :func:`batch_hessian`; or ``"auto"``:
            Taylor where it takes fewer operations and can follow ``func``, else nested.
        {keywords}

    Returns:
        A function that returns ``diag``, or ``(diag, (jac, value))`` with ``return_value``.

    Raises:
        {errors}

    Cost: ``func`` once, and ``2 N`` times its linear operations, for ``N`` inputs in a row, at all
    outputs at once; memory of ``2 N`` of its tensors at a time, or, with few outputs, of ``N`` for
    each operation that is not linear. A verified call takes ``N + 1`` more passes backward.

    Sources: see :mod:`funcjac._taylor`; pytorch/pytorch issues 41530 and 87559, which asked.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> diag = funcjac.batch_hessian_diagonal(lambda x: x.sin().sum(-1))(x)
        >>> torch.allclose(diag, -x.sin())
        True
    """
    operator = HessianDiagonal()
    keywords = argnums, in_dims, out_dims, mode, engine, chunk_size, has_aux, return_value
    return make_transform("batch_hessian_diagonal", func, operator, *keywords, randomness, check)
