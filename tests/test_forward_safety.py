"""The list of unsafe forward formulas, derived from torch's own samples.

Every differentiable operation that torch tests itself is tried on its own samples. A release of
torch that adds a wrong formula, or mends one, fails here with its name.
"""

import functools

import pytest
import torch

from funcjac._modes import UNSAFE_FORWARD
from tests import forward_formulas as formulas
from tests.forward_formulas import Function, Trial
from tests.oracles import SINCE_2_13

# They run on other devices or in newer releases; no sample shows them to be wrong.
ELSEWHERE = {"cudnn_batch_norm", "miopen_batch_norm"}
if not SINCE_2_13:
    ELSEWHERE |= {name for name in UNSAFE_FORWARD if name.startswith("_linear_cross_entropy")}


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# What torch's samples leave out: factors that move under vmap with what they were made of, real
# eigenvectors, the variants of batch norm that run by other names. Each with what is to blame
# where no operation is wrong by itself.
def lu_solve(a, b):
    return torch.linalg.lu_solve(*torch.linalg.lu_factor(a + 4 * torch.eye(3).to(a)), b)


def eig(a):
    return torch.linalg.eig(a @ a.mT + torch.eye(3).to(a))[1].abs()


def eigh(a):
    return torch.linalg.eigh(a @ a.mT + torch.eye(3).to(a))[1].abs()


def batch_norm_legit(x):
    return torch.ops.aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0]


def batch_norm_with_update(x):
    zero, one = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)
    mean, var = zero.clone(), one.clone()
    return torch.ops.aten._batch_norm_with_update(x, one, zero, mean, var, 0.1, 1e-5)[0]


FURTHER = {
    "lu_solve of lu_factor": (lu_solve, [(3, 3), (3, 2)], "linalg_lu_solve"),
    "eig of a definite matrix": (eig, [(3, 3)], "linalg_eig"),
    "eigh of a definite matrix": (eigh, [(3, 3)], "_linalg_eigh"),
    "batch norm without statistics": (batch_norm_legit, [(4, 3)], "_native_batch_norm_legit"),
    "batch norm with update": (batch_norm_with_update, [(4, 3)], "_batch_norm_with_update"),
}


@functools.cache
def operations():
    return formulas.operations()


@functools.cache
def findings(name):
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        if name not in FURTHER:
            return formulas.findings(operations()[name])
        func, shapes, suspect = FURTHER[name]
        function = Function(lambda xs: func(*xs), [randn(*shape) for shape in shapes])
        ways = Trial(function).wrong_ways(batched=True)
        blames = (formulas.blamed(function) or {suspect}) if ways else set()
        return {blame: set(ways) for blame in blames}


# Samples are full of what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")


def names():
    return [*operations(), *FURTHER]


@pytest.fixture(scope="module")
def wrong():
    """Each operation with a wrong formula: the samples and ways that show it."""
    found: dict[str, list[str]] = {}
    for name in names():
        for blame, ways in findings(name).items():
            found.setdefault(blame, []).append(f"{name} ({', '.join(sorted(ways))})")
    return found


def test_every_wrong_formula_is_in_the_list(wrong):
    missing = {name: shown for name, shown in wrong.items() if name not in UNSAFE_FORWARD}
    assert not missing, f"torch {torch.__version__}: add to UNSAFE_FORWARD"


def test_everything_in_the_list_is_wrong(wrong):
    mended = UNSAFE_FORWARD - ELSEWHERE - wrong.keys()
    assert not mended, f"torch {torch.__version__}: these can leave UNSAFE_FORWARD"


def test_enough_operations_are_tried():
    assert len(operations()) > 450


# --- the tool itself ------------------------------------------------------------------------


class WrongTwice(torch.autograd.Function):
    """``x ** 3`` with a forward formula whose derivative is lost."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * 3 * x.detach() ** 2


def test_a_formula_that_loses_its_derivative_is_found():
    x = [randn(4) + 2]
    assert Trial(Function(lambda xs: WrongTwice.apply(xs[0]), x)).wrong_ways()
    assert Trial(Function(lambda xs: xs[0] ** 3, x)).wrong_ways() == []


def test_a_kink_is_no_verdict():
    near = [torch.full((1,), 3e-5, dtype=torch.float64)]
    assert Trial(Function(lambda xs: xs[0].abs(), near)).truth() is None


def test_blame_falls_on_the_operation_inside():
    function = Function(lambda xs: torch.linalg.det(xs[0].sin() + 2) * 3, [randn(3, 3)])
    assert Trial(function).wrong_ways()
    assert formulas.blamed(function) == {"_linalg_det"}
