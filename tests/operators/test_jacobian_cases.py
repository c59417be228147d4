"""Every function of the table, in every engine and mode, against slow and plain autograd.

Whatever is returned is right, and whatever cannot be done is said; in both cases nothing of
the caller's has changed. ``docs/functions.md`` shows the outcome of each.
"""

import functools
import re
import warnings
from pathlib import Path

import optree
import pytest
import torch
from torch import Tensor, nn

from funcjac import BatchMixingError, EngineFallbackWarning, VerificationError, batch_jacobian
from tests import oracles
from tests.cases.case import Case, Setup
from tests.cases.first_order import CASES
from tests.oracles import NAMESPACE
from tests.tensors import set_seed

# ``fwd`` of the engines ``sum`` and ``loop`` is one way, the transposed VJP.
ROUTES = ["auto", "vmap/rev", "vmap/fwd", "sum/rev", "sum/fwd", "loop/rev"]
SEED = 7
PAGE = Path(__file__).parents[2] / "docs" / "functions.md"

RIGHT = [case for case in CASES if case.expected is None]
REFUSED = [case for case in CASES if case.expected is not None]
by_name = functools.partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)
by_route = pytest.mark.parametrize("route", ROUTES)


# --- calling -----------------------------------------------------------------------------


def transformed(case: Case, setup: Setup, route: str):
    """``batch_jacobian`` of the case's function, quiet about the engines it leaves."""
    engine, mode = ("auto", "auto") if route == "auto" else route.split("/")
    jac = batch_jacobian(setup.func, engine=engine, mode=mode, **case.keywords)

    def call():
        set_seed(SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineFallbackWarning)
            return jac(*setup.args, **setup.kwargs)

    return call


def is_documented(error: Exception) -> bool:
    """Whether an error is one that the documentation promises, in the words of the house."""
    if isinstance(error, (BatchMixingError, VerificationError)):
        return str(error).startswith("batch_jacobian: ")
    text = str(error)
    if re.match(r"batch_jacobian: engine='\w+' with mode='\w+' cannot differentiate func", text):
        return type(error) in (RuntimeError, ValueError)
    known = type(error) in (TypeError, ValueError, RuntimeError)
    return known and text.startswith("batch_jacobian: expected ")


# --- the oracle --------------------------------------------------------------------------

# NOTE [Draws]
# A random function has a Jacobian for each draw, and engines draw differently: the sum trick
# and vmap for the whole batch, the loop for one row after the other, and randomness="same" once
# for all rows. Each result is right if it is the Jacobian of its engine's draw.


def draws(case: Case, route: str) -> list[str]:
    """The oracles of which the result must match one: see NOTE [Draws]."""
    randomness = case.keywords.get("randomness", "error")
    if randomness == "error":
        return [case.oracle]
    if randomness == "same":
        return ["replay"]
    return ["rows" if "loop" in route else "batch"]


def oracle(case: Case, setup: Setup, draw: str, *, graph: bool = False):
    words = {k: v for k, v in case.keywords.items() if k != "randomness"}
    words |= {"graph": graph, "seed": SEED}
    if draw == "batch":
        return oracles.by_batch(setup.func, setup.args, setup.kwargs, **words)
    return oracles.by_rows(setup.func, setup.args, setup.kwargs, replay=draw == "replay", **words)


@functools.cache
def expected(case_name: str, draw: str):
    """The right Jacobian, and the random state that its draw leaves behind."""
    case = next(case for case in CASES if case.name == case_name)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        jac = optree.tree_map(Tensor.detach, oracle(case, case.build(), draw), namespace=NAMESPACE)
        return jac, torch.get_rng_state()


def assert_right(found, case: Case, route: str) -> str:
    """``found`` is the Jacobian, with nothing drawn beyond it; returns the draw it belongs to."""
    state, failure = torch.get_rng_state(), None
    for draw in draws(case, route):
        right, after = expected(case.name, draw)
        try:
            assert_same(found, right)
            assert torch.equal(state, after), "the random state moved more than func moves it"
        except AssertionError as error:
            failure = failure or error
        else:
            return draw
    raise failure


def assert_same(found, right) -> None:
    """Same tree, shapes, dtypes and values; dense and contiguous."""
    ours, spec = optree.tree_flatten(found, namespace=NAMESPACE)
    theirs, right_spec = optree.tree_flatten(right, namespace=NAMESPACE)
    assert spec == right_spec
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is Tensor
        assert one.is_contiguous()
        torch.testing.assert_close(one.detach(), other)


# --- what must stay as it was ------------------------------------------------------------


def modules_of(setup: Setup) -> list[nn.Module]:
    """Every module in reach of the function."""
    found, stack = {}, [setup.func]
    while stack:
        item = stack.pop()
        if isinstance(item, nn.Module):
            found.update((id(m), m) for m in item.modules())
        stack += [getattr(item, "__self__", None)] if hasattr(item, "__self__") else []
        cells = getattr(item, "__closure__", None) or ()
        stack += [cell.cell_contents for cell in cells] + list(
            getattr(item, "__defaults__", None) or ()
        )
    return list(found.values())


