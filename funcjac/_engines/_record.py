"""What is remembered of a signature, and when its choice is made."""

import statistics
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._batched import Call, Layout
from funcjac._linear import Context
from funcjac._modes import Route, is_worth_a_try
from funcjac._reach import Known, Reach
from funcjac._state import Restored
from funcjac.errors import is_out_of_memory

_MOST_RECORDS, _MOST_PROBES = 256, 64
_CAST = ("cpu", "cuda")
# Turns of a route before its best time counts: more where a run is short and easily
# disturbed. Half of them, for a first run may hold some set-up of torch's, end the turns of
# a route that is this much slower than the best.
_TURNS, _TURNS_IF_SHORT, _SHORT, _SLOWER = 3, 6, 0.02, 1.5


@dataclass
class Record:
    """What is known of one signature.

    Attributes:
        sizes: batch, elements of an output row, elements of an input row.
        routes: still in the running, in the order of preference.
        errors: why a route was left.
        times: seconds of each run.
        choice: the route that all later calls take, once it is known.
        clone: whether ``func`` works in place on its arguments.
        composed: whether it runs what is fragile, so that simpler operations run instead.
        stateful: whether ``func`` changes modules or tensors that must be put back.
        moves: whether tensors are among what it changes.
        leaks: whether it leaves tensors of torch.func in lists and dicts.
        random: whether ``func`` draws random numbers.
        blocks: whether it computes in a ``no_grad`` block, which forward formulas see through.
        verified: routes, with integer arguments, which may decide what runs.
        probes: how many there were after the first: each draws another cotangent.
    """

    sizes: tuple[int, int, int]
    context: Context
    routes: list[Route] = field(default_factory=list)
    errors: dict[Route, Exception] = field(default_factory=dict)
    times: dict[Route, list[float]] = field(default_factory=dict)
    choice: Route | None = None
    clone: bool = False
    composed: bool = False
    stateful: bool = False
    moves: bool = False
    leaks: bool = False
    random: bool = False
    blocks: bool = False
    probes: int = 0
    verified: set[tuple[Route, Any]] = field(default_factory=set)

    def knows(self, route: Route, given: tuple[Any, ...]) -> bool:
        """Whether integers were verified, or are so many that they count something."""
        return (route, given) in self.verified or self.probes >= _MOST_PROBES

    @property
    def needs_guard(self) -> bool:
        """Whether something must be put back after the next call."""
        functional = self.choice is None or self.choice.is_functional
        return self.stateful or (self.leaks and functional)

    def note(self, restored: Restored) -> None:
        """Learn from what had to be put back."""
        self.stateful |= restored.changed or restored.moved
        self.moves |= restored.moved
        self.leaks |= restored.leaked

    def drop(self, route: Route, error: Exception) -> None:
        """Leave a route for good; out of memory, it comes again in half the piece."""
        # A traceback would keep the batch and the copies of a guard alive.
        error.__cause__ = error.__context__ = None
        self.errors[route] = error.with_traceback(None)
        place = self.routes.index(route)
        self.routes[place : place + 1] = self._smaller(route) if is_out_of_memory(error) else []
        self.choice = None if route == self.choice else self.choice
        self.times.pop(route, None)

    def _smaller(self, route: Route) -> list[Route]:
        _, outputs, inputs = self.sizes
        width = outputs if route.mode == "rev" else inputs
        chunk = min(route.chunk or width, width) // 2
        return [replace(route, chunk=chunk)] if chunk and route.engine != "loop" else []

    def next(self) -> Route:
        """The route whose turn it is."""
        return min(self.routes, key=lambda route: len(self.times.get(route, ())))

    def seconds(self, route: Route) -> float:
        """The usual time of a route; its first run may hold some set-up of torch's."""
        times = self.times[route]
        return statistics.median(times[1:] or times)

    def settle(self, *, checked: bool) -> None:
        """Give up on what is hopeless, and choose once every route left has had its turns."""
        best = min(self.times, key=self.seconds)
        self.routes = [r for r in self.routes if r == best or self._may_win(r, best, checked)]
        if len(self.routes) == 1 or all(self._turns_left(route) <= 0 for route in self.routes):
            self.choice = best

    def _turns_left(self, route: Route) -> int:
        times = self.times.get(route, [])
        is_short = bool(times) and min(times) < _SHORT
        return (_TURNS_IF_SHORT if is_short else _TURNS) - len(times)

    def _may_win(self, route: Route, best: Route, checked: bool) -> bool:
        times = self.times.get(route, [])
        had_enough = len(times) > max(self._turns_left(route), 1)
        if had_enough and self.seconds(route) > _SLOWER * self.seconds(best):
            return False
        if route.engine == "sum" and best.engine != "sum" and not checked:
            return False  # the sum trick needs proof that rows are independent
        if route.slow and replace(route, slow=False) in self.times:
            return False  # no operation needs torch's own loop
        _, outputs, inputs = self.sizes
        return is_worth_a_try(route, best, outputs, inputs)


