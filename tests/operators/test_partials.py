"""``batch_partials`` by columns and by nesting: values, training, and what they cost."""

import pytest
import torch
from torch import nn

from funcjac import BatchMixingError, batch_jacobian, batch_partials
from tests.tensors import equal, f64, fixed_randn, randn

B = 4


def wave(x, t):
    return (2 * x).sin() * (-t).exp()


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["auto", "taylor", "rev"])
@pytest.mark.parametrize("shape", [(B,), (B, 1)], ids=str)
def test_columns_are_numbered_through(shape, mode):
    """``u(x, t)`` with coordinates numbered through."""
    x, t = randn(*shape), randn(*shape)
    indices = [[0], [1], [0, 0], [0, 1], []]
    found = batch_partials(wave, indices, (0, 1), mode=mode)(x, t)
    u, u_x = wave(x, t), 2 * (2 * x).cos() * (-t).exp()
    assert isinstance(found, tuple)
    for got, right in zip(found, (u_x, -u, -4 * u, -u_x, u), strict=True):
        assert got.shape == shape
        equal(got, right)


@pytest.mark.parametrize("mode", ["auto", "taylor", "rev"])
def test_vectors_and_columns_are_numbered_through(mode):
    """``x`` of two coordinates, then ``t``: (0, 1), (2)."""
    x, t = randn(B, 2), randn(B, 1)
    func = lambda x, t: x[:, :1] ** 2 * x[:, 1:] ** 3 * t**2
    found = batch_partials(func, [(0, 1), (1, 2), (-1, 2), (0,)], (0, 1), mode=mode)(x, t)
    a, b = x[:, :1], x[:, 1:]
    right = (6 * a * b**2 * t**2, 6 * a**2 * b**2 * t, 2 * a**2 * b**3, 2 * a * b**3 * t**2)
    for got, expected in zip(found, right, strict=True):
        equal(got, expected)


def test_coordinates_go_by_the_order_of_argnums():
    x, t = randn(B), randn(B)
    by_t_first = batch_partials(wave, [(0,), (1,)], (1, 0))(x, t)
    by_x_first = batch_partials(wave, [(1,), (0,)], (0, 1))(x, t)
    for one, other in zip(by_t_first, by_x_first, strict=True):
        equal(one, other)


def test_other_arguments_have_no_coordinates():
    x, t, scale = randn(B, 1), randn(B, 1), torch.tensor(2.0, dtype=f64)
    func = lambda scale, x, t: scale * wave(x, t)
    found = batch_partials(func, [(1,), (0, 0)], (1, 2), in_dims=(None, 0, 0))(scale, x, t)
    equal(found[0], -2 * wave(x, t))
    equal(found[1], -8 * wave(x, t))


def test_a_training_step_of_columns_is_that_of_plain_autograd():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    u = lambda x, t: net(torch.cat([x, t], 1))
    x, t = randn(B, 1), randn(B, 1)
    u_t, u_xx = batch_partials(u, [(1,), (0, 0)], (0, 1))(x, t)
    found = torch.autograd.grad((u_t - u_xx).square().mean(), net[0].weight)[0]
    x.requires_grad_(), t.requires_grad_()
    first = torch.autograd.grad(u(x, t).sum(), (x, t), create_graph=True)
    second = torch.autograd.grad(first[0].sum(), x, create_graph=True)[0]
    equal(found, torch.autograd.grad((first[1] - second).square().mean(), net[0].weight)[0])


@pytest.mark.parametrize(
    ("indices", "args"),
    [([(2,)], (randn(B), randn(B))), ([(0, -3)], (randn(B, 1), randn(B, 1)))],
    ids=["columns", "negative"],
)
def test_indices_beyond_all_coordinates_are_refused(indices, args):
    with pytest.raises(
        ValueError, match=r"^batch_partials: expected .*ind(ex|ices) between -2 and 1"
    ):
        batch_partials(wave, indices, (0, 1))(*args)


