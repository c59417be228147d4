"""Powers, determinants, solutions and distances by simpler operations.

Torch's batching rule of ``lu_solve`` is wrong where factors and right sides are batched by
different levels of torch.vmap. The forward formulas of ``det``, ``slogdet`` and ``solve`` use it:
under torch.vmap they are wrong, and everywhere once differentiated.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Sums of products are right for singular matrices too, but their number grows fast.
_MOST_MINORS = 4


def power(x: Any, exponent: Any) -> Tensor:
    """Torch loses the derivative by an exponent of zero, as after one derivative of ``x ** 1``.

    Of a real and a complex argument, the forward formula is wrong.
    """
    if _is_complex(x) != _is_complex(exponent):
        return torch.pow(*_cast((x * exponent).dtype, x, exponent))
    moves = isinstance(exponent, Tensor) and exponent.is_floating_point()
    if not moves or not isinstance(x, Tensor) or x.is_complex():
        return torch.pow(x, exponent)
    # Each derivative by ``x`` takes one off the exponent, until it is zero.
    is_whole = (exponent >= 0) & (exponent == exponent.round()) & (x > 0) & (x < math.inf)
    out = torch.pow(x, torch.where(is_whole, 0.5, exponent))
    out = torch.where(is_whole, (exponent * torch.where(is_whole, x, 1).log()).exp(), out)
    return out.to((x.detach() * exponent.detach()).dtype)


def _is_complex(number: Any) -> bool:
    return number.is_complex() if isinstance(number, Tensor) else isinstance(number, complex)


def _cast(dtype: torch.dtype, *numbers: Any) -> list[Any]:
    return [number.to(dtype) if isinstance(number, Tensor) else number for number in numbers]


def float_power(x: Any, exponent: Any) -> Tensor:
    is_complex = _is_complex(x) or _is_complex(exponent)
    return power(*_cast(torch.complex128 if is_complex else torch.float64, x, exponent))


def pow_in_place(x: Tensor, exponent: Any) -> Tensor:
    out = power(x.clone(), exponent)
    return x.zero_().add_(out)


def det(x: Tensor) -> Tensor:
    """By minors, or by LU factors, and where those have no derivative, as torch does.

    Torch's gradient is wrong for small singular matrices.
    """
    size = _size(x)
    if size <= 1:
        return x[..., 0, 0] if size else torch.linalg.det(x)
    if size <= _MOST_MINORS:
        columns = set(range(size))
        minors = [det(x[..., 1:, sorted(columns - {i})]) for i in range(size)]
        terms = [(-1) ** i * x[..., 0, i] * minor for i, minor in enumerate(minors)]
        return torch.stack(terms, -1).sum(-1)
    limit = 100 * torch.finfo(x.dtype).eps  # torch's own
    is_singular = (torch.linalg.det(x.detach()).abs() < limit)[..., None, None]
    # Has all derivatives, which are not asked for.
    spare = torch.arange(1, size + 1, device=x.device).to(x.dtype).diag()
    pivots, sign = _pivots(torch.where(is_singular, spare, x))
    singular = torch.linalg.det(torch.where(is_singular, x, spare))
    return torch.where(is_singular[..., 0, 0], singular, pivots.prod(-1) * sign)


def _size(x: Tensor) -> int:
    """The number of rows of square matrices, 0 for what torch refuses."""
    is_matrix = (x.is_floating_point() or x.is_complex()) and x.element_size() > 2 and x.ndim > 1
    return x.shape[-1] if is_matrix and x.shape[-1] == x.shape[-2] else 0


def _pivots(x: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal of the upper factor, and the sign of the permutation of rows."""
    factors, order, _ = torch.linalg.lu_factor_ex(x)
    numbers = torch.arange(1, order.shape[-1] + 1, device=order.device)
    return factors.diagonal(0, -2, -1), 1 - 2 * ((order != numbers).sum(-1) % 2)


def slogdet(x: Tensor) -> Any:
    """By LU factors."""
    if not _size(x):
        return torch.linalg.slogdet(x)
    pivots, sign = _pivots(x)
    sizes = pivots.abs()
    signs = pivots.detach().sgn()
    if x.is_complex():
        signs = torch.where(sizes == 0, 0, pivots / torch.where(sizes == 0, 1, sizes))
    outs = (signs.prod(-1) * sign, sizes.log().sum(-1))
    return torch.return_types.linalg_slogdet(outs)  # pyright: ignore[reportAttributeAccessIssue]


def logdet(x: Tensor) -> Tensor:
    """By ``slogdet``: NaN where a real determinant is negative."""
    sign, out = slogdet(x)
    return sign.log() + out if x.is_complex() else torch.where(sign == -1, math.nan, out)


def solve(x: Tensor, B: Tensor, *, left: bool = True) -> Tensor:  # noqa: N803  torch's names
    """By the inverse."""
    is_vector = B.ndim == 1 or (B.ndim == x.ndim - 1 and B.shape == x.shape[:-1])
    if is_vector and not left:
        return torch.linalg.solve(x, B, left=left)  # refuses it
    columns, inverse = B.unsqueeze(-1) if is_vector else B, torch.linalg.inv(x)
    out = inverse @ columns if left else columns @ inverse
    return out.squeeze(-1) if is_vector else out


def lu_solve(LU, pivots, B, *, left=True, adjoint=False) -> Tensor:  # noqa: N803
    """By the inverse of the product."""
    order, lower, upper = torch.lu_unpack(LU, pivots)
    inverse = torch.linalg.inv(order @ lower @ upper)
    inverse = inverse.mH if adjoint else inverse
    return inverse @ B if left else B @ inverse


def torch_lu_solve(input: Tensor, LU_data: Tensor, LU_pivots: Tensor) -> Tensor:  # noqa: N803
    """``lu_solve`` with the arguments of ``torch.lu_solve``."""
    return lu_solve(LU_data, LU_pivots, input)


def cholesky_inverse(x: Tensor, upper: bool = False) -> Tensor:
    """By a triangular matrix: torch's derivatives move with the triangle that is not read."""
    unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    root = torch.linalg.solve_triangular(x, unit, upper=upper)
    return root @ root.mH if upper else root.mH @ root


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """By the norms of all differences: torch has no second derivative, and a wrong batching rule.

    Of a point and itself torch takes the slope for zero, and so are all further derivatives.
    """
    if p < 0 or min(x1.ndim, x2.ndim) < 2 or x1.shape[-1] != x2.shape[-1]:
        return torch.cdist(x1, x2, p, compute_mode)  # refuses it
    steps = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p != 2:
        return torch.linalg.vector_norm(steps, p, -1)
    squares = (steps * steps).sum(-1)
    same = squares == 0
    return torch.where(same, 0, torch.where(same, 1, squares).sqrt())


def pdist(x: Tensor, p: float = 2.0) -> Tensor:
    """By the norms of all differences: torch has no second derivative."""
    if x.ndim != 2 or p < 0:
        return torch.pdist(x, p)  # refuses it
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return torch.linalg.vector_norm(x[first] - x[second], p, -1)
