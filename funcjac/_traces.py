"""``batch_laplacian`` and ``batch_divergence``: traces without what they are traces of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcjac._batched import Operator, Options
from funcjac._directions import PROBES, Spec, extras_of
from funcjac._jacobian import JACOBIAN, transformed
from funcjac._modes import NESTED, second_routes
from funcjac._operators import laplacian
from funcjac._references import divergence_entries, laplacian_entries
from funcjac._results import scalar_tree, trace_tree
from funcjac._second_order import nested_within
from funcjac._trace import divergence
from funcjac.errors import refuse


def batch_laplacian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    weight: Tensor | Callable[..., Tensor] | None = None,
    weight_dim: int | None = None,
    samples: int | None = None,
    probes: str = "rademacher",
    generator: torch.Generator | None = None,
    return_error: bool = False,
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
    """Computes the Laplacian of each row: the trace of its Hessian, without the Hessian.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``sum_i d^2 func(x)[b] / d
    x[b, i]^2``, of shape ``(B, *out)``; with a ``weight`` ``sum_ij W[i, j] H[b, i, j]``, as in the
    generator of a diffusion. Of several inputs, the sum over all of them. Computed as
    :func:`batch_hessian_diagonal` is, but second derivatives are added up on the way.

    Args:
        func: a batched function.
        argnums: positional argument or arguments to differentiate.
        weight: a vector ``(*in)`` or a symmetric matrix ``(*in, *in)``, definite or not, for one
            input tensor; or a function of the same arguments as ``func`` that returns one. The
            result can be differentiated by it.
        weight_dim: where ``weight`` has a batch dimension, ``None`` if all rows share it.
        samples: estimate from so many random probes in each row (Hutchinson), without bias,
            instead of the exact sum over all coordinates.
        probes: ``"rademacher"`` (entries 1 and -1) or ``"gaussian"``; rows share those of an
            argument that they share.
        generator: where probes are drawn from; ``None`` for PyTorch's default.
        return_error: ``(estimate, standard error)`` in place of the estimate, from the spread of
            at least two samples.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"taylor"``, a nested mode, or ``"auto"``, as in :func:`batch_hessian_diagonal`.
        engine: how rows are kept apart in the nested modes.
        chunk_size: coordinates (or samples) in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return the Jacobian and ``func``'s output, which come for free; from
            ``samples`` only the output does.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies the first call of each signature, ``True`` every call,
            ``False`` none.

    Returns:
        A function of the same arguments. It returns ``lap`` in the structure of the output;
        ``(lap, aux)`` with ``has_aux``; ``(lap, (jac, value))`` with ``return_value``;
        ``(lap, (jac, (value, aux)))`` with both; from ``samples`` without ``jac``.

    Raises:
        TypeError, ValueError: bad words or arguments; a ``weight`` that does not fit or is not
            symmetric.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain double backward.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``func`` once, and ``N + 1`` times its linear operations (``samples + 1`` for an
    estimate, up to ``2 N + 1`` with a matrix for each row); memory likewise. The nested modes hold
    all pairs of the directions of a chunk. The first call of a signature verifies by as many
    passes backward.

    Sources: R. Li et al., "A computational framework for neural network-based variational Monte
    Carlo with forward Laplacian", 2024; M. F. Hutchinson, 1989; pytorch/pytorch issue 53903.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> funcjac.batch_laplacian(lambda x: (x**2).sum(-1))(x)
        tensor([6., 6.], dtype=torch.float64)
        >>> weight = torch.tensor([1.0, 0.0, -2.0])
        >>> funcjac.batch_laplacian(lambda x: (x**2).sum(-1), weight=weight)(x)
        tensor([-2., -2.], dtype=torch.float64)
    """
    name = "batch_laplacian"
    spec = Spec("laplacian", weight, weight_dim, samples, probes, generator, return_error)
    _check_spec(name, spec)
    operator = Operator(
        modes=("taylor", *NESTED),
        kernel=functools.partial(laplacian, spec=spec),
        routes=functools.partial(second_routes, first="taylor", modes=("rev_over_rev",)),
        within=nested_within,
        assemble=functools.partial(scalar_tree, error=return_error, slopes=samples is None),
        reference=functools.partial(laplacian_entries, spec=spec),
        spec=spec,
    )
    words = (argnums, in_dims, out_dims, mode, engine, chunk_size, has_aux, return_value)
    options = Options(name, *words, randomness, check, operator)
    return transformed(func, options, extras_of(spec))


def batch_divergence(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    samples: int | None = None,
    probes: str = "rademacher",
    generator: torch.Generator | None = None,
    return_error: bool = False,
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
    """Computes the divergence of each row: the trace of its Jacobian, without the Jacobian.

    For ``func: (B, *in) -> (B, *in)`` the returned function gives ``sum_i d func(x)[b, i] / d
    x[b, i]``, of shape ``(B,)``: the change of the log-density along a continuous flow. Of several
    inputs and as many outputs, leaf by leaf, the sum over all.

    Args:
        func: a batched function whose output has rows of the shape of its input.
        argnums: positional argument or arguments to differentiate.
        samples: estimate from so many random probes in each row (Hutchinson), without bias: one
            pass for each instead of one for each coordinate.
        probes: ``"rademacher"`` (entries 1 and -1) or ``"gaussian"``.
        generator: where probes are drawn from; ``None`` for PyTorch's default.
        return_error: ``(estimate, standard error)`` in place of the estimate, from the spread of
            at least two samples.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension.
        mode: ``"rev"``, ``"fwd"`` or ``"auto"``, as in :func:`batch_jacobian`.
        engine: ``"vmap"``, ``"sum"``, ``"loop"`` or ``"auto"``, as in :func:`batch_jacobian`.
        chunk_size: coordinates (or samples) in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return ``func``'s output, from the same run.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies the first call of each signature, ``True`` every call,
            ``False`` none.

    Returns:
        A function of the same arguments. It returns ``div``; ``(div, aux)`` with ``has_aux``;
        ``(div, value)`` with ``return_value``; ``(div, (value, aux))`` with both.

    Raises:
        TypeError, ValueError: bad words or arguments; output rows of another shape than the
            input's.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain backward passes.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``N`` passes, forward or backward, for all rows at once, or ``samples`` passes; memory of
    as many as are carried at once. The first call of a signature verifies by as many again.

    Sources: M. F. Hutchinson, 1989; W. Grathwohl et al., "FFJORD", 2019.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> div = funcjac.batch_divergence(torch.sin)(x)
        >>> torch.allclose(div, x.cos().sum(-1))
        True
    """
    name = "batch_divergence"
    spec = Spec("divergence", None, None, samples, probes, generator, return_error)
    _check_spec(name, spec)
    operator = JACOBIAN._replace(
        kernel=functools.partial(divergence, spec=spec),
        assemble=trace_tree,
        reference=functools.partial(divergence_entries, spec=spec),
        spec=spec,
    )
    words = (argnums, in_dims, out_dims, mode, engine, chunk_size, has_aux, return_value)
    options = Options(name, *words, randomness, check, operator)
    return transformed(func, options, extras_of(spec))


def _check_spec(name: str, spec: Spec) -> None:
    """Refuse bad words of an operator's own."""
    samples, dim = spec.samples, spec.weight_dim
    if samples is not None and (type(samples) is not int or samples < 1):
        kind = ValueError if type(samples) is int else TypeError
        raise refuse(name, kind, "samples to be None or a positive int", repr(samples))
    if not isinstance(spec.probes, str) or spec.probes not in PROBES:
        raise refuse(name, ValueError, "probes to be 'rademacher' or 'gaussian'", repr(spec.probes))
    if spec.generator is not None and not isinstance(spec.generator, torch.Generator):
        kind = type(spec.generator).__name__
        remedy = "Make one by torch.Generator().manual_seed(0)."
        raise refuse(name, TypeError, "generator to be a torch.Generator", kind, remedy)
    if type(spec.return_error) is not bool:
        raise refuse(name, TypeError, "return_error to be a bool", repr(spec.return_error))
    if spec.return_error and (samples is None or samples < 2):
        remedy = "The error is estimated from how far samples differ."
        expected = "at least two samples with return_error=True"
        raise refuse(name, ValueError, expected, samples, remedy)
    if dim is not None and (type(dim) is not int or spec.weight is None):
        remedy = "It says where a weight that differs between rows has the batch."
        expected = "weight_dim to be None, or an int beside a weight"
        raise refuse(name, TypeError, expected, repr(dim), remedy)
    weight = spec.weight
    if weight is not None and not isinstance(weight, Tensor) and not callable(weight):
        kind = type(weight).__name__
        expected = "weight to be a tensor or a function that returns one"
        remedy = "Make one of it by torch.as_tensor, with the dtype of the input."
        raise refuse(name, TypeError, expected, kind, remedy)
