"""Taylor propagation by itself: each operation whose structure is known, unverified.

What is known of an operation's structure is trusted where nobody looks at the result, so every
case is right without verification.
"""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from funcjac import (
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
)
from funcjac._taylor import propagation
from funcjac._taylor.recorder import Recorder
from funcjac._taylor.rules import make_recording
from tests.oracles import diagonal

aten = torch.ops.aten
f64 = torch.float64


def randn(*shape):
    return torch.randn(shape, dtype=f64)


def weights(*shape):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(shape, dtype=f64, generator=generator)


def image(x):
    """A bent ``(B, 2, 4, 4)`` of the three numbers of a row."""
    return (x @ weights(3, 32)).sin().view(-1, 2, 4, 4)


def bent(x):
    return x.sin()


ONES = weights(3), weights(2)


def index(*rows):
    return torch.tensor(rows)


# Each is linear, a product or elementwise in something that is bent already, and bent again.
LINEAR_CASES = {
    "view": lambda x: bent(x).view(-1, 3, 1),
    "unsafe_view": lambda x: aten._unsafe_view(bent(x), [x.shape[0], 1, 3]),
    "reshape": lambda x: bent(x).T.reshape(-1, x.shape[0]).T,
    "t": lambda x: bent(x).t().t(),
    "transpose": lambda x: bent(x).view(-1, 3, 1).transpose(1, 2),
    "permute": lambda x: image(x).permute(0, 2, 3, 1),
    "expand": lambda x: bent(x).unsqueeze(1).expand(-1, 2, 3),
    "squeeze": lambda x: bent(x).unsqueeze(1).squeeze(1),
    "slice": lambda x: bent(x)[:, 1:],
    "select": lambda x: bent(x)[:, 1],
    "diagonal": lambda x: image(x).diagonal(0, 2, 3),
    "alias": lambda x: aten.alias(bent(x)),
    "clone": lambda x: bent(x).clone(),
    "unfold": lambda x: bent(x).unfold(1, 2, 1),
    "flip": lambda x: bent(x).flip(1),
    "roll": lambda x: bent(x).roll(1, 1),
    "split": lambda x: bent(x).split(2, 1)[0],
    "split_with_sizes": lambda x: aten.split_with_sizes(bent(x), [1, 2], 1)[1],
    "unbind": lambda x: bent(x).unbind(1)[2],
    "sum": lambda x: bent(x).sum(1, keepdim=True),
    "mean": lambda x: image(x).mean((2, 3)),
    "neg": lambda x: -bent(x),
    "cumsum": lambda x: bent(x).cumsum(1),
    "tril": lambda x: image(x).tril(),
    "triu": lambda x: image(x).triu(1),
    "repeat": lambda x: bent(x).repeat(1, 2),
    "index": lambda x: bent(x)[:, [2, 0, 2]],
    "index_select": lambda x: bent(x).index_select(1, index(2, 2)),
    "gather": lambda x: bent(x).gather(1, index(2, 0).expand(x.shape[0], 2)),
    "cat": lambda x: torch.cat([bent(x), x.new_ones(x.shape[0], 1), x], 1),
    "stack": lambda x: torch.stack([bent(x), x.new_ones(x.shape), x], 1),
    "index_put": lambda x: x.index_put((torch.arange(x.shape[0]), index(1)), bent(x)[:, 0]),
    "index_put_constant": lambda x: bent(x).index_put(
        (torch.arange(x.shape[0]), index(1)), x.new_ones(1)
    ),
    "scatter": lambda x: x.scatter(1, index(2, 0).expand(x.shape[0], 2), bent(x)[:, 1:]),
    "scatter_value": lambda x: bent(x).scatter(1, index(2, 0).expand(x.shape[0], 2), 5.0),
    "scatter_add": lambda x: x.scatter_add(1, index(2, 0).expand(x.shape[0], 2), bent(x)[:, 1:]),
    "index_add": lambda x: x.index_add(1, index(2, 0), bent(x)[:, 1:]),
    "select_scatter": lambda x: x.select_scatter(bent(x)[:, 0], 1, 2),
    "slice_scatter": lambda x: x.slice_scatter(bent(x)[:, :2], 1, 1, 3),
    "diagonal_scatter": lambda x: image(x).diagonal_scatter(
        image(x).sin().diagonal(0, 2, 3), 0, 2, 3
    ),
    "select_backward": lambda x: aten.select_backward(bent(x), [x.shape[0], 3, 2], 2, 1),
    "slice_backward": lambda x: aten.slice_backward(bent(x), [x.shape[0], 5], 1, 1, 4, 1),
    "avg_pool2d": lambda x: F.avg_pool2d(image(x), 2),
    "avg_pool3d": lambda x: F.avg_pool3d(image(x).unsqueeze(1), 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(image(x), (3, 2)),
    "nearest1d": lambda x: F.interpolate(bent(x).unsqueeze(1), size=5),
    "nearest2d": lambda x: F.interpolate(image(x), size=(5, 3)),
    "linear1d": lambda x: F.interpolate(bent(x).unsqueeze(1), size=5, mode="linear"),
    "bilinear2d": lambda x: F.interpolate(image(x), size=(5, 3), mode="bilinear"),
    "bicubic2d": lambda x: F.interpolate(image(x), size=(5, 3), mode="bicubic"),
    "reflection1d": lambda x: F.pad(bent(x).unsqueeze(1), (1, 2), mode="reflect"),
    "reflection2d": lambda x: F.pad(image(x), (1, 2, 0, 1), mode="reflect"),
    "replication1d": lambda x: F.pad(bent(x).unsqueeze(1), (1, 2), mode="replicate"),
    "replication2d": lambda x: F.pad(image(x), (1, 2, 0, 1), mode="replicate"),
    "constant_pad": lambda x: F.pad(bent(x), (1, 2), value=3.0),
    "im2col": lambda x: F.unfold(image(x), 2),
    "col2im": lambda x: F.fold(F.unfold(image(x), 2), (4, 4), 2),
    "masked_fill": lambda x: bent(x).masked_fill(torch.tensor([True, False, False]), 2.0),
    "where": lambda x: torch.where(torch.tensor([True, False, False]), bent(x), 3.0),
    "double": lambda x: bent(x).float().double(),
    "detach": lambda x: bent(x) * x.detach(),
}
OTHER_CASES = {
    "mul": lambda x: bent(x) * x,
    "square": lambda x: bent(x) * bent(x),
    "mul_broadcast": lambda x: bent(x).unsqueeze(2) * x.unsqueeze(1),
    "mul_constant": lambda x: bent(x) * weights(3) * 2.0,
    "div_constant": lambda x: bent(x) / weights(3),
    "div": lambda x: weights(3) / (2 + bent(x)),
    "quotient": lambda x: x / (2 + bent(x)),
    "add_alpha": lambda x: torch.add(bent(x), x * x, alpha=3).add(1),
    "sub_alpha": lambda x: torch.sub(weights(3), bent(x), alpha=3) - 1,
    "add_broadcast": lambda x: bent(x).unsqueeze(2) + x.unsqueeze(1) ** 2,
    "mm": lambda x: (bent(x) @ weights(3, 2)).sin() @ weights(2, 4),
    "mm_right": lambda x: (weights(2, 3) @ bent(x).T).T,
    "bmm": lambda x: torch.bmm(image(x)[:, 0], image(x)[:, 1].exp()),
    "bmm_constant": lambda x: torch.bmm(image(x)[:, 0], weights(1, 4, 2).expand(x.shape[0], 4, 2)),
    "mv": lambda x: torch.mv(bent(x), weights(3)),
    "dot": lambda x: torch.vmap(lambda row: torch.dot(row.sin(), row.exp()))(x),
    "dot_of_one_row": lambda x: torch.dot(bent(x)[0], x[0].exp()).expand(1),
    "mv_of_one_row": lambda x: torch.mv(image(x)[0, 0], bent(x)[0, 0].expand(4)).unsqueeze(0),
    "convolution": lambda x: F.conv2d(image(x), weights(3, 2, 2, 2), weights(3)),
    "convolution_grouped": lambda x: F.conv2d(image(x), weights(4, 1, 3, 3), padding=1, groups=2),
    "convolution_transposed": lambda x: F.conv_transpose2d(image(x), weights(2, 3, 2, 2), stride=2),
    "addmm": lambda x: torch.addmm(weights(4), bent(x), weights(3, 4), beta=2, alpha=3),
    "addmm_bias": lambda x: torch.addmm(bent(x), x, weights(3, 3), beta=2, alpha=3),
    "baddbmm": lambda x: torch.baddbmm(
        image(x)[:, 0], image(x)[:, 1], image(x)[:, 0].exp(), beta=2, alpha=3
    ),
    "softplus_backward": lambda x: aten.softplus_backward(bent(x), x, 1.0, 20.0),
    "elu_backward": lambda x: aten.elu_backward(bent(x), 1.0, 1.0, 1.0, False, x),
    "hardswish": lambda x: F.hardswish(bent(x)),
    "hardswish_backward": lambda x: aten.hardswish_backward(bent(x), x),
    "leaky_relu_backward": lambda x: aten.leaky_relu_backward(bent(x), x, 0.1, False),
    "hardtanh_backward": lambda x: aten.hardtanh_backward(bent(x), x, -1, 1),
    "log_sigmoid_backward": lambda x: torch.func.vmap(
        torch.func.grad(lambda r: F.logsigmoid(r).sum())
    )(x),
    "pow": lambda x: (x * x + 1).pow(bent(x)),
    "atan2": lambda x: torch.atan2(bent(x), x + 3),
    "lerp": lambda x: torch.lerp(bent(x), x, x * x),
    "addcmul": lambda x: torch.addcmul(bent(x), x, x.exp(), value=3),
    "clamp": lambda x: bent(x).clamp(-0.5, 0.5),
    "softmax": lambda x: bent(x).softmax(1),
    "log_softmax": lambda x: bent(x).log_softmax(1),
    "safe_softmax": lambda x: aten._safe_softmax(bent(x), 1),
    "layer_norm": lambda x: F.layer_norm(bent(x), (3,), weights(3), weights(3)),
    "group_norm": lambda x: F.group_norm(image(x), 2, weights(2), weights(2)),
    "batch_norm": lambda x: F.batch_norm(
        bent(x), weights(3), weights(3) ** 2, weights(3), weights(3)
    ),
    "rms_norm": lambda x: F.rms_norm(bent(x), (3,), weights(3)),
    "var": lambda x: bent(x).var(1),
    "var_mean": lambda x: torch.var_mean(bent(x), 1, correction=0, keepdim=True)[0],
    "std": lambda x: bent(x).std(1),
    "norm": lambda x: bent(x).norm(dim=1),
    "vector_norm": lambda x: torch.linalg.vector_norm(bent(x), 3, 1),
    "logsumexp": lambda x: bent(x).logsumexp(1),
    "euclidean_dist": lambda x: aten._euclidean_dist(bent(x), weights(2, 3)),
    "cdist": lambda x: torch.cdist(bent(x).unsqueeze(1), weights(1, 2, 3)),
    "prelu": lambda x: F.prelu(bent(x), weights(3)),
    "addmv": lambda x: torch.addmv(bent(x)[:, 0], x.exp(), weights(3)),
    "dist": lambda x: torch.dist(bent(x), weights(3)).expand(1),
    "attention": lambda x: F.scaled_dot_product_attention(*[image(x)] * 3),
    "max_pool": lambda x: F.max_pool2d(image(x), 2),
    "prod": lambda x: bent(x).prod(1),
    "cumprod": lambda x: bent(x).cumprod(1),
    "sort": lambda x: bent(x).sort(1)[0],
    "max": lambda x: bent(x).max(1)[0],
    "inverse": lambda x: torch.linalg.inv(image(x) + 5 * torch.eye(4, dtype=f64)),
    "det": lambda x: torch.linalg.det(image(x) + 5 * torch.eye(4, dtype=f64)),
    "gradient": lambda x: torch.func.vmap(torch.func.grad(lambda r: r.sin().softmax(0)[0].log()))(
        x
    ),
    "gradient_of_layer_norm": lambda x: torch.func.vmap(
        torch.func.grad(lambda r: F.layer_norm(r.sin(), (3,), ONES[0]).pow(3).sum())
    )(x),
    "gradient_of_group_norm": lambda x: torch.func.vmap(
        torch.func.grad(
            lambda r: F.group_norm(r.sin().view(1, 3, 1).expand(1, 3, 2) * ONES[1], 3).pow(3).sum()
        )
    )(x),
    "gradient_of_instance_norm": lambda x: torch.func.vmap(
        torch.func.grad(lambda r: F.instance_norm(r.sin().view(1, 1, 3)).pow(3).sum())
    )(x),
    "gradient_of_log_softmax": lambda x: torch.func.vmap(
        torch.func.grad(lambda r: (r.sin().log_softmax(0) * ONES[0]).sum())
    )(x),
    # What somebody else still needs must not be overwritten.
    "residual_sum": lambda x: (lambda y: y.sin() * (y + 1))((x @ weights(3, 3)).tanh()),
    "residual_slice": lambda x: (lambda y: y.sin()[:, 1:] * y[:, 1:])((x @ weights(3, 3)).tanh()),
    "residual_bias": lambda x: (
        lambda y: torch.addmm(y, x.new_ones(x.shape[0], 2), weights(2, 3)).sin() * y
    )(x.tanh() * 2),
    "residual_view": lambda x: (lambda y, z: y.sin() * z.view(y.shape))(
        *[(x @ weights(3, 3)).tanh() * 2] * 2
    ),
    "reshaped_in_place": lambda x: (lambda y: (y * y).squeeze_(1))((x**2).unsqueeze_(1)),
    "reshaped_in_place_twice": lambda x: x.sin().unsqueeze_(1).squeeze_(1).exp(),
    "inplace": lambda x: bent(x).add_(1).mul_(x).sigmoid_(),
    "inplace_power": lambda x: bent(x).pow_(2).float_power_(1.5),
    "inplace_power_of_two": lambda x: (1 + bent(x) ** 2).pow_(x),
}
CASES = {**LINEAR_CASES, **OTHER_CASES}
# Where plain autograd has no second derivative or a wrong third one, or works in place.
RIGHT = {
    "cdist": lambda x: (bent(x).unsqueeze(1).unsqueeze(2) - weights(1, 2, 3).unsqueeze(1)).norm(
        dim=-1
    ),
    "attention": lambda x: (image(x) @ image(x).mT / 2).softmax(-1) @ image(x),
}
STANDARD = lambda r: (r - r.mean()) / (r.var(correction=0) + 1e-5).sqrt()
RIGHT["gradient_of_layer_norm"] = lambda x: torch.func.vmap(
    torch.func.grad(lambda r: (STANDARD(r.sin()) * ONES[0]).pow(3).sum())
)(x)
RIGHT["gradient_of_instance_norm"] = lambda x: torch.func.vmap(
    torch.func.grad(lambda r: STANDARD(r.sin()).pow(3).sum())
)(x)
NO_GRAPH = {"inplace", "inplace_power", "inplace_power_of_two"}
# Rows of these are not rows of the batch: they are for one row only.
ONE_ROW = {"dot_of_one_row", "mv_of_one_row", "dist"}


@pytest.mark.parametrize("name", CASES)
def test_each_operation_is_right_unverified(name):
    """Linear operations get bent once more, so that lower derivatives matter behind them."""
    torch.manual_seed(0)
    x = randn(1 if name in ONE_ROW else 4, 3)
    for after in (lambda y: y, lambda y: (2 * y).sin()):
        func = lambda x: after(CASES[name](x))
        right = diagonal(lambda x: after(RIGHT.get(name, CASES[name])(x)), (x,))
        for grad in (False, True)[: 1 if name in NO_GRAPH else 2]:
            with torch.set_grad_enabled(grad):
                given = x.clone().requires_grad_(grad)
                found = batch_hessian_diagonal(func, mode="taylor", check=False)(given)
            torch.testing.assert_close(found.detach(), right, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted({*CASES} - ONE_ROW))
def test_sums_over_rows_are_right_unverified(name):
    """One output: where rows keep their place, by adjoints. As many rows as elements."""
    torch.manual_seed(0)
    x = randn(3, 3)
    after = lambda y: (2 * y).sin().reshape(len(y), -1).sum(1)
    func = lambda x: after(CASES[name](x))
    right = diagonal(lambda x: after(RIGHT.get(name, CASES[name])(x)), (x,))
    found = batch_hessian_diagonal(func, mode="taylor", check=False)(x)
    torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-6)


