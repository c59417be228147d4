"""What a sweep over PyTorch's operators and random programs once found, one test for each."""

import itertools

import optree
import pytest
import torch
from torch import nn
from torch.autograd import functional
from torch.nn import functional as F

from funcjac import (
    BatchMixingError,
    VerificationError,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    check_derivative,
    explain,
)

f64 = torch.float64
EVERY = (batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian)
pytestmark = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=f64)


def stacked(row):
    return lambda *args: torch.stack([row(*rows) for rows in zip(*args)])


def jacobian_by_rows(row, x, *, create_graph=False):
    return torch.stack([functional.jacobian(row, one, create_graph=create_graph) for one in x])


def hessian_by_rows(row, x):
    """``row``: (N,) -> (M,)."""
    size = len(row(x[0]))
    return torch.stack(
        [
            torch.stack([functional.hessian(lambda z: row(z)[m], one) for m in range(size)])
            for one in x
        ]
    )


# --- shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", EVERY)
def test_an_output_without_elements_beside_others(transform):
    x = randn(3, 2)
    func = lambda x: (x.sin(), x[:, :0])
    for _ in range(3):
        found, empty = transform(func)(x)
        torch.testing.assert_close(found, transform(torch.sin)(x))
        assert empty.shape == (3, 0, *found.shape[2:])


# --- buffers that move ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
def test_gradients_through_batch_norm_within_rows(mode):
    # Its buffers move with each row of each call, and the graph that is returned stays whole.
    norm = nn.BatchNorm1d(4).double()
    jac = batch_jacobian(stacked(lambda x: norm(x)[:2]), mode=mode)
    own = lambda x: F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)[:2]
    moved = []
    for turn in range(4):
        x = (randn(3, 5, 4) + turn).requires_grad_()
        (found,) = torch.autograd.grad(jac(x).pow(3).sum(), x)
        plain = jacobian_by_rows(own, x, create_graph=True)
        (wanted,) = torch.autograd.grad(plain.pow(3).sum(), x)
        torch.testing.assert_close(found, wanted)
        moved.append(int(norm.num_batches_tracked))
    # Three rows in each run; the first call may run twice, for torch has this norm wrong.
    assert [b - a for a, b in itertools.pairwise(moved)] == [3, 3, 3]


# --- operations ----------------------------------------------------------------------------


def test_attention_with_dropout_nested():
    # PyTorch's own died in forward mode over reverse mode.
    def func(x):
        heads = [y.view(-1, 1, 2, 2) for y in (x, x.sin(), x.cos())]
        return F.scaled_dot_product_attention(*heads, dropout_p=0.5).flatten(1)

    nested = batch_jacobian(batch_jacobian(func, randomness="same"), randomness="same")
    for _ in range(3):
        assert nested(randn(3, 4)).isfinite().all()


def _selected(x):
    return torch.select_scatter(x.sin(), x[..., 0] * x[..., 1], x.ndim - 1, 1).square()


@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
def test_select_scatter_inside_of_a_gradient(mode):
    func, x = lambda x: _selected(x).flatten(1), randn(3, 2, 3)
    inside = torch.func.grad(lambda x: batch_jacobian(func, mode=mode)(x).square().sum())
    leaf = x.clone().requires_grad_()
    plain = jacobian_by_rows(lambda x: _selected(x).flatten(), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad(plain.square().sum(), leaf)
    torch.testing.assert_close(inside(x), wanted)


def test_select_scatter_under_vmap():
    # Its batching rule has a wrong gradient, which plain autograd shares.
    row, x = lambda x: _selected(x).flatten(), randn(3, 2, 3)
    torch.testing.assert_close(batch_jacobian(torch.vmap(row))(x), jacobian_by_rows(row, x))


def test_cumprod_where_a_zero_comes_later():
    # Torch's own forward formula, which engine="vmap" would take, is wrong there.
    hess = batch_hessian(lambda x: x.cumprod(1), mode="fwd_over_fwd", engine="sum")
    with_zero = randn(3, 5)
    with_zero[:, 1] = 0
    for _ in range(7):
        for x in (randn(3, 5), with_zero):
            torch.testing.assert_close(hess(x), hessian_by_rows(lambda z: z.cumprod(0), x))


@pytest.mark.parametrize("order", ["hessian", "diagonal", "laplacian", "nested"])
def test_second_derivatives_of_logcumsumexp(order):
    func, x = lambda x: x.logcumsumexp(-1).sin(), randn(3, 4)
    one_by_one = lambda z: torch.stack([z[: k + 1].logsumexp(0) for k in range(4)]).sin()
    wanted = hessian_by_rows(one_by_one, x)
    diagonal = wanted.diagonal(dim1=-2, dim2=-1)
    found, wanted = {
        "hessian": (batch_hessian(func), wanted),
        "diagonal": (batch_hessian_diagonal(func), diagonal),
        "laplacian": (batch_laplacian(func), diagonal.sum(-1)),
        "nested": (batch_jacobian(batch_jacobian(func)), wanted),
    }[order]
    torch.testing.assert_close(found(x), wanted)


def test_the_mean_that_native_group_norm_returns():
    # Plain autograd's gradient of it is zero.
    mean = lambda x: torch.native_group_norm(x.view(-1, 4, 1), None, None, len(x), 4, 1, 2, 1e-5)[1]
    wanted = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=f64).expand(3, 2, 4)
    torch.testing.assert_close(batch_jacobian(mean)(randn(3, 4)), wanted)


