"""``batch_jacobian``: shapes, trees, arguments, words, values."""

import collections
import dataclasses
from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from funcjac import batch_jacobian

B = 4
ROUTES = [(engine, mode) for engine in ("vmap", "sum", "loop") for mode in ("fwd", "rev")]
every_route = pytest.mark.parametrize(("engine", "mode"), [*ROUTES, ("auto", "auto")])
# The sum trick has no per-sample derivative of what rows share.
shared_route = pytest.mark.parametrize(
    ("engine", "mode"), [*[route for route in ROUTES if route[0] != "sum"], ("auto", "auto")]
)


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


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


# --- shapes ------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("batch", [4, 1, 0])
@pytest.mark.parametrize(
    ("row", "out"),
    [
        ((3,), (5,)),
        ((5,), (3,)),
        ((), ()),
        ((3,), ()),
        ((), (5,)),
        ((2, 3), (5, 1, 2)),
        ((1,), (1,)),
        ((0,), (5,)),
        ((3,), (0,)),
        ((0,), (0, 2)),
        ((2, 0), ()),
    ],
    ids=str,
)
def test_shape_and_value(row, out, batch, engine, mode):
    func, derivative = linear_of_sine(row, out)
    x = randn(batch, *row)
    jac = batch_jacobian(func, engine=engine, mode=mode)(x)
    assert jac.shape == (batch, *out, *row)
    assert jac.dtype == torch.float64
    assert jac.is_contiguous()
    assert not jac.requires_grad
    equal(jac, derivative(x))


@pytest.mark.quick
def test_the_question_of_the_forum():
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10)).double()
    x = randn(3, 5)
    jac = batch_jacobian(net)(x)
    full = torch.autograd.functional.jacobian(net, x)
    assert full.shape == (3, 10, 3, 5)
    assert jac.shape == (3, 10, 5)
    equal(jac.detach(), torch.stack([full[b, :, b] for b in range(3)]))


@every_route
def test_repeated_calls_agree(engine, mode):
    func, derivative = linear_of_sine((3,), (5,))
    jacobian = batch_jacobian(func, engine=engine, mode=mode)
    for _ in range(6):  # verified and not
        x = randn(B, 3)
        equal(jacobian(x), derivative(x))


@every_route
def test_one_transform_for_many_signatures(engine, mode):
    jacobian = batch_jacobian(torch.sin, engine=engine, mode=mode)
    for shape in [(4, 3), (2, 3), (4, 2, 2), (4,), (0, 3), (4, 3)]:
        for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-14)]:
            x = randn(*shape, dtype=dtype)
            jac = jacobian(x)
            assert jac.dtype == dtype
            row = x[0].numel() if shape[0] else 3
            flat = jac.reshape(shape[0], row, row)
            expected = torch.diag_embed(x.cos().reshape(shape[0], row))
            torch.testing.assert_close(flat, expected, rtol=tolerance, atol=tolerance)


@every_route
@pytest.mark.parametrize(
    "make",
    [
        lambda: randn(3, B).T,
        lambda: randn(B, 6)[:, ::2],
        lambda: randn(2 * B, 3)[::2],
        lambda: randn(1, 3).expand(B, 3),
        lambda: randn(B, 1).expand(B, 3),
        lambda: randn(B, 3).flip(0)[:, [2, 0, 1]],
    ],
    ids=["transposed", "columns", "rows", "expanded batch", "expanded row", "indexed"],
)
def test_input_of_any_layout(make, engine, mode):
    x = make()
    jac = batch_jacobian(torch.sin, engine=engine, mode=mode)(x)
    assert jac.is_contiguous()
    equal(jac, torch.diag_embed(x.cos()))


@every_route
@pytest.mark.parametrize(
    "func",
    [lambda x: x.sin()[:, :1].expand(-1, 5, -1), lambda x: x.sin().mT, lambda x: x.sin()],
    ids=["expanded", "transposed", "plain"],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_result_is_contiguous(func, chunk_size, engine, mode):
    x = randn(B, 2, 3)
    jacobian = batch_jacobian(func, engine=engine, mode=mode, chunk_size=chunk_size)
    assert jacobian(x).is_contiguous()
    assert jacobian(x.requires_grad_()).is_contiguous()


# --- dtypes ------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize(
    ("given", "made"),
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_dtype_is_the_result_type(given, made, chunk_size, engine, mode):
    x = torch.randn(B, 3).to(given)
    func = lambda x: x.sin().to(made)
    jac = batch_jacobian(func, engine=engine, mode=mode, chunk_size=chunk_size)(x)
    assert jac.dtype == torch.result_type(func(x), x)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-6}.get(min(given, made, key=_bits), 2e-2)
    expected = torch.diag_embed(x.double().cos())
    torch.testing.assert_close(jac.double(), expected, rtol=tolerance, atol=tolerance)


