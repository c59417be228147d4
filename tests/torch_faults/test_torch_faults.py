"""The table of torch's faults, derived from torch's own samples.

Every differentiable operation that torch tests itself is differentiated in all ways, real and with
complex numbers within, and held against plain autograd, one row and one output at a time, and that
against central differences. A release of torch that adds a fault, or mends one, fails here with
the name of the operation. The replacements go through the same ways and must pass all.
"""

import functools

import optree
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from funcjac._torch_faults import replace
from funcjac._torch_faults.replace import UseReplacements, forward_faults, needs_replacement
from funcjac._torch_faults.table import FAULTS
from tests.oracles import SINCE_2_13
from tests.sweeps import forward_formulas as formulas
from tests.sweeps.forward_formulas import Function, Trial

f64, c128 = torch.float64, torch.complex128
SHIFT = 0.01  # between the two rows of a batch
# Torch's samples are full of what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

# Each way to differentiate, and the kinds of fault of which one explains that it is wrong.
WAYS = {
    "reverse": {"reverse_1"},
    "reverse, cotangents batched": {"batching"},
    "vmap(jacrev)": {"vmap", "batching"},
    "gradient over vmap": {"vmap", "batching"},
    "jacfwd": {"forward"},
    "vmap(jacfwd)": {"forward", "forward_vmap"},
    "double reverse": {"reverse_2"},
    "double reverse, cotangents batched": {"batching_again", "batching"},
    "func.grad of vmap(jacrev)": {"batching_again", "batching", "vmap"},
    "forward over reverse": {"forward_again"},
    "of second order, with forward formulas": {"forward_again"},
    "triple reverse": {"reverse_3"},
}


# --- one function, differentiated in all ways ----------------------------------------------


class Row:
    """A function of one row, at a point, as one vector of a few numbers."""

    def __init__(self, function: Function) -> None:
        self.function, self.point = function, [x.detach().clone() for x in function.point]
        self.generator = torch.Generator().manual_seed(formulas.SEED)
        self.directions = [[self._randn(x) for x in self.point] for _ in range(3)]
        self.mixes, self.moving = None, []
        # Statistics that some return have no gradient, and say so.
        outs = self._outs(leaves(self.point))
        self.moving = [i for i, x in enumerate(outs) if x.requires_grad]
        with torch.no_grad():
            whole = self._whole(self.point)
            if len(whole) > 6:
                self.mixes = torch.randn(2, len(whole), generator=self.generator, dtype=f64)
            self.value = self(*self.point)
        self.weights = torch.randn(len(self.value), generator=self.generator, dtype=f64)
        other = self.moved(0, SHIFT)
        self.rows = [torch.stack(pair) for pair in zip(other, self.point)]
        self.argnums = tuple(range(len(self.point)))

    def _randn(self, x: Tensor) -> Tensor:
        step = torch.randn(x.shape, generator=self.generator, dtype=f64)
        is_symmetric = x.ndim > 1 and x.shape[-1] == x.shape[-2] and torch.equal(x, x.mT)
        return step + step.mT if is_symmetric else step

    def _outs(self, xs) -> list[Tensor]:
        torch.default_generator.manual_seed(formulas.SEED)  # that of all devices takes 1 ms
        outs = [x for x in optree.tree_leaves(self.function.run(list(xs))) if is_number(x)]
        outs = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in outs]
        return [x for x in outs if x.dtype == f64]

    def _whole(self, xs) -> Tensor:
        outs = self._outs(xs)
        parts = [outs[i].reshape(-1) for i in self.moving]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=f64)

    def __call__(self, *xs: Tensor) -> Tensor:
        whole = self._whole(xs)
        return whole if self.mixes is None else torch.cat([whole[:4], self.mixes @ whole])

    def moved(self, k: int, step: float) -> list[Tensor]:
        return [x + step * d for x, d in zip(self.point, self.directions[k])]

    def along(self, k: int) -> Tensor:
        return flat(self.directions[k])

    def scalar(self, jac: Tensor, xs) -> Tensor:
        """Moves with the Jacobian, and with ``xs`` where that is constant."""
        bent = self.weights @ jac
        return (bent @ jac.mT).sum() + bent @ self.along(0) + sum((x**3).sum() for x in xs)


