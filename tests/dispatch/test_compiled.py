"""Transforms inside ``torch.compile(fullgraph=True)`` and ``make_fx``: values and gradients."""

import copy
import functools
import gc
import re
import shutil
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import funcjac
from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_jacobian_of,
    batch_laplacian,
    batch_partials,
)
from tests.tensors import set_seed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
B = 4
TRANSFORMS = {
    "jacobian": batch_jacobian,
    "divergence": lambda func: batch_divergence(lambda x: func(x)[:, :1].exp() * x.sin()),
    "hessian": batch_hessian,
    "diagonal": batch_hessian_diagonal,
    "laplacian": batch_laplacian,
    "partials": lambda func: batch_partials(func, [(), (0,), (1, 1), (0, 0, 1)]),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def randn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def network():
    set_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)).double()


def compiled(function, backend="aot_eager", **words):
    return torch.compile(function, fullgraph=True, backend=backend, **words)


def gradients(tensors, leaves):
    loss = sum(t.square().sum() for t in tensors if t.requires_grad)
    return torch.autograd.grad(loss, leaves, allow_unused=True)


def assert_as_eager(function, x, leaves, run=None):
    """Values, what requires grad, and gradients by ``x`` and ``leaves`` are those of eager."""
    x = x.clone().requires_grad_()
    run = compiled(function) if run is None else run
    got, expected = (
        [leaf for leaf in tree_leaves(f(x)) if isinstance(leaf, Tensor)] for f in (run, function)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert [t.requires_grad for t in got] == [t.requires_grad for t in expected]
    pairs = zip(gradients(got, [x, *leaves]), gradients(expected, [x, *leaves]), strict=True)
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None), "a gradient was lost"
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# --- every transform ---------------------------------------------------------------------


@every_transform
def test_made_once_with_everything_dynamic(name):
    """Dynamo takes numbers of the transform for sizes then; twenty batches compile once."""
    net = network()
    transform = TRANSFORMS[name](net)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(transform, counter, dynamic=True)
    assert_as_eager(transform, randn(B, 3), list(net.parameters()), run)
    assert_as_eager(transform, randn(9, 3), list(net.parameters()), run)
    for batch in range(2, 22):
        x = randn(batch, 3).requires_grad_()
        sum(t.square().sum() for t in tree_leaves(run(x))).backward()
    assert counter.frame_count == 1


@every_transform
def test_inline(name):
    """Made anew in each of twenty steps, which compile once; and parameters change."""
    net, leaves, scale = network(), [], 1.5
    if name in ("jacobian", "laplacian"):  # Dynamo starts twice then, which takes long
        scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        leaves.append(scale)
    leaves += net.parameters()

    def step(x):
        return TRANSFORMS[name](lambda y: net(y) * scale)(x)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run, optimizer = compiled(step, counter), torch.optim.SGD(net.parameters(), 1e-3)
    assert_as_eager(step, randn(B, 3), leaves, run)
    first = counter.frame_count
    for _ in range(20):
        x = randn(B, 3).requires_grad_()
        sum(t.square().sum() for t in tree_leaves(run(x))).backward()
        optimizer.step()
    assert_as_eager(step, randn(B, 3), leaves, run)
    assert counter.frame_count == first


@every_transform
def test_backend_eager(name):
    net = network()
    transform = TRANSFORMS[name](net)
    run = compiled(transform, "eager")
    assert_as_eager(transform, randn(B, 3), list(net.parameters()), run)


@pytest.mark.parametrize("name", ["jacobian", "laplacian"])
def test_no_grad(name):
    transform, x = TRANSFORMS[name](network()), randn(B, 3).requires_grad_()
    with torch.no_grad():
        found = compiled(transform)(x)
        assert not found.requires_grad
        torch.testing.assert_close(found, transform(x))


def test_frozen():
    """Where nothing requires grad, the result does not."""
    net = network().requires_grad_(False)
    found = compiled(batch_laplacian(net))(randn(B, 3))
    assert not found.requires_grad
    torch.testing.assert_close(found, batch_laplacian(net)(randn(B, 3)))


