"""What the second-order transforms and the divergence compute: closed forms, words, shapes."""

import functools
import itertools

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
from tests import oracles
from tests.tensors import equal, randn

B = 4
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")
by_mode = pytest.mark.parametrize("mode", ["taylor", *NESTED, "auto"])
by_nested = pytest.mark.parametrize("mode", [*NESTED, "auto"])
by_partial = pytest.mark.parametrize("mode", ["taylor", "rev", "auto"])
by_first = pytest.mark.parametrize("mode", ["fwd", "rev", "auto"])


def network(out=2):
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, out)).double()


def bent(x):
    """``(B, 3) -> (B, 2)``, with all second and third derivatives."""
    return torch.stack(
        [(x * x.roll(1, 1)).sum(1).sin(), x[:, 0] * x[:, 1] * x[:, 2] + x.sum(1).exp()], 1
    )


def rows_of(func, *args, **words):
    return oracles.derivatives(func, args, **words)


# --- closed forms ------------------------------------------------------------------------


@pytest.mark.quick
@by_mode
def test_laplacian_of_a_quadratic_form(mode):
    a, x = randn(2, 3, 3), randn(B, 3)
    func = lambda x: torch.einsum("bi,oij,bj->bo", x, a, x)
    trace = a.diagonal(dim1=1, dim2=2).sum(1)
    equal(batch_laplacian(func, mode=mode)(x), 2 * trace.expand(B, 2))
    diagonal = 2 * a.diagonal(dim1=1, dim2=2).expand(B, 2, 3)
    equal(batch_hessian_diagonal(func, mode=mode)(x), diagonal)


@pytest.mark.quick
@by_mode
def test_hessian_of_a_quadratic_form(mode):
    a, x = randn(2, 3, 3), randn(B, 3)
    func = lambda x: torch.einsum("bi,oij,bj->bo", x, a, x)
    equal(batch_hessian(func, mode=mode)(x), (a + a.mT).expand(B, 2, 3, 3))


@by_mode
@pytest.mark.parametrize("size", [1, 2, 7])
def test_laplacian_of_the_squared_norm(size, mode):
    x = randn(B, size)
    found = batch_laplacian(lambda x: (x * x).sum(1), mode=mode)(x)
    equal(found, torch.full((B,), 2.0 * size, dtype=torch.float64))


HARMONIC = {
    "saddle": lambda x: x[:, 0] ** 2 - x[:, 1] ** 2,
    "wave": lambda x: x[:, 0].exp() * x[:, 1].sin(),
    "cube": lambda x: x[:, 2] ** 3 - 3 * x[:, 2] * x[:, 0] ** 2,
    "potential": lambda x: 1 / x.norm(dim=1),
    "logarithm": lambda x: x[:, :2].norm(dim=1).log(),
    "linear": lambda x: x.sum(1),
}


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@by_mode
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", HARMONIC)
def test_harmonic_functions(name, grad, mode):
    """Zero by cancellation, and so are the derivatives of it."""
    laplacian = batch_laplacian(HARMONIC[name], mode=mode)
    for _ in range(3):
        x = randn(B, 3).requires_grad_(grad)
        found = laplacian(x)
        equal(found.detach(), torch.zeros(B, dtype=torch.float64))
        if grad:
            total = found.sum() + 0 * x.sum()  # that of a linear function depends on nothing
            equal(torch.autograd.grad(total, x)[0], torch.zeros(B, 3, dtype=torch.float64))


CONSTANT = {
    "probabilities": lambda x: x.softmax(1).sum(1),
    "circle": lambda x: x.sin().square() + x.cos().square(),
    "sphere": lambda x: (x / x.norm(dim=1, keepdim=True)).square().sum(1),
    "centered": lambda x: (x.exp() - x.exp().mean(1, keepdim=True)).sum(1),
    "quotient": lambda x: x.exp() / x.exp(),
}


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@by_mode
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CONSTANT)
def test_constants_by_cancellation(name, grad, mode):
    """All that is left of the derivatives is rounding."""
    x = randn(B, 3).requires_grad_(grad)
    found = batch_laplacian(CONSTANT[name], mode=mode)(x)
    equal(found.detach(), torch.zeros_like(found))


