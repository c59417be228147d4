"""What suits a function: before any route is tried."""

from collections.abc import Callable
from dataclasses import replace

import torch

from funcjac._batched import Call, transform_behind
from funcjac._engines._record import Record
from funcjac._graph import graph_mismatch
from funcjac._linear import Context, plain_inputs
from funcjac._mixing import check_rows
from funcjac._modes import Recorder, Route
from funcjac._passes import Jacobian
from funcjac._probe import Probe
from funcjac._reach import Reach
from funcjac._state import RngState, rng_state, same_rng_state, set_rng_state
from funcjac._structure import FRAGILE
from funcjac._verify import alike, extras_mismatch, is_noise, mismatch
from funcjac.errors import UnsuitableError, UntraceableError


def is_fragile(call: Call, start: RngState, context: Context) -> bool:
    """Whether higher derivatives are taken of an operation that has wrong ones, or none."""
    inner = transform_behind(call.func)
    if not (context.graph or inner or call.options.operator.reference):
        return False
    with torch.enable_grad(), Recorder() as recorder:
        call._replace(clone=True)(plain_inputs(call, Context()))
    if inner and any(record.composed for record in inner.memory.records.values()):
        return True  # the inner transform runs nothing fragile any more
    return not FRAGILE.isdisjoint(recorder.names) and composes(call, start)


def draws(call: Call, start: RngState) -> bool:
    """Whether ``func`` draws random numbers, and not another thread meanwhile: a second look."""
    set_rng_state(start)
    with torch.enable_grad():
        call._replace(clone=True)(plain_inputs(call, Context()))
    return not same_rng_state(start, rng_state())


def composes(call: Call, start: RngState) -> bool:
    """Whether simpler operations give what those of ``func`` give, at least here."""
    runs = []
    for composed in (False, True):
        set_rng_state(start)
        one = call._replace(clone=True, composed=composed)
        try:
            with torch.enable_grad():
                runs.append([out.detach() for out in one(plain_inputs(one, Context())).leaves])
        except Exception:
            return False  # what func itself raises comes again
    return all(alike(one, other) for one, other in zip(*runs))


def forward_safe(call: Call) -> bool:
    """Whether forward formulas are right for all that ``func`` runs, also differentiated again."""
    with torch.enable_grad(), Recorder() as recorder:
        call._replace(clone=True)(plain_inputs(call, Context()))
    return recorder.is_forward_safe


def dtypes_within(call: Call) -> tuple[torch.dtype, ...]:
    """The floating dtypes that ``func`` computes in."""
    with torch.enable_grad(), Recorder() as recorder:
        call._replace(clone=True)(plain_inputs(call, Context()))
    return tuple(recorder.dtypes)


def unsuitable(call: Call, reached: Reach, record: Record, route: Route) -> Exception | None:
    """Why a route is not even tried, ``None`` if it is."""
    words = ""
    if route.engine == "sum" and None in call.layout.diff_dims:
        words = "the sum trick has no per-sample derivative of an argument that rows share"
    elif route.engine == "sum" and record.random and call.options.randomness == "same":
        words = "the sum trick cannot give all rows the same draw"
    elif record.blocks and route.is_forward_formula:
        words = "forward formulas would differentiate through a no_grad block"
    elif reached.scripted and route.mode == "taylor":
        return UntraceableError("what TorchScript runs cannot be recorded")
    elif reached.scripted and route.is_functional:
        words = "torch.func differentiates TorchScript wrongly from its second call on"
    return UnsuitableError(words) if words else None


def confirm(
    call: Call,
    record: Record,
    reached: Reach,
    found: Probe,
    result: Jacobian,
    put_back: Callable[[], None],
) -> str | None:
    """What is wrong with a result, beyond rounding; ``None`` if nothing is.

    Raises:
        BatchMixingError: rows depend on one another.
    """
    problem = None
    if found.call.func is call.func:
        problem = extras_mismatch(found, result, put_back)
    if problem is None and mismatch(found, result) is not None:
        put_back()  # func may compute in another dtype than it is given
        found = replace(found, within=dtypes_within(call))
        problem = mismatch(found, result)
        put_back()
        if problem is not None:
            check_rows(call, reached)
            problem = None if is_noise(found, result, put_back) else problem
    if problem is None and record.context.graph:
        problem = graph_mismatch(found, result, put_back)
    return problem