def is_number(x) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided


def flat(tensors) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def leaves(xs) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in xs]


def pull(out, xs, cotangent=None, graph=False) -> Tensor:
    grads = torch.autograd.grad(out, xs, cotangent, retain_graph=True, create_graph=graph,
                                allow_unused=True)  # fmt: skip
    return flat(torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs))


def jacobian(row: Row, xs, *, graph=False, batched=False) -> Tensor:
    """``(M, N)`` by plain autograd, one output after the other or all at once."""
    out = row(*xs)
    if not out.requires_grad:
        return out.new_zeros(len(out), sum(x.numel() for x in xs))
    if not batched:
        return torch.stack([pull(entry, xs, graph=graph) for entry in out])
    unit = torch.eye(len(out), dtype=f64)
    return torch.vmap(lambda v: pull(out, xs, v, graph), randomness="same")(unit)


def second(row: Row, xs, *, graph=False, batched=False) -> Tensor:
    """``(N,)``, the gradient of a number that moves with the Jacobian."""
    jac = jacobian(row, xs, graph=True, batched=batched)
    return pull(row.scalar(jac, xs), xs, graph=graph)


def whole(jacs) -> Tensor:
    """``(B, M, N)`` of a tuple of ``(B, M, *in)``."""
    return torch.cat([jac.flatten(2) for jac in jacs], -1)


def is_close(tensor, reference, rel=1e-6, absolute=1e-8) -> bool:
    if not (reference.numel() and reference.isfinite().all()):
        return True
    excess = (tensor - reference).detach().abs().max()
    return bool(excess <= absolute + rel * reference.abs().max())


def tried(way):
    """``None`` where torch refuses: an error is no wrong number."""
    try:
        return way()
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError, AssertionError):
        return None


def difference(row: Row, func, k: int, rel=1e-3):
    """``func`` of a point along direction ``k``, ``None`` where a kink or a pole is near."""
    found: list[Tensor] = []
    with torch.no_grad():
        here = func(row.point)
        for h in (1e-4, 1e-5):
            plus, minus = func(row.moved(k, h)), func(row.moved(k, -h))
            found.append((plus - minus) / (2 * h))
            if not is_close((plus - here) / h, (here - minus) / h, 0.1, 1e-2):
                return None
    return found[1] if is_close(*found, rel, 1e-4) else None


def wrong_ways(row: Row, *, thorough: bool, once: bool = False) -> dict[str, bool]:
    """The ways that give wrong numbers, or (``False``) none, where differences give some.

    Args:
        row: the function.
        thorough: whether second and third derivatives are held against differences.
        once: whether first derivatives are enough.
    """
    if not row.value.numel() or not row.value.isfinite().all():
        return {}
    jac = tried(lambda: jacobian(row, leaves(row.point)))
    if jac is None:
        return {}
    wrong = _of_first_order(row, jac)
    if "reverse" in wrong or once:
        return wrong
    found = tried(lambda: second(row, leaves(row.point)))
    slope = lambda xs: _slope(row, xs)
    if thorough or found is None:
        truth = difference(row, slope, 1)
        if truth is not None and truth.isfinite():
            if found is None:
                return {**wrong, "double reverse": False}
            if not is_close(found @ row.along(1), truth, 1e-3, 1e-4):
                return {**wrong, "double reverse": True}
    if found is not None:
        wrong |= _of_second_order(row, found)
    if thorough and found is not None:
        wrong |= _of_third_order(row)
    return wrong


def _slope(row: Row, xs) -> Tensor:
    with torch.enable_grad():
        return row.scalar(jacobian(row, leaves(xs)), xs)


