"""JAX: derivatives of the same networks, with the same parameters."""

import functools

import numpy
import pytest
import torch
from torch import nn

from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
)
from tests.tensors import equal, randn

jax = pytest.importorskip("jax", reason="jax is not installed: make clients")
jnp = pytest.importorskip("jax.numpy")
jet = pytest.importorskip("jax.experimental.jet")


@pytest.fixture(autouse=True)
def _double_precision():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def as_jax(x):
    return jnp.asarray(x.detach().numpy())


def as_torch(x):
    return torch.from_numpy(numpy.array(x))


def linear(layer, x):
    return as_jax(layer.weight) @ x + as_jax(layer.bias)


ACTIVATIONS = {
    "tanh": (nn.Tanh(), jnp.tanh),
    "sigmoid": (nn.Sigmoid(), jax.nn.sigmoid),
    "softplus": (nn.Softplus(threshold=1000), jax.nn.softplus),
    "sine": (torch.sin, jnp.sin),
    "gelu": (nn.GELU("tanh"), functools.partial(jax.nn.gelu, approximate=True)),
}


def dense(activation, outputs=2):
    """A network of a batch in torch, and of one sample in JAX."""
    ours, theirs = ACTIVATIONS[activation]
    first, second = nn.Linear(3, 8).double(), nn.Linear(8, outputs).double()
    return (
        lambda x: second(ours(first(x))),
        lambda x: linear(second, theirs(linear(first, x))),
    )


def convolutional(_=None):
    kernel, last = nn.Conv1d(1, 4, 2).double(), nn.Linear(8, 2).double()

    def theirs(x):
        moved = jax.lax.conv(x[None, None], as_jax(kernel.weight), (1,), "VALID")
        hidden = jnp.tanh(moved[0] + as_jax(kernel.bias)[:, None])
        return linear(last, hidden.reshape(-1))

    return lambda x: last(kernel(x.unsqueeze(1)).tanh().flatten(1)), theirs


def attentive(_=None):
    layers = [nn.Linear(1, 4).double() for _ in range(3)]
    norm, last = nn.LayerNorm(4).double(), nn.Linear(4, 2).double()

    def ours(x):
        query, key, value = (layer(x.unsqueeze(2)).unsqueeze(1) for layer in layers)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return last(norm(mixed.squeeze(1)).mean(1))

    def theirs(x):
        query, key, value = (
            x[:, None] @ as_jax(layer.weight).T + as_jax(layer.bias) for layer in layers
        )
        mixed = jax.nn.softmax(query @ key.T / 2, axis=-1) @ value
        mean, spread = mixed.mean(1, keepdims=True), mixed.var(1, keepdims=True)
        normal = (mixed - mean) / jnp.sqrt(spread + norm.eps)
        return linear(last, normal.mean(0))

    return ours, theirs


NETWORKS = {name: functools.partial(dense, name) for name in ACTIVATIONS}
NETWORKS |= {"convolutional": convolutional, "attentive": attentive}
each_network = pytest.mark.parametrize("name", NETWORKS)


def by_jax(transform, x):
    return as_torch(jax.jit(jax.vmap(transform))(as_jax(x)))


@each_network
def test_jacobian(name):
    (ours, theirs), x = NETWORKS[name](), randn(5, 3)
    jac = batch_jacobian(ours)(x).detach()
    assert jac.shape == (5, 2, 3)
    equal(jac, by_jax(jax.jacrev(theirs), x))
    equal(jac, by_jax(jax.jacfwd(theirs), x))


@each_network
def test_hessian(name):
    (ours, theirs), x = NETWORKS[name](), randn(5, 3)
    hess = by_jax(jax.hessian(theirs), x)
    assert hess.shape == (5, 2, 3, 3)
    equal(batch_hessian(ours)(x).detach(), hess, 1e-9)
    equal(batch_hessian_diagonal(ours)(x).detach(), hess.diagonal(dim1=2, dim2=3), 1e-9)


def laplacian_by_jvp(func):
    """Forward over forward along each coordinate."""

    def second(x, v):
        slope = lambda x: jax.jvp(func, (x,), (v,))[1]
        return jax.jvp(slope, (x,), (v,))[1]

    return lambda x: sum(second(x, v) for v in jnp.eye(3))


def laplacian_by_jet(func):
    """Taylor series along each coordinate."""

    def second(x, v):
        _, (_, curve) = jet.jet(func, (x,), ((v, jnp.zeros(3)),))
        return curve

    return lambda x: sum(second(x, v) for v in jnp.eye(3))


@each_network
def test_laplacian(name):
    (ours, theirs), x = NETWORKS[name](), randn(5, 3)
    lap = batch_laplacian(ours)(x).detach()
    equal(lap, by_jax(laplacian_by_jvp(theirs), x), 1e-9)
    if name in ("tanh", "sine", "sigmoid"):  # jet has no rule for what the others use
        equal(lap, by_jax(laplacian_by_jet(theirs), x), 1e-9)


@each_network
def test_third_derivatives(name):
    (ours, theirs), x = NETWORKS[name](), randn(5, 3)
    third = by_jax(jax.jacfwd(jax.jacfwd(jax.jacfwd(theirs))), x)
    mixed, pure = batch_partials(ours, [(0, 1, 2), (1, 1, 1)])(x)
    equal(mixed.detach(), third[:, :, 0, 1, 2], 1e-8)
    equal(pure.detach(), third[:, :, 1, 1, 1], 1e-8)


def test_divergence():
    (ours, theirs), x = dense("tanh", outputs=3), randn(5, 3)
    expected = by_jax(lambda x: jnp.trace(jax.jacfwd(theirs)(x)), x)
    equal(batch_divergence(ours)(x).detach(), expected)
