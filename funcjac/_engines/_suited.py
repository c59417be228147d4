"""What suits a function: before any route is tried."""

from collections.abc import Callable
from dataclasses import replace

import torch

from funcjac._batched import Call, transform_behind
from funcjac._engines._record import Record
from funcjac._linear import Context, plain_inputs
from funcjac._mixing import check_rows
from funcjac._modes import Recorder, Route, is_forward_safe
from funcjac._passes import Jacobian
from funcjac._probe import Probe, tolerance
from funcjac._reach import Reach
from funcjac._state import RngState, rng_state, same_rng_state, set_rng_state
from funcjac._structure import FRAGILE
from funcjac._verify import is_noise, mismatch
from funcjac.errors import UnsuitableError, UntraceableError


def is_fragile(call: Call, start: RngState, context: Context) -> bool:
    """Whether higher derivatives are taken of an operation that has wrong ones, or none."""
    inner = transform_behind(call.func)
    if not (context.graph or inner or call.options.operator.reference):
        return False
    with Recorder() as recorder, torch.enable_grad():
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
    return all(_alike(one, other) for one, other in zip(*runs))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    limit = tolerance([one.dtype], one.device)
    size = one.double().nan_to_num(0, 0, 0).abs().max().item() if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), limit, limit * size, equal_nan=True)


def forward_safe(call: Call) -> bool:
    """Whether the forward formulas of all that ``func`` runs may be differentiated again."""
    with Recorder() as recorder, torch.no_grad():
        call._replace(clone=True)(call.inputs)
    return is_forward_safe(recorder.names)


def dtypes_within(call: Call) -> tuple[torch.dtype, ...]:
    """The floating dtypes that ``func`` computes in."""
    with Recorder() as recorder, torch.enable_grad():
        call._replace(clone=True)(plain_inputs(call, Context()))
    return tuple(recorder.dtypes)


def unsuitable(call: Call, reached: Reach, record: Record, route: Route) -> Exception | None:
    """Why a route is not even tried, ``None`` if it is."""
    words = ""
    if route.engine == "sum" and None in call.layout.diff_dims:
        words = "the sum trick has no per-sample derivative of an argument that rows share"
    elif route.engine == "sum" and record.random and call.options.randomness == "same":
        words = "the sum trick cannot give all rows the same draw"
    elif reached.scripted and route.mode == "taylor":
        return UntraceableError("what TorchScript runs cannot be recorded")
    elif reached.scripted and route.is_functional:
        words = "torch.func differentiates TorchScript wrongly from its second call on"
    return UnsuitableError(words) if words else None


def confirm(
    call: Call, reached: Reach, found: Probe, result: Jacobian, put_back: Callable[[], None]
) -> tuple[str | None, Probe]:
    """What is wrong with a result, beyond rounding; ``None`` if nothing is. And what to go on with.

    Raises:
        BatchMixingError: rows depend on one another.
    """
    problem = mismatch(found, result)
    if problem is None:
        return None, found
    put_back()  # func may compute in another dtype than it is given
    found = replace(found, within=dtypes_within(call))
    problem = mismatch(found, result)
    put_back()
    if problem is None:
        return None, found
    check_rows(call, reached)
    return None if is_noise(found, result, put_back) else problem, found
