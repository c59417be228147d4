"""``log_abs_det_jacobian`` of torch.distributions and of zuko, by ``batch_jacobian``."""

import inspect

import pytest
import torch
from torch import distributions as D
from torch.distributions import transforms as T

from funcjac import batch_jacobian
from tests.tensors import equal, randn

B = 5
SCALE = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)


def positive(*shape):
    return randn(*shape).exp()


def below_diagonal(matrices):
    """The free entries of a lower triangular matrix with given diagonal."""
    rows, columns = torch.tril_indices(*matrices.shape[-2:], -1)
    return matrices[..., rows, columns]


# (transform, shape of a sample, how the sample is drawn, which outputs are coordinates)
TRANSFORMS = {
    "affine": (T.AffineTransform(0.3, SCALE), (3,), randn),
    "affine of events": (T.AffineTransform(0.3, SCALE, event_dim=1), (3,), randn),
    "exp": (T.ExpTransform(), (3,), randn),
    "log": (T.ExpTransform().inv, (3,), positive),
    "power": (T.PowerTransform(torch.tensor(1.7, dtype=torch.float64)), (3,), positive),
    "sigmoid": (T.SigmoidTransform(), (3,), randn),
    "logit": (T.SigmoidTransform().inv, (3,), lambda *shape: randn(*shape).sigmoid()),
    "softplus": (T.SoftplusTransform(), (3,), randn),
    "tanh": (T.TanhTransform(), (3,), randn),
    "identity": (T.identity_transform, (3,), randn),
    "cumulative distribution": (
        T.CumulativeDistributionTransform(D.Normal(torch.zeros(3).double(), SCALE.abs())),
        (3,),
        randn,
    ),
    "composed": (T.ComposeTransform([T.TanhTransform(), T.AffineTransform(2, SCALE)]), (3,), randn),
    "independent": (T.IndependentTransform(T.ExpTransform(), 1), (3,), randn),
    "reshape": (T.ReshapeTransform((2, 3), (6,)), (2, 3), randn),
    "concatenated": (
        T.CatTransform([T.ExpTransform(), T.TanhTransform()], -1, lengths=[1, 2]),
        (3,),
        randn,
    ),
    "stacked": (T.StackTransform([T.ExpTransform(), T.TanhTransform()], -1), (2,), randn),
    "Cholesky factor of a correlation": (T.CorrCholeskyTransform(), (6,), randn, below_diagonal),
    "stick-breaking": (T.StickBreakingTransform(), (3,), randn, lambda x: x[..., :-1]),
}


def log_determinants(jac):
    """``(B, *out, *in)`` with as many outputs as inputs."""
    size = round(jac[0].numel() ** 0.5)
    return torch.linalg.slogdet(jac.reshape(len(jac), size, size)).logabsdet


@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_determinants_of_torch_distributions(name):
    transform, shape, draw, *rest = TRANSFORMS[name]
    coordinates = rest[0] if rest else lambda y: y
    x = draw(B, *shape)
    jac = batch_jacobian(lambda x: coordinates(transform(x)))(x)
    equal(
        log_determinants(jac),
        transform.log_abs_det_jacobian(x, transform(x)).reshape(B, -1).sum(1),
    )


def test_every_bijective_transform_is_in_the_table():
    kinds = [getattr(T, name) for name in T.__all__]
    kinds = {kind for kind in kinds if inspect.isclass(kind) and kind.bijective is not False}
    assert len(kinds) == 14
    assert kinds - {type(transform) for transform, *_ in TRANSFORMS.values()} == set()


def test_density_of_a_transformed_distribution():
    """By the inverse map and its log-determinant, and its score."""
    base = D.Independent(D.Normal(torch.zeros(3).double(), 1.0), 1)
    flow = T.ComposeTransform([T.AffineTransform(0.1, SCALE), T.TanhTransform()])
    dist = D.TransformedDistribution(base, [flow])
    y = flow(randn(B, 3))
    jac, x = batch_jacobian(flow.inv, return_value=True)(y)
    equal(base.log_prob(x) + log_determinants(jac), dist.log_prob(y))

    lognormal = D.Independent(D.LogNormal(torch.zeros(3).double(), SCALE.abs()), 1)
    y = positive(B, 3)
    score = batch_jacobian(lognormal.log_prob)(y)
    equal(score, -(1 + y.log() / SCALE.square()) / y)


# --- zuko ---------------------------------------------------------------------------------

# Flows of three coordinates, given two others; the arguments that differ from the usual ones.
FLOWS = {
    "MAF": {},
    "NICE": {},
    "RealNVP": {},
    "NSF": {},
    "NCSF": {},
    "SOSPF": {},
    "BPF": {},
    "GF": {},
    "NAF": {},
    "UNAF": {},
    "CNF": {"exact": True, "atol": 1e-11, "rtol": 1e-11},
}


def make_flow(name):
    zuko = pytest.importorskip("zuko", reason="zuko is not installed: make clients")
    words = {"hidden_features": (16,)} | FLOWS[name]
    words |= {} if name == "CNF" else {"transforms": 2}
    return getattr(zuko.flows, name)(3, 2, **words).double()


@pytest.mark.parametrize("name", FLOWS)
def test_log_determinants_of_zuko(name):
    flow = make_flow(name)
    x, context = 2 * torch.rand(B, 3).double() - 1, randn(B, 2)
    jac, z = batch_jacobian(lambda x, c: flow(c).transform(x), return_value=True)(x, context)
    assert jac.shape == (B, 3, 3)
    expected = flow(context).transform.log_abs_det_jacobian(x, z)
    tolerance = 1e-5 if name == "CNF" else 1e-10  # CNF integrates both, each in steps of its own
    equal(log_determinants(jac), expected, tolerance)
    equal(
        flow.base(context).log_prob(z) + log_determinants(jac), flow(context).log_prob(x), tolerance
    )


@pytest.mark.parametrize("name", ["MAF", "NSF", "NAF"])
def test_a_flow_of_zuko_trains_on_log_determinants(name):
    """Gradients of its parameters are those of its own log-determinant."""
    flow = make_flow(name)
    x, context = 2 * torch.rand(B, 3).double() - 1, randn(B, 2)
    jac = batch_jacobian(lambda x, c: flow(c).transform(x))(x, context)
    transform = flow(context).transform
    own = transform.log_abs_det_jacobian(x, transform(x))
    parameters = list(flow.transform.parameters())
    words = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(log_determinants(jac).sum(), parameters, **words)
    expected = torch.autograd.grad(own.sum(), parameters, **words)
    assert sum(grad.abs().sum() for grad in expected) > 0
    equal(grads, expected, 1e-8)


@pytest.mark.parametrize("name", ["MAF", "NSF", "GF"])
def test_the_inverse_of_a_flow_of_zuko_has_the_inverse_jacobian(name):
    flow = make_flow(name)
    x, context = 2 * torch.rand(B, 3).double() - 1, randn(B, 2)
    jac, z = batch_jacobian(lambda x, c: flow(c).transform(x), return_value=True)(x, context)
    inverse = batch_jacobian(lambda z, c: flow(c).transform.inv(z))(z.detach(), context)
    tolerance = 1e-5 if name == "GF" else 1e-10  # GF inverts by bisection
    equal(inverse @ jac, torch.eye(3).double().expand(B, 3, 3), tolerance * 100)
