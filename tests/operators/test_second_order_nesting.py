"""Operators of operators, inside torch.func, under ``backward`` and in other contexts."""

import functools
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
)
from tests import oracles
from tests.tensors import equal, randn

B = 4
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd", "auto")
TAYLOR = ("taylor", *NESTED)
FIRST = ("fwd", "rev", "auto")
by_mode = pytest.mark.parametrize("mode", TAYLOR)
INDICES = [(0,), (2, 1), (0, 0)]
WEIGHT = torch.tensor([[2.0, -1, 0], [-1, 0, 0.5], [0, 0.5, -1]], dtype=torch.float64)

OPERATORS = {
    "hessian": (batch_hessian, NESTED),
    "diagonal": (batch_hessian_diagonal, TAYLOR),
    "laplacian": (batch_laplacian, TAYLOR),
    "weighted": (functools.partial(batch_laplacian, weight=WEIGHT), TAYLOR),
    "divergence": (batch_divergence, FIRST),
    "partials": (functools.partial(batch_partials, indices=INDICES), ("taylor", "rev", "auto")),
}
ROUTES = [(name, mode) for name, (_, modes) in OPERATORS.items() for mode in modes]
by_route = pytest.mark.parametrize(("name", "mode"), ROUTES)


def network(out=3):
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, out)).double()
    net[0].weight.data *= 2
    return net


def made(name, func, mode="auto", **words):
    """One tensor out of every operator, so that all can be treated alike."""
    transformed = OPERATORS[name][0](func, mode=mode, **words)
    if name != "partials":
        return transformed
    return lambda *args: torch.stack(transformed(*args), 1)


def oracle(name, func, x, **words):
    """What ``made`` must give, from rows."""
    if name == "divergence":
        return oracles.divergence(func, (x,), **words)
    if name == "partials":
        return torch.stack(oracles.partials(func, (x,), INDICES, **words), 1)
    if name == "weighted":
        return oracles.laplacian(func, (x,), weight=WEIGHT, **words)
    return getattr(oracles, name)(func, (x,), **words)


# --- closed forms of nested operators ----------------------------------------------------


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(TAYLOR, TAYLOR)), ids=str)
def test_biharmonic(outer, inner):
    """Of ``|x|**4`` in three dimensions 120, of a plane wave the wave."""
    twice = lambda func: batch_laplacian(batch_laplacian(func, mode=inner), mode=outer)
    a, x = randn(3), randn(B, 3)
    wave = twice(lambda x: (x @ a).sin())
    fourth = twice(lambda x: (x * x).sum(1) ** 2)
    for _ in range(2):
        equal(fourth(x), torch.full((B,), 120.0).double())
        equal(wave(x), (a @ a) ** 2 * (x @ a).sin())


@by_mode
def test_gradient_of_a_laplacian(mode):
    a, x = randn(3), randn(B, 3)
    laplacian = batch_laplacian(lambda x: (x @ a).sin(), mode=mode)
    for first in FIRST:
        found = batch_jacobian(laplacian, mode=first)(x)
        equal(found, -(a @ a) * (x @ a).cos()[:, None] * a)


@by_mode
@pytest.mark.parametrize("first", FIRST)
def test_laplacian_of_a_divergence(first, mode):
    a, x = randn(3, 3), randn(B, 3)
    divergence = batch_divergence(lambda x: (x @ a.T).sin(), mode=first)
    phase = x @ a.T
    equal(divergence(x), (phase.cos() * a.diagonal()).sum(1))
    expected = -(phase.cos() * a.diagonal() * (a * a).sum(1)).sum(1)
    equal(batch_laplacian(divergence, mode=mode)(x), expected)


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(FIRST, FIRST)), ids=str)
def test_the_laplacian_is_the_divergence_of_the_gradient(outer, inner):
    net, x = network(1), randn(B, 3)
    gradient = batch_jacobian(lambda x: net(x)[:, 0], mode=inner)  # (B, 3)
    divergence = batch_divergence(gradient, mode=outer)
    for _ in range(2):
        equal(divergence(x), oracles.laplacian(net, (x,))[:, 0])


