"""Transforms that a compiler traces: torch.compile, ``make_fx``, torch.export.

Dynamo traces ``func`` into the graph around it, with all that ``func`` closes over. What
differentiates it is Python that Dynamo does not look into (``nonstrict_trace``): it runs on the
tensors of whatever executes or traces that graph, which have an autograd graph, and so becomes
plain operations of it. Imported where a compiler is at work: it loads Dynamo.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

from funcjac._arguments.call import Call, Output
from funcjac._arguments.layout import Layout, Options, as_constants
from funcjac._dispatch.attempt import lean, plainly
from funcjac._dispatch.choose_engine_mode_chunk import Sizes, chunk, routes_of, sizes_of
from funcjac._dispatch.messages import check_not_exporting
from funcjac._engines import run_func
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._environment.torch_private import (
    assert_async,
    batching_rules,
    bypassing_wrapper,
    is_traced,
    nonstrict_trace,
)
from funcjac._taylor.recorder import Recorder
from funcjac._taylor.rules import make_recording
from funcjac._torch_faults.replace import UseReplacements
from funcjac._verification.reference_vjp import vjp
from funcjac.errors import UntraceableError, brief

_MARK = "_funcjac_mark"
# More directions than there are.
_ALL = 2**30
# Pairs of directions for each direction, up to which all of them are held at once.
_PAIRED = 7
# What Dynamo makes of a custom autograd.Function: it forgets how the backward pass depends on x.
_CUSTOM = "ApplyTemplateBackward"
_RECORDED = bypassing_wrapper()


def solve_traced(call: Call) -> Derivatives:
    """The derivatives of ``call``, as operations of the graph that is being traced.

    Nothing is verified: there are no values to look at.
    """
    graph = torch.is_grad_enabled()
    inputs = list(_enter(graph, *call.inputs))

    def run(*inputs: Tensor) -> Output:
        with UseReplacements():
            return call([x.clone() for x in inputs])  # func may write into them

    # Dynamo lets what it passes through a wrapper push a mode only where there is one: an idle one.
    with torch.enable_grad(), BaseTorchFunctionMode():
        mode, modes = call.options.mode, call.options.operator.modes
        if _RECORDED is not None and "taylor" in modes and mode in ("auto", "taylor"):
            output = _RECORDED(_under_recorder, run, *inputs)
        else:
            output = run(*inputs)
    call.options.operator.check_output(call, output.leaves)
    aux, kept = run_func.split_tensors(output.aux)
    weighs = [x for x in (*call.inputs, *call.extras) if x.requires_grad]
    blocks, outs, aux = _derivatives(call, (graph, len(weighs) > 0), inputs, output.leaves, aux)
    return Derivatives(blocks, Output(outs, output.spec, run_func.join_tensors(kept, aux)))


def solve_existing(call: Call, output: Output, *, graph: bool) -> Derivatives:
    """The derivatives of tensors that exist in the graph that is being traced."""
    check_not_exporting(call.options)
    blocks, outs, _ = _derivatives(call, (graph, True), call.inputs, output.leaves, [])
    return Derivatives(blocks, output._replace(leaves=outs))


class _Failure:
    """Why ``_leave`` failed last, which Dynamo hides; it traces one function at a time."""

    text = ""


def _derivatives(
    call: Call, graph: tuple[bool, bool], inputs: Any, outs: list[Tensor], aux: list[Tensor]
) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
    """Blocks of each output, the outputs and the aux, by ``_leave``, which takes no tree."""
    request = _as_request(call, graph, len(inputs), len(outs))
    results = list(_leave(request, call.batch, *inputs, *call.extras, *outs, *aux))
    if not results:
        raise RuntimeError(_Failure.text)
    end = len(results) - len(outs) - len(aux)
    width = end // len(outs)
    rows = [results[i : i + width] for i in range(0, end, width)]
    return rows, results[end : end + len(outs)], results[end + len(outs) :]


# --- what Dynamo passes on: a string -----------------------------------------------------------


def _as_request(call: Call, graph: tuple[bool, bool], inputs: int, outs: int) -> str:
    """What ``_leave`` reads of a call, in one constant: Dynamo traces each leaf of a tree."""
    options, operator = call.options, call.options.operator
    kind = type(operator)
    dims = (*call.layout.diff_dims, *call.layout.dims[len(call.leaves) - call.extra :])
    keywords = options.name, options.mode, options.engine, options.chunk_size
    flags = options.return_value, *graph, options.check is True
    class_of = kind.__module__, kind.__name__, operator.as_numbers()
    return repr(as_constants((keywords, flags, (dims, inputs, outs), class_of)))


def _as_call(request: Any, batch: Any, leaves: list[Tensor]) -> Call:
    (name, mode, engine, chunk), (value, *_), (every, count, _), (module, kind, numbers) = request
    operator = getattr(sys.modules[module], kind).from_numbers(numbers)
    keywords: Any = {"mode": mode, "engine": engine, "chunk_size": chunk}
    options = Options(name, return_value=value, operator=operator, **keywords)
    diff, batched = range(count), [i for i, dim in enumerate(every) if dim is not None]
    layout: Any = Layout(None, every, tuple(batched), tuple(diff), None, True, every[:count])
    return Call(_as_call, options, layout, leaves, {}, batch, extra=len(leaves) - count)


# --- what Dynamo does not look into ------------------------------------------------------------


class _Mark:
    """What the inputs of one call share: the recorder of what was computed from them."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None


