"""Functions whose rows mix: refused, with the module or the size of the dependence named."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from funcjac import BatchMixingError, batch_jacobian, check_batched
from tests.tensors import equal, fixed_randn, quiet, randn

B = 4


class Recurrent(nn.Module):
    def __init__(self, kind, **words):
        super().__init__()
        self.core = kind(3, 4, **words)

    def forward(self, x):
        return self.core(x)[0]


class Attention(nn.Module):
    def __init__(self, **words):
        super().__init__()
        self.core = nn.MultiheadAttention(4, 2, **words)

    def forward(self, x):
        return self.core(x, x, x)[0]


# module, shape of a row, what the message says
MODULES = {
    "BatchNorm train": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        (3,),
        r"1: BatchNorm1d in training mode \(call \.eval\(\), or use GroupNorm\)",
    ),
    "BatchNorm2d train": (
        lambda: nn.Sequential(nn.BatchNorm2d(2)),
        (2, 3, 3),
        "0: BatchNorm2d in training mode",
    ),
    "deep BatchNorm": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))),
        (3,),
        "0.1: BatchNorm1d in training mode",
    ),
    "BatchNorm itself": (lambda: nn.BatchNorm1d(3), (3,), "Suspects: BatchNorm1d in training mode"),
    "BatchNorm without statistics": (
        lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval(),
        (3,),
        r"0: BatchNorm1d without running statistics \(set track_running_stats=True\)",
    ),
    "LSTM": (lambda: Recurrent(nn.LSTM), (5, 3), "core: LSTM with batch_first=False"),
    "GRU": (lambda: Recurrent(nn.GRU), (5, 3), "core: GRU with batch_first=False"),
    "RNN": (lambda: Recurrent(nn.RNN), (5, 3), "core: RNN with batch_first=False"),
    "attention": (Attention, (5, 4), "core: MultiheadAttention with batch_first=False"),
}

FUNCTIONS = {
    "mean": lambda x: x - x.mean(0),
    "softmax over the batch": lambda x: x.softmax(0),
    "in-batch attention": lambda x: (x @ x.T).softmax(1) @ x,
    "neighbour": lambda x: x * x.roll(1, 0),
    "cumulative sum": lambda x: x.cumsum(0),
    "sorted batch": lambda x: x.sort(0).values,
    "norm of the batch": lambda x: x / x.norm(),
    "one row into another": lambda x: torch.cat([x[:-1], x[-1:] + 1e-2 * x[:1]]),
}


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("engine", ["sum", "auto"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_that_mix_rows_are_named(name, engine, mode):
    make, row, message = MODULES[name]
    module = make().double()
    jacobian = batch_jacobian(module, engine=engine, mode=mode)
    for _ in range(2):
        with pytest.raises(BatchMixingError, match=f"^batch_jacobian: .*{message}"):
            jacobian(randn(B, *row))
    with pytest.raises(BatchMixingError, match=f"^check_batched: .*{message}"):
        check_batched(module, randn(B, *row))


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
@pytest.mark.parametrize("seed", range(8))
def test_the_cotangent_is_not_the_users_own_draw(seed, draw):
    """``x @ J`` is zero for a norm: a cotangent equal to ``x`` would prove nothing."""
    torch.manual_seed(seed)
    x = draw(B, 3, dtype=torch.float64)
    with pytest.raises(BatchMixingError):
        batch_jacobian(FUNCTIONS["norm of the batch"], engine="vmap")(x)


@pytest.mark.parametrize("pair", [(a, b) for a in range(B) for b in range(B) if a != b], ids=str)
def test_any_one_row_that_leaks_into_any_other_is_found(pair):
    source, target = pair
    where = torch.zeros(B, 1, dtype=torch.float64)
    where[target] = 0.1
    func = lambda x: x + where[: len(x)] * x[source : source + 1] if len(x) == B else x
    with pytest.raises(BatchMixingError):
        batch_jacobian(func, engine="sum")(randn(B, 3))
    with pytest.raises(BatchMixingError):
        check_batched(func, randn(B, 3))


@quiet
@pytest.mark.parametrize("engine", ["sum", "auto"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_mix_rows_are_refused(name, engine):
    func, x = FUNCTIONS[name], randn(B, 3)
    with pytest.raises(BatchMixingError, match=r"No module known to mix rows.*x\.mean\(0\)"):
        batch_jacobian(func, engine=engine)(x)
    with pytest.raises(BatchMixingError, match=r"No module known to mix rows.*x\.mean\(0\)"):
        check_batched(func, x)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_mixing_is_no_matter_of_the_engine(name, engine):
    """Rows run alone give a Jacobian, but not that of this function on this batch."""
    with pytest.raises(BatchMixingError):
        batch_jacobian(FUNCTIONS[name], engine=engine)(randn(B, 3))


@pytest.mark.parametrize("keywords", [{"engine": "vmap"}, {"engine": "loop"}, {"argnums": (0, 1)}])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_mixing_is_no_matter_of_the_engine_inside_of_a_gradient(name, keywords):
    """Where rows are kept apart because they share an argument, too."""
    func, x, shared = FUNCTIONS[name], randn(B, 3), randn(3)
    jac = batch_jacobian(lambda x, w: func(x) * w, in_dims=(0, None), **keywords)
    blocks = lambda x: jac(x, shared)[0] if "argnums" in keywords else jac(x, shared)
    for _ in range(2):  # what was refused is looked at again
        with pytest.raises(BatchMixingError):
            torch.func.grad(lambda x: blocks(x).sum())(x)


def test_rows_apart_inside_of_a_gradient_pass():
    jac = batch_jacobian(lambda x, w: x.sin() * w, argnums=1, in_dims=(0, None))
    x = randn(B, 3)
    equal(torch.func.grad(lambda x: jac(x, randn(3)).sum())(x), x.cos())


@pytest.mark.parametrize("name", ["mean", "neighbour"])
def test_mixing_in_float32_is_refused(name):
    with pytest.raises(BatchMixingError):
        batch_jacobian(FUNCTIONS[name])(torch.randn(B, 3))


def test_mixing_under_no_grad_is_refused():
    with torch.no_grad(), pytest.raises(BatchMixingError):
        batch_jacobian(FUNCTIONS["mean"])(randn(B, 3))


def test_mixing_of_random_functions_is_refused():
    func = lambda x: (x - x.mean(0)) * torch.rand_like(x)
    with pytest.raises(BatchMixingError):
        batch_jacobian(func, randomness="different")(randn(B, 3))


def test_mixing_in_the_second_argument_only_is_refused():
    func = lambda x, y: x.sin() * (y - y.mean(0))
    with pytest.raises(BatchMixingError):
        batch_jacobian(func, 1)(randn(B, 3), randn(B, 3))


def test_mixing_of_what_nobody_differentiates_is_seen_by_check_batched():
    func = lambda x, y: x.sin() * (y - y.mean(0))
    with pytest.raises(BatchMixingError):
        check_batched(func, randn(B, 3), randn(B, 3))


def test_mixing_through_detached_values_is_seen_by_check_batched():
    """A statistic without a graph leaves derivatives right, and values that mix."""
    func = lambda x: x * x.detach().mean(0)
    with pytest.raises(BatchMixingError):
        check_batched(func, randn(B, 3))


def test_a_batch_of_one_cannot_mix():
    x = randn(1, 3)
    equal(batch_jacobian(FUNCTIONS["cumulative sum"])(x), torch.eye(3).double().unsqueeze(0))


def test_mixing_in_two_levels_is_refused():
    inner = batch_jacobian(lambda x: (x - x.mean(0)) ** 3)
    with pytest.raises(BatchMixingError):
        batch_jacobian(inner)(randn(B, 3))


def test_rows_that_do_not_mix_pass():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)).double().eval()
    index = torch.randint(3, (B, 2))
    calls = [
        lambda: check_batched(net, randn(B, 3)),
        lambda: check_batched(lambda x: x.T, randn(B, 3), out_dims=1),
        lambda: check_batched(lambda x, w: x @ w, randn(B, 3), randn(3, 5), in_dims=(0, None)),
        lambda: check_batched(nn.Dropout(), randn(B, 3)),
        lambda: check_batched(lambda x, i: x.gather(1, i), randn(B, 3), index),
        lambda: check_batched(torch.sin, randn(2, 3)),
    ]
    assert all(call() is None for call in calls)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e5])
def test_mixing_beside_a_larger_output_is_refused(scale):
    func = lambda x: torch.cat([scale * x.sum(1, keepdim=True), x.softmax(0)], 1)
    with pytest.raises(BatchMixingError):
        batch_jacobian(func)(randn(8, 3).float())


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


def test_batch_norm_with_dropout_in_training_is_named():
    """The real error comes first."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()
    with pytest.raises(BatchMixingError, match="1: BatchNorm1d in training mode"):
        batch_jacobian(net)(randn(B, 3))