def propagated(monkeypatch, transform, x):
    """The result, and whether second derivatives went through linear operations."""
    jets, by_adjoints = [], propagation.by_adjoints
    noted = lambda *args: jets.append(by_adjoints(*args)) or jets[-1]
    monkeypatch.setattr(propagation, "by_adjoints", noted)
    result = transform(x)
    monkeypatch.undo()
    return result, not any(jets)


NETWORK = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
KEPT = {
    "network": (NETWORK, True),
    "features": (lambda x: NETWORK(torch.cat([x[:, :1].sin(), x[:, 1:]], 1)).squeeze(1), True),
    "product": (lambda x: NETWORK(x) * x.square().sum(1, keepdim=True), True),
    "transposed": (lambda x: (x.T.sin() * x.T).T.sum(1), False),
    "weights from the left": (lambda x: (weights(3, 3) @ x.T).T.sin().sum(1), False),
    "many outputs": (lambda x: x.sin() @ weights(3, 6), False),
    "overwritten": (lambda x: (2 * x).sin_().exp().sum(1), True),
}


@pytest.mark.parametrize("name", KEPT)
def test_adjoints_serve_where_rows_keep_their_place(name, monkeypatch):
    func, is_kept = KEPT[name]
    x = torch.linspace(-1, 1, 9, dtype=f64).view(3, 3)
    for make, indices in ((batch_hessian_diagonal, None), (batch_hessian, None), (None, 1)):
        make = make or (lambda f, **words: batch_partials(f, [(0, 0), (1,), (2, 0)], **words))
        nested = "rev" if indices else "rev_over_rev"
        found, went = propagated(monkeypatch, make(func, mode="taylor", check=False), x)
        assert went != is_kept
        torch.testing.assert_close(found, make(func, mode=nested)(x), rtol=1e-9, atol=1e-9)
    _, went = propagated(monkeypatch, batch_laplacian(func, mode="taylor", check=False), x)
    assert went  # as its one sum takes as much as one pass back


