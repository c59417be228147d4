"""laplace-torch with a backend whose Jacobians and gradients are those of funcjac.

``python -m tests.clients.test_laplace`` prints time and memory of the backends.
"""

import copy
import resource
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from funcjac import batch_jacobian
from tests.tensors import equal, randn

laplace = pytest.importorskip("laplace", reason="laplace-torch is not installed: make clients")
curvature = pytest.importorskip("laplace.curvature")


pytestmark = [
    # BackPACK hooks modules whose inputs require no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    # ASDL uses the hooks that torch had first.
    pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning"),
]


class FuncjacJacobians:
    """What a backend is asked for: ``(B, outputs, parameters)`` and ``(B, parameters)``."""

    def jacobians(self, x, enable_backprop=False):
        def func(params, x):
            return functional_call(self.model, (params, self.buffers_dict), (x,))

        by_params = batch_jacobian(func, in_dims=(None, 0), return_value=True)
        jac, out = by_params(self.params_dict, x)
        jac = torch.cat([block.flatten(2) for block in jac.values()], 2)
        if self.subnetwork_indices is not None:
            jac = jac[:, :, self.subnetwork_indices]
        return (jac, out) if enable_backprop else (jac.detach(), out.detach())

    def gradients(self, x, y):
        def func(params, x, y):
            out = functional_call(self.model, (params, self.buffers_dict), (x,))
            return nn.functional.cross_entropy(out, y, reduction="none")

        by_params = batch_jacobian(func, in_dims=(None, 0, 0), return_value=True)
        grads, losses = by_params(self.params_dict, x, y)
        return torch.cat([block.flatten(1) for block in grads.values()], 1), losses.sum()


class FuncjacGGN(FuncjacJacobians, curvature.GGNInterface):
    """The generalized Gauss-Newton matrix."""


class FuncjacEF(FuncjacJacobians, curvature.EFInterface):
    """The empirical Fisher matrix."""


def dense():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def convolutional():
    layers = nn.Conv1d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *layers)


NETWORKS = {"dense": dense, "convolutional": convolutional}


def trained(make, likelihood):
    """A network near a minimum, and the data it saw."""
    net, x = make().double(), randn(60, 6)
    y = x[:, :3].argmax(1) if likelihood == "classification" else x[:, :3].sin()
    loss = nn.CrossEntropyLoss() if likelihood == "classification" else nn.MSELoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()
    return net, DataLoader(TensorDataset(x, y), batch_size=25)


def variances(net, loader, x, likelihood, backend, structure="full", **words):
    """Covariances ``(B, outputs, outputs)`` of the predictions at points ``x``."""
    words = {"subset_of_weights": "all"} | words
    model = laplace.Laplace(
        copy.deepcopy(net), likelihood, hessian_structure=structure, backend=backend, **words
    )
    model.fit(loader)
    jac, _ = model.backend.jacobians(x)
    return model.functional_variance(jac)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("own", ["GGNInterface", "CurvlinopsGGN", "BackPackGGN", "AsdlGGN"])
def test_predictive_variances_are_those_of_its_own_backends(own, likelihood, structure):
    net, loader = trained(dense, likelihood)
    x = randn(7, 6)
    found = variances(net, loader, x, likelihood, FuncjacGGN, structure)
    assert found.shape == (7, 3, 3)
    expected = variances(net, loader, x, likelihood, getattr(curvature, own), structure)
    # The full matrix of curvlinops is multiplied with an identity of single precision.
    equal(found, expected, 1e-5 if (own, structure) == ("CurvlinopsGGN", "full") else 1e-8)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("structure", ["full", "diag"])
def test_variances_by_the_empirical_fisher_matrix(name, structure):
    net, loader = trained(NETWORKS[name], "classification")
    x = randn(7, 6)
    found = variances(net, loader, x, "classification", FuncjacEF, structure)
    own = variances(net, loader, x, "classification", curvature.EFInterface, structure)
    equal(found, own, 1e-8)


def test_a_convolutional_network():
    net, loader = trained(convolutional, "classification")
    x = randn(7, 6)
    found = variances(net, loader, x, "classification", FuncjacGGN)
    equal(found, variances(net, loader, x, "classification", curvature.BackPackGGN), 1e-8)


def test_a_subnetwork():
    net, loader = trained(dense, "classification")
    words = {"subset_of_weights": "subnetwork", "subnetwork_indices": torch.tensor([0, 5, 40, 70])}
    x = randn(7, 6)
    found = variances(net, loader, x, "classification", FuncjacGGN, **words)
    own = variances(net, loader, x, "classification", curvature.GGNInterface, **words)
    equal(found, own, 1e-8)


def test_gradients_through_the_jacobians():
    """With ``enable_backprop``: the variance by the points at which it is asked."""
    net, _ = trained(dense, "classification")
    grads = []
    for backend in (FuncjacGGN, curvature.GGNInterface):
        x = torch.linspace(-1, 1, 42).double().reshape(7, 6).requires_grad_()
        jac, _ = backend(net, "classification").jacobians(x, enable_backprop=True)
        grads += torch.autograd.grad(jac.square().sum(), x)
    equal(*grads)


# --- time and memory ----------------------------------------------------------------------

BACKENDS = ("FuncjacGGN", "GGNInterface", "BackPackGGN", "AsdlGGN")


def measure(name):
    """The shortest time of a Jacobian by parameters, and how much the peak of memory grew."""
    torch.set_num_threads(1)
    layers = nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)
    net, x = nn.Sequential(*layers), torch.randn(128, 64)
    net.output_size = 10
    backend = (globals().get(name) or getattr(curvature, name))(net, "classification")
    backend.jacobians(x[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(9):
        start = time.perf_counter()
        backend.jacobians(x)
        times.append(time.perf_counter() - start)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return min(times), grown / 1024


def main():
    for name in sys.argv[1:]:
        seconds, grown = measure(name)
        print(f"{name:14} {1000 * seconds:7.1f} ms   {grown:6.0f} MiB")  # noqa: T201
    if not sys.argv[1:]:
        for name in BACKENDS:  # a process each: peaks do not go down
            command = [sys.executable, "-W", "ignore", "-m", "tests.clients.test_laplace", name]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
