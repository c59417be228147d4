"""TorchJD: Jacobians of losses by parameters, their Gramian, and the step it makes of them."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from funcjac import batch_jacobian, batch_jacobian_of
from tests.tensors import equal, randn

pytest.importorskip("torchjd", reason="torchjd is not installed: make clients")
autojac = pytest.importorskip("torchjd.autojac")
autogram = pytest.importorskip("torchjd.autogram")
aggregation = pytest.importorskip("torchjd.aggregation")


def problem():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, randn(5, 4), torch.randint(3, (5,))


def losses(net):
    def each(params, x, y):
        logits = functional_call(net, params, (x,))
        return nn.functional.cross_entropy(logits, y, reduction="none")

    return each


def matrix_of(jac):
    """``(B, P)``: one row for each loss."""
    return torch.cat([block.flatten(1) for block in jac.values()], 1)


def test_jacobians_of_losses_by_parameters():
    net, x, y = problem()
    params = dict(net.named_parameters())
    jac = batch_jacobian(losses(net), in_dims=(None, 0, 0))(params, x, y)
    expected = autojac.jac(losses(net)(params, x, y), list(params.values()))
    equal(tuple(jac.values()), expected)


def test_gramian():
    net, x, y = problem()
    params = dict(net.named_parameters())
    matrix = matrix_of(batch_jacobian(losses(net), in_dims=(None, 0, 0))(params, x, y))
    engine = autogram.Engine(net, batch_dim=0)
    gramian = engine.compute_gramian(nn.functional.cross_entropy(net(x), y, reduction="none"))
    equal(matrix @ matrix.T, gramian)


def test_a_step_of_jacobian_descent():
    """Its aggregator, of the matrix of funcjac, gives the gradients of its own backward."""
    net, x, y = problem()
    params = dict(net.named_parameters())
    matrix = matrix_of(batch_jacobian(losses(net), in_dims=(None, 0, 0))(params, x, y))
    step = aggregation.MGDA()(matrix.detach())
    autojac.backward(nn.functional.cross_entropy(net(x), y, reduction="none"))
    autojac.jac_to_grad(net.parameters(), aggregation.MGDA())
    equal(step, torch.cat([p.grad.flatten() for p in net.parameters()]), 1e-6)


def test_jacobians_by_features():
    """Its Jacobian has all pairs of samples, and blocks of zeros off the diagonal."""
    net, x, _ = problem()
    x.requires_grad_()
    out = net(x)
    (pairs,) = autojac.jac(out, x, retain_graph=True)  # (B * 3, B, 4)
    blocks = pairs.reshape(5, 3, 5, 4)
    equal(batch_jacobian_of(out, x), blocks[range(5), :, range(5)])
