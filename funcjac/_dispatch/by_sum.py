"""The engine ``sum``: derivatives through the graph, or the record, of the one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from funcjac._dispatch.attempt import Attempt, lean
from funcjac._dispatch.messages import is_out_of_memory
from funcjac._dispatch.rule import Sizes
from funcjac._dispatch.verify import NOT_CAUGHT, verify
from funcjac._engines.run import Derivatives, Route, Run, detached
from funcjac._environment.state import rng_state
from funcjac._taylor import Recorder
from funcjac.errors import RefusedError, UntraceableError, brief

_MOST_ROUTES = 256


def by_sum(attempt: Attempt) -> Derivatives:
    """One run of ``func``, the rule, and as many passes through its graph."""
    decision = attempt.decision
    if decision.records is None:
        decision.records = _may_record(attempt)
    if decision.outputs is None:
        attempt.start = rng_state()  # for a run of replacements to draw the same numbers
    run = attempt.plain = attempt.read(attempt.run(Recorder if decision.records else None))
    sizes = attempt.sizes(run)
    facts, outcome = attempt.facts, attempt.outcome
    assert facts is not None
    outcome.sizes, outcome.operations = sizes, facts.operations
    known = facts.signature in decision.signatures
    check = attempt.options.check is not False and (attempt.is_due or not known)
    route = None if check else decision.routes.get(sizes)
    if route is None:
        return _first_that_works(attempt, run, sizes, check)
    try:
        result = _computed(attempt, run, route)
    except NOT_CAUGHT:
        raise
    except Exception:  # values may decide: everything is tried
        decision.routes.clear()
        return _first_that_works(attempt, run, sizes, check)
    outcome.route = route
    return result if run.create_graph else detached(result)


def _may_record(attempt: Attempt) -> bool:
    """Whether a first call records operations: what the rule wants is known afterwards."""
    mode, operator = attempt.options.mode, attempt.operator
    if attempt.function.scripted:
        if mode == "taylor":
            attempt.plain = attempt.read(attempt.run())
            raise UntraceableError("what TorchScript runs cannot be recorded")
        return False
    return "taylor" in operator.modes and mode in ("auto", "taylor")


def _first_that_works(attempt: Attempt, run: Run, sizes: Sizes, check: bool) -> Derivatives:
    decision, error = attempt.decision, None
    for route in _routes(attempt, run, sizes):
        if route in decision.left:
            continue
        try:
            result = _computed(attempt, run, route)
            if check:
                verify(attempt, run, result, "sum")
        except NOT_CAUGHT:
            raise
        except Exception as raised:
            error = lean(raised)
            if is_out_of_memory(error):
                raise error from None
            _leave(attempt, route, error)
            continue
        if len(decision.routes) >= _MOST_ROUTES:
            decision.routes.clear()
        decision.routes[sizes] = route
        decision.records = route.mode == "taylor"
        attempt.outcome.route, attempt.outcome.verified = route, check
        return result if run.create_graph else detached(result)
    raise error or RefusedError("; ".join(decision.left.values()))


def _routes(attempt: Attempt, run: Run, sizes: Sizes) -> Iterator[Route]:
    """What the rule gives, and what remains on the same graph if that fails."""
    options, operator = attempt.options, attempt.operator
    mode = options.mode
    if run.recorder is not None and operator.uses_taylor(run.call, sizes.outputs, sizes.inputs):
        yield Route("taylor", options.chunk_size)
        if mode == "taylor":
            return
    first = operator.route(run.call, sizes)
    yield first
    if first.chunk != 1:
        yield first._replace(chunk=1)
    if mode == "auto":
        plainest = "rev_over_rev" if "_over_" in first.mode else "rev"
        if first.mode != plainest:
            yield first._replace(mode=plainest)
            yield Route(plainest, 1)


def _computed(attempt: Attempt, run: Run, route: Route) -> Derivatives:
    operator = attempt.operator
    with torch.set_grad_enabled(run.create_graph or operator.is_second_order):
        result = operator.compute(run, route)
        if route.mode == "taylor" and not _is_finite(result):
            # One infinite factor makes all directions NaN: others may be finite.
            return operator.compute(run, operator.route(run.call, attempt.outcome.sizes))
    return result


def _is_finite(result: Derivatives) -> bool:
    return all(bool(block.isfinite().all()) for row in result.blocks for block in row)


def _leave(attempt: Attempt, route: Route, error: Exception) -> None:
    """Remember a route that failed, but for reasons of values."""
    decision: Any = attempt.decision
    if not isinstance(error, torch.linalg.LinAlgError):
        decision.left[route] = brief(error)
    attempt.outcome.reasons.append(f"sum/{route.mode}: {brief(error)}")
