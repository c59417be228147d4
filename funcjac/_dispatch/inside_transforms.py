"""Inside torch.func transforms and torch.compile.

Under levels of differentiation alone, values can be looked at: there the sum trick runs on one
run of ``func`` and is verified as in plain code. Under a level of ``torch.vmap``, and while a
compiler traces, rows are kept apart by ``torch.vmap`` itself, and one by one where that fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._dispatch.choose_engine_mode_chunk import engines_of, sizes_of
from funcjac._dispatch.decisions import Decision, FunctionKey, decision_of, make_key
from funcjac._dispatch.messages import failure, refused
from funcjac._engines.loop import by_loop
from funcjac._engines.run_func import Derivatives, Run, join_derivatives, split_derivatives
from funcjac._engines.vmap import by_vmap
from funcjac._environment import state
from funcjac._environment.torch_private import CONTROL_FLOW, has_levels, is_traced, sees_values
from funcjac._verification.forward_formulas import check_forward_formulas
from funcjac._verification.verify_result import problem_of
from funcjac.errors import BatchMixingError, VerificationError


def solve_inside(call: Call, token: Any) -> Derivatives:
    """The derivatives of ``call``, which outer transforms may differentiate again."""
    call.options.operator.check_inputs(call)
    traced = is_traced()
    if traced and not has_levels() and engines_of(call)[0][0] != "vmap":
        from funcjac._dispatch.compiled import solve_traced  # noqa: PLC0415  it loads Dynamo

        return solve_traced(call)
    call = call._replace(replaced=True)
    if traced:
        return by_vmap(call, _row_compute(call))
    function = FunctionKey(call.func)
    if function.scripted:
        raise RuntimeError(
            f"{call.options.name}: expected no TorchScript inside of torch.func transforms, got a "
            "scripted function: torch differentiates it wrongly there from its second call on. "
            "Call the transform outside of torch.func, or use the module before scripting."
        )
    try:
        return _at_levels(call, token, function)
    except (BatchMixingError, VerificationError, torch.linalg.LinAlgError, *CONTROL_FLOW):
        raise
    except Exception as error:
        if str(error).startswith(f"{call.options.name}: "):  # refused by the library itself
            raise
        start = state.rng_state()
        call._replace(clone=True)(call.inputs)  # raises what func itself raises
        state.set_rng_state(start)
        raise failure(call.options, [("", error)], None) from error


def _at_levels(call: Call, token: Any, function: FunctionKey) -> Derivatives:
    """By the sum trick, or with rows apart; verified where values can be looked at."""
    engine, has_values, start = call.options.engine, sees_values(), state.rng_state()
    decision, verify = Decision(), None
    if has_values and call.batch > 1:
        decision = decision_of(make_key((token, "inside"), function, call))
        decision.calls += 1
        verify = function if decision.is_due(call.options.check, call.batch) else None
    if "sum" in engines_of(call)[0] and (has_values or engine == "sum" or call.batch == 1):
        try:
            result, problem = _through_graph(call, verify)
            if problem is not None:
                raise refused(call.options, "sum", problem)
        except (BatchMixingError, *CONTROL_FLOW):
            raise
        except Exception:
            if engine == "sum":
                raise
        else:
            decision.rows |= verify is not None
            return result
    with state.without_wrapped(function.modules):
        result = _by_rows(call)  # which raises what func itself raises
        if verify is None or not state.same_rng_state(start, state.rng_state()):
            return result
        buffers = state.buffers_in_training(function.modules)
        try:
            _, problem = _through_graph(call, verify, lambda _: result)
        finally:
            state.put_back(buffers)
    if problem is not None:
        raise refused(call.options, engine.replace("auto", "vmap"), problem)
    decision.rows = True
    return result


def _row_compute(call: Call) -> Any:
    mode, operator = call.options.mode, call.options.operator
    if call.options.engine != "vmap":  # forward formulas are for whoever asks for them
        mode = mode.replace("fwd", "transposed")
    return lambda *row: operator.compute_row(call, *row, mode)


def _by_rows(call: Call) -> Derivatives:
    if call.options.engine == "vmap" and "fwd" in call.options.mode:
        check_forward_formulas(call, again=True)
    if call.options.engine != "loop":
        try:
            return by_vmap(call, _row_compute(call))
        except CONTROL_FLOW:
            raise
        except Exception:
            if call.options.engine == "vmap":
                raise
    return by_loop(call, _one_row)


def _one_row(call: Call) -> Derivatives:
    """One basis vector at a time, whatever ``torch.vmap`` cannot do."""
    options = replace(call.options, chunk_size=call.options.chunk_size or 1)
    return _through_graph(call._replace(options=options), None)[0]


def _by_rule(run: Run) -> Derivatives:
    operator = run.call.options.operator
    widest = max([x.numel() for x in (*run.inputs, *run.output.leaves)], default=1)
    return operator.compute(run, operator.route(run.call, sizes_of(run, widest)))


def _through_graph(
    call: Call, verify: FunctionKey | None, compute: Callable[[Run], Derivatives] = _by_rule
) -> tuple[Derivatives, str | None]:
    """Derivatives through the graph of one run at a level of torch.func of its own."""
    rest: list[Any] = []

    def primal(*inputs: Tensor) -> Any:
        output, problem = call([x.clone() for x in inputs]), None  # func may write into its input
        run = Run(call, list(inputs), output, create_graph=True)
        call.options.operator.check_output(call, output.leaves)
        result = compute(run)
        if verify is not None and any(x.numel() for x in inputs):
            run, engine = run._replace(create_graph=False), "sum" if compute is _by_rule else "vmap"
            problem, _ = problem_of(run, result, 1, verify.modules, engine)
        tensors, others = split_derivatives(result)
        rest[:] = [others, problem]
        return sum([x.sum() for x in inputs]), tuple(tensors)

    _, _, tensors = torch.func.vjp(primal, *call.inputs, has_aux=True)  # type: ignore[misc]
    return join_derivatives(rest[0], tensors), rest[1]
