"""What a remembered decision depends on, and what it must survive."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import funcjac
from funcjac import BatchMixingError, batch_jacobian, check_batched, check_derivative, explain

B = 4
CALLS = 60  # more than any choice takes

quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def settled(func, *args, **kwargs):
    """A transform that has made its choice for these arguments."""
    jacobian = batch_jacobian(func)
    for _ in range(CALLS):
        jacobian(*args, **kwargs)
    (record,) = jacobian.__funcjac__.memory.records.values()
    assert record.choice is not None
    return jacobian


# --- a change is seen -----------------------------------------------------------------------


class Holder(nn.Module):
    """Keeps layers and switches where modules do not look for them."""

    def __init__(self):
        super().__init__()
        self.hidden = (nn.BatchNorm1d(3).double().eval(),)
        self.act = torch.tanh
        self.mixes = False

    def forward(self, x):
        return self.step(self.act(self.hidden[0](x)))

    def step(self, x):
        return x - x.mean(0) if self.mixes else x


def train_hidden(holder):
    holder.hidden[0].train()


def swap_activation(holder):
    holder.act = lambda x: x.softmax(0)


def turn_switch(holder):
    holder.mixes = True


def patch_instance(holder):
    holder.forward = lambda x: x.softmax(0)


@pytest.mark.parametrize("change", [train_hidden, swap_activation, turn_switch, patch_instance])
def test_a_changed_attribute(change):
    holder, x = Holder(), randn(B, 3)
    jacobian = settled(holder, x)
    change(holder)
    before = holder.hidden[0].running_mean.clone()
    with pytest.raises(BatchMixingError):
        jacobian(x)
    assert torch.equal(holder.hidden[0].running_mean, before)


def test_a_patched_class(monkeypatch):
    class Net(nn.Module):
        def forward(self, x):
            return x.sin()

    net, x = Net(), randn(B, 3)
    jacobian = settled(net, x)
    monkeypatch.setattr(Net, "forward", lambda self, x: x.softmax(0))
    with pytest.raises(BatchMixingError):
        jacobian(x)


def test_a_module_in_a_long_list():
    layers = [nn.BatchNorm1d(3).double().eval() for _ in range(300)]
    jacobian = settled(lambda x: layers[-1](x).sin(), x := randn(B, 3))
    layers[-1].train()
    with pytest.raises(BatchMixingError):
        jacobian(x)


@pytest.mark.parametrize("by_name", [False, True])
def test_an_integer_argument(by_name):
    x = randn(B, 3)
    give = (lambda dim: ((x,), {"dim": dim})) if by_name else (lambda dim: ((x, dim), {}))
    args, kwargs = give(1)
    jacobian = settled(torch.softmax, *args, **kwargs)
    args, kwargs = give(0)
    with pytest.raises(BatchMixingError):
        jacobian(*args, **kwargs)


def test_a_function_as_an_argument():
    x = randn(B, 3)
    jacobian = settled(lambda x, act: act(x), x, lambda x: x.softmax(1))
    with pytest.raises(BatchMixingError):
        jacobian(x, lambda x: x.softmax(0))


def test_a_module_as_an_argument():
    norm, x = nn.BatchNorm1d(3).double().eval(), randn(B, 3)
    jacobian = batch_jacobian(lambda net, x: net(x), 1, in_dims=(None, 0))
    for _ in range(CALLS):
        jacobian(norm, x)
    norm.train()
    before = norm.running_mean.clone()
    with pytest.raises(BatchMixingError):
        jacobian(norm, x)
    assert torch.equal(norm.running_mean, before)


def test_cells_that_run_again():
    """Equal code is the same function, other code never is, whatever the addresses."""
    scope = {"torch": torch}
    exec("def f(x):\n    return g(x)", scope)
    x = randn(B, 3)
    jacobian = batch_jacobian(scope["f"])
    for cell in ["x.sin()"] * 20 + ["x.cos()", "x.softmax(0)"] * 20:
        gc.collect()
        exec(f"def g(x):\n    return {cell}", scope)
        if "softmax" in cell:
            with pytest.raises(BatchMixingError):
                jacobian(x)
        else:
            slope = x.cos() if "sin" in cell else -x.sin()
            torch.testing.assert_close(jacobian(x), torch.diag_embed(slope))


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


def test_another_way_through_the_function():
    """A settled engine may fail on a branch that was never taken: begin anew."""
    x = randn(B, 3)

    def func(x, t):
        return x * x.abs().max(1, keepdim=True).values.mean().item() if t > 0.5 else x.sin()

    jacobian = batch_jacobian(func, engine="auto", check=False)
    for _ in range(CALLS):
        jacobian(x, 0.1)
    with pytest.warns(funcjac.EngineFallbackWarning):
        jacobian(x, 0.9)


def test_inside_of_torch_func_shapes_are_not_everything():
    """Forward mode that is safe without layer norm is not safe with it."""
    net = nn.Linear(3, 24).double().requires_grad_(False)

    def func(x, norm):
        return net(nn.functional.layer_norm(x, (3,)) if norm else x.sin())

    x = randn(2, 3)
    jacobian, reverse = batch_jacobian(func), batch_jacobian(func, mode="rev")
    for norm in (False, True):
        loss = lambda jac: lambda x: jac(x, norm).pow(2).sum()
        found = torch.func.grad(loss(jacobian))(x)
        torch.testing.assert_close(found, torch.func.grad(loss(reverse))(x))


# --- a failure is survived ------------------------------------------------------------------


@quiet
def test_a_failed_attempt_keeps_nothing_alive():
    lstm = nn.LSTM(3, 2, batch_first=True)
    jacobian = batch_jacobian(lambda x: lstm(x)[0][:, -1])
    x = torch.randn(B, 5, 3)
    alive = weakref.ref(x)
    jacobian(x)
    del x
    assert alive() is None
    (record,) = jacobian.__funcjac__.memory.records.values()
    assert record.errors
    assert all(error.__traceback__ is None for error in record.errors.values())


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
            for _ in range(20):
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


def test_without_proof_the_sum_trick_is_not_tried():
    x = randn(B, 3)
    jacobian = batch_jacobian(lambda x: x - x.mean(0), check=False)
    for _ in range(CALLS):
        assert not jacobian(x).any()  # each row alone is its own mean


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


def test_explain_tells_of_an_exception_without_text():
    def func(x):
        if len(x) != B:
            raise AssertionError
        return x.sin()

    with pytest.warns(funcjac.EngineFallbackWarning):
        found = explain(batch_jacobian(func), randn(B, 3))
    assert any(attempt.reason == "AssertionError" for attempt in found.attempts)


def test_in_place_inside_of_torch_func():
    x = randn(B, 3)
    func = lambda x: x.mul_(2).sin()
    found = torch.func.grad(lambda x: batch_jacobian(func)(x).sum())(x)
    torch.testing.assert_close(found, -4 * (2 * x).sin())


@quiet
def test_what_was_chosen_and_is_wrong_now_is_chosen_no_more(monkeypatch):
    """A new integer is verified: if the choice fails it, another engine runs, then and later."""
    rows = funcjac._engines._rows
    by_sum, x = rows.BY_ENGINE["sum"], randn(B, 3)
    jacobian = settled(lambda x, n: (n * x).sin(), x, 1)
    (record,) = jacobian.__funcjac__.memory.records.values()
    assert record.choice.engine == "sum"

    def broken(call, route, context):
        found = by_sum(call, route, context)
        return found._replace(blocks=[[1.01 * block for block in row] for row in found.blocks])

    monkeypatch.setitem(rows.BY_ENGINE, "sum", broken)
    for _ in range(CALLS):
        torch.testing.assert_close(jacobian(x, 2), torch.diag_embed(2 * (2 * x).cos()))


def test_a_settled_transform_may_be_checkpointed():
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh()).double(), randn(B, 3).requires_grad_()
    jacobian = batch_jacobian(net, engine="sum", mode="rev", chunk_size=1)
    for _ in range(CALLS):
        right = jacobian(x)
    (wanted,) = torch.autograd.grad(right.square().sum(), x)
    found = torch.utils.checkpoint.checkpoint(jacobian, x, use_reentrant=False)
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(grad, wanted)
