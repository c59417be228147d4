"""What is remembered of a function: what tells calls apart, and which failures it survives."""

import threading

import pytest
import torch
from torch import nn

from funcjac import BatchMixingError, batch_jacobian, check_batched, check_derivative, explain
from tests.tensors import randn

B = 4
CALLS = 20

quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def warmed(func, *args, **kwargs):
    """A transform of which calls 1, 2, 4, 8 and 16 were verified, and the next one is not due."""
    jacobian = batch_jacobian(func)
    for _ in range(CALLS):
        jacobian(*args, **kwargs)
    return jacobian


# --- a change is seen -----------------------------------------------------------------------


def test_a_patched_class_is_another_function(monkeypatch):
    class Net(nn.Module):
        def forward(self, x):
            return x.sin()

    net, x = Net(), randn(B, 3)
    jacobian = warmed(net, x)
    monkeypatch.setattr(Net, "forward", lambda self, x: x.softmax(0))
    with pytest.raises(BatchMixingError):
        jacobian(x)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_integer_argument_is_part_of_the_key(by_name):
    x = randn(B, 3)
    give = (lambda dim: ((x,), {"dim": dim})) if by_name else (lambda dim: ((x, dim), {}))
    args, kwargs = give(1)
    jacobian = warmed(torch.softmax, *args, **kwargs)
    args, kwargs = give(0)
    with pytest.raises(BatchMixingError):
        jacobian(*args, **kwargs)


def test_a_function_as_an_argument_is_part_of_the_key():
    x = randn(B, 3)
    jacobian = warmed(lambda x, act: act(x), x, lambda x: x.softmax(1))
    with pytest.raises(BatchMixingError):
        jacobian(x, lambda x: x.softmax(0))


def test_a_module_as_an_argument_is_part_of_the_key():
    norm, x = nn.BatchNorm1d(3).double().eval(), randn(B, 3)
    jacobian = batch_jacobian(lambda net, x: net(x), 1, in_dims=(None, 0))
    for _ in range(CALLS):
        jacobian(norm, x)
    norm.train()
    with pytest.raises(BatchMixingError):
        jacobian(norm, x)


def test_none_and_a_number_are_not_alike():
    x = randn(B, 3)
    for first, second in ((None, 3.0), (3.0, None)):
        jacobian = batch_jacobian(lambda tree: tree["a"].sin())
        for value in (first, second):
            if value is None:
                assert jacobian({"a": x, "b": value})["b"] is None
            else:
                with pytest.raises(TypeError, match="to hold tensors only, got float"):
                    jacobian({"a": x, "b": value})


# --- a failure is survived ------------------------------------------------------------------


def test_a_failed_later_call_is_forgotten():
    fail = []
    x = randn(B, 3)

    def func(x):
        if fail:
            raise MemoryError("for now")
        return x.sin()

    jacobian = batch_jacobian(func)
    for calls in range(12):
        fail.append(True)
        with pytest.raises(MemoryError, match="for now"):
            jacobian(x)
        fail.clear()
        for _ in range(calls):
            torch.testing.assert_close(jacobian(x), torch.diag_embed(x.cos()))


@quiet
def test_threads_may_try_at_once():
    lstm = nn.LSTM(3, 2, batch_first=True).double()
    x = randn(B, 5, 3)
    func = lambda x: lstm(x)[0][:, -1]
    right = batch_jacobian(func, engine="loop", mode="rev")(x)
    jacobian, wrong = batch_jacobian(func), []

    def work():
        try:
            for _ in range(8):
                torch.testing.assert_close(jacobian(x), right)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- odds and ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_mixing_does_not_hide_behind_large_outputs(scale):
    func = lambda x: torch.stack([scale * x[:, 0], x[:, 1].softmax(0)], 1)
    with pytest.raises(BatchMixingError):
        batch_jacobian(func)(randn(B, 2))
    with pytest.raises(BatchMixingError):
        check_batched(func, randn(B, 2))


def test_rows_larger_than_a_whole_basis():
    x = randn(2, 2100)
    jac = batch_jacobian(torch.sin, engine="sum", mode="rev", chunk_size=700)(x)
    assert torch.equal(jac, torch.diag_embed(x.cos()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_an_input_that_does_nothing():
    func = lambda x, y, z: x.sin() * z.sum(1, keepdim=True)
    args = randn(B, 3), randn(B, 2), randn(B, 5)
    jacobian = batch_jacobian(func, argnums=(0, 1, 2))
    found = torch.compile(jacobian, fullgraph=True, backend="eager")(*args)
    for one, other in zip(found, jacobian(*args), strict=True):
        torch.testing.assert_close(one, other)
    torch._dynamo.reset()


def test_a_wrapped_transform_is_no_transform():
    jacobian = batch_jacobian(lambda x: x.sin().cumsum(-1))
    x = randn(2, B, 3)
    found = batch_jacobian(torch.vmap(jacobian))(x)
    rows = [torch.autograd.functional.jacobian(jacobian, row) for row in x]
    torch.testing.assert_close(found, torch.stack(rows))
    with pytest.raises(TypeError, match="expected a function returned by a funcjac transform"):
        explain(torch.vmap(jacobian), x)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_check_derivative_of_a_random_function(randomness):
    jacobian = batch_jacobian(lambda x: x.sin() * torch.randn_like(x), randomness=randomness)
    report = check_derivative(jacobian, randn(B, 40))
    assert report.ok, str(report)


def test_in_place_inside_of_torch_func():
    x = randn(B, 3)
    func = lambda x: x.mul_(2).sin()
    found = torch.func.grad(lambda x: batch_jacobian(func)(x).sum())(x)
    torch.testing.assert_close(found, -4 * (2 * x).sin())


def tower(x):
    """With more rows forward mode is chosen, where torch has ``logcumsumexp`` wrong."""
    y = torch.logcumsumexp(x, 1)
    return torch.cat([y, 2 * y, y * y], 1)


def test_another_mode_is_looked_through_and_verified_by_itself():
    jacobian = batch_jacobian(tower)
    modes = set()
    for batch in (2, 2, 20000):
        x = randn(batch, 4)
        modes.add(explain(batch_jacobian(tower, check=False), x).mode)
        torch.testing.assert_close(jacobian(x), batch_jacobian(tower, mode="rev")(x))
    assert modes == {"fwd", "rev"}
