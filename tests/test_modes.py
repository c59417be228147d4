"""Which of torch's forward formulas are wrong once differentiated again, found by trying.

Three ways to the same second derivative in float64: reverse over reverse, and through forward
mode. Reverse over reverse is believed once central differences of the gradient confirm it.
"""

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev
from torch.nn import functional as F

from funcjac._modes import UNSAFE_FORWARD, Recorder, Route, prefers_forward, routes
from tests.oracles import SINCE_2_13

# These run on other devices only, or stand in for one that runs here.
ELSEWHERE = {
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
}
SHIFT = 1e-5


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def square(x):
    """A regular matrix of six numbers that is not symmetric."""
    return torch.stack([3 + x[0].sin(), x[1], x[2], x[3], 4 + x[4].cos(), x[5], x[1] * x[2], x[0],
                        5 + x[3] * x[4]]).reshape(3, 3)  # fmt: skip


def positive(x):
    matrix = square(x)
    return matrix @ matrix.mT + torch.eye(3).to(x)


def wide(x):
    return x.reshape(2, 3)


def image(x):
    """``(1, 1, 4, 4)``, smooth in six numbers and without ties."""
    steps = torch.arange(16, dtype=x.dtype) / 7
    return (x.repeat(3)[:16] * (1 + steps)).sin().reshape(1, 1, 4, 4)


