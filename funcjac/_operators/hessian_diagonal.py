"""``batch_hessian_diagonal``: the second derivative of each row along each input coordinate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Options
from funcjac._engines import vmap
from funcjac._engines.basis import coordinates, row_shape
from funcjac._engines.chunks import as_block
from funcjac._engines.nesting import Directions
from funcjac._engines.run import Derivatives, Route, Run
from funcjac._operators.directions import Spec, derivatives_along, of_row
from funcjac._operators.operator import (
    NESTED,
    SecondOrder,
    by_output,
    finished,
    first_entries,
)
from funcjac._operators.transform import Transform
from funcjac._verification.central_differences import Pair, difference
from funcjac._verification.reference_vjp import Entry, Probe, curvature, row_factors


@dataclass(frozen=True)
class HessianDiagonal(SecondOrder):
    """``blocks[i][j]``: second derivatives by input ``j``, then first ones where returned."""

    modes: ClassVar[tuple[str, ...]] = ("taylor", *NESTED)

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        del call, outputs
        return inputs, inputs, inputs

    def compute(self, run: Run, route: Route) -> Derivatives:
        every = [
            Directions(left, None, left.new_ones(len(left)), basis=True)
            for left in (coordinates(x, dim) for x, dim in zip(run.inputs, run.dims))
        ]
        slopes = run.call.options.return_value
        pairs = derivatives_along(run, every, route, firsts=slopes, total=False)
        rows = []
        for i, out in enumerate(run.output.leaves):
            columns = [pair.seconds[i] for pair in pairs]
            columns += [pair.firsts[i] for pair in pairs] if slopes else []
            inputs = list(zip(run.inputs, run.dims)) * (1 + slopes)
            rows.append(
                [
                    as_block(
                        None if column is None else column.movedim(0, -1),
                        (*out.shape, *row_shape(x, dim)),
                        out,
                        x,
                    )
                    for column, (x, dim) in zip(columns, inputs)
                ]
            )
        return Derivatives(rows, run.output)

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        columns, slopes, come_along = [], [], None
        for j, x in enumerate(xs):
            left, right, _ = of_row(Spec(), j, x, extras)
            pairs, chunk = (left, right), call.options.chunk_size
            firsts, seconds, come_along = vmap.along(function, xs, j, pairs, mode, chunk)
            columns.append([s.movedim(0, -1).reshape(*s.shape[1:], *x.shape) for s in seconds])
            slopes.append([f.movedim(0, -1).reshape(*f.shape[1:], *x.shape) for f in firsts])
        columns += slopes if call.options.return_value else []
        return [list(row) for row in zip(*columns)], come_along

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        return super().by_inputs(call) * (1 + call.options.return_value)

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along each coordinate, other rows by another factor."""
        entries = []
        factors, seeds = row_factors(run, probe)
        for j, (x, dim) in enumerate(zip(run.inputs, run.dims)):
            every = coordinates(x, dim)
            bends = curvature(run, probe.grads[j], j, every, every, factors)
            row = row_shape(x, dim)
            if dim is None:
                entries.append(Entry(probe.seeds, bends.view(row), x, None))
            else:
                grad = bends.movedim(0, -1).reshape(run.call.batch, *row)
                entries.append(Entry(seeds, grad, x.movedim(dim, 0), 0))
        return entries + first_entries(run, probe)

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Twice along each coordinate."""
        for j, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
            columns = [difference(call, [{j: one}, {j: one}]) for one in coordinates(x, dim)]
            for i, blocks in enumerate(result.blocks):
                stack = torch.stack([column[i] for column in columns], -1)
                yield [stack], [blocks[j].reshape(stack.shape)]

    def assemble(self, call: Call, result: Derivatives) -> Any:
        spec, n = call.layout.in_spec, len(call.layout.diff)
        tree = by_output(result, lambda blocks: pytree.unflatten(spec, blocks[:n]))
        return finished(call, result, tree, n)


def batch_hessian_diagonal(
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
    that ``func`` runs in this very call, once (Taylor propagation), so nothing of an earlier call
    can be stale. Where that is not possible (recurrent kernels, custom ``autograd.Function``,
    writes into slices), two differentiations are nested on the same run.

    Args:
        func: a batched function: row ``b`` of its output depends on row ``b`` of its batched
            inputs alone.
        argnums: positional argument or arguments to differentiate; a tuple adds a tuple inside
            each output leaf.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"taylor"``; one of the nested modes of :func:`batch_hessian`; or ``"auto"``:
            Taylor where it takes fewer operations and can follow ``func``, else nested.
        engine: how rows are kept apart in the nested modes, as in :func:`batch_jacobian`.
            ``"taylor"`` runs the whole batch, and needs ``"sum"`` or ``"auto"``.
        chunk_size: coordinates in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return the Jacobian and ``func``'s output, which come for free.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call,
            ``False`` none; as in :func:`batch_jacobian`.

    Returns:
        A function of the same arguments. It returns ``diag``; ``(diag, aux)`` with ``has_aux``;
        ``(diag, (jac, value))`` with ``return_value``; ``(diag, (jac, (value, aux)))`` with both.

    Raises:
        TypeError, ValueError: bad words or arguments, as for :func:`batch_jacobian`.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain double backward.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``func`` once, and ``2 N`` times its linear operations, for ``N`` inputs in a row, at all
    ``M`` outputs at once; memory of ``2 N`` of its tensors at a time. A verified
    call takes ``N + 1`` more passes backward.

    Sources: see :mod:`funcjac._taylor`; pytorch/pytorch issues 41530 and 87559, which asked.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> diag = funcjac.batch_hessian_diagonal(lambda x: x.sin().sum(-1))(x)
        >>> diag.shape
        torch.Size([2, 3])
        >>> torch.allclose(diag, -x.sin())
        True
    """
    options = Options(
        name="batch_hessian_diagonal",
        argnums=argnums,
        in_dims=in_dims,
        out_dims=out_dims,
        mode=mode,
        engine=engine,
        chunk_size=chunk_size,
        has_aux=has_aux,
        return_value=return_value,
        randomness=randomness,
        check=check,
        operator=HessianDiagonal(),
    )
    return Transform(func, options)
