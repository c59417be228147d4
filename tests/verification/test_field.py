"""What other people's programs showed: one test for each kind of fault."""

import copy
import io
import pickle
import random
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as torch_pytree

from funcjac import (
    BatchMixingError,
    EngineFallbackWarning,
    VerificationError,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    check_derivative,
    explain,
)
from tests import oracles
from tests.fresh import fresh

B = 4
f64 = torch.float64


def randn(*shape):
    return torch.randn(*shape, dtype=f64)


def equal(got, expected, tolerance=1e-9):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def network(outputs=3):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


# --- B1: where nobody looks at values ----------------------------------------------------


def complex_power(w):
    """``(B, 1) -> (B, 4)``, whose forward formula is wrong for a real base."""
    exponents = torch.tensor([1 + 1j, 2 + 1j], dtype=torch.complex128)
    return torch.view_as_real(torch.pow(w, exponents)).flatten(1)


def by_lu(x):
    """A step of an implicit scheme; ``lu_solve`` has a wrong batching rule in reverse."""
    mixing = torch.linspace(-1, 1, 16, dtype=f64).view(4, 4).cos()
    matrix = x[:, :, None] * mixing * 0.3 + torch.diag_embed(x**2) + 3 * torch.eye(4, dtype=f64)
    factors = torch.linalg.lu_factor(matrix)
    return torch.linalg.lu_solve(*factors, x.sin()[..., None])[..., 0]


UNSEEN = {"complex power": (complex_power, (B, 1)), "lu_solve": (by_lu, (B, 4))}


@pytest.mark.quick
@pytest.mark.parametrize("where", ["plain", "unverified", "vmap", "grad"])
@pytest.mark.parametrize("name", UNSEEN)
def test_what_torch_func_has_wrong_is_right_everywhere(name, where):
    func, shape = UNSEEN[name]
    x = randn(*shape).abs() + 1
    right = oracles.by_rows(func, (x,))
    jacobian = batch_jacobian(func)
    if where == "plain":
        equal(jacobian(x), right)
    elif where == "unverified":
        equal(batch_jacobian(func, check=False)(x), right)
    elif where == "vmap":
        equal(torch.vmap(jacobian)(x[None])[0], right)
    else:
        leaf = x.clone().requires_grad_()
        plain = oracles.by_rows(func, (leaf,), graph=True)
        (expected,) = torch.autograd.grad(plain.square().sum(), leaf)
        found = torch.func.grad(lambda x: jacobian(x).square().sum())(x)
        equal(found, expected, 1e-8)


@pytest.mark.parametrize("words", [{"mode": "fwd"}, {"engine": "vmap", "mode": "fwd"}], ids=str)
def test_a_wrong_forward_formula_is_never_returned(words):
    x = randn(B, 1).abs() + 1
    right = oracles.by_rows(complex_power, (x,))
    for check in ("auto", False):
        try:
            found = batch_jacobian(complex_power, check=check, **words)(x)
        except VerificationError as error:
            if "vmap" not in words.values() or check is False:
                raise
            assert str(error).startswith("batch_jacobian: ")  # noqa: PT017
        else:
            equal(found, right)


# --- B2: the noise of the reference is no excuse -----------------------------------------


def test_a_hook_that_is_not_linear():
    """Verified or refused, and so in each call: never right at first and wrong later."""

    def func(x):
        hidden = 3 * x.sin()
        if hidden.requires_grad:
            hidden.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
        return hidden * 2

    x, jacobian, outcomes = randn(B, 3), batch_jacobian(func), set()
    right = torch.diag_embed(1.5 * x.cos())  # of one output at a time
    for _ in range(12):
        try:
            equal(jacobian(x), right)
            outcomes.add("right")
        except VerificationError:
            outcomes.add("refused")
    assert len(outcomes) == 1


# --- B3: a switch after a while: see tests/dispatch/test_keys.py ----------------------------------


@pytest.mark.quick
def test_an_int_attribute_that_makes_rows_mix_from_call_20_on():
    class Net(nn.Module):
        stage = 0

        def forward(self, x):
            return x.sin() - (x.mean(0) if self.stage else 0)

    net, x = Net(), randn(B, 3)
    jacobian = batch_jacobian(net)
    for _ in range(19):
        jacobian(x)
    net.stage = 1
    with pytest.raises(BatchMixingError, match=r"^batch_jacobian: "):
        jacobian(x)


# --- C: not a number ---------------------------------------------------------------------


def kinked(x):
    return torch.where(x > 0.1, x.log(), x * x)


POINT = torch.tensor([[0.0, 0.5]], dtype=f64)