@by_mode
def test_diagonal_of_a_laplacian(mode):
    a, x = randn(3), randn(B, 3)
    laplacian = batch_laplacian(lambda x: (x @ a).exp(), mode=mode)
    expected = (a @ a) * (x @ a).exp()[:, None] * a**2
    equal(batch_hessian_diagonal(laplacian, mode=mode)(x), expected)


@pytest.mark.parametrize("mode", NESTED)
def test_hessian_of_a_divergence_and_jacobian_of_a_hessian(mode):
    a, x = randn(2, 3), randn(B, 3)
    wave = lambda x: (x @ a.T).sin()
    third = batch_jacobian(batch_hessian(wave, mode=mode))(x)
    expected = -torch.einsum("bo,oi,oj,ok->boijk", (x @ a.T).cos(), a, a, a)
    equal(third, expected)
    a = a[0]
    divergence = batch_divergence(lambda x: (x @ a).sin()[:, None] * a)  # a @ a * cos
    hessian = batch_hessian(divergence, mode=mode)(x)
    equal(hessian, -(a @ a) * (x @ a).cos()[:, None, None] * torch.outer(a, a))


@pytest.mark.parametrize("mode", ["taylor", "rev", "auto"])
def test_partials_of_partials(mode):
    x, weight = randn(B, 3), randn(3)
    inner = batch_partials(lambda x: (x @ weight).exp(), [(0,), (1, 2)], mode=mode)
    by_first, by_both = batch_partials(inner, [(2,), (0, 0)], mode=mode)(x)
    value = (x @ weight).exp()
    equal(by_first[0], value * weight[0] * weight[2])
    equal(by_first[1], value * weight[1] * weight[2] ** 2)
    equal(by_both[0], value * weight[0] ** 3)
    equal(by_both[1], value * weight[1] * weight[2] * weight[0] ** 2)


@by_route
def test_a_residual_of_a_differential_equation(name, mode):
    """An operator amid other code is a batched function like any other."""
    net, x = network(), randn(B, 3)
    operator = made(name, net, mode)
    residual = lambda x: net(x).sum(1) * operator(x).reshape(len(x), -1).sum(1)
    found = batch_jacobian(residual)(x)
    x.requires_grad_()
    right = oracle(name, net, x, create_graph=True).reshape(B, -1).sum(1)
    (expected,) = torch.autograd.grad((net(x).sum(1) * right).sum(), x)
    equal(found.detach(), expected)


# --- inside torch.func -------------------------------------------------------------------


def slopes(name, func, x, cotangent):
    """The gradient of ``cotangent * operator``, by rows."""
    x = x.clone().requires_grad_()
    right = oracle(name, func, x, create_graph=True)
    return torch.autograd.grad((cotangent * right).sum(), x)[0]


@by_route
def test_inside_grad(name, mode):
    net, x = network().requires_grad_(False), randn(B, 3)
    operator, cotangent = made(name, net, mode), randn(*oracle(name, net, x).shape)
    for _ in range(2):
        found = torch.func.grad(lambda x: (cotangent * operator(x)).sum())(x)
        equal(found, slopes(name, net, x, cotangent))


@by_route
def test_inside_vjp(name, mode):
    net, x = network().requires_grad_(False), randn(B, 3)
    value, pull = torch.func.vjp(made(name, net, mode), x)
    cotangent = randn(*value.shape)
    equal(value, oracle(name, net, x))
    equal(pull(cotangent)[0], slopes(name, net, x, cotangent))


@by_route
def test_inside_jvp(name, mode):
    net, x, tangent = network().requires_grad_(False), randn(B, 3), randn(B, 3)
    value, pushed = torch.func.jvp(made(name, net, mode), (x,), (tangent,))
    equal(value, oracle(name, net, x))
    # <u, J v> = <J^T u, v>
    cotangent = randn(*value.shape)
    equal((cotangent * pushed).sum(), (slopes(name, net, x, cotangent) * tangent).sum())


