"""The table of first derivatives: functions of every kind that people differentiate.

Rows: 4, inputs: 3, outputs: 5 unless the point is another size; float64 unless the point is
float32. Networks are in ``first_order_modules``.
"""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcjac import BatchMixingError, VerificationError
from tests.cases import first_order_modules as networks
from tests.cases import functions as fn
from tests.cases.case import Case, Setup, f32, f64, given, module, on_x, rand, x43
from tests.cases.modules import (
    Generated,
    Legacy,
    Modern,
    Once,
    Raises,
    SelfAttention,
    Tied,
    WithJvp,
    WithRule,
    mlp,
)
from tests.oracles import NAMESPACE, SINCE_2_13

# --- functions ---------------------------------------------------------------------------


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


Pair = namedtuple("Pair", "b a")


@optree.dataclasses.dataclass(namespace=NAMESPACE)
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


def write_into_shared() -> Setup:
    total = torch.ones(3, dtype=f64)

    def func(x: Tensor, scale: Tensor) -> Tensor:
        scale.mul_(2)
        return x.sin() * scale

    return given(func, x43(), total)


def forces(create_graph: bool, mark: bool = False) -> Callable[[Tensor], Tensor]:
    w = rand(3, 6)

    def func(x: Tensor) -> Tensor:
        with torch.enable_grad():
            if mark or not x.requires_grad:
                x.requires_grad_()
            energy = fn.energy(x, w)
            return -torch.autograd.grad(energy, x, create_graph=create_graph)[0]

    return func


def func_forces() -> Setup:
    w = rand(3, 6)
    return given(torch.func.grad(lambda x: fn.energy(x, w)), x43())


def sparse(layout: str) -> Setup:
    dense = torch.where(torch.rand(5, 3) > 0.5, 1.0, 0.0).to(f64) * rand(5, 3)
    matrix = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()
    return given(lambda x: (matrix @ x.sin().T).T, x43())


# --- the table ---------------------------------------------------------------------------

PLAIN = [
    Case("sin", on_x(torch.sin)),
    Case("linear", linear_map),
    Case("scalar_rows", on_x(lambda x: x.pow(3).sum(-1))),
    Case("zero_d_rows", on_x(torch.sin, 4)),
    Case("zero_d_to_vector", on_x(lambda x: torch.stack([x, x**2, x.exp()], 1), 4)),
    Case("empty_input_rows", on_x(lambda x: x.sum(1, keepdim=True).expand(-1, 5), 4, 0)),
    Case("empty_output_rows", on_x(lambda x: x[:, :0].sin())),
    Case("empty_batch", on_x(lambda x: x.repeat(1, 2).sin(), 0, 3)),
    Case("batch_of_one", on_x(lambda x: x.repeat(1, 2).sin(), 1, 3)),
    Case("transposed_input", lambda: given(torch.sin, rand(3, 4).T)),
    Case("expanded_input", lambda: given(torch.sin, rand(1, 3).expand(4, 3))),
    Case("in_dims_1", on_x(lambda x: x.T.sin() * 2, 3, 4), keywords={"in_dims": 1}),
    Case(
        "out_dims_1",
        lambda: given(lambda x, w=rand(5, 3): w @ x.T, x43()),
        keywords={"out_dims": 1},
    ),
    Case(
        "in_dims_last_out_dims_last",
        lambda: given(lambda x, w=rand(5, 3): (w @ x).exp(), rand(2, 3, 4)),
        keywords={"in_dims": -1, "out_dims": -1},
    ),
    Case("matrix_rows", lambda: given(lambda x, w=rand(5, 3): w @ x.sin(), rand(4, 3, 2))),
    Case(
        "unused_input",
        lambda: given(lambda x, y: x.sin(), x43(), rand(4, 2)),
        keywords={"argnums": (0, 1)},
    ),
    Case(
        "only_unused_input",
        lambda: given(lambda x, y: x.sin(), x43(), rand(4, 2)),
        keywords={"argnums": 1},
    ),
    Case("constant_output", on_x(lambda x: x.new_ones(x.shape[0], 5))),
    Case("partly_constant_output", on_x(lambda x: (x.sin(), x.new_ones(len(x), 2)))),
    Case("returns_its_input", on_x(lambda x: x)),
    Case("returns_a_view", on_x(lambda x: x.unsqueeze(1))),
    Case("float32", on_x(lambda x: x.sin() @ torch.ones(3, 5), dtype=f32)),
    Case("float64_to_float32", on_x(lambda x: x.sin().float().repeat(1, 2))),
    Case("float32_to_float64", on_x(lambda x: x.sin().double(), dtype=f32)),
    Case("mixed_dtype_outputs", on_x(lambda x: (x.sin(), x.float().cos()))),
    Case(
        "mixed_dtype_inputs",
        lambda: given(lambda x, y: x.sin() * y, x43(), x43(f32)),
        keywords={"argnums": (0, 1)},
    ),
    Case(
        "keyword_arguments",
        lambda: given(
            lambda x, *, scale, power: (scale * x).sin() ** power, x43(), scale=rand(3), power=2
        ),
    ),
    Case("many_outputs", lambda: given(lambda x, w=rand(3, 24): (x @ w).tanh(), x43())),
    Case("many_inputs", lambda: given(lambda x, w=rand(24, 2): x.tanh() @ w, rand(4, 24))),
    Case(
        "vmap_of_one_sample",
        on_x(torch.vmap(lambda x: torch.stack([x.sum().sin(), x[0] * x[1] * x[2]]))),
    ),
]

