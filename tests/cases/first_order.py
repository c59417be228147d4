"""The table: functions of every kind that people differentiate, each with what must come of it.

``build()`` makes a fresh function and fresh arguments, the same ones every time. Rows: 4,
inputs: 3, outputs: 5 unless the point is another size; float64 unless the point is float32.
"""

import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from funcjac import BatchMixingError, VerificationError
from tests.oracles import SINCE_2_13

f32, f64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Setup:
    """A function with its arguments; ``kept`` is a list in which the function leaves things."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One function.

    Attributes:
        make: makes the function and its arguments.
        words: argnums, in_dims, out_dims, randomness.
        expected: the exception that ``batch_jacobian`` must raise, ``None`` if it must be right.
        match: text of that exception.
        cannot: routes such as ``vmap/fwd``, or ``vmap`` or ``fwd`` for all of those, on which
            torch fails or is wrong: a documented error is allowed there, a wrong number nowhere.
        cannot_twice: likewise where the Jacobian is to be differentiated.
        oracle: ``rows``, or ``batch`` where rows cannot run one after the other.
        twice: whether plain autograd differentiates the Jacobian once more.
        smooth: whether central differences see the derivative that autograd is asked for.
        moves: whether each run changes the function, so that each call needs one made anew.
    """

    name: str
    group: str
    make: Callable[[], Setup]
    words: dict[str, Any] = field(default_factory=dict)
    expected: type[Exception] | None = None
    match: str = ""
    cannot: str = ""
    cannot_twice: str = ""
    oracle: str = "rows"
    twice: bool = True
    smooth: bool = True
    moves: bool = False

    def build(self) -> Setup:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript and CSR warn that they are old or new
            torch.manual_seed(0)
            return self.make()

    def can(self, route: str, *, twice: bool = False) -> bool:
        """Whether ``route`` (``engine/mode``) must be right, and differentiable if ``twice``."""
        engine, mode = route.split("/")
        cannot = self.cannot + " " + self.cannot_twice * twice
        return not {route, engine, mode} & set(cannot.split())


def given(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Setup:
    return Setup(func, args, kwargs)


def rand(*shape: int, dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def x43(dtype: torch.dtype = f64) -> Tensor:
    return rand(4, 3, dtype=dtype)


# --- functions ---------------------------------------------------------------------------


def mlp(*, dtype: torch.dtype = f64, inner: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), inner or nn.Tanh(), nn.Linear(6, 5)).to(dtype)


def linear_map() -> Setup:
    w, b = rand(5, 3), rand(5)
    return given(lambda x: x @ w.T + b, x43())


def square_rows(n: int = 3) -> tuple[Tensor, Tensor]:
    """Well-conditioned matrices ``(4, n, n)``, as a shift to add to ``x``."""
    return 0.3 * rand(4, n, n), 2 * torch.eye(n, dtype=f64)


def on_matrices(function: Callable[[Tensor], Any]) -> Callable[[], Setup]:
    def make() -> Setup:
        x, shift = square_rows()
        return given(lambda x: function(x + shift), x)

    return make


def on_symmetric(function: Callable[[Tensor], Any]) -> Callable[[], Setup]:
    return on_matrices(lambda a: function(a @ a.mT + torch.diag(torch.arange(3.0).to(a))))


def module(make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = f64, train=False):
    """A module on a random input of ``shape``, in eval mode unless ``train``."""

    def setup() -> Setup:
        net = make().to(dtype).train(train)
        return given(net, rand(*(shape or (4, 3)), dtype=dtype))

    return setup


def on_x(function: Callable[[Tensor], Any], *shape: int, dtype: torch.dtype = f64):
    return lambda: given(function, rand(*(shape or (4, 3)), dtype=dtype))


class First(nn.Module):
    """The first of what a module returns, as recurrent and attention layers return tuples."""

    def __init__(self, inner: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.inner, self.kwargs = inner, kwargs

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, **self.kwargs)[0]


class SelfAttention(nn.Module):
    def __init__(self, need_weights: bool, **kwargs: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, **kwargs)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, x, x, need_weights=self.need_weights)[0]


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


Pair = namedtuple("Pair", "b a")


@optree.dataclasses.dataclass(namespace="funcjac")
class State:
    position: Tensor
    velocity: Tensor


def on_dict() -> Setup:
    w = rand(2, 5)
    return given(
        lambda d: {"z": d["b"].sin() @ w, "a": {"c": d["a"] * d["b"].sum(-1, keepdim=True)}},
        {"b": rand(4, 2), "a": x43()},
    )


def on_state() -> Setup:
    def step(s: State) -> State:
        return State(s.position + 0.1 * s.velocity, s.velocity - 0.1 * s.position.sin())

    return given(step, State(x43(), x43()))


def per_sample_parameters(net: nn.Module, *, frozen: bool = False) -> Setup:
    parameters = {k: p.detach().clone() for k, p in net.named_parameters()}
    if frozen:
        net.requires_grad_(False)
    return given(lambda x, p: torch.func.functional_call(net, p, (x,)), x43(), parameters)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3, dtype=f64)
        self.down = nn.Linear(3, 3, dtype=f64)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


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


