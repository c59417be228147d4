"""Functions that change between calls: each call gives the derivatives of today's function.

What is remembered is that a function was verified, never what it computed. Each is called until
the next verification is far away, then it changes, back and forth.
"""

import functools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from funcjac import (
    BatchMixingError,
    EngineFallbackWarning,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
)
from tests import oracles
from tests.cases.modules import Legacy
from tests.tensors import equal, randn

B = 4
WARM = 9  # calls 1, 2, 4 and 8 are verified, then the 16th
INDICES = [(0,), (1, 2), (0, 0, 1)]
OPERATORS = {
    "jacobian": (batch_jacobian, ("auto",)),
    "hessian": (batch_hessian, ("auto",)),
    "diagonal": (batch_hessian_diagonal, ("auto",)),
    "laplacian": (batch_laplacian, ("taylor", "auto")),
    "partials": (functools.partial(batch_partials, indices=INDICES), ("taylor", "auto")),
    "divergence": (batch_divergence, ("auto",)),
}
ROUTES = [(name, mode) for name, (_, modes) in OPERATORS.items() for mode in modes]
by_route = pytest.mark.parametrize(("name", "mode"), ROUTES)


def oracle(name, func, *args):
    if name == "jacobian":
        return oracles.derivatives(func, args).jac
    if name == "partials":
        return oracles.partials(func, args, INDICES)
    return getattr(oracles, name)(func, args)


# --- functions with a switch -------------------------------------------------------------

# Each makes a function (B, 3) -> (B, 3) and a list of changes: the function in one state after
# the other. ``x`` is always the same, so that nothing but the change tells the calls apart.


def closure_number(x):
    scale = 1.0

    def func(x):
        return (scale * x).sin()

    def set_to(value):
        nonlocal scale
        scale = value

    return func, [functools.partial(set_to, value) for value in (1.0, 2.0, -0.5)]


def closure_tensor(x):
    w = randn(3, 3)

    def func(x):
        return (x @ w).tanh()

    def set_to(value):
        nonlocal w
        w = value

    return func, [functools.partial(set_to, randn(3, 3)) for _ in range(3)]


def closure_tensor_in_place(x):
    w = randn(3, 3)
    return lambda x: (x @ w).tanh(), [functools.partial(w.copy_, randn(3, 3)) for _ in range(3)]


def closure_function(x):
    inner = torch.sin

    def func(x):
        return inner(x) * x

    def set_to(value):
        nonlocal inner
        inner = value

    return func, [functools.partial(set_to, f) for f in (torch.sin, torch.exp, torch.cos)]


def closure_dict(x):
    config = {"power": 2, "add": True}
    func = lambda x: x ** config["power"] + (x.exp() if config["add"] else x)
    changes = [{"power": 3}, {"add": False}, {"power": 2, "add": True}]
    return func, [functools.partial(config.update, change) for change in changes]


SCALE = 1.0


def global_number(x):
    def set_to(value):
        global SCALE
        SCALE = value

    return lambda x: (SCALE * x).sin(), [functools.partial(set_to, v) for v in (1.0, 3.0, 0.5)]


def object_attribute(x):
    config = SimpleNamespace(scale=1.0)
    set_to = lambda value: setattr(config, "scale", value)
    return lambda x: (config.scale * x).sin(), [functools.partial(set_to, v) for v in (1.0, 2.0)]


def numpy_constant(x):
    weight = np.ones(3)
    func = lambda x: (x * torch.from_numpy(weight.copy())).sin()
    return func, [functools.partial(weight.fill, value) for value in (1.0, 2.0, 0.3)]


def keyword_default(x):
    def func(x, scale=1.0):
        return (scale * x).sin()

    set_to = lambda value: setattr(func, "__defaults__", (value,))
    return func, [functools.partial(set_to, value) for value in (1.0, 2.0)]


def partial_keyword(x):
    func = functools.partial(lambda x, scale: (scale * x).sin(), scale=1.0)
    return func, [functools.partial(func.keywords.update, scale=v) for v in (1.0, 2.0)]


# --- modules -----------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]).double()
        self.register_buffer("index", torch.tensor([0, 1, 2]))
        self.act, self.scale, self.steps, self.extra = torch.tanh, 1.0, 1, []

    def forward(self, x):
        for _ in range(self.steps):
            for layer in self.layers:
                x = self.act(self.scale * layer(x))
        for function in self.extra:
            x = function(x)
        return x[:, self.index]


