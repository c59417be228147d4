"""TensorDict: as an input, as an output, and as the parameters of a module."""

import pytest
import torch
from torch import nn

from funcjac import batch_hessian, batch_jacobian, batch_laplacian
from tests.tensors import equal, randn

tensordict = pytest.importorskip("tensordict", reason="tensordict is not installed: make clients")
TensorDict = tensordict.TensorDict


def state():
    inner = {"vel": randn(4, 2)}
    return TensorDict({"pos": randn(4, 3), "nested": inner}, batch_size=[4])


def energy(td):
    return td["pos"].square().sum(1) * td["nested", "vel"].sum(1)


def test_tensordict_in():
    td = state()
    jac, value = batch_jacobian(energy, return_value=True)(td)
    assert isinstance(jac, TensorDict)
    assert jac.batch_size == (4,)
    equal(value, energy(td))
    speed = td["nested", "vel"].sum(1, keepdim=True)
    equal(jac["pos"], 2 * td["pos"] * speed)
    equal(jac["nested", "vel"], td["pos"].square().sum(1, keepdim=True).expand(4, 2))


def test_hessian_by_a_tensordict():
    td = state()
    hess = batch_hessian(energy)(td)
    assert hess["pos", "nested", "vel"].shape == (4, 3, 2)
    equal(hess["pos", "nested", "vel"], 2 * td["pos"].unsqueeze(2).expand(4, 3, 2))
    speed = td["nested", "vel"].sum(1)
    equal(hess["pos", "pos"], 2 * speed[:, None, None] * torch.eye(3).double())
    equal(batch_laplacian(energy)(td), 6 * speed)


def test_tensordict_out():
    """Like vmap of jacrev, the structure of the output is outside."""

    def func(td):
        out = {"energy": td["pos"].square().sum(-1), "sin": td["pos"].sin()}
        return TensorDict(out, batch_size=td.batch_size)

    td = state().select("pos")
    jac, expected = batch_jacobian(func)(td), torch.vmap(torch.func.jacrev(func))(td)
    assert isinstance(jac, TensorDict)
    assert set(jac.keys(True, True)) == set(expected.keys(True, True))
    assert jac["sin", "pos"].shape == (4, 3, 3)
    for key in jac.keys(True, True):
        equal(jac[key], expected[key])


def test_parameters_as_a_tensordict():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    params, x = TensorDict.from_module(net), randn(5, 3)

    def func(params, x):
        with params.to_module(net):
            return net(x)

    jac = batch_jacobian(func, in_dims=(None, 0))(params, x)
    assert jac["2", "weight"].shape == (5, 2, 2, 4)
    expected = torch.zeros(5, 2, 2, 4).double()
    expected[:, 0, 0] = expected[:, 1, 1] = net[:2](x).detach()
    equal(jac["2", "weight"].detach(), expected)
    assert torch.equal(net[0].weight, params["0", "weight"])