@pytest.mark.quick
@by_first
def test_divergence_of_a_linear_map_is_the_trace(mode):
    a, x = randn(3, 3), randn(B, 3)
    equal(batch_divergence(lambda x: x @ a.T + 1, mode=mode)(x), a.trace().expand(B))


@by_first
def test_fields_without_divergence(mode):
    x = randn(B, 3)
    zero = torch.zeros(B, dtype=torch.float64)
    field = lambda x: x / x.norm(dim=1, keepdim=True) ** 3
    equal(batch_divergence(field, mode=mode)(x), zero)
    axis = randn(3)
    swirl = lambda x: torch.linalg.cross(axis.expand(len(x), 3), x)
    equal(batch_divergence(swirl, mode=mode)(x), zero)


@pytest.mark.quick
@by_partial
def test_partials_of_a_product_of_powers(mode):
    x = randn(B, 3)
    a, b, c = x.unbind(1)
    indices = [(0,), (1, 1), (0, 0, 1), (2, 1, 0), (), (2, 2, 2), (0, 1, 1, 2), (-3, 2, 0, 2, 1)]
    found = batch_partials(lambda x: x[:, 0] ** 2 * x[:, 1] ** 3 * x[:, 2] ** 2, indices, mode=mode)
    expected = (
        2 * a * b**3 * c**2,
        6 * a**2 * b * c**2,
        6 * b**2 * c**2,
        12 * a * b**2 * c,
        a**2 * b**3 * c**2,
        0 * a,
        24 * a * b * c,
        12 * b**2,
    )
    equal(found(x), expected)


@by_partial
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_partials_of_any_order(order, mode):
    weight, x = randn(3), randn(B, 3)
    indices = [tuple(i % 3 for i in range(order)), (1,) * order]
    found = batch_partials(lambda x: torch.exp(x @ weight), indices, mode=mode)(x)
    expected = [weight[list(index)].prod() * (x @ weight).exp() for index in indices]
    equal(found, tuple(expected))


@by_partial
def test_order_and_sign_within_an_index_do_not_matter(mode):
    x = randn(B, 3)
    indices = [(0, 1, 2), (2, 1, 0), (-1, 1, -3), [1, 0, 2]]
    found = batch_partials(bent, [tuple(index) for index in indices], mode=mode)(x)
    for other in found[1:]:
        equal(other, found[0])


@pytest.mark.quick
def test_the_operators_agree_with_one_another():
    """Trace, diagonal, Hessian, partials, and two levels of ``batch_jacobian``."""
    x = randn(B, 3)
    hessian = batch_hessian(bent)(x)
    assert hessian.shape == (B, 2, 3, 3)
    equal(hessian, batch_jacobian(batch_jacobian(bent))(x))
    equal(hessian, hessian.mT)
    diagonal = hessian.diagonal(dim1=2, dim2=3)
    equal(batch_hessian_diagonal(bent)(x), diagonal)
    equal(batch_laplacian(bent)(x), diagonal.sum(2))
    equal(torch.stack(batch_partials(bent, [(i, i) for i in range(3)])(x), 2), diagonal)
    field = lambda x: x * bent(x)[:, :1]
    trace = batch_jacobian(field)(x).diagonal(dim1=1, dim2=2).sum(1)
    equal(batch_divergence(field)(x), trace)


def test_rows_are_independent():
    """A row alone gives what it gives in company, wherever it stands."""
    x = randn(B, 3)
    for transform in (batch_hessian, batch_hessian_diagonal, batch_laplacian):
        whole = transform(bent)(x)
        equal(transform(bent)(x.flip(0)), whole.flip(0))
        equal(transform(bent)(x[1:2]), whole[1:2])


# --- weights -----------------------------------------------------------------------------


def symmetric(*shape):
    found = randn(*shape)
    return found + found.mT


