"""The way of a call in plain code: a settled call first, then the engines one after the other."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from funcjac._arguments.call import Call
from funcjac._dispatch.attempt import NOT_CAUGHT, Attempt, Outcome, give_copies, lean
from funcjac._dispatch.choose_engine_mode_chunk import engines_of, nested_route, routes_of, sizes_of
from funcjac._dispatch.decisions import Decision, FunctionKey, decision_of, make_key
from funcjac._dispatch.engines import BY_ENGINE, reference
from funcjac._dispatch.messages import failure, is_out_of_memory, warn_of_fallback
from funcjac._engines import run_func
from funcjac._engines.run_func import ChangedInputError, Derivatives, Route, Run
from funcjac._taylor.recorder import Recorder
from funcjac._verification.row_independence import check_rows
from funcjac.errors import brief


def solve(call: Call, token: Any, outcome: Outcome | None = None) -> Derivatives:
    """The derivatives of ``call`` in plain (not transformed, not compiled) code."""
    function = FunctionKey(call.func)
    call = call._replace(compiles=True) if function.compiles else call
    decision = decision_of(make_key(token, function, call))
    check = call.options.check
    if not decision.has_run:
        call.options.operator.check_inputs(call)
    decision.calls += check is not False
    run = None
    if outcome is None and decision.routes and not decision.is_due(check, call.batch):
        run, result = _settled(call, decision)
        if result is not None:
            return result
    return _by_engines(Attempt(call, function, decision, outcome or Outcome(), run))


def _settled(call: Call, decision: Decision) -> tuple[Run | None, Derivatives | None]:
    """One run and the passes of the known route, or the run of a graph of another kind."""
    if decision.clone or decision.replaced:
        call = call._replace(clone=decision.clone, replaced=decision.replaced)
    try:
        run = run_func.run_once(call, Recorder if decision.records else None)
    except ChangedInputError as error:
        give_copies(decision, call.options, error)
        return None, None
    run, facts = run_func.read_graph(run)
    kind, signature = run_func.kind_of(run, facts), facts.signature
    known = routes = decision.routes.get(kind)
    if routes is None and not decision.left and engines_of(call)[0][0] == "sum":
        routes = _by_rule(run, facts.widest)
    if routes is None:
        return run, None
    mode = routes[0].mode
    if call.options.check is False:
        again = run.create_graph or call.options.operator.is_second_order or mode == "fwd"
        is_safe = call.replaced or (signature, again) in decision.graphs
    else:
        is_safe = (signature, mode) in decision.signatures
    if not is_safe:
        return run, None
    if known is None:
        decision.remember(kind, routes)
    try:
        result = run_func.computed(run, *routes)
    except NOT_CAUGHT:
        raise
    except Exception:  # values may decide: everything is tried
        decision.routes.clear()
        return run, None
    if not run.create_graph:
        return run, run_func.detached(result)
    run_func.retire(run)
    return run, result


def _by_rule(run: Run, widest: int) -> tuple[Route, Route]:
    """The first route of the rule, for a batch of another size, and what runs beside Taylor."""
    options, sizes = run.call.options, sizes_of(run, widest)
    options.operator.check_output(run.call, run.output.leaves)
    route = next(routes_of(run, sizes, options.chunk_size))
    return route, nested_route(run, sizes, route)


def _by_engines(attempt: Attempt) -> Derivatives:
    """Try one engine after the other."""
    options, decision, outcome = attempt.options, attempt.decision, attempt.outcome
    errors: list[tuple[str, Exception]] = []
    order, reason = engines_of(attempt.call)
    outcome.reasons += [reason] if reason else []
    for engine in order:
        if engine in decision.left:
            outcome.reasons.append(f"{engine}: {decision.left[engine]}")
            continue
        outcome.engine = engine
        try:
            result = BY_ENGINE[engine](attempt)
        except NOT_CAUGHT:
            raise
        except Exception as error:
            _leave(attempt, engine, error, errors)
            continue
        if attempt.plain is not None and attempt.plain.create_graph:
            run_func.retire(attempt.plain)
        if errors and errors[0][0] in decision.left:
            warn_of_fallback(options, attempt.function, *errors[0], engine)
        return result
    decision.left.clear()
    decision.calls = int(options.check is not False and not errors)
    if not errors:  # all failed before: tell again what they raise
        return _by_engines(Attempt(attempt.call, attempt.function, decision, outcome, None))
    if attempt.plain is not None:
        with suppress(RuntimeError):  # of a graph that cannot be used again
            check_rows(attempt.plain, attempt.function.modules)
    raise failure(options, errors, outcome.sizes)


def _leave(
    attempt: Attempt, engine: str, error: Exception, errors: list[tuple[str, Exception]]
) -> None:
    """Remember an engine that failed; raise what no other engine can mend."""
    if attempt.in_func:
        raise error
    if attempt.plain is None:
        reference(attempt)  # raises what func itself raises
    errors.append((engine, lean(error)))
    if is_out_of_memory(error):
        raise failure(attempt.options, errors, attempt.outcome.sizes) from None
    if not isinstance(error, torch.linalg.LinAlgError):  # which is a matter of values
        attempt.decision.left[engine] = brief(error)
        attempt.decision.routes.clear()
    attempt.outcome.reasons.append(f"{engine}: {brief(error)}")
