"""DeepXDE: its derivatives of a network, and equations of its examples with those of funcjac.

``python -m tests.clients.test_deepxde`` prints the time of a step of each kind of residual.
"""

import functools
import math
import os
import time

import numpy
import pytest
import torch

from funcjac import (
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_jacobian_of,
    batch_partials,
)
from tests.tensors import equal

os.environ.setdefault("DDE_BACKEND", "pytorch")  # read when it is imported
dde = pytest.importorskip("deepxde", reason="deepxde is not installed: make clients")


@pytest.fixture(autouse=True)
def _double_precision():
    dde.config.set_default_float("float64")
    dde.config.set_random_seed(0)
    yield
    dde.config.set_default_float("float32")


def test_derivatives_of_a_network():
    """Entry by entry, of the tensors that exist and of the network."""
    net = dde.nn.FNN([2, 16, 16, 3], "tanh", "Glorot normal")
    x = torch.rand(20, 2).requires_grad_()
    y = net(x)
    jac, existing = batch_jacobian(net)(x), batch_jacobian_of(y, x)
    hess, diagonal = batch_hessian(net)(x), batch_hessian_diagonal(net)(x)
    assert jac.shape == (20, 3, 2)
    for i in range(3):
        for j in range(2):
            own = dde.grad.jacobian(y, x, i=i, j=j)
            equal(jac[:, i, j, None], own)
            equal(existing[:, i, j, None], own)
            equal(diagonal[:, i, j, None], dde.grad.hessian(y, x, component=i, i=j, j=j))
            equal(hess[:, i, 0, j, None], dde.grad.hessian(y, x, component=i, i=0, j=j))
    dde.grad.clear()


# --- Poisson's equation, -u'' = pi^2 sin(pi x) on [-1, 1], as in its example -----------------


def poisson(second):
    """The problem, and its solution. ``second(net, x, y)`` is the second derivative."""
    net = dde.nn.FNN([1, 20, 20, 1], "tanh", "Glorot uniform")

    def residual(x, y):
        return -second(net, x, y) - math.pi**2 * torch.sin(math.pi * x)

    solution = lambda x: numpy.sin(numpy.pi * x)
    line = dde.geometry.Interval(-1, 1)
    ends = dde.icbc.DirichletBC(line, solution, lambda _, on_boundary: on_boundary)
    data = dde.data.PDE(line, residual, ends, 16, 2, solution=solution, num_test=100)
    return data, net


SECOND = {
    "own": lambda net, x, y: dde.grad.hessian(y, x),
    "of tensors": lambda net, x, y: batch_jacobian_of(batch_jacobian_of(y, x)[:, 0], x)[:, 0],
    "of the network": lambda net, x, y: batch_hessian_diagonal(net)(x)[:, 0],
}

# --- Burgers' equation, u_t + u u_x = 0.01 / pi u_xx, as in its example -----------------------


def burgers(partials):
    """The problem. ``partials(net, x, y)`` are ``u_x``, ``u_t`` and ``u_xx``, ``(B, 1)`` each."""
    net = dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal")

    def residual(x, y):
        u_x, u_t, u_xx = partials(net, x, y)
        return u_t + y * u_x - 0.01 / math.pi * u_xx

    line, times = dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99)
    domain = dde.geometry.GeometryXTime(line, times)
    ends = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary)
    start = dde.icbc.IC(
        domain, lambda x: -numpy.sin(numpy.pi * x[:, :1]), lambda _, on_initial: on_initial
    )
    words = {"num_domain": 500, "num_boundary": 40, "num_initial": 80}
    return dde.data.TimePDE(domain, residual, [ends, start], **words), net


def own_partials(net, x, y):
    u_x, u_t = (dde.grad.jacobian(y, x, i=0, j=j) for j in (0, 1))
    return u_x, u_t, dde.grad.hessian(y, x, i=0, j=0)


def partials_of_tensors(net, x, y):
    jac = batch_jacobian_of(y, x)  # (B, 1, 2)
    second = batch_jacobian_of(jac[..., 0], x)
    return jac[..., 0], jac[..., 1], second[..., 0]


def partials_of_the_network(net, x, y):
    return batch_partials(net, [(0,), (1,), (0, 0)])(x)


PARTIALS = {
    "own": own_partials,
    "of tensors": partials_of_tensors,
    "of the network": partials_of_the_network,
}


def train(make, derivatives, iterations):
    """The losses on the way, and the model that was trained."""
    dde.config.set_random_seed(0)
    data, net = make(derivatives)
    model = dde.Model(data, net)
    metrics = ["l2 relative error"] if make is poisson else []
    model.compile("adam", lr=2e-3, metrics=metrics, verbose=0)
    history, _ = model.train(iterations=iterations, display_every=iterations // 4, verbose=0)
    return numpy.array([sum(loss) for loss in history.loss_train]), history, model


@functools.cache
def train_own(make, iterations):
    return train(make, SECOND["own"] if make is poisson else PARTIALS["own"], iterations)


@pytest.mark.parametrize("kind", ["of tensors", "of the network"])
def test_poisson_to_the_same_error(kind):
    losses, history, model = train(poisson, SECOND[kind], 1200)
    expected, own_history, own = train_own(poisson, 1200)
    numpy.testing.assert_allclose(losses, expected, rtol=1e-4)
    error, own_error = history.metrics_test[-1][0], own_history.metrics_test[-1][0]
    assert error < 0.02
    assert abs(error - own_error) < 1e-4 * own_error
    points = numpy.linspace(-1, 1, 11)[:, None]
    numpy.testing.assert_allclose(model.predict(points), own.predict(points), atol=1e-5)


@pytest.mark.parametrize("kind", ["of tensors", "of the network"])
def test_burgers_on_the_same_path(kind):
    losses, _, model = train(burgers, PARTIALS[kind], 200)
    expected, _, own = train_own(burgers, 200)
    assert losses[-1] < losses[0] / 2
    numpy.testing.assert_allclose(losses, expected, rtol=1e-6)
    points = numpy.random.default_rng(0).random((20, 2))
    numpy.testing.assert_allclose(model.predict(points), own.predict(points), atol=1e-6)


# --- time -----------------------------------------------------------------------------------


def main(repeats=5, iterations=100):
    """Milliseconds per step, in single precision, kinds in turn; the shortest of repeats."""
    torch.set_num_threads(1)
    for make, kinds in ((poisson, SECOND), (burgers, PARTIALS)):
        times = {kind: [] for kind in kinds}
        for repeat in range(repeats + 1):
            for kind, derivatives in kinds.items():
                start = time.perf_counter()
                train(make, derivatives, iterations)
                if repeat:  # the first one imports
                    times[kind].append((time.perf_counter() - start) / iterations)
        for kind, values in times.items():
            print(f"{make.__name__:8} {kind:15} {1000 * min(values):6.2f} ms")  # noqa: T201


if __name__ == "__main__":
    main()
