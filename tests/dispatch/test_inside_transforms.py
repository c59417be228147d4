"""Inside of torch.func: data closed over, parts without grad, and writes into the input."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from funcjac import (
    BatchMixingError,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
)
from tests.fresh import fresh
from tests.oracles import stacked
from tests.tensors import equal, fixed_randn, randn

B = 4


@pytest.mark.quick
@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_data_closed_over_inside_of_a_gradient_is_right_or_refused(transform):
    """One row of data for each sample: right, or an error that says how to pass it."""
    data, x = randn(B, 3), randn(B, 3)
    inside = transform(lambda x: (x * data).sin())
    passed = transform(lambda x, data: (x * data).sin())
    right = torch.func.grad(lambda x: passed(x, data).square().sum())(x)
    try:
        found = torch.func.grad(lambda x: inside(x).square().sum())(x)
    except (RuntimeError, ValueError) as error:
        assert "closes over" in str(error) or "argument" in str(error)  # noqa: PT017
        assert str(error).startswith(f"{transform.__name__}: ")  # noqa: PT017
    else:
        equal(found, right)


def test_a_batched_tensor_by_keyword_is_right_or_refused():
    """The remedy is to pass it by position, not torch.vmap."""
    data, x = randn(B, 3), randn(B, 3)
    inside = batch_jacobian(lambda x, data: (x * data).sin())
    right = torch.func.grad(lambda x: inside(x, data).square().sum())(x)
    try:
        found = torch.func.grad(lambda x: inside(x, data=data).square().sum())(x)
    except (RuntimeError, ValueError) as error:
        assert str(error).startswith("batch_jacobian: ")  # noqa: PT017
        assert "position" in str(error)  # noqa: PT017
    else:
        equal(found, right)


@pytest.mark.parametrize("call", [1, 3, 5])
def test_rows_that_mix_are_refused_in_every_call(call):
    """From some call on, by another branch: refused at once, and again."""
    is_mixing = torch.tensor(False)  # which is in no key
    func = fresh(lambda x: (x - x.mean(0)).sin() if is_mixing else x.sin())
    loss, x = lambda x: batch_jacobian(func)(x).square().sum(), randn(B, 3)
    for number in range(1, 12):
        is_mixing.fill_(number >= call)
        if number < call:
            torch.func.grad(loss)(x)
            continue
        with pytest.raises(BatchMixingError):
            torch.func.grad(loss)(x)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize(
    "words", [{}, {"mode": "fwd"}, {"mode": "rev"}, {"engine": "sum"}, {"engine": "loop"}]
)
def test_linearized_transforms_have_a_product(words):
    """Traced with tangents of forward mode at work, which were lost."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double().requires_grad_(False)
    x, tangent = randn(B, 3), randn(B, 3)
    transforms = [batch_jacobian, batch_divergence]
    transforms += [] if words else [batch_laplacian, batch_hessian, batch_hessian_diagonal]
    for transform in transforms:
        transformed = transform(net, **words)
        value, product = torch.func.linearize(transformed, x)
        expected = torch.func.jvp(transformed, (x,), (tangent,))
        equal(value, expected[0])
        equal(product(tangent), expected[1])


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr")
@pytest.mark.parametrize(
    "mode", ["rev_over_rev", "fwd_over_rev", "rev_over_fwd", "fwd_over_fwd", "taylor"]
)
def test_linearized_second_derivatives_have_a_product(mode):
    func, x, tangent = lambda x: x.sin().prod(1), randn(B, 3), randn(B, 3)
    for transform in (batch_laplacian, batch_hessian):
        transformed = transform(func, mode=mode)
        _, product = torch.func.linearize(transformed, x)
        equal(product(tangent), torch.func.jvp(transformed, (x,), (tangent,))[1])


def test_numbers_that_are_none_are_no_proof_inside_of_a_gradient():
    func = fresh(lambda x: (x - x.mean(0)).sin())
    loss = lambda x: batch_jacobian(func)(x).square().sum()
    for number in range(1, 9):
        if number in (1, 2, 4):
            torch.func.grad(loss)(torch.full((B, 3), torch.nan, dtype=torch.float64))
            continue
        with pytest.raises(BatchMixingError):
            torch.func.grad(loss)(randn(B, 3))


def test_a_write_into_the_input_is_right():
    def func(x):
        x.mul_(2)
        return x.sin()

    penalty = lambda x: batch_jacobian(func)(x).square().sum()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = (2 * (2 * x).cos()).square().sum((1, 2))
    torch.testing.assert_close(torch.vmap(penalty)(x), expected)


EVERY = (batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian)