# Operations that some mode or engine of torch gets wrong or cannot do
OPERATIONS = [
    Case(
        "prod_with_zeros",
        lambda: given(lambda x: x.prod(-1), x43() * torch.tensor([1.0, 0.0, 2.0], dtype=f64)),
    ),
    Case("cumprod", on_x(lambda x: x.cumprod(-1))),
    Case("cummax", on_x(lambda x: x.cummax(-1).values), cannot="vmap/rev"),
    Case(
        "quantile",
        on_x(lambda x: torch.quantile(x, torch.tensor([0.2, 0.7], dtype=f64), dim=-1).T),
        cannot="vmap",
    ),
    Case("sort_rows", on_x(lambda x: x.sin().sort(-1).values)),
    Case("roll_rows", on_x(lambda x: x.sin().roll(1, 1))),
    Case("fft", on_x(lambda x: torch.fft.rfft(x).abs())),
    Case("complex_inside", on_x(lambda x: torch.view_as_real(torch.polar(x.exp(), x)).flatten(1))),
    Case(
        "cdist",
        lambda: given(lambda x, c=rand(5, 3): torch.cdist(x, c), x43()),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "rbf_of_cdist",
        lambda: given(lambda x, c=rand(5, 3): (-(torch.cdist(x, c) ** 2)).exp(), x43()),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "cdist_of_sets",
        lambda: given(
            lambda x, c=rand(1, 2, 3): torch.cdist(x, c.expand(len(x), 2, 3)), rand(4, 5, 3)
        ),
        twice=False,
        cannot="vmap fwd",
    ),
    Case(
        "scatter_reduce_prod",
        on_x(
            lambda x: torch.ones_like(x).scatter_reduce(
                1, torch.tensor([[0, 0, 1]]).expand(len(x), 3), x, "prod"
            )
        ),
        cannot="vmap",
    ),
    Case("logcumsumexp", on_x(lambda x: x.logcumsumexp(-1))),
    Case(
        "grid_sample_input",
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
        lambda: given(
            lambda g, i=rand(1, 1, 3, 3): F.grid_sample(
                i.expand(len(g), 1, 3, 3), g.tanh(), align_corners=False
            ),
            0.4 * rand(4, 2, 1, 2),
        ),
        twice=SINCE_2_13,
        cannot="vmap/fwd" if SINCE_2_13 else "vmap fwd",
    ),
    Case("interpolate", on_x(lambda x: F.interpolate(x, scale_factor=2, mode="linear"), 4, 1, 3)),
    Case("unfold", on_x(lambda x: x.unfold(1, 2, 1).sin().flatten(1)), cannot="vmap/rev"),
    Case("glu", on_x(lambda x: F.glu(x, -1), 4, 6), cannot_twice="vmap/fwd"),
    Case("where_of_itself", on_x(lambda x: torch.where(x > 0, x**2, x.sin()))),
]

