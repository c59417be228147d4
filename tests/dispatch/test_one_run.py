"""One call, one run: ``func`` runs once, and its side effects are those of one plain call."""

import copy
import itertools
import random

import numpy
import optree
import pytest
import torch
from torch import Tensor, nn

from funcjac import (
    BatchMixingError,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    explain,
)
from tests.cases.functions import assign_masked
from tests.cases.modules import network
from tests.fresh import Counted
from tests.tensors import equal, randn

B = 4
CALLS = 9  # of these, calls 1, 2, 4 and 8 are verified
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")


def twice(func, **words):
    return batch_jacobian(batch_jacobian(func, **words), **words)


def partials(func, **words):
    return batch_partials(func, [(), (0,), (1, 2), (0, 0, 1)], **words)


TRANSFORMS = {
    "jacobian": (batch_jacobian, ("auto", "fwd", "rev")),
    "nested": (twice, ("auto", "fwd", "rev")),
    "hessian": (batch_hessian, ("auto", *NESTED)),
    "diagonal": (batch_hessian_diagonal, ("auto", "taylor", *NESTED)),
    "laplacian": (batch_laplacian, ("auto", "taylor", *NESTED)),
    "divergence": (batch_divergence, ("auto", "fwd", "rev")),
    "partials": (partials, ("auto", "taylor", "rev")),
}
ROUTES = [(name, mode) for name, (_, modes) in TRANSFORMS.items() for mode in modes]
by_route = pytest.mark.parametrize(("name", "mode"), ROUTES)
by_name = pytest.mark.parametrize("name", TRANSFORMS)


def detached(tree):
    return [leaf.detach() for leaf in optree.tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- how often func runs -----------------------------------------------------------------


@pytest.mark.quick
@by_route
@pytest.mark.parametrize("grad", [False, True])
def test_every_call_runs_func_once(grad, name, mode):
    """The first, the verified and the others, on the whole batch."""
    func, x = Counted(network().requires_grad_(False)), randn(B, 3).requires_grad_(grad)
    transformed = TRANSFORMS[name][0](func, mode=mode)
    for calls in range(1, CALLS + 1):
        transformed(x)
        assert func.rows == [B] * calls


WORDS = {
    "value": {"return_value": True},
    "chunks": {"chunk_size": 1},
    "check": {"check": True},
    "no check": {"check": False},
    "draws": {"randomness": "different"},
    "sum": {"engine": "sum"},
}


@by_name
@pytest.mark.parametrize("words", WORDS)
def test_keywords_cost_no_run(words, name):
    func, x = Counted(network()), randn(B, 3)
    transformed = TRANSFORMS[name][0](func, **WORDS[words])
    for calls in range(1, 4):
        transformed(x)
        assert func.count == calls


@pytest.mark.quick
@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "nested"])
def test_aux_and_value_are_those_of_the_one_run(name):
    net, kept = network(), []

    def func(x):
        out = net(x)
        kept.append(out)
        return out, {"run": len(kept), "out": out * 1}

    transformed = TRANSFORMS[name][0](func, has_aux=True, return_value=True)
    x = randn(B, 3)
    for calls in range(1, 5):
        rest = transformed(x)[1]
        value, aux = rest if isinstance(rest[1], dict) else rest[1]
        assert len(kept) == calls == aux["run"]
        assert torch.equal(value, kept[-1])
        assert torch.equal(aux["out"], kept[-1])


@by_name
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_there_is_one_run(context, name):
    func, x = Counted(network()), randn(B, 3)
    transformed = TRANSFORMS[name][0](func)
    with context():
        for calls in range(1, 4):
            transformed(x)
            assert func.count == calls


@by_name
def test_inline_transforms_and_new_sizes_run_once(name):
    func, make = Counted(network()), TRANSFORMS[name][0]
    for calls in range(1, 7):
        make(func)(randn(calls, 3))
        assert func.rows == list(range(1, calls + 1))


FUNCTIONS = {
    "lstm": lambda: Recurrent(),
    "mask": lambda: assign_masked,
    "item": lambda: lambda x: x.sin() if x.sum().item() > -1e9 else x,
    "in place": lambda: lambda x: (x * 2).sin_().mul_(x),
    "linear": lambda: lambda x: 2 * x,
    "gradient inside": lambda: by_grad,
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True).double()

    def forward(self, x):
        return self.lstm(x.unsqueeze(2))[0][:, -1]


def by_grad(x):
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        return torch.autograd.grad(x.sin().prod(1).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("transform", [batch_jacobian, batch_divergence])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_of_all_kinds_run_once(function, transform):
    func, x = Counted(FUNCTIONS[function]()), randn(B, 3)
    transformed = transform(func)
    for calls in range(1, 4):
        transformed(x)
        assert func.count == calls


@pytest.mark.quick
@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        *itertools.product(("jacobian", "laplacian", "hessian"), ("jacobian", "laplacian")),
        ("divergence", "divergence"),
        ("jacobian", "partials"),
    ],
)
def test_two_levels_are_one_run(outer, inner):
    """Nested transforms see each other."""
    func, x = Counted(network()), randn(B, 3)
    inside = TRANSFORMS[inner][0](func)
    if outer == "divergence":
        vector = lambda x: inside(x)[:, None] * torch.ones_like(x)
        transformed = batch_divergence(vector)
    else:
        transformed = TRANSFORMS[outer][0](inside)
    for calls in range(1, 4):
        transformed(x)
        assert func.rows == [B] * calls


