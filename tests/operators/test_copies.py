"""Transforms are copied, pickled, saved and printed."""

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
from torch import nn

from funcjac import (
    batch_jacobian,
    batch_laplacian,
)
from funcjac._operators.transform import Binding
from tests.cases.modules import network
from tests.cases.transforms import OF_NETWORKS
from tests.tensors import equal, randn

B = 4


class Owner(nn.Module):
    """A module that owns a transform of its own layers."""

    def __init__(self, how="layers"):
        super().__init__()
        self.layers = network()
        self.slopes = batch_jacobian(self.layers if how == "layers" else self.values)

    def values(self, x):
        return self.layers(x) * 2

    def forward(self, x):
        return self.slopes(x)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["layers", "method"])
def test_a_deep_copy_uses_the_layers_of_the_copy(how):
    owner, x = Owner(how), randn(B, 3)
    before = owner(x)
    other = copy.deepcopy(owner)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    equal(owner(x), before)
    func = other.layers if how == "layers" else other.values
    equal(other(x), batch_jacobian(func)(x))
    other(x).sum().backward()
    assert other.layers[0].weight.grad is not None
    assert owner.layers[0].weight.grad is None


@pytest.mark.quick
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", OF_NETWORKS)
def test_a_transform_is_pickled_and_saved(name, called):
    transformed, x = OF_NETWORKS[name](network()), randn(B, 3)
    if called:
        transformed(x)
    right = transformed(x)
    equal(pickle.loads(pickle.dumps(transformed))(x), right)
    equal(copy.deepcopy(transformed)(x), right)
    buffer = io.BytesIO()
    torch.save(transformed, buffer)
    buffer.seek(0)
    equal(torch.load(buffer, weights_only=False)(x), right)


def test_a_module_that_owns_a_transform_is_saved():
    owner, x = Owner(), randn(B, 3)
    right = owner(x)
    equal(pickle.loads(pickle.dumps(owner))(x), right)


@pytest.mark.quick
def test_a_transform_prints_its_function_and_keywords():
    text = repr(batch_jacobian(network(), mode="rev", chunk_size=2))
    assert text.startswith("batch_jacobian(")
    assert "mode='rev'" in text
    assert "chunk_size=2" in text
    assert "randomness" not in text
    assert "sin" in repr(batch_laplacian(torch.sin))


def test_a_copy_follows_functions_inside_of_functions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1).double()
            inner = lambda x: self.layer(x).tanh()
            self.slope = batch_jacobian(lambda x: inner(x))

    x = torch.randn(5, 3, dtype=torch.float64)
    copied = copy.deepcopy(Model())
    with torch.no_grad():
        copied.layer.weight.mul_(3)
    expected = batch_jacobian(lambda x: copied.layer(x).tanh())(x)
    torch.testing.assert_close(copied.slope(x), expected)


def test_binds_where_it_is_looked_up_by_name():
    transform, owner = batch_jacobian(torch.sin), Owner()
    assert transform.__get__(None, Owner) is transform
    assert transform.__get__(owner, Owner).__self__ is owner
    assert transform.__get__(owner, Owner).__func__ is transform
    assert type(transform).__get__(transform, owner, Owner).__func__ is transform


def test_binding_before_torch_2_13():
    """Dynamo looks on the class alone for what has a ``__get__`` that is a function of Python."""
    transform, owner = batch_jacobian(torch.sin), object()
    of_class = Binding().__get__(None, type(transform))
    assert isinstance(of_class, types.MethodWrapperType)
    assert of_class(transform, owner).__self__ is owner
    assert Binding().__get__(transform)(owner).__self__ is owner


def test_has_the_signature_of_its_function():
    def scaled(x, scale=2.0, *, shift):
        return scale * x + shift

    assert str(inspect.signature(batch_jacobian(scaled))) == "(x, scale=2.0, *, shift)"
    assert str(inspect.signature(batch_jacobian(batch_laplacian(lambda x: x)))) == "(x)"
