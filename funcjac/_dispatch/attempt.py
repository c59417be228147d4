"""The long way of one call: first calls, verified ones, and those that take another turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from funcjac._arguments.call import Call
from funcjac._dispatch.choose_engine_mode_chunk import Sizes, sizes_of
from funcjac._dispatch.decisions import Decision, FunctionKey, forget_children
from funcjac._engines.run_func import (
    ChangedInputError,
    Derivatives,
    Facts,
    Route,
    Run,
    read_graph,
    run_once,
)
from funcjac._environment.state import (
    Buffers,
    RngState,
    buffers_in_training,
    put_back,
    rng_state,
    set_rng_state,
)
from funcjac._environment.torch_private import CONTROL_FLOW, saves_by_hooks
from funcjac._taylor import Recorder
from funcjac._torch_faults import graph_names, needs_replacement
from funcjac._verification.detached_outputs import check_attached
from funcjac._verification.row_independence import check_rows
from funcjac._verification.tolerance import is_alike, tolerance_of
from funcjac._verification.verify_backward import backward_mismatch
from funcjac._verification.verify_result import (
    agrees_with_units,
    extras_mismatch,
    is_lost_in_run,
    mismatch,
)
from funcjac.errors import BatchMixingError, VerificationError

NO_ROUTE, NO_SIZES = Route(""), Sizes(0, 0, 0, 1, False, True)
NOT_CAUGHT = (BatchMixingError, *CONTROL_FLOW)


@dataclass
class Outcome:
    """How a call went, for ``explain``.

    Attributes:
        runs: of ``func``, on the whole batch or on a row.
        reasons: what ruled an alternative out.
        meter: counts what runs, but for verification.
    """

    engine: str = ""
    route: Route = NO_ROUTE
    sizes: Sizes = NO_SIZES
    operations: int = 0
    verified: bool = False
    runs: int = 0
    reasons: list[str] = field(default_factory=list)
    meter: Any = None


class Attempt:
    """One call, what earlier calls of its key have shown, and what this one shows.

    Attributes:
        is_due: whether its result is verified.
        settled: the run of a settled call that turned out to be of another kind.
        plain: the run of the whole batch under plain autograd.
        draws: whether that run drew random numbers, where this is known.
        in_func: whether an exception is ``func``'s own, or about what it returned.
    """

    def __init__(
        self,
        call: Call,
        function: FunctionKey,
        decision: Decision,
        outcome: Outcome,
        settled: Run | None,
    ) -> None:
        self.options, self.operator = call.options, call.options.operator
        self.function, self.decision, self.outcome = function, decision, outcome
        self.is_due = decision.is_due(self.options.check, call.batch)
        if self.is_due:
            forget_children(function.modules)
        self.call = call._replace(clone=decision.clone, replaced=decision.replaced)
        self.settled = settled
        self.plain: Run | None = None
        self.facts: Facts | None = None
        self.start: RngState | None = None
        self.draws = False
        self.buffers: Buffers = []
        self.in_func = False

    def run(self, recorder_of: Callable[..., Any] | None = None) -> Run:
        """Run ``func``; once more if it writes into its input."""
        self.outcome.runs += 1
        if self.settled is not None:
            run, self.settled = self.settled, None
            return run
        self.in_func = True
        is_first = not self.decision.has_run
        if is_first:
            self.buffers = buffers_in_training(self.function.modules)
        try:
            run = run_once(self.call, recorder_of, copy=is_first)
        except ChangedInputError:
            put_back(self.buffers)
            if self.start is not None:
                set_rng_state(self.start)
            self.decision.clone = True
            self.call = self.call._replace(clone=True)
            self.outcome.runs += 1
            run = run_once(self.call, recorder_of)
        self.operator.check_output(run.call, run.output.leaves)
        if self.is_due and not self.decision.signatures:
            self.outcome.runs += check_attached(run, self.function.modules)
        self.in_func = False
        return run

    def read(self, run: Run) -> Run:
        """Look at the graph of a run; run again with replacements where torch is wrong."""
        outs = run.output.leaves
        run, facts = read_graph(run)
        self.facts = facts
        decision = self.decision
        again = run.create_graph or self.operator.is_second_order or self._goes_forward(run)
        if run.call.replaced or (facts.signature, again) in decision.graphs:
            return run
        decision.graphs.add((facts.signature, again))
        names = graph_names(outs)
        if needs_replacement(names, again=again):
            if self.is_due and not needs_replacement(names, again=False):
                self._check_rows(run)  # rather than run again for nothing
            run = self._replaced(run)
            self.facts = read_graph(run)[1]
        return run

    def _check_rows(self, run: Run) -> None:
        self.in_func = True
        with suppress(RuntimeError):  # of a graph that cannot be used twice
            check_rows(run, self.function.modules)
        self.in_func = False

    def _goes_forward(self, run: Run) -> bool:
        """Whether a Jacobian is the transpose of a VJP, which differentiates once more."""
        return self.operator.route(self.call, self.sizes(run)).mode == "fwd"

    def _replaced(self, run: Run) -> Run:
        """Another run, of replacements, if they give the same values."""
        after = rng_state()
        if self.start is not None:
            set_rng_state(self.start)
        self.outcome.runs += 1
        moved = buffers_in_training(self.function.modules)
        put_back(self.buffers)  # running statistics move once
        call = run.call._replace(replaced=True)
        try:
            replaced = run_once(call, None if run.recorder is None else Recorder)
            pairs = zip(run.output.leaves, replaced.output.leaves)
            limit = tolerance_of(run)
            same = all(is_alike(a.detach(), b.detach(), limit) for a, b in pairs)
        except CONTROL_FLOW:
            raise
        except Exception:
            replaced, same = run, False
        if not same:
            set_rng_state(after)
            put_back(moved)
            return run
        self.decision.replaced, self.call = True, call
        self.outcome.reasons.append("replacements ran for what torch differentiates wrongly")
        return replaced._replace(create_graph=run.create_graph)

    def sizes(self, run: Run) -> Sizes:
        self.decision.has_run = True
        return sizes_of(run, 1 if self.facts is None else self.facts.widest)


def lean(error: Exception) -> Exception:
    """An exception without its traceback, which would keep the batch alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


