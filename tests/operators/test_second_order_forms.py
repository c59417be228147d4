"""What goes in and out of the operators: trees, arguments, dimensions, aux, sizes, chunks."""

import functools
import itertools

import optree
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
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd", "auto")
TAYLOR = ("taylor", *NESTED)
FIRST = ("fwd", "rev", "auto")
by_mode = pytest.mark.parametrize("mode", TAYLOR)
by_nested = pytest.mark.parametrize("mode", NESTED)

partials = functools.partial(batch_partials, indices=[(0,), (2, 1), (0, 0, 1)])
OPERATORS = {
    "hessian": (batch_hessian, NESTED),
    "diagonal": (batch_hessian_diagonal, TAYLOR),
    "laplacian": (batch_laplacian, TAYLOR),
    "weighted": (functools.partial(batch_laplacian, weight=torch.arange(3.0).double()), TAYLOR),
    "estimate": (functools.partial(batch_laplacian, samples=2), TAYLOR),
    "partials": (partials, ("taylor", "rev", "auto")),
    "divergence": (batch_divergence, FIRST),
    "divergence_estimate": (functools.partial(batch_divergence, samples=2), FIRST),
}
ROUTES = [(name, mode) for name, (_, modes) in OPERATORS.items() for mode in modes]
by_route = pytest.mark.parametrize(("name", "mode"), ROUTES)
by_name = pytest.mark.parametrize("name", OPERATORS)


def by_route_without(*left_out):
    routes = [(name, mode) for name, mode in ROUTES if name not in left_out]
    return pytest.mark.parametrize(("name", "mode"), routes)


VECTORS = ("weighted", "partials")  # they count the entries of a row
ESTIMATES = ("estimate", "divergence_estimate")
DIVERGENCES = ("divergence", "divergence_estimate")


def field(x):
    """``(B, 3) -> (B, 3)``; its Hessians and its Jacobian are diagonal: estimates are exact."""
    return x.sin() + 2 * x.exp()


def make(name, func=field, **words):
    return OPERATORS[name][0](func, **words)


# --- value and aux -----------------------------------------------------------------------


def with_aux(x):
    y = field(x)
    return y, {"name": "field", "sum": y.sum(1)}


@pytest.mark.quick
@by_route
def test_value_and_aux(name, mode):
    """``result``, ``(result, aux)``, ``(result, value)``, ``(result, (value, aux))``."""
    x = randn(B, 3)
    plain = make(name, mode=mode)(x)
    lower = (batch_jacobian(field)(x), field(x)) if has_jac(name) else field(x)
    for _ in range(2):
        found, value = make(name, mode=mode, return_value=True)(x)
        equal(found, plain)
        equal(value, lower)
        found, aux = make(name, with_aux, mode=mode, has_aux=True)(x)
        equal(found, plain)
        assert aux["name"] == "field"
        equal(aux["sum"], field(x).sum(1))
        both = make(name, with_aux, mode=mode, has_aux=True, return_value=True)(x)
        found, value = both
        if has_jac(name):
            jac, value = value
            equal(jac, lower[0])
        value, aux = value
        equal(found, plain)
        equal(value, field(x))
        assert aux["name"] == "field"
        equal(aux["sum"], field(x).sum(1))


def has_jac(name):
    return name in ("hessian", "diagonal", "laplacian", "weighted")


@pytest.mark.parametrize("name", ["estimate", "divergence_estimate"])
def test_value_and_aux_beside_an_error(name):
    x = randn(B, 3)
    exact = make(name)(x)
    words = {"return_error": True, "return_value": True}
    (found, error), value = make(name, **words)(x)
    equal(found, exact)
    equal(error, torch.zeros_like(exact))
    equal(value, field(x))
    (found, error), (value, aux) = make(name, with_aux, has_aux=True, **words)(x)
    equal((found, error, value), (exact, torch.zeros_like(exact), field(x)))
    assert aux["name"] == "field"
    (found, error), aux = make(name, with_aux, has_aux=True, return_error=True)(x)
    equal((found, error), (exact, torch.zeros_like(exact)))
    assert aux["name"] == "field"


# --- arguments and trees -----------------------------------------------------------------


def of_three(a, b, c):
    """``(B, 3), (B, 2), (B, 1) -> (B, 2)``."""
    return (a.sum(1, keepdim=True) * b * c).sin() + (a[:, :2] * b).prod(1, keepdim=True)