@pytest.mark.parametrize(
    "words",
    [
        {"mode": "fwd"},
        {"chunk_size": 2},
        {"in_dims": 1},
        {"engine": "vmap"},
        {"engine": "loop"},
        {"out_dims": 1},
    ],
    ids=str,
)
def test_words_of_a_jacobian(words):
    net = network()
    func = lambda x: net(x.T if "in_dims" in words else x).movedim(0, words.get("out_dims", 0))
    x = randn(3, B) if "in_dims" in words else randn(B, 3)
    assert_as_eager(batch_jacobian(func, **words), x, list(net.parameters()))


@pytest.mark.parametrize("mode", ["taylor", "fwd_over_rev", "fwd_over_fwd"])
def test_modes_of_a_hessian(mode):
    net = network()
    assert_as_eager(batch_hessian(net, mode=mode), randn(B, 3), list(net.parameters()))


def test_weights_and_samples():
    net, weight = network(), torch.tensor([1.0, 2, 3], dtype=torch.float64, requires_grad=True)

    assert_as_eager(batch_laplacian(net, weight=weight), randn(B, 3), [weight, *net.parameters()])
    found = compiled(batch_laplacian(net, samples=3, return_error=True))(randn(B, 3))
    assert [t.shape for t in found] == [(B, 5), (B, 5)]


# --- trees, aux, arguments ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["taylor", "rev_over_rev"])
def test_trees_and_several_inputs(mode):
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    func = lambda d, z: {"out": (d["b"] * d["a"] * scale).sin() * z}
    hessian = batch_hessian(func, (0, 1), mode=mode)
    assert_as_eager(lambda x: hessian({"a": x, "b": 2 * x}, x.exp()), randn(B, 2), [scale])


def test_trees_of_batch_dimensions():
    in_dims, out_dims = ({"b": 1, "a": 0}, {"k": None, "m": None}), {"sum": 1, "all": (0, 0)}

    def func(d, powers):
        a, b = d["a"] ** powers["k"], d["b"].T * powers["m"]
        return {"all": (a, b), "sum": (a + b).sin().T}

    def step(x, in_dims=in_dims):  # Dynamo cannot keep structures of dicts without tensors
        transform = batch_jacobian(func, in_dims=in_dims, out_dims=out_dims)
        return transform({"a": x, "b": 2 * x.T}, {"m": 3.0, "k": 2})

    assert_as_eager(step, randn(B, 3), [])
    for wrong in ({"a": 0, "c": 1}, (0, 1), {"a": 0}):
        with pytest.raises(RuntimeError, match="expected in_dims to be an int or a prefix tree"):
            compiled(lambda x, wrong=wrong: step(x, (wrong, None)))(randn(B, 3))


def test_columns():
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    u = lambda x, t: net(torch.cat([x, t], 1))
    step = lambda z: batch_partials(u, [(0,), (1,), (0, 0)], (0, 1))(z[:, :1], z[:, 1:])
    assert_as_eager(step, randn(B, 2), list(net.parameters()))


@pytest.mark.parametrize("name", ["jacobian", "laplacian"])
def test_aux_and_value(name):
    net = network()
    transform = {"jacobian": batch_jacobian, "laplacian": batch_laplacian}[name]
    func = lambda x: (net(x), {"hidden": net[0](x), "number": 3})
    step = transform(func, has_aux=True, return_value=True)
    assert_as_eager(step, randn(B, 3), list(net.parameters()))
    assert tree_leaves(compiled(step)(randn(B, 3)))[-1] == 3


def test_shared_argument():
    net = network()
    call = lambda p, x: torch.func.functional_call(net, p, (x,))
    parameters = dict(net.named_parameters())
    by_sample = batch_jacobian(call, 0, in_dims=(None, 0))
    by_input = batch_laplacian(call, 1, in_dims=(None, 0))
    leaves = list(parameters.values())
    assert_as_eager(lambda x: by_sample(parameters, x), randn(B, 3), leaves)
    assert_as_eager(lambda x: by_input(parameters, x), randn(B, 3), leaves)


def test_write_into_the_input():
    net = network()
    func = lambda x: net(x.mul_(2))
    assert_as_eager(lambda x: batch_laplacian(func)(x.clone()), randn(B, 3), [*net.parameters()])


