"""``batch_jacobian``: trees, argnums, batch dimensions, keyword arguments, aux and value."""

import collections
import dataclasses
from typing import Any, NamedTuple

import optree
import pytest
import torch

from funcjac import batch_jacobian
from tests.tensors import equal

B = 4

ROUTES = [(engine, mode) for engine in ("vmap", "sum", "loop") for mode in ("fwd", "rev")]

every_route = pytest.mark.parametrize(("engine", "mode"), [*ROUTES, ("auto", "auto")])

# The sum trick has no per-sample derivative of what rows share.
shared_route = pytest.mark.parametrize(
    ("engine", "mode"), [*[route for route in ROUTES if route[0] != "sum"], ("auto", "auto")]
)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def linear_of_sine(row, out):
    """A function ``(B, *row) -> (B, *out)`` and its Jacobian, written by hand."""
    n, m = torch.Size(row).numel(), torch.Size(out).numel()
    weight = randn(m, n)

    def func(x):
        return (x.reshape(x.shape[0], n).sin() @ weight.T).reshape(x.shape[0], *out)

    def derivative(x):
        columns = x.reshape(x.shape[0], 1, n).cos()
        return (weight * columns).reshape(x.shape[0], *out, *row)

    return func, derivative


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class State:
    position: Any
    velocity: Any


optree.register_pytree_node(
    State,
    lambda state: ((state.position, state.velocity), None, ("position", "velocity")),
    lambda _, children: State(*children),
    namespace="funcjac",
)


def ordered(**items):
    return collections.OrderedDict(items)


CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda t: (t[0], t[1])),
    "list": (lambda a, b: [a, b], lambda t: (t[0], t[1])),
    "dict out of order": (lambda a, b: {"z": a, "a": b}, lambda t: (t["z"], t["a"])),
    "OrderedDict": (lambda a, b: ordered(z=a, a=b), lambda t: (t["z"], t["a"])),
    "namedtuple": (Pair, lambda t: (t.left, t.right)),
    "dataclass": (State, lambda t: (t.position, t.velocity)),
    "None inside": (lambda a, b: (None, a, {"n": None, "b": b}), lambda t: (t[1], t[2]["b"])),
    "nested": (
        lambda a, b: {"z": [Pair(a, None)], "a": (b,)},
        lambda t: (t["z"][0].left, t["a"][0]),
    ),
}

every_container = pytest.mark.parametrize("container", CONTAINERS)


@every_route
@every_container
def test_any_container_may_go_in(container, engine, mode):
    make, take = CONTAINERS[container]
    a, b = randn(B, 3), randn(B, 2, 2)

    def func(tree):
        a, b = take(tree)
        return a.sin().sum(1, keepdim=True) * b.reshape(b.shape[0], 4)  # (B, 4)

    jac = batch_jacobian(func, engine=engine, mode=mode)(make(a, b))
    assert type(jac) is type(make(a, b))
    assert structure(jac) == structure(make(a, b))
    by_a, by_b = take(jac)
    equal(by_a, b.reshape(B, 4, 1) * a.cos().unsqueeze(1))
    expected = a.sin().sum(1).reshape(B, 1, 1) * torch.eye(4).double()
    equal(by_b, expected.reshape(B, 4, 2, 2))


@every_route
@every_container
def test_any_container_may_come_out(container, engine, mode):
    make, take = CONTAINERS[container]
    x = randn(B, 3)
    func = lambda x: make(x.sin(), (x**2).sum(1))
    jac, value = batch_jacobian(func, engine=engine, mode=mode, return_value=True)(x)
    assert type(jac) is type(value) is type(func(x))
    assert structure(jac) == structure(value) == structure(func(x))
    first, second = take(jac)
    equal(first, torch.diag_embed(x.cos()))
    equal(second, 2 * x)
    equal(take(value), take(func(x)))


def structure(tree):
    return optree.tree_structure(tree, namespace="funcjac")


@every_route
def test_output_structure_outside_input_structure_inside(engine, mode):
    func = lambda p, x: {"z": p["w"] * x, "a": (x.sin(), None)}
    p, x = {"w": randn(B, 3), "b": randn(B)}, randn(B, 3)
    jac = batch_jacobian(func, argnums=(1, 0), engine=engine, mode=mode)(p, x)
    assert list(jac) == ["z", "a"]
    by_x, by_p = jac["z"]
    assert list(by_p) == ["w", "b"]
    equal(by_x, torch.diag_embed(p["w"]))
    equal(by_p["w"], torch.diag_embed(x))
    assert jac["a"][1] is None
    assert jac["a"][0][1]["b"].shape == (B, 3)
    equal(jac["a"][0][0], torch.diag_embed(x.cos()))