def test_rows_that_mix_are_refused_where_only_single_rows_could_be_tried():
    func = lambda x, shared: F.batch_norm(x, None, None, training=True) + shared.sum()
    jac = batch_jacobian(func, argnums=(1, 0), in_dims=(0, None))
    with pytest.raises(BatchMixingError):
        jac(fixed_randn(3, 1), fixed_randn(3, 3))


@pytest.mark.parametrize("offset", [1e4, 100])
def test_rows_that_mix_under_a_large_constant_are_refused(offset):
    x = fixed_randn(4, 2000).float()
    with torch.no_grad(), pytest.raises(BatchMixingError):
        batch_jacobian(lambda x: offset + (x - x.mean(0)))(x)


class Keeps(nn.Module):
    last = None

    def forward(self, w, x):
        self.last = x @ w
        return self.last.tanh()


@pytest.mark.parametrize("keywords", [{"in_dims": (None, 0)}, {"argnums": 1, "engine": "loop"}])
def test_verified_inside_of_a_gradient_nothing_of_it_is_kept(keywords):
    net, w, x = Keeps(), randn(3, 2), randn(B, 3)
    jac = batch_jacobian(net, **{"in_dims": (None, 0)} | keywords)
    torch.func.grad(lambda w: jac(w, x).square().sum())(w)
    assert net.last is None
    copy.deepcopy(net)
