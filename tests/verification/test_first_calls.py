"""What a first call takes beside a settled one: bytes held at once, and operations."""

import itertools

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from funcjac import batch_jacobian
from tests.fresh import fresh


def taken_by(run) -> tuple[int, int]:
    """Most bytes that a call holds at once, and how many operations run."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    peak = max(itertools.accumulate(change for _, change in sorted(changes)), default=0)
    return peak, sum(event.name().startswith("aten::") for event in events)


@pytest.mark.parametrize(
    ("trains", "most_bytes", "most_operations"), [(False, 1.3, 2.5), (True, 1.5, 6.5)]
)
def test_a_first_call_takes_little_more_than_a_settled_one(trains, most_bytes, most_operations):
    """Verification of the smallest network; of one that trains, derivatives of the result too."""
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10)).requires_grad_(trains)
    func, x = lambda x: net(x), torch.randn(3, 5)
    batch_jacobian(fresh(func))(x)  # unit vectors are kept for all functions
    jacobian = batch_jacobian(fresh(func))
    first_bytes, first_operations = taken_by(lambda: jacobian(x))
    for _ in range(9):
        jacobian(x)
    settled_bytes, settled_operations = taken_by(lambda: jacobian(x))
    assert first_bytes <= most_bytes * settled_bytes
    assert first_operations <= most_operations * settled_operations
