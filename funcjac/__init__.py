"""Batched Jacobians for PyTorch: the Jacobian of each sample, right, fast, and one line."""

from funcjac._diagnostics.check_batched import check_batched as check_batched
from funcjac._diagnostics.check_derivative import check_derivative as check_derivative
from funcjac._diagnostics.explain import Explanation as Explanation
from funcjac._diagnostics.explain import explain as explain
from funcjac._operators.divergence import batch_divergence as batch_divergence
from funcjac._operators.hessian import batch_hessian as batch_hessian
from funcjac._operators.hessian_diagonal import batch_hessian_diagonal as batch_hessian_diagonal
from funcjac._operators.jacobian import batch_jacobian as batch_jacobian
from funcjac._operators.jacobian import batch_jacobian_of as batch_jacobian_of
from funcjac._operators.laplacian import batch_laplacian as batch_laplacian
from funcjac._operators.partials import batch_partials as batch_partials
from funcjac.errors import BatchMixingError as BatchMixingError
from funcjac.errors import EngineFallbackWarning as EngineFallbackWarning
from funcjac.errors import VerificationError as VerificationError

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
