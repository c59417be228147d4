"""``check_derivative``: compares every engine and mode, and central differences."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcjac._arguments.call import Call, bind
from funcjac._arguments.layout import ENGINES
from funcjac._dispatch.solve import solve
from funcjac._engines.run_func import Derivatives, plain_values
from funcjac._environment.state import rng_state, same_rng_state, set_rng_state
from funcjac._operators.transform import DUAL_LEVELS, transform_of, usable
from funcjac._verification.central_differences import largest_difference
from funcjac._verification.tolerance import largest, tolerance
from funcjac.errors import brief


@dataclass(frozen=True)
class Comparison:
    """One engine and mode beside the loop over rows.

    Attributes:
        difference: the largest, relative to the loop's largest entry; ``None`` if it failed.
        error: what it raised, if it did.
    """

    engine: str
    mode: str
    difference: float | None
    error: str = ""


@dataclass(frozen=True)
class DerivativeReport:
    """What ``check_derivative`` found. ``print`` it for a table.

    Attributes:
        comparisons: every engine and mode beside the loop over rows in reverse mode.
        central_difference: how far the loop's result is from central differences.
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
        differences = [c.difference for c in self.comparisons if c.difference is not None]
        close = all(difference <= self.tolerance for difference in differences)
        return close and self.central_difference <= self.central_tolerance

    def __str__(self) -> str:
        width = max(6, *[len(c.mode) + 1 for c in self.comparisons])
        lines = [f"{'engine':<7}{'mode':<{width}}{'difference':>11}  from the loop over rows"]
        for c in (*self.comparisons, Comparison("central", "", self.central_difference)):
            limit = self.tolerance if c.mode else self.central_tolerance
            verdict = "agrees" if (c.difference or 0) <= limit else "WRONG"
            number = "" if c.difference is None else f"{c.difference:.1e}"
            verdict = c.error if c.difference is None else verdict
            lines.append(f"{c.engine:<7}{c.mode:<{width}}{number:>11}  {verdict}")
        return "\n".join(lines)


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
        A :class:`DerivativeReport`, with ``ok`` and a table when printed. Costs the result once
        for each engine and mode, and differences: of Jacobians and Hessians along one random
        direction, of all else along all that count. float64 inputs make it sharp.

    Raises:
        TypeError: ``transformed`` does not come from funcjac.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
        >>> funcjac.check_derivative(funcjac.batch_jacobian(torch.sin), x).ok
        True
    """
    transform = transform_of(transformed, "check_derivative")
    modes = transform.options.operator.modes
    plain = "rev" if "rev" in modes else "rev_over_rev"
    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = usable((args, kwargs))
        call = bind(transform.func, transform.options, args, kwargs)
        rng = rng_state()
        plain_values(call)  # what func raises comes out here
        draws = not same_rng_state(rng, rng_state())
        results: dict[tuple[str, str], Derivatives | Exception] = {}
        for engine, mode in itertools.product(reversed(ENGINES), reversed(modes)):
            if mode != "taylor" or engine == "sum":  # it runs the whole batch
                set_rng_state(rng)
                results[engine, mode] = _run(call, engine, mode)
        loop = results["loop", plain]
        if isinstance(loop, Exception):
            raise loop
        # What draws random numbers is compared with another mode of its own engine.
        by_engine = draws and None not in call.layout.diff_dims
        references = {engine: results[engine, plain] if by_engine else loop for engine in ENGINES}
        reference = references["sum"]
        set_rng_state(rng)
        central = largest_difference(call, loop if isinstance(reference, Exception) else reference)
        set_rng_state(rng)
    comparisons = [_compare(*key, r, references[key[0]]) for key, r in results.items()]
    limit = tolerance([x.dtype for x in (*call.inputs, *loop.output.leaves)])
    return DerivativeReport(tuple(comparisons), central, limit, 10 * limit ** (2 / 3))


def _run(call: Call, engine: str, mode: str) -> Derivatives | Exception:
    if engine == "sum" and None in call.layout.diff_dims:
        return ValueError("the sum trick has no per-sample derivative of what rows share")
    keywords = replace(call.options, engine=engine, mode=mode, check=False, randomness="different")
    try:
        with DUAL_LEVELS if engine == "vmap" and "fwd" in mode else nullcontext():
            return solve(call._replace(options=keywords), ("check_derivative", engine, mode))
    except Exception as error:  # whatever it is belongs into the report
        return error


def _compare(
    engine: str, mode: str, result: Derivatives | Exception, reference: Derivatives | Exception
) -> Comparison:
    if isinstance(result, Exception):
        return Comparison(engine, mode, None, brief(result))
    reference, worst = result if isinstance(reference, Exception) else reference, 0.0
    for blocks, expected_blocks in zip(result.blocks, reference.blocks):
        for block, expected in zip(blocks, expected_blocks):
            if not block.numel():
                continue
            same = (block == expected) | (block.isnan() & expected.isnan())
            difference = torch.where(same, 0, (block - expected).abs()).nan_to_num(torch.inf)
            worst = max(worst, difference.max().item() / (largest([expected]) or 1.0))
    return Comparison(engine, mode, worst)
