"""``batch_hessian``: the Hessian of each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Options
from funcjac._engines import vmap
from funcjac._engines.basis import coordinates, row_shape, row_sizes
from funcjac._engines.chunks import as_block
from funcjac._engines.nesting import hessian_blocks
from funcjac._engines.run import Derivatives, Route, Run
from funcjac._engines.sum import Blocks
from funcjac._operators.directions import recording_of
from funcjac._operators.operator import (
    NESTED,
    SecondOrder,
    by_output,
    finished,
    first_entries,
)
from funcjac._operators.transform import Transform
from funcjac._taylor import all_pairs
from funcjac._verification.central_differences import Pair, difference, random_moves, times
from funcjac._verification.reference_vjp import Entry, Probe, outer_product, random_like, vjp

# Inputs up to which all pairs of them are propagated together.
_MOST_PAIRED = 12


@dataclass(frozen=True)
class Hessian(SecondOrder):
    """``blocks[i]``: ``H[j][k]`` one after the other, then ``J[j]`` where it is returned."""

    modes: ClassVar[tuple[str, ...]] = (*NESTED, "taylor")

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        del call, outputs
        return inputs, inputs * (inputs + 1) // 2, inputs

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        if inputs > _MOST_PAIRED or call.options.chunk_size is not None:
            return call.options.mode == "taylor"
        return super().uses_taylor(call, outputs, inputs)

    def compute(self, run: Run, route: Route) -> Derivatives:
        hess, jac = _by_taylor(run) if route.mode == "taylor" else hessian_blocks(run, route)
        rows = []
        for out, blocks, slopes in zip(run.output.leaves, hess, jac):
            inputs = list(zip(run.inputs, run.dims))
            row = []
            for (x, dim), band in zip(inputs, blocks):
                for (y, other), block in zip(inputs, band):
                    shape = (*out.shape, *row_shape(x, dim), *row_shape(y, other))
                    row.append(as_block(block, shape, out, x).to(torch.result_type(block, y)))
            if run.call.options.return_value:
                shapes = [(*out.shape, *row_shape(x, dim)) for x, dim in inputs]
                row += [as_block(s, n, out, x) for s, n, x in zip(slopes, shapes, run.inputs)]
            rows.append(row)
        return Derivatives(rows, run.output)

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        del extras
        hess, jac, along = vmap.hessian(function, xs, mode, call.options.chunk_size)
        slopes = jac if call.options.return_value else [[] for _ in jac]
        flat = [[block for band in blocks for block in band] for blocks in hess]
        return [row + list(slope) for row, slope in zip(flat, slopes)], along

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        alone = super().by_inputs(call)
        first = alone if call.options.return_value else []
        return [a + b for a in alone for b in alone] + first

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along a random tangent of each input."""
        entries = []
        for grad, x, dim in zip(probe.grads, run.inputs, run.dims):
            tangent = random_like(x, probe.generator)
            rows = vjp([grad], run.inputs, [tangent], create_graph=run.create_graph)
            seeds = [outer_product(seed, tangent, dim) for seed in probe.seeds]
            triples = zip(rows, run.inputs, run.dims)
            entries += [Entry(seeds, row, y, other) for row, y, other in triples]
        return entries + first_entries(run, probe)

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Twice along one random direction."""
        moves, dims = random_moves(call), call.layout.diff_dims
        n, computed = len(dims), []
        for blocks in result.blocks:
            terms = [
                times(times(blocks[j * n + k], moves[k], dims[k]), moves[j], dims[j])
                for j in range(n)
                for k in range(n)
            ]
            computed.append(sum(terms[1:], terms[0]))
        yield difference(call, [moves, moves]), computed

    def assemble(self, call: Call, result: Derivatives) -> Any:
        spec, n = call.layout.in_spec, len(call.layout.diff)

        def square(blocks: list[Any]) -> Any:
            rows = [pytree.unflatten(spec, blocks[j * n : (j + 1) * n]) for j in range(n)]
            return pytree.unflatten(spec, rows)

        return finished(call, result, by_output(result, square), n * n)


def _by_taylor(run: Run) -> tuple[list[Blocks], Blocks]:
    """All pairs of coordinates, each once."""
    sizes = row_sizes(run.inputs, run.dims)
    total, device = sum(sizes), run.inputs[0].device
    left, right = torch.triu_indices(total, total, device=device)
    place = torch.empty(total, total, dtype=torch.long, device=device)
    place[left, right] = place[right, left] = torch.arange(len(left), device=device)
    pairs = all_pairs(recording_of(run), stacked_coordinates(run), total)
    hess, jac = [], []
    for out, (firsts, seconds) in zip(run.output.leaves, pairs):
        firsts = out.new_zeros(total, *out.shape) if firsts is None else firsts
        seconds = out.new_zeros(len(left), *out.shape) if seconds is None else seconds
        jac.append(list(firsts.movedim(0, -1).split(sizes, -1)))  # (B, *out, N)
        whole = seconds[place].movedim((0, 1), (-2, -1))  # (B, *out, N, N)
        hess.append([list(band.split(sizes, -1)) for band in whole.split(sizes, -2)])
    return hess, jac


def stacked_coordinates(run: Run) -> dict[int, Tensor]:
    """The basis of all inputs together: ``(N, *x.shape)`` for each, zero for other inputs."""
    if len(run.inputs) == 1:
        return {0: coordinates(run.inputs[0], run.dims[0])}
    sizes = row_sizes(run.inputs, run.dims)
    start, total = 0, sum(sizes)
    seeds = {}
    for j, (x, dim, size) in enumerate(zip(run.inputs, run.dims, sizes)):
        before, after = x.new_zeros(start, *x.shape), x.new_zeros(total - start - size, *x.shape)
        seeds[j] = torch.cat([before, coordinates(x, dim), after])
        start += size
    return seeds


def batch_hessian(
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
    """Computes the Hessian of each row of a batch.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``H[b] = d^2 func(x)[b] / d
    x[b]^2``, of shape ``(B, *out, *in, *in)``: what ``batch_jacobian(batch_jacobian(func))``
    gives, as one transform. Like :func:`torch.func.hessian` under :func:`torch.vmap`, except for
    what :func:`batch_jacobian` does otherwise, and that blocks of several arguments are computed
    once and transposed.

    Args:
        func: a batched function: row ``b`` of its output depends on row ``b`` of its batched
            inputs alone.
        argnums: positional argument or arguments to differentiate. A tuple adds two levels
            inside each output leaf: ``hess[i][j]`` of shape ``(B, *out, *in_i, *in_j)``.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"fwd_over_rev"``, ``"rev_over_rev"``, ``"rev_over_fwd"``, ``"fwd_over_fwd"``: how
            the Jacobian is differentiated, over how it is computed; ``"taylor"``: all pairs of
            coordinates are propagated through the operations of the one run. ``"auto"`` goes by
            the numbers of inputs and outputs.
        engine: ``"vmap"``, ``"sum"``, ``"loop"`` or ``"auto"``, as in :func:`batch_jacobian`.
        chunk_size: basis vectors in one pass, at both levels.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return the Jacobian and ``func``'s output, which come for free.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call,
            ``False`` none; as in :func:`batch_jacobian`.

    Returns:
        A function of the same arguments. It returns ``hess``; ``(hess, aux)`` with ``has_aux``;
        ``(hess, (jac, value))`` with ``return_value``; ``(hess, (jac, (value, aux)))`` with both.
        Leaves have the dtype that output and input promote to.

    Raises:
        TypeError, ValueError: bad words or arguments, as for :func:`batch_jacobian`.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain double backward along a random direction.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: one run of ``func``; ``M (1 + N)`` passes with reverse inside, ``N (1 + N)`` with forward
    inside, for ``M`` outputs and ``N`` inputs in a row; memory of the result and of as many passes
    as are carried at once.

    Sources: torch.func.hessian; B. A. Pearlmutter, "Fast exact multiplication by the Hessian",
    1994; pytorch/pytorch pull request 162879, which asked for chunks.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> hess = funcjac.batch_hessian(lambda x: x.sin().sum(-1))(x)
        >>> hess.shape
        torch.Size([2, 3, 3])
        >>> torch.allclose(hess, torch.diag_embed(-x.sin()))
        True
    """
    options = Options(
        name="batch_hessian",
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
        operator=Hessian(),
    )
    return Transform(func, options)
