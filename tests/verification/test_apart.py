"""Results are apart from what the library keeps, and nothing of a call stays alive."""

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from funcjac import (
    BatchMixingError,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
)
from tests.tensors import equal, randn

PASSED_ON = {
    "x": lambda x: x,
    "x + 1": lambda x: x + 1,
    "clone": torch.clone,
    "reshape": lambda x: x.reshape(-1, 1, 3),
    "tree": lambda x: (x.sin(), x),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", PASSED_ON)
def test_writing_into_a_result_changes_no_later_one(name):
    """Of a batch of one, the basis may come out of the passes as it went in."""
    x = randn(4, 3)
    for _ in range(3):
        jac = batch_jacobian(PASSED_ON[name])(randn(1, 3))
        for block in jac if isinstance(jac, tuple) else (jac,):
            block.mul_(5)
        for keywords in ({}, {"check": False}):
            right = torch.diag_embed(x.cos())
            equal(batch_jacobian(torch.sin, **keywords)(x), right)


def test_a_result_lies_in_no_weight():
    layer = nn.Linear(3, 20).double().requires_grad_(False)
    before = layer.weight.clone()
    for _ in range(3):
        batch_jacobian(layer)(randn(1, 3)).mul_(5)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("activation", [torch.abs, nn.functional.silu, nn.functional.gelu])
@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian_diagonal, batch_laplacian])
def test_nothing_of_a_verified_call_stays_alive(transform, activation):
    layer, inputs = nn.Linear(3, 3).double(), []

    def func(x):
        inputs.append(weakref.ref(x))
        return activation(layer(x))

    transform(func, check=True)(randn(4, 3))
    gc.collect()
    assert [ref for ref in inputs if ref() is not None] == []


@pytest.mark.parametrize("slope", [10, 20, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [batch_hessian, batch_hessian_diagonal, batch_laplacian])
def test_saturated_rows_are_not_taken_for_wrong(transform, dtype, slope):
    func = lambda z: (slope * z).softmax(-1)
    for seed in range(3):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        assert transform(func, check=True)(x).isfinite().all()


@pytest.mark.quick
def test_names_of_keywords_tell_functions_apart():
    def centered(x, rows=0, columns=0):
        return x - x.mean(0 if rows else 1, keepdim=True)

    for _ in range(4):
        batch_jacobian(functools.partial(centered, columns=1))(randn(4, 3))
    with pytest.raises(BatchMixingError):
        batch_jacobian(functools.partial(centered, rows=1))(randn(4, 3))


def test_names_in_a_dict_tell_functions_apart():
    def mean_of(words):
        return lambda x: x - x.mean(0 if "rows" in words else 1, keepdim=True)

    for _ in range(4):
        batch_jacobian(mean_of({"columns": True}))(randn(4, 3))
    with pytest.raises(BatchMixingError):
        batch_jacobian(mean_of({"rows": True}))(randn(4, 3))