@pytest.mark.quick
def test_not_a_number_stays_where_it_is():
    """Outputs that never saw the bad input are finite, in the first call and in each later one."""
    diagonal = batch_hessian_diagonal(kinked)
    fresh_result = diagonal(POINT)
    for result in (fresh_result, *[diagonal(POINT) for _ in range(4)]):
        equal(result[0, 1, 1], torch.tensor(-4.0, dtype=f64))
        assert torch.equal(result.isnan(), fresh_result.isnan())
    for _ in range(25):
        diagonal(POINT + 1)
    result = diagonal(POINT)
    equal(result[0, 1, 1], torch.tensor(-4.0, dtype=f64))
    assert torch.equal(result.isnan(), fresh_result.isnan())


@pytest.mark.parametrize(
    "transform", [batch_jacobian, batch_hessian, batch_hessian_diagonal, batch_laplacian]
)
def test_a_bad_row_beside_good_ones(transform):
    """Each finite entry of plain autograd, taken alone, is finite and equal here."""
    x = torch.tensor([[0.0, 0.5], [0.7, 0.9], [0.05, 2.0]], dtype=f64)
    found = transform(kinked)(x)
    if transform is batch_jacobian:
        right = oracles.by_rows(kinked, (x,))
    else:
        name = transform.__name__.removeprefix("batch_").removeprefix("hessian_")
        right = getattr(oracles, name)(kinked, (x,))
    finite = right.isfinite()
    assert found[finite].isfinite().all()
    equal(found[finite], right[finite])
    assert finite[1:].all()


def test_explain_of_what_is_not_finite():
    found = explain(batch_hessian_diagonal(kinked), POINT)
    assert "batch_hessian_diagonal" in str(found)


@pytest.mark.quick
def test_partials_beside_what_is_not_a_number():
    func = lambda z: torch.where(z[:, :1] > 0.1, z[:, :1].log(), z[:, :1] ** 2) * z[:, 1:].sin()
    point = torch.tensor([[0.0, 0.5], [0.3, 0.7]], dtype=f64)
    (found,) = batch_partials(func, [(1,)])(point)
    first = torch.where(point[:, :1] > 0.1, point[:, :1].log(), point[:, :1] ** 2)
    equal(found, first * point[:, 1:].cos())


SINGULAR = {
    "slogdet": lambda x: torch.linalg.slogdet(x.view(-1, 2, 2))[1],
    "inv": lambda x: torch.linalg.inv(x.view(-1, 2, 2)).flatten(1),
    "log": lambda x: x.sum(1).log(),
    "norm": lambda x: 1 / x.norm(dim=1),
}
BAD = {
    "slogdet": [1.0, 2.0, 2.0, 4.0],
    "log": [0.0, 0.0, 0.0, 0.0],
    "norm": [0.0, 0.0, 0.0, 0.0],
}


@pytest.mark.quick
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian, batch_laplacian])
@pytest.mark.parametrize("name", BAD)
def test_a_singular_row_stops_no_other(name, transform):
    func = SINGULAR[name]
    x = randn(3, 4).abs() + torch.tensor([3.0, 0.1, 0.2, 2.0], dtype=f64)
    right = transform(func)(x)
    bad = x.clone()
    bad[1] = torch.tensor(BAD[name], dtype=f64)
    for _ in range(2):
        found = transform(func)(bad)
        equal(found[[0, 2]], right[[0, 2]])
        assert not found[1].isfinite().all()


def test_a_singular_matrix_that_torch_refuses():
    """Where ``func`` itself raises, it is its own error."""
    x = randn(2, 4).abs()
    x[1] = torch.tensor(BAD["slogdet"], dtype=f64)
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        batch_jacobian(SINGULAR["inv"])(x)


def huber(x):
    return nn.functional.huber_loss(x, torch.zeros_like(x), reduction="none", delta=1.0)


@pytest.mark.parametrize("func", [huber, lambda x: torch.relu(x) ** 2, lambda x: x.clamp(-1, 1)])
def test_second_derivatives_at_kinks_do_not_depend_on_the_call(func):
    x = torch.tensor([[1.0, -1.0, 0.0, 0.5]], dtype=f64)
    first = batch_hessian_diagonal(func)(x)
    transformed = batch_hessian_diagonal(func)
    for check in ("auto", False):
        again = batch_hessian_diagonal(func, check=check)
        assert all(torch.equal(again(x), first) for _ in range(3))
    for _ in range(10):
        transformed(x + 0.3)
    assert torch.equal(transformed(x), first)


# --- D: side effects: see tests/dispatch/test_one_run.py ------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("plain_object", [False, True])
def test_a_module_and_a_plain_object_are_treated_alike(plain_object):
    class Counts(object if plain_object else nn.Module):
        calls, cache = 0, None

        def __call__(self, x):
            self.calls += 1
            if self.cache is None:
                self.cache = torch.linalg.inv(torch.eye(3, dtype=f64) * 2)
            return (x @ self.cache).sin()

        forward = __call__

    func, x = Counts(), randn(B, 3)
    jacobian = batch_jacobian(func)
    for calls in range(1, 6):
        equal(jacobian(x), torch.diag_embed((x / 2).cos() / 2))
        assert func.calls == calls
    assert func.cache is not None


