"""Torch's forward formulas, which ``engine="vmap", mode="fwd"`` asks for: refused if wrong."""

from __future__ import annotations

import torch

from funcjac._arguments.call import Call
from funcjac._environment.state import rng_state, set_rng_state
from funcjac._environment.torch_private import EagerMode, with_memory
from funcjac._torch_faults.replace import UseReplacements, forward_faults


class _Names(EagerMode):
    """Collects the names of the operations that run, with and without overload."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.names |= {name, f"{name}.{func._overloadname}"}
        return func(*with_memory(args), **with_memory(kwargs or {}))


def check_forward_formulas(call: Call, *, again: bool) -> None:
    """Raise if ``func``, run once more, has a wrong forward formula that nothing replaces."""
    state, recorder = rng_state(), _Names()
    with torch.enable_grad(), UseReplacements(), recorder:
        call._replace(clone=True, replaced=False)(call.inputs)
    set_rng_state(state)
    wrong = sorted(forward_faults(recorder.names, again=again))
    if wrong:
        raise RuntimeError(
            f"{call.options.name}: expected func to have forward formulas that are right with "
            f"mode={call.options.mode!r} and engine='vmap', got {', '.join(wrong)}, of which "
            "torch's are wrong. Use a reverse mode, or engine='sum', whose forward mode is the "
            "transpose of a vector-Jacobian product."
        )