class Snapshot:
    """Everything of the caller's that a transform must leave alone.

    A function that moves changes its modules as a plain run does:
    tests/dispatch/test_side_effects.py.
    """

    def __init__(self, setup: Setup, *, moves: bool = False, wrapped: bool = False) -> None:
        self.modules = [] if moves else modules_of(setup)
        if moves:
            setup = Setup(setup.func, (), {})
        tensors = [t for t in optree.tree_leaves(setup.args, namespace=NAMESPACE) if t is not None]
        tensors += [v for v in setup.kwargs.values() if isinstance(v, Tensor)]
        for module in self.modules:
            tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        self.tensors = [(t, t.detach().clone(), t.requires_grad, self._grad(t)) for t in tensors]
        self.attributes = [self._attributes(module) for module in self.modules]
        self.kept = [] if wrapped else setup.kept

    @staticmethod
    def _grad(tensor: Tensor) -> Tensor | None:
        return tensor.grad if tensor.is_leaf else None

    @staticmethod
    def _attributes(module: nn.Module) -> dict:
        """The objects that a module holds, and what is in its containers (hooks, too)."""
        if isinstance(module, torch.jit.ScriptModule):
            return {"training": module.training}
        found = dict(vars(module))
        for key, value in vars(module).items():
            if isinstance(value, dict):
                found.update({(key, name): inner for name, inner in value.items()})
            elif isinstance(value, list):
                found.update({(key, i): inner for i, inner in enumerate(value)})
        return found

    def assert_unchanged(self) -> None:
        for tensor, value, requires_grad, grad in self.tensors:
            assert torch.equal(tensor.detach(), value), "a tensor of the caller's was written to"
            assert tensor.requires_grad is requires_grad
            assert self._grad(tensor) is grad
            assert not tensor._backward_hooks
        for module, before in zip(self.modules, self.attributes):
            now = self._attributes(module)
            assert now.keys() == before.keys(), type(module)
            changed = [key for key in now if now[key] is not before[key]]
            assert not changed or isinstance(module, torch.jit.ScriptModule), changed
            assert module.training == before["training"]
        dead = torch._C._functorch.is_functorch_wrapped_tensor
        assert not any(dead(t) for t in self.kept), "a dead wrapper was left in a list"


# --- tests -------------------------------------------------------------------------------


def calls_of(case: Case, route: str, number: int, *, grad: bool = False):
    """For each call what it must leave alone, the call, and tensors that require grad."""
    for turn in range(number):
        if turn == 0 or case.moves:
            setup = case.build()
            wrt = require_grad(setup) if grad else []
            call = transformed(case, setup, route)
        yield Snapshot(setup, moves=case.moves, wrapped=route.startswith("vmap")), call, wrt


def must_be_right(case: Case, route: str, *, twice: bool = False) -> bool:
    return route == "auto" or case.can(route, twice=twice)


@by_route
@by_name(RIGHT)
def test_jacobian_is_right_in_three_calls_and_leaves_no_trace(case: Case, route: str) -> None:
    for before, call, _ in calls_of(case, route, 3):
        try:
            found = call()
        except Exception as error:
            before.assert_unchanged()
            if must_be_right(case, route) or not is_documented(error):
                raise
            continue
        assert_right(found, case, route)
        before.assert_unchanged()


@by_name(RIGHT)
def test_auto_stays_right_under_no_grad(case: Case) -> None:
    with torch.no_grad():
        for before, call, _ in calls_of(case, "auto", 5):
            found = call()
            assert_right(found, case, "auto")
            before.assert_unchanged()
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(found, namespace=NAMESPACE))


@by_route
@by_name(REFUSED)
def test_what_has_no_jacobian_is_refused(case: Case, route: str) -> None:
    setup = case.build()
    before = Snapshot(setup, moves=case.moves, wrapped=route.startswith("vmap"))
    call = transformed(case, setup, route)
    for _ in range(2):
        with pytest.raises(Exception) as caught:  # noqa: PT011  compared below
            call()
        before.assert_unchanged()
        if route == "auto" or case.group == "refused":
            assert type(caught.value) is case.expected
            assert case.match in str(caught.value)
        else:
            assert is_documented(caught.value), caught.value


def require_grad(setup: Setup) -> list[Tensor]:
    """Let the arguments require grad; these, and the parameters in reach, that do."""
    leaves = optree.tree_leaves(setup.args, namespace=NAMESPACE)
    for x in leaves:
        if isinstance(x, Tensor) and x.is_floating_point():
            x.requires_grad_()
    parameters = [p for m in modules_of(setup) for p in m.parameters(recurse=False)]
    return list({id(t): t for t in [*leaves, *parameters] if t.requires_grad}.values())


def weighted(jac) -> Tensor:
    """A fixed random contraction of the Jacobian."""
    generator = torch.Generator().manual_seed(3)
    return sum(
        (block * torch.randn(block.shape, generator=generator, dtype=block.dtype)).sum().double()
        for block in optree.tree_leaves(jac, namespace=NAMESPACE)
    )


