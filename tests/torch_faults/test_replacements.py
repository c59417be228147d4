"""Operations that torch differentiates wrongly: right everywhere, or refused."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from funcjac import (
    VerificationError,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
)
from tests import oracles
from tests.oracles import hessian_by_rows, jacobian_by_rows, stacked
from tests.tensors import equal, f64, fixed_randn, randn

B = 4


def complex_power(w):
    """``(B, 1) -> (B, 4)``, whose forward formula is wrong for a real base."""
    exponents = torch.tensor([1 + 1j, 2 + 1j], dtype=torch.complex128)
    return torch.view_as_real(torch.pow(w, exponents)).flatten(1)


def by_lu(x):
    """A step of an implicit scheme; ``lu_solve`` has a wrong batching rule in reverse."""
    mixing = torch.linspace(-1, 1, 16, dtype=f64).view(4, 4).cos()
    matrix = x[:, :, None] * mixing * 0.3 + torch.diag_embed(x**2) + 3 * torch.eye(4, dtype=f64)
    factors = torch.linalg.lu_factor(matrix)
    return torch.linalg.lu_solve(*factors, x.sin()[..., None])[..., 0]


UNSEEN = {"complex power": (complex_power, (B, 1)), "lu_solve": (by_lu, (B, 4))}


@pytest.mark.quick
@pytest.mark.parametrize("where", ["plain", "unverified", "vmap", "grad"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_torch_func_has_wrong_is_right_everywhere(name, where):
    func, shape = UNSEEN[name]
    x = randn(*shape).abs() + 1
    right = oracles.by_rows(func, (x,))
    jacobian = batch_jacobian(func)
    if where == "plain":
        equal(jacobian(x), right)
    elif where == "unverified":
        equal(batch_jacobian(func, check=False)(x), right)
    elif where == "vmap":
        equal(torch.vmap(jacobian)(x[None])[0], right)
    else:
        leaf = x.clone().requires_grad_()
        plain = oracles.by_rows(func, (leaf,), graph=True)
        (expected,) = torch.autograd.grad(plain.square().sum(), leaf)
        found = torch.func.grad(lambda x: jacobian(x).square().sum())(x)
        equal(found, expected, 1e-8)


@pytest.mark.parametrize("words", [{"mode": "fwd"}, {"engine": "vmap", "mode": "fwd"}], ids=str)
def test_a_wrong_forward_formula_is_never_returned(words):
    x = randn(B, 1).abs() + 1
    right = oracles.by_rows(complex_power, (x,))
    for check in ("auto", False):
        try:
            found = batch_jacobian(complex_power, check=check, **words)(x)
        except VerificationError as error:
            if "vmap" not in words.values() or check is False:
                raise
            assert str(error).startswith("batch_jacobian: ")  # noqa: PT017
        else:
            equal(found, right)


def pair_energy(r):
    return torch.cdist(r, r).square().sum((1, 2))


@pytest.mark.parametrize("transform", [batch_hessian, batch_laplacian])
def test_distances_of_the_same_points_are_right_or_refused(transform):
    """``2 sum |r_i - r_j|^2 / 2``: the right value or an error, and never not-a-number unsaid."""
    r = randn(2, 3, 2)
    plain = lambda r: (r[:, :, None] - r[:, None]).square().sum((1, 2, 3))
    right = transform(plain)(r)
    try:
        found = transform(pair_energy)(r)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error).startswith(f"{transform.__name__}: ")  # noqa: PT017
    else:
        equal(found, right, 1e-6)


def solve_ex(x):
    a = x.reshape(-1, 2, 2) + 3 * torch.eye(2, dtype=x.dtype)
    return torch.linalg.solve_ex(a, a.sin())[0].flatten(1)


def test_forward_mode_inside_of_vmap_is_a_transposed_vjp():
    """Torch's forward formula of this operation is wrong, and nobody asked for it."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = batch_jacobian(solve_ex)(x)
    inside = torch.vmap(batch_jacobian(solve_ex, mode="fwd"))(x[None])[0]
    torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_a_wrong_forward_formula_that_was_asked_for_is_refused(inside):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = batch_jacobian(solve_ex, mode="fwd", engine="vmap", check=False)
    call = torch.vmap(jacobian) if inside else jacobian
    with pytest.raises(RuntimeError, match="_linalg_solve_ex"):
        call(x[None] if inside else x)


