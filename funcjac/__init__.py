"""Batched Jacobians for PyTorch: the Jacobian of each sample, right, fast, and one line."""

from funcjac._check import check_batched as check_batched
from funcjac._check import check_derivative as check_derivative
from funcjac._explain import Explanation as Explanation
from funcjac._explain import explain as explain
from funcjac._jacobian import batch_jacobian as batch_jacobian
from funcjac._partials import batch_partials as batch_partials
from funcjac._second_order import batch_hessian as batch_hessian
from funcjac._second_order import batch_hessian_diagonal as batch_hessian_diagonal
from funcjac._traces import batch_divergence as batch_divergence
from funcjac._traces import batch_laplacian as batch_laplacian
from funcjac.errors import BatchMixingError as BatchMixingError
from funcjac.errors import EngineFallbackWarning as EngineFallbackWarning
from funcjac.errors import VerificationError as VerificationError

__version__ = "0.1.0"
