"""``randomness``: one draw per sample, or one for all, and always the same for all columns."""

import itertools

import pytest
import torch
from torch import nn

from funcjac import batch_jacobian
from tests.tensors import equal, randn

B = 6
ROUTES = [*itertools.product(("vmap", "sum", "loop"), ("fwd", "rev")), ("auto", "auto")]
every_route = pytest.mark.parametrize(("engine", "mode"), ROUTES)
# One draw for all rows needs rows that are run one by one, or vmap.
same_route = pytest.mark.parametrize(
    ("engine", "mode"), [route for route in ROUTES if route[0] != "sum"]
)
randomness_route = pytest.mark.parametrize(
    ("engine", "mode", "randomness"),
    [
        (*r, kind)
        for r in ROUTES
        for kind in ("same", "different")
        if r[0] != "sum" or kind != "same"
    ],
)
every_draw = pytest.mark.parametrize("draw", ["rand_like", "randn", "bernoulli", "dropout"])
N = 40  # rows are this wide, so that two draws are never equal by chance


def noise(draw, x):
    return {
        "rand_like": lambda: torch.rand_like(x),
        "randn": lambda: torch.randn(x.shape, dtype=x.dtype),
        "bernoulli": lambda: torch.bernoulli(torch.full_like(x, 0.5)),
        "dropout": lambda: nn.functional.dropout(torch.ones_like(x)),
    }[draw]()


def linear(draw):
    """``x * noise + sum(x * noise)``: every column shows the noise of its row."""

    def func(x):
        scaled = x * noise(draw, x)
        return torch.stack([scaled, scaled.sum(1, keepdim=True).expand_as(scaled)], 1)

    return func


def masks(jac):
    """The noise of every row, read off its Jacobian; and that all of it tells the same."""
    found = jac[:, 0].diagonal(dim1=1, dim2=2)
    equal(jac[:, 0], torch.diag_embed(found))
    equal(jac[:, 1], found.unsqueeze(1).expand(-1, N, -1).contiguous())
    return found


@every_route
@every_draw
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_different_draws_in_every_row(chunk_size, draw, engine, mode):
    words = {"engine": engine, "mode": mode, "chunk_size": chunk_size}
    jacobian = batch_jacobian(linear(draw), randomness="different", **words)
    x = randn(B, N)
    for _ in range(3):
        found = masks(jacobian(x))
        for a, b in itertools.combinations(range(B), 2):
            assert not torch.equal(found[a], found[b])


@pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
@same_route
@every_draw
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_the_same_draw_in_every_row(chunk_size, draw, engine, mode):
    words = {"engine": engine, "mode": mode, "chunk_size": chunk_size}
    jacobian = batch_jacobian(linear(draw), randomness="same", **words)
    x = randn(B, N)
    if draw == "bernoulli" and engine == "vmap":
        with pytest.raises(RuntimeError, match=r"batch_jacobian: .*same randomness"):
            jacobian(x)
        return
    for _ in range(3):
        found = masks(jacobian(x))
        equal(found, found[:1].expand(B, -1).contiguous())


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_sum_has_no_draw_for_all_rows(mode):
    jacobian = batch_jacobian(linear("randn"), engine="sum", mode=mode, randomness="same")
    with pytest.raises(ValueError, match=r"batch_jacobian: .*cannot give all rows the same draw"):
        jacobian(randn(B, N))


@pytest.mark.quick
@pytest.mark.parametrize(("engine", "mode"), [r for r in ROUTES if r[0] in ("vmap", "loop")])
@every_draw
def test_error_refuses_where_rows_run_one_by_one(draw, engine, mode):
    jacobian = batch_jacobian(linear(draw), engine=engine, mode=mode)
    remedy = r'^batch_jacobian: expected .* random .*randomness="different"'
    with pytest.raises(RuntimeError, match=remedy):
        jacobian(randn(B, N))