# --- E: copies ---------------------------------------------------------------------------


class Owner(nn.Module):
    """A module that owns a transform of its own layers."""

    def __init__(self, how="layers"):
        super().__init__()
        self.layers = network()
        self.slopes = batch_jacobian(self.layers if how == "layers" else self.values)

    def values(self, x):
        return self.layers(x) * 2

    def forward(self, x):
        return self.slopes(x)


@pytest.mark.quick
@pytest.mark.parametrize("how", ["layers", "method"])
def test_a_deep_copy_uses_the_layers_of_the_copy(how):
    owner, x = Owner(how), randn(B, 3)
    before = owner(x)
    other = copy.deepcopy(owner)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    equal(owner(x), before)
    func = other.layers if how == "layers" else other.values
    equal(other(x), batch_jacobian(func)(x))
    other(x).sum().backward()
    assert other.layers[0].weight.grad is not None
    assert owner.layers[0].weight.grad is None


TRANSFORMS = {
    "jacobian": lambda net: batch_jacobian(net, chunk_size=2),
    "hessian": batch_hessian,
    "diagonal": batch_hessian_diagonal,
    "laplacian": batch_laplacian,
    "divergence": batch_divergence,
    "partials": lambda net: batch_partials(net, [(0,), (1, 1)]),
    "nested": lambda net: batch_jacobian(batch_jacobian(net)),
}


@pytest.mark.quick
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_pickle_and_save(name, called):
    transformed, x = TRANSFORMS[name](network()), randn(B, 3)
    if called:
        transformed(x)
    right = transformed(x)
    equal(pickle.loads(pickle.dumps(transformed))(x), right)
    equal(copy.deepcopy(transformed)(x), right)
    buffer = io.BytesIO()
    torch.save(transformed, buffer)
    buffer.seek(0)
    equal(torch.load(buffer, weights_only=False)(x), right)


def test_a_module_that_owns_a_transform_is_saved():
    owner, x = Owner(), randn(B, 3)
    right = owner(x)
    equal(pickle.loads(pickle.dumps(owner))(x), right)


@pytest.mark.quick
def test_a_transform_prints_its_function_and_keywords():
    text = repr(batch_jacobian(network(), mode="rev", chunk_size=2))
    assert text.startswith("batch_jacobian(")
    assert "mode='rev'" in text
    assert "chunk_size=2" in text
    assert "randomness" not in text
    assert "sin" in repr(batch_laplacian(torch.sin))


# --- E: trees ----------------------------------------------------------------------------


@dataclass
class State:
    """Known to torch's pytree only."""

    position: Any
    velocity: Any


torch_pytree.register_pytree_node(
    State, lambda s: ([s.position, s.velocity], None), lambda leaves, _: State(*leaves)
)