def test_three_levels_are_one_run():
    func, x = Counted(torch.sin), randn(2, 3)
    third = batch_jacobian(batch_jacobian(batch_jacobian(func)))
    for calls in range(1, 3):
        equal(third(x).sum((2, 3, 4)), -x.cos())
        assert func.count == calls


def test_levels_amid_other_code_are_one_run_each():
    """A residual runs its network where it is written: for the value and for each derivative."""
    net = Counted(network())
    laplacian, jacobian = batch_laplacian(net), batch_jacobian(net)
    residual = lambda x: laplacian(x) + net(x) * jacobian(x).sum(2)
    transformed, x = batch_jacobian(residual), randn(B, 3)
    for calls in range(1, 4):
        transformed(x)
        assert net.count == 3 * calls


# --- where a second run is allowed -------------------------------------------------------

# Reverse formulas that torch has wrong once differentiated again
FAULTY = {
    "logcumsumexp": lambda x: x.logcumsumexp(1).sin(),
    "layer_norm": lambda x: nn.functional.layer_norm(x.sin(), (3,)),
}


@pytest.mark.quick
@pytest.mark.parametrize("levels", ["jacobian", "hessian", "third"])
@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_operation_costs_one_run_more_at_first(name, levels):
    """Its replacement must run instead; from then on it runs at once."""
    func, x = Counted(FAULTY[name]), randn(B, 3).requires_grad_()
    transformed = {
        "jacobian": batch_jacobian(func),
        "hessian": batch_hessian(func),
        "third": batch_jacobian(batch_hessian(func)),
    }[levels]
    transformed(x)
    assert func.count <= 2
    for _ in range(5):
        before = func.count
        transformed(x)
        assert func.count == before + 1


def test_shared_arguments_say_that_they_run_more_often():
    func = Counted(lambda w, x: (x @ w).tanh())
    transformed = batch_jacobian(func, in_dims=(None, 0))
    found = explain(transformed, randn(3, 2), randn(B, 3))
    assert found.engine == "vmap"
    assert found.runs == func.count > 1
    assert found.reasons


def test_explain_counts_one_run():
    func = Counted(network())
    found = explain(batch_jacobian(func), randn(B, 3))
    assert found.runs == func.count == 1


# --- side effects ------------------------------------------------------------------------


class Tally(nn.Module):
    """Counts its runs in every way that people count."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.calls, self.seen, self.by_name = 0, [], {"runs": 0}
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3).double())

    def forward(self, x):
        self.calls += 1
        self.seen.append(x.shape[0])
        self.by_name["runs"] += 1
        self.steps += 1
        self.mean = self.mean * 0.5 + x.detach().mean(0) * 0.5
        return self.net(x)


@pytest.mark.quick
@by_name
def test_counters_count(name):
    module, x = Tally(), randn(B, 3)
    transformed, mean = TRANSFORMS[name][0](module), torch.zeros(3).double()
    for calls in range(1, CALLS + 1):
        transformed(x)
        mean = mean * 0.5 + x.mean(0) * 0.5
        assert module.calls == module.by_name["runs"] == int(module.steps) == calls
        assert module.seen == [B] * calls
        assert torch.equal(module.mean, mean)


class Cached(nn.Module):
    """Solves once and keeps the solution, as a Gaussian process does."""

    def __init__(self):
        super().__init__()
        self.matrix, self.solves, self.weights = randn(3, 3), 0, None

    def forward(self, x):
        if self.weights is None:
            self.solves += 1
            self.weights = torch.linalg.inv(self.matrix + 5 * torch.eye(3).double())
        return (x @ self.weights).sin()


@pytest.mark.quick
@by_name
def test_a_cache_fills_at_the_first_call(name):
    module, x = Cached(), randn(B, 3)
    transformed = TRANSFORMS[name][0](module)
    first = detached(transformed(x))
    assert module.weights is not None
    for _ in range(4):
        equal(detached(transformed(x)), first)
    assert module.solves == 1


@by_name
def test_running_statistics_in_eval_mode_stay(name):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    transformed = TRANSFORMS[name][0](net)
    for _ in range(3):
        transformed(randn(B, 3))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@by_name
def test_running_statistics_of_each_row_move_once(name):
    """Instance norm normalises within a row, and keeps statistics.

    The first call may run twice, for torch has its derivatives wrong: see above.
    """
    norm = nn.InstanceNorm1d(1, affine=True, track_running_stats=True).double()
    transformed = TRANSFORMS[name][0](lambda x: norm(x.unsqueeze(1)).squeeze(1))
    transformed(randn(B, 3))
    plain = copy.deepcopy(norm)
    for _ in range(3):
        x = randn(B, 3)
        transformed(x)
        plain(x.unsqueeze(1))
        equal(norm.running_mean, plain.running_mean)
        equal(norm.running_var, plain.running_var)


def test_running_statistics_where_rows_mix_move_once():
    norm, x = nn.BatchNorm1d(3).double(), randn(B, 3)
    for calls in range(1, 3):
        with pytest.raises(BatchMixingError, match="BatchNorm1d in training mode"):
            batch_jacobian(norm)(x)
        assert norm.num_batches_tracked == calls


# --- draws -------------------------------------------------------------------------------


@pytest.mark.quick
@by_name
def test_draws_are_those_of_one_plain_call(name):
    net, dropout = network(), nn.Dropout(0.5)
    func = lambda x: dropout(net(x))
    transformed, x = TRANSFORMS[name][0](func), randn(B, 3)
    for _ in range(3):
        state = torch.get_rng_state()
        func(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        transformed(x)
        assert torch.equal(torch.get_rng_state(), after)


class LayerDrop(nn.Module):
    """Leaves layers out, by a generator that torch's default one knows nothing of."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)]).double()
        self.generator = torch.Generator()

    def draw(self):
        if self.kind == "random":
            return random.random()
        if self.kind == "numpy":
            return float(numpy.random.rand())
        return float(torch.rand((), generator=self.generator))

    def seed(self, number):
        random.seed(number)
        numpy.random.seed(number)
        self.generator.manual_seed(number)

    def forward(self, x):
        for layer in self.layers:
            if self.draw() < 0.5:
                x = x + layer(x).tanh()
        return x * (0.5 + self.draw())