EVERY = (batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian)


@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
def test_batch_norm_within_rows_moves_once_and_has_right_gradients(mode):
    # Its buffers move with each row of each call, and the graph that is returned stays whole.
    norm = nn.BatchNorm1d(4).double()
    jac = batch_jacobian(stacked(lambda x: norm(x)[:2]), mode=mode)
    own = lambda x: F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)[:2]
    moved = []
    for turn in range(4):
        x = (fixed_randn(3, 5, 4) + turn).requires_grad_()
        (found,) = torch.autograd.grad(jac(x).pow(3).sum(), x)
        plain = jacobian_by_rows(own, x, create_graph=True)
        (wanted,) = torch.autograd.grad(plain.pow(3).sum(), x)
        torch.testing.assert_close(found, wanted)
        moved.append(int(norm.num_batches_tracked))
    # Three rows in each run; the first call may run twice, for torch has this norm wrong.
    assert [b - a for a, b in itertools.pairwise(moved)] == [3, 3, 3]


def test_nested_attention_with_dropout_is_finite():
    # PyTorch's own died in forward mode over reverse mode.
    def func(x):
        heads = [y.view(-1, 1, 2, 2) for y in (x, x.sin(), x.cos())]
        return F.scaled_dot_product_attention(*heads, dropout_p=0.5).flatten(1)

    nested = batch_jacobian(batch_jacobian(func, randomness="same"), randomness="same")
    for _ in range(3):
        assert nested(fixed_randn(3, 4)).isfinite().all()


def _selected(x):
    return torch.select_scatter(x.sin(), x[..., 0] * x[..., 1], x.ndim - 1, 1).square()


@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
def test_select_scatter_inside_of_a_gradient_is_right(mode):
    func, x = lambda x: _selected(x).flatten(1), fixed_randn(3, 2, 3)
    inside = torch.func.grad(lambda x: batch_jacobian(func, mode=mode)(x).square().sum())
    leaf = x.clone().requires_grad_()
    plain = jacobian_by_rows(lambda x: _selected(x).flatten(), leaf, create_graph=True)
    (wanted,) = torch.autograd.grad(plain.square().sum(), leaf)
    torch.testing.assert_close(inside(x), wanted)


def test_select_scatter_under_vmap_is_right():
    # Its batching rule has a wrong gradient, which plain autograd shares.
    row, x = lambda x: _selected(x).flatten(), fixed_randn(3, 2, 3)
    torch.testing.assert_close(batch_jacobian(torch.vmap(row))(x), jacobian_by_rows(row, x))


def test_cumprod_is_right_where_a_zero_comes_later():
    # Torch's own forward formula, which engine="vmap" would take, is wrong there.
    hess = batch_hessian(lambda x: x.cumprod(1), mode="fwd_over_fwd", engine="sum")
    with_zero = fixed_randn(3, 5)
    with_zero[:, 1] = 0
    for _ in range(7):
        for x in (fixed_randn(3, 5), with_zero):
            torch.testing.assert_close(hess(x), hessian_by_rows(lambda z: z.cumprod(0), x))


@pytest.mark.parametrize("order", ["hessian", "diagonal", "laplacian", "nested"])
def test_second_derivatives_of_logcumsumexp_are_right(order):
    func, x = lambda x: x.logcumsumexp(-1).sin(), fixed_randn(3, 4)
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


def test_the_mean_that_native_group_norm_returns_is_differentiated():
    # Plain autograd's gradient of it is zero.
    mean = lambda x: torch.native_group_norm(x.view(-1, 4, 1), None, None, len(x), 4, 1, 2, 1e-5)[1]
    wanted = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=f64).expand(3, 2, 4)
    torch.testing.assert_close(batch_jacobian(mean)(fixed_randn(3, 4)), wanted)


