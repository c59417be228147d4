"""Little memory: with ``chunk_size`` it is enough, without it there is an error to catch.

Each group of cases runs in a child process that may have 64 MiB more than what it has after
importing torch and one small call. Nothing may kill it, and small calls are right afterwards.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 64
PREAMBLE = """
import json, resource, sys, warnings
import torch
import funcjac
from funcjac import *
from funcjac._native import keep_memory

torch.set_num_threads(1)
LIMIT = {limit} * 2**20
B, N = 8, 256
# Rows of 40 kB and more between input and output: 2.5 MB for the batch, ten times the limit for
# all rows of the basis at once.
WIDE = lambda x: x.repeat(1, 320).sin().unflatten(1, (320, N)).mean(1)
ONE = lambda x: x.repeat(1, 160).sin().mean(1)  # whose first and second derivatives travel
SECOND = dict(hess=batch_hessian, diag=batch_hessian_diagonal, lap=batch_laplacian)


class Net(torch.nn.Module):
    def __init__(self, func):
        super().__init__()
        self.func, self.last = func, None
        self.linear = torch.nn.Linear(N, N).requires_grad_(False)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.last = x
        self.runs = self.runs + 1
        return self.func(x)


def state(net, x):
    return (net.runs.item(), net.last, x._version, x.requires_grad, x.grad, x.sum().item(),
            torch.is_grad_enabled(), torch.get_rng_state().tolist(),
            torch.autograd.forward_ad._current_level,
            torch._C._functorch.peek_interpreter_stack(),
            torch._C._functorch._is_vmap_fallback_enabled(),
            torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack())


def pages():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()


def report(name, transformed, func, small, right, x):
    before = state(func, x) if isinstance(func, Net) else None
    said, error, worst = [], None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = transformed(x)
            if found.numel() < 2**20:
                worst = (found - right(x)).abs().max().item()
            del found
        except BaseException as raised:
            error = [type(raised).__name__, str(raised)]
    said = [[w.category.__name__, str(w.message)] for w in caught]
    same = before is None or state(func, x) == before
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            later = (transformed(small) - right(small)).abs().max().item()
        except Exception as raised:
            later = str(raised)
    print(json.dumps(dict(name=name, error=error, said=said, worst=worst, same=same, later=later)))


x, small = torch.randn(B, N), torch.randn(2, N)
for warm in (batch_jacobian, *SECOND.values()):
    warm(torch.sin, chunk_size=8)(small[:, :3])
    for engine in ("vmap", "sum", "loop"):
        warm(torch.sin, engine=engine)(small[:, :3])
batch_jacobian(torch.sin, mode="fwd")(small[:, :3])
resource.setrlimit(resource.RLIMIT_AS, (pages() + LIMIT,) * 2)
"""

WIDE = """
right = lambda x: torch.diag_embed(x.cos())
for engine, mode, chunk in {routes}:
    func = Net(WIDE)
    jacobian = batch_jacobian(func, engine=engine, mode=mode, chunk_size=eval(chunk))
    report(f"{{engine}} {{mode}} {{chunk}}", jacobian, func, small, right, x)
"""
ONE = """
which = dict(
    diag=lambda x: -x.sin() / N,
    lap=lambda x: (-x.sin() / N).sum(1),
    hess=lambda x: torch.diag_embed(-x.sin() / N),
)
for name, mode, chunk in {routes}:
    func = Net(ONE)
    transformed = SECOND[name](func, mode=mode, chunk_size=eval(chunk))
    report(f"{{name}} {{mode}} {{chunk}}", transformed, func, small, which[name], x)
"""
TRACE = """
right = lambda x: x.cos().mean(1)
for engine, mode, chunk in {routes}:
    func = Net(lambda x: WIDE(x) / N)
    divergence = batch_divergence(func, engine=engine, mode=mode, chunk_size=eval(chunk))
    report(f"{{engine}} {{mode}} {{chunk}}", divergence, func, small, right, x)
"""
# A result of ten times the limit, but for two rows
LONG = """
right_few = lambda x: torch.diag_embed(x.cos()).repeat(1, 2, 1)
for engine, mode, chunk in {routes}:
    func = Net(lambda x, count=None: x.repeat(1, 2 if x.shape[-1] == 8 else 320).sin())
    jacobian = batch_jacobian(func, engine=engine, mode=mode, chunk_size=eval(chunk))
    report(f"{{engine}} {{mode}} {{chunk}}", jacobian, func, small[:, :8], right_few, x)