class ModelOutput(OrderedDict):
    """As in transformers: a dictionary whose class torch's pytree knows."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


torch_pytree.register_pytree_node(
    ModelOutput,
    lambda out: (list(out.values()), list(out)),
    lambda leaves, names: ModelOutput(zip(names, leaves)),
)


@pytest.mark.quick
def test_a_dataclass_of_torch_pytree_in_and_out():
    def step(state):
        return State(state.position + 0.1 * state.velocity, -state.position.sin())

    state = State(randn(B, 3), randn(B, 3))
    jac, value = batch_jacobian(step, return_value=True)(state)
    eye = torch.eye(3, dtype=f64).expand(B, 3, 3)
    assert type(jac) is type(value) is type(jac.position) is State
    equal(jac.position.position, eye)
    equal(jac.position.velocity, 0.1 * eye)
    equal(jac.velocity.position, torch.diag_embed(-state.position.cos()))
    equal(jac.velocity.velocity, torch.zeros(B, 3, 3, dtype=f64))
    equal(value.velocity, -state.position.sin())


@pytest.mark.quick
def test_a_model_output():
    net = network(5)
    func = lambda x: ModelOutput(logits=net(x), hidden=x.sin())
    x = randn(B, 3)
    jac = batch_jacobian(func)(x)
    assert type(jac) is ModelOutput
    assert list(jac) == ["logits", "hidden"]
    equal(jac.logits, batch_jacobian(net)(x))
    equal(jac.hidden, torch.diag_embed(x.cos()))
    hess = batch_hessian(func)(x)
    assert type(hess) is ModelOutput
    equal(hess.logits, batch_hessian(net)(x))


def test_what_vmap_of_jacrev_takes_is_taken():
    func = lambda state: ModelOutput(energy=(state.position * state.velocity).sum(-1))
    state = State(randn(B, 3), randn(B, 3))
    found = batch_jacobian(func)(state)
    right = torch.vmap(torch.func.jacrev(func))(state)
    equal(found.energy.position, right.energy.position)
    equal(found.energy.velocity, right.energy.velocity)


@pytest.mark.quick
def test_an_integer_leaf_of_a_tree_is_a_constant():
    """Positions and atomic numbers, as interatomic potentials have them."""
    charges = torch.tensor([1.0, 6.0, 8.0], dtype=f64)

    def energy(atoms):
        return (charges[atoms["z"]].unsqueeze(-1) * atoms["pos"].sin()).sum((1, 2))

    atoms = {"pos": randn(B, 5, 3), "z": torch.randint(3, (B, 5)), "mask": torch.ones(B, 5) > 0}
    jac = batch_jacobian(energy)(atoms)
    assert list(jac) == ["pos", "z", "mask"]
    assert jac["z"] is None
    assert jac["mask"] is None
    equal(jac["pos"], charges[atoms["z"]].unsqueeze(-1) * atoms["pos"].cos())
    diagonal = batch_hessian_diagonal(energy)(atoms)
    assert diagonal["z"] is None
    equal(diagonal["pos"], -charges[atoms["z"]].unsqueeze(-1) * atoms["pos"].sin())


# --- E: few rows, dtypes -----------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_empty_batch_has_a_graph(name):
    """A loss over active points must go backward where none is active."""
    net = network()
    found = TRANSFORMS[name](net)(randn(0, 3))
    leaves = found if isinstance(found, tuple) else (found,)
    assert all(leaf.requires_grad for leaf in leaves)
    loss = sum(leaf.square().sum() for leaf in leaves)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    with torch.no_grad():
        found = TRANSFORMS[name](net)(randn(0, 3))
    leaves = found if isinstance(found, tuple) else (found,)
    assert not any(leaf.requires_grad for leaf in leaves)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_dtypes_of_an_empty_batch_under_autocast(name):
    net = network().float()
    with torch.autocast("cpu", torch.bfloat16):
        some, none = (TRANSFORMS[name](net)(torch.randn(size, 3)) for size in (B, 0))
    some, none = (found if isinstance(found, tuple) else (found,) for found in (some, none))
    assert [leaf.dtype for leaf in none] == [leaf.dtype for leaf in some]
    assert [leaf.shape[1:] for leaf in none] == [leaf.shape[1:] for leaf in some]


# --- E: inside of torch.func -------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_data_closed_over_inside_of_a_gradient(transform):
    """One row of data for each sample: right, or an error that says how to pass it."""
    data, x = randn(B, 3), randn(B, 3)
    inside = transform(lambda x: (x * data).sin())
    passed = transform(lambda x, data: (x * data).sin())
    right = torch.func.grad(lambda x: passed(x, data).square().sum())(x)
    try:
        found = torch.func.grad(lambda x: inside(x).square().sum())(x)
    except (RuntimeError, ValueError) as error:
        assert "closes over" in str(error) or "argument" in str(error)  # noqa: PT017
        assert str(error).startswith(f"{transform.__name__}: ")  # noqa: PT017
    else:
        equal(found, right)


def test_a_batched_tensor_by_keyword_inside_of_torch_func():
    """The remedy is to pass it by position, not torch.vmap."""
    data, x = randn(B, 3), randn(B, 3)
    inside = batch_jacobian(lambda x, data: (x * data).sin())
    right = torch.func.grad(lambda x: inside(x, data).square().sum())(x)
    try:
        found = torch.func.grad(lambda x: inside(x, data=data).square().sum())(x)
    except (RuntimeError, ValueError) as error:
        assert str(error).startswith("batch_jacobian: ")  # noqa: PT017
        assert "position" in str(error)  # noqa: PT017
    else:
        equal(found, right)


# --- E: what is said ---------------------------------------------------------------------


def adaptive_step(x):
    """A step whose size all rows choose together, as in an adaptive solver."""
    slope = lambda x: x.sin() - 0.3 * x
    error = 1e-2 * (slope(x) - slope(x + 0.1 * slope(x))).abs().max()
    return x + (0.1 + error) * slope(x)


@pytest.mark.quick
def test_the_size_of_the_dependence_is_named():
    """For a solver with step control 1e-3 is a matter of tolerance, and a mean is not."""
    with pytest.raises(BatchMixingError, match=r"\de-\d|0\.0\d"):
        batch_jacobian(adaptive_step)(randn(B, 3))


@pytest.mark.quick
def test_inline_transforms_warn_once():
    """One program made 122 warnings, one for each transform made inline."""
    func = fresh(lambda w, x: (w * x).sin() if bool((x > -100).all()) else x)
    w, x = randn(3), randn(B, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(122):
            batch_jacobian(func, in_dims=(None, 0))(w, x)
    assert [warning.category for warning in said] == [EngineFallbackWarning]


@pytest.mark.parametrize("name", ["state", "control"])
def test_a_missing_batch_dimension_is_named_first(name):
    """``f(state (4,), control (1,))``: both lack the batch."""
    args = {"state": (randn(4), randn(1)), "control": (randn(B, 4), randn(()))}[name]
    with pytest.raises(ValueError, match=r"^batch_jacobian: expected") as found:
        batch_jacobian(lambda state, control: state * control.sum(-1, keepdim=True))(*args)
    text = str(found.value)
    assert "batch dimension" in text
    before = text.find("in_dims")
    assert before < 0 or text.find("batch dimension") < before


def test_batch_norm_with_dropout_in_training():
    """The real error comes first."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    with pytest.raises(BatchMixingError, match="1: BatchNorm1d in training mode"):
        batch_jacobian(net)(randn(B, 3))


