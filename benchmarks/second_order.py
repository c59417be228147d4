"""Steady-state cost of second derivatives beside what people write by hand.

Prints, for each problem, the median time of every way in one process, interleaved in random
order, the peak memory of the tensors it makes, and the ratio of funcjac to it, with the limit
that is aimed at. Values alone are computed without a graph, of networks whose parameters do not
require grad; a training step goes backward to the parameters. Before anything is timed, all
ways must agree. Run it with ``python benchmarks/second_order.py``; the machine's other work
moves absolute times, and single ratios by a few percent.
"""

import argparse
import itertools
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap

import funcjac
from funcjac._explain import Meter

Run = Callable[[], Tensor]
Func = Callable[[Tensor], Tensor]

# Calls of a funcjac transform until its choice has long been made.
SETTLED = 60


@dataclass(frozen=True)
class Case:
    """Ways to the same numbers, funcjac first, and the ratios to the others that are aimed at."""

    ways: dict[str, Run]
    limits: dict[str, float] = field(default_factory=dict)
    memory_limits: dict[str, float] = field(default_factory=dict)
    graph: bool = False


@dataclass(frozen=True)
class Found:
    """Median seconds and peak bytes of one way."""

    seconds: float
    peak: int


# --- networks ----------------------------------------------------------------------------


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    conv = [nn.Conv2d(1, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3), nn.Softplus(), nn.Flatten()]
    return nn.Sequential(*conv, nn.Linear(128, 1))


class Attention(nn.Module):
    """One block of a transformer: (..., 4, 8) -> (..., 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(8), nn.LayerNorm(8)
        self.project, self.merge = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(self.before(x)).unflatten(-1, (3, 2, 4)).transpose(-4, -2)
        query, key, value = heads.unbind(-3)  # (..., 2 heads, 4 steps, 4 features)
        weights = (query @ key.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.merge((weights @ value).transpose(-3, -2).flatten(-2))
        return self.head((x + self.mlp(self.between(x))).mean(-2))


# --- what people write by hand: all outputs (B, M), inputs (B, *in) ------------------------


def loop_diagonal(func: Func, x: Tensor, graph: bool = False) -> Tensor:
    """The double loop of autograd.grad: over the outputs, then over the coordinates."""
    rows = []
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        for out in func(x).unbind(-1):
            (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            slopes = first.flatten(1)
            rows.append(torch.stack([_bent(slopes, x, i, graph) for i in range(slopes.shape[1])]))
    return torch.stack(rows).movedim(2, 0).view(len(x), -1, *x.shape[1:])  # (M, N, B)


def _bent(slopes: Tensor, x: Tensor, i: int, graph: bool) -> Tensor:
    total = slopes[:, i].sum()
    (second,) = torch.autograd.grad(total, x, retain_graph=True, create_graph=graph)
    return second.flatten(1)[:, i]


def hessian_diagonal(sample: Func, x: Tensor) -> Tensor:
    """The whole Hessian, and its diagonal."""
    size = x[0].numel()
    hess = vmap(hessian(sample))(x).view(len(x), -1, size, size)
    return hess.diagonal(dim1=-2, dim2=-1).reshape(len(x), -1, *x.shape[1:])


def grad_diagonal(sample: Func, x: Tensor) -> Tensor:
    """One Hessian-vector product for each coordinate, of a function with a single output."""
    basis = torch.eye(x[0].numel()).view(-1, *x.shape[1:])
    slope = grad(lambda row: sample(row).squeeze(-1))
    along = lambda row, unit: (jvp(slope, (row,), (unit,))[1] * unit).sum()
    diagonal = vmap(vmap(along, in_dims=(None, 0)), in_dims=(0, None))(x, basis)
    return diagonal.view(len(x), 1, *x.shape[1:])


def forward_diagonal(sample: Func, x: Tensor) -> Tensor:
    """Forward mode in forward mode, for each coordinate, for all outputs at once."""
    basis = torch.eye(x[0].numel()).view(-1, *x.shape[1:])

    def along(row: Tensor, unit: Tensor) -> Tensor:
        return jvp(lambda r: jvp(sample, (r,), (unit,))[1], (row,), (unit,))[1]

    diagonal = vmap(vmap(along, in_dims=(None, 0), out_dims=-1), in_dims=(0, None))(x, basis)
    return diagonal.view(len(x), -1, *x.shape[1:])


def nested_thirds(func: Func, x: Tensor) -> Tensor:
    """u_xxx and u_xxt: three gradients, nested."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(func(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second[:, 0].sum(), x)
    return third