def _of_first_order(row: Row, jac: Tensor) -> dict[str, bool]:
    truth = difference(row, lambda xs: row(*xs), 0)
    fwd = torch.func.jacfwd(row, row.argnums, randomness="same")
    forward = lambda: whole(j[None] for j in fwd(*row.point))[0]
    if truth is not None and not is_close(jac @ row.along(0), truth, 1e-3, 1e-4):
        slope = tried(lambda: forward() @ row.along(0))
        is_wrong = slope is not None and not is_close(slope, truth, 1e-3, 1e-4)
        return {"reverse": True} | ({"jacfwd": True} if is_wrong else {})
    each = [leaves(x[b] for x in row.rows) for b in range(2)]
    jacs = torch.stack([jacobian(row, xs) for xs in each])
    values = torch.stack([row(*xs).detach() for xs in each])
    if not (values.isfinite().all() and jacs.isfinite().all()):
        return {}
    slopes = torch.einsum("m,bmn->bn", row.weights, jacs)
    rev = torch.func.jacrev(row, row.argnums)
    vmap = functools.partial(torch.vmap, randomness="same")
    total = lambda *xs: (vmap(row)(*xs) @ row.weights).sum()
    rows = leaves(row.rows)
    over = lambda: pull(total(*rows), rows).view(-1)
    ways = {
        "reverse, cotangents batched": (
            lambda: jacobian(row, leaves(row.point), batched=True),
            jac,
        ),
        "vmap(jacrev)": (lambda: whole(vmap(rev)(*row.rows)), jacs),
        "gradient over vmap": (over, flat(_split(row, slopes))),
        "jacfwd": (forward, jac),
        "vmap(jacfwd)": (lambda: whole(vmap(fwd)(*row.rows)), jacs),
    }
    return _compare(ways)


def _split(row: Row, slopes: Tensor) -> list[Tensor]:
    sizes = [x.numel() for x in row.point]
    return [part.contiguous() for part in slopes.split(sizes, 1)]


def _compare(ways) -> dict[str, bool]:
    wrong = {}
    for name, (way, reference) in ways.items():
        found = tried(way)
        if found is not None and not is_close(found, reference):
            wrong[name] = True
    return wrong


def _of_second_order(row: Row, found: Tensor) -> dict[str, bool]:
    rev = torch.func.jacrev(row, row.argnums)

    def total(*xs: Tensor) -> Tensor:
        jacs = whole(torch.vmap(rev, randomness="same")(*[x[None] for x in xs]))
        return row.scalar(jacs[0], xs)

    weighted = lambda *xs: row.weights @ row(*xs)
    directions = tuple(row.directions[1])

    def forward_over_reverse() -> Tensor:
        grad = torch.func.grad(weighted, row.argnums)
        return flat(torch.func.jvp(grad, tuple(row.point), directions)[1])

    ways = {
        "double reverse, cotangents batched": (
            lambda: second(row, leaves(row.point), batched=True),
            found,
        ),
        "func.grad of vmap(jacrev)": (
            lambda: flat(torch.func.grad(total, row.argnums)(*row.point)),
            found,
        ),
    }
    xs = leaves(row.point)
    bent = tried(lambda: pull(weighted(*xs), xs, graph=True) @ row.along(1))
    if bent is not None and difference(row, lambda xs: row(*xs), 1) is not None:
        curved = pull(bent, xs) if bent.requires_grad else flat(torch.zeros_like(x) for x in xs)
        ways["forward over reverse"] = (forward_over_reverse, curved)
    return _compare(ways)


def _of_third_order(row: Row) -> dict[str, bool]:
    def bent(xs) -> Tensor:
        with torch.enable_grad():
            return second(row, leaves(xs)) @ row.along(1)

    truth = tried(lambda: difference(row, bent, 2))
    if truth is None or not truth.isfinite():
        return {}
    xs = leaves(row.point)
    found = tried(lambda: pull(second(row, xs, graph=True) @ row.along(1), xs) @ row.along(2))
    is_wrong = found is not None and not is_close(found, truth, 1e-3, 1e-4)
    return {"triple reverse": True} if is_wrong else {}


# --- torch's own samples -------------------------------------------------------------------


