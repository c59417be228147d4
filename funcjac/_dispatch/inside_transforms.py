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
from torch import Tensor, nn

from funcjac._arguments.call import Call
from funcjac._dispatch.choose_engine_mode_chunk import engines_of, sizes_of
from funcjac._dispatch.decisions import Decision, FunctionKey, decision_of, make_key
from funcjac._dispatch.messages import check_not_exporting, failure, refused
from funcjac._engines import run_func
from funcjac._engines.loop import by_loop
from funcjac._engines.run_func import Derivatives, Run
from funcjac._engines.vmap import by_vmap
from funcjac._environment import state
from funcjac._environment.torch_private import CONTROL_FLOW, has_levels, is_traced, sees_values
from funcjac._verification.forward_formulas import check_forward_formulas
from funcjac._verification.verify_result import problem_of
from funcjac.errors import BatchMixingError, VerificationError

# What earlier calls of a key have shown, and the modules of its function; None where nothing is
# verified.
Known = tuple[Decision, list[nn.Module]] | None


def solve_inside(call: Call, token: Any) -> Derivatives:
    """The derivatives of ``call``, which outer transforms may differentiate again."""
    call.options.operator.check_inputs(call)
    traced = is_traced()
    check_not_exporting(call.options)
    if traced and not has_levels(dual=True) and engines_of(call)[0][0] != "vmap":
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
    known: Known = None
    if has_values and call.batch > 1 and call.options.check is not False:
        known = decision_of(make_key((token, "inside"), function, call)), function.modules
        known[0].calls += 1
    if "sum" in engines_of(call)[0] and (has_values or engine == "sum" or call.batch == 1):
        try:
            return _through_graph(call, known)
        except (BatchMixingError, *CONTROL_FLOW):
            raise
        except Exception:
            if engine == "sum":
                raise
    with state.without_wrapped(function.modules):
        result = _by_rows(call)  # which raises what func itself raises
        is_due = known is not None and known[0].is_due(call.options.check, call.batch)
        if is_due and state.same_rng_state(start, state.rng_state()):
            buffers = state.buffers_in_training(function.modules)
            try:
                _through_graph(call, known, lambda _: result)
            finally:
                state.put_back(buffers)
    return result


def _row_compute(call: Call) -> Any:
    mode, operator = call.options.mode, call.options.operator
    if call.options.engine != "vmap":  # torch's own functions are for whoever asks for them
        mode = mode.replace("fwd", "transposed").replace("rev", "pulled")
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
    return _through_graph(call._replace(options=options), None)


def _by_rule(run: Run) -> Derivatives:
    operator = run.call.options.operator
    widest = max([x.numel() for x in (*run.inputs, *run.output.leaves)], default=1)
    return operator.compute(run, operator.route(run.call, sizes_of(run, widest)))


def _through_graph(
    call: Call, known: Known, compute: Callable[[Run], Derivatives] = _by_rule
) -> Derivatives:
    """Derivatives through the graph of one run at a level of torch.func of its own."""
    rest: list[Any] = []

    def primal(*inputs: Tensor) -> Any:
        output = call([x.clone() for x in inputs])  # func may write into its input
        run = Run(call, list(inputs), output, create_graph=True)
        call.options.operator.check_output(call, output.leaves)
        result = compute(run)
        if known is not None and any(x.numel() for x in inputs):
            _verify(*known, run, result, "sum" if compute is _by_rule else "vmap")
        tensors, others = run_func.split_derivatives(result)
        rest[:] = [others]
        return sum([x.sum() for x in inputs]), tuple(tensors)

    _, _, tensors = torch.func.vjp(primal, *call.inputs, has_aux=True)  # type: ignore[misc]
    return run_func.join_derivatives(rest[0], tensors)


def _verify(
    decision: Decision, modules: list[nn.Module], run: Run, result: Derivatives, engine: str
) -> None:
    """Verify a call that is due, or of a graph that was not verified before."""
    options = run.call.options
    kind = run_func.read_graph(run)[1].signature, engine
    if kind in decision.signatures and not decision.is_due(options.check, run.call.batch):
        return
    failed, decision.failed = decision.failed, True
    problem, compared = problem_of(run._replace(create_graph=False), result, 1, modules, engine)
    if problem is not None:
        raise refused(options, options.engine.replace("auto", engine), problem)
    if not compared:
        decision.calls -= 1  # all was NaN: nothing was seen
        decision.failed = failed
        return
    decision.failed, decision.rows = False, True
    decision.signatures.add(kind)