# --- E: partial derivatives --------------------------------------------------------------


def wave(x, t):
    return (2 * x).sin() * (-t).exp()


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["auto", "taylor", "rev"])
@pytest.mark.parametrize("shape", [(B,), (B, 1)], ids=str)
def test_partials_of_columns(shape, mode):
    """``u(x, t)`` with coordinates numbered through."""
    x, t = randn(*shape), randn(*shape)
    indices = [[0], [1], [0, 0], [0, 1], []]
    found = batch_partials(wave, indices, (0, 1), mode=mode)(x, t)
    u, u_x = wave(x, t), 2 * (2 * x).cos() * (-t).exp()
    assert isinstance(found, tuple)
    for got, right in zip(found, (u_x, -u, -4 * u, -u_x, u), strict=True):
        assert got.shape == shape
        equal(got, right)


@pytest.mark.parametrize("mode", ["auto", "taylor", "rev"])
def test_partials_of_vectors_and_columns(mode):
    """``x`` of two coordinates, then ``t``: (0, 1), (2)."""
    x, t = randn(B, 2), randn(B, 1)
    func = lambda x, t: x[:, :1] ** 2 * x[:, 1:] ** 3 * t**2
    found = batch_partials(func, [(0, 1), (1, 2), (-1, 2), (0,)], (0, 1), mode=mode)(x, t)
    a, b = x[:, :1], x[:, 1:]
    right = (6 * a * b**2 * t**2, 6 * a**2 * b**2 * t, 2 * a**2 * b**3, 2 * a * b**3 * t**2)
    for got, expected in zip(found, right, strict=True):
        equal(got, expected)


def test_partials_in_the_order_of_argnums():
    x, t = randn(B), randn(B)
    by_t_first = batch_partials(wave, [(0,), (1,)], (1, 0))(x, t)
    by_x_first = batch_partials(wave, [(1,), (0,)], (0, 1))(x, t)
    for one, other in zip(by_t_first, by_x_first, strict=True):
        equal(one, other)


def test_partials_by_one_of_several_arguments():
    x, t, scale = randn(B, 1), randn(B, 1), torch.tensor(2.0, dtype=f64)
    func = lambda scale, x, t: scale * wave(x, t)
    found = batch_partials(func, [(1,), (0, 0)], (1, 2), in_dims=(None, 0, 0))(scale, x, t)
    equal(found[0], -2 * wave(x, t))
    equal(found[1], -8 * wave(x, t))


def test_a_training_step_of_columns():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    u = lambda x, t: net(torch.cat([x, t], 1))
    x, t = randn(B, 1), randn(B, 1)
    u_t, u_xx = batch_partials(u, [(1,), (0, 0)], (0, 1))(x, t)
    found = torch.autograd.grad((u_t - u_xx).square().mean(), net[0].weight)[0]
    x.requires_grad_(), t.requires_grad_()
    first = torch.autograd.grad(u(x, t).sum(), (x, t), create_graph=True)
    second = torch.autograd.grad(first[0].sum(), x, create_graph=True)[0]
    equal(found, torch.autograd.grad((first[1] - second).square().mean(), net[0].weight)[0])


@pytest.mark.parametrize(
    ("indices", "args"),
    [([(2,)], (randn(B), randn(B))), ([(0, -3)], (randn(B, 1), randn(B, 1)))],
    ids=["columns", "negative"],
)
def test_indices_beyond_all_coordinates(indices, args):
    with pytest.raises(
        ValueError, match=r"^batch_partials: expected .*ind(ex|ices) between -2 and 1"
    ):
        batch_partials(wave, indices, (0, 1))(*args)


