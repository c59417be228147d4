"""Verification finds wrong derivatives, detached parts and wrong batching rules."""

import pytest
import torch

from funcjac import (
    VerificationError,
    batch_hessian,
    batch_jacobian,
    check_batched,
    check_derivative,
)
from tests.cases.modules import WrongBackward
from tests.fresh import fresh
from tests.tensors import equal, quiet, randn

B = 4


def no_grad_inside(x):
    with torch.no_grad():
        return x.sin()


DETACHED = {
    "detach": lambda x: x.detach().sin(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()).sin(),
    "no_grad": no_grad_inside,
    "torch.tensor": lambda x: torch.tensor(x.tolist(), dtype=x.dtype).sin(),
    "data": lambda x: x.data * 2,
}


@pytest.mark.quick
@quiet
@pytest.mark.parametrize("engine", ["sum", "auto"])
@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("name", DETACHED)
def test_detached_functions_are_refused(name, mode, engine):
    with pytest.raises(
        VerificationError, match=r"^batch_jacobian: .*autograd.*Look for.*detach\(\)"
    ):
        batch_jacobian(DETACHED[name], engine=engine, mode=mode)(randn(B, 3))


def test_a_detached_leaf_among_others_is_refused():
    func = lambda x: (x.sin(), x.detach() ** 2)
    with pytest.raises(VerificationError, match=r"detach\(\)"):
        batch_jacobian(func)(randn(B, 3))


def test_constants_are_not_detached_functions():
    func = lambda x: (x.sin(), torch.ones_like(x), (x > -100).to(x.dtype), x.detach().round() * 0)
    jac = batch_jacobian(func)(randn(B, 3))
    equal(list(jac[1:]), [torch.zeros(B, 3, 3).double()] * 3)


class TwiceAsLarge(WrongBackward):
    """The sine, with twice its derivative."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x.cos()


def test_a_wrong_backward_is_not_seen_but_checked():
    """Plain reverse mode itself is the yardstick; only values tell that it is wrong."""
    x = randn(B, 3)
    jacobian = batch_jacobian(TwiceAsLarge.apply, engine="sum", mode="rev")
    equal(jacobian(x), torch.diag_embed(2 * x.cos()))
    report = check_derivative(jacobian, x)
    assert not report.ok
    assert report.central_difference > 0.1
    assert "WRONG" in str(report)


class CutFromTheWeight(torch.autograd.Function):
    """A product whose forward formula is right, and cannot be differentiated by ``w``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)

    @staticmethod
    def jvp(ctx, x_t, w_t):
        x, w = ctx.saved_tensors
        return x_t * w.detach() + (0 if w_t is None else x * w_t)


# Beside the product: a weight with derivatives a billion times as large, and a kink.
BESIDE = {
    "large": lambda x, v: 1e8 * (x * v) ** 2,
    "kink": lambda x, v: torch.where(x > 1, x**2, x) + 0 * v,
}


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
@pytest.mark.parametrize("name", BESIDE)
def test_the_graph_has_right_derivatives_by_each_weight(name, mode):
    w, v = (torch.tensor(t).double().requires_grad_() for t in (0.5, 0.7))
    x = torch.tensor([[0.3], [1.0], [1.2]]).double()
    jac = batch_jacobian(lambda x: CutFromTheWeight.apply(x, w) + BESIDE[name](x, v), mode=mode)(x)
    equal(torch.autograd.grad(jac.sum(), w)[0], torch.tensor(3.0).double())


def only(index, value):
    """A factor for each basis vector: ``value`` for one of them."""

    def factor(out):
        found = out.new_ones(len(out), *[1] * (out.ndim - 1))
        found[min(index, len(out) - 1)] = value
        return out * found

    return factor


# What a batching rule may make of the pullback of a basis ``(M, ...)``
HARMS = {
    "everything": lambda out: 1.01 * out,
    "one basis vector": only(1, 1.01),
    "a zero": only(2, 0.0),
    "not a number": only(1, torch.nan),
    "another order": lambda out: out.roll(1, 0),
}

by_harm = pytest.mark.parametrize("harm", HARMS)


class Pull(torch.autograd.Function):
    """``grad * slope``, with a batching rule that does harm."""

    @staticmethod
    def forward(grad, slope, harm):
        return grad * slope

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, outer):
        grad, slope = ctx.saved_tensors
        return outer * slope, outer * grad, None

    @staticmethod
    def vmap(info, in_dims, grad, slope, harm):
        grad, slope = (
            x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((grad, slope), in_dims)
        )
        return HARMS[harm](grad * slope), 0


class Sine(torch.autograd.Function):
    """The sine; its pullback is right where it runs for one cotangent."""

    @staticmethod
    def forward(x, harm):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.harm = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return Pull.apply(grad, x.cos(), ctx.harm), None

    @staticmethod
    def vmap(info, in_dims, x, harm):
        return Sine.apply(x, harm), in_dims[0]


def harmed(harm):
    weight = torch.arange(1.0, 16.0).double().reshape(3, 5) / 9
    return lambda x: Sine.apply(x, harm) @ weight.to(x)


@pytest.mark.quick
@by_harm
@pytest.mark.parametrize("check", ["auto", True])
def test_a_wrong_batching_rule_is_caught(check, harm):
    jacobian = batch_jacobian(harmed(harm), engine="vmap", mode="rev", check=check)
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"^batch_jacobian: .*vmap"):
            jacobian(randn(B, 3))


