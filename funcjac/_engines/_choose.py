"""Which route runs: what failed, what was verified, what is cheapest.

Decisions are remembered per signature and per transformed function. The first call of a
signature runs ``func`` on the batch (its own errors are the user's), probes it, and tries
routes until one passes verification. The calls after it give every other route that could be
cheaper a turn, each verified before its result is handed out, until the fastest is known.
"""

import time
from contextlib import nullcontext
from typing import Any

import torch

from funcjac import _tree
from funcjac._batched import Call
from funcjac._composed import Suspects
from funcjac._engines._record import Memory, Record, numbers, remember, requires_grad, signature
from funcjac._engines._rows import by_sum, executed, run, synchronize
from funcjac._engines._suited import composes, confirm, draws, forward_safe, is_fragile, unsuitable
from funcjac._engines._tell import drew, failure, warn_of_fallback
from funcjac._linear import Context
from funcjac._mixing import check_rows
from funcjac._modes import Blocks, Route, sizes_of
from funcjac._native import CONTROL_FLOW, PROCESS
from funcjac._passes import Jacobian
from funcjac._probe import Probe, has_hidden_leaves, is_blind, is_zero, verifier
from funcjac._reach import Reach, reach
from funcjac._state import (
    Guard,
    RngState,
    guard,
    has_lazy,
    rng_state,
    same_rng_state,
    set_rng_state,
)
from funcjac._verify import check_attached
from funcjac.errors import BatchMixingError, UnsuitableError, VerificationError


def solve(call: Call, memory: Memory) -> Jacobian:
    """The Jacobian of ``call`` in plain (not transformed, not compiled) code."""
    reached = reach(call.reachable, memory.known)
    graph = torch.is_grad_enabled() and (reached.requires_grad or requires_grad(call))
    key = signature(call, reached, graph=graph)
    record = memory.latest = memory.records.get(key)
    if record is None:
        with PROCESS, _Attempt(call, memory, reached) as attempt:
            return attempt.first(key, graph)
    if record.clone or record.composed:
        call = call._replace(clone=record.clone, composed=record.composed)
    choice = None if record.needs_guard or call.options.check is True else record.choice
    try:
        if choice is not None and record.knows(choice, numbers(call, reached)):
            with PROCESS if record.random else nullcontext():  # which may set random state back
                return run(call, choice, record.context)
        with PROCESS, _Attempt(call, memory, reached) as attempt:
            return attempt.again(key, record)
    except (BatchMixingError, *CONTROL_FLOW):
        raise
    except Exception:
        # func failed, took another way than it did before, or what was chosen is wrong for it
        # now: begin anew, and an error of its own comes from a plain run of it
        memory.records.pop(key, None)
    with PROCESS, _Attempt(call, memory, reached) as attempt:
        return attempt.first(key, graph)