def attribute(name, *values):
    def make(x):
        net = Net()
        return net, [functools.partial(setattr, net, name, value) for value in values]

    return make


def with_net(*changes):
    def make(x):
        net = Net()
        return net, [functools.partial(change, net) for change in changes]

    return make


@torch.no_grad()
def in_place(net):
    net.layers[0].weight.add_(0.3)


def by_data(net):
    net.layers[0].weight.data = randn(3, 3)


def replace_parameter(net):
    net.layers[1].weight = nn.Parameter(randn(3, 3))


def replace_layer(net):
    net.layers[0] = nn.Linear(3, 3).double()


def load(net):
    net.load_state_dict({k: v + 0.2 if v.ndim > 1 else v for k, v in net.state_dict().items()})


def step(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(randn(5, 3)).pow(2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def hook(net):
    net.hooked = net.layers[0].register_forward_hook(lambda module, args, out: out * args[0])


def unhook(net):
    net.hooked.remove()


def method(net):
    net.forward = lambda x: x.exp() * x.sum(1, keepdim=True)


def no_method(net):
    del net.forward


# --- the same value, other derivatives ---------------------------------------------------


def switched(*functions):
    """One function after the other, behind one and the same face."""

    def make(x):
        now = SimpleNamespace(which=0)
        func = lambda x: functions[now.which](x)
        return func, [functools.partial(setattr, now, "which", i) for i in range(len(functions))]

    return make


def tangents(x):
    """The sine, its tangent and its parabola at ``x``: equal there up to some derivative."""
    at = x.detach().clone()

    def rows(values, like):
        """The values of the rows that are asked for, whether all or one of them."""
        where = (at[:, None] == like.detach()).all(-1).int().argmax(0)
        return values[where]

    def line(x):
        point = rows(at, x)
        return point.sin() + (x - point) * point.cos()

    def parabola(x):
        point = rows(at, x)
        return line(x) - (x - point) ** 2 * point.sin() / 2

    return switched(torch.sin, line, parabola)(x)


def blind(x):
    with torch.no_grad():
        part = x.cos()
    return part * x.sin()


SAME = {
    "detach": switched(lambda x: x.detach().cos() * x.sin(), lambda x: x.cos() * x.sin()),
    "no_grad": switched(blind, lambda x: x.cos() * x.sin()),
    "half_detached": switched(
        lambda x: torch.cat([x[:, :1].exp(), x[:, 1:].detach().exp()], 1) * x,
        lambda x: torch.cat([x[:, :1].detach().exp(), x[:, 1:].exp()], 1) * x,
    ),
    "tangents": tangents,
    "round_trip": switched(torch.sin, lambda x: x.detach().sin() + (x - x.detach())),
    "identity": switched(lambda x: x * x, lambda x: x * x + (x - x.detach()) ** 2),
    "order": switched(lambda x: x.sin() + x**3, lambda x: x**3 + x.sin()),
    "clone": switched(torch.exp, lambda x: x.clone().exp() * 1, lambda x: x.detach().exp() * x / x),
}

CHANGES = {
    "closure_number": closure_number,
    "closure_tensor": closure_tensor,
    "closure_tensor_in_place": closure_tensor_in_place,
    "closure_function": closure_function,
    "closure_dict": closure_dict,
    "global_number": global_number,
    "object_attribute": object_attribute,
    "numpy_constant": numpy_constant,
    "keyword_default": keyword_default,
    "partial_keyword": partial_keyword,
    "module_number": attribute("scale", 1.0, 2.0, 0.5),
    "module_function": attribute("act", torch.tanh, torch.sin, nn.functional.softplus),
    "module_loop": attribute("steps", 1, 3, 2),
    "module_buffer": attribute("index", *map(torch.tensor, ([2, 1, 0], [0, 0, 1], [0, 1, 2]))),
    "layers_appended": with_net(
        lambda net: net.layers.append(nn.Linear(3, 3).double()),
        lambda net: net.extra.append(torch.sin),
        lambda net: net.extra.pop(),
    ),
    "parameter_in_place": with_net(in_place, in_place),
    "parameter_data": with_net(by_data, by_data),
    "parameter_replaced": with_net(replace_parameter, replace_parameter),
    "layer_replaced": with_net(replace_layer, replace_layer),
    "state_loaded": with_net(load, load),
    "optimizer_step": with_net(step, step, step),
    "hooked": with_net(hook, unhook, hook),
    "method": with_net(method, no_method, method),
    "switched": switched(torch.sin, lambda x: x**3, lambda x: x.cumsum(1).exp()),
    "other_shapes_inside": switched(lambda x: (x @ x.mT.new_ones(3, 7)).sin()[:, :3], torch.exp),
    **{f"same_value_{name}": make for name, make in SAME.items()},
}


@by_route
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen_in_the_next_call(what, name, mode):
    x = randn(B, 3)
    func, changes = CHANGES[what](x)
    transformed = OPERATORS[name][0](func, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallbackWarning)
        right = detached(oracle(name, func, x))
        for _ in range(WARM):
            equal(detached(transformed(x)), right)
        for change in [*changes, changes[0]]:
            change()
            right = detached(oracle(name, func, x))
            for _ in range(2):
                equal(detached(transformed(x)), right)


def detached(found):
    return tuple(leaf.detach() for leaf in found) if isinstance(found, tuple) else found.detach()


@pytest.mark.parametrize("what", SAME)
def test_the_functions_have_the_same_value(what):
    """Or the test above would show nothing new."""
    x = randn(B, 3)
    func, changes = SAME[what](x)
    value = func(x)
    differ = False
    jac = oracles.derivatives(func, (x,))
    for change in changes:
        change()
        equal(func(x), value)
        now = oracles.derivatives(func, (x,))
        differ |= not torch.allclose(now.hess, jac.hess) or not torch.allclose(now.jac, jac.jac)
    assert differ or what in ("order",)


# --- changes that must be noticed --------------------------------------------------------


@by_route
def test_dropout_that_wakes_up_is_seen(name, mode):
    """In training mode each call is that of its draw; back in eval mode all is as before."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    net.eval()
    transformed, x = OPERATORS[name][0](net, mode=mode), randn(B, 3)
    for _ in range(WARM):
        transformed(x)
    right = detached(oracle(name, net, x))
    for seed in range(2):
        net.train()
        torch.manual_seed(seed)
        mask = nn.functional.dropout(torch.ones(B, 8).double(), 0.5)
        torch.manual_seed(seed)
        drawn = detached(transformed(x))
        masked = lambda x, mask: net[3](net[1](net[0](x)) * mask)
        rows = [
            oracle(name, functools.partial(masked, mask=mask[b : b + 1]), x[b : b + 1])
            for b in range(B)
        ]
        expected = tuple(map(torch.cat, zip(*rows))) if name == "partials" else torch.cat(rows)
        equal(drawn, detached(expected))
        net.eval()
        equal(detached(transformed(x)), right)


@by_route
def test_batch_norm_that_wakes_up_is_seen(name, mode):
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.BatchNorm1d(3)).double().eval()
    net[2].running_var.fill_(2)
    transformed, x = OPERATORS[name][0](net, mode=mode), randn(B, 3)
    for _ in range(WARM):
        transformed(x)
    for value in (0.5, 3.0):
        net.train()
        with pytest.raises(BatchMixingError):
            transformed(x)
        net.eval()
        net[2].running_var.fill_(value)
        equal(detached(transformed(x)), detached(oracle(name, net, x)))


@by_route
def test_branches_on_the_data_follow_the_data(name, mode):
    """All rows on one side or the other, and a branch taken for each row."""
    whole = lambda x: x.sin() if bool(x.mean() > 0) else x**3
    each = lambda x: torch.stack([r.exp() if r.sum() > 0 else r**2 for r in x])
    for func in (whole, each):
        transformed, x = OPERATORS[name][0](func, mode=mode), randn(B, 3).abs()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EngineFallbackWarning)
            for _ in range(WARM):
                transformed(x)
            for sign in (-1, 1, -1):
                equal(transformed(sign * x), oracle(name, func, sign * x))
            if func is each:
                mixed = randn(B, 3)
                equal(transformed(mixed), oracle(name, func, mixed))


@by_route
def test_arguments_that_are_no_tensors_are_read_at_each_call(name, mode):
    func = lambda x, power, kind: getattr(x, kind)() ** power
    transformed, x = OPERATORS[name][0](func, mode=mode), randn(B, 3)
    for _ in range(WARM):
        transformed(x, 2, "sin")
    for power, kind in ((3, "sin"), (2, "exp"), (2, "sin"), (1, "cos")):
        equal(transformed(x, power, kind), oracle(name, lambda x: func(x, power, kind), x))


@by_route
def test_a_changed_method_of_the_class_is_seen(name, mode, monkeypatch):
    net, x = Net().requires_grad_(False), randn(B, 3)
    transformed = OPERATORS[name][0](net, mode=mode)
    for _ in range(WARM):
        transformed(x)
    with monkeypatch.context() as patch:
        patch.setattr(Net, "forward", lambda self, x: self.layers[0](x).exp())
        equal(transformed(x), oracle(name, net, x))
    equal(transformed(x), oracle(name, net, x))


@by_route
def test_frozen_and_thawed_parameters_are_seen(name, mode):
    """What a result is attached to is decided at each call."""
    net, x = Net(), randn(B, 3)
    transformed = OPERATORS[name][0](net, mode=mode)
    leaf = lambda found: found[0] if name == "partials" else found
    for _ in range(WARM):
        transformed(x)
    for flag in (False, True, False):
        net.requires_grad_(flag)
        assert leaf(transformed(x)).requires_grad == flag
        equal(detached(transformed(x)), detached(oracle(name, net, x)))


def by_grad(x):
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        energy = (x.cumsum(1).sin() * x).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]


def by_views(x):
    out = x.new_zeros(x.shape)
    out[:, 0] = x[:, 1].exp()
    out[:, 1:] = x[:, :2] * x[:, 2:]
    return out


def by_mask(x):
    out = x.sin()
    out[x > 0] = x[x > 0] ** 3
    return out


UNFOLLOWED = {
    "legacy": lambda x: Legacy.apply(x.sin()) * x,
    "grad": by_grad,
    "func_grad": torch.vmap(torch.func.grad(lambda x: (x.cumsum(0).sin() * x).sum())),
    "jacobian": lambda x: batch_jacobian(lambda x: (x.cumsum(1).sin() * x).sum(1))(x),
    "laplacian": lambda x: batch_laplacian(lambda x: x[:, :1].exp() * x**3)(x),
    "views": by_views,
    "mask": by_mask,
    "complex": lambda x: torch.fft.fft(x.sin()).abs(),
    "inplace": lambda x: (x * x).sigmoid_() * x,
    "no_grad": blind,
}


@pytest.mark.parametrize(
    ("name", "mode"), [route for route in ROUTES if route[0] not in ("jacobian", "divergence")]
)
@pytest.mark.parametrize("what", UNFOLLOWED)
def test_an_operation_that_taylor_cannot_follow_any_more_is_seen(what, name, mode):
    """After many calls an operation appears that Taylor propagation cannot follow."""
    now = SimpleNamespace(strange=False)
    func = lambda x: UNFOLLOWED[what](x) if now.strange else x.sin().exp() * x.sum(1, True)
    transformed, x = OPERATORS[name][0](func, mode=mode), randn(B, 3)
    for _ in range(WARM):
        transformed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallbackWarning)
        for strange in (True, False, True):
            now.strange = strange
            right = oracle(name, func, x.clone())
            try:
                equal(transformed(x), right)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                if mode == "auto" or not str(error).startswith("batch_"):
                    raise


@by_route
def test_rows_that_begin_to_mix_are_seen(name, mode):
    """``check=True`` looks at every call."""
    now = SimpleNamespace(mixes=False)
    func = lambda x: (x - x.mean(0) * now.mixes) ** 3
    transformed, x = OPERATORS[name][0](func, mode=mode, check=True), randn(B, 3)
    for _ in range(WARM):
        transformed(x)
    for mixes in (True, False, True):
        now.mixes = mixes
        if mixes:
            with pytest.raises(BatchMixingError):
                transformed(x)
        else:
            equal(transformed(x), oracle(name, func, x))


@pytest.mark.parametrize("mode", ["taylor", "auto"])
def test_training_steps_see_todays_weights(mode):
    """Gradients too: a warmed-up transform in a loop of optimizer steps."""
    net, x = Net(), randn(B, 3)
    laplacian = batch_laplacian(net, mode=mode)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(WARM + 5):
        right = oracles.laplacian(net, (x,), create_graph=True).pow(2).sum()
        expected = torch.autograd.grad(right, list(net.parameters()), materialize_grads=True)
        optimizer.zero_grad()
        laplacian(x).pow(2).sum().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        equal(grads, list(expected))
        optimizer.step()
