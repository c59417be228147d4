"""One call on its way: what is known of it, its run of ``func``, and what the graph tells."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from funcjac._arguments.call import Call
from funcjac._dispatch.decisions import Decision, FunctionKey, decision_of, look_again, make_key
from funcjac._dispatch.rule import Sizes
from funcjac._engines.basis import elements_of_rows, row_sizes
from funcjac._engines.run import (
    ChangedInputError,
    Facts,
    Route,
    Run,
    attached,
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
from funcjac._environment.torch_private import CONTROL_FLOW
from funcjac._taylor import Recorder
from funcjac._torch_faults import graph_names, needs_replacement
from funcjac._verification.compare import is_alike, tolerance_of
from funcjac._verification.detached import check_attached
from funcjac._verification.rows import check_rows


@dataclass
class Outcome:
    """How a call went, for ``explain``.

    Attributes:
        runs: of ``func`` on the whole batch, or on all rows.
        reasons: what ruled an alternative out.
        meter: counts what runs, but for verification.
    """

    engine: str = ""
    route: Route = field(default_factory=lambda: Route(""))
    sizes: Sizes = field(default_factory=lambda: Sizes(0, 0, 0, 1, False, True))
    operations: int = 0
    verified: bool = False
    runs: int = 0
    reasons: list[str] = field(default_factory=list)
    meter: Any = None


class Attempt:
    """One call, what earlier ones of its key have shown, and what this one shows.

    Attributes:
        is_due: whether its result is verified.
        plain: the run of the whole batch under plain autograd.
        draws: whether that run drew random numbers, where this is known.
        in_func: whether an exception is ``func``'s own, or about what it returned.
    """

    def __init__(self, call: Call, token: Any, outcome: Outcome) -> None:
        self.options, self.operator = call.options, call.options.operator
        self.function = FunctionKey(call.func)
        decision: Decision = decision_of(make_key(token, self.function, call))
        check = self.options.check
        decision.calls += check is not False
        self.decision, self.outcome = decision, outcome
        self.is_due = decision.is_due(check, call.batch)
        if self.is_due:
            look_again(self.function.modules)
        if decision.clone or decision.replaced:
            call = call._replace(clone=decision.clone, replaced=decision.replaced)
        self.call = call
        self.plain: Run | None = None
        self.facts: Facts | None = None
        self.start: RngState | None = None
        self.draws = False
        self.buffers: Buffers = []
        self.in_func = False

    def run(self, recorder_of: Callable[..., Any] | None = None) -> Run:
        """Run ``func``; once more if it writes into its input."""
        self.in_func = True
        self.outcome.runs += 1
        if self.decision.outputs is None:
            self.buffers = buffers_in_training(self.function.modules)
        try:
            run = run_once(self.call, recorder_of, copy=self.decision.outputs is None)
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
        facts = self.facts = read_graph(attached(run.output), run.inputs)
        create_graph = keeps_graph(facts, run.call)
        if create_graph:
            run = run._replace(create_graph=True)
        decision = self.decision
        if not run.call.replaced and facts.signature not in decision.graphs:
            decision.graphs.add(facts.signature)
            again = create_graph or self.operator.is_second_order or self._goes_forward(run)
            names = graph_names(outs)
            if needs_replacement(names, again=again):
                if self.is_due and not needs_replacement(names, again=False):
                    self._check_rows(run)  # rather than run again for nothing
                run = self._replaced(run)
                self.facts = read_graph(attached(run.output), run.inputs)
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
        call, again = run.call._replace(replaced=True), run
        try:
            again = run_once(call, None if run.recorder is None else Recorder)
            pairs = zip(run.output.leaves, again.output.leaves)
            limit = tolerance_of(run)
            same = all(is_alike(a.detach(), b.detach(), limit) for a, b in pairs)
        except CONTROL_FLOW:
            raise
        except Exception:
            same = False
        if not same:
            set_rng_state(after)
            put_back(moved)
            return run
        self.decision.replaced, self.call = True, call
        self.outcome.reasons.append("replacements ran for what torch differentiates wrongly")
        return again._replace(create_graph=run.create_graph)

    def sizes(self, run: Run) -> Sizes:
        """What the rule goes by."""
        decision = self.decision
        if decision.inputs is None:
            decision.inputs = sum(row_sizes(run.inputs, run.dims))
            decision.on_cpu = all(x.device.type == "cpu" for x in run.inputs)
        outputs = elements_of_rows(run.output.leaves)
        decision.outputs = outputs
        widest = self.facts.widest if self.facts is not None else 1
        return Sizes(
            run.call.batch, outputs, decision.inputs, widest, run.create_graph, decision.on_cpu
        )


def keeps_graph(facts: Facts, call: Call) -> bool:
    """Whether the result has a graph of its own."""
    return torch.is_grad_enabled() and (facts.has_leaves or _asks_for_graph(call))


def _asks_for_graph(call: Call) -> bool:
    """Whether what is differentiated, or weighs the result, requires grad."""
    leaves, layout = call.leaves, call.layout
    for i in layout.diff:
        if leaves[i].requires_grad:
            return True
    return any(x.requires_grad for x in call.extras) if call.extra else False


def lean(error: Exception) -> Exception:
    """An exception without its traceback, which would keep the batch alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