@every_route
def test_a_part_of_a_tree_may_be_shared(engine, mode):
    tree = {"scale": torch.tensor(3.0).double(), "x": randn(B, 3), "name": "sine"}
    func = lambda y, tree: y * tree["x"] * tree["scale"]
    y = randn(B, 3)
    in_dims = (0, {"scale": None, "x": 0, "name": None})
    jac = batch_jacobian(func, in_dims=in_dims, engine=engine, mode=mode)(y, tree)
    equal(jac, torch.diag_embed(3 * tree["x"]))


def three(x, y, z):
    return x.sin() * y.sum(1, keepdim=True) + z.unsqueeze(1) ** 2  # (B, 3)


def three_derivatives(x, y, z):
    return (
        torch.diag_embed(x.cos()) * y.sum(1).reshape(-1, 1, 1),
        x.sin().unsqueeze(2).expand(-1, 3, 2).contiguous(),
        (2 * z).unsqueeze(1).expand(-1, 3).contiguous(),
    )


@pytest.mark.quick
@every_route
@pytest.mark.parametrize(
    "argnums", [0, 1, 2, -1, -3, (0,), (1, 2), (2, 0), (-1, 0, 1), (-2,)], ids=str
)
def test_argnums_selects_and_orders_blocks(argnums, engine, mode):
    args = randn(B, 3), randn(B, 2), randn(B)
    jac = batch_jacobian(three, argnums, engine=engine, mode=mode)(*args)
    expected = three_derivatives(*args)
    if isinstance(argnums, int):
        equal(jac, expected[argnums])
    else:
        assert type(jac) is tuple
        equal(jac, tuple(expected[a] for a in argnums))


def test_argnums_is_the_second_positional_argument():
    args = randn(B, 3), randn(B, 2), randn(B)
    equal(batch_jacobian(three, 1)(*args), batch_jacobian(three, argnums=1)(*args))


@every_route
def test_the_same_tensor_twice_is_two_inputs(engine, mode):
    x = randn(B, 3)
    left, right = batch_jacobian(lambda a, b: a * b**2, (0, 1), engine=engine, mode=mode)(x, x)
    equal(left, torch.diag_embed(x**2))
    equal(right, torch.diag_embed(2 * x**2))


@every_route
def test_other_arguments_may_be_anything(engine, mode):
    def func(x, name, indices, flags, nothing):
        assert name == "sine"
        assert nothing is None
        return x.sin().gather(1, indices) * flags

    x, indices, flags = randn(B, 3), torch.randint(3, (B, 2)), torch.rand(B, 2) > 0.5
    in_dims = (0, None, 0, 0, None)
    jac = batch_jacobian(func, in_dims=in_dims, engine=engine, mode=mode)(
        x, "sine", indices, flags, None
    )
    chosen = torch.nn.functional.one_hot(indices, 3).double()
    equal(jac, chosen * (x.cos().unsqueeze(1) * flags.unsqueeze(2)))


@every_route
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_in_dims_may_be_any_dimension(dim, engine, mode):
    x = randn(B, 2, 3)
    seen = []

    def func(moved):
        seen.append(moved.ndim)
        return moved.movedim(dim, 0).sin()

    jac = batch_jacobian(func, in_dims=dim, engine=engine, mode=mode)(x.movedim(0, dim))
    assert set(seen) == {3}
    assert jac.shape == (B, 2, 3, 2, 3)
    assert jac.is_contiguous()
    equal(jac.reshape(B, 6, 6), torch.diag_embed(x.cos().reshape(B, 6)))


@every_route
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_out_dims_may_be_any_dimension(dim, engine, mode):
    x = randn(B, 2, 3)
    func = lambda x: x.sin().movedim(0, dim)
    jacobian = batch_jacobian(func, out_dims=dim, engine=engine, mode=mode, return_value=True)
    jac, value = jacobian(x)
    equal(jac.reshape(B, 6, 6), torch.diag_embed(x.cos().reshape(B, 6)))
    equal(value, x.sin())