"""


@functools.cache
def child(code, *routes, limit=LIMIT):
    """What each case came to, by name."""
    whole = PREAMBLE.format(limit=limit) + code.format(routes=[r.split() for r in routes])
    found = subprocess.run(
        [sys.executable, "-c", whole],
        # A thread's own arena takes 64 MiB of addresses, when it comes to have one.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parent.parent,
    )
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])  # never killed
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    return {line["name"]: line for line in lines}


def is_allocators(text):
    return "allocate" in text and "memory" in text


def finishes(found):
    assert found["error"] is None
    assert found["worst"] is None or found["worst"] < 1e-5
    assert found["said"] == []
    unharmed(found)


def unharmed(found):
    assert found["same"]
    assert isinstance(found["later"], float), found["later"]
    assert found["later"] < 1e-5


def finishes_or_says_so(found):
    if found["error"] is not None:
        kind, text = found["error"]
        assert kind in ("RuntimeError", "MemoryError", "OutOfMemoryError")
        assert is_allocators(text)
    else:
        assert found["worst"] is None or found["worst"] < 1e-5
    assert all(is_allocators(text) for _, text in found["said"])
    unharmed(found)


FIRST = ("vmap rev 2", "vmap fwd 2", "sum rev 2", "sum fwd 2", "loop rev 2", "auto auto 2")


@pytest.mark.parametrize("route", FIRST)
def test_chunks_are_enough(route):
    finishes(child(WIDE, *FIRST)[route])


SECOND = ("diag taylor 2", "lap taylor 2", "lap rev_over_rev 2", "hess auto 2")


@pytest.mark.parametrize("route", SECOND)
def test_chunks_are_enough_for_second_derivatives(route):
    finishes(child(ONE, *SECOND)[route])


TRACES = ("vmap rev 2", "vmap fwd 2", "sum rev 2", "auto auto 2")


@pytest.mark.parametrize("route", TRACES)
def test_chunks_are_enough_for_divergences(route):
    finishes(child(TRACE, *TRACES)[route])


TAYLOR = ("diag taylor None", "lap taylor None")


@pytest.mark.parametrize("route", TAYLOR)
def test_without_chunks_second_derivatives_say_so(route):
    found = child(ONE, *TAYLOR)[route]
    found["later"] = 0.0  # its own test is the next
    finishes_or_says_so(found)


SMALL = """
with warnings.catch_warnings():
    warnings.simplefilter("error")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (min(pages() + 2**24, hard), hard))
    keep_memory.cache_clear()  # as in a process that has not used Taylor propagation yet
    y = torch.randn(64, 64)
    for name, mode in {routes}:
        func = Net(lambda x: x.sin().mean(1))
        found = SECOND[name](func, mode=mode)
        right = dict(diag=lambda x: -x.sin() / 64, lap=lambda x: (-x.sin() / 64).sum(1))[name]
        keep_memory.cache_clear()
        report(name + " " + mode, found, func, y, right, y)
"""


@pytest.mark.parametrize("route", ["diag taylor", "lap taylor"])
def test_a_small_problem_needs_little(route):
    """2 MB in all, with 16 MiB left."""
    finishes(child(SMALL, "diag taylor", "lap taylor")[route])


WHOLE = tuple(f"{route} None" for route in ("vmap rev", "vmap fwd", "sum rev", "auto auto"))


@pytest.mark.parametrize("route", WHOLE)
def test_without_chunks_it_finishes_or_says_so(route):
    found = child(WIDE, *WHOLE)[route]
    if found["error"] is not None:  # the small call has all columns at once, as well
        assert isinstance(found["later"], float) or is_allocators(found["later"])
        found["later"] = 0.0
    finishes_or_says_so(found)


RESULTS = ("vmap fwd 2", "sum fwd 2", "loop fwd None", "vmap fwd None", "auto fwd None")


@pytest.mark.parametrize("route", RESULTS)
def test_a_result_that_does_not_fit(route):
    found = child(LONG, *RESULTS)[route]
    assert found["error"] is not None
    finishes_or_says_so(found)
    assert found["said"] == []


@pytest.mark.parametrize("route", RESULTS)
def test_what_does_not_fit_is_called_so(route):
    """The remedy is ``chunk_size``, fewer rows or more memory, and no other engine."""
    _, text = child(LONG, *RESULTS)[route]["error"]
    assert "cannot differentiate func" not in text
    assert "memory" in text.split(":")[1]