WEIGHT = torch.linspace(-1, 1, 9, dtype=torch.float64).sin()
GRU, LSTM = nn.GRUCell(3, 3), nn.LSTMCell(3, 3)
TARGET = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)

ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "softshrink": F.softshrink,
    "hardtanh": F.hardtanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "logsigmoid": F.logsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "glu": lambda x: F.glu(x, 0),
    "prelu": lambda x: F.prelu(x, WEIGHT[:1]),
    "threshold": lambda x: F.threshold(x, 0.1, 0.0),
}
POINTWISE = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(x**2),
    "sqrt": lambda x: (x**2 + 1).sqrt(),
    "rsqrt": lambda x: (x**2 + 1).rsqrt(),
    "reciprocal": lambda x: (x**2 + 1).reciprocal(),
    "sin": torch.sin,
    "sinc": torch.sinc,
    "asinh": torch.asinh,
    "atan2": lambda x: torch.atan2(x[:3], 2 + x[3:] ** 2),
    "hypot": lambda x: torch.hypot(x[:3], 1 + x[3:] ** 2),
    "pow": lambda x: (x**2 + 1) ** x,
    "erf": torch.erf,
    "erfinv": lambda x: torch.erfinv(x.tanh() / 2),
    "lgamma": lambda x: torch.lgamma(x**2 + 1),
    "digamma": lambda x: torch.digamma(x**2 + 1),
    "xlogy": lambda x: torch.xlogy(x[:3], x[3:] ** 2 + 1),
    "logaddexp": lambda x: torch.logaddexp(x[:3], x[3:]),
    "maximum": lambda x: torch.maximum(x[:3] ** 2, x[3:] ** 2),
    "where": lambda x: torch.where(x > 0, x.sin(), x**3),
    "clamp": lambda x: (x**2).clamp(0.1, 2),
    "lerp": lambda x: torch.lerp(x[:2], x[2:4], x[4:]),
    "addcdiv": lambda x: torch.addcdiv(x[:2], x[2:4], 1 + x[4:] ** 2),
    "i0": torch.special.i0,
    "i1e": torch.special.i1e,
    "ndtri": lambda x: torch.special.ndtri(x.sigmoid()),
    "log_ndtr": torch.special.log_ndtr,
    "entr": lambda x: torch.special.entr(x**2),
    "polygamma": lambda x: torch.polygamma(1, x**2 + 1),
    "mvlgamma": lambda x: torch.mvlgamma(x**2 + 1, 2),
    "logit": lambda x: torch.logit(x.sigmoid() / 2),
    "copysign": lambda x: torch.copysign(x**2, x),
    "fmod": lambda x: torch.fmod(x**2, 0.7),
    "float_power": lambda x: torch.float_power(x, 3),
    "ldexp": lambda x: torch.ldexp(x, x),
    "acosh": lambda x: torch.acosh(x**2 + 1.5),
    "softmax of products": lambda x: (x[:3, None] * x[None, 3:]).softmax(1),
    "abs": torch.abs,
    "remainder": lambda x: torch.remainder(x**2, 0.7),
    "nan_to_num": lambda x: (x**2).nan_to_num(),
}
REDUCTIONS = {
    "sum": lambda x: x.sin().sum(),
    "mean": lambda x: (x**2).mean(),
    "prod": torch.prod,
    "prod with a zero": lambda x: (x * torch.tensor([0.0, 1, 1, 1, 1, 1]).to(x)).prod(),
    "prod of a dim": lambda x: wide(x).prod(1),
    "var": torch.var,
    "std": torch.std,
    "var_mean": lambda x: torch.stack(torch.var_mean(wide(x), 1)),
    "norm": torch.linalg.vector_norm,
    "norm 3": lambda x: torch.linalg.vector_norm(x, 3),
    "norm 1": lambda x: torch.linalg.vector_norm(x**2, 1),
    "matrix_norm": lambda x: torch.linalg.matrix_norm(square(x)),
    "nuclear norm": lambda x: torch.linalg.matrix_norm(square(x), "nuc"),
    "spectral norm": lambda x: torch.linalg.matrix_norm(square(x), 2),
    "normalize": lambda x: F.normalize(wide(x)),
    "logsumexp": lambda x: x.logsumexp(0),
    "cumsum": lambda x: x.sin().cumsum(0),
    "cumprod": lambda x: x.cumprod(0),
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "cummax": lambda x: (x**2).cummax(0).values,
    "max": lambda x: (x**2).max(),
    "amax": lambda x: (wide(x) ** 2).amax(1),
    "aminmax": lambda x: torch.stack(torch.aminmax(x**2)),
    "median": lambda x: (x**2).median(),
    "quantile": lambda x: torch.quantile(x**2, 0.3),
    "softmax": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(0),
    "softmin": lambda x: F.softmin(x, 0),
    "diff": lambda x: (x**3).diff(),
    "trapezoid": lambda x: torch.trapezoid(x**3),
    "renorm": lambda x: wide(x).renorm(2, 0, 0.5),
    "cosine_similarity": lambda x: F.cosine_similarity(x[:3], x[3:], 0),
    "pairwise_distance": lambda x: F.pairwise_distance(x[None, :3], x[None, 3:]),
    "dist": lambda x: torch.dist(x[:3], x[3:]),
}
NORMS = {
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "layer_norm of rows": lambda x: F.layer_norm(wide(x), (3,), WEIGHT[:3], WEIGHT[3:6]),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x.reshape(1, 2, 3), 2),
    "instance_norm": lambda x: F.instance_norm(x.reshape(1, 2, 3)),
    "local_response_norm": lambda x: F.local_response_norm(x.reshape(1, 2, 3), 2),
    "batch_norm": lambda x: F.batch_norm(
        wide(x), WEIGHT[:3] * 0, WEIGHT[6:9].abs() + 1, WEIGHT[:3]
    ),
    "batch_norm in training": lambda x: F.batch_norm(wide(x), None, None, training=True),
}
LINALG = {
    "det": lambda x: torch.linalg.det(square(x)),
    "slogdet": lambda x: torch.linalg.slogdet(square(x))[1],
    "logdet": lambda x: torch.logdet(positive(x)),
    "solve": lambda x: torch.linalg.solve(square(x), WEIGHT[:3]),
    "solve with moving right side": lambda x: torch.linalg.solve(square(x), x[:3]),
    "lu_solve": lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(x)), x[:3, None]),
    "lu_factor": lambda x: torch.linalg.lu_factor(square(x))[0],
    "lu": lambda x: torch.linalg.lu(square(x))[2],
    "inv": lambda x: torch.linalg.inv(square(x)),
    "inv_ex": lambda x: torch.linalg.inv_ex(square(x))[0],
    "pinv": lambda x: torch.linalg.pinv(wide(x)),
    "cholesky": lambda x: torch.linalg.cholesky(positive(x)),
    "cholesky_solve": lambda x: torch.cholesky_solve(
        x[:3, None], torch.linalg.cholesky(positive(x))
    ),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(positive(x))),
    "solve_triangular": lambda x: torch.linalg.solve_triangular(
        square(x).tril(), x[:3, None], upper=False
    ),
    "eigvalsh": lambda x: torch.linalg.eigvalsh(positive(x)),
    "eigh": lambda x: torch.linalg.eigh(positive(x))[1].abs(),
    "eigvals": lambda x: torch.linalg.eigvals(positive(x)).real,
    "qr": lambda x: torch.linalg.qr(square(x))[1],
    "svdvals": lambda x: torch.linalg.svdvals(square(x)),
    "svd": lambda x: torch.linalg.svd(square(x))[2].abs(),
    "lstsq": lambda x: torch.linalg.lstsq(square(x), x[:3, None])[0],
    "matrix_exp": lambda x: torch.linalg.matrix_exp(square(x) / 10),
    "matrix_power": lambda x: torch.linalg.matrix_power(square(x), 3),
    "matrix_power -2": lambda x: torch.linalg.matrix_power(square(x), -2),
    "multi_dot": lambda x: torch.linalg.multi_dot([square(x), square(x), x[:3]]),
    "cross": lambda x: torch.linalg.cross(x[:3], x[3:]),
    "trace": lambda x: torch.trace(square(x) @ square(x)),
    "eig": lambda x: torch.linalg.eig(positive(x))[1].abs(),
    "eigvals of any matrix": lambda x: torch.linalg.eigvals(square(x)).abs(),
    "svd u": lambda x: torch.linalg.svd(wide(x), full_matrices=False)[0].abs(),
    "qr q": lambda x: torch.linalg.qr(square(x))[0],
    "qr of a tall matrix": lambda x: torch.linalg.qr(x.reshape(3, 2))[1],
    "householder_product": lambda x: torch.linalg.householder_product(x.reshape(3, 2), x[:2]),
    "tensorinv": lambda x: torch.linalg.tensorinv(square(x).reshape(3, 1, 3, 1), ind=2),
    "cond": lambda x: torch.linalg.cond(square(x)),
    "solve_ex": lambda x: torch.linalg.solve_ex(square(x), WEIGHT[:3])[0],
    "solve from the right": lambda x: torch.linalg.solve(square(x), wide(x), left=False),
    "triangular_solve upper": lambda x: torch.linalg.solve_triangular(
        square(x).triu(), wide(x), upper=True, left=False
    ),
    "cholesky upper": lambda x: torch.linalg.cholesky(positive(x), upper=True),
    "vander": lambda x: torch.linalg.vander(x[:3]),
    "cov": lambda x: torch.cov(wide(x)),
    "corrcoef": lambda x: torch.corrcoef(x.reshape(2, 3)),
    "matmul": lambda x: square(x) @ square(x),
    "bmm": lambda x: torch.bmm(square(x)[None], square(x)[None]),
    "mv": lambda x: square(x) @ x[:3],
    "outer": lambda x: torch.outer(x[:3], x[3:]),
    "kron": lambda x: torch.kron(x[:3], x[3:]),
    "einsum": lambda x: torch.einsum("ij,jk,ik->i", *[square(x) / 5] * 3),
    "addmm": lambda x: torch.addmm(square(x), square(x), square(x)),
    "baddbmm": lambda x: torch.baddbmm(square(x)[None], square(x)[None], square(x)[None]),
    "tensordot": lambda x: torch.tensordot(square(x), square(x), 2),
    "bilinear": lambda x: F.bilinear(x[None, :3], x[None, 3:], WEIGHT.reshape(1, 3, 3)),
}
SHAPES = {
    "sort": lambda x: (x**2).sort().values,
    "topk": lambda x: (x**2).topk(3).values,
    "kthvalue": lambda x: (x**2).kthvalue(2).values,
    "gather": lambda x: (x**2).gather(0, torch.tensor([0, 0, 5])),
    "index": lambda x: (x**3)[torch.tensor([0, 0, 5])],
    "index_add": lambda x: x.index_add(0, torch.tensor([1, 1]), x[:2] ** 2),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([1, 2]), x[3:5] ** 2),
    "index_put": lambda x: x.index_put((torch.tensor([1, 2]),), x[3:5] ** 2),
    "scatter": lambda x: x.scatter(0, torch.tensor([4, 2]), x[:2] ** 2),
    "scatter_add": lambda x: x.scatter_add(0, torch.tensor([4, 4]), x[:2] ** 2),
    "scatter_reduce mean": lambda x: x.scatter_reduce(0, torch.tensor([4, 4]), x[:2] ** 2, "mean"),
    "scatter_reduce prod": lambda x: x.scatter_reduce(0, torch.tensor([4, 4]), x[:2], "prod"),
    "scatter_reduce amax": lambda x: x.scatter_reduce(0, torch.tensor([4, 4]), x[:2], "amax"),
    "index_reduce mean": lambda x: x.index_reduce(0, torch.tensor([4, 4]), x[:2] ** 2, "mean"),
    "put": lambda x: x.put(torch.tensor([4, 1]), x[:2] ** 2),
    "grid_sample": lambda x: F.grid_sample(
        image(x), x[:4].tanh().reshape(1, 1, 2, 2), align_corners=False
    ),
    "grid_sample border": lambda x: F.grid_sample(
        image(x), x[:4].tanh().reshape(1, 1, 2, 2), padding_mode="border", align_corners=True
    ),
    "affine_grid": lambda x: F.affine_grid(x.reshape(1, 2, 3), [1, 1, 2, 2], align_corners=True),
    "masked_fill": lambda x: (x**2).masked_fill(x > 0, 1.0),
    "masked_scatter": lambda x: x.masked_scatter(torch.arange(6) > 3, x[:2] ** 2),
    "take_along_dim": lambda x: (x**2).take_along_dim(torch.tensor([3, 3])),
    "roll": lambda x: (x**2).roll(1) * x,
    "flip": lambda x: (x**2).flip(0) * x,
    "unfold": lambda x: (x**2).unfold(0, 3, 1),
    "pad": lambda x: F.pad(x**2, (1, 2)),
    "pad reflect": lambda x: F.pad(x[None] ** 2, (1, 2), mode="reflect"),
    "pad replicate": lambda x: F.pad(x[None] ** 2, (1, 2), mode="replicate"),
    "pad circular": lambda x: F.pad(x[None] ** 2, (1, 2), mode="circular"),
    "repeat_interleave": lambda x: (x**2).repeat_interleave(2),
    "cat": lambda x: torch.cat([x**2, x.sin()]),
    "tril": lambda x: square(x).tril() ** 2,
    "diag_embed": lambda x: torch.diag_embed(x**2),
    "as_strided": lambda x: (x**2).as_strided((4, 2), (1, 1)),
    "rfft": lambda x: torch.view_as_real(torch.fft.rfft(x**2)),
    "fft": lambda x: torch.fft.fft(x**2).abs(),
    "irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2),
    "angle": lambda x: torch.fft.rfft(x)[1:3].angle(),
    "complex": lambda x: torch.complex(x[:3], x[3:]).exp().real,
    "polar": lambda x: torch.polar(1 + x[:3] ** 2, x[3:]).square().imag,
    "embedding": lambda x: F.embedding(torch.tensor([1, 0, 1]), wide(x) ** 2),
}
NETWORKS = {
    "linear": lambda x: F.linear(wide(x), wide(x)),
    "conv1d": lambda x: F.conv1d(x.reshape(1, 1, 6), x[:3].reshape(1, 1, 3)),
    "conv2d": lambda x: F.conv2d(image(x), WEIGHT.reshape(1, 1, 3, 3)),
    "conv2d with moving weight": lambda x: F.conv2d(image(x), x[:4].reshape(1, 1, 2, 2), stride=2),
    "conv_transpose2d": lambda x: F.conv_transpose2d(image(x), WEIGHT.reshape(1, 1, 3, 3)),
    "fold": lambda x: F.fold(F.unfold(image(x), 2), (4, 4), 2) ** 2,
    "avg_pool2d": lambda x: F.avg_pool2d(image(x), 2),
    "max_pool2d": lambda x: F.max_pool2d(image(x), 2),
    "max_pool1d": lambda x: F.max_pool1d(x.reshape(1, 1, 6) ** 2, 2),
    "lp_pool2d": lambda x: F.lp_pool2d(image(x) + 2, 3.0, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(image(x), 3),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(image(x), 3),
    "interpolate nearest": lambda x: F.interpolate(image(x), scale_factor=2),
    "interpolate linear": lambda x: F.interpolate(x.reshape(1, 1, 6) ** 2, 9, mode="linear"),
    "interpolate bilinear": lambda x: F.interpolate(image(x), size=(5, 7), mode="bilinear"),
    "interpolate bicubic": lambda x: F.interpolate(image(x), size=(5, 7), mode="bicubic"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(image(x).reshape(1, 4, 2, 2), 2) ** 2,
    "attention": lambda x: F.scaled_dot_product_attention(*[square(x)[None] / 3] * 3),
    "mse_loss": lambda x: F.mse_loss(x**2, TARGET),
    "l1_loss": lambda x: F.l1_loss(x**2, TARGET),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x**2, TARGET),
    "huber_loss": lambda x: F.huber_loss(x**2, TARGET),
    "cross_entropy": lambda x: F.cross_entropy(wide(x), torch.tensor([0, 2])),
    "nll_loss": lambda x: F.nll_loss(wide(x).log_softmax(1) ** 2, torch.tensor([0, 2])),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), TARGET),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, TARGET),
    "kl_div": lambda x: F.kl_div(x.log_softmax(0), TARGET, reduction="sum"),
    "poisson_nll_loss": lambda x: F.poisson_nll_loss(x, TARGET),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x[:3], TARGET[:3], x[3:] ** 2 + 0.1),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x**2, TARGET.sign()),
    "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x**2 / 9, -TARGET.sign()),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x[None, :2], x[None, 2:4], x[None, 4:]),
    "gru cell": lambda x: recurrent(GRU, x),
    "lstm cell": lambda x: recurrent(LSTM, x)[0],
    "weight_norm": lambda x: torch._weight_norm(wide(x), x[:2, None]),
}
OPERATIONS = {
    **ACTIVATIONS, **POINTWISE, **REDUCTIONS, **NORMS, **LINALG, **SHAPES, **NETWORKS
}  # fmt: skip
if not SINCE_2_13:
    del OPERATIONS["aminmax"]