def complex_functions(info):
    """A sample with complex numbers within: all arguments complex, or one of two real."""
    if c128 not in info.supported_dtypes("cpu"):
        return
    for sample in formulas.samples_of(info, c128, 1, 20):
        arguments = ((sample.input, *sample.args), sample.kwargs)
        given, spec = optree.tree_flatten(arguments, none_is_leaf=True)
        active = [i for i, x in enumerate(given) if formulas.requires_grad(x) and is_number(x)]
        active = [i for i in active if given[i].dtype == c128 and given[i].numel()]
        reals = [None, *active] if len(active) == 2 else [None]
        for real in reals if active else ():
            yield _complex_function(info, sample, given, spec, active, real)


def _complex_function(info, sample, given, spec, active, real) -> Function:
    fixed = [x.detach() if isinstance(x, Tensor) else x for x in given]

    def run(xs):
        now = list(fixed)
        for i, x in zip(active, xs):
            z = fixed[i]
            now[i] = z.real + x if i == real else torch.complex(z.real + x, z.imag + 0.7 * x)
        args, kwargs = optree.tree_unflatten(spec, now)
        out = info.gradcheck_wrapper(info.get_op(), *args, **kwargs)
        return sample.output_process_fn_grad(out)

    return Function(run, [torch.zeros(fixed[i].shape, dtype=f64) for i in active])


def randn(*shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, dtype=f64, generator=generator)


def positive(*shape):
    return randn(*shape).abs() + 0.5


def regular(a):
    return a + 4 * torch.eye(a.shape[-1]).to(a)


def definite(a):
    return a @ a.mT + torch.eye(a.shape[-1]).to(a)


def factors(a):
    return torch.linalg.lu_factor(regular(a))


def chunked(x, w, reduction):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=1)
    target = torch.zeros(len(x), dtype=torch.long)
    return F.linear_cross_entropy(x, w, target, options=options, reduction=reduction)


def unpooled(dims):
    pool = getattr(F, f"max_pool{dims}d")
    unpool = getattr(F, f"max_unpool{dims}d")

    def run(x):
        pooled, places = pool(x, 2, 1, return_indices=True)
        return unpool(pooled.exp(), places, 2, 1)

    return run


def updated_batch_norm(x, w, b):
    stats = torch.zeros(3).to(x), torch.ones(3).to(x)
    return torch.ops.aten._batch_norm_with_update(x, w, b, *stats, 0.1, 1e-5)[0]


def legit_batch_norm(x, w, b):
    return torch._native_batch_norm_legit(x, w, b, True, 0.1, 1e-5)[0]


def group_mean(x):
    return torch.native_group_norm(x, None, None, 2, 4, 1, 2, 1e-5)[1]


