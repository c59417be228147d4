"""Second derivatives row by row in plain autograd, and functions to take them of.

The first half shares nothing with funcjac: each output element of each row, run as a batch of
one, goes through ``torch.autograd.functional.hessian``; from that come all operators. The
second half is the table. ``case.make()`` draws the same weights and inputs every time, in
float64; ``case.make(torch.float32)`` gives the same numbers, rounded.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import functional

from tests.cases import functions as fn
from tests.oracles import SINCE_2_13

NAMESPACE = "funcjac"
f32, f64 = torch.float32, torch.float64


# --- oracles -----------------------------------------------------------------------------


class Rows(NamedTuple):
    """A batched function as one of flat vectors for each row: ``run[b]: (N,) -> (M,)``."""

    run: list[Callable[[Tensor], Tensor]]
    flat: list[Tensor]  # one (N,) for each row
    in_spec: Any
    in_shapes: list[torch.Size]
    out_spec: Any
    out_shapes: list[torch.Size]

    def as_output(self, flat: Tensor) -> Any:
        """``(B, M)`` in the structure of the output, ``(B, *out)``."""
        return optree.tree_unflatten(self.out_spec, _split(flat, 1, self.out_shapes))

    def as_jacobian(self, flat: Tensor) -> Any:
        """``(B, M, N)`` with the input structure inside that of the output."""
        outs = _split(flat, 1, self.out_shapes)
        last = [_split(out, out.ndim - 1, self.in_shapes) for out in outs]
        inner = [optree.tree_unflatten(self.in_spec, leaves) for leaves in last]
        return optree.tree_unflatten(self.out_spec, inner)

    def as_hessian(self, flat: Tensor) -> Any:
        """``(B, M, N, N)`` with the input structure twice inside that of the output."""
        trees = []
        for out in _split(flat, 1, self.out_shapes):
            rows = []
            for row in _split(out, out.ndim - 2, self.in_shapes):
                leaves = _split(row, row.ndim - 1, self.in_shapes)
                rows.append(optree.tree_unflatten(self.in_spec, leaves))
            trees.append(optree.tree_unflatten(self.in_spec, rows))
        return optree.tree_unflatten(self.out_spec, trees)


class Derivatives(NamedTuple):
    rows: Rows
    value: Tensor  # (B, M)
    jac: Tensor  # (B, M, N)
    hess: Tensor  # (B, M, N, N)

    def diagonal(self) -> Tensor:
        return self.hess.diagonal(dim1=2, dim2=3)

    def laplacian(self, weight: Tensor | None = None) -> Tensor:
        """``(B, M)``; ``weight`` is a matrix ``(N, N)``, or one for each row."""
        if weight is None:
            return self.diagonal().sum(2)
        return torch.einsum("bmij,bij->bm", self.hess, weight.expand(len(self.hess), -1, -1))


def derivatives(func, args, kwargs=None, *, create_graph=False, **words) -> Derivatives:
    """Value, Jacobian and Hessian of each row; with ``create_graph`` attached to everything."""
    rows = by_row(func, args, kwargs, create_graph=create_graph, **words)
    values, jacs, hessians = [], [], []
    for run, z in zip(rows.run, rows.flat):
        values.append(run(z))
        jacs.append(functional.jacobian(run, z, create_graph=create_graph))
        found = [
            functional.hessian(lambda z: run(z)[m], z, create_graph=create_graph)
            for m in range(len(values[-1]))
        ]
        hessians.append(torch.stack(found) if found else z.new_zeros(0, len(z), len(z)))
    return Derivatives(rows, torch.stack(values), torch.stack(jacs), torch.stack(hessians))


def hessian(func, args, kwargs=None, **words):
    found = derivatives(func, args, kwargs, **words)
    return found.rows.as_hessian(found.hess)


def diagonal(func, args, kwargs=None, **words):
    found = derivatives(func, args, kwargs, **words)
    return found.rows.as_jacobian(found.diagonal())


def laplacian(func, args, kwargs=None, *, weight=None, **words):
    found = derivatives(func, args, kwargs, **words)
    return found.rows.as_output(found.laplacian(weight))


def divergence(func, args, kwargs=None, *, create_graph=False, **words) -> Tensor:
    """``(B,)``: the trace of each row's Jacobian."""
    rows = by_row(func, args, kwargs, create_graph=create_graph, **words)
    return torch.stack(
        [
            functional.jacobian(run, z, create_graph=create_graph).trace()
            for run, z in zip(rows.run, rows.flat)
        ]
    )


