"""Functions that change between calls: verified anew where other operations run."""

import dataclasses
import enum
import functools

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from funcjac import BatchMixingError, batch_hessian, batch_jacobian
from tests.cases.modules import network
from tests.tensors import equal, randn

B = 4


def test_a_changed_training_flag_is_seen():
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
def test_a_redefined_global_helper_is_seen(func, monkeypatch):
    jacobian, x = batch_jacobian(func), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    monkeypatch.setitem(globals(), "helper", mixes)
    with pytest.raises(BatchMixingError):
        jacobian(x)


def test_a_replaced_global_module_is_seen(monkeypatch):
    jacobian, x = batch_jacobian(uses_a_global_module), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    monkeypatch.setitem(globals(), "HELPER", nn.BatchNorm1d(3).double())
    with pytest.raises(BatchMixingError, match="BatchNorm1d"):
        jacobian(x)


def test_a_replaced_submodule_is_seen():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()
    jacobian, x = batch_jacobian(net), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    net[1] = nn.BatchNorm1d(4).double()
    with pytest.raises(BatchMixingError, match="1: BatchNorm1d"):
        jacobian(x)


def test_a_changed_closure_is_seen():
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
def test_a_changed_attribute_is_seen(where):
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


def test_a_changed_flag_is_seen():
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
def test_an_argument_of_another_kind_of_number_is_another_key(kind):
    jacobian, x = batch_jacobian(lambda x, k: mixes(x) if k in (Kind.MIXING, 1) else x), randn(B, 3)
    for _ in range(20):
        jacobian(x, kind)
    with pytest.raises(BatchMixingError):
        jacobian(x, Kind.MIXING if kind is Kind.PLAIN else numpy.int64(1))


def test_a_hook_added_later_is_seen():
    net = network(5, grad=False)
    jacobian, x = batch_jacobian(net), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    net[1].register_forward_hook(lambda module, args, out: mixes(out))
    with pytest.raises(BatchMixingError):
        jacobian(x)


def test_weights_changed_in_place_are_seen():
    """The values of parameters are no part of the signature, and results follow them."""
    net, x = network(5, grad=False), randn(B, 3)
    jacobian = batch_jacobian(net)
    for _ in range(20):
        before = jacobian(x)
    with torch.no_grad():
        net[2].weight.mul_(3)
    equal(jacobian(x), 3 * before)


@dataclasses.dataclass
class Payload:
    factor: int


class Unhashable(Payload, enum.Enum):
    ONE = 1
    TWO = 2


def test_members_of_an_enum_without_a_hash_are_told_apart():
    func = lambda x, kind=Unhashable.ONE: x * kind.factor
    jacobian, x = batch_jacobian(func), randn(B, 3)
    equal(jacobian(x), torch.eye(3).double().expand(B, 3, 3))
    equal(jacobian(x, Unhashable.TWO), 2 * torch.eye(3).double().expand(B, 3, 3))


@pytest.mark.quick
def test_an_int_attribute_that_makes_rows_mix_from_call_20_on_is_seen():
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