@nonstrict_trace
def _enter(graph: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Inputs to differentiate by: copies in the caller's graph, or leaves of their own."""
    if torch.is_inference_mode_enabled() and not is_traced():  # but run as it is: no graph is made
        raise RuntimeError("backend 'eager' expected torch.no_grad, got torch.inference_mode")
    mark, entered = _Mark(), []
    for j, x in enumerate(inputs):
        copy = x.clone() if graph and x.requires_grad else x.detach().requires_grad_()
        vars(copy)[_MARK] = (mark, j)
        entered.append(copy)
    return tuple(entered)


def _under_recorder(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with its operations recorded; its inputs are the first that it touches."""

    def recorded(*args: Any) -> Any:
        marked: list[Any] = [
            (*vars(x)[_MARK], x) for x in args if isinstance(x, Tensor) and _MARK in vars(x)
        ]
        mark = marked[0][0]
        own = sorted((j, x) for its, j, x in marked if its is mark)
        recorder = Recorder([x for _, x in own])
        # Here, as Dynamo takes modes off the stack for what it passes through a wrapper.
        with torch.enable_grad(), recorder:
            out = run(*args)
        mark.recorder = recorder
        return out

    return recorded


@nonstrict_trace
def _leave(request: str, batch: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """From inputs, extras, outputs and aux: blocks, outputs and aux, or nothing for a failure."""
    parts = ast.literal_eval(request)
    _, (_, graph, weighs, check), (every, _, count), _ = parts
    call = _as_call(parts, batch, list(tensors[: len(every)]))
    inputs, outs = call.inputs, list(tensors[len(every) :][:count])
    aux = tensors[len(every) + count :]
    mark: _Mark = vars(inputs[0]).get(_MARK, (_Mark(), 0))[0]
    recorder, mark.recorder = mark.recorder, None  # which would keep the run alive
    output = Output(outs, None, list(aux))
    create_graph = graph and (weighs or _has_leaves(run_func.attached(output), inputs))
    run = Run(call, inputs, output, create_graph, recorder)
    # No more passes than memory asks for: each is written into the graph.
    widest = run_func.Facts(0, run_func.graph_nodes(outs, inputs)).widest
    sizes = sizes_of(run, widest)._replace(create_graph=True, on_cpu=False)
    ready = run if _MARK in vars(inputs[0]) else _of_existing(run)
    result = ready if isinstance(ready, Exception) else _first_that_works(ready, sizes)
    if isinstance(result, Exception):
        if not hasattr(outs[0], "fake_mode"):  # Dynamo is done
            raise result
        _Failure.text = (
            f"{call.options.name}: cannot differentiate func in compiled code: {brief(result)}. "
            "Call it outside of torch.compile, or pass another mode."
        )
        return ()
    if check:
        _assert_rows(run)
    if not create_graph:
        result = run_func.detached(result)
    elif _MARK in vars(inputs[0]):
        run_func.retire(run)
    return tuple(run_func.split_derivatives(result)[0])


def _of_existing(run: Run) -> Run | Exception:
    """The run that made tensors, or why they cannot be differentiated."""
    for out in run.output.leaves:
        grads = vjp([out], run.inputs, [out], create_graph=False) if out.requires_grad else [out]
        if all(grad is None for grad in grads):
            return RuntimeError("an output was not computed from inputs where it is compiled")
    try:
        return plainly(run, run_func.graph_nodes(run.output.leaves, run.inputs))
    except RuntimeError as error:
        return error


def _assert_rows(run: Run) -> None:
    """Write into the graph that rows are apart: another weight in each row weighs its gradient.

    Costs two vector-Jacobian products in every call.
    """
    outs, batch = run.output.leaves, run.call.batch
    # No draws: the random state is the user's.
    weights = 1.5 + torch.cos(1.7 * torch.arange(batch, device=outs[0].device))
    seeds = [torch.arange(y.numel(), device=y.device).cos().to(y.dtype).view_as(y) for y in outs]
    weighed = [seed * weights.to(seed.dtype).view(-1, *[1] * (seed.ndim - 1)) for seed in seeds]
    plain, other = (vjp(outs, run.inputs, s, create_graph=False) for s in (seeds, weighed))
    words = f"{run.call.options.name}: expected rows of the output to depend on their own rows "
    for one, two, dim in zip(plain, other, run.dims):
        if one is None or two is None or dim is None or not one.numel():
            continue
        rows, weighed_rows = (g.detach().movedim(dim, 0).reshape(batch, -1) for g in (one, two))
        expected = rows * weights.to(rows.dtype).unsqueeze(1)
        size, eps = expected.abs().nan_to_num(0, 0, 0), torch.finfo(rows.dtype).eps
        limit = eps**0.5 * size.amax(1, keepdim=True) + 64 * eps * size.amax()
        apart = ((weighed_rows - expected).abs() <= limit) | ~expected.isfinite()
        assert_async(apart.all(), words + "alone. Call check_batched(func, ...) on this input.")


def _has_leaves(outs: Sequence[Tensor], inputs: list[Tensor]) -> bool:
    """Whether something else requires grad; AOTAutograd hides its inputs behind error nodes."""
    if any(node.name() == "torch::autograd::Error" for node in run_func.graph_nodes(outs, inputs)):
        return True
    return any(all(leaf is not x for x in inputs) for leaf in run_func.graph_leaves(outs, inputs))


def _first_that_works(run: Run, sizes: Sizes) -> Derivatives | Exception:
    error: Exception | None = None
    options, operator = run.call.options, run.call.options.operator
    again = run.create_graph or operator.is_second_order
    if any(n.name() == _CUSTOM for n in run_func.graph_nodes(run.output.leaves, run.inputs)):
        if again or options.mode == "fwd":  # which differentiates a reverse pass
            return RuntimeError("Dynamo takes second derivatives of an autograd.Function wrongly")
        options = replace(options, mode="rev")
        run = run._replace(call=run.call._replace(options=options))
    firsts = operator.count(run.call, sizes.outputs, sizes.inputs)[0]
    chunk_size = options.chunk_size or chunk(firsts, sizes) or _ALL
    routes = routes_of(run, sizes, chunk_size)
    # A compiler drops the pass that is transposed. Reverse mode takes no more behind a last layer.
    may = options.mode == "auto" and "fwd" in operator.modes and sizes.outputs > sizes.inputs
    forward = may and run_func.hint(sizes.widest) > run_func.hint(sizes.batch * sizes.outputs)
    if forward or _goes_by_adjoints(run, sizes.outputs, sizes.inputs):
        routes = itertools.chain([Route("fwd" if forward else "taylor", chunk_size)], routes)
    for route in routes:
        try:
            with torch.set_grad_enabled(again), batching_rules():
                return operator.compute(run, route)
        except Exception as failure:  # noqa: PERF203  traced once
            error = error or lean(failure)
    assert error is not None
    return error


def _goes_by_adjoints(run: Run, outputs: int, inputs: int) -> bool:
    """Whether Taylor propagation takes fewer operations than nested passes by its adjoints."""
    options, operator, outs = run.call.options, run.call.options.operator, run.output.leaves
    if run.recorder is None or options.mode != "auto" or options.chunk_size is not None:
        return False
    firsts, seconds, _ = operator.count(run.call, outputs, inputs)
    if operator.highest != 2 or seconds > _PAIRED * firsts:
        return False
    try:
        return make_recording(run.recorder, outs, create_graph=run.create_graph).keeps_rows()
    except UntraceableError:
        return False