def _bits(dtype):
    return torch.finfo(dtype).bits


@every_route
def test_dtype_of_what_does_not_depend(engine, mode):
    func = lambda x, y: (y.float(), x.sin())
    jacobian = batch_jacobian(func, argnums=(0, 1), engine=engine, mode=mode)
    first, second = jacobian(randn(B, 3), randn(B, 2, dtype=torch.bfloat16))
    assert [j.dtype for j in first] == [torch.float64, torch.float32]
    assert [j.dtype for j in second] == [torch.float64, torch.float64]


@shared_route
def test_dtype_beside_a_shared_number(engine, mode):
    number = torch.tensor(2.0, dtype=torch.float64)
    func = lambda p, x: (p * x.double()).float()
    jac = batch_jacobian(func, in_dims=(None, 0), engine=engine, mode=mode)(
        number, torch.ones(B, 3)
    )
    assert jac.shape == (B, 3)
    assert jac.dtype == torch.result_type(torch.ones(B, 3), number)


# --- zeros -------------------------------------------------------------------------------


@every_route
def test_zeros_where_an_output_does_not_depend(engine, mode):
    func = lambda x, y: {"x": x.sin(), "y": y**2, "none": torch.ones_like(x[:, :1])}
    x, y = randn(B, 3), randn(B, 2)
    jac = batch_jacobian(func, argnums=(0, 1), engine=engine, mode=mode)(x, y)
    equal(jac["x"][0], torch.diag_embed(x.cos()))
    equal(jac["y"][1], torch.diag_embed(2 * y))
    equal(jac["x"][1], torch.zeros(B, 3, 2).double())
    equal(jac["y"][0], torch.zeros(B, 2, 3).double())
    equal(jac["none"], (torch.zeros(B, 1, 3).double(), torch.zeros(B, 1, 2).double()))


@every_route
@pytest.mark.parametrize("grad", [False, True])
def test_zeros_of_an_unused_input(grad, engine, mode):
    x, y = randn(B, 3).requires_grad_(grad), randn(B, 2)
    jac = batch_jacobian(lambda x, y: y.exp(), engine=engine, mode=mode)(x, y)
    equal(jac, torch.zeros(B, 2, 3).double())


@every_route
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_zeros_in_the_middle(grad, chunk_size, engine, mode):
    x = randn(B, 3).requires_grad_(grad)

    def func(x):
        zeros = torch.zeros(x.shape[0], 1).to(x)
        return torch.cat([zeros, x[:, :1], zeros, x[:, 1:].exp(), zeros], 1)

    jac = batch_jacobian(func, engine=engine, mode=mode, chunk_size=chunk_size)(x)
    expected = torch.zeros(B, 6, 3).double()
    expected[:, 1, 0] = 1
    expected[:, 3, 1], expected[:, 4, 2] = x.detach()[:, 1].exp(), x.detach()[:, 2].exp()
    equal(jac.detach(), expected)


# --- trees -------------------------------------------------------------------------------


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
def test_tree_in(container, engine, mode):
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
def test_tree_out(container, engine, mode):
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
def test_a_tree_with_a_shared_part(engine, mode):
    tree = {"scale": torch.tensor(3.0).double(), "x": randn(B, 3), "name": "sine"}
    func = lambda y, tree: y * tree["x"] * tree["scale"]
    y = randn(B, 3)
    in_dims = (0, {"scale": None, "x": 0, "name": None})
    jac = batch_jacobian(func, in_dims=in_dims, engine=engine, mode=mode)(y, tree)
    equal(jac, torch.diag_embed(3 * tree["x"]))


# --- argnums -----------------------------------------------------------------------------


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
def test_argnums(argnums, engine, mode):
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
def test_the_same_tensor_twice(engine, mode):
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


# --- batch dimensions --------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_in_dims(dim, engine, mode):
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
def test_out_dims(dim, engine, mode):
    x = randn(B, 2, 3)
    func = lambda x: x.sin().movedim(0, dim)
    jacobian = batch_jacobian(func, out_dims=dim, engine=engine, mode=mode, return_value=True)
    jac, value = jacobian(x)
    equal(jac.reshape(B, 6, 6), torch.diag_embed(x.cos().reshape(B, 6)))
    equal(value, x.sin())


