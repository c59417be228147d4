"""Powers and determinants where torch's formulas divide by zero, alone and inside transforms."""

import pytest
import torch
from torch import nn

from funcjac import (
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
)
from tests import oracles
from tests.oracles import hessian_by_rows
from tests.tensors import equal, f64, fixed_randn

B = 4


@pytest.mark.quick
def test_a_power_of_zero_at_a_negative_base_is_constant():
    """By plain autograd the second derivative of ``(x0 + 2) ** (x1 * 0)`` by ``x0`` is zero."""
    func = lambda x: (x[:, 0] + 2) ** (x[:, 1] * 0)
    x = torch.tensor([[-3.0, 1.0], [1.0, 0.5]], dtype=f64)
    transformed = batch_hessian_diagonal(func)
    for _ in range(3):
        found = transformed(x)
        assert found[0, 0] == 0
        equal(found[1], torch.zeros(2, dtype=f64))
    found, (_, value) = batch_hessian_diagonal(func, return_value=True)(x)
    assert found[0, 0] == 0
    equal(value, torch.ones(2, dtype=f64))


@pytest.mark.quick
def test_a_wave_function_is_right_in_float32():
    """``vmap(hessian)`` of a log-determinant is off by 49 times its size."""
    net = nn.Linear(3, 3)

    def log_psi(x):
        orbitals = net(x.view(-1, 3, 3)).tanh() + torch.eye(3).to(x)
        return torch.linalg.slogdet(orbitals)[1]

    x = torch.randn(B, 9)
    found = batch_laplacian(log_psi)(x)
    net.double()
    right = oracles.laplacian(log_psi, (x.double(),)).detach()
    assert (found.detach() - right).abs().max() < 1e-4 * (1 + right.abs().max())


EVERY = (batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian)


POWERS = {
    "**": lambda x, y: x**y,
    "pow_": lambda x, y: x.clone().pow_(y),
    "float_power": torch.float_power,
}


@pytest.mark.parametrize("name", POWERS)
def test_a_power_with_an_exponent_that_is_zero_is_right(name):
    x = torch.tensor([[2.5, 0.0], [2.2, 0.0], [1.3, 0.7]], dtype=f64)
    func = lambda x: POWERS[name](x[:, 0], x[:, 1])
    same = lambda x: (x[:, 1] * x[:, 0].log()).exp()
    for mode in ("auto", "rev_over_rev", "fwd_over_rev"):
        torch.testing.assert_close(batch_hessian(func, mode=mode)(x), batch_hessian(same)(x))
    for mode in ("auto", "rev", "taylor") if name == "**" else ("auto", "rev"):
        for index in ((0, 1), (1, 0), (1, 1)):
            found, right = (batch_partials(f, [index], mode=mode)(x)[0] for f in (func, same))
            torch.testing.assert_close(found, right)
    moved = x.clone().requires_grad_()
    batch_jacobian(func)(moved)[:, 0].sum().backward()
    torch.testing.assert_close(moved.grad, batch_hessian(same)(x)[:, 0])


def test_powers_of_less_than_zero_are_right():
    exponents = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=f64)
    x = torch.tensor([[-1.5, -0.5, 0.0, 2.0], [-0.3, -0.4, -1.0, -2.0]], dtype=f64)
    right = exponents * (exponents - 1) * torch.tensor([[0, 0, 1, 2.0], [0, 0, 1, -2]], dtype=f64)
    found = batch_hessian_diagonal(lambda x: x**exponents)
    torch.testing.assert_close(found(x).diagonal(dim1=1, dim2=2), right)
    third = torch.func.grad(lambda x: found(x).sum())(x)
    torch.testing.assert_close(third, torch.tensor([[0, 0, 0, 6.0]] * 2, dtype=f64))