def test_what_cannot_be_followed_is_refused_each_time():
    """A recording that is made twice of one run says the same twice."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    x = randn(4, 3).requires_grad_()
    recorder = Recorder([x])
    with recorder:
        out = Double.apply(x.sin())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no history"):
            make_recording(recorder, [out], create_graph=False)


def _detached(x):
    return x.detach()


def _made_of_constants(x):
    with torch.enable_grad():
        return x.detach().sin().asin()


def _with_a_graph_of_its_own(x):
    with torch.enable_grad():
        return x.sin().asin()


@pytest.mark.parametrize("forward", [_detached, _made_of_constants, _with_a_graph_of_its_own])
@pytest.mark.parametrize("transform", [batch_laplacian, batch_hessian_diagonal])
def test_what_a_custom_function_does_is_not_what_autograd_does(forward, transform):
    """The identity, whose gradient is scaled; neither recorded nor taken for a constant."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return -3 * grad

    def func(x):
        return x.square().sum(1) + (Scaled.apply(x / 4) * x).sum(1)

    x = torch.linspace(-1, 1, 9, dtype=f64).view(3, 3)
    nested = transform(func, mode="rev_over_rev")(x)
    for found in (transform(func, check=False)(x), make_fx(transform(func))(x)(x)):
        torch.testing.assert_close(found, nested)
    with pytest.raises(RuntimeError, match=r"custom autograd\.Function"):
        transform(func, mode="taylor")(x)


