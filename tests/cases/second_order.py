"""The table of second derivatives.

``case.build(f64)`` draws the same weights and inputs every time; ``case.build(f32)`` gives the same
numbers, rounded.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases import functions as fn
from tests.cases import modules as nets
from tests.cases.case import Case, Setup, given, rounded
from tests.oracles import SINCE_2_13

Recipe = Callable[[], Setup]


# --- recipes -----------------------------------------------------------------------------


def drawn(shape: Any) -> Any:
    """A random tensor of a shape; what is no shape is an argument itself."""
    return rounded(*shape) if isinstance(shape, tuple) else shape


def on(func: Callable[..., Any], *shape: int) -> Recipe:
    """``func`` of one tensor, ``(4, 3)`` unless told."""
    return lambda: given(func, rounded(*(shape or (4, 3))))


def active(func: Callable[..., Any], *shapes: Any) -> Recipe:
    """``func`` of several arguments, all of them batched."""
    return lambda: given(func, *map(drawn, shapes))


def const(func: Callable[..., Any], shape: tuple[int, ...], *shapes: Any) -> Recipe:
    """``func`` of ``x`` and of constants, which the function brings along."""

    def recipe() -> Setup:
        x, rest = rounded(*shape), tuple(map(drawn, shapes))
        return given(lambda x, *more: func(x, *rest, *more), x)

    return recipe


def as_float64(make: Callable[[], nn.Module]) -> nn.Module:
    """A module drawn in float64 and in eval mode, in the default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return make().eval().to(dtype)
    finally:
        torch.set_default_dtype(dtype)


def net(make: Callable[[], nn.Module], *shape: int) -> Recipe:
    """A module in eval mode on one tensor."""
    return lambda: given(as_float64(make), rounded(*(shape or (4, 3))))


def conv(make: Callable[[], nn.Module], *shape: int) -> Recipe:
    return net(lambda: nets.with_head(make(), nn.Tanh(), shape=shape), 4, *shape)


def conv2d(make: Callable[[], nn.Module]) -> Recipe:
    """A convolution ``(1, 2, 3) -> (2, 3, 4)``, and what ``make`` makes after it."""
    layers = lambda: (nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), make(), nn.Softplus())
    return net(lambda: nets.with_head(*layers(), shape=(1, 2, 3)), 4, 1, 2, 3)


def scripted() -> Setup:
    return given(torch.jit.script(as_float64(nets.steep_mlp())), rounded(4, 3))


def traced() -> Setup:
    module = torch.jit.trace(as_float64(nets.steep_mlp()), rounded(4, 3))
    return given(module, rounded(4, 3))


def on_matrices(function: Callable[[Tensor], Any]) -> Recipe:
    """``function`` of a well-conditioned ``(4, 2, 2)`` that depends on all of a row of three."""

    def func(x: Tensor) -> Any:
        a, b, c = x.unbind(-1)
        entries = [3 + a.sin(), b * c / 2, (a * c).tanh(), 3 + b.cos()]
        return function(torch.stack(entries, -1).reshape(-1, 2, 2))

    return on(func)


def on_symmetric(function: Callable[[Tensor], Any]) -> Recipe:
    return on_matrices(lambda a: function(a @ a.mT + torch.diag(torch.arange(2.0).to(a))))


