"""One call, one run of ``func``: from the run to a verified result, in plain code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from funcjac._batched import Call
from funcjac._dispatch.decisions import Decision, decision_of
from funcjac._dispatch.key import FunctionKey, look_again, make_key
from funcjac._dispatch.messages import drew, failure, warn_of_fallback
from funcjac._dispatch.rule import Sizes
from funcjac._engines import ENGINES
from funcjac._engines.basis import row_shape
from funcjac._engines.graph import Route
from funcjac._engines.loop import by_loop
from funcjac._engines.run import (
    ChangedInputError,
    Derivatives,
    Facts,
    Run,
    detached,
    read_graph,
    run_once,
)
from funcjac._engines.vmap import by_vmap, in_result_type
from funcjac._environment import (
    RngState,
    WrappedAttributes,
    has_lazy,
    rng_state,
    same_rng_state,
    set_rng_state,
)
from funcjac._native import CONTROL_FLOW
from funcjac._taylor import Recorder
from funcjac._torch_faults import graph_names, needs_replacement
from funcjac._verification.backward import backward_mismatch
from funcjac._verification.compare import (
    agrees_with_units,
    extras_mismatch,
    is_alike,
    mismatch,
    tolerance_of,
)
from funcjac._verification.detached import check_attached
from funcjac._verification.rows import check_rows
from funcjac.errors import BatchMixingError, RefusedError, UntraceableError, VerificationError, brief

_NOT_CAUGHT = (BatchMixingError, *CONTROL_FLOW)


@dataclass
class Outcome:
    """How a call went, for ``explain``.

    Attributes:
        runs: of ``func`` on the whole batch, or on all rows.
        reasons: what ruled an alternative out.
        meter: counts what runs, but for verification.
    """

    engine: str = ""
    route: Route = Route("")
    sizes: Sizes = Sizes(0, 0, 0, 1, False, True)
    operations: int = 0
    verified: bool = False
    runs: int = 0
    reasons: list[str] = field(default_factory=list)
    meter: Any = None


class Attempt:
    """One call on its way through engines: what is known of it, and of earlier ones."""

    def __init__(self, call: Call, token: Any, outcome: Outcome) -> None:
        self.options, self.operator = call.options, call.options.operator
        self.function = FunctionKey(call.func)
        self.decision: Decision = decision_of(make_key(token, self.function, call))
        self.decision.calls += self.options.check is not False
        self.is_due = self.decision.is_due(self.options.check, call.batch)
        if self.is_due:
            look_again(self.function.modules)
        self.call = call._replace(
            clone=self.decision.clone, replaced=self.decision.replaced is True
        )
        self.outcome = outcome
        self.plain: Run | None = None  # the run of the whole batch under plain autograd
        self.facts: Facts | None = None
        self.left: list[tuple[str, Exception]] = []

    # --- running func

    def run(self, recorder_of: Callable[..., Any] | None = None) -> Run:
        """The one run of ``func``; once more if it writes into its input.

        What it raises, and what is wrong with its output, is told as it is.
        """
        self.in_func = True
        self.outcome.runs += 1
        try:
            run = run_once(self.call, recorder_of)
        except ChangedInputError:
            self.decision.clone = True
            self.call = self.call._replace(clone=True)
            self.outcome.runs += 1
            run = run_once(self.call, recorder_of)
        self.operator.check_output(run.call, [out.shape[1:] for out in run.output.leaves])
        if self.is_due:
            check_attached(run)
        self.in_func = False
        return run

    in_func = False

    def warn(self, engine: str) -> None:
        """Tell what was left for good; a warning may be an error, so nothing comes after it."""
        for left, error in self.left:
            warn_of_fallback(self.options, self.function, left, error, engine)

    def read(self, run: Run) -> Run:
        """Look at the graph of a run; run again with replacements where torch is wrong."""
        facts = self.facts = read_graph(run.output.leaves, run.inputs)
        grad = torch.is_grad_enabled()
        asks = any(x.requires_grad for x in (*self.call.inputs, *self.call.extras))
        create_graph = grad and (facts.has_leaves or asks)
        known = self.decision.replaced is not None and facts.signature in self.decision.signatures
        if not self.call.replaced and not known:
            again = create_graph or self.operator.is_second_order or self._goes_forward(run)
            names = graph_names(run.output.leaves)
            self.decision.replaced = needs_replacement(names, again=again)
            if self.decision.replaced:
                if self.is_due:
                    self.in_func = True
                    check_rows(run, self.function.modules)  # rather than run again for nothing
                    self.in_func = False
                replaced = self._replaced(run)
                if replaced is not None:
                    run = replaced
                    self.facts = read_graph(run.output.leaves, run.inputs)
        return run._replace(create_graph=create_graph)

    def _goes_forward(self, run: Run) -> bool:
        """Whether a Jacobian is the transpose of a VJP, which differentiates once more."""
        inputs = sum(row_shape(x, d).numel() for x, d in zip(self.call.inputs, self._dims()))
        return self.operator.route(self.call, self._sizes(run, inputs)).mode == "fwd"

    def _replaced(self, run: Run) -> Run | None:
        """Another run, of replacements, if they give the same values."""
        after = rng_state()
        if self.start is not None:
            set_rng_state(self.start)
        call = self.call._replace(replaced=True)
        recorder = None if run.recorder is None else _recorder
        self.outcome.runs += 1
        try:
            again = run_once(call, recorder)
            pairs = zip(run.output.leaves, again.output.leaves)
            limit = tolerance_of(run)
            same = all(is_alike(a.detach(), b.detach(), limit) for a, b in pairs)
        except Exception:
            same = False
        if not same:
            set_rng_state(after)
            self.decision.replaced = False
            return None
        self.call = call
        self.outcome.reasons.append("replacements ran for what torch differentiates wrongly")
        return again

    start: RngState | None = None

    # --- the engines

    def by_sum(self) -> Derivatives:
        """Through the graph of the one run."""
        decision = self.decision
        inputs = sum(row_shape(x, d).numel() for x, d in zip(self.call.inputs, self._dims()))
        records = "taylor" in self.operator.modes and "taylor" not in decision.left
        if self.function.scripted:
            if self.options.mode == "taylor":
                self.reference(rng_state())
                raise UntraceableError("what TorchScript runs cannot be recorded")
            records = False
        if records and decision.outputs is not None:
            records = self.operator.uses_taylor(self.call, decision.outputs, inputs)
        elif records:
            records = self.options.mode in ("auto", "taylor")
        if decision.replaced is None:
            self.start = rng_state()  # for a run of replacements to draw the same numbers
        run = self.read(self.run(_recorder if records else None))
        self.plain = run
        sizes = self._sizes(run, inputs)
        self.outcome.sizes = sizes
        decision.outputs = sizes.outputs
        facts = self.facts
        assert facts is not None
        self.outcome.operations = facts.operations
        known = facts.signature in decision.signatures
        check = self.options.check is not False and (self.is_due or not known)
        return self._first_that_works(run, sizes, check)

    def _dims(self) -> tuple[int | None, ...]:
        return self.call.layout.diff_dims

    def _sizes(self, run: Run, inputs: int) -> Sizes:
        outputs = sum(out.shape[1:].numel() for out in run.output.leaves)
        widest = self.facts.widest if self.facts is not None else 1
        on_cpu = all(x.device.type == "cpu" for x in run.inputs)
        return Sizes(self.call.batch, outputs, inputs, widest, run.create_graph, on_cpu)

    def _first_that_works(self, run: Run, sizes: Sizes, check: bool) -> Derivatives:
        error: Exception | None = None
        for route in self._routes(run, sizes):
            if route in self.decision.left:
                continue
            try:
                result = self._computed(run, route)
                if check:
                    self._verify(run, result)
            except _NOT_CAUGHT:
                raise
            except Exception as raised:
                error = _lean(raised)
                self._leave(route, error)
                continue
            self.outcome.route = route
            self.outcome.verified = check
            return result if run.create_graph else detached(result)
        raise error or RefusedError("; ".join(self.decision.left.values()))

    def _computed(self, run: Run, route: Route) -> Derivatives:
        tracks = run.create_graph or self.operator.is_second_order
        with torch.set_grad_enabled(tracks):
            result = self.operator.compute(run, route)
        if route.mode == "taylor" and not all(
            bool(block.isfinite().all()) for row in result.blocks for block in row
        ):
            # One infinite factor makes all directions NaN: others may be finite.
            sizes = self.outcome.sizes
            with torch.enable_grad():
                nested = self.operator.route(run.call, sizes)
                return self.operator.compute(run, nested)
        return result

    def _leave(self, route: Route, error: Exception) -> None:
        """Remember a route that failed; Taylor propagation for good."""
        if not isinstance(error, torch.linalg.LinAlgError):  # which is a matter of values
            self.decision.left[route] = brief(error)
        self.outcome.reasons.append(f"sum/{route.mode}: {brief(error)}")
        if route.mode == "taylor":
            self.decision.left["taylor"] = brief(error)

    def _routes(self, run: Run, sizes: Sizes) -> Iterator[Route]:
        """What the rule gives, and what remains on the same graph if that fails."""
        mode = self.options.mode
        if run.recorder is not None and (
            mode == "taylor" or self.operator.uses_taylor(run.call, sizes.outputs, sizes.inputs)
        ):
            yield Route("taylor", self.options.chunk_size)
            if mode == "taylor":
                return
        first = self.operator.route(run.call, sizes)
        yield first
        if first.chunk != 1:
            yield first._replace(chunk=1)
        if mode == "auto":
            plainest = "rev_over_rev" if "_over_" in first.mode else "rev"
            if first.mode != plainest:
                yield first._replace(mode=plainest)
                yield Route(plainest, 1)

    def _verify(self, run: Run, result: Derivatives, *, engine: str = "sum") -> None:
        """Hold a result against plain autograd on the same graph.

        Raises:
            BatchMixingError: rows depend on one another.
            VerificationError: the result is wrong.
        """
        decision = self.decision
        self.outcome.verified = True
        if not run.call.batch or not any(x.numel() for x in run.inputs):
            return
        failed, decision.failed = decision.failed, True
        meter = self.outcome.meter
        with meter.paused() if meter else nullcontext(), saved_tensors_hooks(_as_it_is, _as_it_is):  # checkpoints count what is saved
            problem, compared = self._problem(run, result, engine)
        if problem is not None:
            words = f"{self.options.name}: {engine} was verified and refused: {problem}."
            raise VerificationError(words)
        if not compared:
            decision.calls -= 1  # all was NaN: nothing was seen
            decision.failed = failed
            return
        decision.failed = False
        decision.rows |= run.call.batch > 1
        if self.facts is not None:
            decision.signatures.add(self.facts.signature)

    def _problem(self, run: Run, result: Derivatives, engine: str) -> tuple[str | None, bool]:
        number = self.decision.calls
        problem, compared = mismatch(run, result, number)
        if problem is not None:
            check_rows(run, self.function.modules)
            if self.operator.is_jacobian and agrees_with_units(run, result):
                problem = None
        if problem is None and engine != "sum":
            problem = extras_mismatch(run, result)
        if problem is None and run.create_graph:
            problem = backward_mismatch(run, result, number)
        return problem, compared

    def by_vmap(self) -> Derivatives:
        """Rows apart by ``torch.vmap``, held against a plain run where that is due."""
        before = rng_state()
        if self.function.scripted:
            words = "torch.func differentiates TorchScript wrongly from its second call on"
            raise RefusedError(words)
        if "fwd" in self.options.mode:  # forward formulas see through no_grad: always verified
            self.is_due = self.options.check is not False
        if self.is_due or self.decision.outputs is None:
            self.reference(before)
        call = self.call._replace(replaced=self.call.replaced or "fwd" in self.options.mode)
        if self.plain is not None and self.plain.create_graph:
            call = call.with_inputs(self.plain.inputs)
        self.outcome.runs += 1
        with WrappedAttributes(self.function.modules):
            result = in_result_type(call, by_vmap(call, self._compute_row))
        if self.plain is not None and self.is_due:
            run = self._same_draws(before)
            self._verify(run, result, engine="vmap")
        self.outcome.route = Route(self.options.mode, self.options.chunk_size)
        create_graph = torch.is_grad_enabled() and (self.plain is None or self.plain.create_graph)
        return result if create_graph else detached(result)

    def _compute_row(self, function: Any, xs: Any, extras: Any) -> Any:
        return self.operator.compute_row(self.call, function, xs, extras, self.options.mode)

    def reference(self, before: RngState) -> None:
        """Run ``func`` plainly, for what it raises, its sizes, and to verify by."""
        self.start = before
        lazy = has_lazy(self.function.modules)
        run = self.plain = self.plain or self.read(self.run())
        inputs = sum(row_shape(x, d).numel() for x, d in zip(self.call.inputs, self._dims()))
        self.outcome.sizes = self._sizes(run, inputs)
        self.decision.outputs = self.outcome.sizes.outputs
        self.draws = not lazy and not same_rng_state(before, rng_state())
        if self.draws:
            set_rng_state(before)
            self.in_func = True
            if self.options.randomness == "error":
                raise drew(self.options)
            if self.is_due:
                check_rows(run, self.function.modules)
            self.in_func = False

    draws = False

    def _same_draws(self, before: RngState) -> Run:
        """A plain run with the draws of ``torch.vmap``, where ``func`` draws."""
        assert self.plain is not None
        if not self.draws:
            return self.plain
        after = rng_state()
        set_rng_state(before)
        options = self.options
        dims = tuple([self.call.layout.dims[i] for i in self.call.layout.batched])
        call = self.call

        def rows(inputs: Any) -> Any:
            whole = call.with_inputs(inputs)

            def row(*leaves: Any) -> Any:
                one = whole.one_row([x.unsqueeze(d or 0) for x, d in zip(leaves, dims)])
                return tuple([out.squeeze(0) for out in one(one.inputs).leaves])

            given = [whole.leaves[i] for i in call.layout.batched]
            return torch.vmap(row, dims, 0, randomness=options.randomness)(*given)

        with torch.enable_grad():
            leaves = list(rows(self.plain.inputs))
        set_rng_state(after)
        return self.plain._replace(output=self.plain.output._replace(leaves=leaves))

    def by_loop(self) -> Derivatives:
        """One row after the other."""
        before = rng_state()
        if self.is_due or self.decision.outputs is None:
            self.reference(before)
        graph = torch.is_grad_enabled() and (self.plain is None or self.plain.create_graph)
        call = self.call
        if self.plain is not None and graph:
            call = call.with_inputs(self.plain.inputs)
        self.outcome.runs += 1
        result = by_loop(call, self._one_row, create_graph=graph)
        if self.options.randomness == "error" and not same_rng_state(before, rng_state()):
            set_rng_state(before)
            raise drew(self.options)
        if self.plain is not None and self.is_due and not self.draws:
            self._verify(self.plain, result, engine="loop")
        return result

    def _one_row(self, call: Call) -> Derivatives:
        run = run_once(call)
        facts = read_graph(run.output.leaves, run.inputs)
        asks = any(x.requires_grad for x in (*call.inputs, *call.extras))
        create_graph = torch.is_grad_enabled() and (facts.has_leaves or asks)
        run = run._replace(create_graph=create_graph)
        inputs = sum(row_shape(x, d).numel() for x, d in zip(call.inputs, self._dims()))
        outputs = sum(out.shape[1:].numel() for out in run.output.leaves)
        on_cpu = all(x.device.type == "cpu" for x in run.inputs)
        sizes = Sizes(1, outputs, inputs, facts.widest, create_graph, on_cpu)
        route = self.operator.route(call, sizes)._replace(chunk=1)  # whatever vmap cannot do
        self.outcome.route = route
        with torch.set_grad_enabled(create_graph or self.operator.is_second_order):
            result = self.operator.compute(run, route)
        return result if create_graph else detached(result)


def _as_it_is(tensor: Any) -> Any:
    return tensor


def _recorder(inputs: Any) -> Recorder:
    return Recorder(inputs, create_graph=torch.is_grad_enabled())


def _lean(error: Exception) -> Exception:
    """An exception without its traceback, which would keep the batch alive."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def solve(call: Call, token: Any, outcome: Outcome) -> Derivatives:
    """The derivatives of ``call`` in plain (not transformed, not compiled) code."""
    attempt = Attempt(call, token, outcome)
    options, errors = call.options, []
    order = engines_of(call)
    for engine in order:
        if engine in attempt.decision.left:
            continue
        outcome.engine = engine
        try:
            if engine == "sum":
                result = attempt.by_sum()
            else:
                result = attempt.by_vmap() if engine == "vmap" else attempt.by_loop()
        except _NOT_CAUGHT:
            raise
        except Exception as error:
            if attempt.in_func:
                raise
            if attempt.plain is None:
                attempt.reference(rng_state())  # raises what func itself raises
            errors.append((engine, _lean(error)))
            if not isinstance(error, torch.linalg.LinAlgError):  # which is a matter of values
                attempt.decision.left[engine] = brief(error)
            outcome.reasons.append(f"{engine}: {brief(error)}")
            continue
        attempt.left += [pair for pair in errors[:1] if pair[0] in attempt.decision.left]
        attempt.warn(engine)
        return result
    if not errors:  # all failed before: tell again what they raise
        for engine in order:
            attempt.decision.left.pop(engine, None)
        attempt.decision.left.clear()
        attempt.decision.calls = 0
        return solve(call, token, outcome)
    if attempt.plain is not None:
        with suppress(RuntimeError):  # of a graph that cannot be used again
            check_rows(attempt.plain, attempt.function.modules)
    attempt.decision.left.clear()
    attempt.decision.calls = 0
    raise failure(options, errors)


def engines_of(call: Call) -> tuple[str, ...]:
    """The engines that a call may take, in order.

    Raises:
        ValueError: the one that was asked for cannot do what was asked.
    """
    options = call.options
    if call.batch == 0:  # nothing keeps no rows apart
        return ("sum",)
    reason = ""
    if None in call.layout.diff_dims:
        reason = "the sum trick has no per-sample derivative of an argument that rows share"
    elif options.randomness == "same":
        reason = "the sum trick cannot give all rows the same draw"
    if options.engine != "auto":
        if options.engine == "sum" and reason:
            raise failure(options, [("sum", RefusedError(reason))])
        return (options.engine,)
    if options.mode == "taylor":
        if reason:
            raise failure(options, [("sum", RefusedError(reason))])
        return ("sum",)
    return ("vmap", "loop") if reason else ENGINES
