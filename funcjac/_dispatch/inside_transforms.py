"""Inside torch.func transforms and torch.compile.

Under levels of differentiation alone, values can be looked at: there the sum trick runs on one
run of ``func`` and is verified as in plain code. Under a level of ``torch.vmap``, and while a
compiler traces, rows are kept apart by ``torch.vmap`` itself, and one by one where that fails.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._dispatch.choose_engine_mode_chunk import engines_of, sizes_of
from funcjac._dispatch.decisions import FunctionKey, decision_of, make_key
from funcjac._dispatch.messages import failure
from funcjac._engines.loop import by_loop
from funcjac._engines.run_func import (
    Derivatives,
    Run,
    join_derivatives,
    split_derivatives,
)
from funcjac._engines.vmap import by_vmap
from funcjac._environment.state import rng_state, set_rng_state, without_wrapped
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
        state = rng_state()
        call._replace(clone=True)(call.inputs)  # raises what func itself raises
        set_rng_state(state)
        raise failure(call.options, [("", error)], None) from error


def _at_levels(call: Call, token: Any, function: FunctionKey) -> Derivatives:
    """By the sum trick, verified where values can be looked at; otherwise with rows apart."""
    options, batch = call.options, call.batch
    has_values = sees_values()
    if "sum" in engines_of(call)[0] and (has_values or options.engine == "sum" or batch == 1):
        decision = decision_of(make_key((token, "inside"), function, call))
        decision.calls += 1
        is_due = has_values and batch != 1 and decision.is_due(options.check, batch)
        try:
            result, problem = _through_graph(call, function if is_due else None)
        except (BatchMixingError, *CONTROL_FLOW):
            raise
        except Exception:
            if options.engine == "sum":
                raise
        else:
            if problem is None:
                decision.rows |= is_due
                return result
            if options.engine == "sum":
                message = f"{options.name}: sum was verified and refused: {problem}."
                raise VerificationError(message)
    with without_wrapped(function.modules):
        return _by_rows(call)  # which raises what func itself raises


def _row_compute(call: Call) -> Any:
    mode = call.options.mode
    if call.options.engine != "vmap":  # forward formulas are for whoever asks for them
        mode = mode.replace("fwd", "transposed")

    def compute(function: Any, xs: Any, extras: Any) -> Any:
        return call.options.operator.compute_row(call, function, xs, extras, mode)

    return compute


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


def _through_graph(call: Call, verify: FunctionKey | None) -> tuple[Derivatives, str | None]:
    """Derivatives through the graph of one run at a level of torch.func of its own."""
    rest: list[Any] = []

    def primal(*inputs: Tensor) -> Any:
        output = call([x.clone() for x in inputs])  # func may write into its input
        run = Run(call, list(inputs), output, create_graph=True)
        result, problem = _computed(run, verify)
        tensors, others = split_derivatives(result)
        rest[:] = [others, problem]
        return sum([x.sum() for x in inputs]), tuple(tensors)

    _, _, tensors = torch.func.vjp(primal, *call.inputs, has_aux=True)  # type: ignore[misc]
    others, problem = rest
    return join_derivatives(others, tensors), problem


def _computed(run: Run, verify: FunctionKey | None) -> tuple[Derivatives, str | None]:
    operator, outs = run.call.options.operator, run.output.leaves
    operator.check_output(run.call, outs)
    widest = max([x.numel() for x in (*run.inputs, *outs)], default=1)
    route = operator.route(run.call, sizes_of(run, widest))
    result = operator.compute(run, route)
    if verify is None or not run.call.batch or not any(x.numel() for x in run.inputs):
        return result, None
    problem, _ = problem_of(run._replace(create_graph=False), result, 1, verify.modules)
    return result, problem
