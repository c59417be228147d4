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
from funcjac._engines.rows import added, coordinates, join, row_shape
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._operators.operator import SecondOrder, Tensors
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

    def directions(
        self, call: Call, xs: Tensors, dims: Sequence[int | None], extras: Tensors
    ) -> list[Directions]:
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
        firsts, total = self.adds_jac(run.call), self.adds_up()
        directions = self.directions(run.call, run.inputs, run.dims, run.call.extras)
        if route.mode != "taylor":
            pairs = zip(along(run, directions, route), directions)
            return self._by_output([(f, self._summed(s, d.weights)) for (f, s), d in pairs])
        outs, graph = run.output.leaves, run.create_graph
        recording = make_recording(run.recorder, outs, create_graph=graph)
        return self._by_output(
            [
                _by_taylor(recording, j, pairs, route.chunk, firsts=firsts, total=total)
                for j, pairs in enumerate(directions)
            ]
        )

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

    def curvatures(
        self, run: Run, probe: Probe, factors: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Double backward along each direction of an input, ``(K, B)`` or ``(K,)``, and weights."""
        directions = self.directions(run.call, run.inputs, run.dims, run.call.extras)
        for j, pairs in enumerate(directions):
            yield curvature(run, probe.grads[j], j, *_both(pairs), factors), pairs.weights

    def own_entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along each coordinate, other rows by another factor."""
        entries = []
        factors, seeds = row_factors(run, probe)
        columns = self.curvatures(run, probe, factors)
        for x, dim, (column, _) in zip(run.inputs, run.dims, columns):
            if dim is None:
                entries.append(Entry(probe.seeds, column.view(x.shape), x, None))
            else:
                grad = column.movedim(0, -1).reshape(run.call.batch, *row_shape(x, dim))
                entries.append(Entry(seeds, grad, x.movedim(dim, 0), 0))
        return entries

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along each pair of directions."""
        seconds = []
        directions = self.directions(call, call.inputs, call.layout.diff_dims, call.extras)
        for j, pairs in enumerate(directions):
            rows = [difference(call, [{j: u}, {j: v}]) for u, v in zip(*_both(pairs))]
            stacks = list(map(torch.stack, zip(*rows))) or [None] * len(result.blocks)
            seconds.append(self._summed(stacks, pairs.weights))
        expected = list(map(self.combine, zip(*seconds)))
        for e in range(len(self.own_inputs(call))):
            columns = [(values[e], blocks[e]) for values, blocks in zip(expected, result.blocks)]
            columns = [(value.reshape(b.shape), b) for value, b in columns if value is not None]
            yield [value for value, _ in columns], [block for _, block in columns]


def _both(pairs: Directions) -> tuple[Tensor, Tensor]:
    return pairs.left, pairs.left if pairs.right is None else pairs.right


def _axis_last(columns: Maybe) -> Maybe:
    return None if columns is None else columns.movedim(0, -1)


def _by_taylor(
    recording: Recording, j: int, pairs: Directions, chunk: int | None, *, firsts: bool, total: bool
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
            size, seeds, every = len(part.left), part.left, slice(len(part.left))
            other = every
            if part.right is not None:
                seeds = on_one_row(lambda *stacks: torch.cat(stacks), part.left, part.right)
                other = slice(size, None)
            scheme = second_order(every, other, part.weights if total else None)
            shift = 0 if part.right is None else size
            each = [(k, k + shift) for k in range(0 if total else size)]
            lowest, basis = 1 if firsts else 2, part.basis and part.right is None
            jets = along_directions(recording, {j: seeds}, scheme, each, lowest, basis=basis)
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
    x[b, i]^2`` for every ``i``, of shape ``(B, *out, *in)``: the ``u_xx`` and ``u_yy`` of a
    physics-informed network, without the Hessian. Derivatives are pushed through the operations
    of the one run of ``func`` (Taylor propagation). Where that is not possible (GRUs, custom
    ``autograd.Function``, writes into slices), two differentiations are nested on that run.

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
