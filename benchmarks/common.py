"""Clocks, memory, comparison and reports that the benchmarks share."""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

Run = Callable[[], Any]
Func = Callable[..., Any]
Clock = Callable[[], float]


def options(description: str, *, baseline: bool = True) -> argparse.Namespace:
    """Parse the command line; set one thread, the seed and quiet warnings."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    if baseline:
        parser.add_argument("--baseline", help="folder that holds another version of funcjac")
        parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    return parser.parse_args()


now = time.perf_counter


def seconds(run: Run, repeats: int = 1) -> float:
    """The shortest of ``repeats`` runs."""
    times = []
    for _ in range(repeats):
        start = now()
        run()
        times.append(now() - start)
    return min(times)


def settled(run: Run, patience: float = 4.0) -> Run:
    """Call ``run`` 60 times, or at least 3 times until ``patience`` seconds are over."""
    run()  # may import modules for seconds
    end = now() + patience
    for count in range(59):
        if count >= 2 and now() > end:
            break
        run()
    return run


def repeats_of(run: Run) -> int:
    """Runs in one turn of a clock: 1 to 8, for about 4 ms."""
    return max(1, min(8, int(0.004 / seconds(run, 3))))


def interleaved(clocks: dict[str, Clock], budget: float, fewest: int) -> dict[str, float]:
    """Median of each clock over rounds in random order, until ``budget`` seconds are over."""
    times: dict[str, list[float]] = {name: [] for name in clocks}
    end, rounds = now() + budget, 0
    while rounds < fewest or now() < end:
        for name in random.sample(list(clocks), len(clocks)):
            times[name].append(clocks[name]())
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


def peak(run: Run) -> int:
    """Most bytes that one run holds at once, by the events of PyTorch's allocator."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler announces every start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0)


def flat(result: Any) -> Tensor:
    """All numbers of a tree in one vector."""
    return torch.cat([leaf.detach().flatten() for leaf in tree_leaves(result)])


def difference(result: Any, expected: Any) -> str:
    """Why two results are not the same to a thousandth of the largest entry, or ``""``."""
    shapes = [[tuple(leaf.shape) for leaf in tree_leaves(tree)] for tree in (result, expected)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} for {shapes[1]}"
    error = float((flat(result) - flat(expected)).abs().max() / flat(expected).abs().max())
    return "" if error < 1e-3 else f"off by {error:.1e} of the largest entry"


class Baseline:
    """Another version of funcjac, in a process that times settled calls on request."""

    def __init__(self, script: str, path: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, script, "--serve"],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, name: str, repeats: int) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, repeats]), file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline() or "nan")


def serve(make: Callable[[str], Run]) -> None:
    """Answer each ``[name, repeats]`` on standard input by the seconds of a settled call."""
    name, run = "", None
    for line in sys.stdin:
        wanted, repeats = json.loads(line)
        if run is None or name != wanted:
            name, run = wanted, settled(make(wanted))
        run()  # what the other process left in the caches is not this version's time
        print(seconds(run, repeats), flush=True)


def report(missed: list[str]) -> None:
    """Print a line for each limit that was missed."""
    print("\nall limits are kept" if not missed else "")
    for line in missed:
        print("MISSED", line)
