"""Batching rules of compiled code; matrices of each row are multiplied without copies."""

import pytest
import torch

from funcjac import batch_jacobian, batch_laplacian
from tests.tensors import equal, randn


class Written(torch.autograd.Function):
    """``x @ (2 w)``, whose backward pass writes into what it has expanded."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ (2 * w)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        shape = (*x.shape[:2], *w.shape[-2:])
        doubled = w.mT.expand(shape).clone()
        doubled.mul_(2)
        left = grad.expand(*x.shape[:2], *grad.shape[-2:]).clone()
        product = torch.bmm(left.view(-1, *left.shape[-2:]), doubled.view(-1, *shape[-2:]))
        return product.view(x.shape), None


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")
def test_matrices_that_are_written_into():
    x, w = randn(4, 3).abs(), randn(2, 3, 3)

    def func(x):
        pairs = torch.stack([x, x**2], 1)[:, :, None] * torch.ones(1, 1, 2, 1, dtype=x.dtype)
        return Written.apply(pairs, w).sum((1, 2, 3))

    jacobian = batch_jacobian(func)
    compiled = torch.compile(jacobian, backend="aot_eager", fullgraph=True)
    equal(compiled(x), jacobian(x))


def test_rules_take_arguments_that_are_left_out():
    """``cat`` of each entry of a batch, along the first dimension."""
    func = lambda x: torch.stack([x.erf().sum(-1), torch.nn.functional.logsigmoid(x).sum(-1)], -1)
    laplacian, x = batch_laplacian(func, mode="taylor"), randn(4, 3)
    equal(torch.compile(laplacian, backend="aot_eager", fullgraph=True)(x), laplacian(x))