class Order(torch.autograd.Function):
    """A function of one's own that cannot be followed: nested partials must differentiate it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        Order.passes += 1
        (x,) = ctx.saved_tensors
        return grad * Order.apply(x + torch.pi / 2)


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")  # Taylor cannot follow it
def test_nested_partials_cost_what_they_cost_by_hand():
    """Of order five and five outputs: not five to the fourth times as much."""
    weight = torch.linspace(0.5, 1.5, 5, dtype=f64)
    func = lambda x: Order.apply(x.sum(1, keepdim=True) * weight)
    x = randn(B, 2)
    transformed = batch_partials(func, [(0, 0, 0, 0, 1)], check=False)
    (found,) = transformed(x)
    equal(found, weight**5 * (x.sum(1, keepdim=True) * weight).cos())
    Order.passes = 0
    transformed(x)
    ours, Order.passes = Order.passes, 0
    leaf = x.clone().requires_grad_()
    for column in func(leaf).unbind(1):
        slope = column
        for index in (0, 0, 0, 0, 1):
            (grad,) = torch.autograd.grad(slope.sum(), leaf, create_graph=True)
            slope = grad[:, index]
    assert ours <= 1.5 * Order.passes


class CountedSine(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        CountedSine.calls += 1
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * CountedSine.apply(x + torch.pi / 2)


def test_nested_partials_of_several_outputs_run_what_they_run_by_hand():
    """Each level enters the graph column by column: through a stack, each would pull all."""
    mix = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    func = lambda x: CountedSine.apply(x @ mix)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    nested = func
    for _ in range(4):
        nested = (lambda inner: lambda x: batch_partials(inner, [(0,)], check=False)(x)[0])(nested)
    nested(x)
    CountedSine.calls = 0
    result = nested(x)
    ours, CountedSine.calls = CountedSine.calls, 0
    z, columns = x.clone().requires_grad_(), []
    for out in func(z).unbind(1):
        for _ in range(4):
            (first,) = torch.autograd.grad(out.sum(), z, create_graph=True, retain_graph=True)
            out = first[:, 0]
        columns.append(out)
    torch.testing.assert_close(result, torch.stack(columns, 1).detach())
    assert ours <= 1.5 * CountedSine.calls


def test_a_half_beside_a_double_does_not_round_it():
    func = lambda x: torch.hypot((x[:, 0] * 0.01).half(), x[:, 1].exp() * x[:, 0])
    partials, x = batch_partials(func, [(0,), (1,)], mode="taylor", check=False), fixed_randn(4, 2)
    plain, graph = partials(x), partials(x.clone().requires_grad_())
    torch.testing.assert_close(plain[1], graph[1].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("indices", [[()], [(), (0,), (0, 1)]])
def test_the_value_beside_chunks_of_partials(indices):
    """The value is no derivative to propagate, not even in a chunk of its own."""
    func, x = lambda x: x[:, 0].sin() * x[:, 1].exp(), randn(4, 2)
    found = batch_partials(func, indices, mode="taylor", chunk_size=1)(x)
    assert torch.equal(found[0], func(x))
    assert all(map(torch.equal, found, batch_partials(func, indices, mode="taylor")(x)))


@pytest.mark.parametrize("mode", ["auto", "taylor", "rev"])
def test_results_lie_in_no_memory_that_the_library_keeps(mode):
    results = batch_partials(lambda x: x + 1, [(0,), (1,), (0, 0)], mode=mode)(randn(1, 2))
    for result in results:
        result.mul_(10).add_(1)
    eye = torch.eye(2, dtype=f64).expand(3, 2, 2).contiguous()
    equal(batch_jacobian(torch.sin, check=False)(torch.zeros(3, 2, dtype=f64)), eye)


class Dot(torch.autograd.Function):
    """Of rows; it leaves out a product with a cotangent of ones, as fused losses do."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, t)
        return (x * t).sum(1)

    @staticmethod
    def backward(ctx, grad):
        x, t = ctx.saved_tensors
        if (grad == 1).all():
            return t + 0, x + 0
        return t * grad.unsqueeze(1), x * grad.unsqueeze(1)


def test_results_of_one_row_lie_in_no_memory_that_is_kept():
    x, t = torch.randn(1, 2, dtype=f64), torch.randn(2, 1, dtype=f64)
    func = lambda t, x: Dot.apply(x, t.mT)
    words = {"argnums": (0, 1), "in_dims": (1, 0), "mode": "rev"}
    for _ in range(2):
        for part in batch_partials(func, [(0, 2), (1, 3)], **words)(t, x):
            equal(part, torch.ones(1, dtype=f64))
            part.mul_(7)
    jac = batch_jacobian(torch.sin, check=False)(torch.zeros(3, 2, dtype=f64))
    equal(jac, torch.eye(2, dtype=f64).expand(3, 2, 2))


@pytest.mark.parametrize("mode", ["taylor", "rev"])
@pytest.mark.parametrize(
    ("func", "indices"),
    [
        (lambda x: x[:, 0] ** 2 * x.mean(0)[0], [(0, 0)]),
        (lambda x: (x - x.mean(0)).sin(), [(0, 0)]),
        (lambda x: x[:, 0] * x[:, 1].sum(), [(0, 1)]),
    ],
)
def test_rows_that_mix_where_they_are_differentiated_again(func, indices, mode):
    """A factor of each row's own stands in each step of the reference, not in the first alone."""
    with pytest.raises(BatchMixingError, match=r"^batch_partials: "):
        batch_partials(func, indices, mode=mode, check=True)(randn(5, 3))


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_results_are_apart(shape):
    """One gradient of two arguments is one tensor in torch."""
    partials = batch_partials(lambda a, b: a + b, [(0,), (1,)], argnums=(0, 1))
    u_a, u_b = partials(torch.randn(shape), torch.randn(shape))
    u_a.fill_(7)
    assert (u_b == 1).all()