def recurrent(cell, x):
    fixed = {
        name: torch.linspace(-1, 1, p.numel(), dtype=torch.float64).reshape(p.shape).sin()
        for name, p in cell.named_parameters()
    }
    hidden = (x[None, 3:], x[None, 3:] ** 2) if isinstance(cell, nn.LSTMCell) else x[None, 3:]
    return functional_call(cell, fixed, (x[None, :3], hidden))


# A function that ends in a scalar, curved once more so that even linear operations have a Hessian.
def scalar(func):
    def curved(x):
        out = func(x).reshape(-1)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype)
        return (weight * out.sin()).sum()

    return curved


def point():
    """Far from the kinks of the operations above, and without ties."""
    return torch.tensor([0.31, -0.83, 1.27, 0.59, -0.37, 1.61], dtype=torch.float64)


def by_differences(func, x):
    """Central differences of the gradient by plain autograd."""

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(func(x), x)[0]

    columns = []
    for i in range(len(x)):
        step = torch.zeros_like(x)
        step[i] = SHIFT
        columns.append((gradient(x + step) - gradient(x - step)) / (2 * SHIFT))
    return torch.stack(columns, 1)


def names_of(func):
    with Recorder() as recorder:
        func(point())
    return recorder.names


def through_forward(func, x):
    """The Hessian with forward mode on the inside, alone and for a batch under vmap.

    The batched ways are the ones of the vmap engine; every row of the batch is tried.
    """
    batch = torch.stack([x, x.flip(0), x * 0.7])
    ways = {"rev over fwd": lambda x: jacrev(jacfwd(func))(x)}
    ways["fwd over fwd"] = lambda x: jacfwd(jacfwd(func))(x)
    for name, way in ways.items():
        yield name, way, x[None]
        yield f"{name} under vmap", torch.vmap(way), batch


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def refuses(function, *args):
    """What ``function`` returns, or ``None`` where torch refuses: an error is no wrong number."""
    try:
        return function(*args)
    except (RuntimeError, NotImplementedError):
        return None


