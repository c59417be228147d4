"""Every function of the table, in every second-order transform and mode, against the oracle.

What is returned is right on every call, and what cannot be done is said. Float32 is held
against the oracle in float64.
"""

import contextlib
import dataclasses
import functools
import itertools
import warnings

import optree
import pytest
import torch
from torch import Tensor, nn

from funcjac import (
    BatchMixingError,
    EngineFallbackWarning,
    VerificationError,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_laplacian,
    batch_partials,
)
from tests import oracles
from tests.cases.case import Case, Setup, f32, f64
from tests.cases.second_order import CASES
from tests.oracles import NAMESPACE

NESTED = ["fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd", "auto"]
TRANSFORMS = {
    "hessian": (batch_hessian, NESTED),
    "diagonal": (batch_hessian_diagonal, ["taylor", *NESTED]),
    "laplacian": (batch_laplacian, ["taylor", *NESTED]),
}
# The nested modes of all three take one way: two of the Hessian's meet every function, the others
# a few. Float32 meets the modes that come without being asked for.
FEW = {
    "mlp_tanh",
    "mlp_layer_norm",
    "mlp_relu",
    "conv2d_max_pool",
    "attention_math",
    "lstm",
    "parameters",
    "powers",
    "scalar_rows",
    "partly_constant",
    "prod_with_zeros",
}
# The value, first, second and third derivatives of three inputs; order and sign do not matter.
INDICES = [(), (1,), (0, 2), (2, 2), (1, 0, 1), (-1, 0, 0)]

by_case = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


# --- what must come of it ----------------------------------------------------------------


@functools.cache
def found_by_rows(name: str) -> oracles.Derivatives:
    case = next(case for case in CASES if case.name == name)
    setup = case.build_twin()
    with torch.enable_grad():
        return oracles.derivatives(setup.func, setup.args, setup.kwargs, **case.keywords)


def expected(case: Case, name: str):
    right = found_by_rows(case.name)
    if name == "hessian":
        return right.rows.as_hessian(right.hess)
    if name == "diagonal":
        return right.rows.as_jacobian(right.diagonal())
    return right.rows.as_output(right.laplacian())


def assert_right(found, right, dtype: torch.dtype) -> None:
    """Same tree, shapes and values, of the dtype of the call; errors relative to the largest."""
    ours, spec = optree.tree_flatten(found, namespace=NAMESPACE)
    theirs, right_spec = optree.tree_flatten(right, namespace=NAMESPACE)
    assert spec == right_spec
    limit = 1e-8 if dtype == f64 else 1e-3
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is Tensor
        assert one.dtype == dtype
        scale = 1 + max((leaf.abs().max().item() for leaf in theirs if leaf.numel()), default=0)
        torch.testing.assert_close(one.detach().double(), other, rtol=0, atol=limit * scale)


# --- calling -----------------------------------------------------------------------------


@contextlib.contextmanager
def nothing_changes(func, args):
    """Arguments, parameters, buffers, flags and the random state are as before."""
    module = func if isinstance(func, nn.Module) else nn.Module()
    tensors = [x for x in optree.tree_leaves(args, namespace=NAMESPACE) if isinstance(x, Tensor)]
    tensors += [*module.parameters(), *module.buffers()]
    before = [(x.detach().clone(), x.requires_grad, x._version) for x in tensors]
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)
    for x, (value, flag, version) in zip(tensors, before):
        assert torch.equal(x, value)
        assert x.requires_grad == flag
        assert x._version == version
        assert x.grad is None


def is_documented(error: Exception, transform) -> bool:
    kinds = (RuntimeError, ValueError, NotImplementedError, VerificationError, BatchMixingError)
    return type(error) in kinds and str(error).startswith(f"{transform.__name__}: ")


def must_manage(case: Case, mode: str, error: Exception) -> bool:
    if mode == "auto":
        return case.can("second")
    # Taylor's rules for third derivatives do not reach as far as those for second ones.
    return case.can(mode, "second") and "derivatives of order" not in str(error)


def run(transform, case: Case, mode: str, dtype: torch.dtype, *more, calls=2, **more_keywords):
    """What each of several calls returns; an error where one is allowed counts as no result."""
    setup = case.build(dtype)
    transformed = transform(setup.func, *more, mode=mode, **case.keywords, **more_keywords)
    results = []
    for _ in range(calls):
        with nothing_changes(setup.func, setup.args), warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineFallbackWarning)
            try:
                results.append(transformed(*setup.args, **setup.kwargs))
            except Exception as error:
                if must_manage(case, mode, error) or not is_documented(error, transform):
                    raise
    return results


# --- the table ---------------------------------------------------------------------------


def routes():
    for case in CASES:
        for name, (_, modes) in TRANSFORMS.items():
            for mode in modes:
                by_name = "over" in mode
                common = name == "hessian" and mode.endswith("rev")
                if not by_name or common or case.name in FEW:
                    yield case, f"{name}/{mode}", f64
                if mode == "auto" or (name, mode) == ("laplacian", "taylor"):
                    yield case, f"{name}/{mode}", f32


@pytest.mark.parametrize(
    ("case", "route", "dtype"),
    [pytest.param(*route, id=f"{route[0].name}-{route[1]}-{route[2]}") for route in routes()],
)
def test_second_derivatives_are_right_on_every_call(case, route, dtype):
    name, mode = route.split("/")
    right = expected(case, name)
    for found in run(TRANSFORMS[name][0], case, mode, dtype):
        assert_right(found, right, dtype)


