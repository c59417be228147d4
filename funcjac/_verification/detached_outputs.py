"""Outputs that depend on the input in a way that autograd cannot see."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from funcjac._engines.run_func import Run
from funcjac._environment.state import buffers_in_training, put_back, rng_state, set_rng_state
from funcjac.errors import VerificationError


def check_attached(run: Run, modules: Iterable[nn.Module]) -> int:
    """Raise if most of an output without a graph moves with the inputs; return how often it ran."""
    outs, batch = run.output.leaves, run.call.batch
    loose = [i for i, out in enumerate(outs) if out.numel() and not out.requires_grad]
    # A transform has seen to it itself; one row alone cannot tell draws apart.
    if not loose or batch == 1 or hasattr(run.call.func, "__funcjac_key__"):
        return 0
    even = torch.arange(batch, device=run.inputs[0].device) % 2 == 0
    buffers, state, moved = buffers_in_training(modules), rng_state(), []
    for x, dim in zip(run.inputs, run.dims):
        step = torch.finfo(x.dtype).eps ** (1 / 3) * (1 + x.detach().abs())
        if dim is not None:
            step = step * even.view(-1, *[1] * (x.ndim - 1 - dim)).to(x.dtype)
        moved.append(x.detach() + step)
    with torch.no_grad():
        nearby = run.call(moved).leaves
    set_rng_state(state)
    put_back(buffers)
    for i in loose:
        moves = (outs[i] != nearby[i]).double().reshape(batch, -1).mean(1)
        # What changes in the rows that did not move is a draw of func's own.
        draws = None not in run.dims and moves[~even].mean() > 0.5
        if not draws and moves[even].mean() > 0.5:  # comparisons and roundings move few numbers
            raise VerificationError(
                f"{run.call.options.name}: expected autograd to see how func's output depends on "
                "its input, got an output without a graph that moves when the input does. Look for "
                "detach(), .item(), NumPy, torch.tensor(...) or a no_grad block in func; pass "
                "check=False if the derivative is meant to be zero."
            )
    return 1