@functools.cache
def wrong_ways(name):
    """The ways through forward mode that give another Hessian than central differences."""
    func, wrong = scalar(OPERATIONS[name]), []
    for way, hessian, x in through_forward(func, point()):
        found = refuses(hessian, x if "vmap" in way else x[0])
        if found is None:
            continue
        expected = torch.stack([by_differences(func, row) for row in x])
        if not close(found.reshape(expected.shape), expected):
            wrong.append(way)
    return wrong


every_operation = pytest.mark.parametrize("name", OPERATIONS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:index_reduce"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized"),
]

# NOTE [Reverse formulas that are wrong once differentiated again]
# Plain reverse mode is the yardstick of the library. These are where torch itself is wrong or
# incomplete; a release that mends one fails here with its name, and so does one that adds one.
WRONG_SECOND_DERIVATIVE = {"weight_norm"}
WRONG_TRANSPOSE = {
    "layer_norm",
    "layer_norm of rows",
    "instance_norm",
    "batch_norm in training",
    "logcumsumexp",
    "weight_norm",
}
WRONG_THIRD_DERIVATIVE = WRONG_TRANSPOSE


@every_operation
def test_the_gradient_is_right(name):
    func, x = scalar(OPERATIONS[name]), point()
    columns = [(func(x + s) - func(x - s)) / (2 * SHIFT) for s in SHIFT * torch.eye(6).double()]
    assert close(grad(func)(x), torch.stack(columns))