def loop_divergence(func: Func, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outs = func(x).sum(0).unbind()
    rows = [torch.autograd.grad(out, x, retain_graph=True)[0] for out in outs]
    return torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)


# --- cases -------------------------------------------------------------------------------


def diagonals(net: nn.Module, x: Tensor, limits: dict[str, float], forward: bool = True) -> Case:
    """The diagonal, without a graph; ``forward`` mode nested is wrong for a LayerNorm."""
    net.requires_grad_(False)
    diag = funcjac.batch_hessian_diagonal(net)
    ways: dict[str, Run] = {
        "funcjac": lambda: diag(x),
        "loop of autograd.grad": lambda: loop_diagonal(net, x),
        "vmap(hessian)": lambda: hessian_diagonal(net, x),
    }
    if net(x).shape[-1] == 1:
        ways["vmap(jvp of grad)"] = lambda: grad_diagonal(net, x)
    if forward:
        ways["vmap(jvp of jvp)"] = lambda: forward_diagonal(net, x)
    return Case(ways, limits)


def laplacians(
    net: nn.Module, sample: Func, x: Tensor, limits: dict[str, float], memory: dict[str, float]
) -> Case:
    """The Laplacian of a single output, without a graph."""
    net.requires_grad_(False)
    lap = funcjac.batch_laplacian(net)
    trace = lambda diag: diag.flatten(2).sum(2)  # (B, M, *in) -> (B, M)
    ways: dict[str, Run] = {
        "funcjac": lambda: lap(x),
        "loop of autograd.grad": lambda: trace(loop_diagonal(net, x)),
        "vmap(hessian)": lambda: trace(hessian_diagonal(sample, x)),
        "vmap(jvp of grad)": lambda: trace(grad_diagonal(sample, x)),
    }
    return Case(ways, limits, memory)


def steps(net: nn.Module, x: Tensor, limits: dict[str, float]) -> Case:
    """A training step: to the parameters' gradients, all in one vector."""
    params = list(net.parameters())
    diag = funcjac.batch_hessian_diagonal(net)
    targets = torch.randn_like(diag(x))

    def step(second: Tensor) -> Tensor:
        loss = (second - targets).square().mean()
        grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        return torch.cat([one.flatten() for one in grads])

    ways: dict[str, Run] = {
        "funcjac": lambda: step(diag(x)),
        "loop of autograd.grad": lambda: step(loop_diagonal(net, x, graph=True)),
        "vmap(hessian)": lambda: step(hessian_diagonal(net, x)),
        "vmap(jvp of jvp)": lambda: step(forward_diagonal(net, x)),
    }
    return Case(ways, limits, graph=True)


def thirds(net: nn.Module, x: Tensor, limits: dict[str, float]) -> Case:
    net.requires_grad_(False)
    partials = funcjac.batch_partials(net, [(0, 0, 0), (0, 0, 1)])
    ways: dict[str, Run] = {
        "funcjac": lambda: torch.cat(partials(x), 1),
        "loop of autograd.grad": lambda: nested_thirds(net, x),
    }
    return Case(ways, limits)


def divergences(net: nn.Module, x: Tensor) -> Case:
    net.requires_grad_(False)
    divergence = funcjac.batch_divergence(net)
    ways: dict[str, Run] = {
        "funcjac": lambda: divergence(x),
        "loop of autograd.grad": lambda: loop_divergence(net, x),
        "vmap(jacrev)": lambda: vmap(jacrev(net))(x).diagonal(dim1=1, dim2=2).sum(-1),
    }
    return Case(ways)


