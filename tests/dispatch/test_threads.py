"""One transform in several threads: first calls at once, later ones, whatever each one does."""

import sys
import threading

import pytest
import torch
from torch import nn

from funcjac import (
    BatchMixingError,
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
from tests.cases.modules import network
from tests.tensors import randn

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


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.fixture(autouse=True)
def _switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


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


def tensors(found):
    """All tensors of a result, without their graphs."""
    if isinstance(found, torch.Tensor):
        return [found.detach()]
    return [leaf for part in found for leaf in tensors(part)]


# --- the same transform from all threads -------------------------------------------------------


class Last(nn.Module):
    """An LSTM, whose output is a tuple."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True).double()

    def forward(self, x):
        return self.lstm(x.unsqueeze(2))[0][:, -1]


FUNCTIONS = {
    "network": network,
    "layer norm": lambda: nn.Sequential(network(), nn.LayerNorm(3).double(), network()),
    "torch.func inside": lambda: (
        lambda x: torch.vmap(torch.func.jacrev(lambda row: row.sin() * row.sum()))(x).sum(2)
    ),
}
AT_ONCE = [(function, name) for function in FUNCTIONS for name in TRANSFORMS]
AT_ONCE += [("lstm", "batch_jacobian"), ("lstm", "batch_divergence")]  # 20 in all


@pytest.mark.parametrize(("function", "name"), AT_ONCE)
def test_calls_at_once_are_right(function, name):
    """First calls and those after them, in each grad mode, of shapes that differ and agree."""
    func, transform = {**FUNCTIONS, "lstm": Last}[function](), TRANSFORMS[name]
    xs = [randn(2 + i % 2, 3) for i in range(THREADS)]
    expected = [tensors(transform(func, engine="loop")(x)) for x in xs]
    transformed = transform(func)

    def work(i):
        with torch.set_grad_enabled(i % 2 == 0):
            for _ in range(6):
                found = transformed(xs[i])
                close(tensors(found), expected[i])
                assert torch.is_grad_enabled() == (i % 2 == 0)

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])


@by_name
@pytest.mark.parametrize("engine", ["auto", "vmap"])
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
@pytest.mark.parametrize("engine", ["auto"])
def test_every_thread_may_go_backward(engine, name):
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
def test_inside_of_torch_func_calls_at_once_are_right(name):
    transformed, xs = TRANSFORMS[name](torch.sin), [randn(2, 3) for _ in range(THREADS)]
    loss = lambda x: sum(part.square().sum() for part in transformed(x))
    expected = [torch.func.grad(loss)(x) for x in xs]

    def work(i):
        for _ in range(5):
            close(torch.func.grad(loss)(xs[i]), expected[i])
            close(tensors(transformed(xs[i])), tensors(TRANSFORMS[name](torch.sin)(xs[i])))

    assert not together(*[lambda i=i: work(i) for i in range(THREADS)])


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


def test_each_call_runs_func_once():
    """Threads share what is remembered, and no run."""
    runs = []

    def func(x):
        runs.append(1)
        return x.sin()

    jacobian = batch_jacobian(func)
    assert not together(*[lambda: [jacobian(randn(4, 3)) for _ in range(10)]] * THREADS)
    assert len(runs) == 10 * THREADS


def test_what_func_compiled_is_compiled_again_afterwards():
    """Whoever comes last, or fails: how the process compiles is as before."""
    net, compilations = nn.Linear(3, 2).double(), []
    compiled = torch.compile(net, backend=lambda graph, _: compilations.append(1) or graph)
    barrier, x = threading.Barrier(THREADS, timeout=WAIT), randn(4, 3)
    begun = threading.Event()

    def func(x, i):
        begun.set()
        barrier.wait()  # all have begun, the first before the others
        out = compiled(x)
        if i:
            barrier.wait()  # one is done
            raise ZeroDivisionError
        return out

    def work(i):
        assert i == 0 or begun.wait(WAIT)
        batch_hessian(lambda x: func(x, i))(x)
        barrier.wait()

    raised = together(*[lambda i=i: work(i) for i in range(THREADS)])
    assert set(map(type, raised.values())) == {ZeroDivisionError}, raised
    assert raised.keys() == {*range(1, THREADS)}
    assert not compilations
    compiled(x)
    assert compilations
    torch._dynamo.reset()
