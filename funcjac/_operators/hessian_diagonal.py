"""``batch_hessian_diagonal``: the terms of a Laplacian, whose operator adds them up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from funcjac._operators.laplacian import HessianDiagonal
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform


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