def column(attend: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The first entry of each step of the first head."""
    return lambda x: attend(x)[:, 0, :, 0]


def bilinear() -> Setup:
    return given(as_float64(lambda: nn.Bilinear(3, 2, 4)), rounded(4, 3), rounded(4, 2))


def embedding(index: Tensor) -> Recipe:
    """Integers beside the input, for each row or for all."""

    def recipe() -> Setup:
        table = as_float64(lambda: nn.Embedding(6, 3))
        func = lambda x, i: (x * table(i)).sin().cumsum(-1)[:, 1:]
        return given(func, rounded(4, 3), index)

    return recipe


def parameters() -> Setup:
    """Second derivatives by the parameters, which all rows share."""
    module = as_float64(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh()))
    parameters = {k: p.detach().clone() for k, p in module.named_parameters()}
    func = lambda x, p: torch.func.functional_call(module, p, (x,))
    return given(func, rounded(2, 3), parameters)


def sparse() -> Setup:
    matrix = (rounded(2, 3) * torch.tensor([[1, 0, 1], [0, 1, 0]])).to_sparse()
    return given(lambda x: (matrix @ (x * x[:, :1]).T).T, rounded(4, 3))


def trees() -> Setup:
    w = rounded(2, 3)
    func = lambda d: {"z": d["b"].sin() @ w * d["a"], "c": {"a": (d["a"] * d["b"][:, :1]).sum(-1)}}
    return given(func, {"b": rounded(4, 2), "a": rounded(4, 3)})


# --- the table ---------------------------------------------------------------------------


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "glu": lambda: nn.Sequential(nn.Linear(5, 10), nn.GLU()),
    "softmax": lambda: nn.Softmax(-1),
    "log_softmax": lambda: nn.LogSoftmax(-1),
    "layer_norm": lambda: nn.LayerNorm(5),
    "rms_norm": lambda: nn.RMSNorm(5),
    "relu": nn.ReLU,
    "tanh_relu": nets.after_tanh(nn.ReLU),
    "silu_relu_inplace": lambda: nn.Sequential(nn.SiLU(), nn.ReLU(inplace=True)),
    "tanh_leaky_relu": nets.after_tanh(nn.LeakyReLU),
    "tanh_prelu": nets.after_tanh(lambda: nn.PReLU(5)),
    "tanh_batch_norm": nets.after_tanh(lambda: nets.moved(nn.BatchNorm1d(5))),
    "tanh_dropout": nets.after_tanh(nn.Dropout),
}
CANNOT = {
    "layer_norm": "rev_over_fwd fwd_over_fwd",
    "rms_norm": "taylor",
    "silu_relu_inplace": "taylor",
}
TWINS = {"layer_norm": nets.explicit_norms}
MLPS = [
    Case(f"mlp_{name}", net(nets.steep_mlp(inner)), CANNOT.get(name, ""), twin=TWINS.get(name))
    for name, inner in ACTIVATIONS.items()
]


CONVS = [
    Case("conv1d", conv(lambda: nn.Conv1d(2, 2, 2), 2, 3)),
    *[
        Case(
            f"conv1d_{mode}",
            conv(lambda mode=mode: nn.Conv1d(1, 2, 3, padding=1, padding_mode=mode), 1, 3),
            "taylor" * (mode == "circular"),
        )
        for mode in ("zeros", "reflect", "circular", "replicate")
    ],
    Case("conv_transpose", conv(lambda: nn.ConvTranspose1d(2, 1, 2), 2, 2)),
    Case("conv2d_avg_pool", conv2d(lambda: nn.AvgPool2d(2))),
    Case("conv2d_max_pool", conv2d(lambda: nn.MaxPool2d(2))),
    Case("conv2d_batch_norm", conv2d(lambda: nets.moved(nn.BatchNorm2d(2)))),
    Case("conv2d_group_norm", conv2d(lambda: nn.GroupNorm(2, 2))),
    Case(
        "conv2d_instance_norm",
        conv2d(lambda: nn.InstanceNorm2d(2)),
        "fwd_over_rev rev_over_fwd fwd_over_fwd",
        twin=nets.explicit_norms,
    ),
    Case("upsample", on(lambda x: F.interpolate(x.sin(), scale_factor=2, mode="linear"), 4, 1, 3)),
]

ATTENTION = [
    Case("attention_with_weights", net(lambda: nets.SummedAttention(True), 4, 2, 4)),
    Case("attention", net(lambda: nets.SummedAttention(False), 4, 2, 4), "second", twin=fn.in_math),
    Case("attention_math", net(lambda: nets.Math(nets.SummedAttention(False)), 4, 2, 4)),
    Case("sdpa", on(column(fn.sdpa), 4, 1, 2, 3), "second", twin=fn.in_math),
    Case("sdpa_math", on(column(fn.in_math(fn.sdpa)), 4, 1, 2, 3)),
    Case("sdpa_math_masked", on(column(fn.in_math(fn.sdpa_masked)), 4, 1, 3, 2)),
    Case("encoder_layer", net(nets.encoder_layer, 4, 2, 4), "second", twin=nets.plainly),
    Case(
        "encoder_layer_math",
        net(lambda: nets.Math(nets.encoder_layer()), 4, 2, 4),
        "fwd_over_rev rev_over_fwd fwd_over_fwd",
        twin=nets.plainly,
    ),
]

MODULES = [
    Case("buffers_weight_norm", net(nets.Buffers)),
    Case("tied", net(lambda: nets.Tied(outputs=2))),
    Case("residual", net(nets.Residual)),
    Case(
        "prelu_of_batch_size", net(lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.PReLU(4)))
    ),
    Case("checkpoint", net(lambda: nets.Checkpointed(nets.steep_mlp()()))),
    Case("forward_hook", net(nets.Hooked)),
    Case("frozen", net(lambda: nets.steep_mlp()().requires_grad_(False))),
    Case("bilinear", bilinear, keywords={"argnums": (1, 0)}),
    Case("lstm", net(lambda: nets.LastStep(nn.LSTM(3, 2, batch_first=True)), 4, 2, 3), "taylor"),
    Case("gru", net(lambda: nets.LastStep(nn.GRU(3, 2, batch_first=True)), 4, 2, 3), "taylor"),
    Case("scripted", scripted, "taylor"),
    Case("traced", traced, "taylor"),
    Case("scripted_part", net(lambda: nets.Partly(nets.steep_mlp()(), nn.Linear(2, 4))), "taylor"),
    Case("embedding", embedding(torch.tensor([0, 5, 2, 2]))),
    Case("embedding_shared", embedding(torch.tensor([2])), keywords={"in_dims": (0, None)}),
    Case("parameters", parameters, "taylor", keywords={"in_dims": (0, None), "argnums": 1}),
]

near = lambda x: 0.7 * x.tanh()  # in (-1, 1), where inverse functions are smooth
away = lambda x: 1 + x * x  # away from zero
POINTWISE = [
    Case(
        "exponentials",
        on(fn.several(torch.exp, torch.expm1, lambda x: away(x).log(), lambda x: near(x).log1p())),
    ),
    Case(
        "powers", on(fn.several(torch.square, torch.sinc, lambda x: x**3, lambda x: away(x).sqrt()))
    ),
    Case(
        "roots",
        on(fn.several(lambda x: 1 / away(x), lambda x: away(x).rsqrt(), lambda x: away(x) ** -1.5)),
    ),
    Case(
        "trigonometric", on(fn.several(torch.sin, torch.cos, lambda x: near(x).tan(), torch.atan))
    ),
    Case("hyperbolic", on(fn.several(torch.sinh, torch.cosh, torch.tanh, torch.asinh))),
    Case(
        "inverse", on(fn.several(*[lambda x, f=f: f(near(x)) for f in (torch.asin, torch.atanh)]))
    ),
    Case("special", on(fn.several(torch.erf, F.logsigmoid, lambda x: away(x).lgamma()))),
    Case(
        "steps",
        on(
            fn.several(
                lambda x: x.abs() * x.exp(), lambda x: x**2 * x.round(), lambda x: x.frac() ** 3
            )
        ),
    ),
    Case("hard", on(fn.several(F.hardtanh, F.hardswish, F.softshrink, F.relu6, F.celu, F.selu))),
    Case("clamp", on(lambda x: (x * x[:, :1]).clamp(-0.5, 0.8).exp())),
    Case("where", on(lambda x: torch.where(x > 0, x**3, x.sin()) * x.sum(-1, True))),
    Case("scalar_rows", on(lambda x: (x**3).sum(-1) * x[:, 0])),
    Case("linear", const(lambda x, w, b: x @ w + b, (4, 3), (3, 2), (2,))),
    Case(
        "quadratic", const(lambda x, a: torch.einsum("bi,oij,bj->bo", x, a, x), (4, 3), (2, 3, 3))
    ),
    Case("constant", on(lambda x: x.new_ones(len(x), 2))),
    Case("partly_constant", on(lambda x: (x.new_ones(len(x), 2), x**3))),
]

SHAPES = [
    Case("pieces", on(fn.pieces)),
    Case("indexed", on(fn.indexed)),
    Case("scattered", on(fn.scattered)),
    Case("padded", on(fn.padded)),
    Case("scatter_prod", on(fn.scatter_prod)),
    Case("sparse", sparse, "taylor"),
    *[Case("grid_sample", const(fn.grid_sample, (4, 1, 1, 2), (1, 1, 3, 3)))] * SINCE_2_13,
    Case("triangles", on(fn.triangles)),
    Case("matrix_rows", const(lambda x, w: w @ x.sin() * x[:, :1], (4, 3, 2), (4, 3))),
    Case("outer", on(lambda x: (x[:, :, None] * x.exp()[:, None, :])[:, :2])),
    Case("einsum", on(lambda x: torch.einsum("bi,bj,bk->bi", x, x.sin(), x * x)[:, :2])),
    Case("kron", on(torch.vmap(lambda x: torch.kron(x[:2], x.sin())[:4]))),
    Case("cross", on(lambda x: torch.linalg.cross(x, x.roll(1, -1).exp())[:, 1:])),
]

REDUCTIONS = [
    Case("logsumexp", on(lambda x: (x * x).logsumexp(-1, keepdim=True))),
    Case("log_softmax", on(lambda x: (x * x).log_softmax(-1)[:, :2])),
    Case("masked_softmax", on(fn.masked_softmax)),
    Case("norm", on(lambda x: x.norm(dim=-1, keepdim=True) * x[:, 1:])),
    Case("norm_3", on(lambda x: torch.linalg.vector_norm(x, 3, dim=-1))),
    Case("normalize", on(lambda x: F.normalize(x, dim=-1)[:, :2])),
    Case(
        "cosine",
        const(lambda x, c: F.cosine_similarity(x[:, None], c, dim=-1), (4, 3), (2, 3)),
        "taylor",
    ),
    Case(
        "var_std",
        on(fn.several(lambda x: x.var(-1, keepdim=True), lambda x: x.exp().std(-1, keepdim=True))),
    ),
    Case("cumsum", on(lambda x: (x * x).cumsum(-1) * x)),
    Case("cumprod", on(lambda x: x.cumprod(-1))),
    Case("prod", on(lambda x: x.prod(-1, keepdim=True) * x[:, :2])),
    Case("prod_with_zeros", lambda: given(lambda x: x.prod(-1), rounded(4, 3) * torch.eye(4, 3))),
    Case("logcumsumexp", on(lambda x: (x * x).logcumsumexp(-1)), "taylor third"),
    Case("ranked", on(fn.ranked)),
    Case("cummax", on(lambda x: (x * x).cummax(-1).values * x)),
    Case("quantile", on(lambda x: torch.quantile(x * x, 0.3, dim=-1))),
    Case("mean_of_mlp", on(lambda x: (x.tanh() ** 3).mean((1, 2)), 4, 3, 2)),
]

SEVERAL = [
    Case("divide", active(lambda x, y: x / y[:, :1], (4, 3), (4, 2)), keywords={"argnums": (0, 1)}),
    Case(
        "power",
        active(lambda x, y: x.exp() ** y[:, :1], (4, 3), (4, 2)),
        keywords={"argnums": (1, 0)},
    ),
    Case(
        "atan2",
        active(lambda x, y: torch.atan2(x[:, :2], y), (4, 3), (4, 2)),
        keywords={"argnums": (0, 1)},
    ),
    Case(
        "matmul",
        active(lambda x, y: x.sin() @ y, (4, 2, 3), (4, 3, 1)),
        keywords={"argnums": (0, 1)},
    ),
    Case("maximum", on(lambda x: torch.maximum(x**3, x.sin().flip(-1)) * x.minimum(x.flip(-1)))),
    Case("hypot", on(lambda x: torch.hypot(x[:, :2], x[:, 1:]) * torch.logaddexp(x, -x)[:, :2])),
    Case("lerp", on(lambda x: torch.lerp(x, x.exp(), x.sin()) + torch.addcmul(x, x, x.cos()))),
    Case("xlogy", on(lambda x: torch.xlogy(x, away(x)) * torch.addcdiv(x, x.sin(), away(x)))),
    Case("unused", active(lambda x, y: x.sin() * x, (4, 3), (4, 2)), keywords={"argnums": (0, 1)}),
    Case("losses", active(fn.losses, (4, 3), (4, 3))),
    Case("log_prob", on(fn.log_prob)),
    Case("cross_entropy", active(fn.cross_entropy, (4, 3), torch.tensor([0, 2, 1, 1]))),
    Case(
        "cdist",
        active(torch.cdist, (4, 3), (2, 3)),
        "second",
        keywords={"in_dims": (0, None)},
        twin=fn.by_norm,
    ),
    Case("cdist_mm", active(fn.cdist_mm, (4, 3), (2, 3)), keywords={"in_dims": (0, None)}),
]

LINALG = [
    Case("det", on_matrices(torch.linalg.det)),
    Case("slogdet", on_matrices(lambda a: torch.linalg.slogdet(a).logabsdet)),
    Case("logdet", on_symmetric(torch.logdet)),
    Case("solve", on_matrices(lambda a: torch.linalg.solve(a, a[:, :, 0].sin()))),
    Case("inv", on_matrices(lambda a: torch.linalg.inv(a)[:, 0])),
    Case("cholesky", on_symmetric(lambda a: torch.linalg.cholesky(a).flatten(1)[:, 2:])),
    Case(
        "triangular", on_matrices(lambda a: torch.linalg.solve_triangular(a, a.sin(), upper=True))
    ),
    Case("det_at_identity", lambda: given(fn.det_at_zero, torch.zeros(4, 3) + rounded(4, 1) * 0)),
    Case("qr", on_matrices(lambda a: torch.linalg.qr(a).R.abs().flatten(1)[:, :2])),
    Case("pinv", on_matrices(lambda a: torch.linalg.pinv(a)[:, 1])),
    Case("eig", on_matrices(lambda a: torch.linalg.eigvals(a @ a).abs()), "taylor"),
    Case("eigh", on_symmetric(lambda a: torch.linalg.eigh(a).eigenvalues)),
    Case("svdvals", on_matrices(torch.linalg.svdvals)),
    Case("matrix_exp", on_matrices(lambda a: torch.linalg.matrix_exp(a / 3)[:, 1])),
]

FUNCTIONS = [
    Case("legacy_function", on(lambda x: nets.Legacy.apply(x.sin()) * x), "taylor"),
    Case("modern_function", on(lambda x: nets.Generated.apply(x.sin()) * x), "taylor"),
    Case("function_with_jvp", on(lambda x: nets.WithJvp.apply(x.sin()) * x), "taylor"),
    Case("surrogate", on(lambda x: nets.Surrogate.apply(2 * x) * x), "taylor"),
    Case("vmap", on(torch.vmap(lambda x: torch.stack([x.sum().sin(), x.prod()])))),
    Case(
        "vmap_of_matmul", const(torch.vmap(lambda x, w: (w @ x).tanh(), (0, None)), (4, 3), (2, 3))
    ),
    Case("force", const(fn.force, (4, 3), (3, 2)), "taylor"),
    Case("func_force", const(fn.func_force, (4, 3), (3, 2)), "taylor"),
    Case(
        "func_tangent", on(lambda x: torch.func.jvp(torch.sigmoid, (x,), (torch.ones_like(x),))[1])
    ),
    Case("fourier", on(fn.fourier), "taylor"),
    Case("polar", on(fn.polar), "taylor"),
    Case("detach", on(lambda x: x.detach().cos() * x.sin())),
    Case("no_grad", on(fn.partly_blind)),
    Case("fill_new_zeros", on(fn.fill_new_zeros), "taylor"),
    Case("fill_zeros", on(fn.fill_zeros), "taylor"),
    Case("change_views", on(fn.change_views), "taylor"),
    Case("change_input", on(fn.change_input), "taylor"),
    Case("sigmoid_", on(lambda x: (x * x).sigmoid_().mul(x)[:, :2]), "taylor"),
    Case("relu_", on(lambda x: F.relu(x, inplace=True) ** 3), "taylor"),
    Case("branch_by_row", on(fn.branch_by_row)),
    Case("branch_by_batch", on(lambda x: x.sin() if bool((x.abs() < 100).all()) else x.cos())),
    Case("assign_masked", on(fn.assign_masked)),
    Case("scatter_masked", on(fn.scatter_selected)),
    Case("converge", on(functools.partial(fn.iterate_to_convergence, tolerance=1e-5))),
]

CALLS = [
    Case(
        "keywords",
        lambda: given(lambda x, *, n, by: (by * x).sin() ** n, rounded(4, 3), n=3, by=0.5),
    ),
    Case("trees", trees),
    Case("tuple", on(lambda x: ((x.sin() * x[:, :1], (x.prod(-1),)), [x[:, :2].exp()]))),
    Case("argnums", active(fn.product, (4, 3), (4, 2), (4, 1)), keywords={"argnums": (2, 0)}),
    Case("argnums_negative", active(fn.product, (4, 3), (4, 2), (4, 1)), keywords={"argnums": -2}),
    Case("shared", active(fn.shared, (4, 3), (2, 3)), keywords={"in_dims": (0, None)}),
    Case(
        "shared_twice",
        active(fn.shared, (4, 3), (2, 3)),
        "taylor",
        keywords={"in_dims": (0, None), "argnums": (0, 1)},
    ),
    Case(
        "in_dims", active(fn.columns, (3, 4), (4, 2)), keywords={"in_dims": (1, 0), "out_dims": 1}
    ),
    Case(
        "dims_last",
        const(lambda x, w: (w @ x).exp(), (2, 3, 4), (2, 3)),
        keywords={"in_dims": -1, "out_dims": -1},
    ),
    Case("method", lambda: given(as_float64(nets.steep_mlp()).forward, rounded(4, 3))),
    Case("partial", active(functools.partial(fn.product, c=torch.tensor(2.0)), (4, 3), (4, 2))),
    Case("zero_d_rows", on(lambda x: torch.stack([x.sin(), x**3], 1), 4)),
    Case("transposed", lambda: given(lambda x: (x * x).cumsum(-1), rounded(3, 4).T)),
]

CASES = [
    *MLPS,
    *CONVS,
    *ATTENTION,
    *MODULES,
    *POINTWISE,
    *SHAPES,
    *REDUCTIONS,
    *SEVERAL,
    *LINALG,
    *FUNCTIONS,
    *CALLS,
]