def cases() -> dict[str, Case]:
    """Name -> ways and limits: what is aimed at, or no slower than any of the others."""
    loop, whole, product = "loop of autograd.grad", "vmap(hessian)", "vmap(jvp of grad)"
    best = {loop: 1.0, whole: 1.0, product: 1.0}
    net, block = cnn(), Attention()
    points, flow = torch.randn(1024, 3), torch.randn(256, 8)
    plane, images = torch.randn(1024, 2), torch.randn(64, 1, 8, 8)
    wide, wave = mlp(50, 256, 256, 1), (2, 64, 64, 64, 64, 1)
    return {
        "diagonal, 3-64-64-64-3, B=1024": diagonals(
            mlp(3, 64, 64, 64, 3), points, {whole: 0.3, loop: 0.3}
        ),
        "diagonal, 2-64x4-1, B=1024": diagonals(mlp(*wave), plane, {loop: 0.75}),
        "training step, 3-64-64-64-3, B=1024": steps(mlp(3, 64, 64, 64, 3), points, {loop: 0.4}),
        "training step, 2-64x4-1, B=1024": steps(mlp(*wave), plane, {}),
        "Laplacian, 50-256-256-1, B=32": laplacians(
            wide, wide, torch.randn(32, 50), {whole: 0.4}, {whole: 0.5}
        ),
        "Laplacian, CNN 1x8x8-1, B=64": laplacians(
            net, lambda image: net(image[None])[0], images, best, {}
        ),
        "diagonal, attention 4x8-1, B=64": diagonals(
            block, torch.randn(64, 4, 8), best, forward=False
        ),
        "u_xxx, u_xxt, 2-64x4-1, B=1024": thirds(mlp(*wave), plane, {loop: 1.0}),
        "divergence, 8-64-64-8, B=256": divergences(mlp(8, 64, 64, 8), flow),
    }


# --- measuring ---------------------------------------------------------------------------


def measure(case: Case, seconds: float) -> dict[str, Found]:
    """Median seconds and peak memory of every way, after a look at whether they agree."""
    for _ in range(SETTLED):
        case.ways["funcjac"]()
    check_agreement(case)
    times: dict[str, list[float]] = {name: [] for name in case.ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in random.sample(list(case.ways), len(case.ways)):
            times[name].append(timed(case.ways[name]))
    return {
        name: Found(statistics.median(times[name]), peak(run)) for name, run in case.ways.items()
    }


def check_agreement(case: Case) -> None:
    """Raise unless all ways give the same, to a thousandth of the largest entry."""
    results = {name: run() for name, run in case.ways.items()}
    expected = results["loop of autograd.grad"]
    for name, result in results.items():
        assert result.shape == expected.shape, f"{name}: {result.shape}, not {expected.shape}"
        error = float((result - expected).abs().max() / expected.abs().max())
        assert error < 1e-3, f"{name} is off by {error:.1e} of the largest entry"


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak(run: Run) -> int:
    with Meter() as meter:
        run()
    return meter.peak


def report(case: Case, found: dict[str, Found]) -> list[dict[str, Any]]:
    """Print a line for each way; returns the same for a file."""
    ours, lines = found["funcjac"], []
    for name, way in found.items():
        pairs = [
            (ours.seconds / way.seconds, case.limits.get(name)),
            (ours.peak / way.peak, case.memory_limits.get(name)),
        ]
        cells = [f"{way.seconds * 1e6:9.0f}", f"{way.peak / 2**20:9.2f}"]
        if name != "funcjac":
            cells += [f"{ratio:9.2f} {verdict(ratio, limit):<14}" for ratio, limit in pairs]
        print(f"  {name:<24}" + "".join(cells).rstrip())
        (time_ratio, time_limit), (memory_ratio, memory_limit) = pairs
        lines.append(
            {
                "way": name,
                "seconds": way.seconds,
                "peak_bytes": way.peak,
                "time_ratio": time_ratio,
                "time_limit": time_limit,
                "memory_ratio": memory_ratio,
                "memory_limit": memory_limit,
            }
        )
    return lines


def verdict(ratio: float, limit: float | None) -> str:
    if limit is None:
        return ""
    return f"{'<=' if ratio <= limit else 'OVER'} {limit:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each problem")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), float32, medians")
    header = f"{'time, us':>9}{'peak, MiB':>10}{'ratio':>8}{'':>15}{'ratio, peak':>12}"
    print(f"{'':<25}{header}")
    everything = {}
    for name, case in cases().items():
        if arguments.only not in name:
            continue
        print(name)
        with torch.set_grad_enabled(case.graph):
            everything[name] = report(case, measure(case, arguments.seconds))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
