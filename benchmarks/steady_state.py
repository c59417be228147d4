"""Steady-state cost of ``batch_jacobian`` beside what people write by hand.

Prints, for each network, the median time of every route in one process, interleaved in
random order, and the ratio of funcjac to the best of the others. The aim is at most 1.05
times the best plus 25 microseconds. Run it with ``make benchmark``; the machine's other work
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

import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap

import funcjac

Run = Callable[[], object]
Case = tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class LastStep(nn.Module):
    """The last output of an LSTM over the rows of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def cases() -> dict[str, Case]:
    """Name -> (network, the same for one sample, as vmap by hand needs it, input)."""
    plain = {
        "5-2-10, B=3": (mlp(5, 2, 10), 3, 5),
        "3-64-5, B=128": (mlp(3, 64, 5), 128, 3),
        "784-256-256-10, B=128": (mlp(784, 256, 256, 10), 128, 784),
        "4-256-256-512, B=128": (mlp(4, 256, 256, 512), 128, 4),
        "32-256-256-32, B=256": (mlp(32, 256, 256, 32), 256, 32),
    }
    found: dict[str, Case] = {
        name: (net, net, torch.randn(batch, width)) for name, (net, batch, width) in plain.items()
    }
    lstm = LastStep()
    found["LSTM 8x8-16-10, B=64"] = (lstm, lambda x: lstm(x[None])[0], torch.randn(64, 8, 8))
    conv = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    cnn = nn.Sequential(*conv, nn.Linear(128, 10))
    found["CNN 1x8x8-10, B=64"] = (cnn, lambda x: cnn(x[None])[0], torch.randn(64, 1, 8, 8))
    return found


# --- what people write by hand -----------------------------------------------------------


def sum_rows(func: nn.Module, x: Tensor) -> Tensor:
    """The sum trick, one output after the other."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        totals = func(x).sum(0).unbind()
    grads = [torch.autograd.grad(total, x, retain_graph=True)[0] for total in totals]
    return torch.stack(grads, 1)


def sum_vectorized(func: nn.Module, x: Tensor) -> Tensor:
    """The sum trick, all outputs at once."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        total = func(x).sum(0)
    eye = torch.eye(len(total))
    return torch.autograd.grad(total, x, eye, is_grads_batched=True)[0].movedim(0, 1)


def routes(case: Case) -> dict[str, Run]:
    func, sample, x = case
    jac = funcjac.batch_jacobian(func)
    return {
        "funcjac": lambda: jac(x),
        "vmap(jacrev)": lambda: vmap(jacrev(sample))(x),
        "vmap(jacfwd)": lambda: vmap(jacfwd(sample))(x),
        "sum, row by row": lambda: sum_rows(func, x),
        "sum, vectorized": lambda: sum_vectorized(func, x),
    }


# --- measuring ---------------------------------------------------------------------------


def measure(case: Case, seconds: float) -> dict[str, float]:
    """Median seconds of every route that works and is not hopelessly slow."""
    running = routes(case)
    times: dict[str, list[float]] = {}
    for name, run in list(running.items()):
        try:
            for _ in range(50 if name == "funcjac" else 2):  # until it has settled
                took = timed(run)
                if name != "funcjac" and took > 0.2:
                    break
        except (RuntimeError, NotImplementedError):
            del running[name]
            continue
        if took > 0.2:
            del running[name]
        times[name] = [took]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in random.sample(list(running), len(running)):
            times[name].append(timed(running[name]))
    return {name: statistics.median(found[1:] or found) for name, found in times.items()}


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="also write the numbers to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), medians in microseconds")
    names = list(routes(next(iter(cases().values()))))
    print(f"{'':<23}" + "".join(f"{name:>16}" for name in names) + f"{'ratio':>8}{'extra':>8}")
    everything = {}
    with torch.no_grad():  # the Jacobian alone: what people write by hand is detached as well
        for name, case in cases().items():
            found = everything[name] = measure(case, arguments.seconds)
            best = min(value for key, value in found.items() if key != "funcjac")
            cells = [
                f"{found[key] * 1e6:16.0f}" if key in found else f"{'fails':>16}" for key in names
            ]
            extra = (found["funcjac"] - best) * 1e6
            within = extra <= 0.05 * best * 1e6 + 25
            line = f"{name:<23}" + "".join(cells) + f"{found['funcjac'] / best:8.2f}{extra:8.0f}"
            print(line + ("" if within else "  over"))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(everything, file, indent=1)


if __name__ == "__main__":
    main()