# --- verification -----------------------------------------------------------------------------


def verify(attempt: Attempt, run: Run, result: Derivatives, engine: str, mode: str = "") -> None:
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
    # Checkpoints count what is saved. Without need hooks would keep what they hand on alive.
    hidden = saved_tensors_hooks(_as_it_is, _as_it_is) if saves_by_hooks() else nullcontext()
    with unseen, hidden:
        modules, number = attempt.function.modules, decision.calls
        problem, compared = problem_of(run, result, number, modules, engine)
    if problem is not None:
        text = f"{attempt.options.name}: {engine} was verified and refused: {problem}."
        if engine != "sum":  # which sees the same batch as the reference
            text += " check_batched tells whether rows depend on one another through values."
        raise VerificationError(text)
    if not compared:
        decision.calls -= 1  # all was NaN: nothing was seen
        decision.failed = failed
        return
    decision.failed = False
    decision.rows |= run.call.batch > 1
    if attempt.facts is not None:
        decision.signatures.add((attempt.facts.signature, mode))


def problem_of(
    run: Run, result: Derivatives, number: int, modules: list[nn.Module], engine: str = "sum"
) -> tuple[str | None, bool]:
    """What is wrong with a result, and whether anything was compared.

    Raises:
        BatchMixingError: rows depend on one another.
    """
    problem, compared = mismatch(run, result, number)
    bent = False
    if problem is not None:
        check_rows(run, modules)
        # A backward pass that is not linear (a hook that clamps) has no double backward to compare.
        bent = run.call.options.operator.is_jacobian and agrees_with_units(run, result)
        if bent or is_lost_in_run(run, result, number):
            problem = None
    if problem is None and engine != "sum":
        problem = extras_mismatch(run, result)
    if problem is None and run.create_graph and not bent:
        problem = backward_mismatch(run, result, number)
    return problem, compared


def _as_it_is(tensor: Any) -> Any:
    return tensor