@by_route
@pytest.mark.parametrize("batch", [1, 2])
def test_inside_vmap(batch, name, mode):
    net, x = network().requires_grad_(False), randn(5, batch, 3)
    found = torch.vmap(made(name, net, mode))(x)
    whole = oracle(name, net, x.reshape(-1, 3))
    equal(found, whole.reshape(5, batch, *whole.shape[1:]))


@by_route
def test_inside_vmap_of_grad(name, mode):
    """A loss for each sample, differentiated by parameters: per-sample gradients of a PINN."""
    net, x = network(), randn(B, 3)
    parameters = {k: p.detach() for k, p in net.named_parameters()}

    def loss(parameters, x):
        func = lambda x: torch.func.functional_call(net, parameters, (x,))
        return made(name, func, mode)(x[None]).pow(2).sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for b in range(B):
        right = oracle(name, net, x[b : b + 1], create_graph=True).pow(2).sum()
        right = torch.autograd.grad(right, list(net.parameters()), materialize_grads=True)
        equal([grad[b] for grad in found.values()], list(right))


# --- gradients through the result --------------------------------------------------------


@by_route
def test_gradcheck(name, mode):
    """By the input, and by a weight that the network reads at each call."""
    net, x = network(), randn(2, 3).requires_grad_()
    operator = made(name, net, mode)
    assert torch.autograd.gradcheck(lambda x, weight: operator(x), (x, net[0].weight))


@pytest.mark.parametrize("name", ["laplacian", "diagonal", "divergence"])
def test_gradgradcheck(name):
    net, x = network().requires_grad_(False), randn(2, 3).requires_grad_()
    operator = made(name, net)
    operator(x)
    assert torch.autograd.gradgradcheck(operator, (x,))


@pytest.mark.quick
@by_route
def test_training_step(name, mode):
    """``loss.backward()`` fills the gradients that the double loop gives, in every step."""
    net, x = network(), randn(B, 3)
    operator = made(name, net, mode)
    for _ in range(4):
        right = oracle(name, net, x, create_graph=True).pow(2).sum() + net(x).sum()
        expected = torch.autograd.grad(right, list(net.parameters()))
        net.zero_grad()
        (operator(x).pow(2).sum() + net(x).sum()).backward()
        equal([p.grad for p in net.parameters()], list(expected))
        assert x.grad is None
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.01 * p.grad


@by_route
def test_parameters_that_do_not_matter_have_no_gradient(name, mode):
    net, x = network(), randn(B, 3)
    made(name, net, mode)(x).sum().backward()
    assert net[2].bias.grad is None or not net[2].bias.grad.any()
    assert net[0].weight.grad.any()


@by_route
@pytest.mark.parametrize("frozen", [False, True])
def test_what_requires_grad(frozen, name, mode):
    net, x = network().requires_grad_(not frozen), randn(B, 3)
    operator = made(name, net, mode)
    assert operator(x).requires_grad == (not frozen)
    assert operator(x.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert not operator(x.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("calls", [0, 3])
@pytest.mark.parametrize(("name", "mode"), [route for route in ROUTES if route[1] == "auto"])
def test_an_operator_in_a_checkpoint(name, mode, calls):
    """It runs twice there, and does the same both times, be one of them verified or not."""
    if name == "divergence" and not calls:
        pytest.skip("verified inside of a checkpoint, a first call saves more: docs/limits.md")
    net, x = network(), randn(B, 3).requires_grad_()
    operator = made(name, net, mode)
    for _ in range(calls):
        operator(x).sum().backward()
    expected, x.grad = torch.autograd.grad(operator(x).pow(2).sum(), x)[0], None
    checkpoint(operator, x, use_reentrant=False).pow(2).sum().backward()
    equal(x.grad, expected)


# --- other contexts ----------------------------------------------------------------------


@by_route
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, name, mode):
    net, x = network(), randn(B, 3)
    expected, operator = oracle(name, net, x).detach(), made(name, net, mode)
    with context():
        for _ in range(3):
            found = operator(x)
            assert not found.requires_grad
            equal(found, expected)
    equal(operator(x).detach(), expected)


@by_route
def test_an_input_made_in_inference_mode(name, mode):
    net, x = network(), randn(B, 3)
    expected, operator = oracle(name, net, x).detach(), made(name, net, mode)
    with torch.inference_mode():
        x = x.clone()
        equal(operator(x), expected)
    assert x.is_inference()
    equal(operator(x).detach(), expected)


@pytest.mark.parametrize(("name", "mode"), [r for r in ROUTES if r[0] != "weighted"])
def test_autocast(name, mode):
    """The numbers of bfloat16 in the dtype of the input."""
    net, x = network().float().requires_grad_(False), torch.randn(B, 3)
    expected = oracle(name, net.double(), x.double())
    operator = made(name, net.float(), mode)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = operator(x)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0.1)


