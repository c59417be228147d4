"""First calls in fresh processes, and whether results are the same under load.

Starts processes that import torch and funcjac and make one call each, and prints the median time
of that call and whether ``torch._dynamo`` was imported. With ``--reproducible`` it compares, bit
by bit, 25 calls of each of twelve transforms beside a process that keeps a core busy.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from networks import LastStep, cnn, mlp
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import funcjac

LIMIT = 0.25  # seconds
TRANSFORMS, CALLS = 12, 25


def problems() -> dict[str, tuple[Callable[..., Callable], nn.Module, Tensor]]:
    """Name -> transform, network, input; small enough for many calls."""
    partials = lambda func: funcjac.batch_partials(func, [(1,), (0,), (0, 0)])
    return {
        "Jacobian 5-2-10 B=3": (funcjac.batch_jacobian, mlp(5, 2, 10), torch.randn(3, 5)),
        "Jacobian 4-48-7 B=90": (funcjac.batch_jacobian, mlp(4, 48, 7), torch.randn(90, 4)),
        "Jacobian LSTM B=32": (funcjac.batch_jacobian, LastStep(), torch.randn(32, 10, 8)),
        "Jacobian CNN B=32": (funcjac.batch_jacobian, cnn(), torch.randn(32, 1, 14, 14)),
        "Hessian 3-16-1 B=32": (funcjac.batch_hessian, mlp(3, 16, 1), torch.randn(32, 3)),
        "partials 2-32-32-1 B=200": (partials, mlp(2, 32, 32, 1), torch.rand(200, 2)),
        "diagonal 3-32-32-3 B=100": (
            funcjac.batch_hessian_diagonal,
            mlp(3, 32, 32, 3),
            torch.randn(100, 3),
        ),
        "Laplacian 10-64-1 B=64": (funcjac.batch_laplacian, mlp(10, 64, 1), torch.randn(64, 10)),
        "divergence 8-32-8 B=64": (funcjac.batch_divergence, mlp(8, 32, 8), torch.randn(64, 8)),
    }


def call_once(name: str) -> None:
    """Print the seconds of one call, and whether torch._dynamo was imported by it."""
    transform, net, x = problems()[name]
    before = "torch._dynamo" in sys.modules
    start = time.perf_counter()
    transform(net)(x)
    elapsed = time.perf_counter() - start
    print(json.dumps([elapsed, before, "torch._dynamo" in sys.modules]))


def in_fresh_process(name: str) -> tuple[float, bool, bool]:
    command = [sys.executable, __file__, "--call", name]
    finished = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    elapsed, before, after = json.loads(finished.stdout)
    return elapsed, before, after


def first_calls(names: list[str], repeats: int) -> list[str]:
    """Print a line for each problem; returns a line for each missed limit."""
    missed = []
    print(f"{'first call of a process, limit 0.25 s':<40}{'median s':>10}{'torch._dynamo':>20}")
    for name in names:
        runs = [in_fresh_process(name) for _ in range(repeats)]
        elapsed = statistics.median(run[0] for run in runs)
        _, before, after = runs[0]
        state = "imported with torch" if before else ("imported by the call" if after else "no")
        print(f"{name:<40}{elapsed:10.3f}{state:>20}", flush=True)
        if elapsed > LIMIT:
            missed.append(f"{name}: first call {elapsed:.3f} s, limit {LIMIT:g}")
        if after:
            missed.append(f"{name}: torch._dynamo is {state}")
    return missed


def reproducibility(names: list[str]) -> None:
    """Print, for each problem, how many calls differ in a bit from the first.

    Raises:
        AssertionError: some do.
    """
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    print(
        f"\n{TRANSFORMS} transforms, {CALLS} calls each, beside a busy process: calls that differ"
    )
    differing = []
    try:
        for name in names:
            count = calls_that_differ(name)
            print(f"{name:<40}{count:>6} of {TRANSFORMS * CALLS}", flush=True)
            differing += [name] * bool(count)
    finally:
        busy.kill()
        busy.wait()
    assert not differing, f"results differ: {', '.join(differing)}"


def calls_that_differ(name: str) -> int:
    transform, net, x = problems()[name]
    expected, count = None, 0
    for _ in range(TRANSFORMS):
        transformed = transform(net)
        for _ in range(CALLS):
            leaves = [leaf.detach() for leaf in tree_leaves(transformed(x))]
            expected = expected or leaves
            count += not all(map(torch.equal, leaves, expected))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two processes for each problem")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    parser.add_argument("--reproducible", action="store_true", help="compare bits under load")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.call:
        call_once(arguments.call)
        return
    names = [name for name in problems() if arguments.only in name]
    missed = first_calls(names, 2 if arguments.quick else 5)
    print("\nall limits are kept" if not missed else "")
    for text in missed:
        print("MISSED", text)
    if arguments.reproducible:
        reproducibility(names)


if __name__ == "__main__":
    main()