LINALG = [
    Case("det", on_matrices(torch.linalg.det)),
    Case("slogdet", on_matrices(lambda a: torch.linalg.slogdet(a).logabsdet), cannot="vmap/fwd"),
    Case("logdet", on_symmetric(torch.logdet), cannot="vmap/fwd"),
    Case(
        "solve",
        on_matrices(lambda a: torch.linalg.solve(a, torch.arange(6.0).view(3, 2).to(a))),
        cannot="vmap",
    ),
    Case("inv", on_matrices(torch.linalg.inv)),
    Case("pinv", on_matrices(torch.linalg.pinv)),
    Case("cholesky", on_symmetric(torch.linalg.cholesky)),
    Case("eigh", on_symmetric(lambda a: torch.linalg.eigh(a).eigenvalues)),
    Case("svdvals", on_matrices(torch.linalg.svdvals)),
    Case("qr", on_matrices(lambda a: tuple(torch.linalg.qr(a)))),
    Case("matrix_exp", on_matrices(torch.linalg.matrix_exp)),
]

PYTREES = [
    Case("dict_out_of_order", on_dict),
    Case(
        "ordered_dict",
        lambda: given(
            lambda d: OrderedDict(z=d["z"].sin(), a=d["a"] * d["z"][:, :2]),
            OrderedDict(z=x43(), a=rand(4, 2)),
        ),
    ),
    Case(
        "namedtuple",
        lambda: given(
            lambda p: Pair(p.a.sin(), p.b.sum(-1) * p.a[:, 0]), Pair(b=x43(), a=rand(4, 2))
        ),
    ),
    Case(
        "none_in_trees",
        lambda: given(lambda t: [t[0].sin(), None, t[2].exp()], [x43(), None, rand(4, 2)]),
    ),
    Case("registered_dataclass", on_state),
    Case("nested_tuples", on_x(lambda x: ((x.sin(), (x.sum(-1),)), [x[:, :2].exp()]))),
    Case(
        "several_argnums",
        lambda: given(
            lambda a, b, c: (a.sum(-1, keepdim=True) * b * c[:, :1]).sin(),
            x43(),
            rand(4, 5),
            rand(4, 2),
        ),
        keywords={"argnums": (2, 0)},
    ),
    Case(
        "negative_argnums",
        lambda: given(lambda a, b: a * b[:, :1].exp(), x43(), rand(4, 2)),
        keywords={"argnums": -1},
    ),
    Case(
        "in_dims_tree",
        lambda: given(
            lambda d, s: d["a"] * d["b"].T[:, :1] * s, {"a": x43(), "b": rand(2, 4)}, rand(3)
        ),
        keywords={"in_dims": ({"a": 0, "b": 1}, None)},
    ),
    Case("out_dims_tree", on_x(lambda x: (x.sin(), x.T.exp())), keywords={"out_dims": (0, 1)}),
]

