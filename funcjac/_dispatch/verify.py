"""When a result is held against plain autograd, and what follows of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch.autograd.graph import saved_tensors_hooks

from funcjac._dispatch.attempt import Attempt
from funcjac._engines.run import Derivatives, Run
from funcjac._environment.torch_private import CONTROL_FLOW
from funcjac._verification.row_independence import check_rows
from funcjac._verification.verify_backward import backward_mismatch
from funcjac._verification.verify_result import (
    agrees_with_units,
    extras_mismatch,
    is_lost_in_run,
    mismatch,
)
from funcjac.errors import BatchMixingError, VerificationError

NOT_CAUGHT = (BatchMixingError, *CONTROL_FLOW)


def verify(attempt: Attempt, run: Run, result: Derivatives, engine: str) -> None:
    """Hold a result against plain autograd through the graph of a run.

    Raises:
        BatchMixingError: rows depend on one another.
        VerificationError: the result is wrong.
    """
    decision, outcome = attempt.decision, attempt.outcome
    outcome.verified = True
    if not run.call.batch or not any(x.numel() for x in run.inputs):
        return
    failed, decision.failed = decision.failed, True
    unseen = outcome.meter.paused() if outcome.meter else nullcontext()
    with unseen, saved_tensors_hooks(_as_it_is, _as_it_is):  # checkpoints count what is saved
        problem, compared = _problem(attempt, run, result, engine)
    if problem is not None:
        words = f"{attempt.options.name}: {engine} was verified and refused: {problem}."
        raise VerificationError(words)
    if not compared:
        decision.calls -= 1  # all was NaN: nothing was seen
        decision.failed = failed
        return
    decision.failed = False
    decision.rows |= run.call.batch > 1
    if attempt.facts is not None:
        decision.signatures.add(attempt.facts.signature)


def _problem(
    attempt: Attempt, run: Run, result: Derivatives, engine: str
) -> tuple[str | None, bool]:
    """What is wrong with a result, and whether anything was compared."""
    number = attempt.decision.calls
    problem, compared = mismatch(run, result, number)
    bent = False
    if problem is not None:
        check_rows(run, attempt.function.modules)
        # A backward pass that is not linear (a hook that clamps) has no double backward to compare.
        bent = attempt.operator.is_jacobian and agrees_with_units(run, result)
        if bent or is_lost_in_run(run, result, number):
            problem = None
    if problem is None and engine != "sum":
        problem = extras_mismatch(run, result)
    if problem is None and run.create_graph and not bent:
        problem = backward_mismatch(run, result, number)
    return problem, compared


def _as_it_is(tensor: Any) -> Any:
    return tensor