def partials(func, args, indices, kwargs=None, *, create_graph=False, **words) -> tuple:
    """Mixed partials of any order by nested ``torch.autograd.grad``, one output at a time."""
    rows = by_row(func, args, kwargs, create_graph=create_graph, **words)
    found = []
    for index in indices:
        flat = []
        for run, z in zip(rows.run, rows.flat):
            attached = create_graph and z.requires_grad
            z = z.clone() if attached else z.detach().requires_grad_()
            with torch.enable_grad():
                outs = [out if out.requires_grad else out + 0 * z.sum() for out in run(z)]
                for i in index:
                    outs = [_slope(out, z)[i] for out in outs]
            flat.append(torch.stack(outs) if create_graph else torch.stack(outs).detach())
        found.append(rows.as_output(torch.stack(flat)))
    return tuple(found)


def _slope(out: Tensor, z: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(out, z, create_graph=True, materialize_grads=True)
    return grad if grad.requires_grad else grad + 0 * z  # a constant has derivatives too


def by_row(
    func, args, kwargs=None, *, argnums=0, in_dims=0, out_dims=0, create_graph=False
) -> Rows:
    leaves, spec = optree.tree_flatten(args, none_is_leaf=True, namespace=NAMESPACE)
    dims = optree.broadcast_prefix(in_dims, args, none_is_leaf=True, namespace=NAMESPACE)
    dims = [dim if isinstance(leaf, Tensor) else None for leaf, dim in zip(leaves, dims)]
    wanted = [argnums] if isinstance(argnums, int) else list(argnums)
    inputs = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums)
    sizes = [optree.tree_structure(a, none_is_leaf=True, namespace=NAMESPACE) for a in args]
    sizes = [tree.num_leaves for tree in sizes]
    diff = []
    for a in wanted:
        start = sum(sizes[: a % len(args)])
        diff += [i for i in range(start, start + sizes[a]) if isinstance(leaves[i], Tensor)]
    batch = next(x.shape[dim] for x, dim in zip(leaves, dims) if dim is not None)
    seen = {}

    def row_of(b):
        row = [x if dim is None else x.narrow(dim, b, 1) for x, dim in zip(leaves, dims)]
        pieces = [row[i] for i in diff]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])

        def run(z):
            given = [x.clone() if isinstance(x, Tensor) else x for x in row]
            for i, part in zip(diff, z.split([piece.numel() for piece in pieces])):
                given[i] = part.reshape(row[i].shape).clone()  # func may work in place
            out = func(*optree.tree_unflatten(spec, given), **(kwargs or {}))
            outs, seen["spec"] = optree.tree_flatten(out, namespace=NAMESPACE)
            where = optree.broadcast_prefix(out_dims, out, namespace=NAMESPACE)
            outs = [leaf.movedim(dim, 0)[0] for leaf, dim in zip(outs, where)]
            seen["shapes"] = [leaf.shape for leaf in outs]
            return torch.cat([leaf.reshape(-1) for leaf in outs])

        return run, flat if create_graph else flat.detach()

    runs, flat = zip(*map(row_of, range(batch)))
    runs[0](flat[0])  # for the structure of the output
    shapes = [
        leaves[i].shape if dims[i] is None else leaves[i].select(dims[i], 0).shape for i in diff
    ]
    in_spec = optree.tree_structure(inputs, namespace=NAMESPACE)
    return Rows(list(runs), list(flat), in_spec, shapes, seen["spec"], seen["shapes"])


def _split(flat: Tensor, dim: int, shapes: list[torch.Size]) -> list[Tensor]:
    """Take dimension ``dim`` apart into one tensor for each of ``shapes``."""
    parts = flat.split([shape.numel() for shape in shapes], dim)
    return [
        part.reshape(*part.shape[:dim], *shape, *part.shape[dim + 1 :])
        for part, shape in zip(parts, shapes)
    ]


