"""SciPy's solvers with ``jac=`` of funcjac, and ``torch.optim.LBFGS`` on its derivatives."""

import numpy
import pytest
import torch
from torch import nn

from funcjac import batch_jacobian, batch_laplacian
from tests.tensors import equal, randn

integrate = pytest.importorskip("scipy.integrate", reason="scipy is not installed: make test")
optimize = pytest.importorskip("scipy.optimize")
sparse = pytest.importorskip("scipy.sparse")

# --- stiff equations ----------------------------------------------------------------------

STIFFNESS = torch.tensor([10.0, 100.0, 1000.0, 5.0]).double()


def oscillators(y):
    """Van der Pol's, one for each sample, ``(B, 2)``."""
    x, v = y.unbind(1)
    return torch.stack([v, STIFFNESS * (1 - x**2) * v - x], 1)


def reactions(y, rates):
    """Robertson's, ``(B, 3)``, with rates ``(B, 3)``."""
    a, b, c = y.unbind(1)
    first, second, third = rates.unbind(1)
    made, used = first * a, second * b * c
    return torch.stack([used - made, made - used - third * b**2, third * b**2], 1)


def on_vectors(func, size, *args, calls):
    """``func`` of a batch, for a solver that knows one vector; it counts its calls."""

    def of_vector(_, y):
        calls.append(1)
        return func(torch.from_numpy(y).reshape(-1, size), *args).flatten().numpy()

    return of_vector


def block_diagonal(func, size, *args):
    """Its Jacobian: samples are independent, so that blocks stand on the diagonal."""

    def of_vector(_, y):
        blocks = batch_jacobian(func)(torch.from_numpy(y).reshape(-1, size), *args)
        return sparse.block_diag(list(blocks.numpy()), format="csc")

    return of_vector


PROBLEMS = {
    "van der Pol": (oscillators, [[2.0, 0.0]] * 4, ()),
    "Robertson": (
        reactions,
        [[1.0, 0.0, 0.0]] * 3,
        (torch.tensor([[0.04, 1e4, 3e7], [0.1, 1e3, 1e6], [1.0, 1e4, 1e7]]).double(),),
    ),
}