# weight, its batch dimension, the same as (N, N) or (B, N, N)
def weights():
    vector, rows = randn(3), randn(B, 3)
    matrix, matrices = symmetric(3, 3), symmetric(B, 3, 3)
    low = vector[:, None] * vector
    return {
        "vector": (vector, None, torch.diag(vector)),
        "ones": (torch.ones(3).double(), None, torch.eye(3).double()),
        "zero": (torch.zeros(3).double(), None, torch.zeros(3, 3).double()),
        "one_hot": (torch.eye(3).double()[1], None, torch.diag(torch.eye(3).double()[1])),
        "matrix": (matrix, None, matrix),
        "definite": (matrix @ matrix, None, matrix @ matrix),
        "negative": (-matrix @ matrix, None, -matrix @ matrix),
        "low_rank": (low, None, low),
        "zero_matrix": (torch.zeros(3, 3).double(), None, torch.zeros(3, 3).double()),
        "off_diagonal": (1 - torch.eye(3).double(), None, 1 - torch.eye(3).double()),
        "rows": (rows, 0, torch.diag_embed(rows)),
        "rows_last": (rows.T, 1, torch.diag_embed(rows)),
        "rows_negative": (rows.T, -1, torch.diag_embed(rows)),
        "matrices": (matrices, 0, matrices),
        "matrices_last": (matrices.movedim(0, 2), 2, matrices),
        "matrices_middle": (matrices.movedim(0, 1), -2, matrices),
        "low_rank_rows": (rows[:, :, None] * rows[:, None], 0, rows[:, :, None] * rows[:, None]),
    }


WEIGHTS = list(weights())


@by_mode
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, mode):
    x, (weight, dim, full) = randn(B, 3), weights()[name]
    laplacian = batch_laplacian(bent, weight=weight, weight_dim=dim, mode=mode)
    for _ in range(2):
        equal(laplacian(x), rows_of(bent, x).laplacian(full))


@by_mode
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("kind", ["vector", "matrix"])
def test_weights_of_matrix_rows(kind, per_row, mode):
    """``in`` of two dimensions: ``(2, 3)`` or ``(2, 3, 2, 3)``."""
    func = lambda x: (x.sin().cumsum(2).prod(1) * x[:, 0]).exp()
    x, batch = randn(B, 2, 3), (B,) * per_row
    if kind == "vector":
        weight = randn(*batch, 2, 3)
        full = torch.diag_embed(weight.flatten(-2))
    else:
        full = symmetric(*batch, 6, 6)
        weight = full.reshape(*batch, 2, 3, 2, 3)
    dim = 0 if per_row else None
    found = batch_laplacian(func, weight=weight, weight_dim=dim, mode=mode)(x)
    equal(found, rows_of(func, x).laplacian(full))


@by_mode
def test_weights_of_numbers_in_rows(mode):
    """0-d rows: a weight is a number, for all rows or for each."""
    x, weight = randn(B), randn(B)
    expected = weight * -x.sin()
    equal(batch_laplacian(torch.sin, weight=weight, weight_dim=0, mode=mode)(x), expected)
    equal(batch_laplacian(torch.sin, weight=weight[0], mode=mode)(x), weight[0] * -x.sin())


@by_mode
def test_a_weight_that_depends_on_the_input(mode):
    """Drift and diffusion: the weight is a function of the arguments of ``func``."""
    x, y = randn(B, 3), randn(B, 3)
    func = lambda x, y: bent(x * y)
    metric = lambda x, y: torch.einsum("bi,bj->bij", x.exp(), x.exp()) + torch.diag_embed(y)
    found = batch_laplacian(func, weight=metric, weight_dim=0, mode=mode)
    for _ in range(2):
        equal(found(x, y), rows_of(func, x, y).laplacian(metric(x, y)))
    shared = batch_laplacian(func, weight=lambda x, y: torch.arange(3.0).double(), mode=mode)
    equal(shared(x, y), rows_of(func, x, y).laplacian(torch.diag(torch.arange(3.0).double())))


@by_mode
def test_a_weight_function_gets_keywords_too(mode):
    x = randn(B, 3)
    func, metric = lambda x, *, t: bent(x * t), lambda x, *, t: t * x.cos()
    found = batch_laplacian(func, weight=metric, weight_dim=0, mode=mode)(x, t=2.0)
    full = torch.diag_embed(metric(x, t=2.0))
    equal(found, oracles.derivatives(func, (x,), {"t": 2.0}).laplacian(full))