# --- E: modules made by machines ---------------------------------------------------------


def by_fx():
    return torch.fx.symbolic_trace(network())


def by_exec():
    scope: dict[str, Any] = {"nn": nn, "__name__": None}
    exec(
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.sin() * x.sum(1, True)\n",
        scope,
    )
    return scope["Net"]()


@pytest.mark.quick
@pytest.mark.parametrize("make", [by_fx, by_exec])
@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_modules_made_by_machines(make, transform):
    net, x = make(), randn(B, 3)
    right = transform(lambda x: net(x), check=False)(x)
    for _ in range(3):
        equal(transform(net)(x), right)
    if transform is batch_jacobian:
        equal(right.detach(), oracles.by_rows(net, (x,)).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_module():
    net, x = network(), randn(B, 3)
    exported = torch.export.export(net, (x,)).module()
    for _ in range(2):
        equal(batch_jacobian(exported)(x).detach(), batch_jacobian(net)(x).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Dynamo detected")
@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian, batch_laplacian])
def test_a_compiled_network_inside(transform):
    """Right, or told to compile the whole."""
    net, x = network(), randn(B, 3)
    torch._dynamo.reset()
    try:
        found = transform(torch.compile(net, backend="eager"))(x)
    except (RuntimeError, ValueError) as error:
        assert str(error).startswith(f"{transform.__name__}: ")  # noqa: PT017
        assert "torch.compile" in str(error)  # noqa: PT017
    else:
        equal(found.detach(), transform(net)(x).detach())
    finally:
        torch._dynamo.reset()


# --- E: a distance of a point to itself --------------------------------------------------


def pair_energy(r):
    return torch.cdist(r, r).square().sum((1, 2))


@pytest.mark.parametrize("transform", [batch_hessian, batch_laplacian])
def test_distances_of_the_same_points(transform):
    """``2 sum |r_i - r_j|^2 / 2``: the right value or an error, and never not-a-number unsaid."""
    r = randn(2, 3, 2)
    plain = lambda r: (r[:, :, None] - r[:, None]).square().sum((1, 2, 3))
    right = transform(plain)(r)
    try:
        found = transform(pair_energy)(r)
    except (RuntimeError, NotImplementedError) as error:
        assert str(error).startswith(f"{transform.__name__}: ")  # noqa: PT017
    else:
        equal(found, right, 1e-6)


# --- G: what the caller's tensors and hooks see ------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_retained_gradient_is_untouched(name):
    x = randn(B, 3).requires_grad_() * 1
    x.retain_grad()
    transformed = TRANSFORMS[name](network())
    for _ in range(3):
        transformed(x)
        assert x.grad is None
    (x**2).sum().backward()
    equal(x.grad, 2 * x.detach())


@pytest.mark.quick
@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_hook_sees_a_number_of_the_verification(name):
    net, x, seen = network(), randn(B, 3).requires_grad_(), []
    hooks = [p.register_hook(seen.append) for p in net.parameters()]
    hooks.append(x.register_hook(seen.append))
    transformed = TRANSFORMS[name](net)
    for _ in range(4):
        transformed(x)
    assert seen == []
    found = transformed(x)
    leaves = found if isinstance(found, tuple) else (found,)
    sum(leaf.sum() for leaf in leaves).backward()
    assert len(seen) >= 2
    assert len(seen) <= len(hooks)


def test_accumulated_gradients_are_untouched():
    net, x = network(), randn(B, 3)
    net(x).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    batch_jacobian(net)(x)
    batch_laplacian(net)(x)
    assert all(torch.equal(p.grad, b) for p, b in zip(net.parameters(), before))


ENGINES = ("auto", "vmap", "sum", "loop")


@pytest.mark.quick
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("check", ["auto", False])
def test_negative_argnums(check, mode, engine):
    """``torch.func.jacfwd`` and ``hessian`` are silently wrong with them."""
    x, y, z = randn(B, 3), randn(B, 3), randn(B, 3)
    words = {"engine": engine, "mode": mode, "check": check}
    found = batch_jacobian(lambda x, y, z: x * y + z**2, -1, **words)(x, y, z)
    equal(found, torch.diag_embed(2 * z))
    found = batch_jacobian(lambda x, y, z: x * y + z**2, (-2, 0), **words)(x, y, z)
    equal(found, (torch.diag_embed(x), torch.diag_embed(y)))


@pytest.mark.parametrize("mode", ["fwd_over_rev", "rev_over_rev", "fwd_over_fwd", "auto"])
def test_negative_argnums_of_second_order(mode):
    x, y = randn(B, 3), randn(B, 3)
    found = batch_hessian(lambda x, y: (x * y.sin()).sum(1), -1, mode=mode)(x, y)
    equal(found, torch.diag_embed(-x * y.sin()))


