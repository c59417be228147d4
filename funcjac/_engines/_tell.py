"""Telling the user: which engine was left, and why nothing works."""

import sys
import warnings

from funcjac._batched import Options
from funcjac._engines._record import Memory, Record
from funcjac._modes import Route
from funcjac.errors import (
    EngineFallbackWarning,
    UnsuitableError,
    VerificationError,
    brief,
    is_out_of_memory,
    out_of_memory,
)


def warn_of_fallback(options: Options, memory: Memory, record: Record, route: Route) -> None:
    """Say once what was left for ``route``, and why: vmap, or Taylor propagation."""
    taylor = "taylor" in options.operator.modes and options.mode == "auto"
    first = ("mode", "taylor") if taylor else ("engine", "vmap")
    left = [error for r, error in record.errors.items() if getattr(r, first[0]) == first[1]]
    if taylor:  # what it cannot have by its nature is no failure
        left = [error for error in left if not isinstance(error, UnsuitableError)]
    if options.engine != "auto" and not taylor:
        return
    if not left or getattr(route, first[0]) == first[1] or memory.warned:
        return
    memory.warned = True
    verified = "verified" if options.check is not False else "not verified (check=False)"
    warnings.warn(
        f"{options.name}: left {first[0]} {first[1]!r} for {getattr(route, first[0])!r}, because "
        f"{brief(left[0])}. The result is {verified}. Pass "
        f"{first[0]}={getattr(route, first[0])!r}, or "
        'warnings.filterwarnings("ignore", category=funcjac.EngineFallbackWarning), to silence '
        "this.",
        EngineFallbackWarning,
        stacklevel=_outside(),
    )


def drew(options: Options) -> RuntimeError:
    return RuntimeError(
        f"{options.name}: expected func not to draw random numbers with "
        'randomness="error", but it did. Pass randomness="different" for a draw of its own '
        'in every row, or "same" for one draw for all.'
    )


def failure(options: Options, record: Record) -> Exception:
    """What to raise when no route works."""
    found = list(record.errors.values())
    found = [error for error in found if not isinstance(error, UnsuitableError)] or found
    # Where an engine was asked for, its first attempt tells; else the plainest one, the last.
    error = found[-1 if options.engine == "auto" else 0]
    if isinstance(error, VerificationError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(options.name, record.sizes, error)
    kind = ValueError if isinstance(error, UnsuitableError) else RuntimeError
    raised = kind(
        f"{options.name}: engine={options.engine!r} with mode={options.mode!r} cannot "
        f"differentiate func, although func itself runs: {brief(error)}. "
        'Use engine="auto" and mode="auto", or look at explain() for every attempt.'
    )
    raised.__cause__ = error
    return raised


def _outside() -> int:
    """The stack level of the first frame outside of the package, for warnings."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("funcjac"):
        frame, level = frame.f_back, level + 1
    return level