# Arguments that all rows share
SHARED = [
    Case(
        "shared_not_differentiated",
        lambda: given(lambda x, w: (x @ w).sin(), x43(), rand(3, 5)),
        keywords={"in_dims": (0, None)},
    ),
    Case(
        "shared",
        lambda: given(lambda x, w: (x @ w).sin(), x43(), rand(3, 5)),
        keywords={"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "shared_and_batched",
        lambda: given(lambda x, w: (x * w).sin(), x43(), rand(3)),
        keywords={"in_dims": (0, None), "argnums": (0, 1)},
        cannot="sum",
    ),
    Case(
        "shared_scalar",
        lambda: given(lambda x, t: (x * t).sin(), x43(), rand()),
        keywords={"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "per_sample_parameters",
        lambda: per_sample_parameters(mlp()),
        keywords={"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "per_sample_parameters_frozen",
        lambda: per_sample_parameters(mlp(), frozen=True),
        keywords={"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "per_sample_parameters_tied",
        lambda: per_sample_parameters(Tied(dtype=f64)),
        keywords={"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
]

# Integers beside the input
INTEGERS = [
    Case(
        "embedding_beside",
        lambda: given(
            lambda x, i, e=nn.Embedding(6, 3, dtype=f64): x * e(i),
            x43(),
            torch.tensor([0, 5, 2, 2]),
        ),
    ),
    Case(
        "embedding_weight",
        lambda: given(lambda i, w: F.embedding(i, w).sin(), torch.tensor([0, 5, 2, 2]), rand(6, 3)),
        keywords={"in_dims": (0, None), "argnums": 1},
        cannot="sum",
    ),
    Case(
        "embedding_max_norm",
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
        lambda: given(
            lambda x, i: x.sin().gather(1, i), x43(), torch.tensor([[0, 1], [2, 2], [1, 0], [2, 0]])
        ),
    ),
]

# Custom autograd functions
CUSTOM = [
    Case("legacy_function", on_x(lambda x: Legacy.apply(x.sin())), cannot="vmap"),
    Case(
        "once_differentiable", on_x(lambda x: Once.apply(x.sin())), twice=False, cannot="vmap fwd"
    ),
    Case("setup_context", on_x(lambda x: Modern.apply(x.sin())), cannot="vmap"),
    Case("generated_vmap_rule", on_x(lambda x: Generated.apply(x.sin())), cannot="vmap/fwd"),
    Case("generated_vmap_rule_and_jvp", on_x(lambda x: WithJvp.apply(x.sin()))),
    Case("own_vmap_rule", on_x(lambda x: WithRule.apply(x.sin())), cannot="vmap/fwd"),
]

# Control flow and masks
CONTROL = [
    Case("item_branch", on_x(fn.branch_by_row), cannot="vmap"),
    Case("boolean_mask", on_x(fn.assign_masked), cannot="vmap"),
    Case("nonzero", on_x(fn.scatter_nonzero), cannot="vmap"),
    Case("masked_select", on_x(fn.scatter_selected), cannot="vmap"),
    Case("masked_fill", on_x(lambda x: x.exp().masked_fill(x > 0, 1.0))),
    Case("one_hot", on_x(fn.one_hot_of_max), cannot="vmap"),
    Case("assertion", on_x(fn.asserting), cannot="vmap"),
    Case("iterate_to_convergence", on_x(fn.iterate_to_convergence), cannot="vmap"),
]

IN_PLACE = [
    Case(
        "inplace_relu_first", module(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 5)))
    ),
    Case("inplace_mul", on_x(lambda x: x.mul_(2).sin())),
    Case("inplace_slice", on_x(fn.change_input)),
    Case(
        "inplace_other_argument",
        lambda: given(fn.write_into_other, x43(), x43()),
        moves=True,
        cannot="vmap loop",
    ),
    Case(
        "inplace_shared_argument",
        write_into_shared,
        keywords={"in_dims": (0, None)},
        moves=True,
        cannot="vmap loop",
    ),
    Case("fill_new_zeros", on_x(fn.fill_new_zeros)),
    Case("fill_zeros", on_x(fn.fill_zeros), cannot="vmap"),
    Case("inplace_on_result", on_x(lambda x: x.sin().mul_(2).add_(x))),
]

# Autograd inside, and parts that autograd does not see
AUTOGRAD = [
    Case("autograd_inside", lambda: given(forces(True), x43()), cannot="vmap/fwd"),
    Case("autograd_inside_marks_input", lambda: given(forces(True, True), x43()), cannot="vmap"),
    Case(
        "autograd_inside_without_graph",
        lambda: given(forces(False), x43()),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    Case("func_grad_inside", func_forces),
    Case(
        "func_jvp_inside", on_x(lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1])
    ),
    Case("no_grad_block", on_x(fn.partly_blind), smooth=False, cannot="vmap/fwd"),
    Case("detach", on_x(lambda x: x.detach().cos() * x.sin()), smooth=False),
    Case(
        "detached",
        on_x(lambda x: x.detach().sin()),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    Case(
        "numpy_round_trip",
        on_x(lambda x: torch.from_numpy(x.detach().numpy() ** 2)),
        expected=VerificationError,
        match="expected autograd to see",
    ),
    Case(
        "item_into_tensor",
        on_x(lambda x: torch.tensor([[v**2 for v in row] for row in x.tolist()], dtype=f64)),
        expected=VerificationError,
        match="expected autograd to see",
    ),
]

SPARSE = [
    Case("sparse_coo", lambda: sparse("coo"), cannot="vmap"),
    Case("sparse_csr", lambda: sparse("csr"), cannot="vmap"),
    Case(
        "sparse_inside",
        lambda: given(lambda x, w=rand(3, 5): torch.sparse.mm(x.to_sparse(), w), x43()),
        cannot="vmap",
        cannot_twice="fwd",
    ),
]

# Rows that depend on one another
MIXING = [
    Case("minus_mean", on_x(lambda x: x - x.mean(0)), expected=BatchMixingError),
    Case("weak_mixing", on_x(lambda x: x.sin() + 1e-4 * x.mean(0)), expected=BatchMixingError),
    Case("softmax_over_batch", on_x(lambda x: x.softmax(0)), expected=BatchMixingError),
    Case("in_batch_attention", on_x(fn.in_batch_attention), expected=BatchMixingError),
    Case(
        "attention_batch_taken_for_time",
        module(lambda: SelfAttention(True), 4, 2, 4),
        expected=BatchMixingError,
        match="MultiheadAttention with batch_first=False",
    ),
    Case("sort_over_batch", on_x(lambda x: x.sin().sort(0).values), expected=BatchMixingError),
    Case("roll_over_batch", on_x(lambda x: x.sin().roll(1, 0)), expected=BatchMixingError),
    Case("cumsum_over_batch", on_x(lambda x: x.cumsum(0)), expected=BatchMixingError),
    Case("clip_by_global_norm", on_x(fn.clip_by_global_norm), expected=BatchMixingError),
]

# What has no batched Jacobian
REFUSED = [
    Case(
        "no_batch_in_output",
        on_x(lambda x: x.sum()),
        expected=ValueError,
        match="batch_jacobian: expected func to return a batch of 4 in dimension 0",
    ),
    Case(
        "complex_output",
        on_x(torch.fft.fft),
        expected=TypeError,
        match="batch_jacobian: expected func to return real floating-point tensors",
    ),
    Case(
        "integer_output",
        on_x(lambda x: x.argsort(-1)),
        expected=TypeError,
        match="batch_jacobian: expected func to return real floating-point tensors",
    ),
    Case(
        "sparse_output",
        on_x(lambda x: x.to_sparse()),
        expected=TypeError,
        match="batch_jacobian: expected func to return dense tensors",
    ),
    Case(
        "number_output",
        on_x(lambda x: x.sum().item()),
        expected=TypeError,
        match="batch_jacobian: expected func to return tensors",
    ),
    Case(
        "integer_input",
        lambda: given(lambda i: i * 0.5, torch.arange(12).view(4, 3)),
        expected=TypeError,
        match="batch_jacobian: expected a differentiated argument of real floating-point",
    ),
    Case(
        "complex_input",
        lambda: given(torch.abs, torch.randn(4, 3, dtype=torch.cfloat)),
        expected=TypeError,
        match="batch_jacobian: expected a differentiated argument of real",
    ),
    Case(
        "unequal_batches",
        lambda: given(lambda x, y: x.sin(), x43(), rand(2, 3)),
        expected=ValueError,
        match="batch_jacobian: expected all batched arguments to have the same batch size",
    ),
    Case("own_error", module(Raises), expected=KeyError, match="the user's own"),
]

GROUPS = {
    "plain": PLAIN,
    "operation": OPERATIONS,
    "linalg": LINALG,
    "module": networks.MODULES,
    "pytree": PYTREES,
    "shared": SHARED,
    "integer": INTEGERS,
    "normalisation": networks.NORMALISATION,
    "recurrent": networks.RECURRENT,
    "attention": networks.ATTENTION,
    "random": networks.RANDOM,
    "custom": CUSTOM,
    "control": CONTROL,
    "TorchScript": networks.TORCH_SCRIPT,
    "hooks": networks.HOOKS,
    "inplace": IN_PLACE,
    "autograd": AUTOGRAD,
    "sparse": SPARSE,
    "mixing": MIXING,
    "refused": REFUSED,
}
CASES = [replace(case, group=group) for group, cases in GROUPS.items() for case in cases]
