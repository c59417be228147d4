"""Functions that raise midway: their error reaches the user as itself, nothing changed."""

import pytest
import torch
from torch._C._functorch import peek_interpreter_stack

from funcjac import batch_jacobian, check_batched, check_derivative, explain
from tests.tensors import quiet, randn
from tests.watched import MODES, TRANSFORMS, B, Watched, close, unchanged


class Mine(Exception):
    pass


class Backward(torch.autograd.Function):
    """Raises where it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise Mine("backward")

    @staticmethod
    def jvp(ctx, tangent):
        raise Mine("jvp")


def in_vmap(x):
    if peek_interpreter_stack() is not None:
        raise Mine("inside of torch.func")
    return x.sin()


def for_one_row(x):
    if x.shape[0] == 1:
        raise Mine("one row")
    return x.sin()


ENGINES = ("auto", "vmap", "sum", "loop")

ROUTES = [(n, e, m) for n in TRANSFORMS for e in ENGINES for m in MODES[n]]
ROUTES = [r for r in ROUTES if r[2] != "taylor" or r[1] in ("auto", "sum")]

by_route = pytest.mark.parametrize(("name", "engine", "mode"), ROUTES)


def tried(run):
    """What ``run`` raised, if it did."""
    try:
        run()
    except (Mine, RuntimeError) as error:
        return error
    return None


@quiet
@by_route
@pytest.mark.parametrize("k", [1, 2])
def test_an_error_of_the_kth_run_reaches_the_user(k, name, engine, mode):
    """It reaches the user as itself, as the cause of what an engine says, or was not needed."""
    error = Mine(k)

    def raises(x):
        if func.count == k:
            raise error
        return x.sin()

    func, x = Watched(raises), randn(B, 3)
    transformed = TRANSFORMS[name](func, engine=engine, mode=mode)
    right = TRANSFORMS[name](torch.sin)(x)
    for _ in range(3):
        with unchanged(func, [x]):
            raised = tried(lambda: close(transformed(x), right))
        if raised is not None and raised is not error:
            assert raised.__cause__ is error
            assert type(raised) is RuntimeError
            assert (engine, mode) != ("auto", "auto")
            assert str(raised).startswith(f"{name}: ")
    close(transformed(x), right)
    if k == 1:
        func.tally.runs = 0
        with unchanged(func, [x]), pytest.raises((Mine, RuntimeError)) as found:
            TRANSFORMS[name](func, engine=engine, mode=mode)(x)
        # A known key starts with the engine that was asked for; a plain run then tells nothing.
        assert error in (found.value, found.value.__cause__)


@by_route
def test_an_error_in_backward_reaches_the_user(name, engine, mode):
    func, x = Watched(lambda x: Backward.apply(x)), randn(B, 3)
    transformed = TRANSFORMS[name](func, engine=engine, mode=mode)
    for _ in range(2):
        with unchanged(func, [x]), pytest.raises(Mine, match=r"^(backward|jvp)$") as found:
            transformed(x)
        assert found.value.__cause__ is None


@quiet
@by_route
@pytest.mark.parametrize("raises", [in_vmap, for_one_row])
def test_an_error_that_only_an_engine_meets_is_its_cause(raises, name, engine, mode):
    func, x = Watched(raises), randn(B, 3)
    transformed = TRANSFORMS[name](func, engine=engine, mode=mode)
    right = TRANSFORMS[name](torch.sin)(x)
    for _ in range(2):
        with unchanged(func, [x]):
            raised = tried(lambda: close(transformed(x), right))
        if raised is not None:
            assert isinstance(raised.__cause__, Mine)
            assert type(raised) is RuntimeError
            assert engine != "auto"
            assert str(raised).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("look", "k"),
    [
        (explain, 1),
        (check_derivative, 1),
        (check_derivative, 3),
        (check_batched, 1),
        (check_batched, 2),
    ],
)
def test_explain_and_checks_pass_errors_on(k, look):
    error = Mine(k)

    def raises(x):
        if func.count >= k:
            raise error
        return x.sin()

    func, x = Watched(raises), randn(B, 3)
    given = func if look is check_batched else batch_jacobian(func)
    with unchanged(func, [x]):
        raised = tried(lambda: look(given, x))
    assert error in (raised, raised.__cause__)


@pytest.mark.parametrize("name", ["batch_jacobian", "batch_hessian", "batch_laplacian"])
def test_an_error_from_some_run_on_reaches_the_user(name):
    error = Mine("from now on")

    def raises(x):
        if func.count > 2:
            raise error
        return x.sin()

    func, x = Watched(raises), randn(B, 3)
    transformed = TRANSFORMS[name](func)
    for _ in range(2):
        transformed(x)
    for _ in range(2):
        with unchanged(func, [x]), pytest.raises(Mine) as found:
            transformed(x)
        assert found.value is error
