"""``python -m funcjac``: the question the library answers, live.

First the question itself, on the smallest network that shows it. Then handwritten digits,
where the answers that people write by hand differ in time, in memory, and in whether they
work at all. Every number that is printed was computed just before.
"""

import argparse
import random
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import jacfwd, jacrev

from funcjac import __version__, batch_jacobian, explain
from funcjac._demo.digits import digits, make_networks
from funcjac._diagnostics.meter import Meter

WIDTH = 100
REFERENCE = "loop over rows"
OURS = "funcjac.batch_jacobian"
# Digits whose Jacobians are computed: the full Jacobian costs the square of that.
COUNT = 128
# Every way has this many turns, until it has used up this many seconds.
ROUNDS = 7
BUDGET = 1.0


def main() -> None:
    """Ask the question, then answer it for a convolutional network and for an LSTM."""
    parser = argparse.ArgumentParser(prog="python -m funcjac", description="What funcjac is for.")
    parser.add_argument("--picture", metavar="FILE", help="draw the tables (needs matplotlib)")
    picture = parser.parse_args().picture
    torch.manual_seed(0)
    torch.set_num_threads(1)  # times of one thread vary least
    print(f"funcjac {__version__}, torch {torch.__version__}, one CPU thread, float32")
    show_question()
    images, labels = digits()
    tables = {}
    for number, (title, net) in enumerate(make_networks().items(), 2):
        heading(f"{number}. {title}: ten logits by 64 pixels, for each of {COUNT} digits")
        train(net, images, labels)
        ours, batch = batch_jacobian(net), images[:COUNT]
        first = time_of(ours, batch)
        tables[title] = compare(make_ways(net, batch, ours))
        show_table(tables[title])
        print(f"The first call of funcjac, verified, took {as_time(first)}.\n")
        for line in str(explain(ours, batch)).splitlines():
            print(textwrap.fill(line, WIDTH, subsequent_indent=" " * 7))
    if picture:
        draw(tables, picture)


# --- the question ------------------------------------------------------------------------


def show_question() -> None:
    """A network 5 -> 2 -> 10 and three rows: what comes out, and what was wanted."""
    heading("1. A network with 5 inputs and 10 outputs, 3 rows: the Jacobian of each row")
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10))
    x = torch.randn(3, 5)
    every = jacobian(net, x)
    jac = batch_jacobian(net)(x)
    hess = batch_jacobian(batch_jacobian(net))(x)
    jac_by_loop = by_loop(lambda row: jacobian(net, row), x)
    hess_by_loop = by_loop(
        lambda row: by_loop(lambda i: hessian(lambda r: net(r)[i], row), torch.arange(10)), x
    )
    between = torch.stack([every[i, :, j] for i in range(3) for j in range(3) if i != j])
    most = between.abs().max()
    answers = {
        "autograd.functional.jacobian(net, x)": (
            (every, f"{between.numel()} entries between rows, the largest {most:.1g}")
        ),
        "batch_jacobian(net)(x)": (jac, f"{distance(jac, jac_by_loop)} from the loop over rows"),
        "batch_jacobian(batch_jacobian(net))(x)": (
            (hess, f"{distance(hess, hess_by_loop)} from the loop of functional.hessian")
        ),
    }
    for call, (answer, remark) in answers.items():
        print(f"{call:<40}{tuple(answer.shape)!s:<15}{remark}")


def by_loop(derivative: Callable[[Tensor], Any], rows: Tensor) -> Tensor:
    return torch.stack([derivative(row) for row in rows])


def distance(one: Tensor, other: Tensor) -> str:
    return f"{(one - other).abs().max():.1e}"


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int = 150) -> None:
    """Fit the digits, then freeze: Jacobians are looked at here, not trained through."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for step in range(1, steps + 1):
        logits = net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = (logits.argmax(1) == labels).float().mean().item()
        line = f"training, step {step} of {steps}: loss {loss.item():.3f}, {right:.0%} right"
        if sys.stdout.isatty():
            print(f"\r{line:<60}", end="", flush=True)
        elif step == steps:
            print(line, end="")
    print("\n")
    net.eval().requires_grad_(False)


# --- the ways to the Jacobian ------------------------------------------------------------

Way = Callable[[], Tensor]


def make_ways(net: nn.Module, images: Tensor, ours: Callable[..., Any]) -> dict[str, Way]:
    """Five ways as people write them, and funcjac; each returns ``(B, 10, 1, 8, 8)``."""

    def one(image: Tensor) -> Tensor:
        return net(image.unsqueeze(0)).squeeze(0)

    def full() -> Tensor:
        every = jacobian(net, images)  # (B, 10, B, 1, 8, 8)
        rows = torch.arange(len(images))
        return every[rows, :, rows]

    def sum_trick() -> Tensor:
        x = images.clone().requires_grad_()
        total = net(x).sum(0)
        grads = [torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in total]
        return torch.stack(grads, 1)

    return {
        "full Jacobian, then its diagonal": full,
        REFERENCE: lambda: by_loop(lambda image: jacobian(one, image), images),
        "sum trick, output by output": sum_trick,
        "vmap(jacrev)": lambda: torch.vmap(jacrev(one))(images),
        "vmap(jacfwd)": lambda: torch.vmap(jacfwd(one))(images),
        OURS: lambda: ours(images),
    }


def time_of(way: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    way(*args)
    return time.perf_counter() - start


def as_line(kind: type, message: object) -> str:
    """The name of a warning or an exception, and the first sentence that it says."""
    sentence = str(message).strip().splitlines()[0].split(". ")[0]
    return f"{kind.__name__}: {sentence.rstrip('.')}"


# --- the comparison ----------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One way to the Jacobian: what it cost, or how it failed.

    Attributes:
        jac: what it returned, ``None`` if it failed.
        seconds: median of the runs.
        memory: bytes of the tensors alive at once, at most.
        remark: the exception, or torch's warning of a slow fallback.
    """

    jac: Tensor | None
    seconds: float
    memory: int
    remark: str


