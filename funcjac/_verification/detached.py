"""Outputs that depend on the input in a way that autograd cannot see."""

from __future__ import annotations

import torch

from funcjac._engines.run import Run
from funcjac._environment import rng_state, set_rng_state
from funcjac.errors import VerificationError


def check_attached(run: Run) -> None:
    """Raise if an output has no graph, and most of it moves with the inputs.

    This runs ``func`` once more, at a point nearby, if an output has no graph at all.

    Raises:
        VerificationError: it does.
    """
    loose = [i for i, out in enumerate(run.output.leaves) if not out.requires_grad and out.numel()]
    if not loose:
        return
    steps = [torch.finfo(x.dtype).eps ** (1 / 3) * (1 + x.detach().abs()) for x in run.inputs]
    moved = [x.detach() + step for x, step in zip(run.inputs, steps)]
    state = rng_state()
    with torch.no_grad():
        again = run.call(moved)
    set_rng_state(state)
    for i in loose:
        before, after = run.output.leaves[i].detach(), again.leaves[i]
        # Comparisons and roundings move here and there, a detached function everywhere.
        if (before != after).double().mean() > 0.5:
            raise VerificationError(
                f"{run.call.options.name}: expected autograd to see how func's output depends on "
                "its input, got an output without a graph that moves when the input does. Look for "
                "detach(), .item(), NumPy, torch.tensor(...) or a no_grad block in func; pass "
                "check=False if the derivative is meant to be zero."
            )