@pytest.mark.parametrize("frozen", [True, False])
def test_adjoints_can_be_differentiated(frozen):
    net = copy.deepcopy(NETWORK)
    net[0].weight.requires_grad_(not frozen)
    x = torch.linspace(-1, 1, 9, dtype=f64).view(3, 3).requires_grad_()
    leaves = [x, *[p for p in net.parameters() if p.requires_grad]]
    losses = [
        batch_hessian_diagonal(net, mode=mode)(x).square().sum()
        for mode in ("taylor", "rev_over_rev")
    ]
    pairs = [torch.autograd.grad(loss, leaves, allow_unused=True) for loss in losses]
    torch.testing.assert_close(*[[g for g in grads if g is not None] for grads in pairs])


def test_a_hook_that_changes_gradients_is_refused():
    def func(x):
        y = x.exp()
        if y.requires_grad:
            y.register_hook(lambda grad: 3 * grad)
        return y.sin()

    with pytest.raises(RuntimeError, match="gradient hook"):
        batch_hessian_diagonal(func, mode="taylor", check=False)(randn(4, 3))


@pytest.mark.parametrize("name", ["product", "matrix"])
def test_negative_views_keep_their_gradients(name):
    """PyTorch copies them below autograd, where operations are recorded."""
    w, x = randn(6, 3, 2).requires_grad_(), randn(4, 3)
    view = lambda: torch.view_as_complex(w).conj().imag
    product = lambda x: torch.sin(x * view()[0])
    matrix = lambda x: torch.tanh(x @ view().mT)
    func = product if name == "product" else matrix

    def gradient(mode):
        result = batch_laplacian(func, mode=mode, check=False)(x)
        return torch.autograd.grad(result.square().sum(), w)[0]

    torch.testing.assert_close(gradient("auto"), gradient("rev_over_rev"))
    with pytest.raises(RuntimeError, match="resolve_neg"):
        gradient("taylor")
    w = w.detach()  # which has no gradient to lose
    torch.testing.assert_close(*[batch_laplacian(func, mode=m)(x) for m in ("auto", "taylor")])


