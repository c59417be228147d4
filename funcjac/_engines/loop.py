"""The engine ``loop``: one row after the other, by plain autograd; the last resort."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines.run_func import Derivatives, check_aux, join_derivatives, split_derivatives
from funcjac._environment.state import rng_state, set_rng_state


def by_loop(call: Call, compute: Callable[[Call], Derivatives]) -> Derivatives:
    """``compute`` on every row as a batch of one."""
    layout = call.layout
    same = rng_state() if call.options.randomness == "same" else None
    rows: list[list[Tensor] | None] = []
    rest, error = None, None
    for b in range(call.batch):
        if same is not None:
            set_rng_state(same)
        leaves = [call.leaves[i].narrow(layout.dims[i] or 0, b, 1) for i in layout.batched]
        try:
            result = compute(call.one_row(leaves))
        except torch.linalg.LinAlgError as raised:  # a singular row stops no other
            error = raised
            rows.append(None)
            continue
        check_aux(result.output.aux)
        tensors, rest = split_derivatives(result)
        rows.append(tensors)
    like = next((row for row in rows if row is not None), None)
    if like is None:
        assert error is not None
        raise error
    whole = [[torch.full_like(t, torch.nan) for t in like] if r is None else r for r in rows]
    return join_derivatives(rest, [torch.cat(column) for column in zip(*whole)])