def jacobian_of(out, x, *, graph=False):
    """``(B, M, N)`` of tensors, where rows do not mix."""
    rows = [
        torch.autograd.grad(o.sum(), x, create_graph=True, materialize_grads=True)[0]
        for o in out.unbind(1)
    ]
    found = torch.stack(rows, 1)
    return found if graph else found.detach()


def replayed(module, number, x):
    """Jacobian ``(B, 3, 3)`` and Hessian ``(B, 3, 3, 3)`` of the network that a seed draws."""
    module.seed(number)
    x = x.clone().requires_grad_()
    jac = jacobian_of(module(x), x, graph=True)
    flat = jac.flatten(1)
    zero = 0 * x.sum(1, keepdim=True)
    return jac.detach(), jacobian_of(flat + zero, x).view(-1, 3, 3, 3)


DRAWING = {
    "jacobian": (batch_jacobian, {}, lambda jac, hess: jac),
    "fwd in chunks": (
        batch_jacobian,
        {"mode": "fwd", "engine": "sum", "chunk_size": 2, "check": True},
        lambda jac, hess: jac,
    ),
    "hessian": (batch_hessian, {}, lambda jac, hess: hess),
    "laplacian": (
        batch_laplacian,
        {},
        lambda jac, hess: hess.diagonal(dim1=2, dim2=3).sum(2),
    ),
    "divergence": (
        batch_divergence,
        {},
        lambda jac, hess: jac.diagonal(dim1=1, dim2=2).sum(1),
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["random", "numpy", "generator"])
@pytest.mark.parametrize("name", DRAWING)
def test_all_columns_belong_to_one_hidden_draw(name, kind):
    module, x = LayerDrop(kind), randn(B, 3)
    before = random.getstate(), numpy.random.get_state()
    transform, words, pick = DRAWING[name]
    transformed = transform(module, **words)
    try:
        for number in range(30):
            right = pick(*replayed(module, number, x))
            module.seed(number)
            equal(transformed(x).detach(), right)
            drawn = module.draw()
            module.seed(number)
            module(x)
            assert module.draw() == drawn  # as many draws as in a plain call
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])


def test_a_seed_set_inside_of_func_holds_for_the_one_run():
    def func(x):
        torch.manual_seed(7)
        return x.sin() * torch.rand(3, dtype=x.dtype)

    x = randn(B, 3)
    torch.manual_seed(7)
    right = torch.diag_embed(x.cos() * torch.rand(3, dtype=x.dtype))
    after = torch.get_rng_state()
    jacobian = batch_jacobian(func)
    for _ in range(3):
        equal(jacobian(x), right)
        assert torch.equal(torch.get_rng_state(), after)


# --- errors ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@by_name
def test_a_call_that_fails_runs_func_twice_at_most(name):
    """Once more to see whether the output moves with the input, which its graph does not tell."""
    func = Counted(lambda x: x.detach().sin())
    for calls in range(1, 3):
        with pytest.raises(RuntimeError, match="autograd"):
            TRANSFORMS[name][0](func)(randn(B, 3))
        assert func.count <= 2 * calls
