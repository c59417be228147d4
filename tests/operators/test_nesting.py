"""Transforms of transforms: to any depth, inside torch.func, and under ``backward``."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from funcjac import VerificationError, batch_hessian_diagonal, batch_jacobian
from tests.cases.modules import network
from tests.tensors import equal, randn

B = 4
ENGINES = ("vmap", "sum", "loop")
MODES = ("fwd", "rev")
ROUTES = [*itertools.product(ENGINES, MODES), ("auto", "auto")]
every_route = pytest.mark.parametrize(("engine", "mode"), ROUTES)
every_pair = pytest.mark.parametrize(
    ("outer", "inner"), list(itertools.product(ROUTES, ROUTES)), ids=str
)


def hessian_by_rows(func, x):
    """``(B, *out, *in, *in)`` by ``torch.autograd.functional.hessian`` of each output of a row."""
    found = []
    for b in range(len(x)):
        row = x.detach()[b : b + 1]
        shape = func(row).shape[1:]
        blocks = [
            torch.autograd.functional.hessian(lambda r: func(r)[0].reshape(-1)[i], row)
            for i in range(shape.numel())
        ]
        blocks = torch.stack(blocks).reshape(*shape, *row.shape, *row.shape)
        row_dim = len(shape)
        found.append(blocks.select(row_dim + row.ndim, 0).select(row_dim, 0))
    return torch.stack(found)


def as_words(route):
    return dict(zip(("engine", "mode"), route))


# --- second and third order --------------------------------------------------------------


@every_pair
def test_two_levels_are_the_hessian(outer, inner):
    net, x = network(5, grad=False), randn(B, 3)
    expected = hessian_by_rows(net, x)
    hessian = batch_jacobian(batch_jacobian(net, **as_words(inner)), **as_words(outer))
    for _ in range(2):
        found = hessian(x)
        assert found.shape == (B, 5, 3, 3)
        assert found.is_contiguous()
        equal(found, expected)
        equal(found, found.mT)


@every_route
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_two_levels_in_chunks(chunk_size, engine, mode):
    net, x = network(5, grad=False), randn(B, 3)
    words = {"engine": engine, "mode": mode, "chunk_size": chunk_size}
    equal(batch_jacobian(batch_jacobian(net, **words), **words)(x), hessian_by_rows(net, x))


@pytest.mark.parametrize("modes", list(itertools.product(MODES, repeat=3)), ids=str)
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_three_levels(engine, modes):
    weight = randn(2, 3)
    func = lambda x: (x @ weight.T).sin()
    x = randn(2, 3)
    third = func
    for mode in modes:
        third = batch_jacobian(third, mode=mode, engine=engine)
    expected = -torch.einsum("bo,oi,oj,ok->boijk", (x @ weight.T).cos(), *[weight] * 3)
    equal(third(x), expected)


@pytest.mark.quick
def test_four_levels():
    x = randn(2, 3)
    fourth = torch.sin
    for _ in range(4):
        fourth = batch_jacobian(fourth)
    found = fourth(x)
    assert found.shape == (2, 3, 3, 3, 3, 3)
    expected = torch.zeros_like(found)
    for i in range(3):
        expected[:, i, i, i, i, i] = x[:, i].sin()
    equal(found, expected)


@every_pair
def test_levels_by_other_arguments(outer, inner):
    x, y = randn(B, 3), randn(B, 2)
    weight = randn(5, 3, 2)
    func = lambda x, y: torch.einsum("oij,bi,bj->bo", weight, x.sin(), y**2)
    by_x = batch_jacobian(func, 0, **as_words(inner))
    by_both = batch_jacobian(by_x, (1, 0), **as_words(outer))
    by_y, again = by_both(x, y)
    assert by_y.shape == (B, 5, 3, 2)
    assert again.shape == (B, 5, 3, 3)
    equal(by_y, torch.einsum("oij,bi,bj->boij", weight, x.cos(), 2 * y))
    diagonal = -torch.einsum("oij,bi,bj->boi", weight, x.sin(), y**2)
    equal(again, torch.diag_embed(diagonal))


@every_route
def test_levels_with_trees(engine, mode):
    words = {"engine": engine, "mode": mode}
    func = lambda p: {"z": p["z"].sin() * p["a"], "a": p["a"] ** 2}
    tree = {"z": randn(B, 3), "a": randn(B, 3)}
    hessian = batch_jacobian(batch_jacobian(func, **words), **words)(tree)
    eye = torch.eye(3).double()
    diagonal = lambda values: torch.einsum("bi,ij,ik->bijk", values, eye, eye)
    assert list(hessian) == list(hessian["z"]) == list(hessian["z"]["a"]) == ["z", "a"]
    equal(hessian["z"]["z"]["z"], diagonal(-tree["z"].sin() * tree["a"]))
    equal(hessian["z"]["z"]["a"], diagonal(tree["z"].cos()))
    equal(hessian["z"]["a"]["z"], diagonal(tree["z"].cos()))
    equal(hessian["z"]["a"]["a"], torch.zeros(B, 3, 3, 3).double())
    equal(hessian["a"]["a"]["a"], diagonal(torch.full((B, 3), 2.0).double()))


@every_route
def test_levels_with_batch_dimensions(engine, mode):
    words = {"engine": engine, "mode": mode}
    func = lambda x: x.sin()  # (3, B) -> (3, B)
    x = randn(3, B)
    inner = batch_jacobian(func, in_dims=1, out_dims=1, **words)  # (3, B) -> (B, 3, 3)
    found = batch_jacobian(inner, in_dims=1, **words)(x)
    eye = torch.eye(3).double()
    equal(found, torch.einsum("ib,ij,ik->bijk", -x.sin(), eye, eye))


@pytest.mark.parametrize("inner", ["vmap", "loop", "auto"])
@pytest.mark.parametrize("outer", [*ENGINES, "auto"])
@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=str)
def test_shared_argument_inside(modes, outer, inner):
    w, x = randn(3), randn(B, 3)
    func = lambda w, x: (w * x).sin()
    inside = batch_jacobian(func, 0, in_dims=(None, 0), engine=inner, mode=modes[0])
    found = batch_jacobian(inside, 1, in_dims=(None, 0), engine=outer, mode=modes[1])(w, x)
    eye = torch.eye(3).double()
    values = (w * x).cos() - w * x * (w * x).sin()
    equal(found, torch.einsum("bi,ij,ik->bijk", values, eye, eye))


@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=str)
@pytest.mark.parametrize("engine", ["vmap", "loop", "auto"])
def test_shared_argument_twice(engine, modes):
    w, x = randn(3), randn(B, 3)
    func = lambda w, x: (w * x).sin().sum(1)
    words = {"in_dims": (None, 0), "engine": engine}
    found = batch_jacobian(batch_jacobian(func, mode=modes[0], **words), mode=modes[1], **words)
    equal(found(w, x), torch.diag_embed(-(x**2) * (w * x).sin()))


@every_route
def test_value_of_the_inner_level(engine, mode):
    """Value and Jacobian are both outputs of the inner transform, so both are differentiated."""
    words = {"engine": engine, "mode": mode}
    x = randn(B, 3)
    inner = batch_jacobian(torch.sin, return_value=True, **words)
    hessian, jac = batch_jacobian(inner, **words)(x)
    eye = torch.eye(3).double()
    equal(hessian, torch.einsum("bi,ij,ik->bijk", -x.sin(), eye, eye))
    equal(jac, torch.diag_embed(x.cos()))


@every_route
def test_aux_through_both_levels(engine, mode):
    words = {"engine": engine, "mode": mode, "has_aux": True}
    func = lambda x: (x.sin(), {"name": "sine", "exp": x.exp()})
    x = randn(B, 3)
    hessian, aux = batch_jacobian(batch_jacobian(func, **words), **words)(x)
    eye = torch.eye(3).double()
    equal(hessian, torch.einsum("bi,ij,ik->bijk", -x.sin(), eye, eye))
    assert aux["name"] == "sine"
    equal(aux["exp"], x.exp())


@every_route
def test_composed_with_other_code(engine, mode):
    """A transform is a batched function like any other: a divergence of it, say."""
    words = {"engine": engine, "mode": mode}
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), randn(B, 3)
    net.requires_grad_(False)
    jacobian = batch_jacobian(net, **words)
    divergence = lambda x: jacobian(x).diagonal(dim1=1, dim2=2).sum(1)
    found = batch_jacobian(divergence, **words)(x)
    equal(found, hessian_by_rows(net, x).diagonal(dim1=1, dim2=2).sum(2))


@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=str)
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("batch", [0, 1])
def test_nested_sizes(batch, engine, modes):
    net, x = network(5, grad=False), randn(batch, 3)
    inner = batch_jacobian(net, engine=engine, mode=modes[0])
    found = batch_jacobian(inner, engine=engine, mode=modes[1])(x)
    assert found.shape == (batch, 5, 3, 3)
    if batch:
        equal(found, hessian_by_rows(net, x))


@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=str)
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_second_derivative_of_a_linear_function_is_zero(engine, modes):
    net, x = nn.Linear(3, 5).double(), randn(B, 3)
    inner = batch_jacobian(net, engine=engine, mode=modes[0])
    found = batch_jacobian(inner, engine=engine, mode=modes[1])(x)
    equal(found.detach(), torch.zeros(B, 5, 3, 3).double())


# --- operations whose forward formulas are wrong once differentiated again ---------------


def batch_norm():
    norm = nn.BatchNorm1d(3).double().requires_grad_(False)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.uniform_(0.5, 2)
    return norm.eval()


def matrices(x):
    """``(B, 3) -> (B, 2, 2)``, regular everywhere near the inputs of these tests."""
    a, b, c = x.unbind(1)
    return torch.stack([3 + a.sin(), b * c, a * c, 3 + b.cos()], 1).reshape(-1, 2, 2)


def spd(x):
    return matrices(x) @ matrices(x).mT


def is_documented(error):
    return str(error).startswith("batch_jacobian: ")


DELICATE = {
    "layer_norm": lambda x: F.layer_norm(x.sin(), (3,)),
    "batch_norm": lambda x, norm=batch_norm(): norm(x.sin()),
    "group_norm": lambda x: F.group_norm(x.sin(), 1),
    "det": lambda x: torch.linalg.det(matrices(x)),
    "slogdet": lambda x: torch.linalg.slogdet(matrices(x))[1],
    "logdet": lambda x: torch.logdet(matrices(x)),
    "solve": lambda x: torch.linalg.solve(matrices(x), x[:, :2, None]).squeeze(2),
    "inv": lambda x: torch.linalg.inv(matrices(x)).flatten(1),
    "instance_norm": lambda x: F.instance_norm(x.sin().unsqueeze(1)).squeeze(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(spd(x))),
    "eigh": lambda x: torch.linalg.eigh(spd(x))[1].abs(),
}


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@pytest.mark.parametrize("name", DELICATE)
@every_pair
def test_delicate_operations(name, outer, inner):
    """Equal to double backward row by row, or a documented error; always right by itself."""
    func, x = DELICATE[name], randn(3, 3)
    hessian = batch_jacobian(batch_jacobian(func, **as_words(inner)), **as_words(outer))
    try:
        found = hessian(x)
    except RuntimeError as error:  # a VerificationError is one too
        if (outer[0], inner[0]) == ("auto", "auto") or not is_documented(error):
            raise
    else:
        equal(found, hessian_by_rows(func, x), 1e-8)


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@pytest.mark.parametrize("name", DELICATE)
def test_delicate_operations_by_auto(name):
    func, x = DELICATE[name], randn(3, 3)
    expected = hessian_by_rows(func, x)
    hessian = batch_jacobian(batch_jacobian(func))
    for _ in range(6):
        equal(hessian(x), expected, 1e-8)


@pytest.mark.parametrize("name", DELICATE)
@every_route
def test_backward_through_delicate_operations(name, engine, mode):
    func = DELICATE[name]
    x = randn(3, 3).requires_grad_()
    weight = randn(*func(x).shape, 3)
    try:
        jac = batch_jacobian(func, engine=engine, mode=mode)(x)
        (grad,) = torch.autograd.grad((weight * jac).sum(), x)
    except VerificationError:
        assert mode == "fwd"
        return
    hessian = hessian_by_rows(func, x)  # (B, *out, 3, 3)
    expected = (hessian * weight.unsqueeze(-1)).reshape(3, -1, 3).sum(1)
    equal(grad, expected, 1e-8)


@pytest.mark.parametrize("name", DELICATE)
@every_route
def test_delicate_operations_inside_grad(name, engine, mode):
    """No probe runs inside torch.func: what it gives must be right without one, or an error."""
    func, x = DELICATE[name], randn(3, 3)
    jacobian = batch_jacobian(func, engine=engine, mode=mode)
    weight = randn(*func(x).shape, 3)
    try:
        found = torch.func.grad(lambda x: (weight * jacobian(x)).sum())(x)
    except (RuntimeError, NotImplementedError):
        assert engine != "auto"
        return
    hessian = hessian_by_rows(func, x)
    equal(found, (hessian * weight.unsqueeze(-1)).reshape(3, -1, 3).sum(1), 1e-8)


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@pytest.mark.parametrize("name", DELICATE)
@pytest.mark.parametrize("where", ["nested", "backward", "torch.func.grad"])
def test_delicate_operations_with_many_outputs(where, name):
    """Sizes that call for forward mode do not make the default wrong."""
    delicate, weight = DELICATE[name], randn(1, 3)
    func = lambda x: (delicate(x @ weight).reshape(len(x), -1)[..., None] * (1 + weight)).flatten(1)
    x = randn(3, 1)
    expected = hessian_by_rows(func, x)
    if where == "nested":
        found = batch_jacobian(batch_jacobian(func))(x)
    elif where == "backward":
        x.requires_grad_()
        found = batch_jacobian(func)(x)
        (found,) = torch.autograd.grad(found.sum(), x)
    else:
        jacobian = batch_jacobian(func)
        found = torch.func.grad(lambda x: jacobian(x).sum())(x)
    equal(found, expected if where == "nested" else expected.sum((1, 2)), 1e-8)


# --- inside torch.func -------------------------------------------------------------------


@pytest.mark.quick
@every_route
def test_inside_grad(engine, mode):
    net, x = network(5, grad=False), randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    found = torch.func.grad(lambda x: (jacobian(x) ** 2).sum())(x)
    jac, hessian = jacobian(x), hessian_by_rows(net, x)
    equal(found, 2 * torch.einsum("boi,boij->bj", jac, hessian))


@every_route
def test_inside_vjp(engine, mode):
    net, x = network(5, grad=False), randn(B, 3)
    value, pull = torch.func.vjp(batch_jacobian(net, engine=engine, mode=mode), x)
    cotangent = randn(B, 5, 3)
    equal(value, batch_jacobian(net)(x))
    equal(pull(cotangent)[0], torch.einsum("boi,boij->bj", cotangent, hessian_by_rows(net, x)))


@every_route
def test_inside_jvp(engine, mode):
    net, x, tangent = network(5, grad=False), randn(B, 3), randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    value, pushed = torch.func.jvp(jacobian, (x,), (tangent,))
    equal(value, batch_jacobian(net)(x))
    equal(pushed, torch.einsum("boij,bj->boi", hessian_by_rows(net, x), tangent))


@every_route
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_inside_vmap(batch, engine, mode):
    net, x = network(5, grad=False), randn(6, batch, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    found = torch.vmap(jacobian)(x)
    equal(found, jacobian(x.reshape(-1, 3)).reshape(6, batch, 5, 3))


@every_route
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_inside_jacrev_and_jacfwd(transform, engine, mode):
    net, x = network(5, grad=False), randn(B, 3)
    full = transform(batch_jacobian(net, engine=engine, mode=mode))(x)  # (B, 5, 3, B, 3)
    found = full.diagonal(dim1=0, dim2=3).movedim(-1, 0)
    equal(found, hessian_by_rows(net, x))
    equal(full.sum(3), found)


@every_route
def test_inside_hessian(engine, mode):
    weight, x = randn(2, 3), randn(2, 3)
    jacobian = batch_jacobian(lambda x: (x @ weight.T).sin(), engine=engine, mode=mode)
    found = torch.func.hessian(lambda x: jacobian(x).sum())(x)
    third = -torch.einsum("bo,oi,oj,ok->bjk", (x @ weight.T).cos(), *[weight] * 3)
    equal(found.diagonal(dim1=0, dim2=2).movedim(-1, 0), third)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap of grad"])
@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=str)
def test_two_levels_inside(modes, transform):
    weight, x = randn(2, 3), randn(2, 3)
    inner = batch_jacobian(lambda x: (x @ weight.T).sin(), mode=modes[0])
    hessian = batch_jacobian(inner, mode=modes[1])
    third = -torch.einsum("bo,oi,oj,ok->bk", (x @ weight.T).cos(), *[weight] * 3)
    if transform == "grad":
        found = torch.func.grad(lambda x: hessian(x).sum())(x)
    elif transform == "jvp":
        ones = torch.ones_like(x)
        _, pushed = torch.func.jvp(lambda x: hessian(x).sum((1, 2, 3)), (x,), (ones,))
        found, third = pushed, third.sum(1)
    else:
        rows = torch.vmap(torch.func.grad(lambda row: hessian(row.unsqueeze(0)).sum()))
        found = rows(x)
    equal(found, third)


def test_a_transform_of_torch_inside_ours():
    """The other order: per-sample code of torch.func enters through torch.vmap."""
    weight, x = randn(5, 3), randn(B, 3)
    sample = lambda row: (weight @ row).tanh()
    hessian = batch_jacobian(torch.vmap(torch.func.jacrev(sample)))(x)
    equal(hessian, hessian_by_rows(lambda x: (x @ weight.T).tanh(), x))
    gradient = torch.vmap(torch.func.grad(lambda row: sample(row).sum()))
    equal(batch_jacobian(gradient)(x), hessian.sum(1))


def test_inside_a_dual_level():
    net, x, tangent = network(5, grad=False), randn(B, 3), randn(B, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        out = batch_jacobian(net)(dual)
        value, pushed = torch.autograd.forward_ad.unpack_dual(out)
    equal(value, batch_jacobian(net)(x))
    equal(pushed, torch.einsum("boij,bj->boi", hessian_by_rows(net, x), tangent))


# --- backward ----------------------------------------------------------------------------


@pytest.mark.quick
@every_route
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_backward_equals_double_backward(chunk_size, engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x = randn(B, 3).requires_grad_()
    weight = randn(B, 5, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode, chunk_size=chunk_size)
    for _ in range(3):
        (weight * jacobian(x) ** 2).sum().backward()
        found = [x.grad, *[p.grad for p in net.parameters()]]
        x.grad = None
        net.zero_grad()
        rows = [torch.autograd.grad(out.sum(), x, create_graph=True)[0] for out in net(x).unbind(1)]
        loss = (weight * torch.stack(rows, 1) ** 2).sum()
        expected = torch.autograd.grad(loss, [x, *net.parameters()], allow_unused=True)
        for one, other in zip(found, expected):
            if other is None:
                assert one is None or not one.any()
            else:
                equal(one, other)


@every_route
def test_backward_through_the_value(engine, mode):
    net = nn.Linear(3, 5).double()
    x = randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode, return_value=True)
    _, value = jacobian(x)
    value.sum().backward()
    equal(net.weight.grad, x.sum(0).expand(5, 3).contiguous())


@pytest.mark.parametrize("modes", list(itertools.product(MODES, MODES)), ids=str)
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
def test_backward_through_two_levels(engine, modes):
    weight = randn(2, 3).requires_grad_()
    x = randn(B, 3)
    inner = batch_jacobian(lambda x: (x @ weight.T).sin(), engine=engine, mode=modes[0])
    hessian = batch_jacobian(inner, engine=engine, mode=modes[1])(x)
    (found,) = torch.autograd.grad(hessian.sum(), weight)
    closed = -torch.einsum("bo,oi,oj->boij", (x @ weight.T).sin(), weight, weight)
    (expected,) = torch.autograd.grad(closed.sum(), weight)
    equal(found, expected)


@every_route
def test_graph_to_what_the_closure_holds(engine, mode):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    x = randn(B, 3)
    jac = batch_jacobian(lambda x: (scale * x).sin(), engine=engine, mode=mode)(x)
    (found,) = torch.autograd.grad(jac.sum(), scale)
    values = 2 * x
    equal(found, (values.cos() - values * values.sin()).sum())


@every_route
@pytest.mark.parametrize("where", ["list", "dict", "attribute", "partial", "default", "global"])
def test_graph_to_a_weight_anywhere(where, engine, mode):
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    jac = batch_jacobian(reaching(weight, where), engine=engine, mode=mode)(randn(B, 3))
    assert jac.requires_grad
    assert torch.autograd.grad(jac.sum(), weight)[0].isfinite()


GLOBAL = {}


def uses_a_global(x):
    return (GLOBAL["weight"] * x).sin()


def reaching(weight, where):
    held, box = [weight], {"weight": weight}
    GLOBAL.update(box)

    class Model:
        def __init__(self):
            self.weight = weight

        def __call__(self, x):
            return (self.weight * x).sin()

    def by_default(x, weight=weight):
        return (weight * x).sin()

    return {
        "list": lambda x: (held[0] * x).sin(),
        "dict": lambda x: (box["weight"] * x).sin(),
        "attribute": Model(),
        "partial": __import__("functools").partial(lambda w, x: (w * x).sin(), weight),
        "default": by_default,
        "global": uses_a_global,
    }[where]


@every_route
def test_no_graph_where_nothing_requires_grad(engine, mode):
    jac = batch_jacobian(network(5, grad=False), engine=engine, mode=mode)(randn(B, 3))
    assert not jac.requires_grad


# --- what nesting costs ------------------------------------------------------------------


def test_zeros_without_memory_in_forward_mode():
    # Forward mode makes some; addr read them where the sizes of its results were looked up.
    def rows(a, u, v):
        found = [torch.addr(*row) for row in zip(a.unbind(), u.unbind(), v.unbind())]
        return torch.stack(found)

    torch.manual_seed(0)
    args = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 2, 2), (3, 2), (3, 2))]
    every = (0, 1, 2)
    transformed = batch_jacobian(batch_jacobian(rows, every), every)
    unit = torch.eye(2, dtype=torch.float64)
    wanted = torch.einsum("ip,jq->ijpq", unit, unit).expand(3, 2, 2, 2, 2)
    for _ in range(3):
        torch.testing.assert_close(transformed(*args)[1][2], wanted)


def test_zeros_without_memory_in_a_jvp_of_the_function():
    weight = torch.randn(2, dtype=torch.float64)

    def along(x):
        rows = lambda x: torch.stack([torch.addr(torch.eye(2), row, weight).sin() for row in x])
        return torch.func.jvp(rows, (x,), (torch.ones_like(x),))[1]

    x = torch.randn(3, 2, dtype=torch.float64)
    wanted = batch_jacobian(batch_jacobian(along, mode="rev", engine="loop"), engine="loop")(x)
    for mode in ("taylor", "auto"):
        found = batch_hessian_diagonal(along, mode=mode)(x)
        torch.testing.assert_close(found, wanted.diagonal(dim1=-2, dim2=-1))
