"""Inside torch.func transforms and torch.compile: no probes and no clocks.

A batch of one is a row already, so a transform nested in another adds no vmap of its own.
"""

import torch

from funcjac._batched import Call
from funcjac._engines._record import Memory
from funcjac._engines._rows import BY_ENGINE, by_sum, empty
from funcjac._modes import Recorder, Route, is_forward_safe, prefers_forward, sizes_of
from funcjac._passes import Context, Jacobian
from funcjac._reach import reach

_CONTEXT = Context(functional=True, graph=True)


def solve_transformed(call: Call, memory: Memory) -> Jacobian:
    route = _route(call, memory)
    if torch.compiler.is_compiling():
        return BY_ENGINE["vmap"](call, route, _CONTEXT)
    if call.batch == 0:
        return empty(call, _CONTEXT)
    if reach(call.func, memory.codes).scripted:
        raise RuntimeError(
            f"{call.options.name}: expected no TorchScript inside of torch.func transforms, got a "
            "scripted function: torch differentiates it wrongly there from its second call on. "
            "Call the transform outside of torch.func, or use the module before scripting."
        )
    if call.batch == 1:
        return by_sum(call, route, _CONTEXT)
    engine = call.options.engine
    if engine != "auto":
        return BY_ENGINE[engine](call, route, _CONTEXT)
    try:
        return BY_ENGINE["vmap"](call, route, _CONTEXT)
    except Exception:
        # The sum trick cannot be verified here, so it is not tried.
        return BY_ENGINE["loop"](
            call, Route("loop", route.mode, 1, False, route.transposed), _CONTEXT
        )


def _route(call: Call, memory: Memory) -> Route:
    options = call.options
    mode, transposed = options.mode, False
    if mode != "rev":
        outputs, safe = _sizes(call, memory)
        inputs = sizes_of(call.inputs, call.layout.diff_dims)
        if mode == "auto":
            mode = "fwd" if prefers_forward(outputs, inputs) else "rev"
        transposed = mode == "fwd" and not safe
    return Route(options.engine, mode, options.chunk_size, transposed=transposed)


def _sizes(call: Call, memory: Memory) -> tuple[int, bool]:
    """Elements of an output row, and whether forward formulas may be differentiated again."""
    if torch.compiler.is_compiling():
        leaves = call(call.inputs).leaves
        return sum(out.numel() for out in leaves) // call.batch, False
    key = (call.layout.spec, *[getattr(leaf, "shape", None) for leaf in call.leaves])
    found = memory.sizes.get(key)
    if found is None:
        with Recorder() as recorder:
            leaves = call._replace(clone=True)(call.inputs).leaves
        size = sum(out.numel() for out in leaves) // max(call.batch, 1)
        found = memory.sizes[key] = (size, is_forward_safe(recorder.names))
    return found
