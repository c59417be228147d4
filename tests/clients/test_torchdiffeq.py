"""torchdiffeq: a continuous flow trained with ``batch_divergence``, in both of its solvers."""

import math

import pytest
import torch
from torch import nn

from funcjac import batch_divergence, batch_jacobian
from tests.tensors import equal, randn

torchdiffeq = pytest.importorskip("torchdiffeq", reason="torchdiffeq is not installed: make test")

SOLVERS = {"odeint": torchdiffeq.odeint, "adjoint": torchdiffeq.odeint_adjoint}
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def velocity_of():
    """Of points ``(B, 2)`` at a time ``(B, 1)``, a column of its own."""
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()


class Flow(nn.Module):
    """``d(x, log p)/dt = (v(x, t), -div v(x, t))``."""

    def __init__(self, velocity, **words):
        super().__init__()
        self.velocity = velocity
        self.words = words
        self.calls = 0

    def divergence(self, time, x):
        field = lambda x, t: self.velocity(torch.cat([x, t], 1))
        transform = batch_divergence(field, return_value=True, **self.words)
        return transform(x, time.expand(len(x), 1))

    def forward(self, time, state):
        self.calls += 1
        div, moved = self.divergence(time, state[0])
        return moved, -div


class ByHand(Flow):
    """The divergence by a loop over coordinates."""

    def divergence(self, time, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.clone().requires_grad_()
            moved = self.velocity(torch.cat([x, time.expand(len(x), 1)], 1))
            div = torch.zeros(len(x)).double()
            for i in range(2):
                grad = torch.autograd.grad(moved[:, i].sum(), x, create_graph=True)[0]
                div = div + grad[:, i]
        return div, moved


def log_likelihood(flow, x, solver, tolerance=1e-7):
    """From the data, at time 1, to a normal distribution at time 0."""
    times = torch.tensor([1.0, 0.0]).double()
    start = x, torch.zeros(len(x)).double()
    z, change = SOLVERS[solver](flow, start, times, atol=tolerance, rtol=tolerance)
    normal = -z[-1].square().sum(1) / 2 - math.log(2 * math.pi)
    return normal - change[-1]


def ring(count):
    angle = 2 * math.pi * torch.rand(count).double()
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.1 * randn(count, 2)


@each_solver
def test_gradients_are_those_of_a_divergence_by_hand(solver):
    velocity, x = velocity_of(), ring(6)
    grads = []
    for kind in (Flow, ByHand):
        loss = -log_likelihood(kind(velocity), x, solver, 1e-9).mean()
        grads.append(torch.autograd.grad(loss, list(velocity.parameters())))
    equal(*grads, 1e-6)


@each_solver
def test_a_flow_trains(solver):
    velocity, data = velocity_of(), ring(64)
    flow = Flow(velocity)
    optimizer = torch.optim.Adam(velocity.parameters(), 2e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(-log_likelihood(flow, data, solver, 1e-4).mean())
        losses[-1].backward()
        optimizer.step()
    assert flow.calls > 25
    assert losses[-1] < losses[0] - 0.3


def test_both_solvers_train_to_the_same_parameters():
    data, trained = ring(32), []
    start = velocity_of().state_dict()
    for solver in SOLVERS:
        velocity = velocity_of()
        velocity.load_state_dict(start)
        optimizer = torch.optim.SGD(velocity.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            (-log_likelihood(Flow(velocity), data, solver, 1e-8).mean()).backward()
            optimizer.step()
        trained.append([p.detach() for p in velocity.parameters()])
    equal(*trained, 1e-5)


def test_the_integral_is_a_log_determinant():
    """Of the map from the end of the flow to its start."""
    flow, x = Flow(velocity_of()), ring(5)
    times = torch.tensor([1.0, 0.0]).double()
    words = {"atol": 1e-9, "rtol": 1e-9}
    with torch.no_grad():
        _, change = torchdiffeq.odeint(flow, (x, torch.zeros(5).double()), times, **words)

    def backwards(x):
        field = lambda t, x: flow.velocity(torch.cat([x, t.expand(len(x), 1)], 1))
        return torchdiffeq.odeint(field, x, times, **words)[-1]

    jac = batch_jacobian(backwards)(x)
    equal(torch.linalg.slogdet(jac).logabsdet.detach(), -change[-1], 1e-5)


def test_a_flow_trains_on_an_estimated_divergence():
    """Hutchinson's estimate lies within its own standard error of the exact divergence."""
    velocity, x = velocity_of(), ring(4)
    time = torch.tensor(0.5).double()
    exact, _ = Flow(velocity).divergence(time, x)
    (estimate, error), _ = Flow(velocity, samples=400, return_error=True).divergence(time, x)
    assert (error > 0).all()
    assert ((estimate - exact).abs() < 5 * error).all()
    noisy, change = Flow(velocity, samples=1)(time, (x, exact))
    assert noisy.shape == (4, 2)
    grads = torch.autograd.grad(change.sum(), list(velocity.parameters()), allow_unused=True)
    assert any(grad.abs().sum() > 0 for grad in grads if grad is not None)
