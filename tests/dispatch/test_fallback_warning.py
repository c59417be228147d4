"""The warning that an engine was left: once for each function, and silenced as it says."""

import warnings

import pytest
import torch
from torch import nn

from funcjac import EngineFallbackWarning, batch_jacobian
from tests.cases.functions import assign_masked
from tests.cases.modules import network
from tests.fresh import fresh
from tests.tensors import equal, randn

B = 4


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


def test_the_reason_is_told_in_whole_sentences():
    """torch's own goes on for 500 characters."""
    (warning,) = said_of(lambda: shared(fresh(branches))(randn(3), randn(B, 3)))
    reason = str(warning.message).partition("because ")[2].partition(" The result is ")[0]
    assert reason.startswith("RuntimeError: vmap: It looks like you're either (1) calling .item()")
    assert reason.endswith("(3) encountering this error in PyTorch internals.")


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


WITHOUT_A_WORD = {
    "network": (lambda: network(5, grad=False), (3,)),
    "LSTM": (Last, (5, 3)),
    "encoder layer": (encoder, (5, 4)),
    "mask": (lambda: assign_masked, (3,)),
    "item": (lambda: lambda x: x.sin() if x.sum().item() > -1e9 else x, (3,)),
    "nonzero": (lambda: lambda x: x.sin() * len((x > 0).nonzero()[:0].T), (3,)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WITHOUT_A_WORD)
def test_no_warning_where_the_sum_trick_works(name):
    make, row = WITHOUT_A_WORD[name]
    jacobian = batch_jacobian(make())
    assert not said_of(lambda: [jacobian(randn(B, *row)) for _ in range(5)])


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
