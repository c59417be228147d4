"""Little memory: with ``chunk_size`` it is enough, without it there is an error to catch.

Each engine runs its cases in one child process that may have 64 MiB more than what it has after
importing torch and one small call. Nothing may kill it, and small calls are right afterwards.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 96
CODE = """
import json, resource, sys, warnings
import torch
from funcjac import *

torch.set_num_threads(1)
engine = {engine!r}
B, N = 8, 256
# Rows of 40 kB and more between input and output: 1.25 MB for the batch, three times the limit for
# all rows of the basis at once.
WIDE = lambda x: x.repeat(1, 160).sin().unflatten(1, (160, N)).mean(1)
ONE = lambda x: x.repeat(1, 160).sin().mean(1)  # whose first and second derivatives travel
FIELD = lambda x: WIDE(x) / N
# A result of ten times the limit, but for two rows
LONG = lambda x: x.repeat(1, 2 if x.shape[-1] == 8 else 320).sin()

diagonal = lambda x: torch.diag_embed(x.cos())
CASES = {{
    "jacobian rev 2": (batch_jacobian, WIDE, dict(mode="rev", chunk_size=2), diagonal),
    "jacobian fwd 2": (batch_jacobian, WIDE, dict(mode="fwd", chunk_size=2), diagonal),
    "jacobian auto 2": (batch_jacobian, WIDE, dict(chunk_size=2), diagonal),
    "jacobian auto None": (batch_jacobian, WIDE, dict(), diagonal),
    "divergence 2": (batch_divergence, FIELD, dict(chunk_size=2), lambda x: x.cos().mean(1)),
    "hessian 2": (
        batch_hessian, ONE, dict(chunk_size=2), lambda x: torch.diag_embed(-x.sin() / N)
    ),
    "diagonal 2": (batch_hessian_diagonal, ONE, dict(chunk_size=2), lambda x: -x.sin() / N),
    "laplacian 2": (batch_laplacian, ONE, dict(chunk_size=2), lambda x: (-x.sin() / N).sum(1)),
    "laplacian None": (batch_laplacian, ONE, dict(), lambda x: (-x.sin() / N).sum(1)),
    "long": (batch_jacobian, LONG, dict(chunk_size=2), lambda x: diagonal(x).repeat(1, 2, 1)),
}}
if engine != "auto":
    CASES = {{name: case for name, case in CASES.items() if case[0] is batch_jacobian}}


def pages():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()


def state(x):
    return (x._version, x.requires_grad, x.grad, x.sum().item(), torch.is_grad_enabled(),
            torch.get_rng_state().tolist(), torch._C._functorch.peek_interpreter_stack(),
            torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack())


def report(name, transformed, small, right, x):
    before, error, worst = state(x), None, None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = transformed(x)
            if name != "long":
                worst = (found - right(x)).abs().max().item()
            del found
        except BaseException as raised:
            error = [type(raised).__name__, str(raised)]
    same = state(x) == before
    try:
        later = (transformed(small) - right(small)).abs().max().item()
    except Exception as raised:
        later = str(raised)
    print(json.dumps(dict(name=name, error=error, worst=worst, same=same, later=later)))


x, small = torch.randn(B, N), torch.randn(2, N)
for make in dict.fromkeys(case[0] for case in CASES.values()):
    make(torch.sin, engine=engine, chunk_size=2)(small[:, :3])
batch_jacobian(torch.sin, engine=engine, mode="fwd")(small[:, :3])
resource.setrlimit(resource.RLIMIT_AS, (pages() + {limit} * 2**20,) * 2)
for name, (make, func, words, right) in CASES.items():
    transformed = make(func, engine=engine, **words)
    report(name, transformed, small[:, :8] if name == "long" else small, right, x)
"""
FIRST = ("jacobian rev 2", "jacobian fwd 2", "jacobian auto 2")
SECOND = ("divergence 2", "hessian 2", "diagonal 2", "laplacian 2")
ENGINES = ("vmap", "sum", "loop", "auto")
# torch.func has its own way with chunks of jacrev and jacfwd.
ENOUGH = [(e, name) for e in ("sum", "loop", "auto") for name in FIRST]
ENOUGH += [("vmap", "jacobian auto 2"), *[("auto", name) for name in SECOND]]


@functools.cache
def child(engine):
    """What each case came to, by name."""
    found = subprocess.run(
        [sys.executable, "-c", CODE.format(engine=engine, limit=LIMIT)],
        # A thread's own arena takes 64 MiB of addresses, when it comes to have one.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert found.returncode == 0, (found.returncode, found.stderr[-2000:])  # never killed
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    return {line["name"]: line for line in lines}


def unharmed(found):
    assert found["same"]
    assert isinstance(found["later"], float), found["later"]
    assert found["later"] < 1e-5


@pytest.mark.parametrize(("engine", "name"), ENOUGH)
def test_chunks_are_enough(engine, name):
    found = child(engine)[name]
    assert found["error"] is None
    assert found["worst"] < 1e-5
    unharmed(found)


@pytest.mark.parametrize("name", ["jacobian auto None", "laplacian None"])
def test_auto_bounds_its_memory_by_itself(name):
    """A pass holds no more than some multiple of the one run, or it is chunked."""
    found = child("auto")[name]
    assert found["error"] is None
    assert found["worst"] < 1e-5
    unharmed(found)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_result_that_does_not_fit_raises_an_error_to_catch(engine):
    """The remedy is fewer rows or more memory, and no other engine."""
    found = child(engine)["long"]
    kind, text = found["error"]
    assert kind in ("RuntimeError", "MemoryError", "OutOfMemoryError")
    assert "allocate" in text
    assert "memory" in text.split(":")[1]
    assert "cannot differentiate func" not in text
    unharmed(found)
