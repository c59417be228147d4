"""Cost of training steps through derivatives, beside the loop of ``autograd.grad`` by hand.

A step is the derivatives, the loss and the gradients of all parameters. The Fourier operator and
the nested partial derivatives are calls without training. All ways are timed in one process, one
thread, in random order in every round, and must give the same numbers first. Columns:

* ``step / hand``: with transforms made once, beside the loop by hand;
* ``inline``: with transforms made anew in each step, beside the same made once;
* ``first``: the first step of a network that the process has not seen, beside settled;
* ``baseline``: settled, beside the version in the folder ``--baseline``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common
import torch
from common import Clock, Run
from networks import Fourier, Waves, mlp
from torch import Tensor, nn
from torch.autograd import grad

import funcjac


@dataclass(frozen=True)
class Problem:
    """Steps of a network: with transforms that it makes, and by hand.

    Attributes:
        make: makes a network that nobody has seen before.
        ours, by_hand: make a step of a network.
        limits: the largest ratio in each column; no limit where there is none.
    """

    make: Callable[[], nn.Module]
    ours: Callable[[Any], Run]
    by_hand: Callable[[Any], Run]
    limits: dict[str, float] = field(default_factory=dict)


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    """Of all parameters, in one vector."""
    parameters = list(net.parameters())
    grads = grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([leaf.flatten() for leaf in grads])


# --- problems ----------------------------------------------------------------------------


def transport(batch: int, *widths: int) -> Problem:
    """u_t + u_x u_x = u_xx / 10 in points (x, t)."""
    points = torch.rand(batch, 2)

    def loss(u_t: Tensor, u_x: Tensor, u_xx: Tensor) -> Tensor:
        return (u_t + u_x.square() - 0.1 * u_xx).square().mean()

    def ours(net: nn.Module) -> Run:
        partials = funcjac.batch_partials(net, [(1,), (0,), (0, 0)])
        return lambda: gradients(loss(*partials(points)), net)

    def by_hand(net: nn.Module) -> Run:
        def step() -> Tensor:
            x = points.detach().requires_grad_()
            (first,) = grad(net(x).sum(), x, create_graph=True)
            u_x, u_t = first[:, :1], first[:, 1:]
            (second,) = grad(u_x.sum(), x, create_graph=True)
            return gradients(loss(u_t, u_x, second[:, :1]), net)

        return step

    return Problem(lambda: mlp(*widths), ours, by_hand, {"step / hand": 1.1})


def three_outputs() -> Problem:
    """All second derivatives along coordinates, and the Jacobian, of three outputs."""
    points = torch.rand(1000, 3)

    def loss(diagonal: Tensor, jac: Tensor) -> Tensor:  # both (B, 3, 3)
        return (diagonal.sum(2) - jac.square().sum(2)).square().mean()

    def ours(net: nn.Module) -> Run:
        transform = funcjac.batch_hessian_diagonal(net, return_value=True)

        def step() -> Tensor:
            diagonal, (jac, _) = transform(points)
            return gradients(loss(diagonal, jac), net)

        return step

    def by_hand(net: nn.Module) -> Run:
        def step() -> Tensor:
            x = points.detach().requires_grad_()
            firsts = [grad(out.sum(), x, create_graph=True)[0] for out in net(x).unbind(1)]
            seconds = [
                grad(slope.sum(), x, create_graph=True)[0][:, i]
                for first in firsts
                for i, slope in enumerate(first.unbind(1))
            ]
            diagonal = torch.stack(seconds, 1).unflatten(1, (3, 3))
            return gradients(loss(diagonal, torch.stack(firsts, 1)), net)

        return step

    return Problem(lambda: mlp(3, 64, 64, 64, 3), ours, by_hand, {"step / hand": 0.55})


def flow() -> Problem:
    """A continuous normalizing flow: state and log-density by Runge-Kutta, exact divergence."""
    start = torch.randn(256, 2)

    def likelihood(moving: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        state, change = start.detach().requires_grad_(), torch.zeros(len(start))
        for _ in range(4):
            state, change = runge_kutta(moving, state, change, 0.25)
        return (state.square().sum(1) / 2 - change).mean()

    def ours(net: nn.Module) -> Run:
        divergence = funcjac.batch_divergence(net, return_value=True)
        return lambda: gradients(likelihood(lambda z: divergence(z)[::-1]), net)

    def by_hand(net: nn.Module) -> Run:
        def moving(state: Tensor) -> tuple[Tensor, Tensor]:
            speed = net(state)
            first, second = speed.unbind(1)
            (by_first,) = grad(first.sum(), state, create_graph=True)
            (by_second,) = grad(second.sum(), state, create_graph=True)
            return speed, by_first[:, 0] + by_second[:, 1]

        return lambda: gradients(likelihood(moving), net)

    return Problem(lambda: mlp(2, 64, 64, 2), ours, by_hand, {"step / hand": 1.1})


def runge_kutta(
    moving: Callable[[Tensor], tuple[Tensor, Tensor]], state: Tensor, change: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    """One step of the classical method of order 4 for the state and what changes along it."""
    k1, d1 = moving(state)
    k2, d2 = moving(state + step / 2 * k1)
    k3, d3 = moving(state + step / 2 * k2)
    k4, d4 = moving(state + step * k3)
    state = state + step / 6 * (k1 + 2 * (k2 + k3) + k4)
    return state, change + step / 6 * (d1 + 2 * (d2 + d3) + d4)


def fourier() -> Problem:
    """Laplacian by the values on the grid, (8, 32) -> (8, 32), without training."""
    values = torch.randn(8, 32)

    def ours(net: nn.Module) -> Run:
        transform = funcjac.batch_laplacian(net)
        return lambda: transform(values)

    def by_hand(net: nn.Module) -> Run:
        eye = torch.eye(32)

        def laplacian() -> Tensor:
            x = values.detach().requires_grad_()
            columns = []
            for out in net(x).unbind(1):
                (first,) = grad(out.sum(), x, create_graph=True)
                rows = [grad(first, x, unit.expand(8, 32), retain_graph=True)[0] for unit in eye]
                columns.append(sum(row[:, i] for i, row in enumerate(rows)))
            return torch.stack(columns, 1)

        return laplacian

    return Problem(lambda: Fourier().requires_grad_(False), ours, by_hand, {"first": 3.0})


def nested(order: int = 5) -> Problem:
    """The partial derivative of order 5 by nesting, of a custom function with five outputs."""
    points = torch.rand(64, 2)

    def ours(net: nn.Module) -> Run:
        func: Callable[[Tensor], Tensor] = net
        for _ in range(order):
            func = once_more(func)
        return lambda: func(points)

    def by_hand(net: nn.Module) -> Run:
        def partials() -> Tensor:
            x = points.detach().requires_grad_()
            columns = []
            for out in net(x).unbind(1):
                for level in range(order):
                    (first,) = grad(out.sum(), x, create_graph=level < order - 1, retain_graph=True)
                    out = first[:, 0]
                columns.append(out)
            return torch.stack(columns, 1)

        return partials

    return Problem(lambda: Waves().requires_grad_(False), ours, by_hand, {"step / hand": 1.5})


def once_more(func: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    partials = funcjac.batch_partials(func, [(0,)])
    return lambda x: partials(x)[0]


def problems() -> dict[str, Problem]:
    return {
        "u_x, u_t, u_xx 2-20x2-1 B=200": transport(200, 2, 20, 20, 1),
        "u_x, u_t, u_xx 2-32x1-1 B=500": transport(500, 2, 32, 1),
        "u_x, u_t, u_xx 2-32x3-1 B=1000": transport(1000, 2, 32, 32, 32, 1),
        "u_x, u_t, u_xx 2-64x4-1 B=4000": transport(4000, 2, 64, 64, 64, 64, 1),
        "diagonal, Jacobian 3-64x3-3 B=1000": three_outputs(),
        "flow, rk4 2-64-64-2 B=256": flow(),
        "Fourier Laplacian 32-32 B=8": fourier(),
        "order 5 nested 2-8-5 B=64": nested(),
    }


# --- measuring ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Ratios by column, milliseconds, and why the numbers differ, if they do."""

    ratios: dict[str, float]
    settled: float
    hand: float
    wrong: str