@pytest.mark.quick
def test_a_power_of_zero_at_a_negative_base():
    """By plain autograd the second derivative of ``(x0 + 2) ** (x1 * 0)`` by ``x0`` is zero."""
    func = lambda x: (x[:, 0] + 2) ** (x[:, 1] * 0)
    x = torch.tensor([[-3.0, 1.0], [1.0, 0.5]], dtype=f64)
    transformed = batch_hessian_diagonal(func)
    for _ in range(3):
        found = transformed(x)
        assert found[0, 0] == 0
        equal(found[1], torch.zeros(2, dtype=f64))
    found, (_, value) = batch_hessian_diagonal(func, return_value=True)(x)
    assert found[0, 0] == 0
    equal(value, torch.ones(2, dtype=f64))


@pytest.mark.quick
def test_seeds_and_draws_inside_of_func():
    def func(x):
        torch.manual_seed(3)
        return x * torch.rand(x.shape[1], dtype=f64) + random.random()

    x, state = randn(B, 3), random.getstate()
    torch.manual_seed(3)
    right = torch.diag_embed(torch.rand(3, dtype=f64).expand(B, 3))
    for _ in range(3):
        equal(batch_jacobian(func)(x), right)
    random.setstate(state)


@pytest.mark.quick
@pytest.mark.parametrize("name", TRANSFORMS)
def test_lists_keep_one_entry_for_each_call(name):
    net, kept = network(), []

    def func(x):
        kept.append(x.shape)
        return net(x)

    transformed = TRANSFORMS[name](func)
    for calls in range(1, 6):
        transformed(randn(B, 3))
        assert kept == [(B, 3)] * calls


class Order(torch.autograd.Function):
    """A function of one's own that cannot be followed: nested partials must differentiate it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        Order.passes += 1
        (x,) = ctx.saved_tensors
        return grad * Order.apply(x + torch.pi / 2)


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")  # Taylor cannot follow it
def test_nested_partials_cost_what_they_cost_by_hand():
    """Of order five and five outputs: not five to the fourth times as much."""
    weight = torch.linspace(0.5, 1.5, 5, dtype=f64)
    func = lambda x: Order.apply(x.sum(1, keepdim=True) * weight)
    x = randn(B, 2)
    transformed = batch_partials(func, [(0, 0, 0, 0, 1)], check=False)
    (found,) = transformed(x)
    equal(found, weight**5 * (x.sum(1, keepdim=True) * weight).cos())
    Order.passes = 0
    transformed(x)
    ours, Order.passes = Order.passes, 0
    leaf = x.clone().requires_grad_()
    for column in func(leaf).unbind(1):
        slope = column
        for index in (0, 0, 0, 0, 1):
            (grad,) = torch.autograd.grad(slope.sum(), leaf, create_graph=True)
            slope = grad[:, index]
    assert ours <= 1.5 * Order.passes


# --- F: what held up ---------------------------------------------------------------------


def test_packed_sequences():
    lstm = nn.LSTM(3, 4, batch_first=True).double()
    lengths = torch.tensor([5, 3, 4, 1])

    def func(x):
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return lstm(packed)[1][0][-1]

    x = randn(B, 5, 3)
    jac = batch_jacobian(func)(x)
    right = oracles.by_batch(func, (x,))
    equal(jac.detach(), right.detach())


@pytest.mark.quick
def test_a_wave_function_is_right_in_float32():
    """``vmap(hessian)`` of a log-determinant is off by 49 times its size."""
    net = nn.Linear(3, 3)

    def log_psi(x):
        orbitals = net(x.view(-1, 3, 3)).tanh() + torch.eye(3).to(x)
        return torch.linalg.slogdet(orbitals)[1]

    x = torch.randn(B, 9)
    found = batch_laplacian(log_psi)(x)
    net.double()
    right = oracles.laplacian(log_psi, (x.double(),)).detach()
    assert (found.detach() - right).abs().max() < 1e-4 * (1 + right.abs().max())


def test_check_derivative_of_a_module_made_by_fx():
    net: nn.Module = by_fx()
    x: Tensor = randn(B, 3)
    assert check_derivative(batch_jacobian(net), x).ok


# --- what a sweep over torch's operators met ------------------------------------------------


def solve_ex(x):
    a = x.reshape(-1, 2, 2) + 3 * torch.eye(2, dtype=x.dtype)
    return torch.linalg.solve_ex(a, a.sin())[0].flatten(1)


def test_forward_mode_inside_of_vmap_is_a_transposed_vjp():
    """Torch's forward formula of this operation is wrong, and nobody asked for it."""
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = batch_jacobian(solve_ex)(x)
    inside = torch.vmap(batch_jacobian(solve_ex, mode="fwd"))(x[None])[0]
    torch.testing.assert_close(inside, expected)


