"""The rule: the same call gives the same bits, today, inline, unverified, under load."""

import itertools
import threading

import optree
import pytest
import torch
from torch import Tensor, nn

from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    explain,
)
from tests.tensors import set_seed

B = 6
TRANSFORMS = {
    "jacobian": batch_jacobian,
    "jacobian, fwd": lambda func, **words: batch_jacobian(func, mode="fwd", **words),
    "nested": lambda func, **words: batch_jacobian(batch_jacobian(func, **words), **words),
    "hessian": batch_hessian,
    "diagonal": batch_hessian_diagonal,
    "laplacian": batch_laplacian,
    "divergence": batch_divergence,
    "partials": lambda func, **words: batch_partials(func, [(0,), (1, 1), (0, 1, 2)], **words),
}
by_name = pytest.mark.parametrize("name", TRANSFORMS)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(2))[0][:, -1]


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 1, 1))

    def forward(self, x):
        return self.net(x.unsqueeze(1)).squeeze(1)


NETWORKS = {
    "small": lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)),
    "deep": lambda: nn.Sequential(
        *[layer for _ in range(4) for layer in (nn.Linear(3, 3), nn.SiLU())]
    ),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 3)),
    "convolution": Image,
    "lstm": Recurrent,
}
PAIRS = [*itertools.product(NETWORKS, TRANSFORMS)]
PAIRS = [(net, name) for net, name in PAIRS if net != "lstm" or name in ("jacobian", "divergence")]
by_pair = pytest.mark.parametrize(("net", "name"), PAIRS)


def made(net):
    set_seed(3)
    return NETWORKS[net](), torch.randn(B, 3)


def bits(tree):
    return [leaf.detach().clone() for leaf in optree.tree_leaves(tree)]


def assert_same(found, first):
    found = bits(found)
    assert len(found) == len(first) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, first))


@pytest.mark.quick
@by_pair
def test_fresh_transforms_give_the_same_bits(net, name):
    """Each of them in the first calls and in later ones, verified or not."""
    func, x = made(net)
    first = bits(TRANSFORMS[name](func)(x))
    for _ in range(4):
        transformed = TRANSFORMS[name](func)
        for _ in range(5):
            assert_same(transformed(x), first)


@pytest.mark.quick
@by_pair
@pytest.mark.parametrize("check", [False, True])
def test_verification_changes_no_bit(check, net, name):
    func, x = made(net)
    unverified = TRANSFORMS[name](func, check=check)
    first = bits(unverified(x))
    for _ in range(3):
        assert_same(unverified(x), first)
    verified = TRANSFORMS[name](func)
    for _ in range(3):
        assert_same(verified(x), first)


@by_pair
def test_other_calls_in_between_change_no_bit(net, name):
    """Other batch sizes, other functions, other dtypes: nothing is learned from them."""
    func, x = made(net)
    transformed = TRANSFORMS[name](func)
    first = bits(transformed(x))
    for batch in (1, 40, 2, 7):
        transformed(torch.randn(batch, 3))
        TRANSFORMS[name](torch.sin)(x.double())
        assert_same(transformed(x), first)


@by_name
def test_equal_functions_give_the_same_bits(name):
    """A module and its copy, a lambda made again and again."""
    func, x = made("small")
    first = bits(TRANSFORMS[name](func)(x))
    assert_same(TRANSFORMS[name](made("small")[0])(x), first)
    for _ in range(4):
        assert_same(TRANSFORMS[name](lambda x: func(x))(x), first)


@by_name
def test_the_same_bits_with_a_graph(name):
    func, x = made("small")
    x.requires_grad_()
    first = bits(TRANSFORMS[name](func)(x))
    for _ in range(2):
        transformed = TRANSFORMS[name](func)
        for _ in range(3):
            assert_same(transformed(x), first)


@by_name
def test_the_same_bits_under_load(name):
    """Nothing is raced against the clock."""
    func, x = made("small")
    first, stop = bits(TRANSFORMS[name](func)(x)), threading.Event()

    def burn():
        while not stop.is_set():
            sum(range(1000))

    threads = [threading.Thread(target=burn, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            transformed = TRANSFORMS[name](func)
            for _ in range(3):
                assert_same(transformed(x), first)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@by_name
def test_looking_and_measuring_change_no_bit(name):
    func, x = made("small")
    transformed = TRANSFORMS[name](func)
    first = bits(transformed(x))
    explain(transformed, x, measure=True)
    assert_same(transformed(x), first)
    assert_same(TRANSFORMS[name](func)(x), first)


@pytest.mark.quick
@by_pair
def test_the_choice_is_a_function_of_the_call(net, name):
    func, x = made(net)
    found = [explain(TRANSFORMS[name](func), x) for _ in range(3)]
    choices = {(f.engine, f.mode, f.passes, f.chunk) for f in found}
    assert len(choices) == 1


@pytest.mark.parametrize(("inputs", "outputs", "mode"), [(2, 40, "fwd"), (40, 2, "rev")])
def test_the_smaller_side_decides_the_mode(inputs, outputs, mode):
    set_seed(0)
    net = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    assert explain(batch_jacobian(net), torch.randn(B, inputs)).mode == mode


@pytest.mark.quick
def test_the_engine_goes_by_meaning():
    """``sum`` for plain code, ``vmap`` for arguments that rows share and for one draw for all."""
    x, w = torch.randn(B, 3), torch.randn(3)
    plain = explain(batch_jacobian(torch.sin), x)
    assert plain.engine == "sum"
    recurrent = explain(batch_jacobian(Recurrent()), x)
    assert recurrent.engine == "sum"
    scaled = lambda w, x: (w * x).sin()
    assert explain(batch_jacobian(scaled, in_dims=(None, 0)), w, x).engine == "vmap"
    assert explain(batch_jacobian(scaled, 1, in_dims=(None, 0)), w, x).engine == "sum"
    dropout = lambda x: nn.functional.dropout(x)
    assert explain(batch_jacobian(dropout, randomness="same"), x).engine == "vmap"
    assert explain(batch_jacobian(torch.sin, check=False), x).engine == "sum"


def test_memory_of_a_pass_is_bounded():
    """A wide output: what a pass holds does not grow with the whole basis."""
    set_seed(0)
    net = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 2048)).requires_grad_(False)
    found = explain(batch_jacobian(net, mode="rev"), torch.randn(64, 32))
    assert found.passes == 2048
    assert 1 <= found.chunk < 2048


def test_results_are_tensors_of_their_own():
    """What was returned is not written to by the next call."""
    func, x = made("small")
    jacobian = batch_jacobian(func)
    first: Tensor = jacobian(x)
    kept = first.clone()
    jacobian(2 * x)
    assert torch.equal(first, kept)
