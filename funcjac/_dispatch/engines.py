"""How each engine is tried: the sum trick on the one run; vmap and the loop beside a plain run."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch

from funcjac._arguments.call import Call
from funcjac._dispatch.attempt import NOT_CAUGHT, Attempt, lean, verify
from funcjac._dispatch.choose_engine_mode_chunk import nested_route, routes_of, sizes_of
from funcjac._dispatch.messages import drew, is_out_of_memory
from funcjac._engines import loop, run_func, vmap
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._environment import state
from funcjac._taylor.recorder import Recorder
from funcjac._verification.forward_formulas import check_forward_formulas
from funcjac._verification.row_independence import check_rows
from funcjac.errors import RefusedError, UntraceableError, brief


def by_sum(attempt: Attempt) -> Derivatives:
    """One run of ``func``, the rule, and the first of its routes that works."""
    decision, outcome, error = attempt.decision, attempt.outcome, None
    if decision.records is None:
        decision.records = _may_record(attempt)
    run, facts = attempt.run(Recorder if decision.records else None)
    for route in routes_of(run, outcome.sizes, attempt.options.chunk_size):
        if route.way in decision.left:
            continue
        nested = nested_route(run, outcome.sizes, route)
        is_new = (facts.signature, route.mode) not in decision.signatures
        check = attempt.options.check is not False and (attempt.is_due or is_new)
        try:
            result = run_func.computed(run, route, nested)
            if check:
                verify(attempt, run, result, "sum", route.mode)
        except NOT_CAUGHT:
            raise
        except Exception as raised:
            error = lean(raised)
            if is_out_of_memory(error):
                raise error from None
            if not isinstance(error, torch.linalg.LinAlgError):  # which is a matter of values
                decision.left[route.way] = brief(error)
            outcome.reasons.append(f"sum/{route.mode}: {brief(error)}")
            continue
        decision.remember(run_func.kind_of(run, facts), (route, nested))
        decision.records = route.mode == "taylor"
        outcome.route, outcome.verified = route, check
        return result if run.create_graph else run_func.detached(result)
    raise error or RefusedError("; ".join(decision.left.values()))


def _may_record(attempt: Attempt) -> bool:
    """Whether a first call records operations: what the rule wants is known afterwards."""
    mode = attempt.options.mode
    if attempt.function.scripted and mode == "taylor":
        attempt.run()
        raise UntraceableError("what TorchScript runs cannot be recorded")
    asked = "taylor" in attempt.operator.modes and mode in ("auto", "taylor")
    return asked and not attempt.function.scripted


# --- rows apart by construction ----------------------------------------------------------------


def by_vmap(attempt: Attempt) -> Derivatives:
    """Rows apart by ``torch.vmap``."""
    mode = attempt.options.mode
    if attempt.function.scripted:
        raise RefusedError("torch.func differentiates TorchScript wrongly from its second call on")
    if "fwd" in mode:  # forward formulas see through no_grad: always verified
        attempt.is_due = attempt.options.check is not False
        if not attempt.is_due:
            check_forward_formulas(attempt.call, again=torch.is_grad_enabled() or "_" in mode)
    # Node names do not show all that torch.func differentiates wrongly.
    call = _call_of_rows(attempt)._replace(replaced=True)
    attempt.outcome.runs += 1
    with state.without_wrapped(attempt.function.modules):
        result = vmap.by_vmap(call, lambda *row: attempt.operator.compute_row(call, *row, mode))
    if attempt.is_due:
        verify(attempt, _with_draws_of_vmap(attempt), result, "vmap")
    attempt.outcome.route = Route(mode, attempt.options.chunk_size)
    create_graph = torch.is_grad_enabled() and (attempt.plain is None or attempt.plain.create_graph)
    return result if create_graph else run_func.detached(result)


def _call_of_rows(attempt: Attempt) -> Call:
    """The call of an engine that runs rows, with the inputs of the reference, if it has a graph."""
    if attempt.is_due or not attempt.decision.has_run:
        reference(attempt)
    call, plain = attempt.call, attempt.plain
    return call if plain is None or not plain.create_graph else call.with_inputs(plain.inputs)


def reference(attempt: Attempt) -> None:
    """Run ``func`` plainly, for what it raises, its sizes, and to verify by.

    Raises:
        RuntimeError: it draws random numbers, and must not.
        BatchMixingError: it draws random numbers, and its rows depend on one another.
    """
    if attempt.plain is not None:
        return
    lazy = state.has_lazy(attempt.function.modules)
    run, _ = attempt.run()
    if lazy or state.same_rng_state(attempt.start, state.rng_state()):
        return
    attempt.draws = attempt.in_func = True
    state.set_rng_state(attempt.start)
    if attempt.options.randomness == "error":
        raise drew(attempt.options)
    if attempt.is_due:
        check_rows(run, attempt.function.modules)
    attempt.in_func = False


def _with_draws_of_vmap(attempt: Attempt) -> Run:
    """The plain run, or one that draws what ``torch.vmap`` drew."""
    plain, after = attempt.plain, state.rng_state()
    assert plain is not None
    if not attempt.draws:
        return plain

    def values(function: Any, xs: Any, _: Any) -> Any:
        return [], function(*xs)[1]

    state.set_rng_state(attempt.start)
    with torch.enable_grad():
        output = vmap.by_vmap(attempt.call.with_inputs(plain.inputs), values).output
    state.set_rng_state(after)
    return plain._replace(output=plain.output._replace(leaves=output.leaves))


def by_loop(attempt: Attempt) -> Derivatives:
    """One row after the other."""
    call = _call_of_rows(attempt)
    plain, start = attempt.plain, state.rng_state()
    result = loop.by_loop(call, functools.partial(_one_row, attempt))
    if attempt.options.randomness == "error" and not state.same_rng_state(start, state.rng_state()):
        state.set_rng_state(start)
        raise drew(attempt.options)
    if plain is not None and attempt.is_due and not attempt.draws:
        with suppress(torch.linalg.LinAlgError):  # of a singular row, which stops no other
            verify(attempt, plain, result, "loop")
    return result


def _one_row(attempt: Attempt, call: Call) -> Derivatives:
    attempt.outcome.runs += 1
    run, facts = run_func.read_graph(run_func.run_once(call))
    route = attempt.operator.route(call, sizes_of(run, facts.widest))._replace(chunk=1)  # no vmap
    attempt.outcome.route = route
    result = run_func.computed(run, route, route)
    if not run.create_graph:
        return run_func.detached(result)
    run_func.retire(run)
    return result


BY_ENGINE = {"sum": by_sum, "vmap": by_vmap, "loop": by_loop}