# --- gradients are never lost ------------------------------------------------------------


class Owner(nn.Module):
    """A module with a transform of its own layers."""

    def __init__(self):
        super().__init__()
        self.net, self.frozen = network(), nn.Linear(3, 5).double().requires_grad_(False)
        self.gain = nn.Parameter(randn(5))
        self.laplacian = batch_laplacian(self.net)

    def forward(self, x):
        return self.laplacian(x) * self.gain

    def whole(self, x):
        return self.net(x) * self.gain + self.frozen(x).sin()


def in_an_attribute():
    owner = Owner()
    return owner, list(owner.parameters())


def in_a_method():
    owner = Owner()
    return lambda x: batch_laplacian(owner.whole)(x), list(owner.parameters())


def in_a_list():
    nets = [network(), network()]
    leaves = [p for net in nets for p in net.parameters()]
    return lambda x: batch_laplacian(lambda y: sum(net(y) for net in nets))(x), leaves


def tied():
    layer = nn.Linear(3, 3).double()
    func = lambda x: layer(layer(x).tanh()).tanh()
    return batch_hessian_diagonal(func), list(layer.parameters())


def in_a_partial():
    net, scale = network(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    func = functools.partial(lambda s, n, x: s * n(x), scale, net)
    return batch_laplacian(func), [scale, *net.parameters()]


def in_a_partial_of_a_jacobian():
    net, scale = network(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    func = functools.partial(lambda s, n, x: s * n(x), scale, net)
    return batch_jacobian(func), [scale, *net.parameters()]


def partly_frozen():
    net = network()
    net[0].requires_grad_(False)
    return batch_laplacian(net), [net[2].weight]


def in_a_default():
    net = network()
    return batch_laplacian(lambda x, n=net: n(x)), list(net.parameters())


def computed_in_the_step():
    weight = randn(5, 3).requires_grad_()
    return lambda x: batch_laplacian(lambda y, w=weight.exp(): (y @ w.T).sin())(x), [weight]


WHERE = (
    in_an_attribute,
    in_a_method,
    in_a_list,
    tied,
    in_a_partial,
    in_a_partial_of_a_jacobian,
    partly_frozen,
    in_a_default,
    computed_in_the_step,
)


@pytest.mark.parametrize("where", WHERE, ids=lambda where: where.__name__)
def test_gradients_reach(where):
    step, leaves = where()
    assert_as_eager(step, randn(B, 3), [leaf for leaf in leaves if leaf.requires_grad])


def test_training_as_eager():
    """Three steps of an optimizer, with a loss of second derivatives."""
    net = network()
    nets = [net, copy.deepcopy(net)]
    losses = []
    for model, wrap in zip(nets, (compiled, lambda f: f)):

        def loss(x, model=model):
            u, u_x, u_xx = batch_partials(model, [(), (0,), (1, 1)])(x)
            return (u_x + u * u_xx).square().mean()

        step, optimizer = wrap(loss), torch.optim.Adam(model.parameters(), 0.01)
        for seed in range(3):
            optimizer.zero_grad()
            value = step(randn(B + 10 * seed, 3)[:B])
            value.backward()
            optimizer.step()
        losses.append(value.detach())
    torch.testing.assert_close(*losses)


# --- nested, existing tensors, torch.func ------------------------------------------------


def test_nested():
    net = network()
    leaves = list(net.parameters())
    assert_as_eager(lambda x: batch_jacobian(batch_jacobian(net))(x), randn(B, 3), leaves)
    inner = lambda x: batch_divergence(lambda y: net(y)[:, :1] * y.sin())(x)
    assert_as_eager(lambda x: batch_laplacian(inner)(x), randn(B, 3), leaves)


def test_nested_closure_over_the_outer_input():
    net = network()
    func = lambda x: batch_laplacian(lambda y: net(y) * x.sum(1, keepdim=True).detach())(x)
    assert_as_eager(lambda x: batch_jacobian(func)(x), randn(B, 3), list(net.parameters()))


def test_nested_records_over_the_outer_input():
    """Each level records by its own inputs, whatever else inner functions touch."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    inner = lambda x: batch_laplacian(lambda y: net(y) * x.sin().sum(1, keepdim=True))(x)
    assert_as_eager(lambda x: batch_laplacian(inner)(x), randn(B, 2), list(net.parameters()))


def test_jacobian_of():
    net = network()

    def step(x):
        u = net(x)
        u_x = batch_jacobian_of(u, x)
        return u_x, batch_jacobian_of(u_x[:, 0], x)

    assert_as_eager(step, randn(B, 3), list(net.parameters()))


@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_inside_func_grad(transform):
    net, x = network().requires_grad_(False), randn(B, 3)
    loss = lambda s: transform(lambda y: (net(y) * s).sin())(x).square().sum()
    step = torch.func.grad(loss)
    scale = torch.tensor(1.5, dtype=torch.float64)
    torch.testing.assert_close(compiled(step)(scale), step(scale))


@pytest.mark.parametrize("mode", ["auto", "rev_over_rev"])
def test_replacements_run_where_operations_are_recorded(mode):
    """What Taylor propagation cannot follow is nested, by operations that torch has right."""
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).double()
    func = torch.vmap(torch.func.grad(lambda row: net(row[None]).sum()))
    assert_as_eager(batch_laplacian(func, mode=mode), randn(B, 3), list(net.parameters()))


@pytest.mark.parametrize(
    ("outer", "inner"),
    [(batch_jacobian, batch_jacobian), (batch_hessian_diagonal, batch_laplacian)],
)
def test_replacements_run_at_every_level(outer, inner):
    net = nn.Sequential(nn.LayerNorm(3), nn.Tanh()).double()
    func = lambda x: inner(torch.vmap(torch.func.grad(lambda row: net(row[None]).sum())))(x)
    transform, x = outer(func), randn(B, 3)
    torch.testing.assert_close(compiled(transform, "eager")(x), transform(x))


# --- what the graph is -------------------------------------------------------------------


BATCHED = {
    "select": lambda x: x[:, 0].exp().unsqueeze(1) * x.cummax(1).values.sin(),
    "slices": lambda x: torch.cat([x[:, 1:], x.T.split(2)[0].T ** 2, x[:, [0, 2]]], 1) * x[:, -1:],
    "scatter": lambda x: x.sort(1).values * x.gather(1, x.argsort(1)[:, :1]) * x.max(1)[0][:, None],
    "others": lambda x: x.diag_embed().diagonal(0, 1, 2) * torch.linalg.cross(x, x.exp(), dim=1),
    "unfold": lambda x: nn.Mish()(x.unfold(1, 2, 1).cos().flatten(1)) * nn.GELU()(x[:, :1]),
}


@pytest.mark.parametrize("name", ["jacobian", "laplacian", "partials", *BATCHED])
def test_one_graph_for_all_batches(name):
    net, func = network(), BATCHED.get(name)
    if func is None:
        transform = TRANSFORMS[name](net)
    else:
        inner = batch_jacobian(lambda x: func(net[0](x).tanh()[:, :3]), mode="rev")
        transform = batch_jacobian(inner)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(transform, counter)
    for batch in (B, 7, 300):
        x = randn(batch, 3)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(run(x), transform(x), rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 1
    assert torch._C.DispatchKey.FuncTorchBatched not in torch.ops.aten.cat.default.py_kernels


def test_matrices_of_each_row_are_not_copied():
    """Neither those on the left, nor on the right, nor those that a weight multiplies."""
    weight = randn(3, 2).requires_grad_()

    def func(x):
        a = (x.unsqueeze(1) * x.unsqueeze(2) + x.unsqueeze(1)).sin()
        return ((a @ a.mT.exp() @ (2 * a)) @ weight).flatten(1)

    transform = batch_jacobian(func, mode="rev")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(transform, counter, dynamic=True)
    for batch in (B, 7):
        assert_as_eager(transform, randn(batch, 3), [weight], run)
    assert counter.frame_count == 1
    graph = torch.fx.experimental.proxy_tensor.make_fx(transform)(randn(B, 3)).graph
    graph.eliminate_dead_code()
    products = [n for n in graph.nodes if n.target is torch.ops.aten.bmm.default]
    assert {n.meta["val"].shape[0] for n in products} == {B}


@pytest.mark.parametrize("name", ["jacobian", "laplacian"])
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(name, batch):
    transform, x = TRANSFORMS[name](network()), randn(B, 3)[:batch]
    torch.testing.assert_close(compiled(transform)(x), transform(x))


def test_a_weight_with_everything_dynamic():
    net, weight = network(), randn(3)
    transform = batch_laplacian(net, weight=weight)
    run = compiled(lambda x: transform(x).square().mean(), dynamic=True)  # the loss, too
    for batch in (B, 9):
        torch.testing.assert_close(run(randn(batch, 3)), transform(randn(batch, 3)).square().mean())


# --- around and inside of other transforms -----------------------------------------------


@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_around_and_inside_of_vmap(transform):
    """A batch of batches; and ``func`` that is a ``torch.vmap``."""
    net, x = network().requires_grad_(False), torch.stack([randn(B, 3), randn(B, 3) + 1])
    around = torch.vmap(transform(net))
    torch.testing.assert_close(compiled(around)(x), around(x))
    inside = transform(torch.vmap(net))
    torch.testing.assert_close(compiled(inside)(x[0]), inside(x[0]))


def test_around_a_compiled_function():
    net, x = network().requires_grad_(False), randn(B, 3)
    run = torch.compile(batch_laplacian(net), backend="aot_eager")
    found = torch.func.grad(lambda x: run(x).sum())(x)
    torch.testing.assert_close(found, torch.func.grad(lambda x: batch_laplacian(net)(x).sum())(x))


@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_a_compiled_network_inside(transform):
    """Compiled as a whole, the inner compilation counts for nothing."""
    net = network()
    inner = torch.compile(net, backend="aot_eager")
    run = compiled(transform(lambda x: inner(x)))
    assert_as_eager(transform(net), randn(B, 3), list(net.parameters()), run)


@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_autocast(transform):
    net, x = network().float(), randn(B, 3).float()

    def step(x):
        with torch.autocast("cpu", torch.bfloat16):
            return transform(net)(x)

    found, right = compiled(step)(x), step(x)
    assert found.dtype == right.dtype
    torch.testing.assert_close(found, right, rtol=0.1, atol=0.05)


# --- what is refused, and what falls back ------------------------------------------------


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.count = nn.Linear(3, 5).double(), 0

    def forward(self, x):
        self.count += 1
        return self.layer(x).tanh()


def test_side_effects():
    """They happen; only where operations are recorded, Dynamo refuses them."""
    net = Counting()
    compiled(batch_jacobian(net))(randn(B, 3))
    assert net.count == 1
    found = compiled(batch_laplacian(net, mode="rev_over_rev"))(randn(B, 3))
    torch.testing.assert_close(found, batch_laplacian(net)(randn(B, 3)))
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"outer-scope|outside the scope"):
        compiled(batch_laplacian(net))(randn(B, 3))


def test_refusals_keep_their_words():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="to return a batch of 4"):
        compiled(batch_jacobian(torch.sum))(randn(B, 3))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="batch_divergence: expected"):
        compiled(batch_divergence(network()))(randn(B, 3))


@every_transform
def test_check_writes_an_assertion(name):
    """Of rows that depend on one another; with ``check="auto"`` nothing is said."""
    net = network()
    words = {"check": True}
    if name == "divergence":
        make = lambda f: batch_divergence(lambda x: f(x)[:, :1] * x.sin(), **words)
    elif name == "partials":
        make = lambda f: batch_partials(f, [(0,), (1, 1)], **words)
    else:
        make = functools.partial(TRANSFORMS[name], **words)
    shift = torch.zeros((), dtype=torch.float64)
    run = compiled(make(lambda x: net(x - shift * x.mean(0))))
    run(randn(B, 3))
    shift += 1e-3  # the same code
    with pytest.raises(RuntimeError, match="depend on their own rows alone"):
        run(randn(B, 3))


def test_what_has_no_second_derivative():
    halves = torch.tensor([2, 2])
    func = lambda x: torch.segment_reduce(x.T.contiguous().sin(), "max", lengths=halves).T
    words = "batch_hessian: cannot differentiate func in compiled code: "
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(batch_hessian(func))(randn(B, 4))


def test_custom_functions():
    """Once; what needs a derivative of their backward pass is refused, as Dynamo loses it."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    func, x = lambda x: Cube.apply(x.sin()), randn(B, 3)
    forward = lambda func: batch_jacobian(func, mode="fwd")
    for wide in (func, lambda x: func(x) @ torch.ones(3, 20, dtype=x.dtype)):
        torch.testing.assert_close(compiled(batch_jacobian(wide))(x), batch_jacobian(wide)(x))
    cases = (batch_laplacian, x), (forward, x), (batch_jacobian, x.clone().requires_grad_())
    for transform, x in cases:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="derivatives of an autograd"):
            compiled(transform(func))(x)


def test_a_run_is_freed(monkeypatch):
    """The record of a run ends with its call, without a collection of garbage."""
    from funcjac._dispatch import compiled as module

    recorders = []

    class Watched(module.Recorder):
        def __init__(self, inputs):
            super().__init__(inputs)
            recorders.append(weakref.ref(self))

    monkeypatch.setattr(module, "Recorder", Watched)
    run = compiled(batch_laplacian(network().requires_grad_(False)), "eager")
    gc.disable()
    try:
        run(randn(B, 3))
        assert recorders
        assert not [ref for ref in recorders if ref() is not None]
    finally:
        gc.enable()


def test_modules_stay_as_they_are():
    """Nothing of a traced call remains on modules or tensors of the caller."""
    net, x = network(), randn(B, 3).requires_grad_()
    holders = [*net.modules(), *net.parameters(), x]
    compiled(batch_laplacian(net))(x)
    assert not [name for holder in holders for name in vars(holder) if "funcjac" in name]


# --- make_fx and export ------------------------------------------------------------------


@every_transform
@pytest.mark.parametrize("tracing", ["real", "symbolic"])
def test_make_fx(name, tracing):
    from torch.fx.experimental.proxy_tensor import make_fx

    transform = TRANSFORMS[name](network().requires_grad_(False))
    trace = make_fx(transform, tracing_mode=tracing, _allow_non_fake_inputs=True)
    graph, x = trace(randn(B, 3)), randn(B, 3) + 1
    torch.testing.assert_close(graph(x), transform(x))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11
def test_export_of_a_flat_graph(tmp_path):
    from torch.fx.experimental.proxy_tensor import make_fx

    transform = batch_laplacian(network().requires_grad_(False))
    graph = make_fx(transform)(randn(B, 3))
    program = torch.export.export(graph, (randn(B, 3),))
    torch.export.save(program, tmp_path / "laplacian.pt2")
    loaded = torch.export.load(tmp_path / "laplacian.pt2").module()
    torch.testing.assert_close(loaded(randn(B, 3)), transform(randn(B, 3)))


def test_a_package_of_compiled_code(tmp_path, monkeypatch):
    """The recipe of the page: its package runs where nobody imports funcjac, for any batch."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        pytest.skip("AOTInductor needs a C++ compiler")
    page = Path(__file__).parents[2] / "docs" / "compile.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)
    (recipe,) = [block for block in blocks if "aoti_compile_and_package" in block]
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(recipe, scope)
    x = torch.rand(5, 2)
    right = scope["batch_jacobian"](scope["net"])(x)
    torch.save((x, right), "expected.pt")
    program = """
import sys, torch
load = torch._inductor.aoti_load_package("jacobian.pt2")
x, right = torch.load("expected.pt")
torch.testing.assert_close(load(x), right)
assert not [name for name in sys.modules if "funcjac" in name]
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert right.shape == (5, 1, 2)


def test_eager_is_as_before():
    """Tracing leaves nothing behind that eager calls would meet."""
    from torch.fx.experimental.proxy_tensor import make_fx

    transform, x = batch_jacobian(network()), randn(B, 3)
    before = transform(x)
    make_fx(transform)(x)
    compiled(transform)(x)
    assert torch.equal(transform(x), before)
    assert funcjac.explain(transform, x).engine == "sum"