# --- the table ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One function.

    Attributes:
        recipe: makes the function, its arguments and the words to transform it with.
        cannot: modes that need not manage, for torch is wrong there or operations cannot be
            recorded: a documented error is allowed, a wrong number nowhere. ``third``: torch
            has no third derivative of it; ``second``: plain autograd has no second.
        kwargs: keyword arguments of the call.
        twin: makes of the function the same one from operations that plain autograd
            differentiates twice, where it does not differentiate those of ``recipe``.
    """

    name: str
    recipe: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]
    cannot: str = ""
    kwargs: dict[str, Any] = field(default_factory=dict)
    twin: Callable[..., Any] | None = None

    def make(self, dtype: torch.dtype = f64):
        """``(func, args, words)``."""
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript says that it is old
            torch.manual_seed(0)
            torch.set_default_dtype(dtype)  # what ``rand`` and ``net`` of the recipes go by
            try:
                return self.recipe()
            finally:
                torch.set_default_dtype(before)

    def yardstick(self):
        """``(func, args, words)`` for the oracle."""
        func, args, words = self.make()
        return (self.twin(func) if self.twin else func), args, words

    def can(self, *words: str) -> bool:
        return not {*words} & {*self.cannot.split()}


on, net, active, const, several = fn.on, fn.net, fn.active, fn.const, fn.several
rand = fn.rand
matrices, spd = fn.on_matrices, fn.on_symmetric

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
    "tanh_relu": fn.after_tanh(nn.ReLU),
    "silu_relu_inplace": lambda: nn.Sequential(nn.SiLU(), nn.ReLU(inplace=True)),
    "tanh_leaky_relu": fn.after_tanh(nn.LeakyReLU),
    "tanh_prelu": fn.after_tanh(lambda: nn.PReLU(5)),
    "tanh_batch_norm": fn.after_tanh(lambda: fn.moved(nn.BatchNorm1d(5))),
    "tanh_dropout": fn.after_tanh(nn.Dropout),
}
CANNOT = {
    "layer_norm": "rev_over_fwd fwd_over_fwd",
    "rms_norm": "taylor",
    "silu_relu_inplace": "taylor",
}
TWINS = {"layer_norm": fn.explicit_norms}
MLPS = [
    Case(f"mlp_{name}", net(fn.mlp(inner)), CANNOT.get(name, ""), twin=TWINS.get(name))
    for name, inner in ACTIVATIONS.items()
]


CONVS = [
    Case("conv1d", fn.conv(lambda: nn.Conv1d(2, 2, 2), 2, 3)),
    *[
        Case(
            f"conv1d_{mode}",
            fn.conv(lambda mode=mode: nn.Conv1d(1, 2, 3, padding=1, padding_mode=mode), 1, 3),
            "taylor" * (mode == "circular"),
        )
        for mode in ("zeros", "reflect", "circular", "replicate")
    ],
    Case("conv_transpose", fn.conv(lambda: nn.ConvTranspose1d(2, 1, 2), 2, 2)),
    Case("conv2d_avg_pool", fn.conv2d(lambda: nn.AvgPool2d(2))),
    Case("conv2d_max_pool", fn.conv2d(lambda: nn.MaxPool2d(2))),
    Case("conv2d_batch_norm", fn.conv2d(lambda: fn.moved(nn.BatchNorm2d(2)))),
    Case("conv2d_group_norm", fn.conv2d(lambda: nn.GroupNorm(2, 2))),
    Case(
        "conv2d_instance_norm",
        fn.conv2d(lambda: nn.InstanceNorm2d(2)),
        "fwd_over_rev rev_over_fwd fwd_over_fwd",
        twin=fn.explicit_norms,
    ),
    Case("upsample", on(lambda x: F.interpolate(x.sin(), scale_factor=2, mode="linear"), 4, 1, 3)),
]

ATTENTION = [
    Case("attention_with_weights", net(lambda: fn.SelfAttention(True), 4, 2, 4)),
    Case("attention", net(lambda: fn.SelfAttention(False), 4, 2, 4), "second", twin=fn.in_math),
    Case("attention_math", net(lambda: fn.Math(fn.SelfAttention(False)), 4, 2, 4)),
    Case("sdpa", on(fn.sdpa, 4, 1, 2, 3), "second", twin=fn.in_math),
    Case("sdpa_math", on(fn.in_math(fn.sdpa), 4, 1, 2, 3)),
    Case("sdpa_math_masked", on(fn.in_math(fn.sdpa_masked), 4, 1, 3, 2)),
    Case("encoder_layer", net(fn.encoder_layer, 4, 2, 4), "second", twin=fn.plainly),
    Case(
        "encoder_layer_math",
        net(lambda: fn.Math(fn.encoder_layer()), 4, 2, 4),
        "fwd_over_rev rev_over_fwd fwd_over_fwd",
        twin=fn.plainly,
    ),
]

MODULES = [
    Case("buffers_weight_norm", net(fn.Buffers)),
    Case("tied", net(fn.Tied)),
    Case("residual", net(fn.Residual)),
    Case(
        "prelu_of_batch_size", net(lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.PReLU(4)))
    ),
    Case("checkpoint", net(fn.Checkpointed)),
    Case("forward_hook", net(fn.Hooked)),
    Case("frozen", net(lambda: fn.mlp()().requires_grad_(False))),
    Case("bilinear", fn.bilinear),
    Case("lstm", net(lambda: fn.First(nn.LSTM(3, 2, batch_first=True)), 4, 2, 3), "taylor"),
    Case("gru", net(lambda: fn.First(nn.GRU(3, 2, batch_first=True)), 4, 2, 3), "taylor"),
    Case("scripted", fn.scripted(fn.mlp()), "taylor"),
    Case("traced", fn.traced(fn.mlp()), "taylor"),
    Case("scripted_part", net(fn.Partly), "taylor"),
    Case("embedding", fn.embedding(torch.tensor([0, 5, 2, 2]))),
    Case("embedding_shared", fn.embedding(torch.tensor([2]), in_dims=(0, None))),
    Case(
        "parameters", fn.parameters_of(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh())), "taylor"
    ),
]

near = lambda x: 0.7 * x.tanh()  # in (-1, 1), where inverse functions are smooth
away = lambda x: 1 + x * x  # away from zero
POINTWISE = [
    Case(
        "exponentials",
        on(several(torch.exp, torch.expm1, lambda x: away(x).log(), lambda x: near(x).log1p())),
    ),
    Case("powers", on(several(torch.square, torch.sinc, lambda x: x**3, lambda x: away(x).sqrt()))),
    Case(
        "roots",
        on(several(lambda x: 1 / away(x), lambda x: away(x).rsqrt(), lambda x: away(x) ** -1.5)),
    ),
    Case("trigonometric", on(several(torch.sin, torch.cos, lambda x: near(x).tan(), torch.atan))),
    Case("hyperbolic", on(several(torch.sinh, torch.cosh, torch.tanh, torch.asinh))),
    Case("inverse", on(several(*[lambda x, f=f: f(near(x)) for f in (torch.asin, torch.atanh)]))),
    Case("special", on(several(torch.erf, F.logsigmoid, lambda x: away(x).lgamma()))),
    Case(
        "steps",
        on(
            several(
                lambda x: x.abs() * x.exp(), lambda x: x**2 * x.round(), lambda x: x.frac() ** 3
            )
        ),
    ),
    Case("hard", on(several(F.hardtanh, F.hardswish, F.softshrink, F.relu6, F.celu, F.selu))),
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
    Case("sparse", fn.sparse, "taylor"),
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
        on(several(lambda x: x.var(-1, keepdim=True), lambda x: x.exp().std(-1, keepdim=True))),
    ),
    Case("cumsum", on(lambda x: (x * x).cumsum(-1) * x)),
    Case("cumprod", on(lambda x: x.cumprod(-1))),
    Case("prod", on(lambda x: x.prod(-1, keepdim=True) * x[:, :2])),
    Case("prod_with_zeros", lambda: (lambda x: x.prod(-1), (rand(4, 3) * torch.eye(4, 3),), {})),
    Case("logcumsumexp", on(lambda x: (x * x).logcumsumexp(-1)), "taylor third"),
    Case("ranked", on(fn.ranked)),
    Case("cummax", on(lambda x: (x * x).cummax(-1).values * x)),
    Case("quantile", on(lambda x: torch.quantile(x * x, 0.3, dim=-1))),
    Case("mean_of_mlp", on(lambda x: (x.tanh() ** 3).mean((1, 2)), 4, 3, 2)),
]

SEVERAL = [
    Case("divide", active(lambda x, y: x / y[:, :1], (4, 3), (4, 2), argnums=(0, 1))),
    Case("power", active(lambda x, y: x.exp() ** y[:, :1], (4, 3), (4, 2), argnums=(1, 0))),
    Case("atan2", active(lambda x, y: torch.atan2(x[:, :2], y), (4, 3), (4, 2), argnums=(0, 1))),
    Case("matmul", active(lambda x, y: x.sin() @ y, (4, 2, 3), (4, 3, 1), argnums=(0, 1))),
    Case("maximum", on(lambda x: torch.maximum(x**3, x.sin().flip(-1)) * x.minimum(x.flip(-1)))),
    Case("hypot", on(lambda x: torch.hypot(x[:, :2], x[:, 1:]) * torch.logaddexp(x, -x)[:, :2])),
    Case("lerp", on(lambda x: torch.lerp(x, x.exp(), x.sin()) + torch.addcmul(x, x, x.cos()))),
    Case("xlogy", on(lambda x: torch.xlogy(x, away(x)) * torch.addcdiv(x, x.sin(), away(x)))),
    Case("unused", active(lambda x, y: x.sin() * x, (4, 3), (4, 2), argnums=(0, 1))),
    Case("losses", active(fn.losses, (4, 3), (4, 3))),
    Case("log_prob", on(fn.log_prob)),
    Case("cross_entropy", active(fn.cross_entropy, (4, 3), torch.tensor([0, 2, 1, 1]))),
    Case(
        "cdist", active(torch.cdist, (4, 3), (2, 3), in_dims=(0, None)), "second", twin=fn.by_norm
    ),
    Case("cdist_mm", active(fn.cdist_mm, (4, 3), (2, 3), in_dims=(0, None))),
]

LINALG = [
    Case("det", matrices(torch.linalg.det)),
    Case("slogdet", matrices(lambda a: torch.linalg.slogdet(a).logabsdet)),
    Case("logdet", spd(torch.logdet)),
    Case("solve", matrices(lambda a: torch.linalg.solve(a, a[:, :, 0].sin()))),
    Case("inv", matrices(lambda a: torch.linalg.inv(a)[:, 0])),
    Case("cholesky", spd(lambda a: torch.linalg.cholesky(a).flatten(1)[:, 2:])),
    Case("triangular", matrices(lambda a: torch.linalg.solve_triangular(a, a.sin(), upper=True))),
    Case("det_at_identity", lambda: (fn.det_at_zero, (torch.zeros(4, 3) + rand(4, 1) * 0,), {})),
    Case("qr", matrices(lambda a: torch.linalg.qr(a).R.abs().flatten(1)[:, :2])),
    Case("pinv", matrices(lambda a: torch.linalg.pinv(a)[:, 1])),
    Case("eig", matrices(lambda a: torch.linalg.eigvals(a @ a).abs()), "taylor"),
    Case("eigh", spd(lambda a: torch.linalg.eigh(a).eigenvalues)),
    Case("svdvals", matrices(torch.linalg.svdvals)),
    Case("matrix_exp", matrices(lambda a: torch.linalg.matrix_exp(a / 3)[:, 1])),
]

FUNCTIONS = [
    Case("legacy_function", on(lambda x: fn.Legacy.apply(x.sin()) * x), "taylor"),
    Case("modern_function", on(lambda x: fn.Modern.apply(x.sin()) * x), "taylor"),
    Case("function_with_jvp", on(lambda x: fn.WithJvp.apply(x.sin()) * x), "taylor"),
    Case("surrogate", on(lambda x: fn.Surrogate.apply(2 * x) * x), "taylor"),
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
    Case("scatter_masked", on(fn.scatter_masked)),
    Case("converge", on(fn.converge)),
]

CALLS = [
    Case("keywords", on(lambda x, *, n, by: (by * x).sin() ** n), kwargs={"n": 3, "by": 0.5}),
    Case("trees", fn.trees),
    Case("tuple", on(lambda x: ((x.sin() * x[:, :1], (x.prod(-1),)), [x[:, :2].exp()]))),
    Case("argnums", active(fn.product, (4, 3), (4, 2), (4, 1), argnums=(2, 0))),
    Case("argnums_negative", active(fn.product, (4, 3), (4, 2), (4, 1), argnums=-2)),
    Case("shared", active(fn.shared, (4, 3), (2, 3), in_dims=(0, None))),
    Case(
        "shared_twice",
        active(fn.shared, (4, 3), (2, 3), in_dims=(0, None), argnums=(0, 1)),
        "taylor",
    ),
    Case("in_dims", active(fn.columns, (3, 4), (4, 2), in_dims=(1, 0), out_dims=1)),
    Case(
        "dims_last", const(lambda x, w: (w @ x).exp(), (2, 3, 4), (2, 3), in_dims=-1, out_dims=-1)
    ),
    Case("method", lambda: (fn.as_float64(fn.mlp()).forward, (rand(4, 3),), {})),
    Case("partial", active(functools.partial(fn.product, c=torch.tensor(2.0)), (4, 3), (4, 2))),
    Case("zero_d_rows", on(lambda x: torch.stack([x.sin(), x**3], 1), 4)),
    Case("transposed", lambda: (lambda x: (x * x).cumsum(-1), (rand(3, 4).T,), {})),
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