def test_nested_layer_norm_by_its_weight_is_right():
    rows = stacked(lambda x, w, b: F.layer_norm(x, (2,), w, b))
    every = (0, 1, 2)
    args = (fixed_randn(3, 1, 2), fixed_randn(3, 2), fixed_randn(3, 2))
    found = batch_jacobian(batch_jacobian(rows, every), every)(*args)
    unit = torch.eye(2, dtype=f64)
    slope = jacobian_by_rows(lambda x: F.layer_norm(x, (2,)), args[0])  # (B, 1, 2, 1, 2)
    wanted = slope.squeeze(1).squeeze(2).unsqueeze(2) * unit[:, :, None]
    torch.testing.assert_close(found[1][0].reshape(3, 2, 2, 2), wanted)


def test_max_unpool_of_overlapping_windows_counts_once():
    # Plain autograd counts a number twice where two windows have it.
    def func(x):
        pooled, indices = F.max_pool1d(x.unsqueeze(1), 2, 1, return_indices=True)
        return F.max_unpool1d(pooled, indices, 2, 1).squeeze(1)

    x = torch.tensor([[1.0, 5.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0]], dtype=f64)
    kept = torch.tensor([[0.0, 1, 0, 1], [1, 1, 1, 0]], dtype=f64)
    torch.testing.assert_close(func(x), x * kept)
    torch.testing.assert_close(batch_jacobian(func)(x), torch.diag_embed(kept))


def test_a_draw_moves_with_its_parameters():
    # Plain autograd has zeros for them.
    draw = batch_jacobian(
        lambda mean: torch.normal(mean, 2 * mean), randomness="different", return_value=True
    )
    mean = fixed_randn(3, 4).abs() + 0.1
    jac, value = draw(mean)
    torch.testing.assert_close(jac, torch.diag_embed(value / mean))


