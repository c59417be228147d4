"""Batching rules of compiled code; matrices of each row are multiplied without copies."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

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


@pytest.mark.parametrize(("mode", "sizes"), [("fwd", (3, 64, 5)), ("rev", (5, 64, 3))])
def test_what_is_the_same_in_all_rows_is_multiplied_once(mode, sizes):
    torch.manual_seed(0)
    layers = torch.nn.Linear(*sizes[:2]), torch.nn.Tanh(), torch.nn.Linear(*sizes[1:])
    net = torch.nn.Sequential(*layers).double()
    jacobian, x, heights = batch_jacobian(net, mode=mode), randn(128, sizes[0]), []

    def backend(graph, inputs):
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        heights.extend([node.args[0].meta["val"].shape[0] for node in products])
        return make_boxed_func(graph)

    with torch.no_grad():
        compiled = torch.compile(jacobian, backend=aot_autograd(fw_compiler=backend))
        equal(compiled(x), jacobian(x))
    # Those of the first layer of a pass, if any, and of the other one.
    assert [n for n in heights if n % 128] == [3] * (mode == "fwd")
    assert [n for n in heights if n % 128 == 0] == [3 * 128]
