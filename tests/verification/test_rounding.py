"""Rounding of the reference: it refuses nothing that is right, and excuses nothing wrong."""

import pytest
import torch
from torch import nn
from torch.autograd import functional
from torch.nn import functional as F

from funcjac import (
    VerificationError,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
)
from tests.oracles import hessian_by_rows, stacked
from tests.tensors import f64, fixed_randn, quiet, randn


def test_a_reference_that_refuses_large_cotangents_is_no_failure():
    x = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    func = lambda x: torch.view_as_real(torch.linalg.eigvals(x))
    nested = batch_jacobian(batch_jacobian(func))(x)
    torch.testing.assert_close(nested, batch_hessian(func)(x))


EVERY = (batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian)


def test_a_constant_up_to_rounding_has_a_small_jacobian():
    x = fixed_randn(3, 3, 2).requires_grad_()
    jac = batch_jacobian(stacked(torch.corrcoef))(x)
    assert jac.abs().max() < 1e-12


def test_second_derivatives_far_below_the_first_are_small():
    func = stacked(lambda x: x.logsumexp(0))
    x = 1000 * fixed_randn(3, 5).abs() + 1000
    nested = batch_jacobian(batch_jacobian(func))
    for turn in range(3):
        assert nested(x + turn).abs().max() < 1e-3


def _or_refused(transformed, x, wanted, **tolerances):
    for turn in range(3):
        try:
            found = transformed(x.roll(turn, 0))
        except VerificationError:
            continue
        torch.testing.assert_close(found, wanted.roll(turn, 0), **tolerances)


def test_complex_numbers_within_do_not_loosen_what_is_tolerated():
    # The forward formula of eigenvalues is wrong once differentiated again.
    row = lambda x: torch.view_as_real(torch.linalg.eigvals(x.view(3, 3))).flatten().square()
    x = fixed_randn(3, 9)
    wanted = hessian_by_rows(row, x)
    hess = batch_hessian(stacked(row), mode="fwd_over_rev")
    _or_refused(hess, x, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch_jacobian(batch_jacobian(stacked(row)))(x), wanted)


def test_another_precision_beside_does_not_loosen_what_is_tolerated():
    # Its forward formula moves with the triangle that it does not read.
    start = torch.eye(3, dtype=f64) + 0.1

    def row(x):
        torch.ones(2).square()  # in float32, and nothing to do with the result
        factor = start + x.view(3, 3).triu(1) + x.view(3, 3).tril() ** 2
        return torch.cholesky_inverse(factor.tril())

    x = 0.1 * fixed_randn(3, 9)
    wanted = hessian_by_rows(lambda x: row(x).flatten(), x).view(3, 3, 3, 9, 9)
    nested = batch_jacobian(batch_jacobian(stacked(row)))
    for turn in range(3):
        torch.testing.assert_close(nested(x.roll(turn, 0)), wanted.roll(turn, 0))


@pytest.mark.parametrize("transform", EVERY)
def test_derivatives_of_a_constant_are_small(transform):
    func = lambda x: (1000 * x).softmax(-1) @ torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 1.0, 2.0]], dtype=f64)
    for _ in range(3):
        assert transform(func)(x).abs().max() < 1e-9


@pytest.mark.parametrize("seed", [2, 9, 22, 36, 49, 53])
def test_a_norm_of_a_single_feature_has_small_derivatives(seed):
    """Derivatives are zero; plain autograd returns rounding of numbers 300 times as large."""
    rng = torch.Generator().manual_seed(seed)
    args = [size * torch.rand(3, 1, generator=rng, dtype=f64) for size in (-1, -5, -8)]
    row = lambda x, weight, bias: F.layer_norm(x, (1,), weight, bias)
    for found in batch_jacobian(stacked(row), (0, 1, 2))(*args)[:2]:
        assert found.abs().max() < 1e-9


@pytest.mark.parametrize("seed", [4, 6, 16, 21, 22])
def test_attention_that_has_made_up_its_mind_is_verified(seed):
    """Weights are 0 and 1 but for rounding, and so little is left of slopes."""
    rng = torch.Generator().manual_seed(seed)
    query = -8 * torch.rand(3, 1, 2, generator=rng, dtype=f64)
    keys = 8 * torch.rand(5, 2, generator=rng, dtype=f64) - 8
    row = lambda row: F.scaled_dot_product_attention(row, keys, keys)
    right = torch.stack([functional.jacobian(row, one) for one in query])
    torch.testing.assert_close(batch_jacobian(stacked(row))(query), right, rtol=1e-7, atol=1e-12)
    assert batch_hessian_diagonal(stacked(row))(query).isfinite().all()


B = 4


@pytest.mark.parametrize(("factor", "batch"), [(10, 16), (10, 128), (30, 32)])
def test_a_softmax_that_has_made_up_its_mind_in_float32_is_verified(factor, batch):
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(*shape, generator=rng) for shape in ((batch, 8), (8, 1)))
        func = lambda x: (factor * x).softmax(-1) @ w.to(x)
        right = batch_jacobian(func)(x.double())
        assert (batch_jacobian(func)(x) - right).abs().max() < 1e-5 * right.abs().max()


def partly_constant(x):
    with torch.no_grad():
        constant = x.sin()
    return (x**3 + constant) * torch.ones(64, dtype=x.dtype)


@pytest.mark.parametrize("large", [1e3, 1e5])
def test_a_large_row_excuses_no_other(large):
    x = torch.tensor([[large], [1.0]])
    jacobian = batch_jacobian(partly_constant)
    for _ in range(16):
        torch.testing.assert_close(jacobian(x)[1], torch.full((64, 1), 3.0))


@quiet
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_a_value_that_is_zero_but_for_rounding_is_verified(engine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    x = torch.randn(8, 16)
    reached = net(x).detach()
    func = lambda x, y: net(x) - y
    jac, value = batch_jacobian(func, engine=engine, return_value=True)(x, reached)
    assert value.abs().max() < 1e-5
    torch.testing.assert_close(jac, batch_jacobian(net)(x))


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_an_aux_that_is_zero_but_for_rounding_is_returned(engine):
    weights = randn(8, 8)
    inverse = torch.linalg.inv(weights)
    func = lambda x: (x.sin(), x @ weights @ inverse - x)
    aux = batch_jacobian(func, engine=engine, has_aux=True)(randn(B, 8))[1]
    assert 0 < aux.abs().max() < 1e-12