def test_chunks_of_different_order_agree():
    """Derivatives of operations that served a chunk of low order serve no higher one."""
    x = randn(4, 2)
    words = {"mode": "taylor", "check": False, "chunk_size": 1}
    func = lambda x: (2 * x[:, 0]).sin() * x[:, 1].exp()
    second, third = batch_partials(func, [(0, 0), (0, 0, 0)], **words)(x)
    torch.testing.assert_close(second, -4 * func(x))
    torch.testing.assert_close(third, -8 * (2 * x[:, 0]).cos() * x[:, 1].exp())


# --- of any order ------------------------------------------------------------------------


def test_orders_up_to_five_are_right():
    x = randn(4, 2)
    func = lambda x: (x[:, 0].exp() * (2 * x[:, 1]).sin()).tanh() / (2 + x[:, 0].cos())
    indices = [(), (0,), (1, 0), (0, 1, 1), (1, 1, 0, 0), (0, 1, 0, 1, 1)]
    found = batch_partials(func, indices, mode="taylor", check=False)(x)
    for index, one in zip(indices, found):
        given = x.clone().requires_grad_()
        right = func(given)
        for i in index:
            right = torch.autograd.grad(right.sum(), given, create_graph=True)[0][:, i]
        torch.testing.assert_close(one, right.detach(), rtol=1e-8, atol=1e-8)


