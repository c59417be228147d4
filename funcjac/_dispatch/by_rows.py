"""The engines ``vmap`` and ``loop``: rows apart by construction, held against a plain run."""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

import torch

from funcjac._arguments.call import Call
from funcjac._dispatch.attempt import Attempt, keeps_graph
from funcjac._dispatch.messages import drew
from funcjac._dispatch.rule import Sizes
from funcjac._dispatch.verify import verify
from funcjac._engines import loop, vmap
from funcjac._engines.basis import elements_of_rows, row_sizes
from funcjac._engines.run import (
    Derivatives,
    Route,
    Run,
    attached,
    detached,
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
from funcjac._verification.forward_formulas import check_forward_formulas
from funcjac._verification.rows import check_rows
from funcjac.errors import RefusedError


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
    if attempt.is_due or attempt.decision.outputs is None:
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
    if attempt.is_due or attempt.decision.outputs is None:
        draws = reference(attempt, before)
    plain, call, start = attempt.plain, attempt.call, rng_state()
    graph = torch.is_grad_enabled() and (plain is None or plain.create_graph)
    if plain is not None and graph:
        call = call.with_inputs(plain.inputs)
    attempt.outcome.runs += 1
    result = loop.by_loop(call, functools.partial(_one_row, attempt), create_graph=graph)
    if attempt.options.randomness == "error" and not same_rng_state(start, rng_state()):
        set_rng_state(start)
        raise drew(attempt.options)
    if plain is not None and attempt.is_due and not draws:
        with suppress(torch.linalg.LinAlgError):  # of a singular row, which stops no other
            verify(attempt, plain, result, "loop")
    return result


def _one_row(attempt: Attempt, call: Call) -> Derivatives:
    run = run_once(call)
    facts = read_graph(attached(run.output), run.inputs)
    create_graph = keeps_graph(facts, call)
    run = run._replace(create_graph=create_graph)
    inputs = sum(row_sizes(run.inputs, run.dims))
    outputs = elements_of_rows(run.output.leaves)
    sizes = Sizes(1, outputs, inputs, facts.widest, create_graph, True)
    operator = attempt.operator
    route = operator.route(call, sizes)._replace(chunk=1)  # whatever vmap cannot do
    attempt.outcome.route = route
    with torch.set_grad_enabled(create_graph or operator.is_second_order):
        result = operator.compute(run, route)
    if create_graph:
        retire(run)
        return result
    return detached(result)
