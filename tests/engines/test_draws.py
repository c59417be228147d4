"""Seeds and draws of ``func`` itself."""

import random

import pytest
import torch

from funcjac import batch_jacobian
from tests.tensors import equal, f64, quiet, randn

B = 4


@pytest.mark.quick
def test_seeds_and_draws_inside_of_func_are_those_of_one_run():
    def func(x):
        torch.manual_seed(3)
        return x * torch.rand(x.shape[1], dtype=f64) + random.random()

    x, state = randn(B, 3), random.getstate()
    torch.manual_seed(3)
    right = torch.diag_embed(torch.rand(3, dtype=f64).expand(B, 3))
    for _ in range(3):
        equal(batch_jacobian(func)(x), right)
    random.setstate(state)


@quiet
def test_values_may_hold_draws_of_ones_own():
    generator = torch.Generator()
    func = lambda x: 2 * x + torch.randn(x.shape, generator=generator, dtype=x.dtype)
    jacobian = batch_jacobian(func, return_value=True, randomness="different")
    equal(jacobian(randn(B, 3))[0], 2 * torch.eye(3).double().expand(B, 3, 3))
