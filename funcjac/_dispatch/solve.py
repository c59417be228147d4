"""Which engine runs a call, and what comes next where one cannot, in plain code."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from funcjac._arguments.call import ENGINES, Call
from funcjac._dispatch.attempt import Attempt, Outcome, lean
from funcjac._dispatch.by_rows import by_loop, by_vmap, reference
from funcjac._dispatch.by_sum import by_sum
from funcjac._dispatch.messages import failure, is_out_of_memory, warn_of_fallback
from funcjac._dispatch.verify import NOT_CAUGHT
from funcjac._engines.run import Derivatives, retire
from funcjac._environment.state import rng_state
from funcjac._verification.row_independence import check_rows
from funcjac.errors import RefusedError, brief

_BY_ENGINE = {"sum": by_sum, "vmap": by_vmap, "loop": by_loop}


def solve(call: Call, token: Any, outcome: Outcome) -> Derivatives:
    """The derivatives of ``call`` in plain (not transformed, not compiled) code."""
    attempt = Attempt(call, token, outcome)
    options, errors = call.options, []
    order, reason = engines_of(call)
    outcome.reasons += [reason] if reason else []
    for engine in order:
        if engine in attempt.decision.left:
            continue
        outcome.engine = engine
        try:
            result = _BY_ENGINE[engine](attempt)
        except NOT_CAUGHT:
            raise
        except Exception as error:
            if attempt.in_func:
                raise
            if attempt.plain is None:
                reference(attempt, rng_state())  # raises what func itself raises
            errors.append((engine, lean(error)))
            if is_out_of_memory(error):
                raise failure(options, errors, outcome.sizes) from None
            if not isinstance(error, torch.linalg.LinAlgError):  # which is a matter of values
                attempt.decision.left[engine] = brief(error)
            outcome.reasons.append(f"{engine}: {brief(error)}")
            continue
        if attempt.plain is not None and attempt.plain.create_graph:
            retire(attempt.plain)
        for left, error in errors[:1]:
            if left in attempt.decision.left:
                warn_of_fallback(options, attempt.function, left, error, engine)
        return result
    attempt.decision.left.clear()
    attempt.decision.calls = 0
    if not errors:  # all failed before: tell again what they raise
        return solve(call, token, outcome)
    if attempt.plain is not None:
        with suppress(RuntimeError):  # of a graph that cannot be used again
            check_rows(attempt.plain, attempt.function.modules)
    raise failure(options, errors, outcome.sizes)


def engines_of(call: Call) -> tuple[tuple[str, ...], str]:
    """The engines that a call may take, in order, and why the sum trick is not among them.

    Raises:
        ValueError: the one that was asked for cannot do what was asked.
    """
    options = call.options
    if call.batch == 0:  # nothing keeps no rows apart
        return ("sum",), ""
    reason = ""
    if None in call.layout.diff_dims:
        reason = "the sum trick has no per-sample derivative of an argument that rows share"
    elif options.randomness == "same":
        reason = "the sum trick cannot give all rows the same draw"
    if reason and (options.engine == "sum" or options.mode == "taylor"):
        raise failure(options, [("sum", RefusedError(reason))], None)
    if options.engine != "auto":
        return (options.engine,), ""
    if options.mode == "taylor":
        return ("sum",), ""
    return (("vmap", "loop") if reason else ENGINES), reason
