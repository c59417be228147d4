"""Modules that fx, exec, export and compile made, and packed sequences."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from funcjac import (
    batch_hessian,
    batch_jacobian,
    batch_jacobian_of,
    batch_laplacian,
    check_derivative,
)
from tests import oracles
from tests.cases.modules import network
from tests.tensors import equal, randn

B = 4


def by_fx():
    return torch.fx.symbolic_trace(network())


def by_exec():
    scope: dict[str, Any] = {"nn": nn, "__name__": None}
    exec(
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.sin() * x.sum(1, True)\n",
        scope,
    )
    return scope["Net"]()


@pytest.mark.quick
@pytest.mark.parametrize("make", [by_fx, by_exec])
@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_modules_made_by_machines_are_right(make, transform):
    net, x = make(), randn(B, 3)
    right = transform(lambda x: net(x), check=False)(x)
    for _ in range(3):
        equal(transform(net)(x), right)
    if transform is batch_jacobian:
        equal(right.detach(), oracles.by_rows(net, (x,)).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_module_is_right():
    net, x = network(), randn(B, 3)
    exported = torch.export.export(net, (x,)).module()
    for _ in range(2):
        equal(batch_jacobian(exported)(x).detach(), batch_jacobian(net)(x).detach())


class Calling(nn.Module):
    """A module that calls a transform."""

    def __init__(self, way):
        super().__init__()
        self.net, self.way = network().requires_grad_(False), way

    def forward(self, x):
        return self.way(self.net, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "way",
    [
        lambda net, x: batch_jacobian(net)(x),
        lambda net, x: batch_jacobian(net, engine="vmap")(x),
        lambda net, x: batch_laplacian(net)(x),
        lambda net, x: batch_jacobian_of(net(x), x),
    ],
    ids=["Jacobian", "vmap", "Laplacian", "existing"],
)
def test_export_of_a_module_that_calls_a_transform(way, strict):
    """Refused in a sentence, which says what to do."""
    module, x = Calling(way), randn(B, 3).requires_grad_()
    with pytest.raises(Exception, match=r"torch.export to see no transform.* make_fx\(module\)"):
        torch.export.export(module, (x,), strict=strict)
    exported = torch.export.export(make_fx(module)(x), (x,)).module()
    equal(exported(x).detach(), module(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected")
@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian, batch_laplacian])
def test_a_compiled_network_inside_is_right_or_refused(transform):
    """Right, or told to compile the whole."""
    net, x = network(), randn(B, 3)
    torch._dynamo.reset()
    try:
        found = transform(torch.compile(net, backend="eager"))(x)
    except (RuntimeError, ValueError) as error:
        assert str(error).startswith(f"{transform.__name__}: ")  # noqa: PT017
        assert "torch.compile" in str(error)  # noqa: PT017
    else:
        equal(found.detach(), transform(net)(x).detach())
    finally:
        torch._dynamo.reset()


def test_packed_sequences_are_right():
    lstm = nn.LSTM(3, 4, batch_first=True).double()
    lengths = torch.tensor([5, 3, 4, 1])

    def func(x):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return lstm(packed)[1][0][-1]

    x = randn(B, 5, 3)
    jac = batch_jacobian(func)(x)
    right = oracles.by_batch(func, (x,))
    equal(jac.detach(), right.detach())


def test_check_derivative_takes_a_module_made_by_fx():
    net: nn.Module = by_fx()
    x: Tensor = randn(B, 3)
    assert check_derivative(batch_jacobian(net), x).ok