@pytest.mark.quick
@every_route
def test_every_argument_has_its_own_dim(engine, mode):
    x, y, w = randn(B, 3), randn(3, 2, B), randn(2)
    func = lambda x, y, w: x * torch.einsum("iob,o->bi", y, w)
    jacobian = batch_jacobian(func, (0, 1), in_dims=(0, -1, None), engine=engine, mode=mode)
    by_x, by_y = jacobian(x, y, w)
    equal(by_x, torch.diag_embed(torch.einsum("iob,o->bi", y, w)))
    equal(by_y, torch.einsum("bi,ij,o->bijo", x, torch.eye(3).double(), w))


@every_route
@pytest.mark.parametrize(
    "in_dims",
    [
        (1, 0),
        ({"w": 1, "b": (1, 1)}, 0),
        ({"w": 1, "b": 1}, 0),
        ({"b": (1, -1), "w": -1}, 0),
        [1, 0],
    ],
    ids=str,
)
def test_in_dims_may_be_a_prefix_tree(in_dims, engine, mode):
    p = {"w": randn(3, B), "b": (randn(2, B), randn(3, B))}
    x = randn(B, 3)
    func = lambda p, x: p["w"].T * x + p["b"][1].T
    jac = batch_jacobian(func, in_dims=in_dims, engine=engine, mode=mode)(p, x)
    equal(jac["w"], torch.diag_embed(x))
    equal(jac["b"][0], torch.zeros(B, 3, 2).double())
    equal(jac["b"][1], torch.eye(3).double().expand(B, 3, 3).contiguous())


@every_route
def test_out_dims_may_be_a_prefix_tree(engine, mode):
    func = lambda x: {"z": (x.sin().T, x.exp().T), "a": x**2}
    x = randn(B, 3)
    out_dims = {"z": 1, "a": 0}
    jac = batch_jacobian(func, out_dims=out_dims, engine=engine, mode=mode)(x)
    equal(jac["z"], (torch.diag_embed(x.cos()), torch.diag_embed(x.exp())))
    equal(jac["a"], torch.diag_embed(2 * x))


@every_route
def test_out_dims_of_a_tree_with_none_in_it(engine, mode):
    x = randn(B, 3)
    none, jac = batch_jacobian(
        lambda x: (None, x.sin().T), out_dims=(0, 1), engine=engine, mode=mode
    )(x)
    assert none is None
    equal(jac, torch.diag_embed(x.cos()))


@pytest.mark.quick
@every_route
def test_func_sees_a_batch(engine, mode):
    ndims = set()

    def func(x):
        ndims.add(x.ndim)
        assert x.shape[1:] == (3, 2)
        return x.flatten(1).sin()

    batch_jacobian(func, engine=engine, mode=mode)(randn(B, 3, 2))
    assert ndims == {3}


@pytest.mark.quick
@every_route
@pytest.mark.parametrize("argnums", [0, 1])
def test_a_shared_argument_beside_a_batched_one_is_differentiated(argnums, engine, mode):
    if argnums == 1 and engine == "sum":
        pytest.skip("the sum trick has no derivative of what rows share")
    x, w = randn(B, 3), randn(5, 3)
    func = lambda x, w: (x @ w.T).tanh()
    jac = batch_jacobian(func, argnums, in_dims=(0, None), engine=engine, mode=mode)(x, w)
    slope = 1 - func(x, w) ** 2
    if argnums == 0:
        equal(jac, slope.unsqueeze(2) * w)
    else:
        assert jac.shape == (B, 5, 5, 3)
        equal(jac, torch.einsum("bo,op,bi->bopi", slope, torch.eye(5).double(), x))


@shared_route
def test_shared_and_batched_arguments_are_differentiated_together(engine, mode):
    x, w = randn(B, 3), randn(3)
    func = lambda x, w: (x * w).sin()
    jacobian = batch_jacobian(func, (1, 0), in_dims=(0, None), engine=engine, mode=mode)
    by_w, by_x = jacobian(x, w)
    equal(by_x, torch.diag_embed((x * w).cos() * w))
    equal(by_w, torch.diag_embed((x * w).cos() * x))


