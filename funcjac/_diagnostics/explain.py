"""``explain``: what runs, and why."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from funcjac._arguments import pytree
from funcjac._diagnostics.meter import Meter
from funcjac._dispatch.attempt import Outcome
from funcjac._environment.torch_private import uncompiled
from funcjac._operators.transform import Transform, transform_of
from funcjac.errors import brief


@dataclass(frozen=True)
class Timing:
    """One way that ``measure=True`` timed: keywords, seconds of a usual call, or why it failed."""

    engine: str
    mode: str
    chunk_size: int | None
    seconds: float | None
    reason: str = ""

    def __str__(self) -> str:
        time = self.reason if self.seconds is None else f"{1e3 * self.seconds:.3f} ms"
        keywords = f"engine={self.engine!r}, mode={self.mode!r}, chunk_size={self.chunk_size}"
        return f"{time:>10}  {keywords}"


@dataclass(frozen=True)
class Explanation:
    """What runs for one call, and why. ``print`` it for a table.

    Attributes:
        name: the transform.
        engine, mode: what runs.
        passes, chunk: basis vectors to pull back or to push forward, and how many at once.
        batch, outputs, inputs: rows, and elements in one row of the output and the input.
        operations, widest: nodes in the graph of one run, and elements of its widest tensor.
        flops: floating-point operations of matrix products and convolutions in one call.
        memory: bytes of the tensors alive at once during one call, at most.
        differentiable, verified: whether the result carries a graph, and was verified.
        runs: how often ``func`` ran in this call.
        reasons: what ruled an alternative out, or made ``func`` run again.
        attempts: with ``measure=True``, what was timed, the fastest first.
    """

    name: str
    engine: str
    mode: str
    passes: int
    chunk: int
    batch: int
    outputs: int
    inputs: int
    operations: int
    widest: int
    flops: int
    memory: int
    differentiable: bool
    verified: bool
    runs: int
    reasons: tuple[str, ...]
    attempts: tuple[Timing, ...] = ()

    def __str__(self) -> str:
        shapes = f"batch of {self.batch}, {self.inputs} inputs -> {self.outputs} outputs a row"
        second = self.mode == "taylor" or "_over_" in self.mode
        against = "plain double backward" if second else "a plain VJP"
        verified = f"verified against {against}" if self.verified else "not verified (check=False)"
        graph = "differentiable" if self.differentiable else "no graph"
        times = "once" if self.runs == 1 else f"{self.runs} times"
        lines = [
            f"{self.name}: {shapes}",
            f"runs   engine={self.engine!r}, mode={self.mode!r}: {self.passes} passes in chunks of "
            f"{self.chunk}; func runs {times}; {verified}; {graph}",
            f"costs  {_amount(self.flops, 'FLOP', 1000)} in matrix products and convolutions, at "
            f"most {_amount(self.memory, 'B', 1024)} at once; {self.operations} operations, the "
            f"widest of {self.widest} numbers",
            *[f"left   {reason}" for reason in self.reasons],
        ]
        return "\n".join([*lines, *map(str, self.attempts)])


def explain(
    transformed: Callable[..., Any], *args: Any, measure: bool = False, **kwargs: Any
) -> Explanation:
    """Tells what ``transformed(*args, **kwargs)`` runs, and why.

    It calls ``transformed`` once, and has the result verified unless ``check=False``.

    Args:
        transformed: what a funcjac transform returned.
        *args: arguments as for ``transformed``.
        measure: also time the alternatives, in a few dozen runs of ``func``.
        **kwargs: keyword arguments as for ``transformed``.

    Returns:
        An :class:`Explanation`: ``print`` it for a table.

    Raises:
        TypeError: ``transformed`` does not come from funcjac.

    Example:
        >>> import torch, funcjac
        >>> J = funcjac.batch_jacobian(torch.sin)
        >>> explanation = funcjac.explain(J, torch.zeros(4, 3))
        >>> explanation.batch, explanation.outputs, explanation.inputs
        (4, 3, 3)
        >>> explanation.engine, explanation.runs
        ('sum', 1)
    """
    transform = transform_of(transformed, "explain")
    always = replace(transform.options, check=transform.options.check and True)
    outcome, verified = Outcome(meter=Meter()), Transform(transform.func, always)
    with uncompiled() or nullcontext(), outcome.meter as meter:
        result = verified.evaluate(args, kwargs, outcome)
    sizes, route = outcome.sizes, outcome.route
    passes = transform.options.operator.passes(route.mode, sizes.outputs, sizes.inputs)
    return Explanation(
        name=transform.options.name,
        engine=outcome.engine,
        mode=route.mode,
        passes=passes,
        chunk=min(route.chunk or passes, max(passes, 1)),
        batch=sizes.batch,
        outputs=sizes.outputs,
        inputs=sizes.inputs,
        operations=outcome.operations,
        widest=sizes.widest,
        flops=meter.flops,
        memory=meter.peak,
        differentiable=any(leaf.requires_grad for leaf in pytree.tensors(result)),
        verified=outcome.verified,
        runs=outcome.runs,
        reasons=tuple(outcome.reasons),
        attempts=tuple(_measured(transform, args, kwargs)) if measure else (),
    )


def _measured(transform: Transform, args: Any, kwargs: Any) -> list[Timing]:
    """Times of every engine and mode in a few chunks, the fastest first."""
    modes, timings = transform.options.operator.modes, []
    ways = [("sum", mode, chunk) for mode in modes for chunk in (1, 4, 16, 64, None)]
    ways += [("vmap", mode, None) for mode in modes if mode != "taylor"]
    for engine, mode, chunk in ways:
        keywords = replace(transform.options, engine=engine, mode=mode, chunk_size=chunk)
        variant, times = Transform(transform.func, keywords), []
        try:
            for _ in range(5):
                start = _now()
                variant.evaluate(args, kwargs)
                times.append(_now() - start)
            timings.append(Timing(engine, mode, chunk, statistics.median(times)))
        except Exception as error:  # it is not to be had in this way
            timings.append(Timing(engine, mode, chunk, None, brief(error)))
    return sorted(timings, key=lambda t: math.inf if t.seconds is None else t.seconds)


def _now() -> float:
    """The clock, once the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _amount(value: float, unit: str, base: int) -> str:
    step = 0
    while value >= base and step < 5:
        value, step = value / base, step + 1
    prefix = ("", "k", "M", "G", "T", "P")[step]
    return f"{value:.3g} {prefix}{'i' if base == 1024 and step else ''}{unit}"
