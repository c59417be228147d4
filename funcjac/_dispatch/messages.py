"""What the user is told: which engine was left, and why nothing works."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from funcjac._arguments.layout import Options
from funcjac._dispatch.decisions import FunctionKey
from funcjac._environment.torch_private import is_exporting
from funcjac.errors import EngineFallbackWarning, RefusedError, VerificationError, brief, refuse

_WARNED: set[Any] = set()
_MOST_WARNED = 4096


def warn_of_fallback(
    options: Options, function: FunctionKey, left: str, error: Exception, taken: str
) -> None:
    """Say once per function which engine was left for good, and why."""
    key = (left, tuple(function.parts))
    if options.engine != "auto" or key in _WARNED:
        return
    if len(_WARNED) < _MOST_WARNED:
        _WARNED.add(key)
    verified = "verified" if options.check is not False else "not verified (check=False)"
    warnings.warn(
        f"{options.name}: left engine {left!r} for engine {taken!r}, because {brief(error)}. "
        f"The result is {verified}. Pass engine={taken!r}, or "
        'warnings.filterwarnings("ignore", category=funcjac.EngineFallbackWarning), to silence '
        "this.",
        EngineFallbackWarning,
        stacklevel=_outside(),
    )


def refused(options: Options, engine: str, problem: str) -> VerificationError:
    text = f"{options.name}: {engine} was verified and refused: {problem}."
    if engine != "sum":  # which sees the same batch as the reference
        text += " check_batched tells whether rows depend on one another through values."
    return VerificationError(text)


def check_not_exporting(options: Options) -> None:
    if is_exporting():
        expected, remedy = "torch.export to see no transform", "Export make_fx(module)(*args)."
        raise refuse(options.name, RuntimeError, expected, "a call of one", remedy)


def drew(options: Options) -> RuntimeError:
    return RuntimeError(
        f"{options.name}: expected func not to draw random numbers with "
        'randomness="error", but it did. Pass randomness="different" for a draw of its own '
        'in every row, or "same" for one draw for all.'
    )


def is_out_of_memory(error: Exception) -> bool:
    words = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def failure(options: Options, errors: list[tuple[str, Exception]], sizes: Any) -> Exception:
    """What to raise when no engine works: the first that was verified tells, else the first."""
    for _, error in errors:
        if isinstance(error, VerificationError):
            return error
    error = errors[0][1]
    if sizes is not None and is_out_of_memory(error):
        text = (
            f"expected derivatives of {sizes.batch} rows, {sizes.outputs} outputs by "
            f"{sizes.inputs} inputs, to fit in memory, got {brief(error)}. Pass fewer rows at "
            "once, or a smaller chunk_size."
        )
    else:
        text = (
            f"engine={options.engine!r} with mode={options.mode!r} cannot differentiate func, "
            f"although func itself runs: {brief(error)}.{_remedy(options, error)}"
        )
    kind = ValueError if isinstance(error, RefusedError) else RuntimeError
    raised = kind(f"{options.name}: {text}")
    raised.__cause__ = error
    return raised


def _remedy(options: Options, error: Exception) -> str:
    text = str(error)
    if "scaled_dot_product" in text:
        return (
            " Run it inside `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, which has all "
            "derivatives."
        )
    if "aot_autograd" in text:
        return " Compile the whole step that calls the transform, rather than func."
    if (options.engine, options.mode) == ("auto", "auto"):
        return " Look at explain() for every attempt."
    return ' Use engine="auto" and mode="auto", or look at explain() for every attempt.'


def _outside() -> int:
    """The stack level of the first frame outside of the package, for warnings."""
    level, frame = 1, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("funcjac"):
        frame, level = frame.f_back, level + 1
    return level