@pytest.mark.quick
@every_route
def test_every_argument_its_own_dim(engine, mode):
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
def test_in_dims_as_a_prefix_tree(in_dims, engine, mode):
    p = {"w": randn(3, B), "b": (randn(2, B), randn(3, B))}
    x = randn(B, 3)
    func = lambda p, x: p["w"].T * x + p["b"][1].T
    jac = batch_jacobian(func, in_dims=in_dims, engine=engine, mode=mode)(p, x)
    equal(jac["w"], torch.diag_embed(x))
    equal(jac["b"][0], torch.zeros(B, 3, 2).double())
    equal(jac["b"][1], torch.eye(3).double().expand(B, 3, 3).contiguous())


@every_route
def test_out_dims_as_a_prefix_tree(engine, mode):
    func = lambda x: {"z": (x.sin().T, x.exp().T), "a": x**2}
    x = randn(B, 3)
    out_dims = {"z": 1, "a": 0}
    jac = batch_jacobian(func, out_dims=out_dims, engine=engine, mode=mode)(x)
    equal(jac["z"], (torch.diag_embed(x.cos()), torch.diag_embed(x.exp())))
    equal(jac["a"], torch.diag_embed(2 * x))


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
def test_shared_argument_beside_a_batched_one(argnums, engine, mode):
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
def test_shared_and_batched_arguments_together(engine, mode):
    x, w = randn(B, 3), randn(3)
    func = lambda x, w: (x * w).sin()
    jacobian = batch_jacobian(func, (1, 0), in_dims=(0, None), engine=engine, mode=mode)
    by_w, by_x = jacobian(x, w)
    equal(by_x, torch.diag_embed((x * w).cos() * w))
    equal(by_w, torch.diag_embed((x * w).cos() * x))


# --- keyword arguments -------------------------------------------------------------------


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


# --- aux and value -----------------------------------------------------------------------

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
def test_aux_that_rows_share(engine, mode):
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


