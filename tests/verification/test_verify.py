"""Verification: what it sees, what it names, that it can fail, and when it looks again."""

import dataclasses
import enum
import functools
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from funcjac import (
    BatchMixingError,
    EngineFallbackWarning,
    VerificationError,
    batch_hessian,
    batch_jacobian,
    check_batched,
    check_derivative,
)
from tests.fresh import fresh

B = 4
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


# --- rows that mix -----------------------------------------------------------------------


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
def test_any_one_row_that_leaks_into_any_other(pair):
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
def test_functions_that_mix_rows(name, engine):
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


@pytest.mark.parametrize("name", ["mean", "neighbour"])
def test_mixing_in_float32(name):
    with pytest.raises(BatchMixingError):
        batch_jacobian(FUNCTIONS[name])(torch.randn(B, 3))


def test_mixing_under_no_grad():
    with torch.no_grad(), pytest.raises(BatchMixingError):
        batch_jacobian(FUNCTIONS["mean"])(randn(B, 3))


def test_mixing_of_random_functions():
    func = lambda x: (x - x.mean(0)) * torch.rand_like(x)
    with pytest.raises(BatchMixingError):
        batch_jacobian(func, randomness="different")(randn(B, 3))


def test_mixing_in_the_second_argument_only():
    func = lambda x, y: x.sin() * (y - y.mean(0))
    with pytest.raises(BatchMixingError):
        batch_jacobian(func, 1)(randn(B, 3), randn(B, 3))


def test_mixing_of_what_nobody_differentiates_is_seen_by_check_batched():
    func = lambda x, y: x.sin() * (y - y.mean(0))
    with pytest.raises(BatchMixingError):
        check_batched(func, randn(B, 3), randn(B, 3))


def test_mixing_through_detached_values():
    """A statistic without a graph leaves derivatives right, and values that mix."""
    func = lambda x: x * x.detach().mean(0)
    with pytest.raises(BatchMixingError):
        check_batched(func, randn(B, 3))


def test_a_batch_of_one_cannot_mix():
    x = randn(1, 3)
    equal(batch_jacobian(FUNCTIONS["cumulative sum"])(x), torch.eye(3).double().unsqueeze(0))


def test_mixing_in_two_levels():
    inner = batch_jacobian(lambda x: (x - x.mean(0)) ** 3)
    with pytest.raises(BatchMixingError):
        batch_jacobian(inner)(randn(B, 3))


def test_rows_that_do_not_mix_pass():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)).double().eval()
    check_batched(net, randn(B, 3))
    check_batched(lambda x: x.T, randn(B, 3), out_dims=1)
    check_batched(lambda x, w: x @ w, randn(B, 3), randn(3, 5), in_dims=(0, None))
    check_batched(nn.Dropout(), randn(B, 3))
    check_batched(lambda x, i: x.gather(1, i), randn(B, 3), torch.randint(3, (B, 2)))
    check_batched(torch.sin, randn(2, 3))


# --- what autograd cannot see ------------------------------------------------------------


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * grad * x.cos()


def no_grad_inside(x):
    with torch.no_grad():
        return x.sin()


DETACHED = {
    "detach": lambda x: x.detach().sin(),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()).sin(),
    "no_grad": no_grad_inside,
    "torch.tensor": lambda x: torch.tensor(x.tolist(), dtype=x.dtype).sin(),
    "data": lambda x: x.data * 2,
}


@pytest.mark.quick
@quiet
@pytest.mark.parametrize("engine", ["sum", "auto"])
@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("name", DETACHED)
def test_detached_functions(name, mode, engine):
    with pytest.raises(
        VerificationError, match=r"^batch_jacobian: .*autograd.*Look for.*detach\(\)"
    ):
        batch_jacobian(DETACHED[name], engine=engine, mode=mode)(randn(B, 3))


def test_a_detached_leaf_among_others():
    func = lambda x: (x.sin(), x.detach() ** 2)
    with pytest.raises(VerificationError, match=r"detach\(\)"):
        batch_jacobian(func)(randn(B, 3))


def test_constants_are_not_detached_functions():
    func = lambda x: (x.sin(), torch.ones_like(x), (x > -100).to(x.dtype), x.detach().round() * 0)
    jac = batch_jacobian(func)(randn(B, 3))
    equal(list(jac[1:]), [torch.zeros(B, 3, 3).double()] * 3)