@pytest.mark.parametrize("inside", [False, True])
def test_a_wrong_forward_formula_that_was_asked_for_is_refused(inside):
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = batch_jacobian(solve_ex, mode="fwd", engine="vmap", check=False)
    call = torch.vmap(jacobian) if inside else jacobian
    with pytest.raises(RuntimeError, match="_linalg_solve_ex"):
        call(x[None] if inside else x)


def test_a_reference_that_refuses_large_cotangents():
    x = torch.randn(3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    func = lambda x: torch.view_as_real(torch.linalg.eigvals(x))
    nested = batch_jacobian(batch_jacobian(func))(x)
    torch.testing.assert_close(nested, batch_hessian(func)(x))


def test_an_object_that_counts_its_calls_is_one_key():
    """An int that changes at each call must not make each of them a first one."""

    class Counts:
        calls = 0

        def __call__(self, x):
            self.calls += 1
            return torch.nn.functional.layer_norm(x.sin(), (3,))

    func = Counts()
    hessian = batch_hessian(func)
    for _ in range(6):
        hessian(torch.randn(4, 3, dtype=torch.float64))
    assert func.calls <= 7  # once more in the first, for what torch differentiates wrongly


class CountedSine(torch.autograd.Function):
    calls = 0

    @staticmethod
    def forward(ctx, x):
        CountedSine.calls += 1
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * CountedSine.apply(x + torch.pi / 2)


def test_nested_partials_of_several_outputs_run_what_they_run_by_hand():
    """Each level enters the graph column by column: through a stack, each would pull all."""
    mix = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    func = lambda x: CountedSine.apply(x @ mix)
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    nested = func
    for _ in range(4):
        nested = (lambda inner: lambda x: batch_partials(inner, [(0,)], check=False)(x)[0])(nested)
    nested(x)
    CountedSine.calls = 0
    result = nested(x)
    ours, CountedSine.calls = CountedSine.calls, 0
    z, columns = x.clone().requires_grad_(), []
    for out in func(z).unbind(1):
        for _ in range(4):
            (first,) = torch.autograd.grad(out.sum(), z, create_graph=True, retain_graph=True)
            out = first[:, 0]
        columns.append(out)
    torch.testing.assert_close(result, torch.stack(columns, 1).detach())
    assert ours <= 1.5 * CountedSine.calls


class Counting(nn.Module):
    """Moves its statistics by assignment, and counts its calls in place."""

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.body(x)


def with_a_constant(x):
    return x.sin(), torch.ones(len(x), 1, dtype=x.dtype)


@pytest.mark.parametrize(
    ("transform", "body"),
    [
        (batch_jacobian, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2))),
        (batch_laplacian, nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1))),
        (batch_jacobian, with_a_constant),
    ],
    ids=["writes into its input", "replacements", "constant output"],
)
def test_statistics_move_once_whatever_runs_again(transform, body):
    module = Counting(body).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    transform(module)(x)
    assert module.calls == 1
    torch.testing.assert_close(module.mean, 0.1 * x.mean(0))


def test_aux_trains_what_only_it_depends_on():
    head = nn.Linear(3, 1).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    _, aux = batch_jacobian(lambda x: (x**2, head(x)), has_aux=True)(x)
    aux.square().mean().backward()
    expected = torch.autograd.grad(head(x).square().mean(), head.weight)[0]
    torch.testing.assert_close(head.weight.grad, expected)


def test_a_write_under_no_grad_stays_out_of_the_callers_tensor():
    def func(x):
        with torch.no_grad():
            x.mul_(2)
        return x.sin()

    x = torch.randn(5, 3, dtype=torch.float64)
    given = x.clone()
    result = batch_jacobian(func)(given)
    torch.testing.assert_close(given, x)
    torch.testing.assert_close(result, torch.diag_embed((2 * x).cos()))


def test_a_copy_follows_functions_inside_of_functions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1).double()
            inner = lambda x: self.layer(x).tanh()
            self.slope = batch_jacobian(lambda x: inner(x))

    x = torch.randn(5, 3, dtype=torch.float64)
    copied = copy.deepcopy(Model())
    with torch.no_grad():
        copied.layer.weight.mul_(3)
    expected = batch_jacobian(lambda x: copied.layer(x).tanh())(x)
    torch.testing.assert_close(copied.slope(x), expected)


def test_a_write_into_the_input_inside_torch_func():
    def func(x):
        x.mul_(2)
        return x.sin()

    penalty = lambda x: batch_jacobian(func)(x).square().sum()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = (2 * (2 * x).cos()).square().sum((1, 2))
    torch.testing.assert_close(torch.vmap(penalty)(x), expected)