@every_operation
def test_reverse_over_reverse_is_right(name):
    """What stands in for a forward formula that is wrong must be right itself."""
    func, x = scalar(OPERATIONS[name]), point()
    found = refuses(torch.autograd.functional.hessian, func, x)
    if found is not None:
        assert close(found, by_differences(func, x)) == (name not in WRONG_SECOND_DERIVATIVE)


@every_operation
def test_the_list_holds_what_is_wrong_once_differentiated_again(name):
    wrong, names = wrong_ways(name), names_of(OPERATIONS[name])
    if wrong:
        assert not UNSAFE_FORWARD.isdisjoint(names), (
            f"{wrong} wrong: one of {sorted(names)} is missing"
        )


@every_operation
def test_forward_formulas_are_right_once(name):
    """A single pass forward is right, or its operation is in the list."""
    func, x = scalar(OPERATIONS[name]), point()
    found = refuses(jacfwd(func), x)
    if found is not None and not close(found, grad(func)(x)):
        assert not UNSAFE_FORWARD.isdisjoint(names_of(OPERATIONS[name]))


def directional(func, x, directions):
    """Derivatives along one direction after the other, by plain reverse mode."""
    x = x.detach().requires_grad_()
    value = func(x)
    for direction in directions:
        value = (torch.autograd.grad(value, x, create_graph=True)[0] * direction).sum()
    return value.detach()


