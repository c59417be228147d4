"""Inside torch.func transforms and torch.compile: no probes and no clocks.

A batch of one is a row already, so a transform nested in another adds no vmap of its own.
"""

from dataclasses import replace

import torch

from funcjac._batched import Call
from funcjac._engines._record import Memory, remember, signature
from funcjac._engines._rows import BY_ENGINE, by_sum
from funcjac._linear import Context
from funcjac._modes import Recorder, Route, sizes_of
from funcjac._native import CONTROL_FLOW, is_transformed, outside_transforms
from funcjac._passes import Jacobian
from funcjac._reach import Reach, reach
from funcjac._state import guard, rng_state, same_values, set_rng_state

_CONTEXT = Context(functional=True, graph=True)


def solve_transformed(call: Call, memory: Memory) -> Jacobian:
    """The Jacobian of ``call`` by torch.func alone; nobody looks at values here."""
    call = call._replace(composed=True)  # results may be differentiated again
    if torch.compiler.is_compiling():
        # What runs is not known yet, so nothing is known of its forward formulas.
        mode = _compiled_mode(call)
        route = Route("vmap", mode, call.options.chunk_size, transposed=True)
        return BY_ENGINE["vmap"](call, route, _CONTEXT)
    reached = reach(call.reachable, memory.known)
    if reached.scripted:
        raise RuntimeError(
            f"{call.options.name}: expected no TorchScript inside of torch.func transforms, got a "
            "scripted function: torch differentiates it wrongly there from its second call on. "
            "Call the transform outside of torch.func, or use the module before scripting."
        )
    state = guard(reached, values=False)
    with _Buffers(reached):
        try:
            if call.batch == 0:
                return by_sum(call, Route("sum", "empty"), _CONTEXT)
            return _solve(call, _route(call, memory, reached))
        finally:
            state.restore()


def solve_within(call: Call, memory: Memory) -> Jacobian:
    """The Jacobian of ``call`` as one level of a transform that keeps rows apart itself.

    Whatever the outer engine, this level is the sum trick: on a batch of one, or on a batch
    whose rows the outer transform has proved to be independent.
    """
    functional = is_transformed()
    call = call._replace(direct=True)  # simpler operations run where the outer transform says so
    if torch.compiler.is_compiling():
        return by_sum(call, Route("sum", _compiled_mode(call), transposed=True), _CONTEXT)
    reached = reach(call.reachable, memory.known)
    taylor = None if functional else _by_taylor(call)
    if taylor is not None:
        return taylor
    route = _route(call, memory, reached, functional=functional)
    if call.simply:
        route = replace(route, chunk=1, vectorized=False)
    engine = call.options.engine
    if engine == "auto":
        alike = None not in call.layout.diff_dims and call.options.randomness != "same"
        engine = "sum" if alike else "vmap"
    if call.batch == 1 or 0 in (call.batch, *[x.numel() for x in call.inputs]):
        engine = "sum"
    return BY_ENGINE[engine](call, route, _CONTEXT._replace(functional=functional))


def _compiled_mode(call: Call) -> str:
    """What will run is not known to be safe in forward mode, and cannot be looked at."""
    options = call.options
    unknown = options.mode in ("auto", "taylor")
    return options.operator.within((0, 0), False) if unknown else options.mode


def _by_taylor(call: Call) -> Jacobian | None:
    """Taylor propagation, where the operator has it and nothing stands against it."""
    options = call.options
    has = "taylor" in options.operator.modes and options.mode in ("auto", "taylor")
    if not has or options.engine not in ("auto", "sum") or None in call.layout.diff_dims:
        return None
    try:
        return by_sum(call, Route("sum", "taylor", options.chunk_size), Context(graph=True))
    except CONTROL_FLOW:
        raise
    except Exception:
        return None  # an error of func's own comes again


def _solve(call: Call, route: Route) -> Jacobian:
    try:
        return _by_rows(call._replace(direct=True), route)
    except RuntimeError as error:
        if "leaf Variable" not in str(error):
            raise
        return _by_rows(call._replace(direct=True, clone=True), route)  # func works in place


def _by_rows(call: Call, route: Route) -> Jacobian:
    if call.batch == 1:
        return by_sum(call, route, _CONTEXT)
    if call.options.engine != "auto":
        return BY_ENGINE[call.options.engine](call, route, _CONTEXT)
    try:
        return BY_ENGINE["vmap"](call, route, _CONTEXT)
    except CONTROL_FLOW:
        raise
    except Exception:
        # The sum trick cannot be verified here, so it is not tried.
        route = Route("loop", route.mode, 1, vectorized=False)
        return BY_ENGINE["loop"](call, route, _CONTEXT)


def _route(call: Call, memory: Memory, reached: Reach, *, functional: bool = True) -> Route:
    """Forward mode only by formulas that may be differentiated again, which they will be."""
    options = call.options
    mode, transposed = options.mode, False
    if mode == "taylor":
        mode = "auto"  # operations cannot be recorded inside of torch.func
    if mode == "auto" or "fwd" in mode:
        outputs, safe = _sizes(call, memory, reached)
        known = not reached.custom and not reached.scripted
        inputs = sizes_of(call.inputs, call.layout.diff_dims)
        if mode == "auto":
            mode = options.operator.within((outputs, inputs), safe and known)
        elif not (safe and known) and functional:
            raise RuntimeError(
                f"{options.name}: expected func to have forward formulas that may be "
                f"differentiated again with mode={mode!r} inside of a torch.func transform, got an "
                "operation of which torch's are wrong or unknown (layer norm, batch norm, det, "
                "slogdet, solve, a custom autograd.Function, a no_grad block). Use a reverse mode, "
                'or "auto".'
            )
        transposed = "fwd" in mode and not functional
    return Route(options.engine, mode, options.chunk_size, transposed=transposed)


def _sizes(call: Call, memory: Memory, reached: Reach) -> tuple[int, bool]:
    """Elements of an output row, and whether forward formulas are right."""
    key = signature(call, reached, graph=True)
    found = memory.sizes.get(key)
    if found is None:
        rng = rng_state()
        with torch.enable_grad(), Recorder() as recorder:
            leaves = call._replace(clone=True)(call.inputs).leaves
        set_rng_state(rng)
        size = sum(out.numel() for out in leaves) // max(call.batch, 1)
        found = size, recorder.is_forward_safe
        remember(memory.sizes, key, found)
    return found


class _Buffers:
    """Puts buffers back that a module in training mode moves as it runs."""

    def __init__(self, reached: Reach) -> None:
        self.buffers = [
            buffer
            for module in reached.modules.values()
            if module.training
            for buffer in module._buffers.values()
            if buffer is not None
        ]

    def __enter__(self) -> None:
        if self.buffers:
            with outside_transforms():
                self.values = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *_: object) -> None:
        if not self.buffers:
            return
        with outside_transforms(), torch.no_grad():
            for buffer, value in zip(self.buffers, self.values):
                if not same_values(buffer, value):  # a new version would break graphs
                    buffer.copy_(value)