@by_nested
@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0), (0, 1, 2), (-1, 0)])
def test_argnums(argnums, mode):
    args = randn(B, 3), randn(B, 2), randn(B, 1)
    found = batch_hessian(of_three, argnums, mode=mode)(*args)
    expected = oracles.hessian(of_three, args, argnums=argnums)
    assert type(found) is type(expected)
    equal(found, expected)
    if isinstance(argnums, int):
        return
    for i, j in itertools.product(range(len(argnums)), repeat=2):
        sizes = args[argnums[i]].shape[1], args[argnums[j]].shape[1]
        assert found[i][j].shape == (B, 2, *sizes)
        equal(found[i][j], found[j][i].mT)


@by_mode
@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0), (0, 1, 2), (-1, 0)])
def test_argnums_of_the_diagonal_and_the_laplacian(argnums, mode):
    """A tuple adds a level to the diagonal; the Laplacian is the sum over all."""
    args = randn(B, 3), randn(B, 2), randn(B, 1)
    found = batch_hessian_diagonal(of_three, argnums, mode=mode)(*args)
    expected = oracles.diagonal(of_three, args, argnums=argnums)
    assert type(found) is type(expected)
    equal(found, expected)
    found = batch_laplacian(of_three, argnums, mode=mode)(*args)
    equal(found, oracles.laplacian(of_three, args, argnums=argnums))


@pytest.mark.parametrize("mode", FIRST)
@pytest.mark.parametrize("argnums", [(0, 1), (1, 0)])
def test_divergence_of_several_inputs(argnums, mode):
    """Leaves of output and input belong together in order."""
    a, b = randn(B, 3), randn(B, 2)
    args = (a, b) if argnums == (0, 1) else (b, a)
    pair = lambda a, b: (a * b[:, :1].exp(), {"b": b.sin() * a[:, :2]})
    func = pair if argnums == (0, 1) else lambda b, a: pair(a, b)
    found = batch_divergence(func, argnums, mode=mode)(*args)
    equal(found, 3 * b[:, 0].exp() + (b.cos() * a[:, :2]).sum(1))


def of_tree(tree):
    a, b = tree["z"], tree["a"][0]
    return {"y": (a * b[:, :1]).sin(), "b": ((a.sum(1) * b.prod(1)), [a[:, :2] ** 3])}


@by_route_without(*VECTORS, *ESTIMATES, *DIVERGENCES)
def test_trees(name, mode):
    tree = {"z": randn(B, 3), "a": (randn(B, 2), None)}
    found = make(name, of_tree, mode=mode)(tree)
    expected = getattr(oracles, name)(of_tree, (tree,))
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    equal(optree.tree_leaves(found), optree.tree_leaves(expected))
    assert list(found) == ["y", "b"]
    if name == "hessian":
        assert list(found["y"]) == list(found["y"]["z"]) == ["z", "a"]
        equal(found["y"]["z"]["a"][0], found["y"]["a"][0]["z"].mT)


@by_route
def test_trees_of_outputs(name, mode):
    """``samples``, ``weight`` and ``indices`` go with any output, as does a tree of one input."""
    x = randn(B, 3)
    if name in DIVERGENCES:
        func, expected = (lambda x: [field(x)]), make(name)(x)
    else:
        func = lambda x: [field(x), {"a": field(x)[:, 0]}]
        plain = make(name)(x)
        pick = lambda whole: [whole, {"a": whole[:, 0]}]
        expected = tuple(map(pick, plain)) if name == "partials" else pick(plain)
    found = make(name, func, mode=mode)(x)
    equal(optree.tree_leaves(found), optree.tree_leaves(expected))
    assert optree.tree_structure(found) == optree.tree_structure(expected)


@by_route
def test_keywords(name, mode):
    """They go to ``func`` untouched: not mapped, tensor or not."""
    x, scale = randn(B, 3), randn(3)
    func = lambda x, *, scale, power: field(scale * x) * power
    plain = make(name, lambda x: field(scale * x) * 2, mode=mode)(x)
    transformed = make(name, func, mode=mode)
    for _ in range(2):
        equal(transformed(x, scale=scale, power=2), plain)
    equal(
        transformed(x, scale=2 * scale, power=-2),
        make(name, lambda x: -2 * field(2 * scale * x))(x),
    )


# --- dimensions and sizes ----------------------------------------------------------------


@by_route
def test_batch_dimensions(name, mode):
    """Wherever ``func`` has the batch, results have it first."""
    x = randn(B, 3)
    plain = make(name)(x)
    columns = lambda x: field(x.T).T
    equal(make(name, columns, in_dims=1, out_dims=1, mode=mode)(x.T), plain)
    equal(make(name, columns, in_dims=-1, out_dims=-1, mode=mode)(x.T.contiguous()), plain)
    equal(make(name, lambda x: field(x.T), in_dims=1, mode=mode)(x.T), plain)