@by_harm
def test_a_wrong_batching_rule_in_float32_is_caught(harm):
    with pytest.raises(VerificationError, match=r"^batch_jacobian: "):
        batch_jacobian(harmed(harm), engine="vmap", mode="rev")(torch.randn(B, 3))


@by_harm
def test_check_false_sees_nothing(harm):
    """The counterpart of the tests above: it is the verification that catches."""
    x = randn(B, 3)
    right = batch_jacobian(harmed(harm), engine="loop")(x)
    wrong = batch_jacobian(harmed(harm), engine="vmap", mode="rev", check=False)(x)
    assert not torch.equal(wrong, right)


@quiet
@by_harm
def test_auto_does_not_return_what_a_wrong_batching_rule_makes(harm):
    jacobian = batch_jacobian(harmed(harm))
    weight = torch.arange(1.0, 16.0).double().reshape(3, 5) / 9
    for _ in range(10):
        x = randn(B, 3)
        equal(jacobian(x), x.cos().unsqueeze(1) * weight.T)


def test_check_true_looks_on_every_call():
    now = {"harm": False}
    scale = lambda x: Sine.apply(x, "everything") if now["harm"] else x.sin()
    jacobian, x = batch_jacobian(scale, engine="vmap", mode="rev", check=True), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    now["harm"] = True
    with pytest.raises(VerificationError, match=r"^batch_jacobian: "):
        jacobian(x)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@quiet
@pytest.mark.parametrize("engine", ["auto", "sum", "loop"])
def test_what_is_differentiable_once_says_so_in_backward(engine):
    w, x = randn(3, 3).requires_grad_(), randn(B, 3)
    jac = batch_jacobian(lambda x: Once.apply(x @ w) * w.sum(), engine=engine)(x)
    equal(jac.detach(), (x @ w).cos().unsqueeze(2) * w.T * w.sum())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        jac.sum().backward()


def test_an_operation_without_a_batching_rule_is_right():
    """Torch runs renorm under vmap one sample at a time, with a warning."""
    func = lambda x: x.renorm(2, 0, 1.0) if x.ndim == 2 else x
    x = randn(B, 3)
    expected = torch.autograd.functional.jacobian(func, x)
    equal(batch_jacobian(func)(x), torch.stack([expected[b, :, b] for b in range(B)]))


@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
def test_checks_take_a_function_that_differentiates_by_itself(transform):
    base = randn(3, 3)

    def force(x):
        return torch.autograd.grad((x @ base).sin().sum(), x, create_graph=True)[0]

    check_batched(force, randn(B, 3))
    assert check_derivative(transform(force), randn(B, 3)).ok


def test_check_derivative_takes_another_default_device():
    with torch.device("meta"):
        assert check_derivative(batch_jacobian(torch.sin), randn_on_cpu()).ok


def randn_on_cpu():
    return torch.ones(B, 3, dtype=torch.float64, device="cpu")


def dead_at_first(x):
    with torch.no_grad():
        factor = x.cos()
    return (x * factor).relu().repeat(1, 20)


@pytest.mark.parametrize(
    "words",
    [{}, {"engine": "vmap"}, *[{"engine": e, "mode": "fwd"} for e in ("sum", "loop")]],
)
def test_a_no_grad_block_behind_what_is_dead_at_first_is_constant(words):
    jacobian = batch_jacobian(dead_at_first, **words)
    for _ in range(12):
        jacobian(-randn(B, 3).sigmoid())
    for _ in range(4):
        x = randn(B, 3).sigmoid()
        equal(jacobian(x), torch.diag_embed(x.cos()).repeat(1, 20, 1))


class WrongForwards(torch.autograd.Function):
    """Three times as much forwards as backwards."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


@pytest.mark.parametrize("words", [{"engine": "sum"}, {"engine": "loop", "mode": "fwd"}])
def test_what_was_dead_at_first_is_verified_later(words):
    jacobian = batch_jacobian(lambda x: WrongForwards.apply(x).relu().repeat(1, 20), **words)
    for _ in range(12):
        equal(jacobian(-randn(B, 3).abs()), torch.zeros(B, 60, 3).double())
    for _ in range(4):
        equal(jacobian(randn(B, 3).abs()), torch.eye(3).double().repeat(B, 20, 1))


def test_a_backward_pass_that_is_not_linear_is_refused_in_each_call():
    """It has no Jacobian; without verification comes what one output at a time gives."""

    def func(x):
        hidden = 3 * x.sin()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
        return hidden * 2

    x, jacobian = randn(B, 3), batch_jacobian(func)
    for _ in range(12):
        with pytest.raises(VerificationError, match="product with a random cotangent is off by"):
            jacobian(x)
    equal(batch_jacobian(func, check=False)(x), torch.diag_embed(1.5 * x.cos()))


class ConstantInBatches(torch.autograd.Function):
    """The square; its backward pass is a constant of the input where vmap runs it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        batched = torch._C._functorch.is_batchedtensor(grad)
        return grad * 2 * (x.detach() if batched else x)


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-8, 1e-14])
def test_wrong_derivatives_of_small_results_are_seen(scale, dtype):
    x = torch.randn(4, 3, dtype=dtype, requires_grad=True)
    jac = batch_jacobian(fresh(lambda x: scale * ConstantInBatches.apply(x)))(x)
    (grad,) = torch.autograd.grad(jac.sum(), x)
    torch.testing.assert_close(grad / scale, torch.full_like(x, 2))