# --- hooks, saved tensors, state ---------------------------------------------------------


def with_backward_hook() -> Setup:
    net = mlp()
    net[1].register_full_backward_hook(lambda _, grads, __: (3 * grads[0],))
    return given(net, x43())


def with_storing_hook() -> Setup:
    net, kept = mlp(), []
    net[1].register_forward_hook(lambda _, args, out: kept.append(out))
    return Setup(net, (x43(),), kept=kept)


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


def with_replacing_hook() -> Setup:
    net = mlp()
    net[0].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    net[1].register_forward_hook(lambda _, args, out: out * args[0])
    return given(net, x43())


def checkpointed() -> Setup:
    net = mlp()
    return given(lambda x: checkpoint(net, x, use_reentrant=False), x43())


def saved_on_cpu() -> Setup:
    net = mlp()

    def func(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return net(x)

    return given(func, x43())


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


# --- in place ----------------------------------------------------------------------------


def fill_new_zeros(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 5)
    out[:, 0] = x[:, 0].sin()
    out[:, 3] = x[:, 1] * x[:, 2]
    return out


def fill_zeros(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 5, dtype=f64)
    out[:, 0] = x[:, 0].sin()
    out[:, 3] = x[:, 1] * x[:, 2]
    return out


def write_into_input(x: Tensor) -> Tensor:
    x[..., 0] = 0
    return (x * x).cumsum(-1)


def write_into_other(x: Tensor, y: Tensor) -> Tensor:
    y.add_(1)
    return x.sin() * y


def write_into_shared() -> Setup:
    total = torch.ones(3, dtype=f64)

    def func(x: Tensor, scale: Tensor) -> Tensor:
        scale.mul_(2)
        return x.sin() * scale

    return given(func, x43(), total)


# --- control flow ------------------------------------------------------------------------


def branch_by_row(x: Tensor) -> Tensor:
    rows = [x[b] ** 2 if x[b].sum().item() > 0 else x[b].sin() for b in range(x.shape[0])]
    return torch.stack(rows)


def assign_masked(x: Tensor) -> Tensor:
    out = x.sin()
    out[x > 0] = x[x > 0] ** 2
    return out


def scatter_nonzero(x: Tensor) -> Tensor:
    row, column = torch.nonzero(x > 0, as_tuple=True)
    out = x.new_zeros(x.shape)
    return out.index_put((row, column), x[row, column].exp())


def scatter_selected(x: Tensor) -> Tensor:
    mask = x > 0
    return torch.zeros_like(x).masked_scatter(mask, torch.masked_select(x, mask).exp())


def one_hot_of_max(x: Tensor) -> Tensor:
    return x.sin() * F.one_hot(x.argmax(-1), 3)


def asserting(x: Tensor) -> Tensor:
    assert bool((x.abs() < 100).all())
    return x.sin()


def iterate_to_convergence(x: Tensor) -> Tensor:
    """Newton's square root; a row that has converged no longer moves."""
    a = x.abs() + 1
    y = a.clone()
    for _ in range(20):
        active = ((y * y - a).abs() > 1e-12).any(-1, keepdim=True)
        if not active.any():
            break
        y = torch.where(active, 0.5 * (y + a / y), y)
    return y


# --- TorchScript -------------------------------------------------------------------------


def script_branch(x: Tensor) -> Tensor:
    if x.dim() > 1 and x.size(-1) == 3:
        x = x.sin()
    for i in range(2):
        x = x * x + float(i)
    return x


class Script(nn.Module):
    """A module tree of which a part is scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.jit.script(mlp())
        self.last = nn.Linear(5, 2, dtype=f64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh())


# --- autograd inside ---------------------------------------------------------------------


def forces(create_graph: bool, mark: bool = False) -> Callable[[Tensor], Tensor]:
    w = rand(3, 6)

    def func(x: Tensor) -> Tensor:
        with torch.enable_grad():
            if mark or not x.requires_grad:
                x.requires_grad_()
            energy = (x @ w).tanh().pow(2).sum()
            return -torch.autograd.grad(energy, x, create_graph=create_graph)[0]

    return func


def func_forces() -> Setup:
    w = rand(3, 6)
    return given(torch.func.grad(lambda x: (x @ w).tanh().pow(2).sum()), x43())


def partly_blind(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.cos()
    return scale * x.sin()


# --- sparse ------------------------------------------------------------------------------


def sparse(layout: str) -> Setup:
    dense = torch.where(torch.rand(5, 3) > 0.5, 1.0, 0.0).to(f64) * rand(5, 3)
    matrix = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    return given(lambda x: (matrix @ x.sin().T).T, x43())


# --- mixing ------------------------------------------------------------------------------


def in_batch_attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T, -1) @ x


def clip_by_global_norm(x: Tensor) -> Tensor:
    return x / x.norm().clamp(min=1.0)


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("the user's own")


# --- random ------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return x * torch.randn_like(x) + torch.rand_like(x) * x**2


def reparametrized(x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, x.exp(), validate_args=False).rsample()


def math_attention(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, x.sin(), x)


DIFFERENT, SAME = {"randomness": "different"}, {"randomness": "same"}


def random_mlp(dtype: torch.dtype = f64) -> nn.Module:
    return mlp(dtype=dtype, inner=nn.Sequential(nn.Tanh(), nn.Dropout(0.4)))


# --- the table ---------------------------------------------------------------------------


CASES: list[Case] = [
    # plain functions of tensors
    Case("sin", "plain", on_x(torch.sin)),
    Case("linear", "plain", linear_map),
    Case("scalar_rows", "plain", on_x(lambda x: x.pow(3).sum(-1))),
    Case("zero_d_rows", "plain", on_x(torch.sin, 4)),
    Case("zero_d_to_vector", "plain", on_x(lambda x: torch.stack([x, x**2, x.exp()], 1), 4)),
    Case("empty_input_rows", "plain", on_x(lambda x: x.sum(1, keepdim=True).expand(-1, 5), 4, 0)),
    Case("empty_output_rows", "plain", on_x(lambda x: x[:, :0].sin())),
    Case("empty_batch", "plain", on_x(lambda x: x.repeat(1, 2).sin(), 0, 3)),
    Case("batch_of_one", "plain", on_x(lambda x: x.repeat(1, 2).sin(), 1, 3)),
    Case("transposed_input", "plain", lambda: given(torch.sin, rand(3, 4).T)),
    Case("expanded_input", "plain", lambda: given(torch.sin, rand(1, 3).expand(4, 3))),
    Case("in_dims_1", "plain", on_x(lambda x: x.T.sin() * 2, 3, 4), {"in_dims": 1}),
    Case(
        "out_dims_1",
        "plain",
        lambda: given(lambda x, w=rand(5, 3): w @ x.T, x43()),
        {"out_dims": 1},
    ),
    Case(
        "in_dims_last_out_dims_last",
        "plain",
        lambda: given(lambda x, w=rand(5, 3): (w @ x).exp(), rand(2, 3, 4)),
        {"in_dims": -1, "out_dims": -1},
    ),
    Case("matrix_rows", "plain", lambda: given(lambda x, w=rand(5, 3): w @ x.sin(), rand(4, 3, 2))),
    Case(
        "unused_input",
        "plain",
        lambda: given(lambda x, y: x.sin(), x43(), rand(4, 2)),
        {"argnums": (0, 1)},
    ),
    Case(
        "only_unused_input",
        "plain",
        lambda: given(lambda x, y: x.sin(), x43(), rand(4, 2)),
        {"argnums": 1},
    ),
    Case("constant_output", "plain", on_x(lambda x: x.new_ones(x.shape[0], 5))),
    Case("partly_constant_output", "plain", on_x(lambda x: (x.sin(), x.new_ones(len(x), 2)))),
    Case("returns_its_input", "plain", on_x(lambda x: x)),
    Case("returns_a_view", "plain", on_x(lambda x: x.unsqueeze(1))),
    Case("float32", "plain", on_x(lambda x: x.sin() @ torch.ones(3, 5), dtype=f32)),
    Case("float64_to_float32", "plain", on_x(lambda x: x.sin().float().repeat(1, 2))),
    Case("float32_to_float64", "plain", on_x(lambda x: x.sin().double(), dtype=f32)),
    Case("mixed_dtype_outputs", "plain", on_x(lambda x: (x.sin(), x.float().cos()))),
    Case(
        "mixed_dtype_inputs",
        "plain",
        lambda: given(lambda x, y: x.sin() * y, x43(), x43(f32)),
        {"argnums": (0, 1)},
    ),
    Case(
        "keyword_arguments",
        "plain",
        lambda: given(
            lambda x, *, scale, power: (scale * x).sin() ** power, x43(), scale=rand(3), power=2
        ),
    ),
    Case("many_outputs", "plain", lambda: given(lambda x, w=rand(3, 24): (x @ w).tanh(), x43())),
    Case("many_inputs", "plain", lambda: given(lambda x, w=rand(24, 2): x.tanh() @ w, rand(4, 24))),
    Case(
        "vmap_of_one_sample",
        "plain",
        on_x(torch.vmap(lambda x: torch.stack([x.sum().sin(), x[0] * x[1] * x[2]]))),
    ),
    # operations that some mode or engine of torch gets wrong or cannot do
    Case(
        "prod_with_zeros",
        "operation",
        lambda: given(lambda x: x.prod(-1), x43() * torch.tensor([1.0, 0.0, 2.0], dtype=f64)),
    ),
    Case("cumprod", "operation", on_x(lambda x: x.cumprod(-1))),
    Case("cummax", "operation", on_x(lambda x: x.cummax(-1).values), cannot="vmap/rev"),
    Case(
        "quantile",
        "operation",
        on_x(lambda x: torch.quantile(x, torch.tensor([0.2, 0.7], dtype=f64), dim=-1).T),
        cannot="vmap",
    ),
    Case("sort_rows", "operation", on_x(lambda x: x.sin().sort(-1).values)),
    Case("roll_rows", "operation", on_x(lambda x: x.sin().roll(1, 1))),
    Case("fft", "operation", on_x(lambda x: torch.fft.rfft(x).abs())),
    Case(
        "complex_inside",
        "operation",
        on_x(lambda x: torch.view_as_real(torch.polar(x.exp(), x)).flatten(1)),
    ),
    Case(
        "cdist",
        "operation",
        lambda: given(lambda x, c=rand(5, 3): torch.cdist(x, c), x43()),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "rbf_of_cdist",
        "operation",
        lambda: given(lambda x, c=rand(5, 3): (-(torch.cdist(x, c) ** 2)).exp(), x43()),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "cdist_of_sets",
        "operation",
        lambda: given(
            lambda x, c=rand(1, 2, 3): torch.cdist(x, c.expand(len(x), 2, 3)), rand(4, 5, 3)
        ),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "scatter_reduce_prod",
        "operation",
        on_x(
            lambda x: torch.ones_like(x).scatter_reduce(
                1, torch.tensor([[0, 0, 1]]).expand(len(x), 3), x, "prod"
            )
        ),
        cannot="vmap",
    ),
    Case("logcumsumexp", "operation", on_x(lambda x: x.logcumsumexp(-1))),
    Case(
        "grid_sample_input",
        "operation",
        lambda: given(
            lambda x, g=rand(1, 2, 2, 2) * 0.4: F.grid_sample(
                x, g.expand(len(x), 2, 2, 2), align_corners=False
            ),
            rand(4, 1, 3, 3),
        ),
        twice=SINCE_2_13,
        cannot="vmap/fwd" if SINCE_2_13 else "fwd",
    ),
    Case(
        "grid_sample_grid",
        "operation",
        lambda: given(
            lambda g, i=rand(1, 1, 3, 3): F.grid_sample(
                i.expand(len(g), 1, 3, 3), g.tanh(), align_corners=False
            ),
            0.4 * rand(4, 2, 1, 2),
        ),
        twice=SINCE_2_13,
        cannot="vmap/fwd" if SINCE_2_13 else "vmap fwd",
    ),
    Case(
        "interpolate",
        "operation",
        on_x(lambda x: F.interpolate(x, scale_factor=2, mode="linear"), 4, 1, 3),
    ),
    Case(
        "unfold", "operation", on_x(lambda x: x.unfold(1, 2, 1).sin().flatten(1)), cannot="vmap/rev"
    ),
    Case("glu", "operation", on_x(lambda x: F.glu(x, -1), 4, 6), cannot_twice="vmap/fwd"),
    Case("where_of_itself", "operation", on_x(lambda x: torch.where(x > 0, x**2, x.sin()))),
    # linear algebra
    Case("det", "linalg", on_matrices(torch.linalg.det)),
    Case(
        "slogdet",
        "linalg",
        on_matrices(lambda a: torch.linalg.slogdet(a).logabsdet),
        cannot="vmap/fwd",
    ),
    Case("logdet", "linalg", on_symmetric(torch.logdet), cannot="vmap/fwd"),
    Case(
        "solve",
        "linalg",
        on_matrices(lambda a: torch.linalg.solve(a, torch.arange(6.0).view(3, 2).to(a))),
        cannot="vmap",
    ),
    Case("inv", "linalg", on_matrices(torch.linalg.inv)),
    Case("pinv", "linalg", on_matrices(torch.linalg.pinv)),
    Case("cholesky", "linalg", on_symmetric(torch.linalg.cholesky)),
    Case("eigh", "linalg", on_symmetric(lambda a: torch.linalg.eigh(a).eigenvalues)),
    Case("svdvals", "linalg", on_matrices(torch.linalg.svdvals)),
    Case("qr", "linalg", on_matrices(lambda a: tuple(torch.linalg.qr(a)))),
    Case("matrix_exp", "linalg", on_matrices(torch.linalg.matrix_exp)),
    # modules
    Case("mlp", "module", module(mlp)),
    Case("mlp_float32", "module", module(mlp, dtype=f32)),
    Case("conv_net", "module", module(conv_net, 4, 2, 4, 4)),
    Case("conv_transpose", "module", module(lambda: nn.ConvTranspose1d(2, 3, 2), 4, 2, 3)),
    Case(
        "flatten", "module", module(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 5)), 4, 2, 3)
    ),
    Case(
        "prelu",
        "module",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.PReLU(5))),
        cannot="vmap/rev",
    ),
    Case(
        "prelu_batch_is_features",
        "module",
        module(lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4))),
        cannot="vmap/rev",
    ),
    Case(
        "rrelu_eval",
        "module",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.RReLU())),
        cannot="vmap",
    ),
    Case(
        "bilinear",
        "module",
        lambda: given(nn.Bilinear(3, 2, 5, dtype=f64), x43(), rand(4, 2)),
        {"argnums": (0, 1)},
        cannot="vmap",
    ),
    Case("weight_norm", "module", module(lambda: parametrizations.weight_norm(nn.Linear(3, 5)))),
    Case(
        "spectral_norm_eval",
        "module",
        module(lambda: parametrizations.spectral_norm(nn.Linear(3, 5))),
    ),
    Case(
        "spectral_norm_train",
        "module",
        module(lambda: parametrizations.spectral_norm(nn.Linear(3, 5)), train=True),
        oracle="batch",
        smooth=False,
        cannot="loop vmap",
        moves=True,
    ),
    Case("frozen_module", "module", module(lambda: mlp().requires_grad_(False))),
    Case("tied_weights", "module", module(Tied)),
    Case("bound_method", "module", lambda: given(mlp().forward, x43())),
    # pytrees
    Case("dict_out_of_order", "pytree", on_dict),
    Case(
        "ordered_dict",
        "pytree",
        lambda: given(
            lambda d: OrderedDict(z=d["z"].sin(), a=d["a"] * d["z"][:, :2]),
            OrderedDict(z=x43(), a=rand(4, 2)),
        ),
    ),
    Case(
        "namedtuple",
        "pytree",
        lambda: given(
            lambda p: Pair(p.a.sin(), p.b.sum(-1) * p.a[:, 0]), Pair(b=x43(), a=rand(4, 2))
        ),
    ),
    Case(
        "none_in_trees",
        "pytree",
        lambda: given(lambda t: [t[0].sin(), None, t[2].exp()], [x43(), None, rand(4, 2)]),
    ),
    Case("registered_dataclass", "pytree", on_state),
    Case("nested_tuples", "pytree", on_x(lambda x: ((x.sin(), (x.sum(-1),)), [x[:, :2].exp()]))),
    Case(
        "several_argnums",
        "pytree",
        lambda: given(
            lambda a, b, c: (a.sum(-1, keepdim=True) * b * c[:, :1]).sin(),
            x43(),
            rand(4, 5),
            rand(4, 2),
        ),
        {"argnums": (2, 0)},
    ),
    Case(
        "negative_argnums",
        "pytree",
        lambda: given(lambda a, b: a * b[:, :1].exp(), x43(), rand(4, 2)),
        {"argnums": -1},
    ),
    Case(
        "in_dims_tree",
        "pytree",
        lambda: given(
            lambda d, s: d["a"] * d["b"].T[:, :1] * s, {"a": x43(), "b": rand(2, 4)}, rand(3)
        ),
        {"in_dims": ({"a": 0, "b": 1}, None)},
    ),
    Case("out_dims_tree", "pytree", on_x(lambda x: (x.sin(), x.T.exp())), {"out_dims": (0, 1)}),
    # arguments that all rows share
    Case(
        "shared_not_differentiated",
        "shared",
        lambda: given(lambda x, w: (x @ w).sin(), x43(), rand(3, 5)),
        {"in_dims": (0, None)},
    ),
    Case(
        "shared",
        "shared",
        lambda: given(lambda x, w: (x @ w).sin(), x43(), rand(3, 5)),
        {"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "shared_and_batched",
        "shared",
        lambda: given(lambda x, w: (x * w).sin(), x43(), rand(3)),
        {"in_dims": (0, None), "argnums": (0, 1)},
        cannot="sum",
    ),
    Case(
        "shared_scalar",
        "shared",
        lambda: given(lambda x, t: (x * t).sin(), x43(), rand()),
        {"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "per_sample_parameters",
        "shared",
        lambda: per_sample_parameters(mlp()),
        {"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "per_sample_parameters_frozen",
        "shared",
        lambda: per_sample_parameters(mlp(), frozen=True),
        {"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "per_sample_parameters_tied",
        "shared",
        lambda: per_sample_parameters(Tied()),
        {"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    # integers
    Case(
        "embedding_beside",
        "integer",
        lambda: given(
            lambda x, i, e=nn.Embedding(6, 3, dtype=f64): x * e(i),
            x43(),
            torch.tensor([0, 5, 2, 2]),
        ),
    ),
    Case(
        "embedding_weight",
        "integer",
        lambda: given(lambda i, w: F.embedding(i, w).sin(), torch.tensor([0, 5, 2, 2]), rand(6, 3)),
        {"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "embedding_max_norm",
        "integer",
        lambda: given(
            lambda x, i, e=nn.Embedding(6, 3, max_norm=0.5, dtype=f64): x * e(i),
            x43(),
            torch.tensor([0, 5, 2, 2]),
        ),
        cannot="vmap",
        moves=True,
    ),
    Case(
        "embedding_bag",
        "integer",
        lambda: given(
            lambda x, i, e=nn.EmbeddingBag(6, 3, dtype=f64): x.sin() * e(i),
            x43(),
            torch.tensor([[0, 5], [2, 2], [1, 3], [4, 0]]),
        ),
        twice=False,
        cannot="vmap",
    ),
    Case(
        "gather_by_index",
        "integer",
        lambda: given(
            lambda x, i: x.sin().gather(1, i), x43(), torch.tensor([[0, 1], [2, 2], [1, 0], [2, 0]])
        ),
    ),
    # normalisation
    Case(
        "batch_norm_eval",
        "normalisation",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())),
    ),
    Case(
        "batch_norm_train",
        "normalisation",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), train=True),
        expected=BatchMixingError,
        match="BatchNorm1d in training mode",
        moves=True,
    ),
    Case(
        "batch_norm_no_statistics",
        "normalisation",
        module(lambda: nn.BatchNorm1d(3, track_running_stats=False)),
        expected=BatchMixingError,
        match="BatchNorm1d without running statistics",
    ),
    Case(
        "instance_norm_train",
        "normalisation",
        module(
            lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), 4, 2, 3, train=True
        ),
        oracle="rows",
        cannot="vmap loop",
        moves=True,
    ),
    Case(
        "layer_norm",
        "normalisation",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))),
        cannot="fwd",
    ),
    Case(
        "layer_norm_float32",
        "normalisation",
        module(lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), dtype=f32),
        cannot="fwd",
    ),
    Case(
        "layer_norm_wide",
        "normalisation",
        module(lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 8))),
        cannot="fwd",
    ),
    Case("group_norm", "normalisation", module(lambda: nn.GroupNorm(2, 4), 4, 4, 3)),
    Case("rms_norm", "normalisation", module(lambda: nn.RMSNorm(3))),
    Case("normalize", "normalisation", on_x(lambda x: F.normalize(x, dim=-1))),
    # recurrent
    Case(
        "lstm",
        "recurrent",
        module(lambda: First(nn.LSTM(3, 5, batch_first=True)), 4, 2, 3),
        cannot="vmap",
    ),
    Case(
        "lstm_float32",
        "recurrent",
        module(lambda: First(nn.LSTM(3, 5, batch_first=True)), 4, 2, 3, dtype=f32),
        twice=False,
        cannot="vmap",
    ),
    Case(
        "lstm_time_first",
        "recurrent",
        module(lambda: First(nn.LSTM(3, 5)), 2, 4, 3),
        {"in_dims": 1, "out_dims": 1},
        cannot="vmap",
    ),
    Case(
        "lstm_bidirectional",
        "recurrent",
        module(lambda: First(nn.LSTM(3, 2, bidirectional=True, batch_first=True)), 4, 2, 3),
        cannot="vmap",
    ),
    Case(
        "lstm_batch_taken_for_time",
        "recurrent",
        module(lambda: First(nn.LSTM(3, 5)), 4, 2, 3),
        expected=BatchMixingError,
        match="LSTM with batch_first=False",
    ),
    Case(
        "gru",
        "recurrent",
        module(lambda: First(nn.GRU(3, 5, batch_first=True)), 4, 2, 3),
        cannot="vmap",
    ),
    Case(
        "gru_float32",
        "recurrent",
        module(lambda: First(nn.GRU(3, 5, batch_first=True)), 4, 2, 3, dtype=f32),
        cannot="vmap",
    ),
    Case(
        "rnn",
        "recurrent",
        module(lambda: First(nn.RNN(3, 5, batch_first=True)), 4, 2, 3),
        cannot="vmap",
    ),
    Case("lstm_cell", "recurrent", module(lambda: First(nn.LSTMCell(3, 5))), cannot="vmap"),
    Case("gru_cell", "recurrent", module(lambda: nn.GRUCell(3, 5)), cannot="vmap"),
    Case(
        "lstm_train",
        "recurrent",
        module(lambda: First(nn.LSTM(3, 5, batch_first=True)), 4, 2, 3, train=True),
        cannot="vmap",
    ),
    # attention
    Case(
        "attention_with_weights",
        "attention",
        module(lambda: SelfAttention(True, batch_first=True), 4, 2, 4),
    ),
    Case(
        "attention_without_weights",
        "attention",
        module(lambda: SelfAttention(False, batch_first=True), 4, 2, 4),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "attention_time_first",
        "attention",
        module(lambda: SelfAttention(True), 2, 4, 4),
        {"in_dims": 1, "out_dims": 1},
    ),
    Case(
        "sdpa",
        "attention",
        on_x(lambda x: F.scaled_dot_product_attention(x, x.sin(), x), 4, 1, 3, 2),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "sdpa_float32_causal",
        "attention",
        on_x(
            lambda x: F.scaled_dot_product_attention(x, x.sin(), x, is_causal=True),
            4,
            1,
            3,
            2,
            dtype=f32,
        ),
        twice=False,
        cannot="vmap fwd",
    ),
    Case("sdpa_math", "attention", lambda: given(math_attention, rand(4, 1, 3, 2))),
    Case(
        "encoder_layer",
        "attention",
        module(lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 4, 2, 4),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "encoder_layer_frozen",
        "attention",
        module(
            lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).requires_grad_(False),
            4,
            2,
            4,
            dtype=f32,
        ),
        twice=False,
        cannot="vmap fwd",
    ),
    # random
    Case("dropout", "random", module(random_mlp, train=True), DIFFERENT, oracle="batch"),
    Case("dropout_same", "random", module(random_mlp, train=True), SAME, cannot="sum"),
    Case("dropout_eval", "random", module(random_mlp)),
    Case("noise", "random", on_x(noisy), DIFFERENT),
    Case("noise_same", "random", on_x(noisy), SAME, cannot="sum"),
    Case("reparametrized", "random", on_x(reparametrized), DIFFERENT, cannot="vmap"),
    Case(
        "shuffled_rows",
        "random",
        on_x(lambda x: x[torch.randperm(len(x)).roll(1)]),
        DIFFERENT,
        expected=BatchMixingError,
        match="rows depend on one another",
    ),
    # custom autograd functions
    Case("legacy_function", "custom", on_x(lambda x: Legacy.apply(x.sin())), cannot="vmap"),
    Case(
        "once_differentiable",
        "custom",
        on_x(lambda x: Once.apply(x.sin())),
        twice=False,
        cannot="vmap fwd",
    ),
    Case("setup_context", "custom", on_x(lambda x: Modern.apply(x.sin())), cannot="vmap"),
    Case(
        "generated_vmap_rule", "custom", on_x(lambda x: Generated.apply(x.sin())), cannot="vmap/fwd"
    ),
    Case("generated_vmap_rule_and_jvp", "custom", on_x(lambda x: WithJvp.apply(x.sin()))),
    Case("own_vmap_rule", "custom", on_x(lambda x: WithRule.apply(x.sin())), cannot="vmap/fwd"),
    # control flow and masks
    Case("item_branch", "control", on_x(branch_by_row), cannot="vmap"),
    Case("boolean_mask", "control", on_x(assign_masked), cannot="vmap"),
    Case("nonzero", "control", on_x(scatter_nonzero), cannot="vmap"),
    Case("masked_select", "control", on_x(scatter_selected), cannot="vmap"),
    Case("masked_fill", "control", on_x(lambda x: x.exp().masked_fill(x > 0, 1.0))),
    Case("one_hot", "control", on_x(one_hot_of_max), cannot="vmap"),
    Case("assertion", "control", on_x(asserting), cannot="vmap"),
    Case("iterate_to_convergence", "control", on_x(iterate_to_convergence), cannot="vmap"),
    # TorchScript
    Case(
        "scripted_mlp", "TorchScript", lambda: given(torch.jit.script(mlp()), x43()), cannot="vmap"
    ),
    Case(
        "traced_mlp",
        "TorchScript",
        lambda: given(torch.jit.trace(mlp(), x43()), x43()),
        cannot="vmap",
    ),
    Case(
        "scripted_function",
        "TorchScript",
        lambda: given(torch.jit.script(script_branch), x43()),
        cannot="vmap",
    ),
    Case(
        "traced_function",
        "TorchScript",
        lambda: given(torch.jit.trace(script_branch, x43()), x43()),
        cannot="vmap",
    ),
    Case("scripted_inside", "TorchScript", module(Script), cannot="vmap"),
    # hooks, checkpoints, state
    Case("checkpoint", "hooks", checkpointed, cannot="vmap"),
    Case("save_on_cpu", "hooks", saved_on_cpu, cannot="vmap/rev"),
    Case("full_backward_hook", "hooks", with_backward_hook, smooth=False, cannot="vmap"),
    Case("storing_hook", "hooks", with_storing_hook),
    Case("storing_module", "hooks", module(Stores), moves=True),
    Case("tensor_hook", "hooks", on_x(with_tensor_hook), smooth=False, cannot="vmap"),
    Case("replacing_hooks", "hooks", with_replacing_hook),
    Case(
        "moving_average",
        "hooks",
        module(MovingAverage),
        oracle="batch",
        smooth=False,
        moves=True,
        cannot="vmap loop",
    ),
    Case(
        "counting_module",
        "hooks",
        module(Counter),
        oracle="batch",
        smooth=False,
        moves=True,
        cannot="vmap loop",
    ),
    # in place
    Case(
        "inplace_relu_first",
        "inplace",
        module(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 5))),
    ),
    Case("inplace_mul", "inplace", on_x(lambda x: x.mul_(2).sin())),
    Case("inplace_slice", "inplace", on_x(write_into_input)),
    Case(
        "inplace_other_argument",
        "inplace",
        lambda: given(write_into_other, x43(), x43()),
        moves=True,
        cannot="vmap loop",
    ),
    Case(
        "inplace_shared_argument",
        "inplace",
        write_into_shared,
        {"in_dims": (0, None)},
        moves=True,
        cannot="vmap loop",
    ),
    Case("fill_new_zeros", "inplace", on_x(fill_new_zeros)),
    Case("fill_zeros", "inplace", on_x(fill_zeros), cannot="vmap"),
    Case("inplace_on_result", "inplace", on_x(lambda x: x.sin().mul_(2).add_(x))),
    # autograd inside, and parts that autograd does not see
    Case("autograd_inside", "autograd", lambda: given(forces(True), x43()), cannot="vmap/fwd"),
    Case(
        "autograd_inside_marks_input",
        "autograd",
        lambda: given(forces(True, True), x43()),
        cannot="vmap",
    ),
    Case(
        "autograd_inside_without_graph",
        "autograd",
        lambda: given(forces(False), x43()),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    Case("func_grad_inside", "autograd", func_forces),
    Case(
        "func_jvp_inside",
        "autograd",
        on_x(lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]),
    ),
    Case("no_grad_block", "autograd", on_x(partly_blind), smooth=False, cannot="vmap/fwd"),
    Case("detach", "autograd", on_x(lambda x: x.detach().cos() * x.sin()), smooth=False),
    Case(
        "detached",
        "autograd",
        on_x(lambda x: x.detach().sin()),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    Case(
        "numpy_round_trip",
        "autograd",
        on_x(lambda x: torch.from_numpy(x.detach().numpy() ** 2)),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    Case(
        "item_into_tensor",
        "autograd",
        on_x(lambda x: torch.tensor([[v**2 for v in row] for row in x.tolist()], dtype=f64)),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    # sparse
    Case("sparse_coo", "sparse", lambda: sparse("coo"), cannot="vmap"),
    Case("sparse_csr", "sparse", lambda: sparse("csr"), cannot="vmap"),
    Case(
        "sparse_inside",
        "sparse",
        lambda: given(lambda x, w=rand(3, 5): torch.sparse.mm(x.to_sparse(), w), x43()),
        cannot="vmap",
        cannot_twice="fwd",
    ),
    # rows that depend on one another
    Case("minus_mean", "mixing", on_x(lambda x: x - x.mean(0)), expected=BatchMixingError),
    Case(
        "weak_mixing",
        "mixing",
        on_x(lambda x: x.sin() + 1e-4 * x.mean(0)),
        expected=BatchMixingError,
    ),
    Case("softmax_over_batch", "mixing", on_x(lambda x: x.softmax(0)), expected=BatchMixingError),
    Case("in_batch_attention", "mixing", on_x(in_batch_attention), expected=BatchMixingError),
    Case(
        "attention_batch_taken_for_time",
        "mixing",
        module(lambda: SelfAttention(True), 4, 2, 4),
        expected=BatchMixingError,
        match="MultiheadAttention with batch_first=False",
    ),
    Case(
        "sort_over_batch",
        "mixing",
        on_x(lambda x: x.sin().sort(0).values),
        expected=BatchMixingError,
    ),
    Case(
        "roll_over_batch", "mixing", on_x(lambda x: x.sin().roll(1, 0)), expected=BatchMixingError
    ),
    Case("cumsum_over_batch", "mixing", on_x(lambda x: x.cumsum(0)), expected=BatchMixingError),
    Case("clip_by_global_norm", "mixing", on_x(clip_by_global_norm), expected=BatchMixingError),
    # what has no batched Jacobian
    Case(
        "no_batch_in_output",
        "refused",
        on_x(lambda x: x.sum()),
        expected=ValueError,
        match="batch_jacobian: expected func to return a batch of 4 in dimension 0",
    ),
    Case(
        "complex_output",
        "refused",
        on_x(torch.fft.fft),
        expected=TypeError,
        match="batch_jacobian: expected func to return real floating-point tensors",
    ),
    Case(
        "integer_output",
        "refused",
        on_x(lambda x: x.argsort(-1)),
        expected=TypeError,
        match="batch_jacobian: expected func to return real floating-point tensors",
    ),
    Case(
        "sparse_output",
        "refused",
        on_x(lambda x: x.to_sparse()),
        expected=TypeError,
        match="batch_jacobian: expected func to return dense tensors",
    ),
    Case(
        "number_output",
        "refused",
        on_x(lambda x: x.sum().item()),
        expected=TypeError,
        match="batch_jacobian: expected func to return tensors",
    ),
    Case(
        "integer_input",
        "refused",
        lambda: given(lambda i: i * 0.5, torch.arange(12).view(4, 3)),
        expected=TypeError,
        match="batch_jacobian: expected a differentiated argument of real floating-point",
    ),
    Case(
        "complex_input",
        "refused",
        lambda: given(torch.abs, torch.randn(4, 3, dtype=torch.cfloat)),
        expected=TypeError,
        match="batch_jacobian: expected a differentiated argument of real",
    ),
    Case(
        "unequal_batches",
        "refused",
        lambda: given(lambda x, y: x.sin(), x43(), rand(2, 3)),
        expected=ValueError,
        match="batch_jacobian: expected all batched arguments to have the same batch size",
    ),
    Case("own_error", "refused", module(Raises), expected=KeyError, match="the user's own"),
]