# What torch's samples leave out: zeros, singular matrices, statistics, factors that move under
# vmap with what they were made of, variants that run by other names. By operation.
FAR = torch.tensor([-800.0, 400.0, 300.0], dtype=f64)
ZERO = torch.tensor([1.5, 0.0, 2.5], dtype=f64)
# A row of zeros leaves a pivot of zero on every processor; others may round it.
SINGULAR = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]], dtype=f64)
OVERLAPPING = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0, 0.5, 6.0, 2.5], dtype=f64)
EXAMPLES = {
    "native_layer_norm": (
        lambda x, w, b: F.layer_norm(x, (3,), w, b),
        [randn(2, 3), positive(3), randn(3)],
    ),
    "native_group_norm": (group_mean, [randn(2, 4, 1)]),
    "native_batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        [randn(4, 3), positive(3), randn(3)],
    ),
    "_native_batch_norm_legit": (legit_batch_norm, [randn(4, 3), positive(3), randn(3)]),
    "_batch_norm_with_update": (updated_batch_norm, [randn(4, 3), positive(3), randn(3)]),
    "_weight_norm_interface": (torch._weight_norm, [randn(3, 2), positive(3, 1)]),
    "pow.Tensor_Tensor": (lambda x, y: x**y, [positive(3), ZERO - 1.5]),
    "_linalg_det": (torch.det, [SINGULAR]),
    "_linalg_det, regular": (lambda a: torch.det(regular(a)), [randn(5, 5)]),
    "_linalg_slogdet": (lambda a: torch.linalg.slogdet(regular(a))[1], [randn(3, 3)]),
    "_linalg_solve_ex": (
        lambda a, b: torch.linalg.solve(regular(a), b),
        [randn(3, 3), randn(3, 2)],
    ),
    "linalg_lu_solve": (
        lambda a, b: torch.linalg.lu_solve(*factors(a), b),
        [randn(3, 3), randn(3, 2)],
    ),
    "pow of a real and a complex argument": (
        lambda x, y: x ** torch.complex(y, x.sin()),
        [positive(3), randn(3)],
    ),
    "cholesky_inverse": (
        lambda a: torch.cholesky_inverse(regular(a).tril()),
        [randn(3, 3)],
    ),
    "cholesky_inverse, what is not read": (
        lambda a: torch.cholesky_inverse(regular(a)),
        [randn(3, 3)],
    ),
    "linalg_householder_product": (torch.linalg.householder_product, [randn(3, 2), positive(2)]),
    "triangular_solve": (
        lambda b, a: torch.triangular_solve(b, regular(a))[0],
        [randn(3, 2), randn(3, 3)],
    ),
    "linalg_eig": (lambda a: torch.linalg.eig(definite(a))[1].abs(), [randn(3, 3)]),
    "_linalg_eigh": (lambda a: torch.linalg.eigh(definite(a))[1].abs(), [randn(3, 3)]),
    "_cdist_forward": (torch.cdist, [randn(3, 2), randn(4, 2) + 1]),
    "_pdist_forward": (F.pdist, [randn(4, 2)]),
    "_scaled_dot_product_flash_attention_for_cpu": (
        F.scaled_dot_product_attention,
        [randn(1, 2, 3, 2), randn(1, 2, 3, 2) + 1, randn(1, 2, 3, 2).sin()],
    ),
    "select_scatter": (
        lambda x: torch.select_scatter(x.sin(), x[:, 0] * x[:, 1], 1, 1).square(),
        [randn(2, 3)],
    ),
    "as_strided_scatter": (
        lambda x, s: torch.as_strided_scatter(x.exp(), s, (2, 2), (1, 2), 1),
        [randn(3, 3), randn(2, 2)],
    ),
    "scatter_reduce": (
        lambda x, s: x.scatter_reduce(0, torch.tensor([0, 0, 2]), s, "prod"),
        [ZERO.clone(), randn(3)],
    ),
    "max_unpool2d": (unpooled(1), [OVERLAPPING.view(1, 1, 8)]),
    "max_unpool2d, twice": (unpooled(2), [OVERLAPPING.view(1, 1, 2, 4)]),
    "max_unpool3d": (unpooled(3), [randn(1, 1, 2, 2, 4)]),
    "normal": (lambda mean, std: torch.normal(mean, std), [randn(3), positive(3)]),
    "_ctc_loss": (
        lambda x: F.ctc_loss(x, torch.tensor([1, 2]), torch.tensor(4), torch.tensor(2)),
        [randn(4, 3)],
    ),
    "logcumsumexp": (lambda x: x.logcumsumexp(0).sin(), [randn(4)]),
    "logcumsumexp, large": (lambda x: x.logcumsumexp(0), [FAR.clone()]),
    "logaddexp": (torch.logaddexp, [FAR.clone(), FAR.flip(0)]),
    "hardsigmoid": (F.hardsigmoid, [randn(3)]),
    "cumprod": (lambda x: x.cumprod(0), [ZERO.clone()]),
}
if SINCE_2_13:
    for _reduction, _end in {"sum": "", "none": "_no_reduction"}.items():
        EXAMPLES[f"_linear_cross_entropy_batch_chunked{_end}"] = (
            functools.partial(chunked, reduction=_reduction),
            [randn(2, 3), randn(4, 3)],
        )


def example(name: str) -> Function:
    func, point = EXAMPLES[name]
    return Function(lambda xs: func(*xs), point)


# --- what the table says, and what is so -----------------------------------------------------

