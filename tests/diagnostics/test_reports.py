"""Reports of ``explain`` and ``check_derivative`` say the same each time, and what is so."""

import pytest
import torch
from torch import nn

from funcjac import (
    batch_divergence,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    check_derivative,
    explain,
)
from tests.fresh import Counted
from tests.tensors import randn

quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def test_a_second_report_compares_every_engine_again():
    """Rows of an LSTM that takes the batch second mix: the sum trick is wrong each time."""
    lstm, x = nn.LSTM(4, 6), torch.randn(3, 5, 4)
    for _ in range(3):
        report = check_derivative(batch_jacobian(lambda x: lstm(x)[0]), x)
        by_way = {(c.engine, c.mode): c for c in report.comparisons}
        assert by_way["sum", "rev"].difference > report.tolerance
        assert "BatchMixingError" in by_way["vmap", "rev"].error
        assert not report.ok


def test_the_direction_of_differences_is_not_the_users_data():
    """The derivative of ``x / |x|`` along ``x`` is zero, and rounding is all that it shows."""
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    assert check_derivative(batch_jacobian(lambda x: x / x.norm(dim=1, keepdim=True)), x).ok


class RightAlongItsInput(torch.autograd.Function):
    """``|x|^2 / 2`` with a gradient that is wrong in every direction but ``x``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum(1) / 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        wrong = torch.zeros_like(x)
        wrong[:, 0] = x.square().sum(1) / x[:, 0]
        return grad.unsqueeze(1) * wrong


@quiet
def test_a_gradient_that_is_right_along_the_data_alone_is_caught():
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    assert not check_derivative(batch_jacobian(RightAlongItsInput.apply), x).ok


def test_explain_counts_the_passes_of_samples_and_partials():
    x = randn(3, 20)
    assert explain(batch_divergence(torch.sin), x).passes == 20
    assert explain(batch_divergence(torch.sin, samples=4), x).passes == 4
    assert explain(batch_laplacian(torch.sin, samples=4), x).passes == 4
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    assert explain(batch_partials(net, [(1,), (0,), (0, 0)]), randn(3, 2)).passes == 2


@pytest.mark.parametrize("engine", ["sum", "loop"])
def test_explain_counts_runs_of_rows(engine):
    func = Counted(torch.sin)
    assert explain(batch_jacobian(func, engine=engine), randn(3, 4)).runs == func.count


@quiet
def test_explain_says_each_time_why_an_engine_was_left():
    class Old(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    jacobian = batch_jacobian(lambda w, x: Old.apply(w * x), in_dims=(None, 0))
    for _ in range(2):
        report = explain(jacobian, randn(4), randn(3, 4))
        assert report.engine == "loop"
        assert any(reason.startswith("vmap: ") for reason in report.reasons)