@by_mode
@pytest.mark.parametrize("name", ["vector", "matrix", "low_rank", "zero", "rows", "matrices"])
def test_gradient_of_a_weight(name, mode):
    x, (weight, dim, full) = randn(B, 3), weights()[name]
    weight = weight.clone().requires_grad_()
    cotangent = randn(B, 2)
    found = batch_laplacian(bent, weight=weight, weight_dim=dim, mode=mode)(x)
    (grad,) = torch.autograd.grad((cotangent * found).sum(), weight)
    full = full.expand(B, 3, 3).clone().requires_grad_()
    lap = rows_of(bent, x).laplacian(full)
    (expected,) = torch.autograd.grad((cotangent * lap).sum(), full)  # (B, 3, 3)
    if name in ("matrix", "low_rank", "matrices"):
        grad = (grad + grad.mT) / 2  # all that a symmetric matrix tells
    else:
        expected = expected.diagonal(dim1=1, dim2=2)
    equal(grad, expected if dim == 0 else expected.sum(0))


@by_mode
def test_gradient_through_a_weight_function(mode):
    x = randn(B, 3).requires_grad_()
    metric = lambda x: x.sin()
    laplacian = batch_laplacian(bent, weight=metric, weight_dim=0, mode=mode)
    oracle = rows_of(bent, x, create_graph=True).laplacian(torch.diag_embed(metric(x)))
    cotangent = randn(B, 2)
    for _ in range(2):
        (grad,) = torch.autograd.grad((cotangent * laplacian(x)).sum(), x)
        equal(grad, torch.autograd.grad((cotangent * oracle).sum(), x, retain_graph=True)[0])


def test_a_weight_is_read_at_each_call():
    weight, x = torch.ones(3).double(), randn(B, 3)
    laplacian = batch_laplacian(bent, weight=weight)
    for factor in (1.0, 2.0, -1.0):
        weight.fill_(factor)
        equal(laplacian(x), factor * rows_of(bent, x).laplacian())


# --- estimates ---------------------------------------------------------------------------

MANY = 4000
PROBES = ("rademacher", "gaussian")
by_probes = pytest.mark.parametrize("probes", PROBES)


def repeated():
    """One row many times over: each gets probes of its own, so each is an estimate of its own."""
    return torch.tensor([0.3, -0.7, 1.1]).double().expand(MANY, 3).clone()


def variance(matrix, probes):
    """Of one probe's ``v @ matrix @ v``: Hutchinson 1990; Avron and Toledo 2011."""
    matrix = (matrix + matrix.mT) / 2
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    squares = 2 * (matrix**2).sum((-2, -1))
    return squares - 2 * (diagonal**2).sum(-1) * (probes == "rademacher")


def assert_unbiased(estimate, error, exact, spread, samples):
    """Mean and spread over rows are those of theory; the stated error is the spread."""
    deviation = (spread / samples).sqrt()
    assert ((estimate.mean(0) - exact).abs() <= 5 * deviation / MANY**0.5 + 1e-9).all()
    torch.testing.assert_close(estimate.std(0), deviation, rtol=0.1, atol=0)
    torch.testing.assert_close((error**2).mean(0).sqrt(), deviation, rtol=0.1, atol=0)


@by_probes
@pytest.mark.parametrize("samples", [2, 9])
def test_estimates_of_the_laplacian(samples, probes):
    x, generator = repeated(), torch.Generator().manual_seed(1)
    laplacian = batch_laplacian(
        bent, samples=samples, probes=probes, generator=generator, return_error=True
    )
    estimate, error = laplacian(x)
    assert estimate.shape == error.shape == (MANY, 2)
    exact = rows_of(bent, x[:1])
    spread = variance(exact.hess[0], probes)
    assert_unbiased(estimate, error, exact.laplacian()[0], spread, samples)


@by_probes
@pytest.mark.parametrize("name", ["vector", "definite", "matrix", "low_rank"])
def test_weighted_estimates(name, probes):
    """Whatever the probes are colored with: unbiased, with the error that is stated."""
    x, (weight, _, full) = repeated(), weights()[name]
    generator = torch.Generator().manual_seed(1)
    words = {"weight": weight, "samples": 8, "probes": probes, "generator": generator}
    estimate, error = batch_laplacian(bent, return_error=True, **words)(x)
    exact = rows_of(bent, x[:1]).laplacian(full)[0]
    deviation = estimate.std(0)
    assert ((estimate.mean(0) - exact).abs() <= 5 * deviation / MANY**0.5 + 1e-9).all()
    torch.testing.assert_close((error**2).mean(0).sqrt(), deviation, rtol=0.1, atol=0)