# They run on other devices, or in newer releases.
ELSEWHERE = {
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
# Wrong where there are as many rows as numbers in one: see test_prelu.py.
BY_ITSELF = {"_prelu_kernel"}
OPS = [row for row in FAULTS if row.wrong != {"argnums"} and row.op not in ELSEWHERE | BY_ITSELF]
OPS = [row for row in OPS if row.since <= "2.11" or SINCE_2_13]


def packet(row) -> str:
    """``pow`` of ``pow.Tensor_Tensor`` and of ``pow of a real and a complex argument``."""
    return row.op.split(".")[0].split(" ")[0]


def kinds_of(names) -> set[str]:
    """What the table says is wrong of the operations."""
    return set().union(*(row.wrong for row in FAULTS if packet(row) in names))


def ways_of(function: Function, **options: bool) -> dict[str, bool]:
    row = tried(lambda: Row(function))
    found = tried(lambda: wrong_ways(row, **options)) if row is not None else None
    return found or {}


class Findings:
    """What is wrong of torch: by operation of the table, and what the table does not explain."""

    def __init__(self) -> None:
        self.kinds: dict[str, set[str]] = {}
        self.unexplained: dict[str, set[str]] = {}

    def note(self, label: str, names: set[str], ways: dict[str, bool]) -> None:
        for way, is_number_wrong in ways.items():
            rows = [row for row in FAULTS if packet(row) in names and row.wrong & WAYS[way]]
            for row in rows:
                self.kinds.setdefault(packet(row), set()).update(row.wrong & WAYS[way])
            if not rows and is_number_wrong:
                self.unexplained.setdefault(label, set()).add(way)

    def look(self, label: str, function: Function, *, thorough=False, once=False) -> None:
        names = tried(lambda: formulas.names_of(function)) or set()
        ways = ways_of(function, thorough=thorough, once=once)
        wrong = None if once else tried(lambda: Trial(function).wrong_ways(batched=thorough))
        if wrong:
            ways["of second order, with forward formulas"] = True
        self.note(label, names, ways)


@pytest.fixture(scope="module")
def findings():
    found = Findings()
    with torch.random.fork_rng(devices=[]):
        for label in EXAMPLES:
            found.look(label, example(label), thorough=True)
        for label, info in formulas.operations().items():
            for function in formulas.functions_of(info, 1, 40):
                found.look(label, function)
            for function in complex_functions(info):
                found.look(f"{label}, complex", function, once=True)
    return found


def test_every_fault_is_on_the_table(findings):
    assert not findings.unexplained, f"torch {torch.__version__}: rows are missing"


@pytest.mark.parametrize("row", OPS, ids=lambda row: row.op)
def test_everything_on_the_table_is_wrong(row, findings):
    # That a graph serves one pass is tested in test_plain_wrong.
    mended = row.wrong - {"single_pass"} - findings.kinds.get(packet(row), set())
    assert not mended, f"torch {torch.__version__}: {row.op} has these right by now"


# --- what runs instead -----------------------------------------------------------------------


def graph_names(outs):
    nodes, to_visit = [], [out.grad_fn for out in outs]
    for node in to_visit:
        if node is not None and node not in nodes:
            nodes.append(node)
            to_visit += [before for before, _ in node.next_functions]
    return replace.graph_names(nodes, outs)


def replaced(name: str) -> Function:
    func, point = EXAMPLES[name]

    def run(xs):
        with UseReplacements():
            return func(*xs)

    return Function(run, point)


REPLACED = [name for name in EXAMPLES if any(
    row.replacements for row in FAULTS if row.op == name.split(",")[0])]  # fmt: skip


@pytest.mark.parametrize("name", REPLACED)
def test_a_replacement_is_right_in_all_ways(name):
    row = Row(replaced(name))
    assert row.value.numel()
    torch.testing.assert_close(row.value, Row(example(name)).value)
    missing = {"double reverse"} if name == "_ctc_loss" else set()
    assert wrong_ways(row, thorough=True).keys() == missing
    assert not tried(lambda: Trial(replaced(name)).wrong_ways(batched=True))


@pytest.mark.parametrize("name", [name for name in REPLACED if name != "_ctc_loss"])
def test_a_replacement_has_all_derivatives(name):
    row = Row(replaced(name))
    xs = leaves(row.point)
    third = pull(second(row, xs, graph=True).sum(), xs)
    assert third.isfinite().all()
    assert torch.func.jacrev(row, row.argnums)(*row.point)[0].isfinite().all()


@pytest.mark.parametrize("row", [row for row in OPS if row.nodes], ids=lambda row: row.op)
def test_nodes_show_the_operation(row):
    name = next(name for name in EXAMPLES if name.split(",")[0] == row.op)
    func, point = EXAMPLES[name]
    func = torch.vmap(func) if row.op == "select_scatter" else func
    point = [x[None] for x in point] if row.op == "select_scatter" else point
    outs = optree.tree_leaves(func(*leaves(point)))
    names = graph_names(outs)
    assert names & set(row.nodes)
    kinds = row.wrong
    once = bool(kinds & {"reverse_1", "batching", "vmap", "single_pass"})
    assert needs_replacement(names, again=False) == once
    assert needs_replacement(names, again=True)
    with UseReplacements():
        outs = optree.tree_leaves(func(*leaves(point)))
    # Powers of positive exponents remain, a loss of what log_softmax returns, entries to write.
    remains = row.op in {"pow.Tensor_Tensor", "_ctc_loss", "as_strided_scatter"}
    assert remains or not needs_replacement(graph_names(outs), again=True)


def test_nothing_needs_a_replacement_in_a_plain_network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    names = graph_names([net(torch.ones(2, 3))])
    assert {"TanhBackward0", "AddmmBackward0"} <= names
    assert not needs_replacement(names, again=True)


def test_layer_norm_needs_a_replacement_where_it_is_differentiated_again():
    names = graph_names([F.layer_norm(randn(2, 3).requires_grad_(), (3,))])
    assert not needs_replacement(names, again=False)
    assert needs_replacement(names, again=True)


def test_forward_faults_by_name():
    names = {"mul", "mul.Tensor", "scatter_reduce", "scatter_reduce.two", "cumprod"}
    assert forward_faults(names) == {"scatter_reduce"}
    assert forward_faults(names, again=True) == {"scatter_reduce", "cumprod"}


NORMS = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "batch norm, mean of all": lambda: nn.BatchNorm1d(3, momentum=None),
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
}


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_move_as_those_of_torch(name):
    net, plain = NORMS[name]().to(f64), NORMS[name]().to(f64)
    for turn in range(2):
        plain(randn(4, 3, 5) + turn)
        with UseReplacements():
            net(randn(4, 3, 5) + turn)
    assert plain.running_mean.abs().max() > 0.01
    for ours, theirs in zip(net.buffers(), plain.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_inside_of_transforms(name):
    norm = F.instance_norm if "instance" in name else F.batch_norm
    options = {} if "instance" in name else {"training": True}
    moved = []
    for mode in (torch.enable_grad(), UseReplacements()):
        stats = torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64)
        func = lambda x: norm(x, *stats, **options).square().sum()
        with mode:
            torch.func.grad(func)(randn(4, 3, 5))
            with pytest.raises(RuntimeError, match="running_mean or running_var"):
                torch.vmap(func)(randn(2, 4, 3, 5))
        moved.append(stats)
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=0)
    assert moved[0][0].abs().max() > 0.01


@pytest.mark.skipif(not SINCE_2_13, reason="earlier releases were not looked at")
@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.hessian])
def test_transforms_of_torch_are_wrong_for_negative_argnums(transform):
    func = lambda x, y, z: (x * y + z**3).sum()
    args = randn(2), randn(2), positive(2)
    wanted = transform(func, 2)(*args)
    assert not torch.equal(transform(func, -1)(*args), wanted)
    names = {row.op for row in FAULTS if row.wrong == {"argnums"}}
    assert f"torch.func.{transform.__name__}" in names
