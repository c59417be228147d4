"""``batch_hessian``: the Hessian of each row of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines import vmap
from funcjac._engines.nesting import hessian_blocks
from funcjac._engines.rows import identity, row_shape, row_sizes, spread
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._engines.sum import Blocks
from funcjac._operators.operator import NESTED, SecondOrder, Tensors
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform
from funcjac._taylor.propagation import along_directions, second_order
from funcjac._taylor.rules import make_recording
from funcjac._verification.reference_vjp import Entry, Probe, outer_product, random_like, vjp

# Inputs up to which all pairs of them are propagated together.
_MOST_PAIRED = 12


@dataclass(frozen=True)
class Hessian(SecondOrder):
    """``blocks[i]``: ``H[j][k]`` one after the other, then ``J[j]`` where it is returned."""

    modes: ClassVar[tuple[str, ...]] = (*NESTED, "taylor")
    order: ClassVar[int] = 2

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        return inputs, inputs * (inputs + 1) // 2, inputs

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        if inputs > _MOST_PAIRED or call.options.chunk_size is not None:
            return call.options.mode == "taylor"
        return super().uses_taylor(call, outputs, inputs)

    def compute(self, run: Run, route: Route) -> Derivatives:
        parts = _by_taylor(run) if route.mode == "taylor" else hessian_blocks(run, route)
        return self.blocks(run, _joined(*parts))

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        hess, jac, along = vmap.hessian(f, xs, mode, call.options.chunk_size)
        return _joined(hess, jac), along

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along a random tangent of each input."""
        entries = []
        for grad, x, dim in zip(probe.grads, run.inputs, run.dims):
            tangent = random_like(x, probe.generator)
            rows = vjp([grad], run.inputs, [tangent], create_graph=run.create_graph)
            seeds = [outer_product(seed, tangent, dim) for seed in probe.seeds]
            entries += [Entry(seeds, *columns) for columns in zip(rows, run.inputs, run.dims)]
        return entries + super().entries(run, probe)


def _joined(hess: Sequence[Blocks], jac: Blocks) -> list[list[Any]]:
    """For each output ``H[j][k]``, one after the other, and ``J[j]``."""
    return [[*itertools.chain(*bands), *slopes] for bands, slopes in zip(hess, jac)]


def _by_taylor(run: Run) -> tuple[list[Blocks], Blocks]:
    """All pairs of coordinates, each once."""
    sizes = row_sizes(run.inputs, run.dims)
    total, device = sum(sizes), run.inputs[0].device
    left, right = torch.triu_indices(total, total, device=device)
    place = torch.empty(total, total, dtype=torch.long, device=device)
    place[left, right] = place[right, left] = torch.arange(len(left), device=device)
    recording = make_recording(run.recorder, run.output.leaves, create_graph=run.create_graph)
    pairs = list(itertools.combinations_with_replacement(range(total), 2))
    scheme = second_order(left, right)
    jets = along_directions(recording, stacked_coordinates(run), scheme, pairs)
    hess, jac = [], []
    for out, (firsts, seconds) in zip(run.output.leaves, jets):
        firsts = out.new_zeros(total, *out.shape) if firsts is None else firsts
        seconds = out.new_zeros(len(left), *out.shape) if seconds is None else seconds
        jac.append(list(firsts.movedim(0, -1).split(sizes, -1)))  # (B, *out, N)
        whole = seconds[place].movedim((0, 1), (-2, -1))  # (B, *out, N, N)
        hess.append([list(band.split(sizes, -1)) for band in whole.split(sizes, -2)])
    return hess, jac


def stacked_coordinates(run: Run) -> dict[int, Tensor]:
    """The basis of all inputs together: ``(N, *x.shape)`` for each, zero for other inputs."""
    sizes, stacks = row_sizes(run.inputs, run.dims), {}
    for j, (x, dim) in enumerate(zip(run.inputs, run.dims)):
        part = identity(sum(sizes), x).split(sizes, 1)[j].clone()  # results may lie in its memory
        stacks[j] = spread(part, row_shape(x, dim), run.call.batch, dim)
    return stacks


@documented
def batch_hessian(
    func: Callable[..., Any], argnums: int | tuple[int, ...] = 0, **keywords: Unpack[Keywords]
) -> Callable[..., Any]:
    """Computes the Hessian of each row of a batch.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``H[b] = d^2 func(x)[b] / d
    x[b]^2``, of shape ``(B, *out, *in, *in)``, as ``batch_jacobian(batch_jacobian(func))`` does.
    Like :func:`torch.func.hessian` under :func:`torch.vmap`, except for what
    :func:`batch_jacobian` does otherwise.

    Args:
        func: a batched function.
        argnums: positional argument or arguments to differentiate. A tuple adds two levels
            inside each output leaf: ``hess[i][j]`` of shape ``(B, *out, *in_i, *in_j)``.
        mode: ``"fwd_over_rev"``, ``"rev_over_rev"``, ``"rev_over_fwd"``, ``"fwd_over_fwd"``: how
            the Jacobian is differentiated, over how it is computed; ``"taylor"``: all pairs of
            coordinates are propagated through the operations of the one run; ``"auto"`` goes by
            sizes.
        {keywords}

    Returns:
        A function that returns ``hess``, or ``(hess, (jac, value))`` with ``return_value``.

    Raises:
        {errors}

    Cost: one run of ``func``; ``M (1 + N)`` passes with reverse inside, ``N (1 + N)`` with forward
    inside, for ``M`` outputs and ``N`` inputs in a row; memory of the result and of as many passes
    as are carried at once.

    Sources: torch.func.hessian; B. A. Pearlmutter, "Fast exact multiplication by the Hessian",
    1994; pytorch/pytorch pull request 162879, which asked for chunks.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> hess = funcjac.batch_hessian(lambda x: x.sin().sum(-1))(x)
        >>> torch.allclose(hess, torch.diag_embed(-x.sin()))
        True
    """
    return make_transform("batch_hessian", func, Hessian(), argnums, keywords)