@pytest.mark.parametrize("transform", EVERY)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_determinants_inside_of_transforms_are_right(size, transform):
    x = fixed_randn(3, size * size)
    func = lambda x: torch.linalg.det(x.reshape(-1, size, size)) * x[:, 0]
    found = transform(func)
    torch.testing.assert_close(torch.vmap(lambda row: found(row[None])[0])(x), found(x))
    moved = x.clone().requires_grad_()
    found(moved).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: found(x).sin().sum())(x), moved.grad)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_a_determinant_of_a_singular_matrix_is_right(size):
    x = fixed_randn(3, size * size)
    x[0, :size] = x[0, size : 2 * size]
    func = lambda x: torch.det(x.reshape(-1, size, size))
    right = hessian_by_rows(lambda row: func(row[None]), x)
    torch.testing.assert_close(batch_hessian(func)(x), right[:, 0], rtol=1e-6, atol=1e-6)


def test_powers_keep_their_dtype():
    x = torch.rand(5, 3) + 0.1
    for base, exponent in ((x.bfloat16(), torch.tensor(3.0)), (x, torch.tensor(2.0, dtype=f64))):
        func = lambda x, exponent=exponent: x**exponent
        assert batch_hessian(func)(base).dtype == base.dtype
        value = batch_jacobian(func, return_value=True)
        assert torch.func.jvp(value, (base,), (base,))[0][1].dtype == base.dtype
    exponent = torch.zeros((), dtype=f64, requires_grad=True)
    jac = batch_jacobian(lambda x: x**exponent)(x)
    (found,) = torch.autograd.grad(jac.sum(), exponent)
    torch.testing.assert_close(found, (1 / x).sum().double(), rtol=1e-5, atol=1e-5)


def test_infinity_to_the_power_of_zero_is_constant():
    x, zero = torch.tensor([[torch.inf, 2.0]], dtype=f64), torch.zeros(1, dtype=f64)
    value = batch_jacobian(lambda x: x**zero, return_value=True)
    jac, out = torch.func.jvp(value, (x,), (x,))[0]
    assert (out == 1).all()
    assert (jac == 0).all()


@pytest.mark.parametrize("name", ["**", "pow", "det"])
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
def test_powers_and_determinants_compile(name, transform):
    func = {
        "**": lambda x: x**2,
        "pow": lambda x: x.clamp(min=1e-6).pow(torch.tensor(3.0)).mean(1, keepdim=True).pow(0.3),
        "det": lambda x: torch.linalg.det(x.unsqueeze(2) * x.unsqueeze(1) + torch.eye(3)),
    }[name]
    torch._dynamo.reset()
    x = torch.rand(4, 3)
    found = torch.compile(transform(func), backend="eager")(x)
    torch.testing.assert_close(found, transform(func)(x), rtol=1e-4, atol=1e-5)


def test_replaced_operations_take_their_keywords():
    x = fixed_randn(3, 2, 2)
    by_name = batch_jacobian(lambda x: torch.linalg.det(A=x))
    by_place = batch_jacobian(lambda x: torch.linalg.det(x))
    torch.testing.assert_close(*(torch.vmap(lambda r: t(r[None]))(x) for t in (by_name, by_place)))
    power = batch_jacobian(lambda x: torch.pow(self=2.0, exponent=x))
    torch.testing.assert_close(torch.vmap(lambda r: power(r[None])[0])(x[:, 0]), power(x[:, 0]))


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_determinants_of_singular_matrices_inside_of_transforms_are_right(size):
    x = torch.diag(torch.arange(size, dtype=f64)).expand(2, size, size).clone()
    func = batch_jacobian(torch.linalg.det)
    right = torch.zeros(size, size, dtype=f64)
    right[0, 0] = torch.arange(1, size, dtype=f64).prod()
    found = torch.vmap(lambda row: func(row[None])[0])(x)
    torch.testing.assert_close(found, right.expand(2, size, size))
    if size <= 4:
        torch.testing.assert_close(func(x), right.expand(2, size, size))
