"""``batch_jacobian_of``: derivatives of tensors that exist."""

import inspect

import pytest
import torch
from torch import nn

import funcjac
from funcjac import BatchMixingError, VerificationError, batch_hessian, batch_jacobian
from funcjac import batch_jacobian_of as jacobian_of
from tests.oracles import by_rows
from tests.tensors import equal, randn

B = 4


def leaf(*shape):
    return randn(*shape).requires_grad_()


def network(inputs=3, outputs=5):
    return nn.Sequential(nn.Linear(inputs, 7), nn.Tanh(), nn.Linear(7, outputs)).double()


@pytest.mark.quick
def test_the_signature_is_that_of_the_contract():
    parameters = inspect.signature(jacobian_of).parameters
    assert {
        name: p.default for name, p in parameters.items() if name not in ("outputs", "inputs")
    } == {
        "in_dims": 0,
        "out_dims": 0,
        "mode": "auto",
        "chunk_size": None,
        "create_graph": None,
        "retain_graph": True,
        "check": "auto",
    }
    assert list(parameters)[:2] == ["outputs", "inputs"]
    keywords = [p.kind for p in parameters.values()][2:]
    assert set(keywords) == {inspect.Parameter.KEYWORD_ONLY}
    assert "batch_jacobian_of" in funcjac.__all__


# --- values ------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [2, 8])
@pytest.mark.parametrize("way", ["unverified", "hooked", "compiled"])
def test_operations_that_torch_differentiates_wrongly(way, outputs):
    """Gradients through the Jacobian of layer norm, by forward mode and batched cotangents."""
    norm = nn.Sequential(nn.Linear(1, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, outputs))
    net, x = norm.double(), leaf(B, 1)

    def loss(x, check="auto"):
        u_x = jacobian_of(net(x), x, check=check)
        return u_x.square().sum() + jacobian_of(u_x[:, 0, 0], x, check=check).square().sum()

    if way == "hooked":
        x.register_hook(lambda grad: None)
    run = torch.compile(loss, backend="aot_eager", fullgraph=True) if way == "compiled" else loss
    found = run(x, False) if way == "unverified" else run(x)
    u_x = torch.stack(
        [torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in net(x).unbind(1)]
    )
    u_xx = torch.autograd.grad(u_x[0].sum(), x, create_graph=True)[0]
    expected = u_x.square().sum() + u_xx.square().sum()
    leaves = [x, *net.parameters()]
    grads = torch.autograd.grad(expected, leaves, allow_unused=True)
    equal(found.detach(), expected.detach())
    for one, other in zip(torch.autograd.grad(found, leaves, allow_unused=True), grads):
        assert (one is None) == (other is None)
        if other is not None:
            equal(one, other)


def test_scatters_take_the_passes_that_others_take():
    """Wrong where torch.vmap runs them alone; here all outputs go in one pass."""
    index, passes = torch.arange(40), []

    def func(x):
        values = x.sin().repeat(1, 20)
        out = torch.zeros_like(values).scatter(1, index.expand_as(values), values)
        if out.requires_grad:
            out.register_hook(lambda grad: passes.append(grad.shape))
        return out

    x = leaf(B, 2)
    expected = by_rows(func, (x.detach(),))
    for mode in ("auto", "rev"):
        passes.clear()
        equal(jacobian_of(func(x), x, mode=mode, check=False, create_graph=False), expected)
        assert len(passes) < 4


def test_forward_mode_through_them_is_refused_where_it_is_wrong():
    net, x = nn.Sequential(nn.Linear(1, 6), nn.LayerNorm(6)).double(), leaf(B, 1)
    jacobian = jacobian_of(net(x), x, mode="fwd", check=False, create_graph=False)
    equal(jacobian, jacobian_of(net(x), x, mode="rev", create_graph=False))
    with pytest.raises(RuntimeError, match="mode='rev'"):
        jacobian_of(net(x), x, mode="fwd", check=False)


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_it_equals_the_transform(mode, chunk_size):
    net, x = network(), leaf(B, 3)
    found = jacobian_of(net(x), x, mode=mode, chunk_size=chunk_size)
    assert found.shape == (B, 5, 3)
    assert found.is_contiguous()
    assert found.dtype == torch.float64
    equal(found, batch_jacobian(net)(x))


@pytest.mark.parametrize(
    ("row", "out"), [((), ()), ((2, 3), (4, 1)), ((3,), ()), ((), (5,)), ((0,), (2,)), ((3,), (0,))]
)
@pytest.mark.parametrize("batch", [B, 1, 0])
def test_shapes_are_batch_output_input(batch, row, out):
    n, m = torch.Size(row).numel(), torch.Size(out).numel()
    weight, x = randn(m, n), leaf(batch, *row)
    y = (x.reshape(batch, n).sin() @ weight.T).reshape(batch, *out)
    found = jacobian_of(y, x)
    assert found.shape == (batch, *out, *row)
    equal(found, (weight * x.reshape(batch, 1, n).cos()).reshape(batch, *out, *row))


