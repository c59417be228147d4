"""GPyTorch: derivatives of a posterior by the points at which it is asked."""

import pytest
import torch

from funcjac import BatchMixingError, batch_hessian, batch_jacobian, batch_laplacian
from tests.tensors import equal

gpytorch = pytest.importorskip("gpytorch", reason="gpytorch is not installed: make clients")

LENGTHS = torch.tensor([0.4, 0.7]).double()
NOISE = 0.01


class Model(gpytorch.models.ExactGP):
    def __init__(self, points, values, likelihood):
        super().__init__(points, values, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        kernel = gpytorch.kernels.RBFKernel(ard_num_dims=2)
        self.covar_module = gpytorch.kernels.ScaleKernel(kernel)

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.fixture
def posterior():
    points = torch.rand(20, 2).double()
    values = (4 * points[:, 0]).sin() + points[:, 1]
    model = Model(points, values, gpytorch.likelihoods.GaussianLikelihood()).double()
    model.likelihood.noise = NOISE
    model.covar_module.base_kernel.lengthscale = LENGTHS
    return model.eval()


def closed_form(model, x):
    """Kernel rows ``(B, n)``, their gradients ``(B, n, 2)``, and the inverse of the Gram matrix."""
    (points,) = model.train_inputs
    scale = model.covar_module.outputscale

    def kernel(a, b):
        return scale * (-(((a[:, None] - b) / LENGTHS) ** 2).sum(-1) / 2).exp()

    rows = kernel(x, points)
    slopes = -(x[:, None] - points) / LENGTHS**2 * rows[..., None]
    return rows, slopes, torch.linalg.inv(kernel(points, points) + NOISE * torch.eye(20))


def test_gradient_of_a_posterior_mean(posterior):
    x = torch.rand(6, 2).double()
    grad, mean = batch_jacobian(lambda x: posterior(x).mean, return_value=True)(x)
    assert grad.shape == (6, 2)
    rows, slopes, inverse = closed_form(posterior, x)
    constant = posterior.mean_module.constant
    weights = inverse @ (posterior.train_targets - constant)
    equal(mean, constant + rows @ weights, 1e-8)
    equal(grad, torch.einsum("bnd,n->bd", slopes, weights), 1e-8)


def test_gradient_of_a_posterior_variance(posterior):
    x = torch.rand(6, 2).double()
    grad = batch_jacobian(lambda x: posterior(x).variance)(x)
    rows, slopes, inverse = closed_form(posterior, x)
    equal(grad, -2 * torch.einsum("bnd,nm,bm->bd", slopes, inverse, rows), 1e-7)


def test_second_derivatives_of_a_posterior_mean(posterior):
    x = torch.rand(6, 2).double()
    mean = lambda x: posterior(x).mean
    hess = batch_hessian(mean)(x)
    assert hess.shape == (6, 2, 2)
    rows, slopes, inverse = closed_form(posterior, x)
    weights = inverse @ (posterior.train_targets - posterior.mean_module.constant)
    curves = torch.einsum("bnd,bne,bn->bnde", slopes, slopes, 1 / rows)
    curves = curves - torch.diag(1 / LENGTHS**2) * rows[..., None, None]
    equal(hess, torch.einsum("bnde,n->bde", curves, weights), 1e-7)
    equal(batch_laplacian(mean)(x), hess.diagonal(dim1=1, dim2=2).sum(1), 1e-8)


def test_a_joint_covariance_is_not_of_one_sample(posterior):
    with pytest.raises(BatchMixingError):
        batch_jacobian(lambda x: posterior(x).covariance_matrix)(torch.rand(6, 2).double())