DIRECTIONS = [
    torch.linspace(a, b, 6, dtype=torch.float64).cos() for a, b in [(0, 2), (1, 4), (2, 9)]
]


@every_operation
def test_the_transpose_of_a_vjp_is_right_once_differentiated_again(name):
    """``J t`` as the derivative of ``u -> J^T u`` uses reverse formulas only."""
    func, x = scalar(OPERATIONS[name]), point().requires_grad_()
    tangent = DIRECTIONS[0]

    def derivative():
        u = torch.ones((), dtype=x.dtype, requires_grad=True)
        (pulled,) = torch.autograd.grad(func(x), x, u, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, u, tangent, create_graph=True)
        return torch.autograd.grad(pushed, x)[0]

    found = refuses(derivative)
    if found is not None:
        right = close(found, by_differences(func, x.detach()) @ tangent)
        assert right == (name not in WRONG_TRANSPOSE)


@every_operation
def test_third_derivatives_of_reverse_mode(name):
    func, x = scalar(OPERATIONS[name]), point()
    found = refuses(directional, func, x, DIRECTIONS)
    if found is None:
        return
    step = SHIFT * DIRECTIONS[2]
    sides = [directional(func, x + sign * step, DIRECTIONS[:2]) for sign in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * SHIFT)
    right = torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert right == (name not in WRONG_THIRD_DERIVATIVE)


def test_there_are_enough_operations():
    assert len(OPERATIONS) >= 60


# --- routes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "inputs", "forward"),
    [(100, 1, True), (3, 1, True), (1, 1, False), (5, 5, False), (1, 100, False), (0, 0, False)],
)
def test_the_smaller_side_decides(outputs, inputs, forward):
    assert prefers_forward(outputs, inputs) == forward


@pytest.mark.parametrize("engine", ["vmap", "sum", "loop"])
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_routes_of_one_engine_and_mode(mode, engine):
    found = routes(engine, mode, None, (4, 5, 3))
    assert found
    assert {(route.engine, route.mode) for route in found} == {(engine, mode)}
    assert len(set(found)) == len(found)


def test_routes_of_auto_try_vmap_first_and_the_loop_last():
    engines = [route.engine for route in routes("auto", "auto", None, (4, 5, 3))]
    assert engines == sorted(engines, key=["vmap", "sum", "loop"].index)
    assert set(engines) == {"vmap", "sum", "loop"}


@pytest.mark.parametrize("sizes", [(4, 5, 3), (4, 3, 5), (1, 1, 1)])
def test_passes_are_the_rows_of_a_basis(sizes):
    _, outputs, inputs = sizes
    assert Route("sum", "rev").passes(outputs, inputs) == outputs
    assert Route("sum", "fwd").passes(outputs, inputs) == inputs


def test_a_large_jacobian_is_chunked_by_itself():
    big = routes("vmap", "rev", None, (1024, 4096, 4096))
    assert all(route.chunk is not None and route.chunk < 4096 for route in big)
    small = routes("vmap", "rev", None, (4, 5, 3))
    assert all(route.chunk is None for route in small)
    assert all(route.chunk == 2 for route in routes("vmap", "rev", 2, (1024, 4096, 4096)))