# --- chunks ------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 6, 100])
@pytest.mark.parametrize("grad", [False, True])
def test_chunk_size_never_changes_values(grad, chunk_size, engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double().requires_grad_(grad)
    x = randn(B, 3)
    jac = batch_jacobian(net, engine=engine, mode=mode, chunk_size=chunk_size)(x)
    slope = 1 - net[:2](x) ** 2
    equal(jac, torch.einsum("oh,bh,hi->boi", net[2].weight, slope, net[0].weight))
    assert jac.requires_grad == grad


@every_route
def test_chunk_size_with_trees(engine, mode):
    func = lambda p, x: (p["w"] * x, {"s": (x * p["b"]).sum(1)})
    p, x = {"w": randn(B, 3), "b": randn(B, 1)}, randn(B, 3)
    whole = batch_jacobian(func, (0, 1), engine="loop", mode="rev")(p, x)
    for size in (1, 2, 7):
        chunked = batch_jacobian(func, (0, 1), engine=engine, mode=mode, chunk_size=size)(p, x)
        equal(chunked, whole)


class Widest(TorchDispatchMode):
    """Remembers the largest tensor made under it."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


@pytest.mark.parametrize(
    ("engine", "mode", "passes"), [("vmap", "rev", 5), ("sum", "rev", 5), ("sum", "fwd", 3)]
)
@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_chunk_size_bounds_a_pass(chunk_size, mode, passes, engine):
    """A pass carries no more basis vectors than it may."""
    hidden = 64
    net = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 5)).double()
    net.requires_grad_(False)
    x = randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode, chunk_size=chunk_size, check=False)
    jacobian(x)
    with Widest() as widest:
        jacobian(x)
    weight = max(5, B) * hidden  # may be copied for each row or each vector
    many = chunk_size or passes
    assert B * hidden <= widest.largest <= many * max(B * hidden, weight)


# --- modules as functions ----------------------------------------------------------------


def parameters(net):
    return dict(net.named_parameters()), dict(net.named_buffers())


def by_the_loop(func, params, x):
    """One backward pass for each row and output element."""
    rows = []
    for b in range(len(x)):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        out = func(leaves, x[b : b + 1])[0]
        grads = [
            torch.autograd.grad(o, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for o in out
        ]
        rows.append([torch.stack(column) for column in zip(*grads)])
    return {name: torch.stack(found) for name, found in zip(params, zip(*rows))}


@shared_route
def test_per_sample_jacobian_by_parameters(engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    params, _ = parameters(net)
    func = lambda p, x: functional_call(net, p, (x,))
    x = randn(B, 3)
    jacobian = batch_jacobian(func, in_dims=(None, 0), engine=engine, mode=mode)
    jac = jacobian(params, x)
    assert list(jac) == list(params)
    assert jac["0.weight"].shape == (B, 5, 4, 3)
    expected = by_the_loop(func, params, x)
    for name, block in jac.items():
        equal(block.detach(), expected[name])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


@shared_route
def test_tied_parameters(engine, mode):
    net = Tied().double()
    params, _ = parameters(net)
    assert "outer.weight" not in params
    func = lambda p, x: functional_call(net, p, (x,))
    x = randn(B, 3)
    jac = batch_jacobian(func, in_dims=(None, 0), engine=engine, mode=mode)(params, x)
    expected = by_the_loop(func, params, x)
    equal({name: block.detach() for name, block in jac.items()}, expected)


@shared_route
def test_frozen_parameters(engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    net[0].requires_grad_(False)
    params, _ = parameters(net)
    func = lambda p, x: functional_call(net, p, (x,))
    x = randn(B, 3)
    jac = batch_jacobian(func, in_dims=(None, 0), engine=engine, mode=mode)(params, x)
    expected = by_the_loop(func, params, x)
    equal({name: block.detach() for name, block in jac.items()}, expected)
    assert [p.requires_grad for p in net.parameters()] == [False, False, True, True]


@shared_route
def test_buffers_beside_parameters(engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)).double()
    net(randn(8, 3))
    net.eval()
    params, buffers = parameters(net)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    func = lambda p, b, x: functional_call(net, (p, b), (x,))
    x = randn(B, 3)
    jac = batch_jacobian(func, in_dims=(None, None, 0), engine=engine, mode=mode)(
        params, buffers, x
    )
    expected = by_the_loop(lambda p, x: func(p, buffers, x), params, x)
    equal({name: block.detach() for name, block in jac.items()}, expected)
    equal(dict(net.named_buffers()), before)


@shared_route
def test_all_parameters_at_the_input_too(engine, mode):
    net = nn.Linear(3, 5).double()
    params, _ = parameters(net)
    func = lambda p, x: functional_call(net, p, (x,))
    x = randn(B, 3)
    jacobian = batch_jacobian(func, (0, 1), in_dims=(None, 0), engine=engine, mode=mode)
    by_params, by_x = jacobian(params, x)
    equal(by_x.detach(), net.weight.detach().expand(B, 5, 3).contiguous())
    eye = torch.eye(5).double()
    equal(by_params["bias"].detach(), eye.expand(B, 5, 5).contiguous())
    equal(by_params["weight"].detach(), torch.einsum("op,bi->bopi", eye, x))


# --- laws --------------------------------------------------------------------------------


@every_route
def test_permuting_rows_permutes_results(engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, order = randn(B, 3), torch.tensor([2, 0, 3, 1])
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    equal(jacobian(x)[order], jacobian(x[order]))


@pytest.mark.quick
@every_route
def test_chain_rule(engine, mode):
    inner, _ = linear_of_sine((3,), (2,))
    outer, _ = linear_of_sine((2,), (5,))
    x = randn(B, 3)
    words = {"engine": engine, "mode": mode}
    whole = batch_jacobian(lambda x: outer(inner(x)), **words)(x)
    equal(whole, batch_jacobian(outer, **words)(inner(x)) @ batch_jacobian(inner, **words)(x))


@every_route
def test_gradcheck_of_the_result(engine, mode):
    x, y = randn(2, 3).requires_grad_(), randn(2, 3).requires_grad_()
    jacobian = batch_jacobian(lambda x, y: (x * y).sin(), engine=engine, mode=mode)
    assert torch.autograd.gradcheck(jacobian, (x, y))
    assert torch.autograd.gradgradcheck(jacobian, (x, y))


def test_the_name_of_the_function_is_kept():
    assert batch_jacobian(three).__name__ == "three"
    assert batch_jacobian(nn.Linear(3, 5))(randn(B, 3).float()).shape == (B, 5, 3)


@pytest.mark.parametrize(
    "make",
    [lambda f: f.forward, lambda f: f, lambda f: f.__call__],
    ids=["method", "module", "call"],
)
def test_what_is_called_may_be_a_method(make):
    net = nn.Linear(3, 5).double()
    x = randn(B, 3)
    equal(batch_jacobian(make(net))(x).detach(), net.weight.detach().expand(B, 5, 3).contiguous())


def test_a_function_of_one_sample_enters_by_vmap():
    matrix = randn(5, 3)
    sample = lambda row: (matrix @ row).sin()
    x = randn(B, 3)
    jac = batch_jacobian(torch.vmap(sample))(x)
    equal(jac, (x @ matrix.T).cos().unsqueeze(2) * matrix)
