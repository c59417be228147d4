"""One transform in several threads: first calls at once, settled calls, whatever each one does."""

import contextlib
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

from funcjac import (
    BatchMixingError,
    EngineFallbackWarning,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    check_batched,
    check_derivative,
    explain,
)

THREADS = 4
WAIT = 20.0  # seconds after which a thread counts as stuck
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
TRANSFORMS = {
    "batch_jacobian": batch_jacobian,
    "batch_hessian": batch_hessian,
    "batch_hessian_diagonal": batch_hessian_diagonal,
    "batch_laplacian": batch_laplacian,
    "batch_divergence": batch_divergence,
    "batch_partials": lambda func, **words: batch_partials(func, [(0,), (1, 1)], **words),
}
by_name = pytest.mark.parametrize("name", TRANSFORMS)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    torch._C._functorch._set_vmap_fallback_enabled(True)  # for the tests after a failure


def together(*works):
    """Run all at once, each in a thread of its own; what they raised."""
    barrier, raised = threading.Barrier(len(works)), {}

    def run(i, work):
        barrier.wait(WAIT)
        try:
            work()
        except BaseException as error:
            raised[i] = error

    threads = [
        threading.Thread(target=run, args=(i, work), daemon=True) for i, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "stuck"
    return raised


@contextlib.contextmanager
def meanwhile(inside, leave):
    """The body runs once ``inside`` is set in another thread, which goes on after it."""
    assert inside.wait(WAIT)
    try:
        yield
    finally:
        leave.set()


def tensors(found):
    """All tensors of a result, without their graphs."""
    if isinstance(found, torch.Tensor):
        return [found.detach()]
    return [leaf for part in found for leaf in tensors(part)]


# --- the same transform from all threads -------------------------------------------------------

FUNCTIONS = {
    "network": network,
    "batch norm, eval": lambda: nn.Sequential(network(), nn.BatchNorm1d(3).double()).eval(),
    "layer norm": lambda: nn.Sequential(network(), nn.LayerNorm(3).double(), network()),
    "torch.func inside": lambda: (
        lambda x: torch.vmap(torch.func.jacrev(lambda row: row.sin() * row.sum()))(x).sum(2)
    ),
    "lstm": lambda: Last(),
}


class Last(nn.Module):
    """Nothing that vmap can do."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True).double()

    def forward(self, x):
        return self.lstm(x.unsqueeze(2))[0][:, -1]


FEW = ("batch_jacobian", "batch_laplacian")  # of what takes long


@quiet
@by_name
@pytest.mark.parametrize("engine", ["auto", "vmap", "sum"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_calls_at_once(function, engine, name):
    """First calls and those after them, in each grad mode, of shapes that differ and agree."""
    if function == "lstm" and (engine == "vmap" or name not in FEW):
        return  # vmap refuses it in one thread, too
    func, transform = FUNCTIONS[function](), TRANSFORMS[name]
    xs = [randn(2 + i % 2, 3) for i in range(THREADS)]
    expected = [tensors(transform(func, engine="loop")(x)) for x in xs]
    transformed = transform(func, engine=engine)

    def work(i):
        with torch.set_grad_enabled(i % 2 == 0):
            for _ in range(6):
                found = transformed(xs[i])
                close(tensors(found), expected[i])
                assert torch.is_grad_enabled() == (i % 2 == 0)

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])


@by_name
@pytest.mark.parametrize("engine", ["auto", "vmap", "sum"])
def test_aux_and_value_are_those_of_the_call(engine, name):
    net = network()
    func = lambda x, tag: (net(x), {"tag": tag, "input": x * 1})
    transformed = TRANSFORMS[name](func, engine=engine, has_aux=True, return_value=True)
    xs = [randn(3, 3) for _ in range(THREADS)]
    expected = [tensors(TRANSFORMS[name](net, engine="loop")(x)) for x in xs]

    def work(i):
        for _ in range(6):
            found, rest = transformed(xs[i], f"of thread {i}")
            value, aux = rest if isinstance(rest[1], dict) else rest[1]
            close(tensors(found), expected[i])
            close(value, net(xs[i]))
            assert aux["tag"] == f"of thread {i}"
            close(aux["input"], xs[i])

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])


@by_name
@pytest.mark.parametrize("engine", ["auto", "sum"])
def test_backward_in_every_thread(engine, name):
    net, transform = network(), TRANSFORMS[name]
    transformed = transform(net, engine=engine)
    xs = [randn(3, 3) for _ in range(THREADS)]

    def gradients(transformed, x):
        loss = sum(part.square().sum() for part in parts(transformed(x)))
        return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    def parts(found):
        return [found] if isinstance(found, torch.Tensor) else found

    expected = [gradients(transform(net, engine="loop"), x) for x in xs]

    def work(i):
        for _ in range(4):
            for got, right in zip(gradients(transformed, xs[i]), expected[i]):
                if right is not None:
                    close(got, right)

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])
    assert all(p.grad is None for p in net.parameters())


def test_losses_go_backward_in_every_thread():
    """Gradients of parameters that all threads share add up."""
    net, xs = network(), [randn(3, 3) for _ in range(THREADS)]
    jacobian = batch_jacobian(net)
    for x in xs:
        batch_jacobian(net, engine="loop")(x).square().sum().backward()
    expected = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    assert not together(*[lambda x=x: jacobian(x).square().sum().backward() for x in xs])
    for p, grad in zip(net.parameters(), expected):
        if grad is not None:
            close(p.grad, grad)


@by_name
def test_inside_of_torch_func(name):
    transformed, xs = TRANSFORMS[name](torch.sin), [randn(2, 3) for _ in range(THREADS)]
    loss = lambda x: sum(part.square().sum() for part in transformed(x))
    expected = [torch.func.grad(loss)(x) for x in xs]

    def work(i):
        for _ in range(5):
            close(torch.func.grad(loss)(xs[i]), expected[i])
            close(tensors(transformed(xs[i])), tensors(TRANSFORMS[name](torch.sin)(xs[i])))

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])


@pytest.mark.parametrize("engine", ["vmap", "sum", "loop", "auto"])
def test_random_draws(engine):
    """Rows of a Jacobian are those of one mask, whatever the other threads draw meanwhile."""
    x = randn(5, 3)
    func = lambda x: nn.functional.dropout(x, 0.5)
    words = {"engine": engine, "randomness": "different", "return_value": True}
    jacobian = batch_jacobian(func, mode="rev", **words)
    jacobian(x)  # the first call compares states of the one generator

    def work():
        for _ in range(6):
            jac, value = jacobian(x)
            close(torch.einsum("boi,bi->bo", jac, x), value)
            assert set(jac.unique().tolist()) <= {0.0, 2.0}

    assert not together(*[work] * THREADS)


@by_name
def test_a_thread_that_raises_leaves_the_others_alone(name):
    class Mine(Exception):
        pass

    def func(x, fail):
        if fail:
            raise Mine
        return x.sin()

    transformed, x = TRANSFORMS[name](func), randn(4, 3)
    right = tensors(TRANSFORMS[name](torch.sin)(x))

    def fails():
        for _ in range(6):
            with pytest.raises(Mine):
                transformed(x, True)

    def works():
        for _ in range(6):
            close(tensors(transformed(x, False)), right)

    for _ in range(3):
        assert not together(fails, works, fails, works)


def test_rows_that_mix_are_found_in_every_thread():
    jacobian, x = batch_jacobian(lambda x: x - x.mean(0)), randn(4, 3)

    def work():
        for _ in range(3):
            with pytest.raises(BatchMixingError):
                jacobian(x)

    for _ in range(3):
        assert not together(*[work] * THREADS)


def test_one_warning_for_all_threads():
    func = Last()
    jacobian, x = batch_jacobian(func), randn(4, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not together(*[lambda: jacobian(x)] * THREADS)
    assert [w.category for w in said] == [EngineFallbackWarning]


def test_looking_from_several_threads():
    jacobian = batch_jacobian(torch.sin)

    def work(i):
        x = randn(2 + i, 3)
        assert check_derivative(jacobian, x).ok
        check_batched(torch.sin, x)

    raised = [together(*[lambda i=i: work(i) for i in range(THREADS)]) for _ in range(4)]
    assert not any(raised)


def test_explain_tells_of_the_call_it_was_given():
    jacobian = batch_jacobian(torch.sin)

    def work(i):
        x = randn(2 + i, 3)
        for _ in range(5):
            assert explain(jacobian, x).batch == 2 + i

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])


# --- what a thread does to others ----------------------------------------------------------


class Keeps(nn.Module):
    """Keeps its last activation, and computes with none but its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(3, 3).double(), None

    def forward(self, x):
        out = self.linear(x).tanh()
        self.last = out
        return out


@quiet
def test_a_module_is_whole_all_the_time():
    """A plain forward pass in another thread never meets a module that is being put back."""
    module, x, stop = Keeps(), randn(3, 3), threading.Event()
    right = module(x).detach()

    def transforms():
        for _ in range(60):
            batch_jacobian(module)(x)
        stop.set()

    def plain():
        while not stop.is_set():
            close(module(x).detach(), right)
            assert {"training", "last", "_parameters", "_modules"} <= set(vars(module))

    assert not together(transforms, plain, plain)


def test_a_dual_level_of_another_thread():
    """Levels of forward mode belong to the process; being inside of one belongs to a thread."""
    inside, leave = threading.Event(), threading.Event()

    def waits(x):
        inside.set()
        leave.wait(WAIT)
        return x.sin()

    def other():
        torch.func.jvp(waits, (randn(3),), (randn(3),))

    def work():
        with meanwhile(inside, leave), pytest.raises(BatchMixingError):
            batch_jacobian(lambda x: x - x.mean(0))(randn(4, 3))

    assert not together(other, work)


def test_looking_beside_a_dual_level_of_another_thread():
    inside, leave = threading.Event(), threading.Event()

    def waits(x):
        inside.set()
        leave.wait(WAIT)
        return x.sin()

    def work():
        with meanwhile(inside, leave):
            check_batched(torch.sin, randn(4, 3))

    assert not together(lambda: torch.func.jvp(waits, (randn(3),), (randn(3),)), work)


def test_random_numbers_of_another_thread():
    """A function that draws nothing does not draw because others do."""
    inside, leave, first = threading.Event(), threading.Event(), []

    def waits(x):
        if not first:
            first.append(True)
            inside.set()
            leave.wait(WAIT)
        return x.sin()

    def work():
        x = randn(4, 3)
        close(batch_jacobian(waits)(x), torch.diag_embed(x.cos()))

    def draws():
        with meanwhile(inside, leave):
            torch.rand(3)

    assert not together(work, draws)


def test_locks_are_taken_in_one_order():
    """A transform of a function that calls another one, while that one runs by itself."""
    code = """
import os, threading
import torch
from funcjac import batch_jacobian

torch.set_num_threads(1)
batch_jacobian(torch.sin)(torch.randn(2, 3))  # what torch loads is loaded
in_inner, in_outer, runs = threading.Event(), threading.Event(), []

def waits(x):
    if len(x) == 7 and not in_inner.is_set():  # alone, in its first call
        in_inner.set()
        in_outer.wait(2)
    return x.sin()

inner = batch_jacobian(waits)

def uses(x):
    runs.append(x)
    if len(runs) == 2:  # differentiated for the first time
        in_outer.set()
        in_inner.wait(2)
    return inner(x).sum(2) * x

outer = batch_jacobian(uses, engine="sum")
calls = [lambda: inner(torch.randn(7, 3)), lambda: outer(torch.randn(4, 3))]
threads = [threading.Thread(target=call, daemon=True) for call in calls]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join(8)
os._exit(any(thread.is_alive() for thread in threads))
"""
    found = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert found.returncode == 0, "stuck"