@by_route
def test_shared_arguments(name, mode):
    x, w = randn(B, 3), randn(3)
    func = lambda x, w: field(x * w)
    equal(
        make(name, func, in_dims=(0, None), mode=mode)(x, w), make(name, lambda x: field(x * w))(x)
    )


@by_nested
def test_second_derivatives_by_a_shared_argument(mode):
    x, w = randn(B, 3), randn(2, 3)
    func = lambda x, w: (x @ w.T).sin()
    found = batch_hessian(func, 1, in_dims=(0, None), mode=mode)(x, w)
    assert found.shape == (B, 2, 2, 3, 2, 3)
    equal(found, oracles.hessian(func, (x, w), argnums=1, in_dims=(0, None)))
    found = batch_laplacian(func, 1, in_dims=(0, None), mode=mode)(x, w)
    equal(found, oracles.laplacian(func, (x, w), argnums=1, in_dims=(0, None)))


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_numbers_by_a_batched_and_a_shared_argument(engine):
    """``sum_i sin(x_i w_i)``: an output without dimensions, and references of both arguments."""
    x, w = randn(B, 3), randn(3)
    keywords = {"in_dims": (0, None), "engine": engine, "check": True}
    func = lambda x, w: (x * w).sin().sum(1)
    by_x, by_w = batch_hessian_diagonal(func, (0, 1), **keywords)(x, w)
    equal(by_x, -(w**2) * (x * w).sin())
    equal(by_w, -(x**2) * (x * w).sin())
    equal(batch_laplacian(func, (0, 1), **keywords)(x, w), (by_x + by_w).sum(1))
    found = batch_partials(func, [(1,), (3, 3), (0, 3)], (0, 1), **keywords)(x, w)
    mixed = (x * w).cos() - x * w * (x * w).sin()
    equal(list(found), [w[1] * (x * w)[:, 1].cos(), by_w[:, 0], mixed[:, 0]])


@by_route
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_batch_of_one(batch, name, mode):
    x = randn(batch, 3)
    found, whole = make(name, mode=mode)(x), make(name)(randn(B, 3))
    for one, other in zip(optree.tree_leaves(found), optree.tree_leaves(whole)):
        assert one.shape == (batch, *other.shape[1:])
        assert one.dtype == torch.float64