@pytest.mark.quick
@pytest.mark.parametrize(("engine", "mode"), [r for r in ROUTES if r[0] in ("sum", "auto")])
@every_draw
def test_one_run_draws_what_a_plain_call_draws(draw, engine, mode):
    """Without leave: there is one run, and each row has a draw of its own."""
    jacobian, x = batch_jacobian(linear(draw), engine=engine, mode=mode), randn(B, N)
    for _ in range(4):
        state = torch.get_rng_state()
        drawn = noise(draw, x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        equal(masks(jacobian(x)), drawn)
        assert torch.equal(torch.get_rng_state(), after)


@every_route
def test_a_new_draw_on_every_call(engine, mode):
    words = {"engine": engine, "mode": mode, "randomness": "different"}
    jacobian = batch_jacobian(linear("rand_like"), **words)
    x = randn(B, N)
    found = [jacobian(x) for _ in range(4)]
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)


@randomness_route
def test_a_seed_settles_the_result(engine, mode, randomness):
    words = {"engine": engine, "mode": mode, "randomness": randomness}
    x = randn(B, N)
    jacobian = batch_jacobian(linear("rand_like"), **words)
    for _ in range(5):
        jacobian(x)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(jacobian(x))
    equal(*found)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_sum_draws_as_func_does(mode):
    x = randn(B, N)
    jacobian = batch_jacobian(linear("dropout"), engine="sum", mode=mode, randomness="different")
    for _ in range(3):
        torch.manual_seed(3)
        expected = noise("dropout", x)
        torch.manual_seed(3)
        equal(masks(jacobian(x)), expected)


@randomness_route
def test_dropout_in_a_network(engine, mode, randomness):
    """Each row is the Jacobian for some mask: hidden units are in or out for all columns."""
    net = nn.Sequential(nn.Linear(3, N), nn.Dropout(0.5), nn.Linear(N, N, bias=False)).double()
    net.requires_grad_(False)
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(N))
    x = randn(B, 3)
    words = {"engine": engine, "mode": mode, "randomness": randomness}
    jac = batch_jacobian(net, **words)(x)
    ratio = jac / net[0].weight  # 0 or 2, the same in a whole row of weights
    equal(ratio, (ratio[..., :1] > 1).double().expand(-1, -1, 3).contiguous() * 2)
    rows_agree = torch.equal(ratio, ratio[:1].expand_as(ratio))
    assert rows_agree == (randomness == "same")


@same_route
def test_value_and_jacobian_share_a_draw(engine, mode):
    words = {"engine": engine, "mode": mode, "randomness": "same", "return_value": True}
    jacobian = batch_jacobian(linear("rand_like"), **words)
    x = randn(B, N)
    for _ in range(3):
        jac, value = jacobian(x)
        equal(value, (jac * x[:, None, None]).sum(3))


@randomness_route
def test_backward_through_a_random_jacobian(engine, mode, randomness):
    """The second derivative belongs to the draw of the first."""
    func = lambda x: (x**2).sum(1, keepdim=True) * torch.rand(x.shape[0], 2, dtype=x.dtype)
    x = randn(B, 3).requires_grad_()
    words = {"engine": engine, "mode": mode, "randomness": randomness}
    jac = batch_jacobian(func, **words)(x)
    (grad,) = torch.autograd.grad(jac.sum(), x)
    draws = (jac / (2 * x.unsqueeze(1)))[:, :, 0]
    equal(grad, (2 * draws.sum(1, keepdim=True)).expand(-1, 3).contiguous().detach())


@every_route
def test_nested_levels_share_a_draw(engine, mode):
    words = {"engine": engine, "mode": mode, "randomness": "different"}
    func = lambda x: (x**2).sum(1, keepdim=True) * torch.rand(x.shape[0], 2, dtype=x.dtype)
    hessian = batch_jacobian(batch_jacobian(func, **words), **words)(randn(B, 3))
    draws = hessian[:, :, 0, 0]
    equal(hessian, draws[..., None, None] * torch.eye(3).double())
    assert len(set(draws.flatten().tolist())) == 2 * B
