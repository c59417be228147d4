"""``batch_partials``: mixed partial derivatives of any order."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from funcjac._batched import Call, Operator, Options
from funcjac._directions import Spec, row_shape
from funcjac._jacobian import transformed
from funcjac._modes import partial_routes
from funcjac._operators import partials
from funcjac._references import partials_entries
from funcjac._results import partials_tree
from funcjac.errors import refuse


def batch_partials(
    func: Callable[..., Any],
    indices: Sequence[tuple[int, ...]],
    argnums: int = 0,
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
    """Computes chosen partial derivatives of each row, of any order.

    For ``func: (B, d) -> (B, *out)`` and ``indices`` such as ``[(0,), (1, 1), (0, 0, 1)]`` the
    returned function gives a tuple with ``d func / d x_0``, ``d^2 func / d x_1^2`` and
    ``d^3 func / d x_0^2 d x_1`` of each row, each of shape ``(B, *out)``. They are pushed through
    the operations of one run of ``func``, and what they share of lower order is computed once.

    Args:
        func: a batched function of rows ``(d,)``.
        indices: the coordinates of each derivative; their order within one does not matter,
            negative ones count from the end, and ``()`` is the value.
        argnums: the positional argument to differentiate.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"taylor"``; ``"rev"``, one differentiation nested in another for each entry; or
            ``"auto"``: Taylor, if it works.
        engine: how rows are kept apart in the nested modes, as in :func:`batch_jacobian`.
        chunk_size: derivatives in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return ``func``'s output, from the same run.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies the first call of each signature, ``True`` every call,
            ``False`` none.

    Returns:
        A function of the same arguments. It returns a tuple ``partials``, each in the structure
        of the output; ``(partials, aux)`` with ``has_aux``; ``(partials, value)`` with
        ``return_value``; ``(partials, (value, aux))`` with both.

    Raises:
        TypeError, ValueError: bad words or arguments; indices that are no tuples of ints or out
            of range; an input that is not ``(B, d)``.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain nested backward passes.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``func`` once, and its linear operations once for each derivative and each one of lower
    order that it needs; memory likewise. The first call of a signature verifies by a backward
    pass for each.

    Sources: the formula of Faà di Bruno; see :mod:`funcjac._taylor`.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
        >>> wave = lambda x: x[:, 0].sin() * x[:, 1] ** 2
        >>> u_x, u_xxt = funcjac.batch_partials(wave, [(0,), (0, 0, 1)])(x)
        >>> torch.allclose(u_xxt, -x[:, 0].sin() * 2 * x[:, 1])
        True
    """
    name = "batch_partials"
    _check_indices(name, indices, argnums)
    # Negative entries are resolved when the input is seen.
    spec = Spec("partials", indices=tuple(tuple(index) for index in indices))
    operator = Operator(
        modes=("taylor", "rev"),
        kernel=functools.partial(partials, spec=spec),
        routes=partial_routes,
        within=lambda sizes, safe: "rev",
        assemble=partials_tree,
        reference=functools.partial(partials_entries, spec=spec),
        spec=spec,
    )
    words = (argnums, in_dims, out_dims, mode, engine, chunk_size, has_aux, return_value)
    options = Options(name, *words, randomness, check, operator)
    return transformed(func, options, functools.partial(_checked_input, spec))


def _check_indices(name: str, indices: Any, argnums: Any) -> None:
    if type(argnums) is not int:
        remedy = "Join inputs inside of func, or transform it once for each."
        raise refuse(name, TypeError, "argnums to be an int", repr(argnums), remedy)
    if not isinstance(indices, (list, tuple)) or not all(isinstance(i, tuple) for i in indices):
        remedy = "Write [(0,), (1, 1)] for the derivatives by x_0 and twice by x_1."
        raise refuse(name, TypeError, "indices to be a list of tuples", repr(indices), remedy)
    if not indices:
        remedy = "Write [(0,)] for the derivative by x_0."
        raise refuse(name, ValueError, "at least one index", repr(indices), remedy)
    if any(type(entry) is not int for index in indices for entry in index):
        remedy = "Write (0, 1) for the derivative by x_0 and x_1."
        raise refuse(name, TypeError, "indices to hold tuples of ints", repr(indices), remedy)


def _checked_input(
    spec: Spec, call: Call, args: Any, kwargs: Any
) -> tuple[list[Any], tuple[int | None, ...]]:
    """Refuse an input whose rows are no vectors, or too short for the indices."""
    del args, kwargs
    name = call.options.name
    if len(call.inputs) != 1:
        remedy = "Join its tensors to one, and split it inside of func."
        raise refuse(name, ValueError, "one input tensor", len(call.inputs), remedy)
    row = row_shape(call.inputs[0], call.layout.diff_dims[0])
    if len(row) != 1:
        remedy = "Reshape it inside of func."
        raise refuse(name, ValueError, "an input with rows (d,)", f"rows {tuple(row)}", remedy)
    size = row[0]
    if any(not -size <= entry < size for index in spec.indices for entry in index):
        raise refuse(
            name, ValueError, f"indices between {-size} and {size - 1}", list(spec.indices)
        )
    return [], ()