class _Attempt:
    """One call on its way through routes, with what must be put back after each."""

    record: Record
    ran: Route
    found: Probe | None

    def __init__(self, call: Call, memory: Memory, reached: Reach) -> None:
        if has_lazy(reached):  # parameters take their shape now, as in any first call
            with torch.no_grad():
                call(call.inputs)
            reached = reach(call.reachable, memory.known)
        self.call, self.memory, self.reached, self.options = call, memory, reached, call.options
        self.checked = call.options.check is not False
        self.guard, self.found = Guard([], [], []), None
        self.rng = self.drawn = rng_state()

    def __enter__(self) -> "_Attempt":
        return self

    def __exit__(self, *_: object) -> None:
        self.record.note(self.guard.restore())

    def _take_guard(self, *, values: bool = True) -> None:
        arguments = _tree.tensors((self.call.leaves, self.call.kwargs))
        self.guard = guard(self.reached, arguments, values=values)

    def _put_back(self) -> None:
        self.record.note(self.guard.restore())
        self._rewind(self.rng)

    def _rewind(self, state: RngState) -> None:
        if self.record.random:  # or others would be given the same numbers again
            set_rng_state(state)

    # --- the first call of a signature: everything is found out here

    def first(self, key: Any, graph: bool) -> Jacobian:
        self.record = Record((0, 0, 0), Context(graph=graph), random=True)
        self._take_guard()
        self._compose()
        self._look()
        self.record.note(self.guard.restore())
        if self.found is None or 0 in self.record.sizes:
            self.memory.latest = None
            self._rewind(self.rng)
            return by_sum(self.call, Route("sum", "empty"), self.record.context)
        self.memory.latest = self.record
        self.record.routes = self._routes()
        result = self._run_first_that_works()
        self._remember(key)
        return result

    def _remember(self, key: Any) -> None:
        if not (self.checked and self.found and is_zero(self.found)):
            self.record.verified.add((self.ran, numbers(self.call, self.reached)))
        if self.record.choice is None:
            self.record.settle(checked=self.checked)
        if self.checked and self.found and is_blind(self.found):
            self.memory.records.pop(key, None)
        elif key not in self.memory.records:
            remember(self.memory.records, key, self.record)

    def _compose(self) -> None:
        """Higher derivatives of fragile operations are taken of simpler ones."""
        self.record.composed = is_fragile(self.call, self.rng, self.record.context)
        self._put_back()
        self.call = self.call._replace(composed=self.record.composed)

    def _look(self) -> None:
        """Run ``func`` on the batch as plain autograd would, and probe it."""
        record = self.record
        with torch.enable_grad(), Suspects() as suspects, Blocks() as blocks:
            self.found = self._probe()
        record.blocks = blocks.seen
        record.note(self.guard.restore())
        if suspects.seen and not record.composed and composes(self.call, self.rng):
            self._put_back()
            record.composed, self.call = True, self.call._replace(composed=True)
            self.found = self._probe()
        self.drawn = rng_state()
        record.random = not same_rng_state(self.rng, self.drawn) and draws(self.call, self.rng)
        if record.random and self.options.randomness == "error":
            set_rng_state(self.rng)
            raise drew(self.options)
        if torch.is_grad_enabled() and not record.context.graph and has_hidden_leaves(self.found):
            record.context = Context(graph=True)
            self._put_back()
            self._compose()
            self.found = self._probe()
        # Seeds have the shape of what func returns, also if it is a transform.
        outputs = sum(seed[0].numel() for seed in self.found.seeds) if self.call.batch else 0
        dims = self.call.layout.diff_dims
        record.sizes = self.call.batch, outputs, sizes_of(self.call.inputs, dims)
        if self.checked and 0 not in record.sizes:
            self._put_back()
            check_attached(self.found)
            if record.random:  # each engine is verified with draws of its own
                self._put_back()
                check_rows(self.call, self.reached)

    def _probe(self) -> Probe:
        try:
            found = verifier(self.call, self.record.context)
        except RuntimeError as error:
            if "leaf Variable" not in str(error) or self.call.clone:
                raise
            return self._probe_copies()
        arguments = {id(x) for x in _tree.tensors((self.call.leaves, self.call.kwargs))}
        given = [entry for entry in self.guard.tensors if id(entry[0]) in arguments]
        if not self.call.clone and self.guard.restore_tensors(given):
            return self._probe_copies()
        return found

    def _probe_copies(self) -> Probe:
        """Once more, with copies for a function that works in place on its arguments."""
        self._put_back()
        self.record.stateful = False  # what changed was an argument, which gets copied now
        self.record.clone = True
        self.call = self.call._replace(clone=True)
        return self._probe()

    def _routes(self) -> list[Route]:
        """Routes worth trying; the record says why the others are not."""
        found = []
        on_cpu = all(x.device.type == "cpu" for x in self.call.inputs)
        for route in self.options.operator.routes(self.options, self.record.sizes, on_cpu):
            error = unsuitable(self.call, self.reached, self.record, route)
            if error is None:
                found.append(route)
            else:
                self.record.errors[route] = error
        again = [route for route in found if self._needs_safety(route)]
        if again and not forward_safe(self.call):
            unsafe = "torch's forward formula of an operation is wrong once differentiated again"
            self.record.errors |= dict.fromkeys(again, UnsuitableError(unsafe))
            found = [route for route in found if route not in again]
        self._put_back()
        return found

    def _needs_safety(self, route: Route) -> bool:
        """Whether forward formulas are differentiated again, or chosen and never verified."""
        alone = not self.checked and self.options.mode == "auto" and route.is_forward_formula
        return alone or route.is_differentiated_again(graph=self.record.context.graph)

    # --- later calls, until the cheapest route is known

    def again(self, key: Any, record: Record) -> Jacobian:
        self.record = record
        route = record.choice or record.next()
        new = route not in record.times or not record.knows(route, numbers(self.call, self.reached))
        if record.needs_guard or new:
            self._take_guard(values=record.moves or new)  # copies every parameter
        if self.options.check is True or (self.checked and new):
            record.probes += 1
            self.found = verifier(self.call, record.context, seed=record.probes)
            self.drawn = rng_state()
            self._put_back()
        result = self._try(route) if self.found else self._timed(route)
        if result is None:
            result = self._run_first_that_works()
        self._remember(key)
        return result

    # --- running and verifying one route

    def _run_first_that_works(self) -> Jacobian:
        while self.record.routes:
            route = self.record.routes[0]
            result = self._try(route)
            if result is not None:
                warn_of_fallback(self.options, self.memory, self.record, route)
                return result
        self._put_back()
        check_rows(self.call, self.reached)  # it may fail on rows alone that belong together
        self._put_back()
        self.call._replace(clone=True)(self.call.inputs)  # it may have come to fail at all
        raise failure(self.options, self.record)

    def _try(self, route: Route) -> Jacobian | None:
        """Run a route and verify it; ``None``, with the reason in the record, if it fails."""
        try:
            found = self._reference(route)
            self._put_back()
            result = self._timed(route)
            drawn = rng_state()
            problem = self._problem(found, result)
        except (BatchMixingError, *CONTROL_FLOW):
            raise
        except Exception as error:
            # Messages do not tell what vmap cannot do, so whatever was raised, the next
            # route gets its turn: func itself is known to run.
            self.record.drop(route, error)
            return None
        finally:
            self._put_back()
            self._rewind(self.drawn)
        if problem is not None:
            words = f"{self.options.name}: {route} was verified and refused: {problem}."
            self.record.drop(route, VerificationError(words))
            return None
        self._rewind(drawn)
        return result

    def _reference(self, route: Route) -> Probe | None:
        if not (self.checked and self.record.random and route.engine != "sum"):
            return self.found
        self._put_back()
        return verifier(executed(self.call, route.engine), self.record.context)

    def _timed(self, route: Route) -> Jacobian:
        synchronize(self.call)
        start = time.perf_counter()
        call = self.call
        if self.record.stateful and route.runs_often:  # every run starts from the same state
            call = call._replace(func=self.guard.restarting(call.func))
        if self.record.moves:
            self.guard.lend()
        result = run(call, route, self.record.context, strict=True)
        synchronize(self.call)
        self.ran = route
        self.record.times.setdefault(route, []).append(time.perf_counter() - start)
        return result

    def _problem(self, found: Probe | None, result: Jacobian) -> str | None:
        if found is None or not self.checked:
            return None
        return confirm(self.call, self.record, self.reached, found, result, self._put_back)