def test_sparse_inside_of_a_nested_jacobian():
    func = stacked(lambda x: x.sin().to_sparse().to_dense())
    x = randn(3, 2)
    found = batch_jacobian(batch_jacobian(func))(x)
    torch.testing.assert_close(found, torch.diag_embed(torch.diag_embed(-x.sin())))


def test_nested_layer_norm_by_its_weight():
    rows = stacked(lambda x, w, b: F.layer_norm(x, (2,), w, b))
    every = (0, 1, 2)
    args = (randn(3, 1, 2), randn(3, 2), randn(3, 2))
    found = batch_jacobian(batch_jacobian(rows, every), every)(*args)
    unit = torch.eye(2, dtype=f64)
    slope = jacobian_by_rows(lambda x: F.layer_norm(x, (2,)), args[0])  # (B, 1, 2, 1, 2)
    wanted = slope.squeeze(1).squeeze(2).unsqueeze(2) * unit[:, :, None]
    torch.testing.assert_close(found[1][0].reshape(3, 2, 2, 2), wanted)


def test_max_unpool_of_overlapping_windows():
    # Plain autograd counts a number twice where two windows have it.
    def func(x):
        pooled, indices = F.max_pool1d(x.unsqueeze(1), 2, 1, return_indices=True)
        return F.max_unpool1d(pooled, indices, 2, 1).squeeze(1)

    x = torch.tensor([[1.0, 5.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]], dtype=f64)
    kept = torch.tensor([[0.0, 1, 0, 1], [1, 1, 1, 0]], dtype=f64)
    torch.testing.assert_close(func(x), x * kept)
    torch.testing.assert_close(batch_jacobian(func)(x), torch.diag_embed(kept))


# --- rounding ------------------------------------------------------------------------------


def test_a_jacobian_of_what_is_constant_up_to_rounding_with_a_graph():
    x = randn(3, 3, 2).requires_grad_()
    jac = batch_jacobian(stacked(torch.corrcoef))(x)
    assert jac.abs().max() < 1e-12


def test_second_derivatives_far_below_the_first():
    func = stacked(lambda x: x.logsumexp(0))
    x = 1000 * randn(3, 5).abs() + 1000
    nested = batch_jacobian(batch_jacobian(func))
    for turn in range(3):
        assert nested(x + turn).abs().max() < 1e-3


# --- errors --------------------------------------------------------------------------------


def test_rows_that_mix_where_only_single_rows_could_be_tried():
    func = lambda x, shared: F.batch_norm(x, None, None, training=True) + shared.sum()
    jac = batch_jacobian(func, argnums=(1, 0), in_dims=(0, None))
    with pytest.raises(BatchMixingError):
        jac(randn(3, 1), randn(3, 3))


def test_a_draw_moves_with_its_parameters():
    # Plain autograd has zeros for them.
    draw = batch_jacobian(
        lambda mean: torch.normal(mean, 2 * mean), randomness="different", return_value=True
    )
    mean = randn(3, 4).abs() + 0.1
    jac, value = draw(mean)
    torch.testing.assert_close(jac, torch.diag_embed(value / mean))