def gradients(jac, wrt: list[Tensor]) -> list[Tensor]:
    """Gradients of that contraction; zeros where it does not depend on a tensor."""
    loss = weighted(jac)
    if not loss.requires_grad:
        return [torch.zeros_like(t) for t in wrt]
    return list(torch.autograd.grad(loss, wrt, allow_unused=True, materialize_grads=True))


@functools.cache
def expected_gradients(case_name: str, draw: str) -> list[Tensor]:
    case = next(case for case in CASES if case.name == case_name)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        setup = case.build()
        wrt = require_grad(setup)
        return gradients(oracle(case, setup, draw, graph=True), wrt)


@by_route
@by_name([case for case in RIGHT if case.twice])
def test_jacobian_can_be_differentiated(case: Case, route: str) -> None:
    if case.moves and route.startswith("vmap"):
        pytest.skip("func runs twice, and writes to what the first graph keeps")
    for before, call, wrt in calls_of(case, route, 2, grad=True):
        try:
            found = call()
        except Exception as error:
            before.assert_unchanged()
            if must_be_right(case, route, twice=True) or not is_documented(error):
                raise
            continue
        draw = assert_right(found, case, route)
        before.assert_unchanged()
        right = expected_gradients(case.name, draw)
        for one, other in zip(gradients(found, wrt), right, strict=True):
            torch.testing.assert_close(one, other)
        before.assert_unchanged()


@by_name([case for case in RIGHT if not case.twice])
def test_jacobian_is_right_where_it_cannot_be_differentiated(case: Case) -> None:
    for before, call, _ in calls_of(case, "auto", 2, grad=True):
        assert_right(call(), case, "auto")
        before.assert_unchanged()


# Hooks and no_grad blocks mean something else inside of torch.func, by torch's own rules.
INSIDE = [
    case
    for case in RIGHT
    if case.twice and case.smooth and case.group != "hooks" and "randomness" not in case.keywords
]


@pytest.mark.parametrize("mode", ["auto", "rev", "fwd"])
@by_name(INSIDE)
def test_jacobian_inside_torch_func_is_right_if_it_runs(case: Case, mode: str) -> None:
    """Nothing is verified inside of a transform, so what is not safe must not run there."""
    setup = case.build()
    leaves, spec = optree.tree_flatten(setup.args, none_is_leaf=True, namespace=NAMESPACE)
    first = next(i for i, x in enumerate(leaves) if x is not None and x.is_floating_point())
    before = Snapshot(setup, moves=case.moves)
    jac = batch_jacobian(setup.func, mode=mode, **case.keywords)

    def loss(x: Tensor) -> Tensor:
        args = optree.tree_unflatten(spec, [*leaves[:first], x, *leaves[first + 1 :]])
        return weighted(jac(*args, **setup.kwargs))

    for _ in range(2):
        try:
            found = torch.func.grad(loss)(leaves[first])
        except Exception:
            before.assert_unchanged()
            if case.can("vmap/rev") and case.group not in ("inplace", "autograd") and mode != "fwd":
                raise
            continue
        before.assert_unchanged()
        torch.testing.assert_close(found, expected_gradients(case.name, case.oracle)[0])


INPLACE = [case for case in RIGHT if case.group == "inplace"]


@by_route
@by_name([case for case in INPLACE if not case.moves])
def test_inplace_spares_inputs_that_are_not_leaves(case: Case, route: str) -> None:
    setup = case.build()
    args = tuple(x.clone().requires_grad_() * 1 for x in setup.args)
    setup = Setup(setup.func, args)
    before, call = Snapshot(setup), transformed(case, setup, route)
    for _ in range(3):
        try:
            found = call()
        except Exception as error:
            before.assert_unchanged()
            if must_be_right(case, route) or not is_documented(error):
                raise
            continue
        before.assert_unchanged()
        assert_right(found, case, route)


# --- the oracles themselves ----------------------------------------------------------------


EXACT = [
    case
    for case in RIGHT
    if case.smooth
    and all(
        t.dtype == torch.float64
        for t in optree.tree_leaves(case.build().args, namespace=NAMESPACE)
        if t is not None and t.is_floating_point()
    )
    and not ("float" in case.name or "dtype" in case.name)
]


@by_name(EXACT)
def test_oracle_agrees_with_central_differences(case: Case) -> None:
    setup = case.build()
    words = {k: v for k, v in case.keywords.items() if k != "randomness"}
    found = oracles.by_differences(setup.func, setup.args, setup.kwargs, seed=SEED, **words)
    ours, spec = optree.tree_flatten(found, namespace=NAMESPACE)
    theirs, right_spec = optree.tree_flatten(expected(case.name, "batch")[0], namespace=NAMESPACE)
    assert spec == right_spec
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@by_name([case for case in RIGHT if case.oracle == "rows" and "randomness" not in case.keywords])
def test_oracle_by_rows_agrees_with_oracle_by_batch(case: Case) -> None:
    assert_same(expected(case.name, "rows")[0], expected(case.name, "batch")[0])


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_page_lists_the_cases_of_the_table() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert listed == [case.name for case in CASES]