@pytest.mark.quick
@every_route
def test_keyword_arguments_are_untouched(engine, mode):
    marks = {"tensor": randn(7), "object": object(), "list": [1, 2], "number": 2}
    seen = []

    def func(x, **kwargs):
        seen.append(kwargs)
        return x.sin() * kwargs["number"]

    x = randn(B, 3)
    jac = batch_jacobian(func, engine=engine, mode=mode)(x, **marks)
    equal(jac, 2 * torch.diag_embed(x.cos()))
    for kwargs in seen:
        assert kwargs.keys() == marks.keys()
        assert all(kwargs[name] is marks[name] for name in marks)


AUX = {
    "None": lambda x: None,
    "string": lambda x: "text",
    "number": lambda x: 3,
    "object": lambda x: Ellipsis,
    "tensor": lambda x: x.exp(),
    "integer tensor": lambda x: x.argmax(1),
    "boolean tensor": lambda x: x > 0,
    "nested": lambda x: {"b": [x.exp(), "text", None], "a": (x.argmax(1), Pair(x * 2, 1.5))},
    "empty": lambda x: {},
}


@every_route
@pytest.mark.parametrize("kind", AUX)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_aux_is_any_object(kind, chunk_size, engine, mode):
    func = lambda x: (x.sin(), AUX[kind](x))
    x = randn(B, 3)
    words = {"engine": engine, "mode": mode, "chunk_size": chunk_size, "has_aux": True}
    jacobian = batch_jacobian(func, **words)
    for _ in range(2):
        jac, aux = jacobian(x)
        equal(jac, torch.diag_embed(x.cos()))
        assert_same(aux, AUX[kind](x))
    result = batch_jacobian(func, return_value=True, **words)(x)
    assert type(result) is tuple
    assert len(result) == 2
    jac, (value, aux) = result
    equal(jac, torch.diag_embed(x.cos()))
    equal(value, x.sin())
    assert_same(aux, AUX[kind](x))


def assert_same(got, expected):
    assert structure(got) == structure(expected)
    leaves = [optree.tree_leaves(tree, namespace="funcjac") for tree in (got, expected)]
    for one, other in zip(*leaves):
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        else:
            assert one == other


@every_route
def test_aux_of_one_feature_keeps_it(engine, mode):
    """A row of aux with a leading dimension of one is not mistaken for a batch of one."""
    func = lambda x: (x.sin(), x.exp().unsqueeze(1))
    x = randn(B, 3)
    _, aux = batch_jacobian(func, engine=engine, mode=mode, has_aux=True)(x)
    equal(aux, x.exp().unsqueeze(1))


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@every_route
def test_aux_may_be_shared_by_rows(engine, mode):
    """A weight as aux has no batch dimension: as it is or refused, never stacked."""
    weight = torch.arange(10.0).reshape(5, 2)
    func = lambda x: (x.sin(), weight)
    jacobian = batch_jacobian(func, engine=engine, mode=mode, has_aux=True)
    if engine in ("vmap", "loop"):
        with pytest.raises(RuntimeError, match="expected aux tensors with a batch dimension"):
            jacobian(randn(B, 3))
    else:
        equal(jacobian(randn(B, 3))[1], weight)


@every_route
def test_aux_is_not_differentiated(engine, mode):
    x = randn(B, 3)
    func = lambda x: (x.sin(), x.exp())
    jac, aux = batch_jacobian(func, engine=engine, mode=mode, has_aux=True)(x)
    assert jac.shape == (B, 3, 3)
    assert not aux.requires_grad


@every_route
def test_value_equals_func(engine, mode):
    func, derivative = linear_of_sine((2, 3), (5, 2))
    x = randn(B, 2, 3)
    jacobian = batch_jacobian(func, engine=engine, mode=mode, return_value=True)
    for _ in range(2):
        result = jacobian(x)
        assert type(result) is tuple
        jac, value = result
        equal(jac, derivative(x))
        equal(value, func(x))
        assert not value.requires_grad


@every_route
def test_value_is_of_the_same_pass(engine, mode):
    """Random noise multiplies: a value of another pass would not fit its Jacobian."""
    func = lambda x: x * torch.rand_like(x)
    x = randn(B, 3)
    words = {"engine": engine, "mode": mode, "randomness": "different", "return_value": True}
    jacobian = batch_jacobian(func, **words)
    for _ in range(3):
        jac, value = jacobian(x)
        equal(jac, torch.diag_embed(value / x))
