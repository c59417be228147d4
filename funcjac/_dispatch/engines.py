"""How each engine is tried: the sum trick on the one run; vmap and the loop beside a plain run."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch

from funcjac._arguments.call import Call
from funcjac._dispatch.attempt import NOT_CAUGHT, Attempt, lean, verify
from funcjac._dispatch.choose_engine_mode_chunk import Sizes, nested_route, routes_of, sizes_of
from funcjac._dispatch.messages import drew, is_out_of_memory
from funcjac._engines import loop, vmap
from funcjac._engines.run_func import (
    Derivatives,
    Facts,
    Route,
    Run,
    computed,
    detached,
    kind_of,
    read_graph,
    retire,
    run_once,
)
from funcjac._environment.state import (
    RngState,
    WrappedAttributes,
    has_lazy,
    rng_state,
    same_rng_state,
    set_rng_state,
)
from funcjac._taylor import Recorder
from funcjac._verification.forward_formulas import check_forward_formulas
from funcjac._verification.row_independence import check_rows
from funcjac.errors import RefusedError, UntraceableError, brief


def by_sum(attempt: Attempt) -> Derivatives:
    """One run of ``func``, the rule, and as many passes through its graph."""
    decision = attempt.decision
    if decision.records is None:
        decision.records = _may_record(attempt)
    if not decision.has_run:
        attempt.start = rng_state()  # for a run of replacements to draw the same numbers
    run = attempt.plain = attempt.read(attempt.run(Recorder if decision.records else None))
    sizes = attempt.sizes(run)
    facts, outcome = attempt.facts, attempt.outcome
    assert facts is not None
    outcome.sizes, outcome.operations = sizes, facts.operations
    return _first_that_works(attempt, run, facts, sizes)


def _may_record(attempt: Attempt) -> bool:
    """Whether a first call records operations: what the rule wants is known afterwards."""
    mode, operator = attempt.options.mode, attempt.operator
    if attempt.function.scripted:
        if mode == "taylor":
            attempt.plain = attempt.read(attempt.run())
            raise UntraceableError("what TorchScript runs cannot be recorded")
        return False
    return "taylor" in operator.modes and mode in ("auto", "taylor")


def _first_that_works(attempt: Attempt, run: Run, facts: Facts, sizes: Sizes) -> Derivatives:
    decision, error = attempt.decision, None
    for route in routes_of(run, sizes, attempt.options.chunk_size):
        if route.way in decision.left:
            continue
        nested = nested_route(run, sizes, route)
        is_new = (facts.signature, route.mode) not in decision.signatures
        check = attempt.options.check is not False and (attempt.is_due or is_new)
        try:
            result = computed(run, route, nested)
            if check:
                verify(attempt, run, result, "sum", route.mode)
        except NOT_CAUGHT:
            raise
        except Exception as raised:
            error = lean(raised)
            if is_out_of_memory(error):
                raise error from None
            _leave(attempt, route, error)
            continue
        decision.remember(kind_of(run, facts), (route, nested))
        decision.records = route.mode == "taylor"
        attempt.outcome.route, attempt.outcome.verified = route, check
        return result if run.create_graph else detached(result)
    raise error or RefusedError("; ".join(decision.left.values()))


def _leave(attempt: Attempt, route: Route, error: Exception) -> None:
    """Remember a route that failed, but for reasons of values."""
    decision: Any = attempt.decision
    if not isinstance(error, torch.linalg.LinAlgError):
        decision.left[route.way] = brief(error)
    attempt.outcome.reasons.append(f"sum/{route.mode}: {brief(error)}")


# --- rows apart by construction ----------------------------------------------------------------


def by_vmap(attempt: Attempt) -> Derivatives:
    """Rows apart by ``torch.vmap``."""
    before, mode = rng_state(), attempt.options.mode
    if attempt.function.scripted:
        words = "torch.func differentiates TorchScript wrongly from its second call on"
        raise RefusedError(words)
    if "fwd" in mode:  # forward formulas see through no_grad: always verified
        attempt.is_due = attempt.options.check is not False
        if not attempt.is_due:
            check_forward_formulas(attempt.call, again=torch.is_grad_enabled() or "_" in mode)
    draws = False
    if attempt.is_due or not attempt.decision.has_run:
        draws = reference(attempt, before)
    # Node names do not show all that torch.func differentiates wrongly.
    plain, call = attempt.plain, attempt.call._replace(replaced=True)
    if plain is not None and plain.create_graph:
        call = call.with_inputs(plain.inputs)
    attempt.outcome.runs += 1
    with WrappedAttributes(attempt.function.modules):
        compute = functools.partial(_compute_row, call)
        result = vmap.in_result_type(call, vmap.by_vmap(call, compute))
    if plain is not None and attempt.is_due:
        run = _with_draws_of_vmap(attempt.call, plain, before) if draws else plain
        verify(attempt, run, result, "vmap")
    attempt.outcome.route = Route(mode, attempt.options.chunk_size)
    create_graph = torch.is_grad_enabled() and (plain is None or plain.create_graph)
    return result if create_graph else detached(result)


def _compute_row(call: Call, function: Any, xs: Any, extras: Any) -> Any:
    return call.options.operator.compute_row(call, function, xs, extras, call.options.mode)


def reference(attempt: Attempt, before: RngState) -> bool:
    """Run ``func`` plainly, for what it raises, its sizes, and to verify by.

    Returns:
        Whether it draws random numbers.

    Raises:
        RuntimeError: it does, and must not.
        BatchMixingError: it does, and its rows depend on one another.
    """
    if attempt.plain is not None:
        return attempt.draws
    attempt.start = before
    lazy = has_lazy(attempt.function.modules)
    run = attempt.plain = attempt.read(attempt.run())
    attempt.outcome.sizes = attempt.sizes(run)
    if lazy or same_rng_state(before, rng_state()):
        return False
    attempt.draws = True
    set_rng_state(before)
    attempt.in_func = True
    if attempt.options.randomness == "error":
        raise drew(attempt.options)
    if attempt.is_due:
        check_rows(run, attempt.function.modules)
    attempt.in_func = False
    return True


def _with_draws_of_vmap(call: Call, plain: Run, before: RngState) -> Run:
    """A plain run with the draws of ``torch.vmap``."""
    after = rng_state()
    set_rng_state(before)
    dims = tuple([call.layout.dims[i] for i in call.layout.batched])
    whole = call.with_inputs(plain.inputs)

    def row(*leaves: Any) -> Any:
        one = whole.one_row([x.unsqueeze(d or 0) for x, d in zip(leaves, dims)])
        return tuple([out.squeeze(0) for out in one(one.inputs).leaves])

    rows = torch.vmap(row, dims, 0, randomness=call.options.randomness)
    with torch.enable_grad():
        leaves = list(rows(*[whole.leaves[i] for i in call.layout.batched]))
    set_rng_state(after)
    return plain._replace(output=plain.output._replace(leaves=leaves))


def by_loop(attempt: Attempt) -> Derivatives:
    """One row after the other."""
    before, draws = rng_state(), False
    if attempt.is_due or not attempt.decision.has_run:
        draws = reference(attempt, before)
    plain, call, start = attempt.plain, attempt.call, rng_state()
    graph = torch.is_grad_enabled() and (plain is None or plain.create_graph)
    if plain is not None and graph:
        call = call.with_inputs(plain.inputs)
    result = loop.by_loop(call, functools.partial(_one_row, attempt), create_graph=graph)
    if attempt.options.randomness == "error" and not same_rng_state(start, rng_state()):
        set_rng_state(start)
        raise drew(attempt.options)
    if plain is not None and attempt.is_due and not draws:
        with suppress(torch.linalg.LinAlgError):  # of a singular row, which stops no other
            verify(attempt, plain, result, "loop")
    return result


def _one_row(attempt: Attempt, call: Call) -> Derivatives:
    attempt.outcome.runs += 1
    run, facts = read_graph(run_once(call))
    operator, create_graph = attempt.operator, run.create_graph
    route = operator.route(call, sizes_of(run, facts.widest))._replace(chunk=1)  # without any vmap
    attempt.outcome.route = route
    with torch.set_grad_enabled(create_graph or operator.is_second_order):
        result = operator.compute(run, route)
    if create_graph:
        retire(run)
        return result
    return detached(result)


BY_ENGINE = {"sum": by_sum, "vmap": by_vmap, "loop": by_loop}
