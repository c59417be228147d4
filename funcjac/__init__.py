"""Batched Jacobians for PyTorch: the Jacobian of each sample, right, fast, and one line."""

from funcjac._check import check_batched as check_batched
from funcjac._check import check_derivative as check_derivative
from funcjac._explain import Explanation as Explanation
from funcjac._explain import explain as explain
from funcjac._jacobian import batch_jacobian as batch_jacobian
from funcjac.errors import BatchMixingError as BatchMixingError
from funcjac.errors import EngineFallbackWarning as EngineFallbackWarning
from funcjac.errors import VerificationError as VerificationError

__version__ = "0.1.0"