@pytest.mark.quick
def test_second_derivatives_of_a_vector_function():
    """As one writes a residual: ``u_x`` and ``u_xx`` of a network with two outputs."""
    net, x = network(1, 2), leaf(B, 1)
    u = net(x)
    u_x = jacobian_of(u, x)
    u_xx = torch.stack([jacobian_of(u_x[:, i], x) for i in range(2)], 1)
    assert u_x.shape == (B, 2, 1)
    right = batch_hessian(net)(x)
    equal(u_xx, right)
    equal(jacobian_of(u_x, x), right)


@pytest.mark.quick
def test_columns_of_coordinates():
    """``u(x, t)`` with ``x`` and ``t`` as columns, and a training step on the residual."""
    net, x, t = network(2, 1), leaf(B, 1), leaf(B, 1)
    u = net(torch.cat([x, t], 1))
    u_x, u_t = jacobian_of(u, (x, t))
    u_xx = jacobian_of(u_x[..., 0], x)
    loss = (u_t - 0.1 * u_xx).square().mean()
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    first = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
    second = torch.autograd.grad(first[0].sum(), x, create_graph=True)[0]
    equal(u_x[..., 0], first[0])
    plain = (first[1] - 0.1 * second).square().mean()
    expected = torch.autograd.grad(plain, parameters, materialize_grads=True)
    equal(list(found), list(expected))


def test_trees_out_and_in():
    """Output structure outside, input structure inside."""
    x, p = leaf(B, 3), {"w": leaf(B, 2), "b": leaf(B)}
    out = {"y": x.sin() * p["b"][:, None], "z": (p["w"].prod(1), None)}
    found = jacobian_of(out, (x, p))
    by_x, by_p = found["y"]
    equal(by_x, torch.diag_embed(x.cos() * p["b"][:, None]))
    equal(by_p["b"], x.sin())
    equal(by_p["w"], torch.zeros(B, 3, 2).double())
    equal(found["z"][0][1]["w"], p["w"].flip(1))
    assert found["z"][1] is None


def test_dimensions_of_the_batch():
    x = leaf(3, B)
    y = (2 * x.T).sin().unsqueeze(1)  # (B, 1, 3)
    found = jacobian_of(y.movedim(0, 2), x, in_dims=1, out_dims=2)
    equal(found, torch.diag_embed(2 * (2 * x.T).cos()).unsqueeze(1))


def test_inputs_in_the_middle_of_a_graph():
    """They need not be leaves."""
    w, x = leaf(3), randn(B, 3)
    hidden = (w * x).exp()
    found = jacobian_of(hidden.sin(), hidden)
    equal(found, torch.diag_embed(hidden.cos()))
    (grad,) = torch.autograd.grad(found.sum(), w)
    equal(grad, (-hidden.sin() * hidden * x).sum(0).detach())


def test_an_output_that_does_not_depend_has_zeros():
    x, y = leaf(B, 3), leaf(B, 2)
    by_x, by_y = jacobian_of(x.exp(), (x, y))
    equal(by_x, torch.diag_embed(x.exp()))
    equal(by_y, torch.zeros(B, 3, 2).double())


@pytest.mark.parametrize("mode", ["rev", "fwd"])
def test_a_mixed_precision(mode):
    x = torch.randn(B, 3, requires_grad=True)
    found = jacobian_of(x.double().sin(), x, mode=mode)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.diag_embed(x.double().cos()), rtol=1e-6, atol=1e-6)


# --- where forward mode cannot be ---------------------------------------------------------


def test_a_graph_that_cannot_be_differentiated_twice_is_pulled_back():
    """Forward mode is chosen by sizes and differentiates twice, which fused attention cannot."""
    x = leaf(B, 5, 2)

    def attention(x):
        heads = x.unsqueeze(1)
        heads = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return torch.cat([heads * k for k in range(1, 6)], -1)  # 50 outputs, 10 inputs

    reference = by_rows(attention, (x.detach(),))
    equal(jacobian_of(attention(x), x, create_graph=False), reference)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        jacobian_of(attention(x), x, mode="fwd", create_graph=False)


def test_where_forward_mode_has_wrong_derivatives_the_result_is_pulled_back():
    """The third derivative of layer norm is wrong in torch, and forward mode takes one more."""
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 40)).double()
    x = leaf(B, 3)
    jac = jacobian_of(net(x), x)
    equal(jac, by_rows(net, (x.detach(),)))
    for _ in range(3):  # not tried again
        equal(jacobian_of(net(x), x), jac)
    (grad,) = torch.autograd.grad(jac.square().sum(), x)
    equal(grad, torch.autograd.grad(batch_jacobian(net)(x).square().sum(), x)[0])
    with pytest.raises(VerificationError, match="differ from those of plain double backward"):
        jacobian_of(net(x), x, mode="fwd")


# --- graphs ------------------------------------------------------------------------------