# --- nothing of the caller's changes -----------------------------------------------------


class Keeps(nn.Module):
    """Keeps an activation and has a buffer, as many modules do."""

    def __init__(self):
        super().__init__()
        self.net, self.last = network(), None
        self.register_buffer("scale", torch.ones(3).double())

    def forward(self, x):
        self.last = self.net(x) * self.scale
        return self.last


@by_route
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_changes(grad, name, mode):
    module, x = Keeps(), randn(B, 3).requires_grad_(grad)
    module.net[2].bias.requires_grad_(False)
    module(x).sum().backward()
    tensors = [x, *module.parameters(), *module.buffers()]
    before = [(t.detach().clone(), t.requires_grad, t._version, id(t.grad)) for t in tensors]
    grads = [None if t.grad is None else t.grad.clone() for t in tensors]
    names, state = sorted(vars(module)), torch.get_rng_state()
    operator = made(name, module, mode)
    for _ in range(5):
        operator(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(vars(module)) == names
    for t, old, gradient in zip(tensors, before, grads):
        assert torch.equal(t, old[0])
        assert (t.requires_grad, t._version, id(t.grad)) == old[1:]
        assert t.grad is None or torch.equal(t.grad, gradient)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(module.last)
    assert module.training


# --- random functions --------------------------------------------------------------------


def noisy(x):
    return (x * torch.rand_like(x)).exp()


def of_one_draw(name, x, value):
    """The operator of ``exp(n * x)``; its value tells which ``n`` was drawn."""
    n = value.log() / x
    second = n**2 * value
    if name == "hessian":
        return torch.diag_embed(torch.diag_embed(second))
    if name == "diagonal":
        return torch.diag_embed(second)
    return second if name == "laplacian" else (n * value).sum(1)


DRAWING = ("hessian", "diagonal", "laplacian", "divergence")


@pytest.mark.parametrize(("name", "mode"), [r for r in ROUTES if r[0] in DRAWING])
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_functions(randomness, name, mode):
    """Value and derivatives belong to one draw."""
    x = randn(B, 3)
    if (mode, randomness) == ("taylor", "same"):  # func runs on the whole batch, and draws so
        with pytest.raises(ValueError, match=r"^batch_.*mode='taylor'.*the same draw"):
            made(name, noisy, mode, randomness=randomness)(x)
        return
    operator = made(name, noisy, mode, randomness=randomness, return_value=True)
    for _ in range(3):
        found, value = operator(x)
        value = value if name == "divergence" else value[1]
        equal(found, of_one_draw(name, x, value))
        rows = value.log() / x
        equal(rows.std(0).max() < 1e-9, torch.tensor(randomness == "same"))


@pytest.mark.parametrize(("name", "mode"), [r for r in ROUTES if r[0] in DRAWING])
def test_random_functions_need_no_leave(name, mode):
    """There is one run, and so one draw; each row has its own."""
    x, operator = randn(B, 3), made(name, noisy, mode, return_value=True)
    for _ in range(3):
        found, value = operator(x)
        value = value if name == "divergence" else value[1]
        equal(found, of_one_draw(name, x, value))
        assert (value.log() / x).std(0).min() > 1e-6