@pytest.mark.parametrize("method", ["Radau", "BDF"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_batch_of_stiff_equations(name, method):
    func, start, args = PROBLEMS[name]
    start = numpy.array(start)
    size = start.shape[1]
    words = {"method": method, "rtol": 1e-8, "atol": 1e-10, "y0": start.flatten()}
    calls, more_calls = [], []
    jac = block_diagonal(func, size, *args)
    ours = integrate.solve_ivp(on_vectors(func, size, *args, calls=calls), (0, 5), jac=jac, **words)
    by_differences = integrate.solve_ivp(
        on_vectors(func, size, *args, calls=more_calls), (0, 5), **words
    )
    assert ours.success
    assert ours.njev >= 1
    numpy.testing.assert_allclose(ours.y[:, -1], by_differences.y[:, -1], rtol=1e-6, atol=1e-9)
    assert len(calls) < len(more_calls)  # none are spent on differences


def test_jacobians_of_robertson_are_those_of_the_formula():
    func, _, (rates,) = PROBLEMS["Robertson"]
    y = torch.rand(3, 3).double()
    (_, b, c), (first, second, third), zero = y.unbind(1), rates.unbind(1), torch.zeros(3).double()
    rows = [
        [-first, second * c, second * b],
        [first, -second * c - 2 * third * b, -second * b],
        [zero, 2 * third * b, zero],
    ]
    expected = torch.stack([torch.stack(row, 1) for row in rows], 1)
    equal(batch_jacobian(func)(y, rates), expected)


# --- curve fits ---------------------------------------------------------------------------


def decay(params, time):
    """A damped oscillation at times ``(n,)``, by four parameters that all of them share."""
    height, rate, frequency, phase = params
    return height * (-rate * time).exp() * (frequency * time + phase).sin()


@pytest.fixture
def measured():
    true = torch.tensor([2.0, 0.3, 3.0, 0.5]).double()
    time = torch.linspace(0, 6, 80).double()
    return true, time, decay(true, time) + 0.01 * randn(80)


def jacobian_of(model, time):
    """``(n, parameters)``, as SciPy asks for it."""
    by_params = batch_jacobian(model, in_dims=(None, 0))
    return lambda params, *_: by_params(torch.from_numpy(params), time).numpy()


GUESS = numpy.array([1.5, 0.2, 2.8, 0.3])


@pytest.mark.parametrize("method", ["trf", "lm"])
def test_least_squares(method, measured):
    true, time, values = measured
    residuals = lambda params: (decay(torch.from_numpy(params), time) - values).numpy()
    jac = jacobian_of(decay, time)
    words = {"method": method, "xtol": 1e-12, "ftol": 1e-12}
    ours = optimize.least_squares(residuals, GUESS, jac=jac, **words)
    own = optimize.least_squares(residuals, GUESS, jac="3-point", **words)
    numpy.testing.assert_allclose(ours.x, own.x, rtol=1e-6)
    numpy.testing.assert_allclose(ours.x, true.numpy(), atol=0.05)
    numpy.testing.assert_allclose(ours.jac, own.jac, rtol=1e-5, atol=1e-6)


def test_curve_fit_has_the_covariance_of_its_own_jacobian(measured):
    _, time, values = measured
    model = lambda _, *params: decay(torch.tensor(params).double(), time).numpy()
    jac = lambda _, *params: jacobian_of(decay, time)(numpy.array(params))
    fits = [
        optimize.curve_fit(model, time.numpy(), values.numpy(), p0=GUESS, method="lm", **words)
        for words in ({"jac": jac}, {})
    ]
    (ours, covariance), (own, expected) = fits
    numpy.testing.assert_allclose(ours, own, rtol=1e-6)
    numpy.testing.assert_allclose(covariance, expected, rtol=1e-4)


# --- torch.optim.LBFGS --------------------------------------------------------------------


def residual_by_autograd(net, x):
    """``u'' + u`` by two plain gradients."""
    x = x.clone().requires_grad_()
    u = net(x)
    (u_x,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
    return u_xx + u


def residual_by_laplacian(net, x):
    u_xx, (_, u) = batch_laplacian(net, return_value=True)(x)
    return u_xx + u


def test_lbfgs_solves_an_equation():
    """``u'' = -u`` with ``u(0) = 0`` and ``u'(0) = 1``: the same path as by plain autograd."""
    x = torch.linspace(0, 2, 30).double().unsqueeze(1)
    fits = []
    for residual in (residual_by_autograd, residual_by_laplacian):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1)).double()
        field = lambda x, net=net: x + x**2 * net(x)
        words = {"max_iter": 200, "history_size": 20, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(net.parameters(), tolerance_change=1e-14, **words)
        losses = []

        def closure(residual=residual, field=field, optimizer=optimizer, losses=losses):
            optimizer.zero_grad()
            loss = residual(field, x).square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        fits.append((losses, field(x).detach()))
    (expected, _), (losses, solution) = fits
    numpy.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-6)
    assert losses[-1] < 1e-6
    equal(solution, x.sin(), 1e-1)


def test_lbfgs_fits_curves_by_residuals_of_a_batch():
    """Three curves at once, each with parameters of its own; gradients are ``2 J^T r``."""
    time = torch.linspace(0, 3, 40).double()
    true = torch.tensor([[2.0, 0.5], [1.0, 1.5], [3.0, 0.1]]).double()
    model = lambda params: params[:, :1] * (-params[:, 1:] * time).exp()  # (B, 2) -> (B, 40)
    values = model(true)
    params = torch.ones(3, 2).double().requires_grad_()
    optimizer = torch.optim.LBFGS([params], max_iter=100, line_search_fn="strong_wolfe")
    by_params = batch_jacobian(lambda p: model(p) - values, return_value=True)

    def closure():
        with torch.no_grad():
            jac, residuals = by_params(params)
            params.grad = 2 * torch.einsum("bmn,bm->bn", jac, residuals)
        return residuals.square().sum()

    optimizer.step(closure)
    equal(params.detach(), true, 1e-4)
