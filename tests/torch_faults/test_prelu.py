"""Torch's batching rule of prelu, which goes wrong for certain sizes alone."""

import torch
from torch.nn import functional as F

from funcjac import batch_jacobian
from tests.tensors import randn

f64 = torch.float64


def test_prelu_of_as_many_rows_as_numbers():
    x, slope = randn(3, 3), torch.full((1,), 0.3, dtype=f64)
    prelu = lambda row: F.prelu(row.unsqueeze(0), slope).squeeze(0)
    right = torch.diag_embed(torch.where(x > 0, 1.0, 0.3).to(f64))
    wrong = torch.vmap(torch.func.jacrev(prelu))(x)
    assert not torch.allclose(wrong, right), f"torch {torch.__version__}: prelu is right by now"
    for mode in ("rev", "fwd"):
        jacobian = batch_jacobian(
            lambda x: F.prelu(x, slope), engine="vmap", mode=mode, check=False
        )
        torch.testing.assert_close(jacobian(x), right)