def test_a_wrong_backward_is_not_seen_but_checked():
    """Plain reverse mode itself is the yardstick; only values tell that it is wrong."""
    x = randn(B, 3)
    jacobian = batch_jacobian(WrongBackward.apply, engine="sum", mode="rev")
    equal(jacobian(x), torch.diag_embed(2 * x.cos()))
    report = check_derivative(jacobian, x)
    assert not report.ok
    assert report.central_difference > 0.1
    assert "WRONG" in str(report)


# --- derivatives of the Jacobian ---------------------------------------------------------


class CutFromTheWeight(torch.autograd.Function):
    """A product whose forward formula is right, and cannot be differentiated by ``w``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum_to_size(w.shape)

    @staticmethod
    def jvp(ctx, x_t, w_t):
        x, w = ctx.saved_tensors
        return x_t * w.detach() + (0 if w_t is None else x * w_t)


# Beside the product: a weight with derivatives a billion times as large, and a kink.
BESIDE = {
    "large": lambda x, v: 1e8 * (x * v) ** 2,
    "kink": lambda x, v: torch.where(x > 1, x**2, x) + 0 * v,
}


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
@pytest.mark.parametrize("name", BESIDE)
def test_a_wrong_derivative_by_one_weight_among_others(name, mode):
    w, v = (torch.tensor(t).double().requires_grad_() for t in (0.5, 0.7))
    x = torch.tensor([[0.3], [1.0], [1.2]]).double()
    jac = batch_jacobian(lambda x: CutFromTheWeight.apply(x, w) + BESIDE[name](x, v), mode=mode)(x)
    equal(torch.autograd.grad(jac.sum(), w)[0], torch.tensor(3.0).double())


# --- verification can fail ---------------------------------------------------------------


def network():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    return net.requires_grad_(False)


def only(index, value):
    """A factor for each basis vector: ``value`` for one of them."""

    def factor(out):
        found = out.new_ones(len(out), *[1] * (out.ndim - 1))
        found[min(index, len(out) - 1)] = value
        return out * found

    return factor


# What a batching rule may make of the pullback of a basis ``(M, ...)``
HARMS = {
    "everything": lambda out: 1.01 * out,
    "one basis vector": only(1, 1.01),
    "a zero": only(2, 0.0),
    "not a number": only(1, torch.nan),
    "another order": lambda out: out.roll(1, 0),
}
by_harm = pytest.mark.parametrize("harm", HARMS)


class Pull(torch.autograd.Function):
    """``grad * slope``, with a batching rule that does harm."""

    @staticmethod
    def forward(grad, slope, harm):
        return grad * slope

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, outer):
        grad, slope = ctx.saved_tensors
        return outer * slope, outer * grad, None

    @staticmethod
    def vmap(info, in_dims, grad, slope, harm):
        grad, slope = (
            x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((grad, slope), in_dims)
        )
        return HARMS[harm](grad * slope), 0


class Sine(torch.autograd.Function):
    """The sine; its pullback is right where it runs for one cotangent."""

    @staticmethod
    def forward(x, harm):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.harm = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return Pull.apply(grad, x.cos(), ctx.harm), None

    @staticmethod
    def vmap(info, in_dims, x, harm):
        return Sine.apply(x, harm), in_dims[0]


def harmed(harm):
    weight = torch.arange(1.0, 16.0).double().reshape(3, 5) / 9
    return lambda x: Sine.apply(x, harm) @ weight.to(x)


@pytest.mark.quick
@by_harm
@pytest.mark.parametrize("check", ["auto", True])
def test_a_wrong_batching_rule_is_caught(check, harm):
    jacobian = batch_jacobian(harmed(harm), engine="vmap", mode="rev", check=check)
    for _ in range(2):
        with pytest.raises(VerificationError, match=r"^batch_jacobian: .*vmap"):
            jacobian(randn(B, 3))


@by_harm
def test_a_wrong_batching_rule_in_float32(harm):
    with pytest.raises(VerificationError, match=r"^batch_jacobian: "):
        batch_jacobian(harmed(harm), engine="vmap", mode="rev")(torch.randn(B, 3))


@by_harm
def test_check_false_sees_nothing(harm):
    """The counterpart of the tests above: it is the verification that catches."""
    x = randn(B, 3)
    right = batch_jacobian(harmed(harm), engine="loop")(x)
    wrong = batch_jacobian(harmed(harm), engine="vmap", mode="rev", check=False)(x)
    assert not torch.equal(wrong, right)


@quiet
@by_harm
def test_auto_does_not_return_it(harm):
    jacobian = batch_jacobian(harmed(harm))
    weight = torch.arange(1.0, 16.0).double().reshape(3, 5) / 9
    for _ in range(10):
        x = randn(B, 3)
        equal(jacobian(x), x.cos().unsqueeze(1) * weight.T)


def test_check_true_looks_on_every_call():
    now = {"harm": False}
    scale = lambda x: Sine.apply(x, "everything") if now["harm"] else x.sin()
    jacobian, x = batch_jacobian(scale, engine="vmap", mode="rev", check=True), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    now["harm"] = True
    with pytest.raises(VerificationError, match=r"^batch_jacobian: "):
        jacobian(x)


# --- functions that change ---------------------------------------------------------------


def test_a_changed_training_flag():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
    jacobian = batch_jacobian(net)
    x = randn(B, 3)
    for _ in range(20):
        jacobian(x)
    net.train()
    with pytest.raises(BatchMixingError, match="BatchNorm1d in training mode"):
        jacobian(x)  # which moves the running statistics, as a plain run does
    net.eval()
    equal(jacobian(x), torch.vmap(torch.func.jacrev(lambda row: net(row[None])[0]))(x))


class Holder:
    """Modules and functions in every place where a function may find them."""

    def __init__(self):
        self.module = nn.Tanh()

    def method(self, x):
        return self.module(x)


HELPER = nn.Tanh()


def helper(x):
    return x.tanh()


def uses_a_global_module(x):
    return HELPER(x)


def uses_a_global_function(x):
    return helper(x)


def mixes(x):
    return x - x.mean(0)


def calls_a_caller(x):
    return uses_a_global_function(x)


@pytest.mark.parametrize("func", [uses_a_global_function, calls_a_caller])
def test_a_redefined_global_helper(func, monkeypatch):
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    monkeypatch.setitem(globals(), "helper", mixes)
    with pytest.raises(BatchMixingError):
        jacobian(x)


def test_a_replaced_global_module(monkeypatch):
    jacobian, x = batch_jacobian(uses_a_global_module), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    monkeypatch.setitem(globals(), "HELPER", nn.BatchNorm1d(3).double())
    with pytest.raises(BatchMixingError, match="BatchNorm1d"):
        jacobian(x)


def test_a_replaced_submodule():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    jacobian, x = batch_jacobian(net), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    net[1] = nn.BatchNorm1d(4).double()
    with pytest.raises(BatchMixingError, match="1: BatchNorm1d"):
        jacobian(x)


def test_a_changed_closure():
    inner = torch.tanh

    def func(x):
        return inner(x)

    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    inner = mixes
    with pytest.raises(BatchMixingError):
        jacobian(x)


@pytest.mark.parametrize("where", ["method", "call", "attribute function"])
def test_a_changed_attribute(where):
    holder = Holder()
    holder.function = torch.tanh
    func = {
        "method": holder.method,
        "call": lambda x: holder.module(x),
        "attribute function": lambda x: holder.function(x),
    }[where]
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    holder.module, holder.function = nn.BatchNorm1d(3).double(), mixes
    with pytest.raises(BatchMixingError):
        jacobian(x)


def test_a_changed_flag():
    """A flag given as an argument is part of the signature."""
    func = lambda x, mix: mixes(x) if mix else x
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(x, mix=False)
    with pytest.raises(BatchMixingError):
        jacobian(x, mix=True)


class Kind(enum.Enum):
    PLAIN = 0
    MIXING = 1


switch, function = False, torch.tanh


def by_a_dict():
    words = {"mix": False}
    return lambda x: mixes(x) if words["mix"] else x, lambda: words.update(mix=True)


def by_a_global_flag():
    def change():
        globals()["switch"] = True

    globals()["switch"] = False
    return lambda x: mixes(x) if switch else x, change


def by_a_global_builtin():
    def change():
        globals()["function"] = torch.softmax

    globals()["function"] = torch.tanh
    return lambda x: function(x, 0) if function is torch.softmax else function(x), change


def by_a_function_of_torch():
    used = F.relu

    def change():
        nonlocal used
        used = F.softmax

    return lambda x: used(x, 0), change


def by_a_number_or_a_word(before, after):
    kind = before

    def change():
        nonlocal kind
        kind = after

    return lambda x: mixes(x) if kind == after else x, change


def by_a_default():
    def func(x, *, mix=False):
        return mixes(x) if mix else x

    return func, lambda: func.__kwdefaults__.update(mix=True)


def by_words_of_a_partial():
    func = functools.partial(lambda x, kind: mixes(x) if kind == 1 else x, kind=0)
    return func, lambda: func.keywords.update(kind=1)


SWITCHED = {
    "dict": by_a_dict,
    "global flag": by_a_global_flag,
    "builtin": by_a_global_builtin,
    "function of torch": by_a_function_of_torch,
    "number": lambda: by_a_number_or_a_word(2, 3),
    "word": lambda: by_a_number_or_a_word("plain", "mixing"),
    "enum": lambda: by_a_number_or_a_word(Kind.PLAIN, Kind.MIXING),
    "default": by_a_default,
    "partial": by_words_of_a_partial,
}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_is_verified_anew(name):
    """Other operations run than before, and so the graph has other nodes."""
    func, change = SWITCHED[name]()
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    change()
    with pytest.raises(BatchMixingError):
        jacobian(x)


@pytest.mark.parametrize("kind", [Kind.PLAIN, numpy.int64(0)])
def test_an_argument_of_another_kind_of_number(kind):
    jacobian, x = batch_jacobian(lambda x, k: mixes(x) if k in (Kind.MIXING, 1) else x), randn(B, 3)
    for _ in range(20):
        jacobian(x, kind)
    with pytest.raises(BatchMixingError):
        jacobian(x, Kind.MIXING if kind is Kind.PLAIN else numpy.int64(1))


@pytest.mark.parametrize(
    ("func", "bad"),
    [
        (lambda x: x.softmax(0), lambda x: x.masked_fill(torch.eye(B, 3).bool(), torch.nan)),
        (lambda x: x / x.norm(dim=0), torch.zeros_like),
    ],
    ids=["nan", "zeros"],
)
def test_data_without_derivatives_verify_nothing(func, bad):
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(bad(x))
    with pytest.raises(BatchMixingError):
        jacobian(x)


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e5])
def test_mixing_beside_a_larger_output(scale):
    func = lambda x: torch.cat([scale * x.sum(1, keepdim=True), x.softmax(0)], 1)
    with pytest.raises(BatchMixingError):
        batch_jacobian(func)(randn(8, 3).float())


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0].cos()


@quiet
@pytest.mark.parametrize("engine", ["auto", "sum", "loop"])
def test_what_is_differentiable_once_says_so_in_backward(engine):
    w, x = randn(3, 3).requires_grad_(), randn(B, 3)
    jac = batch_jacobian(lambda x: Once.apply(x @ w) * w.sum(), engine=engine)(x)
    equal(jac.detach(), (x @ w).cos().unsqueeze(2) * w.T * w.sum())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        jac.sum().backward()


@pytest.mark.parametrize(("factor", "batch"), [(10, 16), (10, 128), (30, 32)])
def test_a_softmax_that_has_made_up_its_mind_in_float32(factor, batch):
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(*shape, generator=rng) for shape in ((batch, 8), (8, 1)))
        func = lambda x: (factor * x).softmax(-1) @ w.to(x)
        right = batch_jacobian(func)(x.double())
        assert (batch_jacobian(func)(x) - right).abs().max() < 1e-5 * right.abs().max()


def test_a_hook_added_later():
    net = network()
    jacobian, x = batch_jacobian(net), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    net[1].register_forward_hook(lambda module, args, out: mixes(out))
    with pytest.raises(BatchMixingError):
        jacobian(x)


def test_weights_changed_in_place_are_seen():
    """The values of parameters are no part of the signature, and results follow them."""
    net, x = network(), randn(B, 3)
    jacobian = batch_jacobian(net)
    for _ in range(20):
        before = jacobian(x)
    with torch.no_grad():
        net[2].weight.mul_(3)
    equal(jacobian(x), 3 * before)


# --- the warning -------------------------------------------------------------------------


def branches(w, x):
    """Nothing that vmap can do, and shared weights, which have no sum trick."""
    return (w * x).sin() if bool((x > -100).all()) else x


def shared(func, **words):
    return batch_jacobian(func, in_dims=(None, 0), **words)


def said_of(run):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run()
    return said


def test_the_warning_says_it_all_once():
    jacobian, w, x = shared(fresh(branches)), randn(3), randn(B, 3)

    def run():
        for batch in (B, B, 3, 2):  # other sizes and dtypes do not warn again
            jacobian(w, x[:batch])
            jacobian(w.float(), x[:batch].float())

    (warning,) = said_of(run)
    assert warning.category is EngineFallbackWarning
    text = str(warning.message)
    assert text.startswith("batch_jacobian: left engine 'vmap' for engine 'loop', because ")
    assert 'warnings.filterwarnings("ignore", category=funcjac.EngineFallbackWarning)' in text
    assert warning.filename == __file__


@pytest.mark.quick
def test_the_warning_comes_once_for_each_function():
    """However many transforms are made of it: inline ones are made at each call."""
    w, x = randn(3), randn(B, 3)
    for func in (fresh(branches), fresh(branches)):
        said = said_of(lambda func=func: [shared(func)(w, x) for _ in range(5)])
        assert [warning.category for warning in said] == [EngineFallbackWarning]


@pytest.mark.parametrize("how", ["engine", "filter"])
def test_the_warning_can_be_silenced_as_it_says(how):
    words = {"engine": "loop"} if how == "engine" else {}
    w, x = randn(3), randn(B, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "filter":
            warnings.filterwarnings("ignore", category=EngineFallbackWarning)
        jac = shared(fresh(branches), **words)(w, x)
    equal(jac, torch.diag_embed(x * (w * x).cos()))


def test_the_warning_as_an_error_leaves_a_transform_that_works():
    jacobian, w, x = shared(fresh(branches)), randn(3), randn(B, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", EngineFallbackWarning)
        with pytest.raises(EngineFallbackWarning, match="left engine 'vmap'"):
            jacobian(w, x)
        equal(jacobian(w, x), torch.diag_embed(x * (w * x).cos()))


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval()


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.core = nn.LSTM(3, 4, batch_first=True).double()

    def forward(self, x):
        return self.core(x)[0][:, -1]


def masked(x):
    out = x.sin()
    out[x > 0] = x[x > 0] ** 2
    return out


WITHOUT_A_WORD = {
    "network": (network, (3,)),
    "LSTM": (Last, (5, 3)),
    "encoder layer": (encoder, (5, 4)),
    "mask": (lambda: masked, (3,)),
    "item": (lambda: lambda x: x.sin() if x.sum().item() > -1e9 else x, (3,)),
    "nonzero": (lambda: lambda x: x.sin() * len((x > 0).nonzero()[:0].T), (3,)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WITHOUT_A_WORD)
def test_no_warning_where_the_sum_trick_works(name):
    make, row = WITHOUT_A_WORD[name]
    jacobian = batch_jacobian(make())
    assert not said_of(lambda: [jacobian(randn(B, *row)) for _ in range(5)])


def test_an_operation_without_a_batching_rule():
    """Torch runs renorm under vmap one sample at a time, with a warning."""
    func = lambda x: x.renorm(2, 0, 1.0) if x.ndim == 2 else x
    x = randn(B, 3)
    expected = torch.autograd.functional.jacobian(func, x)
    equal(batch_jacobian(func)(x), torch.stack([expected[b, :, b] for b in range(B)]))


# --- what the checks can see ----------------------------------------------------------------


@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
def test_checks_of_a_function_that_differentiates_by_itself(transform):
    base = randn(3, 3)

    def force(x):
        return torch.autograd.grad((x @ base).sin().sum(), x, create_graph=True)[0]

    check_batched(force, randn(B, 3))
    assert check_derivative(transform(force), randn(B, 3)).ok


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_row_without_numbers_does_not_hide_a_wrong_backward(poison):
    x = randn(B, 3)
    x[0] = poison
    assert check_derivative(batch_jacobian(torch.sin, mode="rev"), x).ok
    assert not check_derivative(batch_jacobian(WrongBackward.apply, engine="sum"), x).ok


def test_poles_are_no_differences():
    x = randn(B, 3).abs()
    x[0, 0] = 0
    report = check_derivative(batch_jacobian(torch.sqrt), x)
    assert all(c.difference == 0 for c in report.comparisons if c.mode == "rev")


def test_a_report_where_another_device_is_the_default():
    with torch.device("meta"):
        assert check_derivative(batch_jacobian(torch.sin), randn_on_cpu()).ok


def randn_on_cpu():
    return torch.ones(B, 3, dtype=torch.float64, device="cpu")


# --- what rounding explains -----------------------------------------------------------------


def partly_constant(x):
    with torch.no_grad():
        constant = x.sin()
    return (x**3 + constant) * torch.ones(64, dtype=x.dtype)


@pytest.mark.parametrize("large", [1e3, 1e5])
def test_a_large_row_excuses_no_other(large):
    x = torch.tensor([[large], [1.0]])
    jacobian = batch_jacobian(partly_constant)
    for _ in range(16):
        torch.testing.assert_close(jacobian(x)[1], torch.full((64, 1), 3.0))


@quiet
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_a_value_that_is_zero_but_for_rounding(engine):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    x = torch.randn(8, 16)
    reached = net(x).detach()
    func = lambda x, y: net(x) - y
    jac, value = batch_jacobian(func, engine=engine, return_value=True)(x, reached)
    assert value.abs().max() < 1e-5
    torch.testing.assert_close(jac, batch_jacobian(net)(x))


@quiet
def test_values_with_draws_of_ones_own():
    generator = torch.Generator()
    func = lambda x: 2 * x + torch.randn(x.shape, generator=generator, dtype=x.dtype)
    jacobian = batch_jacobian(func, return_value=True, randomness="different")
    equal(jacobian(randn(B, 3))[0], 2 * torch.eye(3).double().expand(B, 3, 3))


# --- signatures -----------------------------------------------------------------------------


@dataclasses.dataclass
class Payload:
    factor: int


class Unhashable(Payload, enum.Enum):
    ONE = 1
    TWO = 2


def test_members_of_an_enum_without_a_hash():
    func = lambda x, kind=Unhashable.ONE: x * kind.factor
    jacobian, x = batch_jacobian(func), randn(B, 3)
    equal(jacobian(x), torch.eye(3).double().expand(B, 3, 3))
    equal(jacobian(x, Unhashable.TWO), 2 * torch.eye(3).double().expand(B, 3, 3))


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_an_aux_that_is_zero_but_for_rounding(engine):
    weights = randn(8, 8)
    inverse = torch.linalg.inv(weights)
    func = lambda x: (x.sin(), x @ weights @ inverse - x)
    aux = batch_jacobian(func, engine=engine, has_aux=True)(randn(B, 8))[1]
    assert 0 < aux.abs().max() < 1e-12


def dead_at_first(x):
    with torch.no_grad():
        factor = x.cos()
    return (x * factor).relu().repeat(1, 20)


@pytest.mark.parametrize(
    "words",
    [{}, {"engine": "vmap"}, *[{"engine": e, "mode": "fwd"} for e in ("sum", "loop")]],
)
def test_a_no_grad_block_behind_what_is_dead_at_first(words):
    jacobian = batch_jacobian(dead_at_first, **words)
    for _ in range(12):
        jacobian(-randn(B, 3).sigmoid())
    for _ in range(4):
        x = randn(B, 3).sigmoid()
        equal(jacobian(x), torch.diag_embed(x.cos()).repeat(1, 20, 1))


class WrongForwards(torch.autograd.Function):
    """Three times as much forwards as backwards."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


@pytest.mark.parametrize("words", [{"engine": "sum"}, {"engine": "loop", "mode": "fwd"}])
def test_what_was_dead_at_first_is_verified_later(words):
    jacobian = batch_jacobian(lambda x: WrongForwards.apply(x).relu().repeat(1, 20), **words)
    for _ in range(12):
        equal(jacobian(-randn(B, 3).abs()), torch.zeros(B, 60, 3).double())
    for _ in range(4):
        equal(jacobian(randn(B, 3).abs()), torch.eye(3).double().repeat(B, 20, 1))