@dataclass
class Memory:
    """What one transformed function remembers.

    Attributes:
        layouts: by structure of the arguments.
        records: by signature.
        sizes: by shapes, what a transform inside of others needs to choose a mode.
        known: what walks through functions and modules find every time.
        warned: whether leaving vmap was told.
        local: ``latest`` is the record of this thread's last call, for ``explain``.
        function: what was returned to the user.
    """

    layouts: dict[Any, Layout] = field(default_factory=dict)
    records: dict[Any, Record] = field(default_factory=dict)
    sizes: dict[Any, tuple[int, bool]] = field(default_factory=dict)
    known: Known = field(default_factory=dict)
    warned: bool = False
    local: threading.local = field(default_factory=threading.local)
    function: Callable[..., Any] | None = None

    @property
    def latest(self) -> Record | None:
        return getattr(self.local, "latest", None)

    @latest.setter
    def latest(self, record: Record | None) -> None:
        self.local.latest = record


def remember(records: dict[Any, Any], key: Any, record: Any) -> None:
    """Keep a record; the oldest makes room."""
    while len(records) >= _MOST_RECORDS:
        records.pop(next(iter(records)))
    records[key] = record


def signature(call: Call, reached: Reach, *, graph: bool) -> tuple[Any, ...]:
    """What a decision depends on: trees, shapes, dtypes, devices, modes, modules."""
    metas = tuple([_meta(leaf) for leaf in call.leaves])
    kwargs: Any = None
    if call.kwargs:
        leaves, spec = _tree.flatten_args(call.kwargs)
        kwargs = (spec, *[_meta(leaf) for leaf in leaves])
    modes: tuple[Any, ...] = (graph, torch.is_grad_enabled())
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        modes += tuple([(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _CAST])
    return id(call.layout), metas, kwargs, modes, tuple(reached.token)  # layouts are kept


def numbers(call: Call, reached: Reach) -> tuple[Any, ...]:
    """Integers that ``func`` computes with: a new one is verified, but not measured again."""
    leaves = [*call.leaves, *_tree.flatten(call.kwargs)[0]] if call.kwargs else call.leaves
    rest = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    given = [leaf for leaf in rest if isinstance(leaf, Integral) and type(leaf) is not bool]
    return (*given, *reached.numbers)


def _meta(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    if isinstance(leaf, Enum):  # which may have no hash
        return type(leaf), leaf.name
    return leaf if isinstance(leaf, (bool, str, type(None))) else type(leaf)


def requires_grad(call: Call) -> bool:
    """Whether an argument requires grad."""
    leaves: Iterable[Any] = call.leaves
    if call.kwargs:
        leaves = [*call.leaves, *_tree.flatten(call.kwargs)[0]]
    return any(leaf.requires_grad for leaf in leaves if isinstance(leaf, Tensor))
