"""Batched Jacobians for PyTorch: the Jacobian of each sample, right, fast, and one line."""

from funcjac._diagnostics.check_batched import check_batched
from funcjac._diagnostics.check_derivative import check_derivative
from funcjac._diagnostics.explain import Explanation, explain
from funcjac._operators.divergence import batch_divergence
from funcjac._operators.hessian import batch_hessian
from funcjac._operators.hessian_diagonal import batch_hessian_diagonal
from funcjac._operators.jacobian import batch_jacobian, batch_jacobian_of
from funcjac._operators.laplacian import batch_laplacian
from funcjac._operators.partials import batch_partials
from funcjac.errors import BatchMixingError, EngineFallbackWarning, VerificationError

__version__ = "0.1.0"

__all__ = [
    "BatchMixingError",
    "EngineFallbackWarning",
    "Explanation",
    "VerificationError",
    "batch_divergence",
    "batch_hessian",
    "batch_hessian_diagonal",
    "batch_jacobian",
    "batch_jacobian_of",
    "batch_laplacian",
    "batch_partials",
    "check_batched",
    "check_derivative",
    "explain",
]
