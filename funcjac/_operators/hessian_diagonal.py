"""``batch_hessian_diagonal``: the second derivative of each row along each input coordinate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines.rows import Directions, coordinates
from funcjac._engines.run_func import Run
from funcjac._operators.laplacian import AlongDirections, Maybe, axis_last
from funcjac._operators.operator import Dims, Tensors
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform
from funcjac._verification.reference_vjp import Entry


@dataclass(frozen=True)
class HessianDiagonal(AlongDirections):
    """``blocks[i][j]``: second derivatives by input ``j``, then first ones where returned."""

    order: ClassVar[int] = 1

    def directions(self, call: Call, xs: Tensors, dims: Dims, extras: Tensors) -> list[Directions]:
        bases = [coordinates(x, dim) for x, dim in zip(xs, dims)]
        return [Directions(left, None, left.new_ones(len(left)), basis=True) for left in bases]

    def combine(self, seconds: Sequence[Maybe]) -> Sequence[Maybe]:
        return list(map(axis_last, seconds))

    def entries_of(self, run: Run, seeds: list[Tensor], columns: list[Tensor]) -> list[Entry]:
        dims = [None if dim is None else 0 for dim in run.dims]
        likes = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(run.inputs, run.dims)]
        rows = [column.reshape(like.shape) for column, like in zip(columns, likes)]
        return [Entry(seeds, *parts) for parts in zip(rows, likes, dims)]


@documented
def batch_hessian_diagonal(
    func: Callable[..., Any], argnums: int | tuple[int, ...] = 0, **keywords: Unpack[Keywords]
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
    return make_transform("batch_hessian_diagonal", func, operator, argnums, keywords)