# torch.func gives nan for the determinant of the identity, which only verification finds.
@pytest.mark.parametrize("name", ["hessian", "laplacian"])
@by_case([case for case in CASES if case.name != "det_at_identity"])
def test_auto_is_right_unverified(case, name):
    """``auto`` does not count on verification to find what is known to be wrong in torch."""
    for found in run(TRANSFORMS[name][0], case, "auto", f64, calls=1, check=False):
        assert_right(found, expected(case, name), f64)


@pytest.mark.parametrize("name", ["hessian", "laplacian"])
@by_case(CASES)
def test_value_and_jacobian_come_along(case, name):
    """Both come from the same pass, and are those of ``func``."""
    right = found_by_rows(case.name)
    for found, (jac, value) in run(TRANSFORMS[name][0], case, "auto", f64, return_value=True):
        assert_right(found, expected(case, name), f64)
        assert_right(jac, right.rows.as_jacobian(right.jac), f64)
        assert_right(value, right.rows.as_output(right.value), f64)


def attached(case: Case) -> tuple[Setup, list[Tensor]]:
    """Arguments that require grad, and all tensors to differentiate by."""
    setup = case.build(f64)
    func = setup.func
    flags = lambda x: x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
    args = optree.tree_map(flags, setup.args, namespace=NAMESPACE)
    leaves = [x for x in optree.tree_leaves(args, namespace=NAMESPACE) if isinstance(x, Tensor)]
    leaves += list(func.parameters()) if isinstance(func, nn.Module) else []
    setup = dataclasses.replace(setup, args=args)
    return setup, [x for x in leaves if x.requires_grad]


def gradients(found, leaves) -> list[Tensor]:
    """Of a weighted sum of all that was found; zero where nothing depends on a leaf."""
    outs = optree.tree_leaves(found, namespace=NAMESPACE)
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=f64)
    for out in outs:
        total = total + (torch.randn(out.shape, generator=generator, dtype=f64) * out).sum()
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(total, leaves, materialize_grads=True))


TRAINED = [case for case in CASES if case.can("second", "third")]


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param("laplacian", case, id=f"laplacian-{case.name}") for case in TRAINED]
    + [pytest.param("diagonal", case, id=f"diagonal-{case.name}") for case in TRAINED[::5]],
)
def test_gradients_of_a_loss_on_second_derivatives_are_right(name, case):
    """The gradient of a loss on second derivatives, by the input and by all parameters."""
    setup, leaves = attached(case)
    oracle = functools.partial(getattr(oracles, name), create_graph=True)
    plain = case.twin(setup.func) if case.twin else setup.func
    right = gradients(oracle(plain, setup.args, setup.kwargs, **case.keywords), leaves)
    transformed = TRANSFORMS[name][0](setup.func, **case.keywords)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineFallbackWarning)
            found = gradients(transformed(*setup.args, **setup.kwargs), leaves)
        assert_right(found, right, f64)


# --- partial derivatives and divergence --------------------------------------------------


def takes_vectors(case: Case) -> bool:
    """One input ``(B, d)``, in which ``batch_partials`` can count."""
    args = case.build(f64).args
    where = case.keywords.get("in_dims", 0)
    where = where[0] if isinstance(where, tuple) else where
    first = args[0]
    plain = case.keywords.get("argnums", 0) == 0 and where == 0
    return plain and isinstance(first, Tensor) and first.ndim == 2 and first.shape[1] == 3


VECTORS = [case for case in CASES if takes_vectors(case)]


def test_the_table_is_long():
    assert len(CASES) > 150
    assert {case.name for case in CASES} >= FEW
    assert len(VECTORS) > 110
    assert sum(map(is_field, CASES)) > 30


@functools.cache
def partials_by_rows(name: str):
    case, derived = next(case for case in CASES if case.name == name), found_by_rows(name)
    low = [index for index in INDICES if len(index) < 3]
    tensors = [(derived.value, derived.jac, derived.hess)[len(index)] for index in low]
    right = [x[(..., *index)] for x, index in zip(tensors, low)]
    right = [derived.rows.as_output(x) for x in right]
    high = [index for index in INDICES if len(index) == 3] if case.can("third") else []
    setup = case.build_twin()
    right += oracles.partials(setup.func, setup.args, high, setup.kwargs, **case.keywords)
    return low + high, tuple(right)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("taylor", f64), ("rev", f64), ("auto", f32)],
    ids=str,
)
@by_case(VECTORS)
def test_partials_up_to_order_three_are_right(case, mode, dtype):
    indices, right = partials_by_rows(case.name)
    for found in run(batch_partials, case, mode, dtype, indices):
        assert isinstance(found, tuple)
        assert_right(found, right, dtype)


def is_field(case: Case) -> bool:
    """Input and output leaves have the same shapes."""
    setup = case.build_twin()
    rows = oracles.rows_of(setup.func, setup.args, setup.kwargs, **case.keywords)
    return rows.in_shapes == rows.out_shapes


@by_case(CASES)
def test_divergence_is_the_trace_or_is_refused(case):
    """The trace of the Jacobian, where it has one."""
    if not is_field(case):
        setup = case.build(f64)
        with pytest.raises(ValueError, match=r"^batch_divergence: expected func to return rows"):
            batch_divergence(setup.func, **case.keywords)(*setup.args, **setup.kwargs)
        return
    right = found_by_rows(case.name).jac.diagonal(dim1=1, dim2=2).sum(1)
    for mode, dtype in itertools.product(["fwd", "rev", "auto"], [f64, f32]):
        for found in run(batch_divergence, case, mode, dtype):
            assert found.shape == (4,)
            assert_right(found, right, dtype)
