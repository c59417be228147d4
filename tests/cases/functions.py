"""Functions and networks for the table of ``second_order``, and the recipes that make them.

A recipe draws in float64 and rounds to the default dtype, so that a case in float32 has the
weights and inputs of the same case in float64.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

Recipe = Callable[[], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]


# --- recipes -----------------------------------------------------------------------------


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(torch.get_default_dtype())


def drawn(shape: Any) -> Any:
    """A random tensor of a shape; what is no shape is an argument itself."""
    return rand(*shape) if isinstance(shape, tuple) else shape


def on(func: Callable[..., Any], *shape: int, **words: Any) -> Recipe:
    """``func`` of one tensor, ``(4, 3)`` unless told."""
    return lambda: (func, (rand(*(shape or (4, 3))),), words)


def active(func: Callable[..., Any], *shapes: Any, **words: Any) -> Recipe:
    """``func`` of several arguments, all of them batched."""
    return lambda: (func, tuple(map(drawn, shapes)), words)


def const(func: Callable[..., Any], shape: tuple[int, ...], *shapes: Any, **words: Any) -> Recipe:
    """``func`` of ``x`` and of constants, which the function brings along."""

    def recipe():
        x, rest = rand(*shape), tuple(map(drawn, shapes))
        return (lambda x, *more: func(x, *rest, *more)), (x,), words

    return recipe


def as_float64(make: Callable[[], nn.Module]) -> nn.Module:
    """A module drawn in float64 and in eval mode, in the default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return make().eval().to(dtype)
    finally:
        torch.set_default_dtype(dtype)


def net(make: Callable[[], nn.Module], *shape: int, **words: Any) -> Recipe:
    """A module in eval mode on one tensor."""
    return lambda: (as_float64(make), (rand(*(shape or (4, 3))),), words)


def scripted(make: Callable[[], nn.Module]) -> Recipe:
    return lambda: (torch.jit.script(as_float64(make)), (rand(4, 3),), {})


def traced(make: Callable[[], nn.Module]) -> Recipe:
    return lambda: (torch.jit.trace(as_float64(make), rand(4, 3)), (rand(4, 3),), {})


def on_matrices(function: Callable[[Tensor], Any]) -> Recipe:
    """``function`` of a well-conditioned ``(4, 2, 2)`` that depends on all of a row of three."""

    def func(x: Tensor) -> Any:
        a, b, c = x.unbind(-1)
        entries = [3 + a.sin(), b * c / 2, (a * c).tanh(), 3 + b.cos()]
        return function(torch.stack(entries, -1).reshape(-1, 2, 2))

    return on(func)


def on_symmetric(function: Callable[[Tensor], Any]) -> Recipe:
    return on_matrices(lambda a: function(a @ a.mT + torch.diag(torch.arange(2.0).to(a))))


# --- modules -----------------------------------------------------------------------------


def mlp(inner: Callable[[], nn.Module] = nn.Tanh, out: int = 2) -> Callable[[], nn.Module]:
    """``3 -> 5 -> out``, with weights large enough for the net to bend."""

    def make() -> nn.Module:
        first = nn.Linear(3, 5)
        first.weight.data *= 3
        return nn.Sequential(first, inner(), nn.Linear(5, out))

    return make


