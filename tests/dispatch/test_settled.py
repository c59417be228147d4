"""How much of the package a settled call passes: what somebody must read to follow it."""

import pathlib
import sys

import pytest
import torch
from torch import nn

import funcjac

ROOT = pathlib.Path(funcjac.__file__).parent


def passed(transform, x):
    """Names of files and functions of the package that a settled call enters, in order."""
    for _ in range(20):
        transform(x)
    entered = []

    def enter(frame, event, _):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            entered.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_name))

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        transform(x)
    finally:
        sys.setprofile(before)
    return entered


@pytest.mark.quick
def test_jacobian():
    net = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 10)).requires_grad_(False)
    entered = passed(funcjac.batch_jacobian(net), torch.randn(3, 5))
    assert ("_engines/sum.py", "jacobian") in entered
    assert len(entered) <= 40, entered
    assert len({file for file, _ in entered}) <= 8, entered


@pytest.mark.quick
def test_laplacian_of_one_hidden_layer():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
    entered = passed(funcjac.batch_laplacian(net), torch.randn(3, 5))
    assert ("_operators/laplacian.py", "directions") in entered
    assert len({file for file, _ in entered}) <= 12, entered
