"""``explain``: what would run, and why."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from funcjac import _tree
from funcjac._engines import Record
from funcjac._jacobian import Transform, evaluate, looks, transform_of
from funcjac._modes import Route
from funcjac._native import with_memory
from funcjac.errors import brief

# Every route has had its turns long before this many calls.
_MOST_CALLS = 100


@dataclass(frozen=True)
class Attempt:
    """One route: measured, or left for a reason.

    Attributes:
        engine: ``"vmap"``, ``"sum"`` or ``"loop"``.
        mode: ``"fwd"`` or ``"rev"``; of second derivatives ``"taylor"`` or a nested mode.
        how: what sets it apart from other routes of the same engine and mode.
        passes: basis vectors to pull back or push forward.
        seconds: of a usual run, ``None`` if there was none.
        reason: why it does not run, empty for the route that does.
    """

    engine: str
    mode: str
    how: str
    passes: int
    seconds: float | None
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What runs for one signature, and what else was tried. ``print`` it for a table.

    Attributes:
        name: the transform.
        engine, mode: what runs.
        passes: basis vectors to pull back (``"rev"``) or to push forward (``"fwd"``).
        chunk: basis vectors in one pass.
        batch, outputs, inputs: rows, and elements in one row of the output and the input.
        flops: floating-point operations of matrix products and convolutions in one call.
        memory: bytes of the tensors alive at once during one call, at most.
        differentiable: whether the result carries a graph.
        verified: whether results were compared with a plain vector-Jacobian product.
        attempts: every route that was tried or found unsuitable, the one that runs first.
    """

    name: str
    engine: str
    mode: str
    passes: int
    chunk: int
    batch: int
    outputs: int
    inputs: int
    flops: int
    memory: int
    differentiable: bool
    verified: bool
    attempts: tuple[Attempt, ...]

    def __str__(self) -> str:
        shapes = f"batch of {self.batch}, {self.inputs} inputs -> {self.outputs} outputs a row"
        second = self.mode == "taylor" or "_over_" in self.mode
        against = "plain double backward" if second else "a plain VJP"
        verified = f"verified against {against}" if self.verified else "not verified (check=False)"
        width = max(6, *[len(attempt.mode) + 1 for attempt in self.attempts])
        graph = "differentiable" if self.differentiable else "no graph"
        lines = [
            f"{self.name}: {shapes}",
            f"runs   engine={self.engine!r}, mode={self.mode!r}: {self.passes} passes in chunks of "
            f"{self.chunk}; {verified}; {graph}",
            f"costs  {_amount(self.flops, 'FLOP', 1000)} in matrix products and convolutions, at "
            f"most {_amount(self.memory, 'B', 1024)} at once",
            "",
            f"{'engine':<7}{'mode':<{width}}{'passes':>7}{'time':>11}  why",
        ]
        for attempt in self.attempts:
            seconds = "" if attempt.seconds is None else _amount_of_time(attempt.seconds)
            why = "; ".join(filter(None, (attempt.how, attempt.reason or "runs")))
            lines.append(
                f"{attempt.engine:<7}{attempt.mode:<{width}}{attempt.passes:>7}{seconds:>11}  {why}"
            )
        return "\n".join(lines)

    def plot(self, ax: Any = None) -> Any:
        """Draw the time of every route that was measured; returns the matplotlib axes.

        Needs matplotlib (``pip install 'funcjac[examples]'``).
        """
        from matplotlib import pyplot  # noqa: PLC0415  an extra

        ax = pyplot.subplots(figsize=(6, 2.5))[1] if ax is None else ax
        timed = [attempt for attempt in self.attempts if attempt.seconds is not None][::-1]
        names = [f"{a.engine}/{a.mode} {a.how}".strip() for a in timed]
        colors = ["tab:blue" if not a.reason else "lightgray" for a in timed]
        ax.barh(names, [1e3 * (a.seconds or 0) for a in timed], color=colors)
        ax.set_xlabel("milliseconds")
        ax.set_title(f"{self.name}: what was tried, and what runs")
        return ax


