"""``python -m funcjac``: the question the library answers, live.

First the question itself, on the smallest network that shows it. Then handwritten digits, where
the answers that people write by hand differ in time, in memory, and in whether they work at all.
"""

import argparse
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

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

Way = Callable[[], Tensor]


class Outcome(NamedTuple):
    """One way to the Jacobian: what it cost, or how it failed."""

    jac: Tensor | None  # None if it failed
    seconds: float  # median of the runs
    memory: int  # bytes of the tensors alive at once, at most
    remark: str  # the exception, or torch's warning of a slow fallback


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
        ways = make_ways(net, images[:COUNT])
        first = time_of(ways[OURS])
        tables[title] = compare(ways)
        show_table(tables[title])
        print(f"The first call of funcjac, verified, took {as_time(first)}.\n")
        for line in str(explain(batch_jacobian(net), images[:COUNT])).splitlines():
            print(textwrap.fill(line, WIDTH, subsequent_indent=" " * 7))
    if picture:
        draw(tables, picture)


def show_question() -> None:
    """A network 5 -> 2 -> 10 and three rows: what comes out, and what was wanted."""
    heading("1. A network with 5 inputs and 10 outputs, 3 rows: the Jacobian of each row")
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10))
    x = torch.randn(3, 5)

    def hessian_of_row(row: Tensor) -> Tensor:
        return stacked(lambda i: hessian(lambda r: net(r)[i], row), torch.arange(10))

    full = jacobian(net, x)
    jac, jac_by_loop = batch_jacobian(net)(x), stacked(lambda row: jacobian(net, row), x)
    hess, hess_by_loop = batch_jacobian(batch_jacobian(net))(x), stacked(hessian_of_row, x)
    between = torch.stack([full[i, :, j] for i in range(3) for j in range(3) if i != j])
    zeros = f"{between.numel()} entries between rows, the largest {between.abs().max():.1g}"
    for call, derivative, remark in (
        ("autograd.functional.jacobian(net, x)", full, zeros),
        ("batch_jacobian(net)(x)", jac, f"{distance(jac, jac_by_loop)} from the loop over rows"),
        (
            "batch_jacobian(batch_jacobian(net))(x)",
            hess,
            f"{distance(hess, hess_by_loop)} from the loop of functional.hessian",
        ),
    ):
        print(f"{call:<40}{tuple(derivative.shape)!s:<15}{remark}")


def stacked(derivative: Callable[[Tensor], Any], rows: Tensor) -> Tensor:
    return torch.stack([derivative(row) for row in rows])


def distance(derivative: Tensor, reference: Tensor) -> str:
    return f"{(derivative - reference).abs().max():.1e}"


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int = 150) -> None:
    """Fit the digits, then freeze: Jacobians are looked at here, not trained through."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for step in range(1, steps + 1):
        logits = net(images)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == steps:
            right = (logits.argmax(1) == labels).float().mean().item()
            line = f"training, step {step} of {steps}: loss {loss.item():.3f}"
            print(f"{line}, {right:.0%} right\n")
    net.eval().requires_grad_(False)


# --- the comparison ----------------------------------------------------------------------


def make_ways(net: nn.Module, images: Tensor) -> dict[str, Way]:
    """Five ways as people write them, and funcjac; each returns ``(B, 10, 1, 8, 8)``."""
    ours = batch_jacobian(net)

    def row(image: Tensor) -> Tensor:
        return net(image.unsqueeze(0)).squeeze(0)

    def full() -> Tensor:
        rows = torch.arange(len(images))
        return jacobian(net, images)[rows, :, rows]  # of (B, 10, B, 1, 8, 8)

    def sum_trick() -> Tensor:
        x = images.clone().requires_grad_()
        total = net(x).sum(0)
        grads = [torch.autograd.grad(logit, x, retain_graph=True)[0] for logit in total]
        return torch.stack(grads, 1)

    return {
        "full Jacobian, then its diagonal": full,
        REFERENCE: lambda: stacked(lambda image: jacobian(row, image), images),
        "sum trick, output by output": sum_trick,
        "vmap(jacrev)": lambda: torch.vmap(jacrev(row))(images),
        "vmap(jacfwd)": lambda: torch.vmap(jacfwd(row))(images),
        OURS: lambda: ours(images),
    }


def compare(ways: dict[str, Way]) -> dict[str, Outcome]:
    """Run every way, in turns, so that load on the machine meets all alike."""
    outcomes = {name: attempt(way) for name, way in ways.items()}
    works = [name for name, outcome in outcomes.items() if outcome.jac is not None]
    times = {name: [outcomes[name].seconds] for name in works}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the first outcome
        for name in works * ROUNDS:
            if sum(times[name]) < BUDGET:
                times[name].append(time_of(ways[name]))
        for name in works:
            with Meter() as meter:
                ways[name]()
            seconds = statistics.median(times[name][1:] or times[name])
            outcomes[name] = outcomes[name]._replace(seconds=seconds, memory=meter.peak)
    return outcomes


def attempt(way: Way) -> Outcome:
    """The first run, which warms up: the result, or the exception in words."""
    start, remark = time.perf_counter(), ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            jac = way()
        except Exception as error:  # whatever a way raises is its row in the table
            jac, remark = None, first_sentence(error)
    slow = [first_sentence(w.message) for w in caught if "performance drop" in str(w.message)]
    return Outcome(jac, time.perf_counter() - start, 0, remark or "".join(slow[:1]))


def first_sentence(error: Exception | Warning | str) -> str:
    """The name of a warning or an exception, and the first sentence that it says."""
    sentence = str(error).strip().splitlines()[0].split(". ")[0]
    return f"{type(error).__name__}: {sentence.rstrip('.')}"


def time_of(way: Way) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


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
            line = f"{name:<34}  {outcome.remark}"
            print(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
            continue
        difference = "reference" if name == REFERENCE else distance(outcome.jac, reference)
        memory = f"{outcome.memory / 2**20:.1f} MiB"
        print(f"{name:<34}{as_time(outcome.seconds):>10}{memory:>14}{difference:>27}")
        if outcome.remark:
            print(textwrap.fill(outcome.remark, WIDTH, initial_indent="  ", subsequent_indent="  "))
    print()


def as_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def draw(tables: dict[str, dict[str, Outcome]], path: str) -> None:
    """Draw the times of all tables as bars on one logarithmic axis."""
    from matplotlib import pyplot  # noqa: PLC0415  an extra

    shape = {"nrows": 1, "ncols": len(tables), "sharex": True, "sharey": True}
    figure, axes = pyplot.subplots(**shape, figsize=(10, 3), layout="constrained")
    for ax, (title, table) in zip(axes, tables.items()):
        times = {name: 1e3 * o.seconds for name, o in table.items() if o.jac is not None}
        low = min(times.values()) / 3
        for name, outcome in table.items():
            kind = outcome.remark.split(":")[0]
            text = f"{as_time(outcome.seconds)} {'(slow fallback)' if kind else ''}"
            text, color = text if name in times else kind, "tab:red" if kind else "black"
            ax.barh(name, times.get(name, 0), color="tab:blue" if name == OURS else "0.75")
            ax.text(times.get(name, low) * 1.15, name, text, va="center", fontsize=8, color=color)
        ax.set(title=title, xscale="log", xlim=(low, 8 * max(times.values())))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    title = f"Jacobians of ten logits by 64 pixels for {COUNT} digits, milliseconds"
    figure.suptitle(f"{title} (torch {torch.__version__}, one CPU thread, float32)", fontsize=10)
    figure.savefig(path, dpi=150)
