"""Networks, layers and custom autograd functions for the tables."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from tests.cases.functions import in_math

f64 = torch.float64


# --- networks ----------------------------------------------------------------------------


def mlp(*, dtype: torch.dtype = f64, inner: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), inner or nn.Tanh(), nn.Linear(6, 5)).to(dtype)


def network(outputs: int = 3, *, grad: bool = True) -> nn.Sequential:
    """``3 -> 4 -> outputs`` in float64."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).to(f64)
    return net.requires_grad_(grad)


def steep_mlp(inner: Callable[[], nn.Module] = nn.Tanh, out: int = 2) -> Callable[[], nn.Module]:
    """``3 -> 5 -> out``, with weights large enough for the net to bend."""

    def make() -> nn.Module:
        first = nn.Linear(3, 5)
        first.weight.data *= 3
        return nn.Sequential(first, inner(), nn.Linear(5, out))

    return make


def random_mlp(dtype: torch.dtype = f64) -> nn.Module:
    return mlp(dtype=dtype, inner=nn.Sequential(nn.Tanh(), nn.Dropout(0.4)))


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


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


class First(nn.Module):
    """The first of what a module returns, as recurrent and attention layers return tuples."""

    def __init__(self, inner: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **self.kwargs)[0]


class LastStep(First):
    """The last step of what a recurrent layer returns first."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, -1]


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool, **kwargs: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, **kwargs)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=self.need_weights)[0]


class SummedAttention(SelfAttention):
    """Attention summed over its steps: few outputs."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__(need_weights, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum(1)[:, :3]


def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0, activation="gelu", batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8, 3))


class Math(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return in_math(self.inner)(x)


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 5))
        self.register_buffer("where", torch.tensor([4, 0]))
        self.linear = parametrizations.weight_norm(nn.Linear(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * self.linear(x)).tanh()[:, self.where]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, outputs: int = 3, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(3, 3, dtype=dtype) for _ in range(2))
        self.down.weight = self.up.weight
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())[:, : self.outputs]


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
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Partly(nn.Module):
    """A part of the module is TorchScript."""

    def __init__(self, inner: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = torch.jit.script(inner), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).sin())


# --- norms as they are defined -----------------------------------------------------------


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


# --- hooks and state ---------------------------------------------------------------------


class Hooked(nn.Module):
    """A forward hook that replaces the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = steep_mlp()()
        self.net[0].register_forward_hook(lambda module, args, out: out * args[0].sum(-1, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Stores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = mlp(), None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        self.net[1].seen = self.net[0](x)
        return self.net(x)


def with_tensor_hook(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda grad: 2 * grad)
    return y.exp()


class MovingAverage(nn.Module):
    """Its buffers move with each call, and its output depends on them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3, dtype=f64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(0.1)
        self.calls += 1
        return (self.mean * self.calls * x).sin()


class Counter(nn.Module):
    """Its plain attributes move with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        return x.sin() * self.calls


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("the user's own")


# --- custom autograd functions -----------------------------------------------------------


class Legacy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].exp()


class Modern(torch.autograd.Function):
    """With setup_context and no rule for vmap."""

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


class Generated(Modern):
    generate_vmap_rule = True


class WithJvp(Modern):
    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].exp()


class WithRule(Modern):
    @staticmethod
    def vmap(info, in_dims, x):
        return WithRule.apply(x), in_dims[0]


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


class WrongBackward(torch.autograd.Function):
    """The sine, with a derivative that is a hundredth too large."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x.cos() * 1.01
