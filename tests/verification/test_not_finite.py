"""Rows that are not finite, kinks and poles: they excuse no other row, and stop none."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from funcjac import (
    BatchMixingError,
    VerificationError,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_jacobian_of,
    batch_laplacian,
    batch_partials,
    check_derivative,
    explain,
)
from tests import oracles
from tests.cases.modules import WrongBackward
from tests.tensors import equal, f64, fixed_randn, randn


def kinked(x):
    return torch.where(x > 0.1, x.log(), x * x)


POINT = torch.tensor([[0.0, 0.5]], dtype=f64)


@pytest.mark.quick
def test_not_a_number_stays_where_it_is():
    """Outputs that never saw the bad input are finite, in the first call and in each later one."""
    diagonal = batch_hessian_diagonal(kinked)
    fresh_result = diagonal(POINT)
    for result in (fresh_result, *[diagonal(POINT) for _ in range(4)]):
        equal(result[0, 1, 1], torch.tensor(-4.0, dtype=f64))
        assert torch.equal(result.isnan(), fresh_result.isnan())
    for _ in range(25):
        diagonal(POINT + 1)
    result = diagonal(POINT)
    equal(result[0, 1, 1], torch.tensor(-4.0, dtype=f64))
    assert torch.equal(result.isnan(), fresh_result.isnan())


@pytest.mark.parametrize(
    "transform", [batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian]
)
def test_a_bad_row_leaves_good_ones_finite(transform):
    """Each finite entry of plain autograd, taken alone, is finite and equal here."""
    x = torch.tensor([[0.0, 0.5], [0.7, 0.9], [0.05, 2.0]], dtype=f64)
    found = transform(kinked)(x)
    if transform is batch_jacobian:
        right = oracles.by_rows(kinked, (x,))
    else:
        name = transform.__name__.removeprefix("batch_").removeprefix("hessian_")
        right = getattr(oracles, name)(kinked, (x,))
    finite = right.isfinite()
    assert found[finite].isfinite().all()
    equal(found[finite], right[finite])
    assert finite[1:].all()


def wide(x):
    """More outputs than inputs, so that forward mode is taken; a pole of the first one at zero."""
    return torch.cat([x.sqrt(), *[k * x * x for k in range(1, 7)]], 1)


def by_tensors(x):
    x = x.clone().requires_grad_()
    return batch_jacobian_of(wide(x), x)


def in_grad(x):
    def loss(x):
        jac = batch_jacobian(wide)(x)
        return jac[1:].sum(), jac

    return torch.func.grad(loss, has_aux=True)(x)[1]


WAYS = {
    "auto": batch_jacobian(wide),
    "fwd": batch_jacobian(wide, mode="fwd"),
    "unchecked": batch_jacobian(wide, check=False),
    "tensors": by_tensors,
    "in torch.func.grad": in_grad,
    "loop": batch_jacobian(wide, engine="loop"),
    "chunks": batch_jacobian(wide, mode="fwd", chunk_size=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_does_not_spread_poles(way):
    """Zero times infinity: in later calls, in which nobody looks, and then again without poles."""
    x = torch.tensor([[0.3, 0.5], [0.7, 0.9], [0.2, 2.0]], dtype=f64)
    for turn in range(6):
        point = x.clone()
        point[0, 0] *= turn % 3 != 1  # calls 3 and 6
        right, result = oracles.by_rows(wide, (point,)), WAYS[way](point)
        finite = right.isfinite()
        assert result[finite].isfinite().all()
        equal(result[finite], right[finite])


def pooled(x, y):
    """Poles in two inputs; a third of the outputs, and their derivatives, are no numbers."""
    powers = nn.functional.lp_pool1d(x.flatten(1).unsqueeze(1), 1.5, 2).flatten(1)
    return torch.cat([powers, x[:, 0] * y[:, :2].sqrt(), (x[:, :, 0] * y[:, 2:]).sin()], 1)


def in_vmap(transformed):
    def first_of_two(*args):
        both = torch.vmap(transformed)(*[torch.stack([x, x.flip(0)]) for x in args])
        return tree_map(lambda h: h[0], both)

    return first_of_two


def as_aux_of_grad(transformed):
    def loss(*args):
        return args[0].sum(), transformed(*args)

    return lambda *args: torch.func.grad(loss, has_aux=True)(*args)[1]


def compiled(transformed):
    torch._dynamo.reset()
    return torch.compile(transformed, backend="aot_eager", fullgraph=True)


MIXED = {"mode": "fwd_over_rev", "check": False}
HESSIANS = {
    "in torch.vmap": (in_vmap, {}),
    "in torch.vmap in chunks": (in_vmap, {"chunk_size": 2}),
    "fwd_over_rev in torch.vmap": (in_vmap, MIXED),
    "fwd_over_rev in torch.func.grad": (as_aux_of_grad, {**MIXED, "engine": "sum"}),
    "fwd_over_rev compiled": (compiled, MIXED),
    "vmap compiled": (compiled, {"engine": "vmap"}),
    "vmap": (lambda transformed: transformed, {"engine": "vmap"}),
    "vmap fwd_over_rev": (lambda transformed: transformed, {**MIXED, "engine": "vmap"}),
    "sum fwd_over_rev": (lambda transformed: transformed, {**MIXED, "engine": "sum"}),
}


@pytest.mark.parametrize("way", HESSIANS)
def test_hessians_have_their_poles_where_plain_autograd_has_them(way):
    """Forward over reverse, where nobody looks."""
    x = torch.tensor([[[8.0, 3.0], [-0.7, 7.0], [2.0, 5.0]]], dtype=f64).repeat(2, 1, 1)
    y = torch.tensor([[0.0, 0.5, 0.3], [0.7, 0.9, 0.0]], dtype=f64)
    place, words = HESSIANS[way]
    hess = place(batch_hessian(pooled, argnums=(0, 1), **words))(x, y)
    right = oracles.hessian(pooled, (x, y), argnums=(0, 1))
    for result, expected in zip(tree_leaves(hess), tree_leaves(right), strict=True):
        has_value = pooled(x, y).isfinite()
        result, expected = result[has_value], expected[has_value]
        finite = expected.isfinite()
        assert result[finite].isfinite().all()
        equal(result[finite], expected[finite])


@pytest.mark.parametrize("engine", ["sum", "loop"])
def test_an_output_that_is_no_number_takes_no_passes(engine):
    """It keeps its NaN, and the others their numbers."""
    passes, ones = [], torch.ones(2, 30, dtype=f64)

    def func(x, last):
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda _: passes.append(last))
        return torch.cat([x @ ones, x[:, :1] * last], 1)

    x = fixed_randn(3, 2)
    for last in (2.0, torch.nan):
        jacobian = batch_jacobian(
            lambda x, last=last: func(x, last), mode="fwd", engine=engine, check=False
        )
        for _ in range(2):
            result = jacobian(x)
            equal(result[:, :30], torch.ones(3, 30, 2, dtype=f64))
            assert result[:, 30, 0].isnan().all() == (last != last)
    assert len(passes) % 4 == 0
    assert passes.count(2.0) == len(passes) // 2


def test_explain_takes_what_is_not_finite():
    found = explain(batch_hessian_diagonal(kinked), POINT)
    assert "batch_hessian_diagonal" in str(found)


@pytest.mark.quick
def test_partials_beside_what_is_not_a_number_are_right():
    func = lambda z: torch.where(z[:, :1] > 0.1, z[:, :1].log(), z[:, :1] ** 2) * z[:, 1:].sin()
    point = torch.tensor([[0.0, 0.5], [0.3, 0.7]], dtype=f64)
    (found,) = batch_partials(func, [(1,)])(point)
    first = torch.where(point[:, :1] > 0.1, point[:, :1].log(), point[:, :1] ** 2)
    equal(found, first * point[:, 1:].cos())


SINGULAR = {
    "slogdet": lambda x: torch.linalg.slogdet(x.view(-1, 2, 2))[1],
    "inv": lambda x: torch.linalg.inv(x.view(-1, 2, 2)).flatten(1),
    "log": lambda x: x.sum(1).log(),
    "norm": lambda x: 1 / x.norm(dim=1),
}

BAD = {
    "slogdet": [1.0, 2.0, 2.0, 4.0],
    "log": [0.0, 0.0, 0.0, 0.0],
    "norm": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.quick
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian, batch_laplacian])
@pytest.mark.parametrize("name", BAD)
def test_a_singular_row_stops_no_other(name, transform):
    func = SINGULAR[name]
    x = randn(3, 4).abs() + torch.tensor([3.0, 0.1, 0.2, 2.0], dtype=f64)
    right = transform(func)(x)
    bad = x.clone()
    bad[1] = torch.tensor(BAD[name], dtype=f64)
    for _ in range(2):
        found = transform(func)(bad)
        equal(found[[0, 2]], right[[0, 2]])
        assert not found[1].isfinite().all()


def test_a_singular_matrix_that_torch_refuses_raises_its_error():
    """Where ``func`` itself raises, it is its own error."""
    x = randn(2, 4).abs()
    x[1] = torch.tensor(BAD["slogdet"], dtype=f64)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        batch_jacobian(SINGULAR["inv"])(x)


def huber(x):
    return nn.functional.huber_loss(x, torch.zeros_like(x), reduction="none", delta=1.0)


@pytest.mark.parametrize("func", [huber, lambda x: torch.relu(x) ** 2, lambda x: x.clamp(-1, 1)])
def test_second_derivatives_at_kinks_do_not_depend_on_the_call(func):
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5]], dtype=f64)
    first = batch_hessian_diagonal(func)(x)
    transformed = batch_hessian_diagonal(func)
    for check in ("auto", False):
        again = batch_hessian_diagonal(func, check=check)
        assert all(torch.equal(again(x), first) for _ in range(3))
    for _ in range(10):
        transformed(x + 0.3)
    assert torch.equal(transformed(x), first)


class Doubled(torch.autograd.Function):
    """``2 x g``, with a batching rule that gives three quarters of it."""

    @staticmethod
    def forward(x, grad):
        return 2 * x * grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, other = ctx.saved_tensors
        return 2 * other * grad, 2 * x * grad

    @staticmethod
    def vmap(info, dims, x, grad):
        x = x if dims[0] is not None else x.expand_as(grad)
        return 1.5 * x * grad, dims[1] if dims[1] is not None else dims[0]


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return Doubled.apply(*ctx.saved_tensors, grad)

    @staticmethod
    def vmap(info, dims, x):
        return Squared.apply(x), dims[0]


NOT_SMOOTH_AT_ONE = {
    "relu": lambda x: torch.relu(1 - x),
    "other side": lambda x: torch.relu(x - 1),
    "clamp": lambda x: x.clamp(0, 1),
    "abs": lambda x: (1 - x).abs(),
}


@pytest.mark.parametrize("name", NOT_SMOOTH_AT_ONE)
def test_one_kink_excuses_no_other_element(name):
    func = lambda x: 10 * Squared.apply(x) + NOT_SMOOTH_AT_ONE[name](x)
    x = fixed_randn(16, 3).sigmoid()
    x[5, 1] = 1.0
    with pytest.raises(VerificationError):
        batch_jacobian(func, engine="vmap", mode="rev")(x)


B = 4


@pytest.mark.parametrize(
    ("func", "bad"),
    [
        (lambda x: x.softmax(0), lambda x: x.masked_fill(torch.eye(B, 3).bool(), torch.nan)),
        (lambda x: x / x.norm(dim=0), torch.zeros_like),
    ],
    ids=["nan", "zeros"],
)
def test_data_without_derivatives_verify_nothing(func, bad):
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(bad(x))
    with pytest.raises(BatchMixingError):
        jacobian(x)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_without_numbers_does_not_hide_a_wrong_backward(poison):
    x = randn(B, 3)
    x[0] = poison
    assert check_derivative(batch_jacobian(torch.sin, mode="rev"), x).ok
    assert not check_derivative(batch_jacobian(WrongBackward.apply, engine="sum"), x).ok


def test_poles_are_no_differences():
    x = randn(B, 3).abs()
    x[0, 0] = 0
    report = check_derivative(batch_jacobian(torch.sqrt), x)
    assert all(c.difference == 0 for c in report.comparisons if c.mode == "rev")
