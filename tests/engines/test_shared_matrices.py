"""Batching rules of compiled code; matrices of each row are multiplied without copies."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

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


@pytest.mark.skipif(torch.__version__ < "2.13", reason="PyTorch takes no symbolic sizes there")
@pytest.mark.parametrize(
    ("layer", "row"),
    [
        (nn.Conv1d(2, 3, 3, padding=1, dilation=2), (2, 7)),
        (nn.Conv2d(2, 4, 3, stride=2), (2, 7, 6)),
        (nn.ConvTranspose2d(2, 3, 3, 2, 1, 1), (2, 3, 3)),
    ],
    ids=["dilated", "strided", "transposed"],
)
def test_convolutions_are_compiled_once_for_all_batches(layer, row):
    layer, counter = layer.double(), CompileCounterWithBackend("aot_eager")
    jacobian = batch_jacobian(lambda x: layer(x.sin()).tanh().flatten(1)[:, :3])
    compiled = torch.compile(jacobian, backend=counter, fullgraph=True, dynamic=True)
    for batch in (4, 5, 7):
        x = randn(batch, *row)
        equal(compiled(x), jacobian(x))
    assert counter.frame_count == 1


def test_gradients_of_convolutions_and_of_their_weights():
    """Of a layer that is trained through its Jacobian, and through that by shared weights."""
    layer, x = nn.Conv2d(2, 4, 3, groups=2).double(), randn(3, 2, 5, 4)
    picked = lambda y: y.sin().flatten(1)[:, ::5]
    jacobian = batch_jacobian(lambda x: picked(layer(x)))
    by_weight = batch_jacobian(lambda w, x: picked(layer(x, w)), in_dims=(None, 0))
    layer.forward = lambda x, w=layer.weight: nn.functional.conv2d(x, w, layer.bias, groups=2)

    def loss(x):
        return (jacobian(x) ** 2).sum() + (by_weight(layer.weight, x) ** 2).sum()

    results = []
    for run in (torch.compile(loss, backend="aot_eager", fullgraph=True), loss):
        layer.zero_grad()
        run(x).backward()
        results.append([p.grad for p in layer.parameters()])
    for compiled, expected in zip(*results):
        equal(compiled, expected)


def test_kernels_that_are_computed_from_the_input():
    """In groups, one for each row: gradients by kernels are needed beside those by images."""

    def func(x):
        images, kernels = x.sin().view(1, -1, 4), x.cos()[:, :, :3]
        return nn.functional.conv1d(images, kernels, groups=len(x)).view(len(x), -1)

    jacobian, x = batch_jacobian(func), randn(5, 2, 4)
    equal(torch.compile(jacobian, backend="aot_eager", fullgraph=True)(x), jacobian(x))