@by_probes
@pytest.mark.parametrize("samples", [2, 9])
def test_estimates_of_the_divergence(samples, probes):
    x, generator = repeated(), torch.Generator().manual_seed(1)
    field = lambda x: torch.stack([x.prod(1), (x[:, 0] * x[:, 1]).sin(), x.exp().sum(1)], 1)
    divergence = batch_divergence(
        field, samples=samples, probes=probes, generator=generator, return_error=True
    )
    estimate, error = divergence(x)
    assert estimate.shape == error.shape == (MANY,)
    exact = rows_of(field, x[:1]).jac[0]
    assert_unbiased(estimate, error, exact.trace(), variance(exact, probes), samples)


@by_mode
@pytest.mark.parametrize("samples", [1, 3])
def test_rademacher_probes_are_exact_for_a_diagonal_hessian(samples, mode):
    x = randn(B, 3)
    func = lambda x: torch.stack([x.sin().sum(1), x.exp().sum(1)], 1)
    found = batch_laplacian(func, samples=samples, mode=mode)
    for _ in range(2):
        equal(found(x), torch.stack([-x.sin().sum(1), x.exp().sum(1)], 1))


@by_first
def test_rademacher_probes_are_exact_for_a_diagonal_jacobian(mode):
    x = randn(B, 3)
    found, error = batch_divergence(torch.sin, samples=2, return_error=True, mode=mode)(x)
    equal(found, x.cos().sum(1))
    equal(error, torch.zeros(B).double())


def estimators():
    return {
        "laplacian": functools.partial(batch_laplacian, bent, samples=3),
        "divergence": functools.partial(batch_divergence, lambda x: x * bent(x)[:, :1], samples=3),
    }


@by_probes
@pytest.mark.parametrize("name", estimators())
def test_a_generator_makes_estimates_repeat(name, probes):
    x = randn(B, 3)
    make = functools.partial(estimators()[name], probes=probes)
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        transformed = make(generator=generator)
        draws.append([transformed(x) for _ in range(3)])
    assert torch.equal(torch.get_rng_state(), state)
    equal(draws[0], draws[1], 1e-12)
    for one, other in itertools.combinations(draws[0], 2):
        assert not torch.allclose(one, other)


@by_probes
@pytest.mark.parametrize("name", estimators())
def test_without_a_generator_the_global_one_is_drawn_from(name, probes):
    x, transformed = randn(B, 3), estimators()[name](probes=probes)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append([transformed(x) for _ in range(2)])
    # The first call verifies itself, which must not move the random state either.
    equal(draws[0], draws[1], 1e-12)
    assert not torch.allclose(draws[0][0], draws[0][1])


@by_nested
@by_probes
def test_estimates_by_a_shared_argument(probes, mode):
    """Rows that share the weights also share the probes."""
    x, w = randn(1, 3).expand(2, 3), randn(2, 3)
    words = {"in_dims": (0, None), "samples": 4, "probes": probes, "mode": mode}
    operator = batch_laplacian(lambda x, w: (x @ w.T).pow(2), 1, **words)
    estimate = torch.stack([operator(x, w)[0] for _ in range(200)])
    exact = 2 * x[0].pow(2).sum()
    mean, spread = estimate.mean(0), estimate.std(0)
    assert ((mean - exact).abs() <= 5 * spread / 200**0.5).all()


def test_a_gradient_through_an_estimate():
    """Of a quadratic form: each estimate is ``v @ (A + A.T) @ v``, linear in ``A``."""
    a, x = randn(3, 3).requires_grad_(), randn(B, 3)
    func = lambda x: torch.einsum("bi,ij,bj->b", x, a, x)
    for mode in ("taylor", *NESTED, "auto"):
        found = batch_laplacian(func, samples=3, mode=mode)(x)
        (grad,) = torch.autograd.grad(found.sum(), a)
        equal(grad.diagonal(), torch.full((3,), 2.0 * B).double())
        equal((grad * a).sum(), found.sum().detach())
