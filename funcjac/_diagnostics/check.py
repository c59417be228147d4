"""``check_batched`` and ``check_derivative``: looking closely, when asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.bind import bind
from funcjac._arguments.call import ENGINES, Call, Options
from funcjac._arguments.check_keywords import check_options
from funcjac._dispatch.decisions import FunctionKey
from funcjac._dispatch.solve import solve
from funcjac._engines.run import Derivatives, plain_values, run_once
from funcjac._environment.state import rng_state, same_rng_state, set_rng_state
from funcjac._operators.jacobian import Jacobian
from funcjac._operators.transform import DUAL_LEVELS, looks, transform_of, usable
from funcjac._verification.compare import tolerance
from funcjac._verification.finite_differences import largest_difference
from funcjac._verification.rows import check_rows, mixing_error
from funcjac.errors import brief, refuse


@looks
def check_batched(
    func: Callable[..., Any], *args: Any, in_dims: Any = 0, out_dims: Any = 0, **kwargs: Any
) -> None:
    """Raises if the rows of ``func``'s output depend on other rows of its input.

    Two tests for any two rows, each with the random state replayed: other values in one row
    must leave the output of the other as it was, and a random cotangent in one must not reach
    the input of the other. They miss mixing that happens only for other values of the input
    than those given. Cost: four runs of ``func`` for each bit of the batch size, two of them
    with a backward pass.

    Args:
        func: a batched function.
        *args: its arguments, with at least two rows.
        in_dims: batch dimension of each argument, as in :func:`torch.vmap`.
        out_dims: where ``func`` puts the batch dimension.
        **kwargs: given to ``func`` as they are.

    Raises:
        BatchMixingError: rows depend on one another; the message names suspects.
        ValueError: fewer than two rows, or bad ``in_dims`` or ``out_dims``.
        TypeError: a batched argument is not dense, or ``func`` does not return real
            floating-point tensors.

    Example:
        >>> import torch, funcjac
        >>> funcjac.check_batched(torch.sin, torch.ones(4, 3))
        >>> funcjac.check_batched(lambda x: x - x.mean(0), torch.eye(4, 3))
        Traceback (most recent call last):
        ...
        funcjac.BatchMixingError: check_batched: expected each row of func's output ...
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            check_batched(func, *args, in_dims=in_dims, out_dims=out_dims, **kwargs)
        return
    argnums = tuple(range(len(args))) or 0
    options = Options(
        "check_batched", argnums, in_dims, out_dims, randomness="different", operator=Jacobian()
    )
    check_options(func, options)
    if not args:
        remedy = "Pass the arguments of func behind it, as in check_batched(func, x)."
        raise refuse(options.name, ValueError, "a batched argument", "0 arguments", remedy)
    args, kwargs = usable((args, kwargs))
    call = bind(func, options, args, kwargs)
    _check_comparable(call)
    floats = [i for i in call.layout.batched if call.leaves[i].is_floating_point()]
    dims = tuple([call.layout.dims[i] for i in floats])
    layout = replace(call.layout, diff=tuple(floats), diff_dims=dims)
    call = call._replace(layout=layout)
    modules, rng = FunctionKey(func).modules, rng_state()
    try:
        _check_values(call, modules)
        set_rng_state(rng)
        if floats:
            check_rows(run_once(call._replace(clone=True)), modules)
    finally:
        set_rng_state(rng)


def _check_comparable(call: Call) -> None:
    if call.batch < 2:
        remedy = "Pass a batch of two rows or more, of which one can be changed."
        raise refuse(call.options.name, ValueError, "at least two rows", call.batch, remedy)
    for i in call.layout.batched:
        kind = call.leaves[i].layout
        if kind != torch.strided:
            remedy = "Call .to_dense() on them, or set in_dims to None for what all rows share."
            raise refuse(
                call.options.name, TypeError, "batched arguments that are dense", kind, remedy
            )


def _check_values(call: Call, modules: Any) -> None:
    """Give some rows the values of others, for any two rows: the rest must not notice."""
    layout, rng = call.layout, rng_state()
    before = _values(call)
    order = torch.arange(call.batch, device="cpu")
    for bit in range((call.batch - 1).bit_length()):
        for moved in ((order >> bit) & 1, 1 - ((order >> bit) & 1)):
            source = torch.where(moved == 1, order[moved == 0][0], order)
            leaves = list(call.leaves)
            for i in layout.batched:
                leaves[i] = leaves[i].index_select(layout.dims[i] or 0, source.to(leaves[i].device))
            set_rng_state(rng)
            after = _values(call._replace(leaves=leaves))
            if any(_differ(one, other, moved == 0) for one, other in zip(before, after)):
                raise mixing_error(call.options.name, modules)


def _differ(one: Tensor, other: Tensor, rows: Tensor) -> bool:
    limit = tolerance([one.dtype]) / 100
    size = one.abs().nan_to_num(0, 0, 0).amax(0) if one.numel() else 0
    kept = rows.to(one.device)
    return bool(((one[kept] - other[kept]).abs().nan_to_num(0) > limit * size).any())


def _values(call: Call) -> list[Tensor]:
    return [out.clone() for out in plain_values(call)]


@dataclass(frozen=True)
class Comparison:
    """One engine and mode beside the loop over rows.

    Attributes:
        engine: ``"vmap"``, ``"sum"`` or ``"loop"``.
        mode: ``"fwd"`` or ``"rev"``.
        difference: largest difference from the loop, relative to the loop's largest
            entry; ``None`` where the engine failed.
        error: what it raised, if it did.
    """

    engine: str
    mode: str
    difference: float | None
    error: str


