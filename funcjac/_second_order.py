"""``batch_hessian`` and ``batch_hessian_diagonal``: second derivatives of each row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from funcjac._batched import Operator, Options
from funcjac._directions import Spec
from funcjac._jacobian import transformed
from funcjac._modes import NESTED, second_routes
from funcjac._operators import diagonal, hessian
from funcjac._references import diagonal_entries, hessian_entries
from funcjac._results import diagonal_tree, hessian_tree

# What is worth a measurement when nobody asks for a mode.
USUAL = ("fwd_over_rev", "rev_over_rev")


def nested_within(sizes: tuple[int, int], safe: bool) -> str:
    """The mode inside of other transforms, which differentiate once more: no forward formulas."""
    del sizes, safe
    return "rev_over_rev"


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
            the Jacobian is differentiated, over how it is computed. ``"auto"`` goes by the
            clock, among the first two, without forward formulas, and, for few inputs, Taylor
            propagation of all pairs.
        engine: ``"vmap"``, ``"sum"``, ``"loop"`` or ``"auto"``, as in :func:`batch_jacobian`.
        chunk_size: basis vectors in one pass, at both levels.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return the Jacobian and ``func``'s output, which come for free.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies the first call of each signature, ``True`` every call,
            ``False`` none.

    Returns:
        A function of the same arguments. It returns ``hess``; ``(hess, aux)`` with ``has_aux``;
        ``(hess, (jac, value))`` with ``return_value``; ``(hess, (jac, (value, aux)))`` with both.
        Leaves have the dtype that output and input promote to.

    Raises:
        TypeError, ValueError: bad words or arguments, as for :func:`batch_jacobian`.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain double backward along a random direction.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``M`` (reverse inside) or ``N`` (forward inside) times ``N`` passes for ``M`` outputs and
    ``N`` inputs in a row, half as many for blocks of several arguments; memory of the result and
    of as many passes as are carried at once.

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
    spec = Spec("hessian")
    operator = Operator(
        modes=NESTED,
        kernel=functools.partial(hessian, spec=spec),
        routes=functools.partial(second_routes, first="vmap", modes=USUAL),
        within=nested_within,
        assemble=hessian_tree,
        reference=functools.partial(hessian_entries, spec=spec),
        spec=spec,
    )
    words = (argnums, in_dims, out_dims, mode, engine, chunk_size, has_aux, return_value)
    options = Options("batch_hessian", *words, randomness, check, operator)
    return transformed(func, options)


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
    writes into slices), two differentiations are nested, and an ``EngineFallbackWarning`` says so.

    Args:
        func: a batched function: row ``b`` of its output depends on row ``b`` of its batched
            inputs alone.
        argnums: positional argument or arguments to differentiate; a tuple adds a tuple inside
            each output leaf.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"taylor"``; one of the nested modes of :func:`batch_hessian`; or ``"auto"``:
            Taylor, if it works, and in the end the fastest that was verified.
        engine: how rows are kept apart in the nested modes, as in :func:`batch_jacobian`.
            ``"taylor"`` runs the whole batch, and needs ``"sum"`` or ``"auto"``.
        chunk_size: coordinates in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return the Jacobian and ``func``'s output, which come for free.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies the first call of each signature, ``True`` every call,
            ``False`` none.

    Returns:
        A function of the same arguments. It returns ``diag``; ``(diag, aux)`` with ``has_aux``;
        ``(diag, (jac, value))`` with ``return_value``; ``(diag, (jac, (value, aux)))`` with both.

    Raises:
        TypeError, ValueError: bad words or arguments, as for :func:`batch_jacobian`.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain double backward.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``func`` once, and ``2 N`` times its linear operations, for ``N`` inputs in a row, at all
    ``M`` outputs at once; memory of ``2 N`` of its tensors at a time. The first call of a
    signature verifies by ``N + 1`` passes backward.

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
    spec = Spec("diagonal")
    operator = Operator(
        modes=("taylor", *NESTED),
        kernel=functools.partial(diagonal, spec=spec),
        routes=functools.partial(second_routes, first="taylor", modes=USUAL[1:]),
        within=nested_within,
        assemble=diagonal_tree,
        reference=functools.partial(diagonal_entries, spec=spec),
        spec=spec,
    )
    words = (argnums, in_dims, out_dims, mode, engine, chunk_size, has_aux, return_value)
    options = Options("batch_hessian_diagonal", *words, randomness, check, operator)
    return transformed(func, options)
