"""``batch_jacobian``: shapes, dtypes, zeros, chunks, modules as functions, laws."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

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
def test_shape_and_value_are_right(row, out, batch, engine, mode):
    func, derivative = linear_of_sine(row, out)
    x = randn(batch, *row)
    jac = batch_jacobian(func, engine=engine, mode=mode)(x)
    assert jac.shape == (batch, *out, *row)
    assert jac.dtype == torch.float64
    assert jac.is_contiguous()
    assert not jac.requires_grad
    equal(jac, derivative(x))


@pytest.mark.quick
def test_the_question_of_the_forum_is_answered():
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
def test_input_may_have_any_layout(make, engine, mode):
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
def test_zeros_have_the_result_type(engine, mode):
    func = lambda x, y: (y.float(), x.sin())
    jacobian = batch_jacobian(func, argnums=(0, 1), engine=engine, mode=mode)
    first, second = jacobian(randn(B, 3), randn(B, 2, dtype=torch.bfloat16))
    assert [j.dtype for j in first] == [torch.float64, torch.float32]
    assert [j.dtype for j in second] == [torch.float64, torch.float64]


@shared_route
def test_a_shared_number_changes_no_dtype(engine, mode):
    number = torch.tensor(2.0, dtype=torch.float64)
    func = lambda p, x: (p * x.double()).float()
    jac = batch_jacobian(func, in_dims=(None, 0), engine=engine, mode=mode)(
        number, torch.ones(B, 3)
    )
    assert jac.shape == (B, 3)
    assert jac.dtype == torch.result_type(torch.ones(B, 3), number)


@every_route
def test_an_output_that_does_not_depend_has_zeros(engine, mode):
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
def test_an_unused_input_has_zeros(grad, engine, mode):
    x, y = randn(B, 3).requires_grad_(grad), randn(B, 2)
    jac = batch_jacobian(lambda x, y: y.exp(), engine=engine, mode=mode)(x, y)
    equal(jac, torch.zeros(B, 2, 3).double())


@every_route
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
def test_outputs_in_the_middle_may_have_zeros(grad, chunk_size, engine, mode):
    x = randn(B, 3).requires_grad_(grad)

    def func(x):
        zeros = torch.zeros(x.shape[0], 1).to(x)
        return torch.cat([zeros, x[:, :1], zeros, x[:, 1:].exp(), zeros], 1)

    jac = batch_jacobian(func, engine=engine, mode=mode, chunk_size=chunk_size)(x)
    expected = torch.zeros(B, 6, 3).double()
    expected[:, 1, 0] = 1
    expected[:, 3, 1], expected[:, 4, 2] = x.detach()[:, 1].exp(), x.detach()[:, 2].exp()
    equal(jac.detach(), expected)


def three(x, y, z):
    return x.sin() * y.sum(1, keepdim=True) + z.unsqueeze(1) ** 2  # (B, 3)


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
def test_chunk_size_with_trees_changes_no_value(engine, mode):
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
def test_per_sample_jacobian_by_parameters_is_that_of_the_loop(engine, mode):
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
def test_tied_parameters_count_twice(engine, mode):
    net = Tied().double()
    params, _ = parameters(net)
    assert "outer.weight" not in params
    func = lambda p, x: functional_call(net, p, (x,))
    x = randn(B, 3)
    jac = batch_jacobian(func, in_dims=(None, 0), engine=engine, mode=mode)(params, x)
    expected = by_the_loop(func, params, x)
    equal({name: block.detach() for name, block in jac.items()}, expected)


@shared_route
def test_frozen_parameters_are_differentiated(engine, mode):
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
def test_buffers_stay_beside_parameters(engine, mode):
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
def test_parameters_and_input_are_differentiated_together(engine, mode):
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


@every_route
def test_permuting_rows_permutes_results(engine, mode):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    x, order = randn(B, 3), torch.tensor([2, 0, 3, 1])
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    equal(jacobian(x)[order], jacobian(x[order]))


@pytest.mark.quick
@every_route
def test_the_chain_rule_holds(engine, mode):
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