def test_sparse_inside_of_a_nested_jacobian_is_right():
    func = stacked(lambda x: x.sin().to_sparse().to_dense())
    x = fixed_randn(3, 2)
    found = batch_jacobian(batch_jacobian(func))(x)
    torch.testing.assert_close(found, torch.diag_embed(torch.diag_embed(-x.sin())))


def frozen(x):
    with torch.no_grad():
        factor = x.cos()
    return x.sin() * factor


WIDE = fixed_randn(3, 40)


@pytest.mark.parametrize("transform", EVERY)
@pytest.mark.parametrize("func", [frozen, lambda x: frozen(x) @ WIDE], ids=["narrow", "wide"])
def test_no_grad_makes_constants_inside_of_transforms_too(func, transform):
    x = fixed_randn(4, 3)
    found = transform(func)
    torch.testing.assert_close(torch.vmap(lambda row: found(row[None])[0])(x), found(x))
    moved = x.clone().requires_grad_()
    found(moved).square().sum().backward()
    grad = torch.func.grad(lambda x: found(x).square().sum())(x)
    torch.testing.assert_close(grad, moved.grad)


@pytest.mark.parametrize("transform", EVERY)
def test_a_residual_may_differentiate_by_itself(transform):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def slope(x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]

    x = fixed_randn(3, 2)
    found = transform(slope)(x)
    assert found.requires_grad
    torch.testing.assert_close(found, transform(batch_jacobian(net))(x).reshape(found.shape))


def test_a_harmless_block_without_grad_is_right_in_forward_mode():
    layer = nn.Linear(3, 3).double()

    def func(x):
        with torch.no_grad():
            size = int(x.shape[0])
        return layer(x) * size

    x = fixed_randn(4, 3)
    jac = batch_jacobian(func, mode="fwd")
    right = layer.weight.detach().expand(4, 3, 3)
    torch.testing.assert_close(torch.vmap(lambda row: jac(row[None])[0])(x).detach(), right)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_a_block_without_grad_is_constant_inside_of_torch_func(mode):
    def func(x):
        with torch.no_grad():
            factor = x.cos()
        return x * factor

    x, jacobian = fixed_randn(4, 3), batch_jacobian(func, mode=mode)
    inside = torch.vmap(lambda row: jacobian(row[None])[0])
    torch.testing.assert_close(inside(x), torch.diag_embed(x.cos()))


def test_numbers_written_without_grad_are_constants():
    def func(x):
        out = torch.ones_like(x)
        with torch.no_grad():
            out[:] = x
        return (out * x).repeat(1, 20)

    x = fixed_randn(4, 3)
    for words in ({}, {"mode": "fwd"}, {"engine": "loop", "mode": "fwd", "check": False}):
        found = batch_jacobian(func, **words)(x)
        torch.testing.assert_close(found, torch.diag_embed(x).repeat(1, 20, 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [torch.vmap, torch.func.jacrev])
def test_what_torch_cannot_differentiate_is_refused_in_the_words_of_plain_code(transform):
    func = stacked(lambda x: F.multi_margin_loss(x, torch.tensor(1)))
    jacobian, x = batch_jacobian(func, mode="fwd"), fixed_randn(4, 3)
    with pytest.raises(RuntimeError, match=r"^batch_jacobian: engine='auto' with mode='fwd' can"):
        transform(lambda row: jacobian(row[None])[0])(x if transform is torch.vmap else x[0])


def test_an_error_of_func_reaches_the_user_as_itself_inside_of_torch_func():
    def func(x):
        raise KeyError("a table of the user's")

    with pytest.raises(KeyError, match="of the user's"):
        torch.vmap(batch_jacobian(func))(fixed_randn(2, 4, 3))


def test_refusals_are_the_same_inside_of_torch_func():
    divergence, runs = batch_divergence(lambda x: x.sum(1)), []
    taylor = {"mode": "taylor", "randomness": "same"}
    laplacian = batch_laplacian(lambda x: runs.append(x) or x.sin(), **taylor)
    x = fixed_randn(4, 3)
    for transform in (divergence, laplacian):
        with pytest.raises(ValueError, match=r"^batch_") as plain:
            transform(x)
        with pytest.raises(ValueError, match=r"^batch_") as inside:
            torch.func.grad(lambda x, f=transform: f(x).sum())(x)
        assert str(plain.value) == str(inside.value)
    assert not runs


def test_a_value_is_detached_where_func_keeps_a_graph_under_no_grad():
    weight = torch.ones(3, requires_grad=True)

    def func(x):
        with torch.enable_grad():
            return x * weight

    words = {"engine": "vmap", "mode": "fwd", "return_value": True}
    with torch.no_grad():
        jac, value = batch_jacobian(func, **words)(torch.randn(4, 3))
    assert not value.requires_grad
    assert not jac.requires_grad
