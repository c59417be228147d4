"""The long way of one call: first calls, verified ones, and those that take another turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from funcjac._arguments.call import Call, is_plain
from funcjac._arguments.layout import Options
from funcjac._dispatch.choose_engine_mode_chunk import Sizes, sizes_of
from funcjac._dispatch.decisions import Decision, FunctionKey, forget_children
from funcjac._dispatch.messages import refused
from funcjac._engines import run_func
from funcjac._engines.run_func import ChangedInputError, Derivatives, Facts, Route, Run
from funcjac._environment import state
from funcjac._environment.torch_private import CONTROL_FLOW, saves_by_hooks
from funcjac._taylor.recorder import Recorder
from funcjac._torch_faults.replace import graph_names, needs_replacement, wrong_nodes
from funcjac._verification.detached_outputs import check_attached
from funcjac._verification.tolerance import is_alike, tolerance_of
from funcjac._verification.verify_result import problem_of
from funcjac.errors import BatchMixingError, refuse

NO_ROUTE, NO_SIZES = Route(""), Sizes(0, 0, 0, 1, False, True)
_MOST_RESTORED = 2**16  # elements of a tensor that func closes over
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
        start: the random state before ``func`` runs, if it has not as a settled call.
        plain: the run of the whole batch under plain autograd, whose graph has a ``signature``.
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
        self.settled, self.start = settled, state.rng_state()
        self.plain: Run | None = None
        self.signature = 0
        self.buffers: state.Buffers = []
        self.draws = self.in_func = False

    def run(self, recorder_of: Callable[..., Any] | None = None) -> tuple[Run, Facts]:
        """Run ``func`` and read its graph; once more with replacements where torch is wrong."""
        self.outcome.runs += 1
        run = self._run_func(recorder_of) if self.settled is None else self.settled
        run, facts = self._without_faults(*run_func.read_graph(run))
        self.plain, self.signature, self.decision.has_run = run, facts.signature, True
        self.outcome.operations = len(facts.nodes)
        return run, facts

    def _run_func(self, recorder_of: Callable[..., Any] | None) -> Run:
        """Run ``func``; once more if it writes into its input."""
        self.in_func, is_first = True, not self.decision.has_run
        if is_first:
            self.buffers = state.buffers_in_training(self.function.modules)
        try:
            run = run_func.run_once(self.call, recorder_of, copy=is_first)
        except ChangedInputError as error:
            give_copies(self.decision, self.options, error)
            state.put_back(self.buffers)
            state.set_rng_state(self.start)
            self.call = self.call._replace(clone=True)
            self.outcome.runs += 1
            run = run_func.run_once(self.call, recorder_of)
        self.operator.check_output(run.call, run.output.leaves)
        if self.is_due and not self.decision.signatures:
            self.outcome.runs += check_attached(run, self.function.modules)
        self.in_func = False
        return run

    def _without_faults(self, run: Run, facts: Facts) -> tuple[Run, Facts]:
        """A run of replacements, where torch differentiates an operation of this one wrongly."""
        self.outcome.sizes = sizes_of(run, facts.widest)
        route = self.operator.route(self.call, self.outcome.sizes)
        # Forward mode is the transpose of a VJP, which differentiates once more.
        again = run.create_graph or self.operator.is_second_order or route.mode == "fwd"
        if run.call.replaced or (facts.signature, again) in self.decision.graphs:
            return run, facts
        self.decision.graphs.add((facts.signature, again))
        names = graph_names(facts.nodes, run.output.leaves)
        if not needs_replacement(names, again=again):
            return run, facts
        replaced = self._replaced(run)
        if replaced is None:
            return run, facts
        run, facts = run_func.read_graph(replaced)
        self.outcome.sizes = sizes_of(run, facts.widest)
        return run, facts

    def _replaced(self, run: Run) -> Run | None:
        """Another run, of replacements, if they give the same values."""
        call, after = run.call._replace(replaced=True), state.rng_state()
        moved = state.buffers_in_training(self.function.modules)
        # A version does not tell of batch norm that it wrote into its running statistics.
        small = [x for x in self.function.tensors if is_plain(x) and x.numel() <= _MOST_RESTORED]
        statistics = [(x, x.clone()) for x in small]
        state.set_rng_state(self.start)
        state.put_back(self.buffers)
        self.outcome.runs += 1
        try:
            replaced = run_func.run_once(call, None if run.recorder is None else Recorder)
            pairs, limit = zip(run.output.leaves, replaced.output.leaves), tolerance_of(run)
            if all(is_alike(a.detach(), b.detach(), limit) for a, b in pairs):
                self.decision.replaced, self.call = True, call
                reason = "replacements ran for what torch differentiates wrongly"
                self.outcome.reasons.append(reason)
                return replaced
        except CONTROL_FLOW:
            raise
        except Exception:  # not all that torch takes is replaced
            pass
        finally:  # values and versions stay those of the first run
            state.put_back(moved)
            for x, values in statistics:
                if not torch.equal(x.nan_to_num(), values.nan_to_num()):
                    x.data.copy_(values)
        state.set_rng_state(after)
        return None


def give_copies(decision: Decision, options: Options, error: ChangedInputError) -> None:
    """Give ``func`` copies from now on; raise if what it was given is lost."""
    decision.clone = True
    if error.args[0]:
        expected, got = "func to write into its input from the first call on", "a later one"
        remedy = "What it was given is lost: call again with other values."
        raise refuse(options.name, RuntimeError, expected, got, remedy)


def plainly(run: Run, nodes: list[Any]) -> Run:
    """A run that cannot be run again, by plain passes where torch has others wrong."""
    call, names, changes = run.call, graph_names(nodes, run.output.leaves), dict[str, Any]()
    again = ("batching_again", "reverse_3") if run.create_graph else ()
    if wrong := names & wrong_nodes("batching", "reverse_2", *again):
        if call.options.mode == "fwd":
            got = (
                f"mode='fwd' through {', '.join(sorted(wrong))}, which torch differentiates wrongly"
            )
            raise refuse(call.options.name, RuntimeError, "mode='rev'", got)
        changes["mode"] = "rev"
    if names & wrong_nodes("batching", *again[:1]):
        changes["chunk_size"] = 1
    options = replace(call.options, **changes)
    return run._replace(call=call._replace(replaced=True, options=options))


def lean(error: Exception) -> Exception:
    """An exception without its traceback, which would keep the batch alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def verify(attempt: Attempt, run: Run, result: Derivatives, engine: str, mode: str = "") -> None:
    """Hold a result against plain autograd through the graph of a run.

    Raises:
        BatchMixingError: rows depend on one another.
        VerificationError: the result is wrong.
    """
    decision, outcome, modules = attempt.decision, attempt.outcome, attempt.function.modules
    outcome.verified = True
    if not run.call.batch or not any(x.numel() for x in run.inputs):
        return
    failed, decision.failed = decision.failed, True
    unseen = outcome.meter.paused() if outcome.meter else nullcontext()
    # Checkpoints count what is saved. Without need hooks would keep what they hand on alive.
    hidden = saved_tensors_hooks(lambda x: x, lambda x: x) if saves_by_hooks() else nullcontext()
    with unseen, hidden:
        problem, compared = problem_of(run, result, decision.calls, modules, engine)
    if problem is not None:
        raise refused(attempt.options, engine, problem)
    if not compared:
        decision.calls -= 1  # all was NaN: nothing was seen
        decision.failed = failed
        return
    decision.failed = False
    decision.rows |= run.call.batch > 1
    decision.signatures.add((attempt.signature, mode))
