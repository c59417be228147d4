"""Higher derivatives that plain PyTorch gets wrong, against central differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from funcjac import batch_hessian, batch_hessian_diagonal, batch_jacobian, batch_laplacian
from tests.oracles import SINCE_2_13

f64 = torch.float64
STEP = 1e-5

NORMS = {
    "layer_norm": lambda: nn.LayerNorm(4),
    "instance_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1, affine=True), nn.Flatten()
    ),
    "group_norm": lambda: nn.GroupNorm(2, 4),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), NORMS[name](), nn.Tanh(), nn.Linear(4, 1)).to(f64)


def slope(value, parameter: torch.Tensor, direction: torch.Tensor) -> tuple[float, float]:
    """The derivative of ``value()`` along a direction: by autograd, and by differences."""
    (found,) = torch.autograd.grad(value(), parameter)
    sides = []
    for step in (STEP, -2 * STEP):
        with torch.no_grad():
            parameter += step * direction
        sides.append(value().item())
    with torch.no_grad():
        parameter += STEP * direction
    return (found * direction).sum().item(), (sides[0] - sides[1]) / (2 * STEP)


def assert_slope(value, parameter: torch.Tensor) -> None:
    direction = torch.randn_like(parameter)
    for _ in range(4):  # while a route is being chosen, and after
        ours, theirs = slope(value, parameter, direction)
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
def test_gradient_of_a_jacobian_of_a_jacobian_is_right(name, mode):
    net, x = network(name), torch.randn(4, 3, dtype=f64)
    nested = batch_jacobian(batch_jacobian(net, mode=mode), mode=mode)
    assert_slope(lambda: nested(x).square().sum(), net[0].weight)


@pytest.mark.parametrize("name", NORMS)
def test_jacobian_differentiated_twice_by_its_user_is_right(name):
    net, x = network(name), torch.randn(4, 3, dtype=f64, requires_grad=True)
    jac = batch_jacobian(net)

    def value():
        (bent,) = torch.autograd.grad(jac(x).sum(), x, create_graph=True)
        return bent.square().sum()

    assert_slope(value, net[0].weight)


@pytest.mark.parametrize("name", NORMS)
def test_jacobian_inside_of_two_gradients_is_right(name):
    net, x = network(name), torch.randn(4, 3, dtype=f64, requires_grad=True)
    jac = batch_jacobian(net)
    bent = torch.func.grad(lambda x: jac(x).sum())
    outer = torch.func.grad(lambda x: bent(x).square().sum())
    direction = torch.randn_like(x)
    sides = [bent(x + step * direction).square().sum().item() for step in (STEP, -STEP)]
    wanted = (sides[0] - sides[1]) / (2 * STEP)
    assert (outer(x) * direction).sum().item() == pytest.approx(wanted, rel=1e-5)


def test_second_derivatives_by_the_weights_of_weight_norm_are_right():
    torch.manual_seed(0)
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).to(f64)
    name = "parametrizations.weight.original1"
    v, x = net.get_parameter(name).detach(), torch.randn(4, 3, dtype=f64)

    def outputs(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return functional_call(net, {name: v}, (x,)).tanh()

    jac = batch_jacobian(outputs, in_dims=(None, 0))
    direction = torch.randn_like(v)
    sides = [jac(v + step * direction, x) for step in (STEP, -STEP)]
    wanted = (sides[0] - sides[1]) / (2 * STEP)
    hess = batch_jacobian(jac, in_dims=(None, 0))(v, x)
    torch.testing.assert_close((hess * direction).sum((-1, -2)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not SINCE_2_13, reason="new in PyTorch 2.13")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_cross_entropy_in_chunks_is_right(reduction):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, dtype=f64), torch.randn(4, 5, dtype=f64)
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        target = torch.zeros(1, dtype=torch.long)
        rows = [
            F.linear_cross_entropy(
                row[None], weight, target, options=options, reduction=reduction
            ).reshape(())
            for row in x
        ]
        return torch.stack(rows)

    target = torch.zeros(3, dtype=torch.long)
    plain = batch_hessian(
        lambda x: F.cross_entropy(x @ weight.mT, target[: len(x)], reduction="none")
    )
    wanted = plain(x)
    assert wanted.abs().max() > 0.01
    diagonal = wanted.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(batch_jacobian(batch_jacobian(loss))(x), wanted)
    torch.testing.assert_close(batch_hessian(loss)(x), wanted)
    torch.testing.assert_close(batch_hessian_diagonal(loss)(x), diagonal)
    torch.testing.assert_close(batch_laplacian(loss)(x), diagonal.sum(1))