@looks
def explain(transformed: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Tells what ``transformed(*args, **kwargs)`` runs, and why.

    Calls it until the cheapest route for this signature is known, so that the answer is what
    later calls do rather than a guess.

    Args:
        transformed: what a funcjac transform returned.
        *args: arguments as for ``transformed``.
        **kwargs: keyword arguments as for ``transformed``.

    Returns:
        An :class:`Explanation`: engine, mode, passes, chunk, FLOP, bytes, and each route that was
        tried, with its time or the exception that ruled it out. ``print`` gives a table,
        ``.plot()`` a picture.

    Raises:
        TypeError: ``transformed`` does not come from funcjac.
        ValueError: nothing is to be differentiated (an empty batch).

    Example:
        >>> import torch, funcjac
        >>> J = funcjac.batch_jacobian(torch.sin)
        >>> found = funcjac.explain(J, torch.zeros(4, 3))
        >>> found.batch, found.outputs, found.inputs
        (4, 3, 3)
        >>> found.verified
        True
    """
    transform = transform_of(transformed, "explain")
    if not torch.is_grad_enabled() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return explain(transformed, *args, **kwargs)
    record = settled(transform, args, kwargs)
    with Meter() as meter:
        evaluate(transform, args, kwargs)
    assert record.choice is not None
    batch, outputs, inputs = record.sizes
    route = record.choice
    others = [r for r in record.times if r != route] + list(record.errors)
    passes = route.passes(outputs, inputs)
    return Explanation(
        name=transform.options.name,
        engine=route.engine,
        mode=route.mode,
        passes=passes,
        chunk=min(route.chunk or passes, passes),
        batch=batch,
        outputs=outputs,
        inputs=inputs,
        flops=meter.flops,
        memory=meter.peak,
        differentiable=record.context.graph,
        verified=transform.options.check is not False,
        attempts=tuple(_attempt(r, record) for r in [route, *others]),
    )


def settled(transform: Transform, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
    """Call until the record of this signature has made its choice."""
    for _ in range(_MOST_CALLS):
        evaluate(transform, args, kwargs)
        record = transform.memory.latest
        if record is None:
            raise ValueError(
                f"{transform.options.name}: expected at least one row, one output and one input "
                "to differentiate, got an empty Jacobian. Nothing runs for it."
            )
        if record.choice is not None:
            return record
    raise AssertionError("routes have a bounded number of turns")


def _attempt(route: Route, record: Record) -> Attempt:
    error = record.errors.get(route)
    times = record.times.get(route)
    reason = "" if route == record.choice else "slower"
    if error is not None:
        reason = brief(error)
    _, outputs, inputs = record.sizes
    return Attempt(
        route.engine,
        route.mode,
        route.how,
        route.passes(outputs, inputs),
        record.seconds(route) if times else None,
        reason,
    )


class Meter(TorchDispatchMode):
    """Counts what runs under it.

    Attributes:
        peak: bytes of tensors made under it that were alive at once, at most.
        flops: floating-point operations of matrix products and convolutions.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # noqa: PLC0415  slow to import

        super().__init__()
        self.now = self.peak = self.flops = 0
        self._formulas = flop_registry
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = with_memory(args), with_memory(kwargs or {})
        for tensor in _tensors((args, kwargs)):  # what was there before does not count
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)
        out = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    leaves = _tree.flatten(tree)[0]
    return [t for t in leaves if isinstance(t, Tensor) and t.layout == torch.strided]


def _amount(value: float, unit: str, base: int) -> str:
    prefixes = ("", "k", "M", "G", "T", "P")
    step = 0
    while value >= base and step + 1 < len(prefixes):
        value, step = value / base, step + 1
    middle = "i" if base == 1024 and step else ""
    return f"{value:.3g} {prefixes[step]}{middle}{unit}"


def _amount_of_time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"
