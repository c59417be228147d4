"""The rule: from the call to an engine, from sizes to a mode and a chunk. No clock.

| line | justified by `benchmarks/rule.py` (torch 2.13, one CPU thread, float32) |
| --- | --- |
| ``_FORWARD`` | transposing costs one more backward pass; small calls pay for its set-up |
| ``_CACHED`` | about 1 MiB of float32 for the widest tensor of a pass: worst 1.11, mean 1.01 of the best fixed choice over 18 networks; all at once reaches 2.35, one by one 24 |
| ``_MOST`` | bounds the memory of a pass: 256 MiB of float32 for its widest tensor |
| ``_TAYLOR`` | Taylor propagation takes 0.4 to 0.85 times the ratio of operations that it and nested reverse passes run |
"""  # noqa: E501  a table

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from funcjac._arguments.call import Call
from funcjac._arguments.layout import ENGINES
from funcjac._dispatch.messages import failure
from funcjac._engines.rows import row_sizes
from funcjac._engines.run_func import Route, Run
from funcjac.errors import RefusedError

# Forward where outputs are more than so many times the inputs: of small calls, of others.
_FORWARD, _SMALL = (4, 2), 2**15
_CACHED = 2**18
_MOST = 2**26
# Up to which ratio Taylor propagation is chosen: always, and of so many directions or more.
_TAYLOR, _TAYLOR_OF_MANY, _MANY = 0.75, 1.0, 8


class Sizes(NamedTuple):
    """What the rule goes by."""

    batch: int
    outputs: int  # elements of a row
    inputs: int
    widest: int  # elements of the widest tensor of the run, of the whole batch
    create_graph: bool
    on_cpu: bool  # passes should stay within a processor's cache


def sizes_of(run: Run, widest: int) -> Sizes:
    """What the rule goes by, of a run whose widest tensor has so many elements."""
    return Sizes(
        run.call.batch,
        sum([out.shape[1:].numel() for out in run.output.leaves]),
        sum(row_sizes(run.inputs, run.dims)),
        widest,
        run.create_graph,
        all(x.device.type == "cpu" for x in run.inputs),
    )


def engines_of(call: Call) -> tuple[tuple[str, ...], str]:
    """The engines that a call may take, in order, and why the sum trick is not among them.

    Raises:
        ValueError: the one that was asked for cannot do what was asked.
    """
    options = call.options
    if call.batch == 0:  # nothing keeps no rows apart
        return ("sum",), ""
    reason = ""
    if None in call.layout.diff_dims:
        reason = "the sum trick has no per-sample derivative of an argument that rows share"
    elif options.randomness == "same":
        reason = "the sum trick cannot give all rows the same draw"
    if reason and (options.engine == "sum" or options.mode == "taylor"):
        raise failure(options, [("sum", RefusedError(reason))], None)
    if options.engine != "auto":
        return (options.engine,), ""
    if options.mode == "taylor":
        return ("sum",), ""
    return (("vmap", "loop") if reason else ENGINES), reason


def routes_of(run: Run, sizes: Sizes, taylor_chunk: int | None) -> Iterator[Route]:
    """What the rule gives for one run, and what remains on its graph if that fails."""
    options, operator = run.call.options, run.call.options.operator
    if run.recorder is not None and operator.uses_taylor(run.call, sizes.outputs, sizes.inputs):
        yield Route("taylor", taylor_chunk)
        if options.mode == "taylor":
            return
    first = operator.route(run.call, sizes)
    yield first
    if first.chunk != 1:
        yield first._replace(chunk=1)
    if options.mode == "auto":
        plainest = "rev_over_rev" if "_over_" in first.mode else "rev"
        if first.mode != plainest:
            yield first._replace(mode=plainest)
            yield Route(plainest, 1)


def nested_route(run: Run, sizes: Sizes, route: Route) -> Route:
    """What runs where a route gives no finite numbers: itself, but for Taylor propagation."""
    return run.call.options.operator.route(run.call, sizes) if route.mode == "taylor" else route


def first_order_route(mode: str, chunk_size: int | None, sizes: Sizes) -> Route:
    """Mode and chunk of a Jacobian or a divergence."""
    if mode == "auto":
        small, large = (sizes.outputs > factor * sizes.inputs for factor in _FORWARD)
        # Asked last: a compiler that does not know the batch makes a guard of it.
        forward = small or (large and sizes.widest * sizes.outputs >= _SMALL)
        mode = "fwd" if forward else "rev"
    count = sizes.outputs if mode == "rev" else sizes.inputs
    return Route(mode, chunk(count, sizes, chunk_size))


def second_order_route(
    mode: str, chunk_size: int | None, sizes: Sizes, counts: tuple[int, int, int]
) -> Route:
    """Nested mode and chunk of second derivatives where Taylor propagation does not run."""
    if mode in ("auto", "taylor"):
        wide = sizes.outputs > 4 * max(counts[0], 1)
        mode = "fwd_over_fwd" if wide else "rev_over_rev"
    return Route(mode, chunk(counts[0], sizes, chunk_size))


def prefers_taylor(outputs: int, counts: tuple[int, int, int]) -> bool:
    """Whether Taylor propagation takes fewer operations than nested reverse passes.

    ``counts`` are first and second derivatives of each output, and gradients that are
    differentiated once more.
    """
    firsts, seconds, gradients = counts
    if not seconds or not outputs:
        return False
    ratio = (firsts + seconds) / (outputs * (1 + gradients))
    return ratio <= _TAYLOR or (ratio <= _TAYLOR_OF_MANY and firsts >= _MANY)


def chunk(count: int, sizes: Sizes, chunk_size: int | None = None) -> int | None:
    """Basis vectors per pass, ``None`` for all; no more than there are of ``chunk_size``."""
    if chunk_size is not None or count <= 1:
        return max(min(chunk_size or 1, count), 1)
    cached = sizes.on_cpu and not sizes.create_graph
    fitting = max((_CACHED if cached else _MOST) // max(sizes.widest, 1), 1)
    if count <= (2 if cached else 1) * fitting:
        return None
    passes = -(-count // fitting)
    return -(-count // passes)
