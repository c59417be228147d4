"""Batches without rows, and leaves without elements beside others."""

import optree
import pytest
import torch

from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    check_derivative,
    explain,
)
from tests.cases.modules import network
from tests.cases.transforms import OF_NETWORKS
from tests.tensors import equal, f64, fixed_randn, quiet, randn

B = 4


@pytest.mark.quick
@pytest.mark.parametrize("name", OF_NETWORKS)
def test_an_empty_batch_has_a_graph(name):
    """A loss over active points must go backward where none is active."""
    net = network()
    found = OF_NETWORKS[name](net)(randn(0, 3))
    leaves = found if isinstance(found, tuple) else (found,)
    assert all(leaf.requires_grad for leaf in leaves)
    loss = sum(leaf.square().sum() for leaf in leaves)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    with torch.no_grad():
        found = OF_NETWORKS[name](net)(randn(0, 3))
    leaves = found if isinstance(found, tuple) else (found,)
    assert not any(leaf.requires_grad for leaf in leaves)


@pytest.mark.parametrize("name", OF_NETWORKS)
def test_an_empty_batch_has_the_dtypes_of_a_full_one_under_autocast(name):
    net = network().float()
    with torch.autocast("cpu", torch.bfloat16):
        some, none = (OF_NETWORKS[name](net)(torch.randn(size, 3)) for size in (B, 0))
    some, none = (found if isinstance(found, tuple) else (found,) for found in (some, none))
    assert [leaf.dtype for leaf in none] == [leaf.dtype for leaf in some]
    assert [leaf.shape[1:] for leaf in none] == [leaf.shape[1:] for leaf in some]


EVERY = (batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian)


@pytest.mark.parametrize("transform", EVERY)
def test_an_output_without_elements_changes_no_other(transform):
    x = fixed_randn(3, 2)
    func = lambda x: (x.sin(), x[:, :0])
    for _ in range(3):
        found, empty = transform(func)(x)
        torch.testing.assert_close(found, transform(torch.sin)(x))
        assert empty.shape == (3, 0, *found.shape[2:])


@pytest.mark.parametrize("return_value", [False, True])
@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_inputs_without_elements_change_no_other(transform, return_value):
    def func(x, z):
        return x.sin() * z.sum(-1, keepdim=True) ** 2

    x, none, z = fixed_randn(4, 2), fixed_randn(4, 0), fixed_randn(4, 3)
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
def test_a_leaf_without_elements_adds_nothing_to_a_divergence(mode, check, words):
    x, none = fixed_randn(4, 2), fixed_randn(4, 0)
    for order in (1, -1):
        func = lambda *args, order=order: tuple(x * x for x in args[::order])[::order]
        divergence = batch_divergence(func, (0, 1), mode=mode, check=check, **words)
        found = divergence(*(x, none)[::order])
        torch.testing.assert_close(found, 2 * x.sum(-1))


@quiet
@pytest.mark.parametrize("words", [{}, {"return_value": True}], ids=str)
@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_an_empty_batch_has_the_shapes_of_a_full_one_with_a_shared_argument(transform, words):
    both = transform(lambda x, s: (x @ s).sin(), (0, 1), in_dims=(0, None), **words)
    shapes = [
        tuple(leaf.shape) for leaf in optree.tree_leaves(both(fixed_randn(0, 3), fixed_randn(3)))
    ]
    some = [
        tuple(leaf.shape) for leaf in optree.tree_leaves(both(fixed_randn(4, 3), fixed_randn(3)))
    ]
    assert shapes == [(0, *shape[1:]) for shape in some]


@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_inputs_without_elements_change_no_dtype(transform):
    func = lambda x, y: (x**2).sum(1) + y.sum(1).to(x.dtype)
    for swap in (False, True):
        argnums = (1, 0) if swap else (0, 1)
        transformed = transform(func, argnums, return_value=True)
        dtypes = [
            [leaf.dtype for leaf in optree.tree_leaves(transformed(fixed_randn(4, 3).float(), y))]
            for y in (fixed_randn(4, 0), fixed_randn(4, 1))
        ]
        assert dtypes[0] == dtypes[1]


def test_estimates_and_checks_take_inputs_without_elements():
    func, x, none = lambda x, y: (x**2).sum(1) + y.sum(1), fixed_randn(4, 3), fixed_randn(4, 0)
    for argnums in ((0, 1), (1, 0)):
        found, error = batch_laplacian(func, argnums, samples=3, return_error=True)(x, none)
        torch.testing.assert_close(found, torch.full((4,), 6.0, dtype=f64))
        torch.testing.assert_close(error, torch.zeros(4, dtype=f64))
        assert check_derivative(batch_hessian(func, argnums), x, none).ok


@pytest.mark.parametrize("engine", ["auto", "vmap", "sum", "loop"])
def test_a_divergence_of_several_outputs_returns_their_values(engine):
    x, y = fixed_randn(4, 3), fixed_randn(4, 2)
    func = lambda x, y: ((x**2, y**2), x.sum(1))
    words = {"return_value": True, "has_aux": True, "engine": engine}
    found, (value, aux) = batch_divergence(func, (0, 1), **words)(x, y)
    torch.testing.assert_close(found, 2 * x.sum(1) + 2 * y.sum(1))
    torch.testing.assert_close(value, (x**2, y**2))
    torch.testing.assert_close(aux, x.sum(1))


@pytest.mark.parametrize("engine", ["vmap", "loop", "sum"])
@pytest.mark.parametrize("mode", ["rev", "fwd"])
def test_rows_that_are_numbers_on_both_sides(engine, mode):
    """Nothing is left of the shapes of such a row: no size for a block."""
    x = randn(4)
    equal(batch_jacobian(torch.sin, engine=engine, mode=mode)(x), x.cos())
    hessian = batch_hessian(torch.sin, engine=engine, mode=f"{mode}_over_rev")
    equal(hessian(x), -x.sin())


def test_a_shared_number_needs_no_other_engine():
    jac = batch_jacobian(lambda w, x: w * x, in_dims=(None, 0))
    x = randn(4)
    equal(jac(randn(()), x), x)


NESTED = ["fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]
KEPT = [
    *[(batch_jacobian, mode) for mode in ("rev", "fwd")],
    *[
        (make, mode)
        for make in (batch_hessian, batch_hessian_diagonal, batch_laplacian)
        for mode in ("taylor", *NESTED)
    ],
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("make", "mode"), KEPT)
def test_results_of_one_row_lie_in_no_kept_memory(make, mode, size):
    """What users write into results is not what later calls begin with."""
    results = make(lambda x: x + 1, mode=mode, return_value=True)(torch.zeros(1, size))
    for tensor in optree.tree_leaves(results):
        tensor.detach().mul_(7)
    found = batch_jacobian(torch.sin, check=False)(torch.zeros(3, size))
    assert torch.equal(found, torch.eye(size).expand(3, size, size))
