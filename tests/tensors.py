"""Tensors that tests draw, how they compare them, and marks that many of them carry."""

import pytest
import torch

f64 = torch.float64
# For functions that make an engine give up, where the test is not about that.
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def randn(*shape: int) -> torch.Tensor:
    """Of the seed that every test starts with."""
    return torch.randn(*shape, dtype=f64)


def fixed_randn(*shape: int) -> torch.Tensor:
    """The same numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=f64)


def set_seed(number: int) -> None:
    """As ``torch.manual_seed``, which also queues a call, with its stack, for each other device."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(number)


def equal(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 100)