@by_route
@pytest.mark.parametrize("grad", [False, True])
def test_empty_batch_of_a_network(grad, name, mode):
    """Also where a gradient is to come of it."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double().requires_grad_(grad)
    found = make(name, net, mode=mode)(randn(0, 3))
    assert all(leaf.shape[0] == 0 for leaf in optree.tree_leaves(found))


@by_route_without(*VECTORS)
def test_rows_without_dimensions(name, mode):
    """``(B,) -> (B,)``."""
    x = randn(B)
    expected = x.cos() if name in DIVERGENCES else -x.sin()
    equal(make(name, torch.sin, mode=mode)(x), expected)


@by_route_without(*VECTORS)
def test_rows_of_size_zero(name, mode):
    x = randn(B, 0)
    func = torch.sin if name in DIVERGENCES else lambda x: x.sin().sum(1, True) + 1
    found = make(name, func, mode=mode)(x)
    shape = {"hessian": (B, 1, 0, 0), "diagonal": (B, 1, 0), "laplacian": (B, 1)}
    shape |= {"estimate": (B, 1), "divergence": (B,), "divergence_estimate": (B,)}
    equal(found, torch.zeros(shape[name], dtype=torch.float64))


@by_route_without(*DIVERGENCES)
def test_outputs_of_size_zero(name, mode):
    found = make(name, lambda x: field(x)[:, :0], mode=mode)(randn(B, 3))
    shape = {"hessian": (B, 0, 3, 3), "diagonal": (B, 0, 3), "partials": (B, 0)}
    for leaf in optree.tree_leaves(found):
        assert leaf.shape == shape.get(name, (B, 0))


@by_route
def test_constant_and_linear_functions(name, mode):
    x, expected = randn(B, 3), torch.zeros(())
    for func in (lambda x: x.new_ones(x.shape), lambda x: x - 1, lambda x: x):
        found = make(name, func, mode=mode)(x)
        first = 0.0 if func(x).eq(1).all() else 3.0
        if name in DIVERGENCES:
            equal(found, torch.full((B,), first).double())
        elif name == "partials":
            equal(found[0][:, 0], torch.full((B,), first / 3).double())
            equal(found[1:], (torch.zeros(B, 3).double(),) * 2)
        else:
            equal(found, expected.expand(found.shape).double())


# --- layout, chunks, repeats -------------------------------------------------------------


@by_nested
def test_chunks_of_hessians_by_vmap(mode):
    """Where the inner Jacobian comes along, it has no dimension of the outer chunks."""
    func = lambda x, y: (field(x) * y.sum(-1, keepdim=True), (x.exp(), "aux"))
    words = {"argnums": (0, 1), "has_aux": True, "return_value": True}
    args = randn(B, 3), randn(B, 2)
    chunked = batch_hessian(func, engine="vmap", mode=mode, chunk_size=2, **words)(*args)
    for got, right in zip(*map(optree.tree_leaves, (chunked, batch_hessian(func, **words)(*args)))):
        if isinstance(right, torch.Tensor):
            equal(got, right)


@by_route
@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_chunks_change_no_value(chunk_size, name, mode):
    x = randn(B, 3)
    chunked = make(name, mode=mode, chunk_size=chunk_size)
    for _ in range(2):
        equal(chunked(x), make(name)(x))


@by_route_without("weighted")  # the weight is float64
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_plain_and_contiguous(dtype, name, mode):
    x = randn(3, B).to(dtype).T
    assert not x.is_contiguous()
    found = make(name, mode=mode)(x)
    for leaf in optree.tree_leaves(found):
        assert type(leaf) is torch.Tensor
        assert leaf.dtype == dtype
        assert leaf.is_contiguous()
        assert not leaf.requires_grad


@by_route_without("weighted")
def test_promotion(name, mode):
    """The dtype that output and input promote to, as for ``batch_jacobian``."""
    x = randn(B, 3)
    found = make(name, lambda x: field(x).float(), mode=mode)(x)
    assert {leaf.dtype for leaf in optree.tree_leaves(found)} == {torch.float64}
    equal(found, make(name)(x), 1e-5)


@by_route
def test_many_calls(name, mode):
    """Verified or not, each call is as right as the first."""
    transformed = make(name, mode=mode)
    for _ in range(5):
        x = randn(B, 3)
        equal(transformed(x), make(name, mode="auto", check=False)(x))


@by_name
def test_other_batch_sizes(name):
    transformed, x = make(name), randn(9, 3)
    whole = make(name)(x)
    for size in (9, 2, 5, 1, 9, 0, 3):
        part = optree.tree_map(lambda leaf: leaf[:size], whole)
        equal(transformed(x[:size]), part)


def test_the_answer_has_the_name_of_the_function():
    for name in OPERATORS:
        assert make(name).__name__ == "field"


# --- what partial derivatives share ------------------------------------------------------


def test_nested_partials_differentiate_what_they_share_once():
    """One run of ``func``, and in each order a pass for each derivative that goes on."""
    runs, passes = [], []

    def func(x):
        runs.append(1)
        x.register_hook(lambda grad: passes.append(1))
        return x.prod(-1)

    indices = [(0, 0, 1), (0, 1, 1), (1, 0), (2, 1, 0), ()]
    x = torch.rand(B, 3, dtype=torch.float64)
    transformed = batch_partials(func, indices, mode="rev", engine="sum", check=False)
    for _ in range(2):  # the first looks at func
        runs.clear()
        passes.clear()
        found = transformed(x)
    one, two, three = x.unbind(-1)
    zero = torch.zeros_like(one)
    for got, right in zip(found, (zero, zero, three, torch.ones_like(one), one * two * three)):
        torch.testing.assert_close(got, right)
    assert len(runs) == 1
    assert len(passes) == 3  # of u, of u_0 and of u_01


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("mode", ["taylor", "rev"])
def test_partials_of_one_draw(mode, chunk_size):
    def func(x):
        return torch.rand_like(x[0]) * x**3

    words = {"mode": mode, "chunk_size": chunk_size, "randomness": "different"}
    transformed = batch_partials(func, [(0,), (0, 0), (0, 0, 0)], return_value=True, **words)
    x = 1 + torch.rand(B, 3, dtype=torch.float64)
    (first, second, third), value = transformed(x)
    torch.testing.assert_close(first[:, 0], 3 * value[:, 0] / x[:, 0])
    torch.testing.assert_close(second[:, 0], 6 * value[:, 0] / x[:, 0] ** 2)
    torch.testing.assert_close(third[:, 0], 6 * value[:, 0] / x[:, 0] ** 3)
