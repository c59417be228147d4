"""How far the rule that chooses mode and chunk size is from the best fixed choice.

Prints, for each network, the time of ``batch_jacobian`` with each mode and chunk size, relative to
the best of them, what ``auto`` takes by ``explain``, and the time of ``auto``. One process, one
thread, random order in every round, parameters frozen.
"""

import statistics
from collections.abc import Callable
from typing import Any

import common
import torch
from common import Clock, Run
from networks import Arm, LastStep, cnn, mlp
from torch import Tensor, nn

import funcjac

Choice = tuple[str, int]
CHUNKS = (1, 4, 16, 64)
# A fixed choice whose only run takes so many times the fastest is not timed again.
HOPELESS = 4


def dense(batch: int, *widths: int) -> tuple[nn.Module, Tensor]:
    return mlp(*widths), torch.randn(batch, widths[0])


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    return {
        "5-2-10 B=3": dense(3, 5, 2, 10),
        "3-64-5 B=128": dense(128, 3, 64, 5),
        "4-48-7 B=90": dense(90, 4, 48, 7),
        "8-64-64-24 B=16": dense(16, 8, 64, 64, 24),
        "784-256-256-10 B=128": dense(128, 784, 256, 256, 10),
        "4-256-256-512 B=128": dense(128, 4, 256, 256, 512),
        "32-256-256-32 B=256": dense(256, 32, 256, 256, 32),
        "256-16-256 B=128": dense(128, 256, 16, 256),
        "784-256-32-256-784 B=32": dense(32, 784, 256, 32, 256, 784),
        "LSTM 10x8-32-5 B=32": (LastStep(), torch.randn(32, 10, 8)),
        "CNN 1x14x14-10 B=32": (cnn(), torch.randn(32, 1, 14, 14)),
        "arm of 7 joints B=256": (Arm(), torch.randn(256, 7)),
    }


def choices(outputs: int, inputs: int) -> list[Choice]:
    """Modes and chunk sizes; the first chunk of each mode is the whole basis."""
    sizes = {"rev": outputs, "fwd": inputs}
    return [
        (mode, chunk)
        for mode, size in sizes.items()
        for chunk in (size, *(chunk for chunk in reversed(CHUNKS) if chunk < size))
    ]


def measure(net: nn.Module, x: Tensor, quick: bool) -> tuple[dict[Any, float], str]:
    """Seconds of ``"auto"`` and of each choice worth timing; what auto takes."""
    auto = funcjac.batch_jacobian(net)
    sizes = net(x)[0].numel(), x[0].numel()
    runs: dict[Any, Run] = {}
    for mode, chunk in choices(*sizes):
        jacobian = funcjac.batch_jacobian(net, mode=mode, chunk_size=chunk)
        runs[mode, chunk] = bind(jacobian, x)
    firsts: dict[Any, float] = {}
    fastest = float("inf")
    for choice, run in runs.items():
        firsts[choice] = common.seconds(run)
        if firsts[choice] < 5 * HOPELESS * fastest:  # a first call is verified
            firsts[choice] = common.seconds(common.settled(run, 0.1), 3)
        fastest = min(fastest, firsts[choice])
    runs = {choice: run for choice, run in runs.items() if firsts[choice] < HOPELESS * fastest}
    runs["auto"] = common.settled(bind(auto, x), 2)
    repeats = common.repeats_of(runs["auto"])
    clocks: dict[Any, Clock] = {key: clock(run, repeats) for key, run in runs.items()}
    times = common.interleaved(clocks, 1 if quick else 6, 3 if quick else 7)
    took = funcjac.explain(auto, x)
    whole = sizes[1] if took.mode == "fwd" else sizes[0]
    return firsts | times, f"{took.mode} {min(took.chunk or whole, whole)}"


def bind(jacobian: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    return lambda: jacobian(x)


def clock(run: Run, repeats: int) -> Clock:
    return lambda: common.seconds(run, repeats)


def line(name: str, times: dict[Any, float], took: str) -> tuple[str, float]:
    """A line of the table, and the time of auto relative to the best fixed choice."""
    fixed = {choice: time for choice, time in times.items() if choice != "auto"}
    best = min(fixed, key=lambda choice: fixed[choice])
    ratio = times["auto"] / fixed[best]
    cells = [f"{mode} {chunk}: {time / fixed[best]:.2f}" for (mode, chunk), time in fixed.items()]
    text = f"{name:<26}{fixed[best] * 1e3:9.3f} {' '.join(map(str, best)):>9}{took:>9}{ratio:7.2f}"
    return f"{text}   {', '.join(cells)}", ratio


def main() -> None:
    arguments = common.options(__doc__, baseline=False)
    print(f"torch {torch.__version__}, one thread, float32, medians")
    print(f"{'':<26}{'best ms':>9} {'best':>9}{'auto':>9}{'ratio':>7}   relative to the best")
    ratios: dict[str, float] = {}
    missed = []
    for name, (net, x) in cases().items():
        if arguments.only not in name:
            continue
        try:
            text, ratios[name] = line(name, *measure(net.requires_grad_(False), x, arguments.quick))
        except Exception as error:  # a version at work may refuse one case and do the next
            missed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            continue
        print(text, flush=True)
        if ratios[name] > 1.1:
            missed.append(f"{name}: auto takes {ratios[name]:.2f} of the best, limit 1.1")
    if ratios:
        worst = max(ratios, key=lambda name: ratios[name])
        mean = statistics.geometric_mean(ratios.values())
        print(f"\nworst {ratios[worst]:.2f} ({worst}), geometric mean {mean:.3f}")
    common.report(missed)


if __name__ == "__main__":
    main()
