"""Cost of Jacobians and Laplacians beside the best way by hand, and as people call them.

All ways are timed in one process, one thread, in random order in every round; each must give the
same result first. Columns, each with its limit:

* ``settled / hand``: a transform made once, beside the best way by hand;
* ``module``, ``lambda``, ``data``: the transform is made anew at each call, of a module, of a
  lambda, of a lambda over a tensor that is new at each call; beside the same made once;
* ``sizes``: a batch size that is new at each call, beside settled calls of the same sizes;
* ``first``: the first call of a function that the process has not seen, beside settled;
* ``memory``: peak bytes of such a first call, beside settled;
* ``baseline``: settled, beside settled calls of the version in the folder ``--baseline``.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import common
import torch
from common import Clock, Func, Run
from networks import Arm, LastStep, cnn, mlp
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap

import funcjac

LIMITS = {
    "settled / hand": 1.05,  # plus 25 microseconds
    "module": 1.3,
    "lambda": 1.3,
    "data": 1.3,
    "sizes": 1.3,
    "first": 4.0,
    "memory": 1.3,
    "baseline": 1.05,
}
SLACK = 25e-6
# A way by hand that takes so many times the time of the fastest is left out of the rounds.
HOPELESS = 3


@dataclass(frozen=True)
class Case:
    """A transform of a function, and the ways by hand to the same result.

    Attributes:
        make: makes a function that nobody has seen before, with frozen parameters.
        data: the arguments for a batch size.
        by_hand: the ways for a function, by name, as functions of the same arguments.
    """

    make: Callable[[], Func]
    data: Callable[[int], tuple[Any, ...]]
    batch: int
    by_hand: Callable[[Func, tuple[Any, ...]], dict[str, Func]]
    transform: Callable[[Func], Func] = funcjac.batch_jacobian


# --- by hand -----------------------------------------------------------------------------


def jacobians_by_hand(func: Func, sample: Func, args: tuple[Any, ...]) -> dict[str, Func]:
    """Ways to ``(B, M, *in)``; ``sample`` is ``func`` for one sample."""
    size = func(*args).shape[1]
    basis = torch.eye(size)[:, None]  # (M, 1, M): each cotangent is shared by all samples

    def vectorized(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = func(x)
        cotangents = basis.expand(size, *out.shape)
        return grad(out, x, cotangents, is_grads_batched=True)[0].movedim(0, 1)

    def row_by_row(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = func(x)
        rows = [grad(out, x, row.expand_as(out), retain_graph=True)[0] for row in basis]
        return torch.stack(rows, 1)

    return {
        "row by row": row_by_row,
        "grads batched": vectorized,  # a view: what it costs laid out as a transform's result is
        "grads batched, contiguous": lambda x: vectorized(x).contiguous(),
        "vmap(jacrev)": vmap(jacrev(sample)),
        "vmap(jacfwd)": vmap(jacfwd(sample)),
    }


def laplacians_by_hand(func: Func, args: tuple[Any, ...]) -> dict[str, Func]:
    """Ways to the Laplacian ``(B, 1)`` of one output."""
    size = args[0].shape[1]
    basis = torch.eye(size)

    def loop(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (first,) = grad(func(x).sum(), x, create_graph=True)
        rows = [grad(first, x, row.expand_as(x), retain_graph=True)[0] for row in basis]
        return torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0).unsqueeze(1)

    whole = vmap(hessian(func))  # (B, 1, N, N)
    trace = lambda x: whole(x).diagonal(dim1=-2, dim2=-1).sum(-1)
    return {"loop of grads": loop, "vmap(hessian)": trace}


# --- cases -------------------------------------------------------------------------------


def plain(make: Callable[[], nn.Module], batch: int, *shape: int, alone: bool = True) -> Case:
    """The Jacobian of a network; ``alone``: it takes a sample without a batch dimension too."""

    def by_hand(func: Func, args: tuple[Any, ...]) -> dict[str, Func]:
        return jacobians_by_hand(func, func if alone else lambda x: func(x[None])[0], args)

    data = lambda size: (torch.randn(size, *shape),)
    return Case(lambda: make().requires_grad_(False), data, batch, by_hand)


def dense(batch: int, *widths: int) -> Case:
    return plain(lambda: mlp(*widths), batch, widths[0])


def by_parameters() -> Case:
    """Per-sample Jacobians by the parameters, which all samples share."""
    parameters = {name: p.detach() for name, p in mlp(10, 32, 32, 3).named_parameters()}

    def make() -> Func:
        net = mlp(10, 32, 32, 3).requires_grad_(False)
        return lambda params, x: functional_call(net, params, (x,))

    return Case(
        make,
        lambda size: (parameters, torch.randn(size, 10)),
        64,
        lambda func, args: {"vmap(jacrev)": vmap(jacrev(func), (None, 0))},
        lambda func: funcjac.batch_jacobian(func, argnums=0, in_dims=(None, 0)),
    )


def laplacian() -> Case:
    return Case(
        lambda: mlp(50, 256, 256, 1).requires_grad_(False),
        lambda size: (torch.randn(size, 50),),
        32,
        laplacians_by_hand,
        funcjac.batch_laplacian,
    )


def cases() -> dict[str, Case]:
    return {
        "5-2-10 B=3": dense(3, 5, 2, 10),
        "3-64-5 B=128": dense(128, 3, 64, 5),
        "784-256-256-10 B=128": dense(128, 784, 256, 256, 10),
        "4-256-256-512 B=128": dense(128, 4, 256, 256, 512),
        "32-256-256-32 B=256": dense(256, 32, 256, 256, 32),
        "784-256-32-256-784 B=32": dense(32, 784, 256, 32, 256, 784),
        "LSTM 10x8-32-5 B=32": plain(LastStep, 32, 10, 8, alone=False),
        "CNN 1x14x14-10 B=32": plain(cnn, 32, 1, 14, 14, alone=False),
        "arm of 7 joints B=256": plain(Arm, 256, 7),
        "parameters 10-32-32-3 B=64": by_parameters(),
        "Laplacian 50-256-256-1 B=32": laplacian(),
    }


# --- measuring ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Ratios by column, absolute milliseconds, and what became of each way by hand."""

    ratios: dict[str, float]
    settled: float
    hand: float
    mebibytes: float
    by_hand: dict[str, str]