# --- elementwise functions ---------------------------------------------------------------

ELEMENTWISE = {
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


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_three_orders_of_elementwise_functions_are_right(name):
    """One call after the other, at other values and shapes: nothing of an earlier call is used."""
    func, indices = ELEMENTWISE[name], [(0, 0, 0), (0,), (0, 0)]
    transformed = batch_partials(func, indices, mode="taylor", check=False)
    for rows in (4, 4, 7, 1):
        x = randn(rows, 2).requires_grad_()
        found = transformed(x.detach())
        slopes = [func(x)[:, 0]]
        for _ in range(3):
            (slope,) = torch.autograd.grad(
                slopes[-1].sum() + 0 * x.sum(), x, create_graph=True, materialize_grads=True
            )
            slopes.append(slope[:, 0])
        for one, order in zip(found, (3, 1, 2)):
            torch.testing.assert_close(one[:, 0], slopes[order].detach())


def test_constants_and_dtypes_tell_operations_apart():
    x = randn(5, 2)
    for beta in (1, 1.0, 2, 3.5):
        for dtype in (f64, torch.float32):
            func = lambda x, beta=beta: F.softplus(x, beta)
            bend = torch.sigmoid(beta * x) * torch.sigmoid(-beta * x) * beta
            found = batch_hessian_diagonal(func, mode="taylor", check=False)(x.to(dtype))
            diagonal = found.diagonal(dim1=1, dim2=2)
            torch.testing.assert_close(diagonal, bend.to(dtype))


# --- memory ------------------------------------------------------------------------------


def test_nothing_outlives_the_call():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    seen = []
    net[1].register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    laplacian = batch_laplacian(net, mode="taylor")
    x = randn(4, 3)
    for _ in range(10):
        laplacian(x)
    gc.collect()
    assert seen
    assert not [ref for ref in seen if ref() is not None]


def test_jets_are_not_handed_out():
    """What is returned is nobody's buffer: a later call does not change it."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Tanh()).double().requires_grad_(False)
    transformed = batch_hessian_diagonal(net, mode="taylor", return_value=True)
    x = randn(4, 3)
    first, (jac, value) = transformed(x)
    kept = [t.clone() for t in (first, jac, value)]
    transformed(randn(4, 3))
    assert all(map(torch.equal, kept, (first, jac, value)))


# --- what is fragile in PyTorch ----------------------------------------------------------


def explicit_norm(x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
@pytest.mark.parametrize("inside", [False, True])
def test_third_derivatives_of_layer_norm_are_right(transform, inside):
    """PyTorch's own are wrong, in plain autograd and in torch.func."""
    x, cotangent = randn(4, 3), None
    found = []
    for norm in (lambda x: F.layer_norm(x, (3,)), explicit_norm):
        transformed = transform(lambda x: norm(x.sin()).exp())
        cotangent = torch.randn_like(transformed(x)) if cotangent is None else cotangent
        scalar = lambda x: (transformed(x) * cotangent).sum()
        if inside:
            found.append(torch.func.grad(scalar)(x))
        else:
            given = x.clone().requires_grad_()
            found.append(torch.autograd.grad(scalar(given), given)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def test_a_norm_that_appears_later_is_right():
    now, x = {"norm": False}, randn(4, 3).requires_grad_()
    func = lambda x: (F.layer_norm(x, (3,)) if now["norm"] else x.sin()).exp()
    transformed = batch_hessian(func, mode="rev_over_rev")
    for _ in range(5):
        transformed(x)
    now["norm"] = True
    right = batch_hessian(lambda x: explicit_norm(x).exp(), mode="rev_over_rev")
    for one, other in zip(
        *[torch.autograd.grad(f(x).pow(2).sum(), x) for f in (transformed, right)]
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian_diagonal, batch_laplacian])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_precision_inside_is_kept(transform, dtype):
    """What counts is the precision that func computes in, not that of its arguments."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    x = randn(4, 3)
    found = transform(lambda x: net(x.to(dtype)).double())(x)
    right = transform(copy.deepcopy(net).double())(x)
    torch.testing.assert_close(found, right, rtol=0.1, atol=0.1 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_third_derivatives_of_an_operation_of_unknown_structure_are_right(grad):
    def inverse(x):
        a, b = x.unbind(1)
        rows = torch.stack([torch.stack([3 + a, b], 1), torch.stack([a, 3 + b], 1)], 1)
        return torch.linalg.inv(rows)[:, 0, 0]  # (3 + b) / (9 + 3 a + 3 b)

    indices, x = [(0, 0, 0), (0, 0, 1), (1, 1)], randn(4, 2).abs().requires_grad_(grad)
    a, b = x.unbind(1)
    total = 9 + 3 * a + 3 * b
    right = (
        -162 * (3 + b) / total**4,
        18 / total**3 - 162 * (3 + b) / total**4,
        18 * (3 + b) / total**3 - 6 / total**2,
    )
    found = batch_partials(inverse, indices, mode="taylor")(x)
    torch.testing.assert_close([t.detach() for t in found], [t.detach() for t in right])
    if grad:
        wanted = torch.autograd.grad(sum(right).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(sum(found).sum(), x), wanted)


@pytest.mark.parametrize("operation", [torch.alias_copy, torch.amax])
def test_operations_of_unknown_structure_take_numbers(operation):
    func = lambda x: torch.stack([operation(number.sin()) for number in x.unbind()])
    x = randn(3)
    torch.testing.assert_close(batch_laplacian(func, mode="taylor", check=False)(x), -x.sin())


@pytest.mark.parametrize("size", [2, 3])
def test_a_batch_at_the_end_as_large_as_a_row(size):
    """The product of the basis with a weight is that weight where the batch comes first alone."""
    weight = randn(3)
    func = lambda x: (
        (x @ torch.diag(weight[:size])).tanh().t()
    )  # each sample by a number of its own
    along = batch_hessian_diagonal(func, in_dims=1, mode="taylor", check=False)
    x = randn(3, size)
    slope = (x * weight[:size]).tanh()
    expected = -2 * weight[:size] ** 2 * slope * (1 - slope**2)
    torch.testing.assert_close(along(x).diagonal(0, 1, 2), expected.t())