def after_tanh(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """What is linear, or nearly so, has no second derivative by itself."""
    return lambda: nn.Sequential(nn.Tanh(), make())


def moved(norm: Any) -> Any:
    """A batch norm whose statistics and weights are no longer those it starts with."""
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        tensor.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def with_head(*layers: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Layers on rows of ``shape``, and a linear layer from whatever comes out to 2."""
    body = nn.Sequential(*layers, nn.Flatten())
    width = body.eval()(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(body, nn.Linear(width, 2))


def conv(make: Callable[[], nn.Module], *shape: int) -> Recipe:
    return net(lambda: with_head(make(), nn.Tanh(), shape=shape), 4, *shape)


def conv2d(make: Callable[[], nn.Module]) -> Recipe:
    """A convolution ``(1, 2, 3) -> (2, 3, 4)``, and what ``make`` makes after it."""
    layers = lambda: (nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), make(), nn.Softplus())
    return net(lambda: with_head(*layers(), shape=(1, 2, 3)), 4, 1, 2, 3)


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=self.need_weights)[0].sum(1)[:, :3]


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3))


def in_math(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` with attention by the one backend that can be differentiated twice."""

    def within(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args)

    return within


class _ExplicitNorms(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        words = kwargs or {}
        if func is F.layer_norm:
            dims = tuple(range(-len(args[1]), 0))
            return standardized(args[0], dims) * words["weight"] + words["bias"]
        if func is F.instance_norm:
            return standardized(args[0], tuple(range(2, args[0].ndim)))
        return func(*args, **words)


def standardized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    center = x - x.mean(dims, keepdim=True)
    return center / (center.square().mean(dims, keepdim=True) + 1e-5).sqrt()


def explicit_norms(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` with norms as they are defined.

    PyTorch 2.13 differentiates ``native_layer_norm`` and ``native_batch_norm`` wrongly the third
    time: silently, in reverse mode too.
    """

    def within(*args: Any) -> Any:
        with _ExplicitNorms():
            return func(*args)

    return within


def plainly(func: Callable[..., Any]) -> Callable[..., Any]:
    return in_math(explicit_norms(func))


class Math(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return in_math(self.inner)(x)


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.sin(), x)[:, 0, :, 0]


def sdpa_masked(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x, x.sin(), x, attn_mask=mask)[:, 0, :, 0]


class First(nn.Module):
    """The last step of what a recurrent layer returns first."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0][:, -1]


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 5))
        self.register_buffer("where", torch.tensor([4, 0]))
        self.linear = parametrizations.weight_norm(nn.Linear(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.linear(x)).tanh()[:, self.where]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 3)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())[:, :2]


class Residual(nn.Module):
    """Skip connections, a parameter alone, and an activation by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.gain = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.gain * torch.tanh(layer(x))
        return x


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


class Hooked(nn.Module):
    """A forward hook that replaces the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()()
        self.net[0].register_forward_hook(lambda module, args, out: out * args[0].sum(-1, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Partly(nn.Module):
    """A part of the module is TorchScript."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(mlp()())
        self.last = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).sin())


def bilinear() -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    return as_float64(lambda: nn.Bilinear(3, 2, 4)), (rand(4, 3), rand(4, 2)), {"argnums": (1, 0)}


def embedding(index: Tensor, in_dims: Any = 0) -> Recipe:
    """Integers beside the input, for each row or for all."""

    def recipe():
        table = as_float64(lambda: nn.Embedding(6, 3))
        return (
            (lambda x, i: (x * table(i)).sin().cumsum(-1)[:, 1:]),
            (rand(4, 3), index),
            {"in_dims": in_dims},
        )

    return recipe


def parameters_of(make: Callable[[], nn.Module]) -> Recipe:
    """Second derivatives by the parameters, which all rows share."""

    def recipe():
        module = as_float64(make)
        parameters = {k: p.detach().clone() for k, p in module.named_parameters()}
        call = lambda x, p: torch.func.functional_call(module, p, (x,))
        return call, (rand(2, 3), parameters), {"in_dims": (0, None), "argnums": 1}

    return recipe


# --- custom autograd functions -----------------------------------------------------------


class Legacy(torch.autograd.Function):
    """Context and output in one, as before torch 2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Modern(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.exp()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class WithJvp(Modern):
    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].exp()


class Surrogate(torch.autograd.Function):
    """A derivative that is not that of the forward pass, as straight-through estimators have."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


# --- operations --------------------------------------------------------------------------


def several(*functions: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Functions of one element each, side by side: ``(B, 3) -> (B, number of functions)``."""
    return lambda x: torch.stack([f(x).sum(-1) for f in functions], -1)


def pieces(x: Tensor) -> Tensor:
    """Cut, stacked, gathered and put together again."""
    a, b = x.sin().split([1, 2], -1)
    turned = torch.cat([b, a], -1).flip(-1).roll(1, -1)
    stacked = torch.stack([turned, x * x], 1).transpose(1, 2).reshape(len(x), 6)
    return stacked[:, [5, 0, 2]] * stacked[:, ::3].prod(-1, keepdim=True)


def indexed(x: Tensor) -> Tensor:
    index = torch.tensor([[2, 0, 0, 1]]).expand(len(x), 4)
    return x.gather(1, index) * x.index_select(1, index[0]) ** 2 + x[..., -1:] * x[:, None, 0]


def scattered(x: Tensor) -> Tensor:
    index = torch.tensor([[1, 0, 1]]).expand(len(x), 3)
    out = x.new_zeros(len(x), 2).scatter_add(1, index, x.exp())
    return out.index_add(1, torch.tensor([0, 0]), out * x[:, :2])


def scatter_prod(x: Tensor) -> Tensor:
    index = torch.tensor([[0, 0, 1]]).expand(len(x), 3)
    return x.new_ones(len(x), 2).scatter_reduce(1, index, x.exp() * x, "prod")


def sparse() -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    matrix = (rand(2, 3) * torch.tensor([[1, 0, 1], [0, 1, 0]])).to_sparse()
    return (lambda x: (matrix @ (x * x[:, :1]).T).T), (rand(4, 3),), {}


def grid_sample(grid: Tensor, image: Tensor) -> Tensor:
    """Interpolated at a point that depends on the input."""
    where = (0.5 * grid).tanh()
    image = image.expand(len(grid), 1, 3, 3)
    return F.grid_sample(image, where, align_corners=False)[:, :, 0, 0] * grid[:, 0, 0]


def log_prob(x: Tensor) -> Tensor:
    normal = torch.distributions.Normal(x[:, 0], x[:, 1].exp(), validate_args=False)
    gamma = torch.distributions.Gamma(x.exp(), 2 * x.exp().flip(-1), validate_args=False)
    return torch.cat([normal.log_prob(x[:, 2])[:, None], gamma.log_prob(1 + x * x)[:, 1:]], 1)


def det_at_zero(x: Tensor) -> Tensor:
    """At zero the matrix is the identity, where formulas that divide have nothing to go by."""
    a, b, c = x.unbind(-1)
    entries = torch.stack([a, b * 2, c + a, b], -1).reshape(-1, 2, 2)
    return torch.linalg.det(entries + torch.eye(2).to(x))


def padded(x: Tensor) -> Tensor:
    wide = F.pad(x, (1, 1)).unfold(-1, 3, 2)  # (B, 2, 3)
    return (wide * wide.flip(1)).sum(-1).exp()


def triangles(x: Tensor) -> Tensor:
    square = x[:, :, None] * x.sin()[:, None, :]
    return torch.cat([square.tril().sum(1), square.diagonal(dim1=1, dim2=2) ** 2], 1)


def ranked(x: Tensor) -> Tensor:
    y = x * x.sum(-1, keepdim=True)
    ends = torch.cat([y.amax(-1, True), y.max(-1, keepdim=True).values, y.min(-1, True)[0]], -1)
    order = y.sort(-1, descending=True)
    middle = y.median(-1, keepdim=True).values * y.topk(2).values
    return torch.cat([ends, order.values * x.gather(1, order.indices), middle], -1)


def masked_softmax(x: Tensor) -> Tensor:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    scores = (x * x)[:, None].masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) * x[:, None]).sum(-1)


def distances(x: Tensor, c: Tensor) -> Tensor:
    return (x[:, None] - c).norm(dim=-1)


def by_norm(cdist: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What ``cdist`` computes."""
    return distances


def cdist_mm(x: Tensor, c: Tensor) -> Tensor:
    return torch.cdist(x, c, compute_mode="use_mm_for_euclid_dist").sin()


def losses(x: Tensor, y: Tensor) -> Tensor:
    words = {"reduction": "none"}
    found = [
        F.mse_loss(x.sin(), y, **words),
        F.smooth_l1_loss(x, y, **words),
        F.huber_loss(x * x, y, **words),
        F.binary_cross_entropy_with_logits(x, y.sigmoid(), **words),
        F.kl_div(x.log_softmax(-1), y.softmax(-1), **words),
    ]
    return torch.stack(found, -1).sum(1)


def cross_entropy(x: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(x * x, label, reduction="none")


def trees() -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    w = rand(2, 3)
    func = lambda d: {"z": d["b"].sin() @ w * d["a"], "c": {"a": (d["a"] * d["b"][:, :1]).sum(-1)}}
    return func, ({"b": rand(4, 2), "a": rand(4, 3)},), {}


def product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.sum(-1, keepdim=True) * b * c).sin()


def shared(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w.T).sin() * w.sum()


def columns(x: Tensor, y: Tensor) -> Tensor:
    """``(3, B)`` and ``(B, 2)`` to ``(2, B)``."""
    return x.sin().cumsum(0)[1:] * y.T * x[:1]


def fourier(x: Tensor) -> Tensor:
    return torch.fft.rfft(x.sin()).abs()


def polar(x: Tensor) -> Tensor:
    z = torch.polar(x.exp(), x)
    return torch.cat([torch.view_as_real(z * z.conj().sum(-1, keepdim=True)).flatten(1)], 1)


# --- in place ----------------------------------------------------------------------------


def fill_new_zeros(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 4)
    out[:, 0] = x[:, 0].sin()
    out[:, 2] = x[:, 1] * x[:, 2]
    return out


def fill_zeros(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 4, dtype=x.dtype)
    out[:, 0] = x[:, 0].sin()
    out[:, 2] = x[:, 1] * x[:, 2]
    return out


def change_views(x: Tensor) -> Tensor:
    y = x * x
    y[:, 0].add_(x[:, 1].exp())
    y[:, 1:] *= x[:, :1]
    return y[:, :2].add_(1)


def change_input(x: Tensor) -> Tensor:
    x[..., 0] = 0
    return (x * x).cumsum(-1)


# --- control flow ------------------------------------------------------------------------


def branch_by_row(x: Tensor) -> Tensor:
    rows = [x[b] ** 3 if x[b].sum().item() > 0 else x[b].sin() for b in range(x.shape[0])]
    return torch.stack(rows)


def assign_masked(x: Tensor) -> Tensor:
    out = x.sin()
    out[x > 0] = x[x > 0] ** 3
    return out


def scatter_masked(x: Tensor) -> Tensor:
    mask = x > 0
    return torch.zeros_like(x).masked_scatter(mask, x[mask].exp())


def converge(x: Tensor) -> Tensor:
    """Newton's square root; how many steps it takes depends on the values."""
    a = x.abs() + 1
    y = a.clone()
    for _ in range(20):
        active = ((y * y - a).abs() > 1e-5).any(-1, keepdim=True)
        if not active.any():
            break
        y = torch.where(active, 0.5 * (y + a / y), y)
    return y


# --- derivatives inside, and parts without -----------------------------------------------


def energy(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w).tanh().pow(2).sum()


def force(x: Tensor, w: Tensor) -> Tensor:
    with torch.enable_grad():
        if not x.requires_grad:
            x.requires_grad_()
        return -torch.autograd.grad(energy(x, w), x, create_graph=True)[0]


def func_force(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(torch.func.grad(energy), in_dims=(0, None))(x, w)


def partly_blind(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.cos()
    return scale * x.sin()
