"""Derivatives on each element, noted once: the same as autograd's, and never those of another."""

import pytest
import torch
from torch.nn import functional as F

from funcjac import _formulas, batch_hessian_diagonal, batch_partials

f64 = torch.float64
FUNCTIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "exp": torch.exp,
    "erf": torch.erf,
    "log": lambda x: (x * x + 1).log(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "reciprocal": lambda x: (x * x + 1).reciprocal(),
    "cube": lambda x: x**3,
    "root": lambda x: (x * x + 1) ** 0.5,
    "relu": torch.relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus, beta": lambda x: F.softplus(x, 3.0),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "hardswish": F.hardswish,
}
INDICES = [(0, 0, 0), (0,), (0, 0)]


def points(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=f64)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(_formulas, "_KNOWN", {})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_values_and_shapes(name):
    func = FUNCTIONS[name]
    # Nothing looks at values here, so what was noted at the first call is all there is.
    transformed = batch_partials(func, INDICES, mode="taylor", check=False)
    for rows, seed in ((4, 0), (4, 1), (7, 2), (1, 3)):
        x = points(rows, seed)
        right = batch_partials(func, INDICES, mode="rev", engine="sum")(x)
        for one, other in zip(transformed(x), right):
            torch.testing.assert_close(one, other)


def test_constants_and_dtypes_tell_formulas_apart():
    x = points(5, 0)
    for beta in (1, 1.0, 2, 3.5):
        for dtype in (f64, torch.float32):
            func = lambda x, beta=beta: F.softplus(x, beta)
            bend = torch.sigmoid(beta * x) * torch.sigmoid(-beta * x) * beta
            found = batch_hessian_diagonal(func, mode="taylor", check=False)(x.to(dtype))
            diagonal = found.diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(diagonal, bend.to(dtype))
    assert len(_formulas._KNOWN) == 8


def test_nothing_idle_is_repeated():
    """Of the sine: no product with ones but of minus one; the sine itself is there already."""
    batch_partials(torch.sin, INDICES, mode="taylor")(points(4, 0))
    (formula,) = _formulas._KNOWN.values()
    names = [[step.op.overloadpacket.__name__ for step in steps] for steps, _ in formula.orders]
    assert names == [["cos"], ["neg"], ["neg", "mul"]]


def with_backward(rule):
    """The square, with a backward of its own."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return rule(grad, *ctx.saved_tensors)

    return Square.apply


def noted(function, most=2):
    """The formula of a function of one tensor, as if it were an operation."""
    x = points(3, 0).requires_grad_()
    out = function(x)
    ones = torch.ones((), dtype=f64).expand(out.shape)
    found = [out]

    def derivative(order):
        (grad,) = torch.autograd.grad(found[-1], x, ones, create_graph=True)
        found.append(grad)
        return grad

    node = _formulas.Node(torch.ops.aten.sin.default, (x,), {}, ((0, None),), (0,), (1,), ())
    return _formulas.formula(node, (x, out, ones), derivative, most)


ELSEWHERE = torch.full((3, 2), 2.0, dtype=f64)
UNCLEAR = {
    "a value": lambda grad, x: grad * 2 * x if x.sum() > 0 else grad * (x + x),
    "a tensor from elsewhere": lambda grad, x: grad * ELSEWHERE * x,
    "a draw": lambda grad, x: grad * 2 * x + 0 * torch.rand_like(x),
    "a size": lambda grad, x: grad * torch.full((3, 2), 2.0, dtype=f64) * x,
    "several results": lambda grad, x: grad * 2 * x.sort()[0],
}


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("name", UNCLEAR)
def test_what_depends_on_values_or_shapes_is_not_noted(name, most):
    assert noted(with_backward(lambda grad, x: grad * 2 * x), most) is not None
    _formulas._KNOWN.clear()
    assert noted(with_backward(UNCLEAR[name]), most) is None


LIBRARY = torch.library.Library("funcjac_tests", "FRAGMENT")
LIBRARY.define("twice_(Tensor(a!) x) -> Tensor(a!)")
LIBRARY.impl("twice_", lambda x: x.mul_(2), "CompositeExplicitAutograd")
ORDER = torch.arange(2).repeat(3, 1)
WITHOUT_GRAPH = {
    "a tensor by keyword": lambda grad, x: (
        grad * 2 * x + 0 * torch.searchsorted(x.detach(), x.detach(), sorter=ORDER)
    ),
    "memory that is there": lambda grad, x: torch.mul(grad, 2 * x, out=torch.empty_like(ELSEWHERE)),
    "in place, and in no other way": lambda grad, x: torch.ops.funcjac_tests.twice_(grad * x),
}


@pytest.mark.parametrize("name", WITHOUT_GRAPH)
def test_what_cannot_be_repeated_is_not_noted(name):
    rule = torch.no_grad()(WITHOUT_GRAPH[name])
    assert noted(with_backward(torch.no_grad()(lambda grad, x: grad * 2 * x)), 1) is not None
    _formulas._KNOWN.clear()
    assert noted(with_backward(rule), 1) is None


def test_an_order_that_does_not_exist_is_left_to_autograd():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad

    assert noted(Once.apply) is None


def test_few_are_remembered(monkeypatch):
    monkeypatch.setattr(_formulas, "_MOST", 3)
    for exponent in range(3, 12):
        func = lambda x, exponent=exponent: x**exponent
        x = points(4, 0)
        found = batch_hessian_diagonal(func, mode="taylor")(x)
        right = exponent * (exponent - 1) * x ** (exponent - 2)
        torch.testing.assert_close(found.diagonal(dim1=1, dim2=2), right)
        assert len(_formulas._KNOWN) <= 3
