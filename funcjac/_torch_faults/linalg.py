"""Powers, determinants, solutions and distances by simpler operations.

Of powers, torch loses what moves with an exponent of zero in the second derivative. Of
determinants of singular matrices it has the gradient wrong, and in torch.func, differentiated
once more, that of all. Its batching rule of ``lu_solve`` is wrong where factors and right sides
are batched by different levels of torch.vmap; the forward formulas of ``det``, ``slogdet`` and
``solve`` use it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcjac._torch_faults.checks import refuse_unless

# Sums of products are right for singular matrices too, but their number grows fast.
_MOST_MINORS = 4


def power(x: Any, exponent: Any) -> Tensor:
    """Torch: derivatives lack what moves with an exponent of zero, as that of ``x`` in ``x ** 1``.

    Of a real and a complex argument, the forward formula is wrong.
    """
    dtypes = [x.dtype if isinstance(x, Tensor) else type(x) for x in (x, exponent)]
    mixed = sum(dtype is complex or getattr(dtype, "is_complex", False) for dtype in dtypes) == 1
    if mixed:
        return torch.pow(*_as_complex(x, exponent))
    moves = isinstance(exponent, Tensor) and exponent.is_floating_point()
    if not moves or not isinstance(x, Tensor) or x.is_complex():
        return torch.pow(x, exponent)
    # Each derivative by ``x`` takes one off the exponent, until it is zero.
    is_whole = (exponent >= 0) & (exponent == exponent.round()) & (x > 0) & (x < math.inf)
    out = torch.pow(x, torch.where(is_whole, 0.5, exponent))
    out = torch.where(is_whole, (exponent * torch.where(is_whole, x, 1).log()).exp(), out)
    return out.to((x.detach() * exponent.detach()).dtype)


def _as_complex(*args: Any) -> list[Any]:
    dtype = torch.result_type(*args)
    return [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args]


def reversed_power(exponent: Any, x: Any) -> Tensor:
    """``power`` with its arguments in the order of ``Tensor.__rpow__``."""
    return power(x, exponent)


def float_power(x: Any, exponent: Any) -> Tensor:
    """``power`` in double precision."""
    args = [
        arg.to(_in_double(arg.dtype)) if isinstance(arg, Tensor) else arg for arg in (x, exponent)
    ]
    if not all(isinstance(arg, Tensor) for arg in args):
        return torch.float_power(x, exponent)
    return power(*args)


def _in_double(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def pow_in_place(x: Tensor, exponent: Any) -> Tensor:
    """``power`` written into ``x``."""
    out = power(x.clone(), exponent)
    if out.dtype != x.dtype or out.shape != x.shape:
        return x.pow_(exponent)  # which may raise
    return x.zero_().add_(out)


def det(x: Tensor) -> Tensor:
    """By minors, where the matrix is small.

    Torch: the gradient is wrong for singular matrices.
    """
    size = _size(x)
    if not 0 < size <= _MOST_MINORS:
        return torch.linalg.det(x)
    if size == 1:
        return x[..., 0, 0]
    columns = set(range(size))
    minors = [det(x[..., 1:, sorted(columns - {i})]) for i in range(size)]
    terms = [(-1) ** i * x[..., 0, i] * minor for i, minor in enumerate(minors)]
    return torch.stack(terms, -1).sum(-1)


def det_in_transforms(x: Tensor) -> Tensor:
    """By minors, or by LU factors, and where those have no derivative, as PyTorch does.

    Torch: in torch.func, the gradient is wrong once differentiated.
    """
    if _size(x) <= _MOST_MINORS:
        return det(x)
    pivots = torch.linalg.lu_factor_ex(x.detach())[0].diagonal(0, -2, -1)
    is_singular = (pivots == 0).any(-1)
    numbers = torch.arange(1, x.shape[-1] + 1, device=x.device)
    spare = torch.diag(numbers.to(x.dtype))  # has all derivatives, which are not asked for
    regular = torch.where(is_singular[..., None, None], spare, x)
    factors, order, _ = torch.linalg.lu_factor_ex(regular)
    rest = torch.linalg.det(torch.where(is_singular[..., None, None], x, spare))
    out = factors.diagonal(0, -2, -1).prod(-1) * _sign_of(order)
    return torch.where(is_singular, rest, out)


def _size(x: Tensor) -> int:
    """The number of rows of square matrices, 0 for what torch refuses."""
    is_matrix = (x.is_floating_point() or x.is_complex()) and x.element_size() > 2 and x.ndim > 1
    return x.shape[-1] if is_matrix and x.shape[-1] == x.shape[-2] else 0


def _sign_of(order: Tensor) -> Tensor:
    """The sign of the permutation that LU factors come with."""
    numbers = torch.arange(1, order.shape[-1] + 1, device=order.device)
    return 1 - 2 * ((order != numbers).sum(-1) % 2)


def slogdet(x: Tensor) -> Any:
    """By LU factors.

    Torch: under torch.vmap the forward formula is wrong, and everywhere once differentiated.
    """
    if not _size(x):
        return torch.linalg.slogdet(x)
    factors, order, _ = torch.linalg.lu_factor_ex(x)
    pivots = factors.diagonal(0, -2, -1)
    sizes = pivots.abs()
    signs = pivots / sizes if x.is_complex() else pivots.detach().sign()
    outs = (signs.prod(-1) * _sign_of(order), sizes.log().sum(-1))
    return torch.return_types.linalg_slogdet(outs)  # pyright: ignore[reportAttributeAccessIssue]


def logdet(x: Tensor) -> Tensor:
    """By ``slogdet``: NaN where a real determinant is negative."""
    if not _size(x):
        return torch.logdet(x)
    sign, out = slogdet(x)
    if x.is_complex():
        return sign.log() + out
    return torch.where(sign == -1, math.nan, out)


def solve(x: Tensor, B: Tensor, *, left: bool = True) -> Tensor:  # noqa: N803  torch's names
    """By LU factors and triangular matrices.

    Torch: under torch.vmap the forward formula is wrong, and everywhere once differentiated.
    """
    is_vector = B.ndim == 1 or (B.ndim == x.ndim - 1 and B.shape == x.shape[:-1])
    if is_vector and not left:
        return torch.linalg.solve(x, B, left=left)  # which refuses it
    right_side = B.unsqueeze(-1) if is_vector else B
    factors, pivots = torch.linalg.lu_factor(x)
    out = lu_solve(factors, pivots, right_side, left=left)
    return out.squeeze(-1) if is_vector else out


def lu_solve(
    LU: Tensor,  # noqa: N803
    pivots: Tensor,
    B: Tensor,  # noqa: N803
    *,
    left: bool = True,
    adjoint: bool = False,
) -> Tensor:
    """By triangular matrices.

    Torch: the batching rule is wrong where factors and right sides belong to different levels.
    """
    if not left:
        return lu_solve(LU, pivots, B.mH, adjoint=not adjoint).mH
    order, lower, upper = torch.lu_unpack(LU, pivots)
    triangular = torch.linalg.solve_triangular
    if adjoint:
        out = triangular(upper.mH, B, upper=False)
        return order @ triangular(lower.mH, out, upper=True, unitriangular=True)
    out = triangular(lower, order.mT @ B, upper=False, unitriangular=True)
    return triangular(upper, out, upper=True)


def torch_lu_solve(
    x: Tensor,
    LU_data: Tensor,  # noqa: N803
    LU_pivots: Tensor,  # noqa: N803
) -> Tensor:
    """``lu_solve`` with the arguments in the order of ``torch.lu_solve``."""
    return lu_solve(LU_data, LU_pivots, x)


def cholesky_inverse(x: Tensor, upper: bool = False) -> Tensor:
    """By a triangular matrix.

    Torch: the derivatives move with the triangle that is not read.
    """
    unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    root = torch.linalg.solve_triangular(x, unit, upper=upper)
    return root @ root.mH if upper else root.mH @ root


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """By the norms of all differences.

    Torch: no second derivative, and a wrong batching rule where cotangents are batched and
    points are not.
    """
    del compute_mode
    refuse_unless(p >= 0, "cdist only supports non-negative p values")
    fits = min(x1.ndim, x2.ndim) > 1 and x1.shape[-1] == x2.shape[-1]
    refuse_unless(fits, "cdist needs matrices with the same number of columns")
    steps = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p != 2:
        return torch.linalg.vector_norm(steps, p, -1)
    squares = (steps * steps).sum(-1)
    # Of a point and itself torch takes the slope for zero, and so are all further derivatives.
    same = squares == 0
    return torch.where(same, 0, torch.where(same, 1, squares).sqrt())


def pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """By the norms of all differences. Torch: no second derivative."""
    refuse_unless(x.ndim == 2 and p >= 0, "pdist needs one matrix and a non-negative p")
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)
