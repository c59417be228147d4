"""Outputs that depend on the input in a way that autograd cannot see."""

from __future__ import annotations

import torch
from torch import Tensor

from funcjac._engines.run import Run
from funcjac._environment import rng_state, set_rng_state
from funcjac.errors import VerificationError


def _differ(before: Tensor, after: Tensor) -> bool:
    """Whether most numbers do: comparisons and roundings move here and there."""
    return bool((before.detach() != after).double().mean() > 0.5)


def check_attached(run: Run) -> None:
    """Raise if an output has no graph, and most of it moves with the inputs.

    This runs ``func`` once more, at a point nearby, if an output has no graph at all, and again
    at the same point if that differs.

    Raises:
        VerificationError: it does.
    """
    loose = [i for i, out in enumerate(run.output.leaves) if not out.requires_grad and out.numel()]
    if not loose or hasattr(run.call.func, "__funcjac_key__"):  # which has seen to it itself
        return
    steps = [torch.finfo(x.dtype).eps ** (1 / 3) * (1 + x.detach().abs()) for x in run.inputs]
    moved = [x.detach() + step for x, step in zip(run.inputs, steps)]
    state = rng_state()
    with torch.no_grad():
        there = run.call(moved).leaves
        set_rng_state(state)
        moves = [i for i in loose if _differ(run.output.leaves[i], there[i])]
        here = run.call([x.detach() for x in run.inputs]).leaves if moves else []
    set_rng_state(state)
    for i in moves:
        if not _differ(run.output.leaves[i], here[i]):  # it is no draw of func's own
            raise VerificationError(
                f"{run.call.options.name}: expected autograd to see how func's output depends on "
                "its input, got an output without a graph that moves when the input does. Look for "
                "detach(), .item(), NumPy, torch.tensor(...) or a no_grad block in func; pass "
                "check=False if the derivative is meant to be zero."
            )