def working(ways: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """The ways that run, are right and not hopelessly slow; and the reason for each other one."""
    times: dict[str, float] = {}
    reasons: dict[str, str] = {}
    expected = next(iter(ways.values()))()
    for name, way in ways.items():
        try:
            reason = common.difference(way(), expected)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = f"fails: {' '.join(str(error).split())[:50]}"
        if reason:
            reasons[name] = reason
        else:
            times[name] = common.seconds(way, 1 if common.seconds(way) > 0.05 else 5)
    fastest = min(times.values())
    for name, time in times.items():
        if time > HOPELESS * fastest:
            reasons[name] = f"{time / fastest:.0f} times the fastest"
    return {name: way for name, way in ways.items() if name not in reasons}, reasons


def inline_ways(case: Case, func: Func, args: tuple[Any, ...]) -> dict[str, Run]:
    """Calls of transforms made anew, and the settled call that the last one is held against."""
    shape = func(*args).shape[1:]
    residual = torch.rand(shape)
    made_once = case.transform(lambda *args: func(*args) - residual)

    def settled_data() -> object:
        torch.rand(shape)
        return made_once(*args)

    def data() -> object:
        target = torch.rand(shape)
        return case.transform(lambda *args: func(*args) - target)(*args)

    return {
        "module": lambda: case.transform(func)(*args),
        "lambda": lambda: case.transform(lambda *args: func(*args))(*args),
        "data": data,
        "settled data": common.settled(settled_data),
    }


def first_calls(case: Case, args: tuple[Any, ...], trials: int, budget: float) -> dict[str, float]:
    """Ratios ``first`` and ``sizes``, from functions that were never seen before."""
    known = case.transform(case.make())
    sizes = [case.data(case.batch + 1 + more) for more in range(3)]
    settled = [common.settled(lambda args=args: known(*args), 2) for args in (args, *sizes)]
    first: list[list[float]] = []
    later: list[list[float]] = []
    start = common.now()
    while len(first) < 2 or (len(first) < trials and common.now() < start + budget):
        first.append(fresh_trial(case, args, sizes))
        later.append([common.seconds(run) for run in settled])
    new, *new_sizes = map(statistics.median, zip(*first))
    usual, *usual_sizes = map(statistics.median, zip(*later))
    return {"sizes": sum(new_sizes) / sum(usual_sizes), "first": new / usual}


def fresh_trial(case: Case, args: tuple[Any, ...], sizes: list[tuple[Any, ...]]) -> list[float]:
    """Seconds of the first call of a new function, then of each new batch size."""
    func = case.make()
    times = [common.seconds(lambda: case.transform(func)(*args))]
    transformed = case.transform(func)
    for _ in range(8):  # so that none of the next calls is one of 1, 2, 4, 8, 16, ...
        transformed(*args)
    return times + [common.seconds(lambda sized=sized: transformed(*sized)) for sized in sizes]


def measure(case: Case, name: str, baseline: common.Baseline | None, quick: bool) -> Measured:
    func, args = case.make(), case.data(case.batch)
    ways = {key: lambda way=way: way(*args) for key, way in case.by_hand(func, args).items()}
    known = case.transform(func)
    settled = common.settled(lambda: known(*args))
    wrong = common.difference(settled(), next(iter(ways.values()))())
    ways, by_hand = working(ways)
    repeats = common.repeats_of(settled)
    runs = {"settled": settled, **ways, **inline_ways(case, func, args)}
    clocks: dict[str, Clock] = {
        key: lambda run=run: common.seconds(run, repeats) for key, run in runs.items()
    }
    if baseline is not None:
        clocks["baseline"] = lambda: baseline.seconds(name, repeats)
    times = common.interleaved(clocks, 1 if quick else 6, 3 if quick else 7)
    usual, best = times["settled"], min(ways, key=lambda key: times[key])
    ratios = {"settled / hand": usual / times[best]}
    ratios |= {key: times[key] / usual for key in ("module", "lambda")}
    ratios["data"] = times["data"] / times["settled data"]
    ratios |= first_calls(case, args, 3 if quick else 15, 2 if quick else 10)
    fresh, usual_peak = case.make(), common.peak(settled)
    ratios["memory"] = common.peak(lambda: case.transform(fresh)(*args)) / usual_peak
    if baseline is not None:
        ratios["baseline"] = usual / times["baseline"]
    by_hand |= {key: f"{times[key] * 1e3:.3f} ms" for key in ways}
    if wrong:
        by_hand["funcjac"] = wrong
    return Measured(ratios, usual, times[best], usual_peak / 2**20, by_hand)


# --- reporting ---------------------------------------------------------------------------


def over(column: str, measured: Measured) -> bool:
    slack = SLACK / measured.hand if column == "settled / hand" else 0
    return not measured.ratios[column] <= LIMITS[column] + slack


def misses(measured: Measured) -> list[str]:
    wrong = measured.by_hand.get("funcjac")
    limits = [
        f"{column} {ratio:.2f}, limit {LIMITS[column]:g}"
        for column, ratio in measured.ratios.items()
        if over(column, measured)
    ]
    return limits + ([f"wrong, {wrong}"] if wrong else [])


def line(name: str, measured: Measured) -> str:
    cells = [
        f"{ratio:{width(column)}.2f}{'*' if over(column, measured) else ' '}"
        for column, ratio in measured.ratios.items()
    ]
    absolute = (measured.settled * 1e3, measured.hand * 1e3, measured.mebibytes)
    return f"{name:<28}" + "".join(cells) + "".join(f"{value:11.3f}" for value in absolute)


def width(column: str) -> int:
    return max(8, len(column) + 1)


def main() -> None:
    arguments = common.options(__doc__)
    everything = {name: case for name, case in cases().items() if arguments.only in name}
    if arguments.serve:
        common.serve(lambda name: settled_call(everything[name]))
        return
    baseline = common.Baseline(__file__, arguments.baseline) if arguments.baseline else None
    columns = [column for column in LIMITS if baseline or column != "baseline"]
    header = "".join(f"{column:>{width(column)}} " for column in columns)
    print(f"torch {torch.__version__}, one thread, float32, medians; * is over its limit")
    print(f"{'':<28}{header}{'settled ms':>11}{'hand ms':>11}{'peak MiB':>11}")
    missed = []
    for name, case in everything.items():
        try:
            measured = measure(case, name, baseline, arguments.quick)
        except Exception as error:  # a version at work may refuse one case and do the next
            missed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        print(line(name, measured), flush=True)
        print("    by hand: " + ", ".join(f"{k} {v}" for k, v in measured.by_hand.items()))
        missed += [f"{name}: {text}" for text in misses(measured)]
    common.report(missed)


def settled_call(case: Case) -> Run:
    known, args = case.transform(case.make()), case.data(case.batch)
    return lambda: known(*args)


if __name__ == "__main__":
    main()