def measure(problem: Problem, name: str, baseline: common.Baseline | None, quick: bool) -> Measured:
    net = problem.make()
    hand, run = problem.by_hand(net), problem.ours(net)
    settled = common.settled(run)
    wrong = common.difference(settled(), hand())
    repeats = common.repeats_of(settled)
    runs = {"settled": settled, "hand": hand, "inline": lambda: problem.ours(net)()}
    clocks: dict[str, Clock] = {
        key: lambda run=run: common.seconds(run, repeats) for key, run in runs.items()
    }
    clocks["first"] = lambda: first_step(problem)
    if baseline is not None:
        clocks["baseline"] = lambda: baseline.seconds(name, repeats)
    times = common.interleaved(clocks, 2 if quick else 10, 2 if quick else 7)
    usual = times["settled"]
    ratios = {"step / hand": usual / times["hand"]}
    ratios |= {key: times[key] / usual for key in ("inline", "first")}
    if baseline is not None:
        ratios["baseline"] = usual / times["baseline"]
    return Measured(ratios, usual, times["hand"], wrong)


def first_step(problem: Problem) -> float:
    net = problem.make()
    return common.seconds(lambda: problem.ours(net)())


# --- reporting ---------------------------------------------------------------------------


def misses(problem: Problem, measured: Measured) -> list[str]:
    limits = [
        f"{column} {measured.ratios[column]:.2f}, limit {limit:g}"
        for column, limit in limits_of(problem).items()
        if column in measured.ratios and not measured.ratios[column] <= limit
    ]
    return limits + ([f"wrong, {measured.wrong}"] if measured.wrong else [])


def limits_of(problem: Problem) -> dict[str, float]:
    return {"baseline": 1.05} | problem.limits


def line(name: str, problem: Problem, measured: Measured) -> str:
    cells = []
    for column, ratio in measured.ratios.items():
        limit = limits_of(problem).get(column)
        mark = " " if limit is None or ratio <= limit else "*"
        cells.append(f"{ratio:11.2f}{mark}")
    absolute = (measured.settled * 1e3, measured.hand * 1e3)
    return f"{name:<36}" + "".join(cells) + "".join(f"{value:12.3f}" for value in absolute)


def main() -> None:
    arguments = common.options(__doc__)
    everything = {name: case for name, case in problems().items() if arguments.only in name}
    if arguments.serve:
        common.serve(lambda name: everything[name].ours(everything[name].make()))
        return
    baseline = common.Baseline(__file__, arguments.baseline) if arguments.baseline else None
    columns = ["step / hand", "inline", "first"] + ["baseline"] * bool(baseline)
    header = "".join(f"{column:>11} " for column in columns)
    print(f"torch {torch.__version__}, one thread, float32, medians; * is over its limit")
    print(f"{'':<36}{header}{'settled ms':>12}{'hand ms':>12}")
    missed = []
    for name, problem in everything.items():
        try:
            measured = measure(problem, name, baseline, arguments.quick)
        except Exception as error:  # a version at work may refuse one problem and do the next
            missed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        print(line(name, problem, measured), flush=True)
        missed += [f"{name}: {text}" for text in misses(problem, measured)]
    common.report(missed)


if __name__ == "__main__":
    main()
