"""Keys: what tells calls apart, how they are counted, and when they are verified again."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from funcjac import (
    BatchMixingError,
    batch_divergence,
    batch_hessian,
    batch_jacobian,
    batch_laplacian,
)
from funcjac._dispatch.decisions import FunctionKey
from tests.fresh import fresh
from tests.tensors import randn

B = 4
DUE = {1, 2, 4, 8, 16}


class Sine(torch.autograd.Function):
    """The sine, which notes each pass through its backward: verification is a pass more."""

    generate_vmap_rule = True
    passes = 0

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        Sine.passes += 1
        (x,) = ctx.saved_tensors
        return grad * x.cos()


def sine(x):
    return Sine.apply(x)


def passes_of(call):
    before = Sine.passes
    call()
    return Sine.passes - before


def verified(calls, least):
    """Which of ``calls``, numbered from one, made more passes than need be."""
    counts = [passes_of(call) for call in calls]
    return {number for number, count in enumerate(counts, 1) if count > least}


def passes_unverified(make, x):
    """Passes of a call that nobody looks at."""
    transformed = make(fresh(sine), check=False)
    transformed(x)
    return passes_of(lambda: transformed(x))


# --- calls 1, 2, 4, 8, 16 ----------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")  # Taylor cannot follow it
@pytest.mark.parametrize("make", [batch_jacobian, batch_divergence, batch_hessian])
def test_calls_that_are_powers_of_two_are_verified(make):
    x, func = randn(B, 3), fresh(sine)
    transformed, least = make(func), passes_unverified(make, x)
    assert verified([lambda: transformed(x)] * 20, least) == DUE


def test_every_call_or_none():
    x, least = randn(B, 3), passes_unverified(batch_jacobian, randn(B, 3))
    always, never = (batch_jacobian(fresh(sine), check=check) for check in (True, False))
    assert verified([lambda: always(x)] * 6, least) == {1, 2, 3, 4, 5, 6}
    assert verified([lambda: never(x)] * 6, least) == set()


@pytest.mark.quick
def test_transforms_made_inline_share_a_key():
    x, func, least = randn(B, 3), fresh(sine), passes_unverified(batch_jacobian, randn(B, 3))
    assert verified([lambda: batch_jacobian(func)(x)] * 20, least) == DUE


def test_a_lambda_made_at_each_call_is_one_function():
    """Its code tells it, and never its identity; data that it closes over do not."""
    least = passes_unverified(batch_jacobian, randn(B, 3))

    def call():
        data = randn(1)
        func = lambda x: Sine.apply(x) * data
        return batch_jacobian(func)(randn(B, 3))

    assert verified([call] * 20, least) == DUE


def test_the_batch_size_is_not_in_the_key():
    func, least = fresh(sine), passes_unverified(batch_jacobian, randn(B, 3))
    transformed = batch_jacobian(func, chunk_size=3)
    calls = [lambda size=size: transformed(randn(size, 3)) for size in range(2, 22)]
    assert verified(calls, least) == DUE


@pytest.mark.quick
def test_a_batch_of_one_proves_nothing():
    """Its rows cannot mix, so the first call with more of them is verified."""
    jacobian = batch_jacobian(fresh(lambda x: x - x.mean(0)))
    for _ in range(9):
        jacobian(randn(1, 3))
    with pytest.raises(BatchMixingError, match=r"^batch_jacobian: "):
        jacobian(randn(B, 3))


def test_an_empty_batch_proves_nothing():
    jacobian = batch_jacobian(fresh(lambda x: x - x.mean(0)))
    for _ in range(9):
        jacobian(randn(0, 3))
    with pytest.raises(BatchMixingError, match=r"^batch_jacobian: "):
        jacobian(randn(B, 3))


def test_a_failure_is_no_proof():
    jacobian, x = batch_jacobian(fresh(lambda x: x - x.mean(0))), randn(B, 3)
    for _ in range(6):
        with pytest.raises(BatchMixingError, match=r"^batch_jacobian: "):
            jacobian(x)


# --- what is in the key ------------------------------------------------------------------


class Holds(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return Sine.apply(self.drop(x))


def with_dtype():
    func, x = fresh(sine), randn(B, 3)
    return batch_jacobian(func), (x,), batch_jacobian(func), (x.float(),)


def with_row_size():
    func = fresh(lambda x: Sine.apply(x).sum(1, keepdim=True))
    jacobian = batch_jacobian(func)
    return jacobian, (randn(B, 3),), jacobian, (randn(B, 4),)


def with_a_tree():
    func = fresh(lambda tree: Sine.apply(next(iter(tree.values()))))
    jacobian, x = batch_jacobian(func), randn(B, 3)
    return jacobian, ({"a": x},), jacobian, ({"b": x},)


def with_a_keyword():
    func, x = fresh(sine), randn(B, 3)
    return batch_jacobian(func, mode="rev"), (x,), batch_jacobian(func, mode="fwd"), (x,)


def with_an_integer_argument():
    func, x = fresh(lambda x, power: Sine.apply(x) * power), randn(B, 3)
    jacobian = batch_jacobian(func)
    return jacobian, (x, 1), jacobian, (x, 2)


def closed_over(first, second):
    def make():
        def of(value):
            return lambda x: Sine.apply(x) * (2 if value else 3)

        before, after = of(first), of(second)
        after.__code__ = before.__code__ = fresh(before).__code__
        x = randn(B, 3)
        return batch_jacobian(before), (x,), batch_jacobian(after), (x,)

    return make


CHANGES = {
    "dtype": with_dtype,
    "row size": with_row_size,
    "tree": with_a_tree,
    "keyword": with_a_keyword,
    "integer argument": with_an_integer_argument,
    "an int closed over": closed_over(1, 2),
    "a string closed over": closed_over("a", "b"),
    "a bool closed over": closed_over(True, False),
    "a function closed over": closed_over(lambda x: x, lambda x: 2 * x),
    "a module closed over": closed_over(nn.Tanh(), nn.Tanh()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_key_is_verified_anew(name):
    before, args, after, others = CHANGES[name]()
    for _ in range(20):
        before(*args)
    least = passes_of(lambda: before(*args))
    first = passes_of(lambda: after(*others))
    after(*others)
    third = passes_of(lambda: after(*others))
    assert first > third
    assert passes_of(lambda: before(*args)) == least


def test_grad_mode_is_in_the_key():
    jacobian, x = batch_jacobian(fresh(sine)), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    with torch.no_grad():
        counts = [passes_of(lambda: jacobian(x)) for _ in range(3)]
    assert counts[0] > counts[2]


@pytest.mark.quick
@pytest.mark.parametrize("owner", ["module", "method", "closure"])
def test_training_flags_are_in_the_key(owner):
    module, x = Holds().eval(), randn(B, 3)
    func = {
        "module": module,
        "method": module.forward,
        "closure": lambda x: module(x),
    }[owner]
    jacobian = batch_jacobian(func)
    for _ in range(20):
        jacobian(x)
    module.drop.train()
    counts = [passes_of(lambda: jacobian(x)) for _ in range(3)]
    assert counts[0] > counts[2]


def by_one_factory(first, second):
    """Two functions with one code, each of which closes over a module."""
    layer = lambda module: lambda x: module(x)
    return (lambda one, other: lambda x: other(one(x)))(layer(first), layer(second))


@pytest.mark.quick
@pytest.mark.parametrize("make", [nn.Sequential, by_one_factory])
def test_batch_norm_set_to_training_is_seen_at_once(make):
    norm = nn.Sequential(nn.BatchNorm1d(4)).double().eval()
    jacobian, x = batch_jacobian(make(nn.Linear(3, 4).double(), norm)), randn(B, 3)
    for _ in range(20):
        jacobian(x)
    norm.train()
    with pytest.raises(BatchMixingError, match="BatchNorm1d in training mode"):
        jacobian(x)


def test_a_tree_of_functions_is_looked_into_so_far():
    join = lambda left, right: lambda x: left(x) + right(x)
    functions = [lambda x: x.sin() for _ in range(2**7)]
    while len(functions) > 1:
        functions = [join(*pair) for pair in zip(functions[::2], functions[1::2])]
    assert len(FunctionKey(functions[0]).parts) < 2**6


# --- what is not in the key, and is seen -------------------------------------------------


class Staged(nn.Module):
    """Rows mix from a stage on."""

    def __init__(self, mixing):
        super().__init__()
        self.stage, self.mixing = 0, mixing
        self.config = {"word": "plain"}
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x):
        return self.mixing(x) if self.is_late() else x.sin()

    def is_late(self):
        return self.stage == 1 or self.config["word"] == "late" or bool(self.step)


def by_attribute(module):
    module.stage = 1


def by_word(module):
    module.config["word"] = "late"


def by_buffer(module):
    module.step.fill_(1)


@pytest.mark.quick
@pytest.mark.parametrize("change", [by_attribute, by_word, by_buffer])
@pytest.mark.parametrize("transform", [batch_jacobian, batch_divergence, batch_laplacian])
def test_other_operations_are_verified_at_once(transform, change):
    """Call 20 runs others than call 19 did: the nodes of its graph tell."""
    module, x = Staged(lambda x: (x - x.mean(0)) ** 3), randn(B, 3)
    transformed = transform(module)
    for _ in range(19):
        transformed(x)
    change(module)
    with pytest.raises(BatchMixingError, match=rf"^{transform.__name__}: "):
        transformed(x)


class Dim(nn.Module):
    """The same operation over another dimension: nothing that a key could see."""

    def __init__(self):
        super().__init__()
        self.config = {"dim": 1}

    def forward(self, x):
        return x.softmax(self.config["dim"])


def test_what_no_key_sees_is_seen_soon():
    """By call 32 at the latest, where it changed at call 20."""
    module, x = Dim(), randn(B, 3)
    jacobian = batch_jacobian(module)
    for _ in range(19):
        jacobian(x)
    module.config["dim"] = 0

    def rest():
        for _ in range(20, 33):
            jacobian(x)

    with pytest.raises(BatchMixingError, match=r"^batch_jacobian: "):
        rest()


# --- the table is weak and bounded -------------------------------------------------------


def test_functions_are_not_kept_alive():
    data = randn(3)
    kept = [weakref.ref(data)]

    def call(data):
        func = lambda x: x.sin() * data
        kept.append(weakref.ref(func))
        return batch_jacobian(func)(randn(B, 3))

    call(data)
    del data
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_many_functions_leave_room_for_more():
    """And what was forgotten is verified again, never wrong."""
    x = randn(B, 2)
    first = fresh(lambda x: x - x.mean(0))
    for number in range(400):
        func = fresh(lambda x, number=number: x * (number + 1))
        jac = batch_jacobian(func)(x)
        assert jac[0, 0, 0] == number + 1
    with pytest.raises(BatchMixingError, match=r"^batch_jacobian: "):
        batch_jacobian(first)(x)


def test_a_module_among_many_arguments_of_a_partial_is_found():
    """Its statistics move once, also where a second run replaces what torch has wrong."""
    net, plain = (nn.InstanceNorm1d(2, track_running_stats=True).double() for _ in range(2))
    settings = {f"setting_{n}": n for n in range(20)}
    func = functools.partial(lambda x, net, **_: net(x), net=net, **settings)
    x = randn(4, 2, 5)
    plain(x)
    batch_hessian(func)(x)
    torch.testing.assert_close(net.running_mean, plain.running_mean)