@dataclass(frozen=True)
class DerivativeReport:
    """What ``check_derivative`` found. ``print`` it for a table.

    Attributes:
        comparisons: every engine and mode beside the loop over rows in reverse mode.
        central_difference: how far the loop's result is from central differences, along a
            random direction or along all that count, relative to its size.
        tolerance: up to where numbers of this dtype count as equal.
        central_tolerance: likewise for central differences, which are less precise.
    """

    comparisons: tuple[Comparison, ...]
    central_difference: float
    tolerance: float
    central_tolerance: float

    @property
    def ok(self) -> bool:
        """Whether all that ran agrees, and central differences confirm it."""
        found = [c.difference for c in self.comparisons if c.difference is not None]
        close = all(difference <= self.tolerance for difference in found)
        return close and self.central_difference <= self.central_tolerance

    def __str__(self) -> str:
        width = max(6, *[len(c.mode) + 1 for c in self.comparisons])
        lines = [f"{'engine':<7}{'mode':<{width}}{'difference':>11}  from the loop over rows"]
        for c in self.comparisons:
            found = "" if c.difference is None else f"{c.difference:.1e}"
            wrong = c.difference is not None and not c.difference <= self.tolerance
            verdict = c.error or ("WRONG" if wrong else "agrees")
            lines.append(f"{c.engine:<7}{c.mode:<{width}}{found:>11}  {verdict}")
        close = self.central_difference <= self.central_tolerance
        verdict = "agrees" if close else "WRONG"
        lines.append(f"{'central':<{width + 7}}{self.central_difference:>11.1e}  {verdict}")
        return "\n".join(lines)


@looks
def check_derivative(
    transformed: Callable[..., Any], *args: Any, **kwargs: Any
) -> DerivativeReport:
    """Compares every engine and mode, and central differences.

    Where the one vector-Jacobian product of ``check="auto"`` trusts plain reverse mode, this
    also asks the function itself: a wrong custom backward or a partial ``detach`` shows as a
    central difference that disagrees.

    Args:
        transformed: what a funcjac transform returned.
        *args: arguments as for ``transformed``.
        **kwargs: keyword arguments as for ``transformed``.

    Returns:
        A :class:`DerivativeReport`, with ``ok`` and a table when printed. Costs the result
        once for each engine and mode, a third of them by a loop over rows, and differences: of
        Jacobians and Hessians along one random direction, of all else along all that count.
        float64 inputs make it sharp.

    Raises:
        TypeError: ``transformed`` does not come from funcjac.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
        >>> funcjac.check_derivative(funcjac.batch_jacobian(torch.sin), x).ok
        True
    """
    transform = transform_of(transformed, "check_derivative")
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return check_derivative(transformed, *args, **kwargs)
    args, kwargs = usable((args, kwargs))
    call = transform.bind(args, kwargs)
    operator = transform.options.operator
    plain = "rev" if "rev" in operator.modes else "rev_over_rev"
    rng = rng_state()
    results: dict[tuple[str, str], Derivatives | Exception] = {}
    with torch.no_grad():
        plain_values(call)  # what func raises comes out here
        draws = not same_rng_state(rng, rng_state())
        for engine, mode in itertools.product(reversed(ENGINES), reversed(operator.modes)):
            if mode == "taylor" and engine != "sum":
                continue  # it runs the whole batch
            set_rng_state(rng)
            results[engine, mode] = _run(call, engine, mode)
        loop = results["loop", plain]
        if isinstance(loop, Exception):
            raise loop
        # What draws random numbers is compared with another mode of its own engine.
        references: dict[str, Any] = dict.fromkeys(ENGINES, loop)
        if draws and None not in call.layout.diff_dims:
            references = {engine: results[engine, plain] for engine in ENGINES}
        limit = tolerance([x.dtype for x in (*call.inputs, *loop.output.leaves)])
        comparisons = []
        for (engine, mode), result in results.items():
            reference: Any = references[engine]
            reference = result if isinstance(reference, Exception) else reference
            comparisons.append(_compare(engine, mode, result, reference))
        reference: Any = references["sum"]
        reference = loop if isinstance(reference, Exception) else reference
        set_rng_state(rng)
        central = largest_difference(call, reference)
        set_rng_state(rng)
    return DerivativeReport(tuple(comparisons), central, limit, 10 * limit ** (2 / 3))


def _run(call: Call, engine: str, mode: str) -> Derivatives | Exception:
    if engine == "sum" and None in call.layout.diff_dims:
        return ValueError("the sum trick has no per-sample derivative of what rows share")
    keywords = replace(call.options, engine=engine, mode=mode, check=False, randomness="different")
    forward = engine == "vmap" and "fwd" in mode
    try:
        with DUAL_LEVELS if forward else nullcontext():
            return solve(call._replace(options=keywords), ("check_derivative",))
    except Exception as raised:  # whatever it is belongs into the report
        return raised


def _compare(
    engine: str, mode: str, one: Derivatives | Exception, reference: Derivatives
) -> Comparison:
    if isinstance(one, Exception):
        return Comparison(engine, mode, None, brief(one))
    worst = 0.0
    for blocks, others in zip(one.blocks, reference.blocks):
        for block, other in zip(blocks, others):
            size = other.abs().nan_to_num(0, 0, 0).max().item() if other.numel() else 1.0
            alike = (block == other) | (block.isnan() & other.isnan())
            difference = torch.where(alike, 0, (block - other).abs())
            if difference.numel():
                worst = max(worst, (difference.nan_to_num(torch.inf).max() / (size or 1.0)).item())
    return Comparison(engine, mode, worst, "")
