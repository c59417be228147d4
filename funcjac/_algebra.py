"""Powers and determinants by simpler operations, of which all derivatives are right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from funcjac._native import is_functional

# Sums of products are right for singular matrices too, but their number grows fast.
_MOST_MINORS = 4


def power(x: Any, exponent: Any) -> Tensor:
    """Its second derivatives lack what moves with an exponent that is zero."""
    moves = isinstance(exponent, Tensor) and exponent.is_floating_point()
    if not moves or not isinstance(x, Tensor) or x.is_complex():
        return torch.pow(x, exponent)
    zero = (exponent == 0) & (x > 0) & (x < math.inf)
    found = torch.pow(x, torch.where(zero, 1, exponent))
    found = torch.where(zero, (exponent * torch.where(zero, x, 1).log()).exp(), found)
    return found.to((x.detach() * exponent.detach()).dtype)


def float_power(x: Any, exponent: Any) -> Tensor:
    given = x, exponent
    if all(isinstance(one, Tensor) and not one.is_complex() for one in given):
        return power(x.double(), exponent.double())
    return torch.float_power(x, exponent)


def pow_in_place(x: Tensor, exponent: Any) -> Tensor:
    found = power(x.clone(), exponent)
    if found.dtype != x.dtype or found.shape != x.shape:
        return x.pow_(exponent)  # which may raise
    return x.zero_().add_(found)


def det(x: Tensor) -> Tensor:
    """By minors, or in torch.func by LU factors.

    PyTorch's own gradient is wrong for singular matrices, and in torch.func, differentiated
    once more, for all.
    """
    allowed = x.dtype.is_floating_point and x.element_size() > 2 and x.ndim > 1
    size = x.shape[-1] if allowed and x.shape[-1] == x.shape[-2] else 0
    if size == 0 or (size > _MOST_MINORS and not is_functional()):
        return torch.linalg.det(x)
    if size > _MOST_MINORS:
        return _by_factors(x)
    if size == 1:
        return x[..., 0, 0]
    columns = set(range(size))
    minors = [det(x[..., 1:, sorted(columns - {i})]) for i in range(size)]
    terms = [(-1) ** i * x[..., 0, i] * minor for i, minor in enumerate(minors)]
    return torch.stack(terms, -1).sum(-1)


def _by_factors(x: Tensor) -> Tensor:
    """By LU factors, and where those have no derivative, as PyTorch does."""
    pivots = torch.linalg.lu_factor_ex(x.detach())[0].diagonal(0, -2, -1)
    singular = (pivots == 0).any(-1)
    numbers = torch.arange(1, x.shape[-1] + 1, device=x.device)
    spare = torch.diag(numbers.to(x.dtype))  # has all derivatives, which are not asked for
    factors, order, _ = torch.linalg.lu_factor_ex(torch.where(singular[..., None, None], spare, x))
    sign = 1 - 2 * ((order != numbers).sum(-1) % 2)
    rest = torch.linalg.det(torch.where(singular[..., None, None], x, spare))
    return torch.where(singular, rest, factors.diagonal(0, -2, -1).prod(-1) * sign)