def compare(ways: dict[str, Way]) -> dict[str, Outcome]:
    """Run every way, in turns and in random order, so that load on the machine meets all alike."""
    first = {name: attempt(way) for name, way in ways.items()}
    works = [name for name, outcome in first.items() if outcome.jac is not None]
    times = {name: [outcome.seconds] for name, outcome in first.items()}
    memory = dict.fromkeys(ways, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the first outcome
        for name in random.sample(works * ROUNDS, len(works) * ROUNDS):
            if sum(times[name]) < BUDGET:
                times[name].append(time_of(ways[name]))
        for name in works:
            with Meter() as meter:
                ways[name]()
            memory[name] = meter.peak
    return {
        name: replace(
            outcome,
            seconds=statistics.median(times[name][1:] or times[name]),  # the first warmed up
            memory=memory[name],
        )
        for name, outcome in first.items()
    }


def attempt(way: Way) -> Outcome:
    """The first run: the result, or the exception in words."""
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jac, remark = way(), ""
        except Exception as error:  # whatever a way raises is its row in the table
            jac, remark = None, as_line(type(error), error)
    slow = [as_line(w.category, w.message) for w in caught if "performance drop" in str(w.message)]
    return Outcome(jac, time.perf_counter() - start, 0, remark or "".join(slow[:1]))


# --- what is printed and drawn -----------------------------------------------------------


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def show_table(table: dict[str, Outcome]) -> None:
    reference = table[REFERENCE].jac
    assert reference is not None
    print(f"{tuple(reference.shape)}, entries up to {reference.abs().max():.3g}\n")
    print(f"{'':<34}{'time':>10}{'peak memory':>14}{'difference from the loop':>27}")
    for name, outcome in table.items():
        if outcome.jac is None:
            print(crop(f"{name:<34}  {outcome.remark}"))
            continue
        difference = "reference" if name == REFERENCE else distance(outcome.jac, reference)
        memory = f"{outcome.memory / 2**20:.1f} MiB"
        print(f"{name:<34}{as_time(outcome.seconds):>10}{memory:>14}{difference:>27}")
        if outcome.remark:
            print(textwrap.fill(outcome.remark, WIDTH, initial_indent="  ", subsequent_indent="  "))
    print()


def crop(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def as_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def draw(tables: dict[str, dict[str, Outcome]], path: str) -> None:
    """The times of all tables as bars on one logarithmic axis."""
    from matplotlib import pyplot  # noqa: PLC0415  an extra

    figure, axes = pyplot.subplots(
        1, len(tables), figsize=(10, 3), sharex=True, sharey=True, layout="constrained"
    )
    for ax, (title, table) in zip(axes, tables.items()):
        draw_bars(ax, title, table)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"Jacobians of ten logits by 64 pixels for {COUNT} digits, milliseconds "
        f"(torch {torch.__version__}, one CPU thread, float32)",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


def draw_bars(ax: Any, title: str, table: dict[str, Outcome]) -> None:
    worked = {name: 1e3 * o.seconds for name, o in table.items() if o.jac is not None}
    colors = ["tab:blue" if name == OURS else "0.75" for name in worked]
    ax.barh(list(table), [worked.get(name, 0) for name in table], color="none")  # all the names
    ax.barh(list(worked), list(worked.values()), color=colors)
    low, high = min(worked.values()) / 3, max(worked.values())
    for name, outcome in table.items():
        kind = outcome.remark.split(":")[0]
        slow = "(slow fallback)" if kind else ""
        text = f"{as_time(outcome.seconds)} {slow}" if name in worked else kind
        color = "tab:red" if kind else "black"
        ax.text(worked.get(name, low) * 1.15, name, text, va="center", fontsize=8, color=color)
    ax.set(title=title, xscale="log")
    ax.set_xlim(low, 8 * high)
    ax.spines[["top", "right"]].set_visible(False)