@pytest.mark.quick
def test_create_graph_follows_grad_mode():
    x = leaf(B, 3)
    y = x.sin()
    assert jacobian_of(y, x).requires_grad
    with torch.no_grad():
        assert not jacobian_of(y, x).requires_grad
        assert jacobian_of(y, x, create_graph=True).requires_grad
    assert not jacobian_of(y, x, create_graph=False).requires_grad


def test_the_graph_stays_unless_it_is_told_not_to():
    x = leaf(B, 3)
    y = x.sin()
    jacobian_of(y, x, create_graph=False)
    jacobian_of(y, x, create_graph=False)
    jacobian_of(y, x, create_graph=False, retain_graph=False)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(y.sum(), x)


def test_a_gradient_through_the_result():
    net, x = network(), leaf(B, 3)
    weight = randn(B, 5, 3)
    wrt = [x, net[0].weight, net[2].weight]
    found = torch.autograd.grad((weight * jacobian_of(net(x), x)).sum(), wrt)
    equal(list(found), list(torch.autograd.grad((weight * batch_jacobian(net)(x)).sum(), wrt)))


@pytest.mark.quick
def test_nothing_of_the_callers_changes():
    net, x = network(), leaf(B, 3)
    x.retain_grad()
    y = net(x)
    seen = []
    handle = net[0].weight.register_hook(seen.append)
    version = x._version
    jacobian_of(y, x)
    assert x.grad is None
    assert all(p.grad is None for p in net.parameters())
    assert seen == []
    assert x._version == version
    handle.remove()
    y.sum().backward()
    equal(x.grad, torch.autograd.grad(net(x).sum(), x)[0])


# --- rows that mix -----------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["rev", "fwd", "auto"])
def test_rows_that_mix_are_refused(mode):
    x = leaf(B, 3)
    for y in (x - x.mean(0), x.softmax(0), x.cumsum(0)):
        with pytest.raises(BatchMixingError, match=r"^batch_jacobian_of: .*rows"):
            jacobian_of(y, x, mode=mode)


def test_rows_that_mix_are_not_looked_for_without_check():
    x = leaf(B, 3)
    found = jacobian_of(x - x.mean(0), x, check=False)
    assert found.shape == (B, 3, 3)


def test_rows_that_begin_to_mix_are_seen():
    """The nodes of the graph are the key: another graph is verified anew."""
    for _ in range(20):
        x = leaf(B, 3)
        jacobian_of(x.exp().sin(), x)
    x = leaf(B, 3)
    with pytest.raises(BatchMixingError, match=r"^batch_jacobian_of: "):
        jacobian_of((x.exp() - x.exp().mean(0)).sin(), x)


# --- wrong calls -------------------------------------------------------------------------

WRONG = {
    "no graph": (lambda x: (x.detach().sin(), x), {}, (RuntimeError, ValueError), "graph"),
    "an input without grad": (
        lambda x: (x.sin(), x.detach()),
        {},
        (RuntimeError, ValueError),
        "requires? grad|graph",
    ),
    "unequal batches": (lambda x: (x[:2].sin(), x), {}, ValueError, "batch"),
    "a scalar": (lambda x: (x.sum(), x), {}, ValueError, "batch"),
    "out_dims": (lambda x: (x.sin(), x), {"out_dims": 2}, ValueError, "dimension 2"),
    "in_dims": (lambda x: (x.sin(), x), {"in_dims": 2}, ValueError, "dimension 2"),
    "complex": (lambda x: (x.cdouble(), x), {}, TypeError, "real floating-point"),
    "a number": (lambda x: (3.0, x), {}, TypeError, "tensor"),
    "inputs that are no tensors": (lambda x: (x.sin(), 3.0), {}, (TypeError, ValueError), "tensor"),
    "mode": (lambda x: (x.sin(), x), {"mode": "taylor"}, ValueError, "mode to be one of"),
    "chunk_size": (lambda x: (x.sin(), x), {"chunk_size": 0}, ValueError, "chunk_size to be"),
    "check": (lambda x: (x.sin(), x), {"check": 1}, ValueError, "check to be"),
    "create_graph": (lambda x: (x.sin(), x), {"create_graph": 1}, TypeError, "create_graph"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused(name):
    make, words, kind, expected = WRONG[name]
    outputs, inputs = make(leaf(B, 3))
    with pytest.raises(kind, match=rf"^batch_jacobian_of: expected .*({expected})"):
        jacobian_of(outputs, inputs, **words)


def test_what_was_refused_stays_refused_with_other_chunks():
    def tower(x):
        y = torch.logcumsumexp(x, 1)
        return torch.cat([y, 2 * y, y * y, y * 3, -y], 1)

    for batch in (2, 2, 3000):
        x = leaf(batch, 8)
        found = jacobian_of(tower(x), x, create_graph=False)
        torch.testing.assert_close(found, jacobian_of(tower(x), x, create_graph=False, mode="rev"))