def test_as_strided_scatter():
    src = randn(2, 2)
    rows = stacked(lambda x: torch.as_strided_scatter(x.clone(), src, (2, 2), (1, 2), 1))
    jac = batch_jacobian(rows)(randn(3, 3, 3)).reshape(3, 9, 9)
    kept = torch.tensor([1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=f64)
    torch.testing.assert_close(jac, torch.diag_embed(kept.expand(3, 9)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ctc_loss_of_what_is_no_log_softmax(reduction):
    targets = torch.tensor([1, 2])
    words = (targets, torch.tensor(5), torch.tensor(2))
    rows = stacked(lambda x: F.ctc_loss(x, *words, reduction=reduction))
    x = randn(3, 6, 4)
    direction, step = randn(6, 4).cos(), 1e-5
    wanted = (rows(x + step * direction) - rows(x - step * direction)) / (2 * step)
    found = (batch_jacobian(rows)(x) * direction).sum((-1, -2))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


# --- what verification must not let pass ---------------------------------------------------


def _or_refused(transformed, x, wanted, **tolerances):
    for turn in range(3):
        try:
            found = transformed(x.roll(turn, 0))
        except VerificationError:
            continue
        torch.testing.assert_close(found, wanted.roll(turn, 0), **tolerances)


def test_complex_numbers_within_do_not_loosen_what_is_tolerated():
    # The forward formula of eigenvalues is wrong once differentiated again.
    row = lambda x: torch.view_as_real(torch.linalg.eigvals(x.view(3, 3))).flatten().square()
    x = randn(3, 9)
    wanted = hessian_by_rows(row, x)
    hess = batch_hessian(stacked(row), mode="fwd_over_rev")
    _or_refused(hess, x, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(batch_jacobian(batch_jacobian(stacked(row)))(x), wanted)


def test_another_precision_beside_does_not_loosen_what_is_tolerated():
    # Its forward formula moves with the triangle that it does not read.
    start = torch.eye(3, dtype=f64) + 0.1

    def row(x):
        torch.ones(2).square()  # in float32, and nothing to do with the result
        factor = start + x.view(3, 3).triu(1) + x.view(3, 3).tril() ** 2
        return torch.cholesky_inverse(factor.tril())

    x = 0.1 * randn(3, 9)
    wanted = hessian_by_rows(lambda x: row(x).flatten(), x).view(3, 3, 3, 9, 9)
    nested = batch_jacobian(batch_jacobian(stacked(row)))
    for turn in range(3):
        torch.testing.assert_close(nested(x.roll(turn, 0)), wanted.roll(turn, 0))


@pytest.mark.parametrize("transform", EVERY)
def test_what_is_left_of_the_derivatives_of_a_constant(transform):
    func = lambda x: (1000 * x).softmax(-1) @ torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    x = torch.tensor([[1.0, 2.0, 3.0], [5.0, 1.0, 2.0]], dtype=f64)
    for _ in range(3):
        assert transform(func)(x).abs().max() < 1e-9


def test_an_error_that_comes_later_is_the_users():
    class Mine(Exception):
        pass

    runs = 0

    def func(x):
        nonlocal runs
        runs += 1
        if runs > 1:
            raise Mine
        return x.sin()

    jacobian = batch_jacobian(func)
    jacobian(randn(3, 2))
    with pytest.raises(Mine):
        jacobian(randn(3, 2))


# --- simpler operations give what the others give ------------------------------------------


def test_layer_norm_of_large_halves():
    norm = nn.LayerNorm(64).half()
    x = (400 * randn(4, 64)).half()
    jac, value = batch_jacobian(norm, return_value=True)(x)
    torch.testing.assert_close(value, norm(x).detach(), rtol=1e-2, atol=1e-2)
    assert jac.abs().max() > 1e-3


@pytest.mark.parametrize("offset", [1e4, 100])
def test_rows_that_mix_under_a_large_constant(offset):
    x = randn(4, 2000).float()
    with torch.no_grad(), pytest.raises(BatchMixingError):
        batch_jacobian(lambda x: offset + (x - x.mean(0)))(x)


def test_norms_in_another_precision_than_their_weights():
    head, norm = nn.Linear(5, 3).bfloat16(), nn.LayerNorm(5)
    x = randn(3, 5).bfloat16()
    assert batch_jacobian(norm)(x).dtype == torch.bfloat16
    assert batch_hessian(lambda x: head(norm(x)))(x).dtype == torch.bfloat16


@pytest.mark.parametrize("transform", EVERY)
def test_attention_of_rows_that_see_nothing(transform):
    torch.manual_seed(0)
    heads = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0] = True
    func = lambda x: heads(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert transform(func)(randn(2, 3, 4)).isfinite().all()


def test_a_buffer_that_modules_share():
    class Counts(nn.Module):
        def __init__(self, count, counts):
            super().__init__()
            self.register_buffer("count", count)
            self.counts = counts

        def forward(self, x):
            if self.counts:
                self.count.add_(1)
                return x
            return x**2 * self.count

    count = torch.ones(5, dtype=f64)
    x = randn(4, 5)
    jac = batch_jacobian(nn.Sequential(Counts(count, True), Counts(count, False)))
    for calls in range(1, 4):
        torch.testing.assert_close(jac(x), torch.diag_embed(2 * x * (1 + calls)))
        assert count.eq(1 + calls).all()


def test_a_draw_that_is_kept():
    class Kept(nn.Module):
        mask = None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.rand(x.shape[1], dtype=x.dtype)
            return x**2 * self.mask

    func, x = Kept(), randn(3, 4)
    jac = batch_jacobian(func)
    first = jac(x)
    torch.testing.assert_close(first, torch.diag_embed(2 * x * func.mask))
    torch.testing.assert_close(jac(x), first)


def test_operations_called_by_keyword():
    x = randn(3, 5)
    scatter = lambda x: torch.select_scatter(input=x.tanh(), src=x[:, 0].exp(), dim=1, index=2)
    assert batch_jacobian(scatter)(x).shape == (3, 5, 5)
    assert batch_hessian(lambda x: torch.logcumsumexp(input=x, dim=1))(x).shape == (3, 5, 5, 5)
    norm = lambda x: torch.group_norm(input=x, num_groups=5)
    assert batch_hessian(lambda x: norm(x.unsqueeze(-1).expand(-1, -1, 2)))(x).isfinite().all()


@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
def test_a_norm_of_an_empty_batch(transform):
    assert transform(nn.GroupNorm(1, 5).double())(randn(0, 5)).shape[:3] == (0, 5, 5)


STRANGE = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:.*[Qq]uantize")
@pytest.mark.parametrize("kind", STRANGE)
def test_a_tensor_of_another_kind_in_the_closure_or_a_buffer(kind):
    held, x = STRANGE[kind](), randn(4, 3)

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("held", held)

        def forward(self, x):
            return x.sin() if self.held is not None else x

    for func in (Holds(), lambda x: x.sin() if held is not None else x):
        jac = batch_jacobian(func)
        for _ in range(4):
            torch.testing.assert_close(jac(x), torch.diag_embed(x.cos()))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_nested_tensor_that_func_writes_to():
    held = STRANGE["nested"]()
    batch_jacobian(lambda x: x.sin() * held.mul_(2.0).numel())(randn(4, 3))
    assert all(one.eq(2).all() for one in held.unbind())


def row(*size):
    return torch.ones(size, dtype=torch.float64)


def among(x):
    return x.view(-1, 3, 2)


REFUSED = {
    "layer_norm, shape": lambda x: F.layer_norm(x, (3,)),
    "layer_norm, weight": lambda x: F.layer_norm(x, (6,), row(1)),
    "layer_norm, bias": lambda x: F.layer_norm(x, (6,), None, row(1)),
    "group_norm, groups": lambda x: F.group_norm(among(x), 2),
    "group_norm, weight": lambda x: F.group_norm(among(x), 3, row(1)),
    "batch_norm, weight": lambda x: F.batch_norm(x, row(6), row(6), row(1)),
    "batch_norm, mean": lambda x: F.batch_norm(x, row(1), row(1)),
    "batch_norm, no statistics": lambda x: F.batch_norm(x, None, None),
    "instance_norm, weight": lambda x: F.instance_norm(among(x), weight=row(1)),
    "cdist, p": lambda x: torch.cdist(among(x), among(x), p=-1),
    "cdist, columns": lambda x: torch.cdist(among(x), x.view(-1, 6, 1)),
    "cdist, vectors": lambda x: torch.cdist(x[0], x[0])[None],
    "attention, both masks": lambda x: F.scaled_dot_product_attention(
        among(x), among(x), among(x), row(3, 3) > 0, is_causal=True
    ),
    "normal, deviation": lambda x: torch.normal(x, -torch.ones_like(x)),
    "select_scatter, index": lambda x: torch.select_scatter(x, x[:, 0], 1, 9),
    "select_scatter, shape": lambda x: torch.select_scatter(x, x[:, :1], 1, 0),
    "max_unpool, index": lambda x: F.max_unpool1d(among(x), torch.full((len(x), 3, 2), 9), 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_is_refused_inside_torch_func_too(name):
    x, func = randn(4, 6), REFUSED[name]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        func(x)
    jac = batch_jacobian(func, randomness="different")
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        torch.func.grad(lambda x: jac(x).sum())(x)


def test_a_deviation_that_torch_vmap_hides_is_still_looked_at():
    jac = batch_jacobian(lambda x: torch.normal(0.0, x.exp()), randomness="different")
    found = torch.vmap(lambda row: jac(row[None]), randomness="different")(randn(4, 3))
    assert found.shape == (4, 1, 3, 3)
    jac = batch_jacobian(lambda x: torch.normal(0.0, -x.exp()), randomness="different")
    with pytest.raises(RuntimeError, match="std >= 0"):
        torch.vmap(lambda row: jac(row[None]), randomness="different")(randn(4, 3))


@pytest.mark.parametrize("seed", [2, 9, 22, 36, 49, 53])
def test_a_norm_of_a_single_feature_which_is_but_rounding(seed):
    """Derivatives are zero; plain autograd returns rounding of numbers 300 times as large."""
    rng = torch.Generator().manual_seed(seed)
    args = [size * torch.rand(3, 1, generator=rng, dtype=f64) for size in (-1, -5, -8)]
    row = lambda x, weight, bias: F.layer_norm(x, (1,), weight, bias)
    for found in batch_jacobian(stacked(row), (0, 1, 2))(*args)[:2]:
        assert found.abs().max() < 1e-9


@pytest.mark.parametrize("return_value", [False, True])
@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_inputs_without_elements_beside_others(transform, return_value):
    def func(x, z):
        return x.sin() * z.sum(-1, keepdim=True) ** 2

    x, none, z = randn(4, 2), randn(4, 0), randn(4, 3)
    added = lambda x, none, z: func(x, z) + none.sum(-1, keepdim=True)
    with_none = transform(added, (0, 1, 2), return_value=return_value)
    without = transform(func, (0, 1), return_value=return_value)

    def loss(found):
        return sum(leaf.sum() for leaf in optree.tree_leaves(found))

    for _ in range(3):
        found, right = (optree.tree_leaves(f) for f in (with_none(x, none, z), without(x, z)))
        assert all(leaf.shape[:2] == (4, 2) for leaf in found)
        torch.testing.assert_close([leaf for leaf in found if leaf.numel()], right)
    inside = torch.func.grad(lambda x: loss(with_none(x, none, z)))(x)
    torch.testing.assert_close(inside, torch.func.grad(lambda x: loss(without(x, z)))(x))
    assert "passes" in str(explain(with_none, x, none, z))


@pytest.mark.parametrize("words", [{}, {"samples": 2}], ids=str)
@pytest.mark.parametrize("check", [False, "auto"])
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_a_divergence_with_a_leaf_without_elements(mode, check, words):
    x, none = randn(4, 2), randn(4, 0)
    for order in (1, -1):
        func = lambda *args, order=order: tuple(x * x for x in args[::order])[::order]
        divergence = batch_divergence(func, (0, 1), mode=mode, check=check, **words)
        found = divergence(*(x, none)[::order])
        torch.testing.assert_close(found, 2 * x.sum(-1))


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
    x = randn(16, 3).sigmoid()
    x[5, 1] = 1.0
    with pytest.raises(VerificationError):
        batch_jacobian(func, engine="vmap", mode="rev")(x)


@pytest.mark.parametrize("words", [{}, {"return_value": True}], ids=str)
@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_an_empty_batch_with_an_argument_that_rows_share(transform, words):
    both = transform(lambda x, s: (x @ s).sin(), (0, 1), in_dims=(0, None), **words)
    shapes = [tuple(leaf.shape) for leaf in optree.tree_leaves(both(randn(0, 3), randn(3)))]
    some = [tuple(leaf.shape) for leaf in optree.tree_leaves(both(randn(4, 3), randn(3)))]
    assert shapes == [(0, *shape[1:]) for shape in some]


@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_dtypes_beside_inputs_without_elements(transform):
    func = lambda x, y: (x**2).sum(1) + y.sum(1).to(x.dtype)
    for swap in (False, True):
        argnums = (1, 0) if swap else (0, 1)
        transformed = transform(func, argnums, return_value=True)
        dtypes = [
            [leaf.dtype for leaf in optree.tree_leaves(transformed(randn(4, 3).float(), y))]
            for y in (randn(4, 0), randn(4, 1))
        ]
        assert dtypes[0] == dtypes[1]


def test_estimates_and_checks_beside_inputs_without_elements():
    func, x, none = lambda x, y: (x**2).sum(1) + y.sum(1), randn(4, 3), randn(4, 0)
    for argnums in ((0, 1), (1, 0)):
        found, error = batch_laplacian(func, argnums, samples=3, return_error=True)(x, none)
        torch.testing.assert_close(found, torch.full((4,), 6.0, dtype=f64))
        torch.testing.assert_close(error, torch.zeros(4, dtype=f64))
        assert check_derivative(batch_hessian(func, argnums), x, none).ok


@pytest.mark.parametrize("engine", ["auto", "vmap", "sum", "loop"])
def test_the_values_of_a_divergence_of_several_outputs(engine):
    x, y = randn(4, 3), randn(4, 2)
    func = lambda x, y: ((x**2, y**2), x.sum(1))
    words = {"return_value": True, "has_aux": True, "engine": engine}
    found, (value, aux) = batch_divergence(func, (0, 1), **words)(x, y)
    torch.testing.assert_close(found, 2 * x.sum(1) + 2 * y.sum(1))
    torch.testing.assert_close(value, (x**2, y**2))
    torch.testing.assert_close(aux, x.sum(1))


def test_a_half_beside_a_double_does_not_round_it():
    func = lambda x: torch.hypot((x[:, 0] * 0.01).half(), x[:, 1].exp() * x[:, 0])
    partials, x = batch_partials(func, [(0,), (1,)], mode="taylor", check=False), randn(4, 2)
    plain, graph = partials(x), partials(x.clone().requires_grad_())
    torch.testing.assert_close(plain[1], graph[1].detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", [4, 6, 16, 21, 22])
def test_attention_that_has_made_up_its_mind(seed):
    """Weights are 0 and 1 but for rounding, and so little is left of slopes."""
    rng = torch.Generator().manual_seed(seed)
    query = -8 * torch.rand(3, 1, 2, generator=rng, dtype=f64)
    keys = 8 * torch.rand(5, 2, generator=rng, dtype=f64) - 8
    row = lambda row: F.scaled_dot_product_attention(row, keys, keys)
    right = torch.stack([functional.jacobian(row, one) for one in query])
    torch.testing.assert_close(batch_jacobian(stacked(row))(query), right, rtol=1e-7, atol=1e-12)
    assert batch_hessian_diagonal(stacked(row))(query).isfinite().all()


def frozen(x):
    with torch.no_grad():
        factor = x.cos()
    return x.sin() * factor


WIDE = randn(3, 40)


@pytest.mark.parametrize("transform", EVERY)
@pytest.mark.parametrize("func", [frozen, lambda x: frozen(x) @ WIDE], ids=["narrow", "wide"])
def test_no_grad_makes_constants_inside_of_transforms_too(func, transform):
    x = randn(4, 3)
    found = transform(func)
    torch.testing.assert_close(torch.vmap(lambda row: found(row[None])[0])(x), found(x))
    moved = x.clone().requires_grad_()
    found(moved).square().sum().backward()
    grad = torch.func.grad(lambda x: found(x).square().sum())(x)
    torch.testing.assert_close(grad, moved.grad)


# Their forward formulas are missing, or are not differentiated again.
REVERSE_ONLY = {
    "norm": lambda x: x.norm(dim=-1),
    "std": lambda x: x.std(-1),
    "normalize": lambda x: F.normalize(x),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.sin() + 1),
    "glu": lambda x: F.glu(x),
    "copysign": lambda x: torch.copysign(x**2, x),
}


@pytest.mark.parametrize("transform", EVERY[1:])
@pytest.mark.parametrize("name", REVERSE_ONLY)
def test_no_forward_formula_is_chosen_inside_of_transforms(name, transform):
    x = randn(3, 4)
    found = transform(REVERSE_ONLY[name])
    moved = x.clone().requires_grad_()
    found(moved).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: found(x).sin().sum())(x), moved.grad)


@pytest.mark.parametrize("transform", EVERY)
def test_a_residual_that_differentiates_by_itself(transform):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def slope(x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]

    x = randn(3, 2)
    found = transform(slope)(x)
    assert found.requires_grad
    torch.testing.assert_close(found, transform(batch_jacobian(net))(x).reshape(found.shape))


POWERS = {
    "**": lambda x, y: x**y,
    "pow_": lambda x, y: x.clone().pow_(y),
    "float_power": torch.float_power,
}


@pytest.mark.parametrize("name", POWERS)
def test_a_power_with_an_exponent_that_is_zero(name):
    x = torch.tensor([[2.5, 0.0], [2.2, 0.0], [1.3, 0.7]], dtype=f64)
    func = lambda x: POWERS[name](x[:, 0], x[:, 1])
    same = lambda x: (x[:, 1] * x[:, 0].log()).exp()
    for mode in ("auto", "rev_over_rev", "fwd_over_rev"):
        torch.testing.assert_close(batch_hessian(func, mode=mode)(x), batch_hessian(same)(x))
    for mode in ("auto", "rev", "taylor") if name == "**" else ("auto", "rev"):
        for index in ((0, 1), (1, 0), (1, 1)):
            found, right = (batch_partials(f, [index], mode=mode)(x)[0] for f in (func, same))
            torch.testing.assert_close(found, right)
    moved = x.clone().requires_grad_()
    batch_jacobian(func)(moved)[:, 0].sum().backward()
    torch.testing.assert_close(moved.grad, batch_hessian(same)(x)[:, 0])


def test_powers_of_less_than_zero():
    exponents = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=f64)
    x = torch.tensor([[-1.5, -0.5, 0.0, 2.0], [-0.3, -0.4, -1.0, -2.0]], dtype=f64)
    right = exponents * (exponents - 1) * torch.tensor([[0, 0, 1, 2.0], [0, 0, 1, -2]], dtype=f64)
    found = batch_hessian_diagonal(lambda x: x**exponents)
    torch.testing.assert_close(found(x).diagonal(dim1=1, dim2=2), right)
    third = torch.func.grad(lambda x: found(x).sum())(x)
    torch.testing.assert_close(third, torch.tensor([[0, 0, 0, 6.0]] * 2, dtype=f64))


@pytest.mark.parametrize("transform", EVERY)
@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_determinants_inside_of_transforms(size, transform):
    x = randn(3, size * size)
    func = lambda x: torch.linalg.det(x.reshape(-1, size, size)) * x[:, 0]
    found = transform(func)
    torch.testing.assert_close(torch.vmap(lambda row: found(row[None])[0])(x), found(x))
    moved = x.clone().requires_grad_()
    found(moved).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: found(x).sin().sum())(x), moved.grad)


@pytest.mark.parametrize("size", [2, 4, 5])
def test_a_determinant_of_a_singular_matrix(size):
    x = randn(3, size * size)
    x[0, :size] = x[0, size : 2 * size]
    func = lambda x: torch.det(x.reshape(-1, size, size))
    right = hessian_by_rows(lambda row: func(row[None]), x)
    torch.testing.assert_close(batch_hessian(func)(x), right[:, 0], rtol=1e-6, atol=1e-6)


def test_powers_keep_their_dtype():
    x = torch.rand(5, 3) + 0.1
    for base, exponent in ((x.bfloat16(), torch.tensor(3.0)), (x, torch.tensor(2.0, dtype=f64))):
        func = lambda x, exponent=exponent: x**exponent
        assert batch_hessian(func)(base).dtype == base.dtype
        value = batch_jacobian(func, return_value=True)
        assert torch.func.jvp(value, (base,), (base,))[0][1].dtype == base.dtype
    exponent = torch.zeros((), dtype=f64, requires_grad=True)
    jac = batch_jacobian(lambda x: x**exponent)(x)
    (found,) = torch.autograd.grad(jac.sum(), exponent)
    torch.testing.assert_close(found, (1 / x).sum().double(), rtol=1e-5, atol=1e-5)


def test_infinity_to_the_power_of_zero():
    x, zero = torch.tensor([[torch.inf, 2.0]], dtype=f64), torch.zeros(1, dtype=f64)
    value = batch_jacobian(lambda x: x**zero, return_value=True)
    jac, out = torch.func.jvp(value, (x,), (x,))[0]
    assert (out == 1).all()
    assert (jac == 0).all()


@pytest.mark.parametrize("name", ["**", "pow", "det"])
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
def test_powers_and_determinants_compile(name, transform):
    func = {
        "**": lambda x: x**2,
        "pow": lambda x: x.clamp(min=1e-6).pow(torch.tensor(3.0)).mean(1, keepdim=True).pow(0.3),
        "det": lambda x: torch.linalg.det(x.unsqueeze(2) * x.unsqueeze(1) + torch.eye(3)),
    }[name]
    torch._dynamo.reset()
    x = torch.rand(4, 3)
    found = torch.compile(transform(func), backend="eager")(x)
    torch.testing.assert_close(found, transform(func)(x), rtol=1e-4, atol=1e-5)


def test_keywords_of_replaced_operations():
    x = randn(3, 2, 2)
    by_name = batch_jacobian(lambda x: torch.linalg.det(A=x))
    by_place = batch_jacobian(lambda x: torch.linalg.det(x))
    torch.testing.assert_close(*(torch.vmap(lambda r: t(r[None]))(x) for t in (by_name, by_place)))
    power = batch_jacobian(lambda x: torch.pow(self=2.0, exponent=x))
    torch.testing.assert_close(torch.vmap(lambda r: power(r[None])[0])(x[:, 0]), power(x[:, 0]))


@pytest.mark.parametrize("size", [3, 4, 5, 7])
def test_determinants_of_singular_matrices_inside_of_transforms(size):
    x = torch.diag(torch.arange(size, dtype=f64)).expand(2, size, size).clone()
    func = batch_jacobian(torch.linalg.det)
    right = torch.zeros(size, size, dtype=f64)
    right[0, 0] = torch.arange(1, size, dtype=f64).prod()
    found = torch.vmap(lambda row: func(row[None])[0])(x)
    torch.testing.assert_close(found, right.expand(2, size, size))
    if size <= 4:
        torch.testing.assert_close(func(x), right.expand(2, size, size))


def test_a_harmless_block_without_grad_where_forward_mode_is_asked_for():
    layer = nn.Linear(3, 3).double()

    def func(x):
        with torch.no_grad():
            size = int(x.shape[0])
        return layer(x) * size

    x = randn(4, 3)
    jac = batch_jacobian(func, mode="fwd")
    right = layer.weight.detach().expand(4, 3, 3)
    torch.testing.assert_close(torch.vmap(lambda row: jac(row[None])[0])(x).detach(), right)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_a_block_without_grad_inside_of_torch_func(mode):
    def func(x):
        with torch.no_grad():
            factor = x.cos()
        return x * factor

    x, jacobian = randn(4, 3), batch_jacobian(func, mode=mode)
    inside = torch.vmap(lambda row: jacobian(row[None])[0])
    torch.testing.assert_close(inside(x), torch.diag_embed(x.cos()))


def test_numbers_written_into_others_without_grad():
    def func(x):
        out = torch.ones_like(x)
        with torch.no_grad():
            out[:] = x
        return (out * x).repeat(1, 20)

    x = randn(4, 3)
    for words in ({}, {"mode": "fwd"}, {"engine": "loop", "mode": "fwd", "check": False}):
        found = batch_jacobian(func, **words)(x)
        torch.testing.assert_close(found, torch.diag_embed(x).repeat(1, 20, 1))
