"""Functions of tensors for the tables: operations, in place, control flow, derivatives inside."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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


# --- attention ---------------------------------------------------------------------------


def in_math(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func`` with attention by the one backend that can be differentiated twice."""

    def within(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args)

    return within


def sdpa(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.sin(), x)


def sdpa_masked(x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(x, x.sin(), x, attn_mask=mask)


# --- in place ----------------------------------------------------------------------------


def fill_new_zeros(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], 5)
    out[:, 0] = x[:, 0].sin()
    out[:, 3] = x[:, 1] * x[:, 2]
    return out


def fill_zeros(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 5, dtype=x.dtype)
    out[:, 0] = x[:, 0].sin()
    out[:, 3] = x[:, 1] * x[:, 2]
    return out


def change_views(x: Tensor) -> Tensor:
    y = x * x
    y[:, 0].add_(x[:, 1].exp())
    y[:, 1:] *= x[:, :1]
    return y[:, :2].add_(1)


def change_input(x: Tensor) -> Tensor:
    x[..., 0] = 0
    return (x * x).cumsum(-1)


def write_into_other(x: Tensor, y: Tensor) -> Tensor:
    y.add_(1)
    return x.sin() * y


# --- control flow ------------------------------------------------------------------------


def branch_by_row(x: Tensor) -> Tensor:
    rows = [x[b] ** 3 if x[b].sum().item() > 0 else x[b].sin() for b in range(x.shape[0])]
    return torch.stack(rows)


def assign_masked(x: Tensor) -> Tensor:
    out = x.sin()
    out[x > 0] = x[x > 0] ** 3
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


def iterate_to_convergence(x: Tensor, tolerance: float = 1e-12) -> Tensor:
    """Newton's square root; a row that has converged no longer moves."""
    a = x.abs() + 1
    y = a.clone()
    for _ in range(20):
        active = ((y * y - a).abs() > tolerance).any(-1, keepdim=True)
        if not active.any():
            break
        y = torch.where(active, 0.5 * (y + a / y), y)
    return y


def script_branch(x: Tensor) -> Tensor:
    if x.dim() > 1 and x.size(-1) == 3:
        x = x.sin()
    for i in range(2):
        x = x * x + float(i)
    return x


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


# --- rows that mix -----------------------------------------------------------------------


def in_batch_attention(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.T, -1) @ x


def clip_by_global_norm(x: Tensor) -> Tensor:
    return x / x.norm().clamp(min=1.0)


# --- random ------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return x * torch.randn_like(x) + torch.rand_like(x) * x**2


def reparametrized(x: Tensor) -> Tensor:
    return torch.distributions.Normal(x, x.exp(), validate_args=False).rsample()
