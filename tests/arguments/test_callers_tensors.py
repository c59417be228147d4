"""Gradients, hooks, buffers and lists of the caller: as after one plain run of ``func``."""

import pytest
import torch
from torch import nn

from funcjac import (
    batch_jacobian,
    batch_laplacian,
)
from tests.cases.modules import network
from tests.cases.transforms import OF_NETWORKS
from tests.tensors import equal, f64, fixed_randn, randn

B = 4


@pytest.mark.quick
@pytest.mark.parametrize("plain_object", [False, True])
def test_a_module_and_a_plain_object_are_treated_alike(plain_object):
    class Counts(object if plain_object else nn.Module):
        calls, cache = 0, None

        def __call__(self, x):
            self.calls += 1
            if self.cache is None:
                self.cache = torch.linalg.inv(torch.eye(3, dtype=f64) * 2)
            return (x @ self.cache).sin()

        forward = __call__

    func, x = Counts(), randn(B, 3)
    jacobian = batch_jacobian(func)
    for calls in range(1, 6):
        equal(jacobian(x), torch.diag_embed((x / 2).cos() / 2))
        assert func.calls == calls
    assert func.cache is not None


@pytest.mark.quick
@pytest.mark.parametrize("name", OF_NETWORKS)
def test_a_retained_gradient_is_untouched(name):
    x = randn(B, 3).requires_grad_() * 1
    x.retain_grad()
    transformed = OF_NETWORKS[name](network())
    for _ in range(3):
        transformed(x)
        assert x.grad is None
    (x**2).sum().backward()
    equal(x.grad, 2 * x.detach())


@pytest.mark.quick
@pytest.mark.parametrize("name", OF_NETWORKS)
def test_no_hook_sees_a_number_of_the_verification(name):
    net, x, seen = network(), randn(B, 3).requires_grad_(), []
    hooks = [p.register_hook(seen.append) for p in net.parameters()]
    hooks.append(x.register_hook(seen.append))
    transformed = OF_NETWORKS[name](net)
    for _ in range(4):
        transformed(x)
    assert seen == []
    found = transformed(x)
    leaves = found if isinstance(found, tuple) else (found,)
    sum(leaf.sum() for leaf in leaves).backward()
    assert len(seen) >= 2
    assert len(seen) <= len(hooks)


def test_accumulated_gradients_are_untouched():
    net, x = network(), randn(B, 3)
    net(x).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    batch_jacobian(net)(x)
    batch_laplacian(net)(x)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before))


@pytest.mark.quick
@pytest.mark.parametrize("name", OF_NETWORKS)
def test_lists_keep_one_entry_for_each_call(name):
    net, kept = network(), []

    def func(x):
        kept.append(x.shape)
        return net(x)

    transformed = OF_NETWORKS[name](func)
    for calls in range(1, 6):
        transformed(randn(B, 3))
        assert kept == [(B, 3)] * calls


class Counting(nn.Module):
    """Moves its statistics by assignment, and counts its calls in place."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.body(x)


def with_a_constant(x):
    return x.sin(), torch.ones(len(x), 1, dtype=x.dtype)


@pytest.mark.parametrize(
    ("transform", "body"),
    [
        (batch_jacobian, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))),
        (batch_laplacian, nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1))),
        (batch_jacobian, with_a_constant),
    ],
    ids=["writes into its input", "replacements", "constant output"],
)
def test_statistics_move_once_whatever_runs_again(transform, body):
    module = Counting(body).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    transform(module)(x)
    assert module.calls == 1
    torch.testing.assert_close(module.mean, 0.1 * x.mean(0))


def test_aux_trains_what_only_it_depends_on():
    head = nn.Linear(3, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    _, aux = batch_jacobian(lambda x: (x**2, head(x)), has_aux=True)(x)
    aux.square().mean().backward()
    expected = torch.autograd.grad(head(x).square().mean(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, expected)


def test_a_write_under_no_grad_stays_out_of_the_callers_tensor():
    def func(x):
        with torch.no_grad():
            x.mul_(2)
        return x.sin()

    x = torch.randn(5, 3, dtype=torch.float64)
    given = x.clone()
    result = batch_jacobian(func)(given)
    torch.testing.assert_close(given, x)
    torch.testing.assert_close(result, torch.diag_embed((2 * x).cos()))


def test_an_error_that_comes_later_is_the_users():
    class Mine(Exception):
        pass

    runs = 0

    def func(x):
        nonlocal runs
        runs += 1
        if runs > 1:
            raise Mine
        return x.sin()

    jacobian = batch_jacobian(func)
    jacobian(fixed_randn(3, 2))
    with pytest.raises(Mine):
        jacobian(fixed_randn(3, 2))


def test_a_buffer_that_modules_share_moves_once():
    class Counts(nn.Module):
        def __init__(self, count, counts):
            super().__init__()
            self.register_buffer("count", count)
            self.counts = counts

        def forward(self, x):
            if self.counts:
                self.count.add_(1)
                return x
            return x**2 * self.count

    count = torch.ones(5, dtype=f64)
    x = fixed_randn(4, 5)
    jac = batch_jacobian(nn.Sequential(Counts(count, True), Counts(count, False)))
    for calls in range(1, 4):
        torch.testing.assert_close(jac(x), torch.diag_embed(2 * x * (1 + calls)))
        assert count.eq(1 + calls).all()


def test_a_draw_that_is_kept_stays():
    class Kept(nn.Module):
        mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.rand(x.shape[1], dtype=x.dtype)
            return x**2 * self.mask

    func, x = Kept(), fixed_randn(3, 4)
    jac = batch_jacobian(func)
    first = jac(x)
    torch.testing.assert_close(first, torch.diag_embed(2 * x * func.mask))
    torch.testing.assert_close(jac(x), first)


STRANGE = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*[Qq]uantize")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_tensor_of_another_kind_in_the_closure_or_a_buffer_does_no_harm(kind):
    held, x = STRANGE[kind](), fixed_randn(4, 3)

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", held)

        def forward(self, x):
            return x.sin() if self.held is not None else x

    for func in (Holds(), lambda x: x.sin() if held is not None else x):
        jac = batch_jacobian(func)
        for _ in range(4):
            torch.testing.assert_close(jac(x), torch.diag_embed(x.cos()))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_nested_tensor_is_written_to_once():
    held = STRANGE["nested"]()
    batch_jacobian(lambda x: x.sin() * held.mul_(2.0).numel())(fixed_randn(4, 3))
    assert all(one.eq(2).all() for one in held.unbind())