def test_as_strided_scatter_is_right():
    src = fixed_randn(2, 2)
    rows = stacked(lambda x: torch.as_strided_scatter(x.clone(), src, (2, 2), (1, 2), 1))
    jac = batch_jacobian(rows)(fixed_randn(3, 3, 3)).reshape(3, 9, 9)
    kept = torch.tensor([1, 0, 0, 0, 0, 1, 1, 1, 1], dtype=f64)
    torch.testing.assert_close(jac, torch.diag_embed(kept.expand(3, 9)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ctc_loss_is_right_of_what_is_no_log_softmax(reduction):
    targets = torch.tensor([1, 2])
    words = (targets, torch.tensor(5), torch.tensor(2))
    rows = stacked(lambda x: F.ctc_loss(x, *words, reduction=reduction))
    x = fixed_randn(3, 6, 4)
    direction, step = fixed_randn(6, 4).cos(), 1e-5
    wanted = (rows(x + step * direction) - rows(x - step * direction)) / (2 * step)
    found = (batch_jacobian(rows)(x) * direction).sum((-1, -2))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_layer_norm_of_large_halves_is_finite():
    norm = nn.LayerNorm(64).half()
    x = (400 * fixed_randn(4, 64)).half()
    jac, value = batch_jacobian(norm, return_value=True)(x)
    torch.testing.assert_close(value, norm(x).detach(), rtol=1e-2, atol=1e-2)
    assert jac.abs().max() > 1e-3


def test_norms_keep_their_dtype_beside_weights_of_another():
    head, norm = nn.Linear(5, 3).bfloat16(), nn.LayerNorm(5)
    x = fixed_randn(3, 5).bfloat16()
    assert batch_jacobian(norm)(x).dtype == torch.bfloat16
    assert batch_hessian(lambda x: head(norm(x)))(x).dtype == torch.bfloat16


@pytest.mark.parametrize("transform", EVERY)
def test_attention_of_rows_that_see_nothing_is_finite(transform):
    torch.manual_seed(0)
    heads = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[0] = True
    func = lambda x: heads(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert transform(func)(fixed_randn(2, 3, 4)).isfinite().all()


def test_operations_may_be_called_by_keyword():
    x = fixed_randn(3, 5)
    scatter = lambda x: torch.select_scatter(input=x.tanh(), src=x[:, 0].exp(), dim=1, index=2)
    assert batch_jacobian(scatter)(x).shape == (3, 5, 5)
    assert batch_hessian(lambda x: torch.logcumsumexp(input=x, dim=1))(x).shape == (3, 5, 5, 5)
    norm = lambda x: torch.group_norm(input=x, num_groups=5)
    assert batch_hessian(lambda x: norm(x.unsqueeze(-1).expand(-1, -1, 2)))(x).isfinite().all()


@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
def test_a_norm_of_an_empty_batch_has_its_shape(transform):
    assert transform(nn.GroupNorm(1, 5).double())(fixed_randn(0, 5)).shape[:3] == (0, 5, 5)


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
    x, func = fixed_randn(4, 6), REFUSED[name]
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        func(x)
    jac = batch_jacobian(func, randomness="different")
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        torch.func.grad(lambda x: jac(x).sum())(x)


def test_a_deviation_that_torch_vmap_hides_is_still_looked_at():
    jac = batch_jacobian(lambda x: torch.normal(0.0, x.exp()), randomness="different")
    found = torch.vmap(lambda row: jac(row[None]), randomness="different")(fixed_randn(4, 3))
    assert found.shape == (4, 1, 3, 3)
    jac = batch_jacobian(lambda x: torch.normal(0.0, -x.exp()), randomness="different")
    with pytest.raises(RuntimeError, match="std >= 0"):
        torch.vmap(lambda row: jac(row[None]), randomness="different")(fixed_randn(4, 3))


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
    x = fixed_randn(3, 4)
    found = transform(REVERSE_ONLY[name])
    moved = x.clone().requires_grad_()
    found(moved).sin().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: found(x).sin().sum())(x), moved.grad)


def test_boolean_masks_hide_keys():
    hidden = ~torch.ones(5, 5, dtype=torch.bool).tril()
    mixing = fixed_randn(4, 4)

    def attention(q):
        heads = (t[:, None] for t in (q, q @ mixing, q.sin()))
        return F.scaled_dot_product_attention(*heads, attn_mask=~hidden).flatten(1).sum(1)

    def by_hand(q):
        scores = (q @ (q @ mixing).mT / 2).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) @ q.sin()).flatten(1).sum(1)

    x = randn(3, 5, 4)
    for check in (False, True):
        equal(batch_hessian(attention, check=check)(x), batch_hessian(by_hand)(x))
    result = batch_jacobian(attention, engine="vmap", return_value=True, check=False)(x)
    equal(result[1], by_hand(x))
    equal(result[0], batch_jacobian(by_hand)(x))


def test_replacements_take_what_torch_takes():
    """Keywords, numbers of another type, singular matrices, levels of vmap."""
    factors, pivots = torch.linalg.lu_factor(fixed_randn(3, 3))
    solved = lambda b: torch.lu_solve(b.unsqueeze(-1), LU_data=factors, LU_pivots=pivots).squeeze(
        -1
    )
    by_inverse = torch.linalg.lu_solve(factors, pivots, torch.eye(3, dtype=f64))
    x = randn(2, 4, 3)
    one = torch.vmap(batch_jacobian(torch.vmap(solved)))(x)
    equal(one, by_inverse.expand(2, 4, 3, 3).contiguous())
    added = lambda x: torch.logaddexp(x, torch.tensor(2.0, dtype=f64))
    assert torch.vmap(batch_jacobian(added))(x.float()).dtype == torch.float32
    scattered = lambda x: torch.as_strided_scatter(x, x[:, 1].sin(), (len(x),), (3,), 0)
    equal(torch.vmap(batch_jacobian(scattered))(x)[0], batch_jacobian(scattered)(x[0]))
    singular = torch.tensor([[1 + 1j, 2 + 2j], [1 + 1j, 2 + 2j]])
    sign = lambda x: torch.linalg.slogdet(singular * x[:, :1, None])[0].real + x[:, 0]
    value = batch_jacobian(sign, engine="vmap", return_value=True, check=False)(x[0])[1]
    equal(value, x[0, :, 0])
