"""Of the caller's, only what one plain run of ``func`` changes has changed."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.functional import instance_norm

from funcjac import batch_hessian, batch_jacobian
from tests.fresh import fresh
from tests.tensors import equal, randn

B = 4
ROUTES = [*itertools.product(("vmap", "sum", "loop"), ("fwd", "rev")), ("auto", "auto")]
every_route = pytest.mark.parametrize(("engine", "mode"), ROUTES)
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def is_documented(error):
    return str(error).startswith("batch_jacobian: ")


# --- the caller's tensors ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_write_into_an_empty_input(shape):
    def func(x):
        with torch.no_grad():
            x.mul_(2)
        return x.sin()

    for _ in range(3):
        assert batch_jacobian(func)(torch.ones(shape)).shape == (*shape, shape[1])


@pytest.mark.parametrize("late", [3, 4])
def test_a_later_call_that_writes_into_its_input_is_refused(late):
    """What it was given is lost: values would be those of twice that; with copies it is right."""
    writes = torch.tensor(False)  # which is in no key

    def func(x):
        if writes:
            with torch.no_grad():
                x.mul_(2)
        return x.sin()

    jacobian = batch_jacobian(fresh(func), return_value=True)
    for number in range(1, 8):
        x = torch.full((2, 1), 0.25, dtype=torch.float64)
        writes.fill_(number >= late)
        if number == late:
            with pytest.raises(RuntimeError, match="write into its input"):
                jacobian(x)
            continue
        jac, value = jacobian(x)
        at = torch.full((2, 1), 0.5 if number > late else 0.25, dtype=torch.float64)
        equal(value, at.sin())
        equal(jac, at.cos().unsqueeze(2))


@pytest.mark.quick
@every_route
@pytest.mark.parametrize("grad", [False, True])
def test_the_input_is_untouched(grad, engine, mode):
    x = randn(B, 3).requires_grad_(grad)
    before, version = x.detach().clone(), x._version
    for _ in range(3):
        batch_jacobian(network(), engine=engine, mode=mode)(x)
    assert torch.equal(x.detach(), before)
    assert x._version == version
    assert x.requires_grad == grad
    assert x.is_leaf
    assert x.grad is None
    assert x.grad_fn is None
    assert not x._backward_hooks


@every_route
def test_gradients_already_there_stay(engine, mode):
    net, x = network(), randn(B, 3).requires_grad_()
    net(x).sum().backward()
    before = [p.grad.clone() for p in [x, *net.parameters()]]
    ids = [id(p.grad) for p in [x, *net.parameters()]]
    batch_jacobian(net, engine=engine, mode=mode)(x)
    assert [id(p.grad) for p in [x, *net.parameters()]] == ids
    equal([p.grad for p in [x, *net.parameters()]], before)


@every_route
def test_flags_of_parameters_stay(engine, mode):
    net = network()
    net[0].weight.requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    batch_jacobian(net, engine=engine, mode=mode)(randn(B, 3))
    assert [p.requires_grad for p in net.parameters()] == before
    assert all(p.grad is None for p in net.parameters())


@every_route
def test_a_result_of_other_code_keeps_its_graph(engine, mode):
    w = randn(3).requires_grad_()
    x = randn(B, 3) * w
    jac = batch_jacobian(torch.sin, engine=engine, mode=mode)(x)
    assert not x.is_leaf
    (grad,) = torch.autograd.grad(jac.sum(), w)
    equal(grad, (-x.sin() * x / w).sum(0).detach())


@every_route
@pytest.mark.parametrize(
    "func",
    [
        lambda x: x.mul_(2).sin(),
        lambda x: torch.relu_(x).exp(),
        lambda x: nn.functional.relu(x, inplace=True) ** 2,
        lambda x: x.index_fill_(1, torch.tensor([0]), 0.0).sin(),
    ],
    ids=["mul_", "relu_", "inplace=True", "index_fill_"],
)
@pytest.mark.parametrize("grad", [False, True])
@quiet
def test_a_function_that_works_in_place(grad, func, engine, mode):
    x = randn(B, 3)
    before = x.clone()
    expected = torch.autograd.functional.jacobian(lambda x: func(x.clone()), x)
    expected = torch.stack([expected[b, :, b] for b in range(B)])
    jacobian = batch_jacobian(func, engine=engine, mode=mode)
    for _ in range(3):
        equal(jacobian(x.requires_grad_(grad)).detach(), expected)
    assert torch.equal(x.detach(), before)


# --- modules -----------------------------------------------------------------------------


def snapshot(module):
    """Everything a module holds, by identity and by value."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {
        "attributes": [sorted(vars(m)) for m in module.modules()],
        "ids": [(name, id(t)) for name, t in tensors],
        "flags": [t.requires_grad for _, t in tensors],
        "training": [m.training for m in module.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in module.modules()
        ],
        "values": [t.detach().clone().tolist() for _, t in tensors],
        "lists": [
            (name, list(map(id, value)))
            for m in module.modules()
            for name, value in vars(m).items()
            if isinstance(value, list)
        ],
    }


def wrapped_tensors(module):
    return [
        name
        for m in module.modules()
        for name, value in vars(m).items()
        for tensor in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(tensor, torch.Tensor) and is_functorch_wrapped_tensor(tensor)
    ]


class Keeps(nn.Module):
    """Keeps its last activation, as many modules do."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(3, 5), None

    def forward(self, x):
        self.last = self.linear(x).tanh()
        return self.last


class Collects(Keeps):
    def __init__(self):
        super().__init__()
        self.seen, self.by_name = [], {}

    def forward(self, x):
        self.seen.append(self.linear(x))
        self.by_name["last"] = self.seen[-1]
        return self.seen[-1].tanh()


class Counts(Keeps):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.linear(x).tanh()


class Reassigns(Counts):
    def forward(self, x):
        self.count = self.count + x.detach().sum() * 0 + 1
        return self.linear(x).tanh()


class Averages(Counts):
    def forward(self, x):
        self.count.mul_(0.9).add_(x.detach().mean(), alpha=0.1)
        return self.linear(x).tanh()


class Switches(Keeps):
    def forward(self, x):
        self.linear.weight.requires_grad_(True)
        self.new = torch.ones(3)
        return self.linear(x).tanh()


STATEFUL = {
    "keeps its activation": Keeps,
    "collects": Collects,
    "counts in place": Counts,
    "reassigns a buffer": Reassigns,
    "moving average": Averages,
    "sets attributes": Switches,
    "batch norm, eval": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(),
    "batch norm, train": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
    ),
    "lstm": lambda: Recurrent(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5)),
    "dropout": lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5)),
}
OF_THE_BATCH = ("batch norm, train",)  # rows mix: a call raises
FAULTY = ("instance norm",)  # torch has its derivatives wrong: a first call runs twice


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(2))[0][:, -1]


def values(module):
    """What a module holds, without the identities of tensors that it makes anew in each run."""
    found = snapshot(module)
    found.pop("ids")
    found["lists"] = [(n, len(kept)) for n, kept in found["lists"] if not n.startswith("_")]
    return found


@pytest.mark.quick
@pytest.mark.parametrize("engine", ["auto", "sum"])
@pytest.mark.parametrize("name", [n for n in STATEFUL if n not in (*OF_THE_BATCH, *FAULTY)])
def test_a_module_is_as_after_one_plain_run(name, engine):
    torch.manual_seed(1)
    module = STATEFUL[name]().double()
    plain, x = copy.deepcopy(module), randn(B, 3)
    jacobian, state = batch_jacobian(module, engine=engine), torch.get_rng_state()
    for _ in range(5):
        torch.set_rng_state(state)
        plain(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        jacobian(x)
        assert values(module) == values(plain)
        assert torch.equal(torch.get_rng_state(), after)
        state = after
        assert not wrapped_tensors(module)
    module(x).sum().backward()


@quiet
@pytest.mark.parametrize(("engine", "mode"), [r for r in ROUTES if r[0] in ("vmap", "loop")])
@pytest.mark.parametrize("name", [name for name in STATEFUL if name not in OF_THE_BATCH])
def test_engines_that_run_rows_leave_no_dead_tensors(name, engine, mode):
    module, x = STATEFUL[name]().double(), randn(B, 3)
    jacobian = batch_jacobian(module, engine=engine, mode=mode, randomness="different")
    for _ in range(3):
        try:
            jacobian(x)
        except (RuntimeError, ValueError) as error:
            if not is_documented(error):
                raise
    assert not wrapped_tensors(module)
    module(x).sum().backward()


@quiet
@every_route
def test_the_result_of_a_module_that_keeps_state_is_right(engine, mode):
    """The second result is no worse than the first: no dead wrapper is in the way."""
    for make in (Keeps, Collects):
        module, x = make().double(), randn(B, 3)
        jacobian = batch_jacobian(module, engine=engine, mode=mode)
        slope = 1 - torch.tanh(module.linear(x)) ** 2
        for _ in range(3):
            equal(jacobian(x), slope.unsqueeze(2) * module.linear.weight)


@quiet
@every_route
def test_hooks_stay_and_leave_no_dead_tensors(engine, mode):
    if engine == "vmap":
        pytest.skip("torch.func hands its own tensors to hooks, which keep them where they like")
    net, kept, listed = network(), {}, []
    handles = [
        net[0].register_forward_hook(lambda m, args, out: kept.update(last=out)),
        net[1].register_forward_hook(lambda m, args, out: listed.append(out)),
    ]
    x = randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    for _ in range(3):
        jacobian(x)
    assert not [t for t in [*kept.values(), *listed] if is_functorch_wrapped_tensor(t)]
    assert handles[0].id in net[0]._forward_hooks
    assert handles[1].id in net[1]._forward_hooks
    kept.clear()
    net(x)
    assert torch.equal(kept["last"], net[0](x))


@quiet
@every_route
@pytest.mark.parametrize("hook", ["full_backward", "full_backward_pre", "forward_pre"])
def test_hooks_of_other_kinds(hook, engine, mode):
    net, x = network(), randn(B, 3)
    expected = batch_jacobian(net)(x).detach()
    getattr(net[0], f"register_{hook}_hook")(lambda *args: None)
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    before = snapshot(net)
    try:
        equal(jacobian(x).detach(), expected)
    except RuntimeError as error:
        if engine != "vmap" or not is_documented(error):
            raise
    assert snapshot(net) == before


@every_route
def test_lazy_modules(engine, mode):
    net = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(5)).double()
    x = randn(B, 3)
    jac = batch_jacobian(net, engine=engine, mode=mode)(x)
    assert jac.shape == (B, 5, 3)
    slope = 1 - net[:2](x) ** 2
    equal(jac, torch.einsum("oh,bh,hi->boi", net[2].weight, slope, net[0].weight))
    assert type(net[0]) is nn.Linear
    net(x).sum().backward()
    assert net[0].weight.grad is not None


# --- functions that fail -----------------------------------------------------------------


@every_route
def test_a_function_that_always_fails(engine, mode):
    net = network()

    def func(x):
        net(x)
        raise ZeroDivisionError("mine")

    x, before, rng = randn(B, 3), snapshot(net), torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match=r"^mine$"):
            batch_jacobian(func, engine=engine, mode=mode)(x)
    assert snapshot(net) == before
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, KeyError])
def test_interrupts_and_errors_of_a_later_call_pass_through(kind):
    calls = []

    def func(x):
        calls.append(1)
        if len(calls) == 2:
            raise kind("mine")
        return x.sin()

    jacobian, x = batch_jacobian(func), randn(B, 3)
    jacobian(x)
    with pytest.raises(kind, match="mine"):
        jacobian(x)
    equal(jacobian(x), torch.diag_embed(x.cos()))
    assert len(calls) == 3


# --- random state ------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "mode"), [("auto", "auto"), ("sum", "rev"), ("sum", "fwd")])
def test_a_random_function_draws_what_it_draws(engine, mode):
    """The random state afterwards is that after ``func(x)``, on every call."""
    func = lambda x: x * torch.rand(x.shape, dtype=x.dtype)
    x = randn(B, 3)
    jacobian = batch_jacobian(func, engine=engine, mode=mode)
    for _ in range(5):
        state = torch.get_rng_state()
        func(x)
        expected = torch.get_rng_state()
        torch.set_rng_state(state)
        jacobian(x)
        assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("engine", ["auto", "sum"])
def test_random_state_after_a_failure(engine):
    """As after the plain call that fails."""

    def func(x):
        torch.rand(3)
        raise ValueError("mine")

    x = randn(B, 3)
    before = torch.get_rng_state()
    torch.rand(3)
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    with pytest.raises(ValueError, match="mine"):
        batch_jacobian(func, engine=engine)(x)
    assert torch.equal(torch.get_rng_state(), drawn)


# --- what is kept -----------------------------------------------------------------------


def test_no_graph_or_batch_is_kept_alive():
    net, x = network(), randn(B, 3)
    jacobian = batch_jacobian(net)
    for _ in range(3):
        jac = jacobian(x)
    found = [weakref.ref(x), weakref.ref(jac)]
    del x, jac
    gc.collect()
    assert [ref() for ref in found] == [None, None]


def test_a_module_is_not_kept_alive():
    """The table of decisions is weak: a module that is gone takes its entries along."""
    net, x = network(), randn(B, 3)
    jacobian = batch_jacobian(net)
    for _ in range(3):
        jacobian(x)
    alive = weakref.ref(net)
    del net, jacobian
    gc.collect()
    assert alive() is None


MEAN, VAR = torch.zeros(2).double(), torch.ones(2).double()


@pytest.mark.parametrize("transform", [batch_jacobian, batch_hessian])
@pytest.mark.parametrize("where", ["closure", "list", "module of the function"])
def test_statistics_that_no_module_owns_move_once(transform, where):
    """Also where a second run replaces what torch differentiates wrongly."""
    held = (MEAN, VAR) if where == "module of the function" else (MEAN.clone(), VAR.clone())
    if where == "closure":
        mean, var = held
        func = lambda x: instance_norm(x, mean, var, use_input_stats=True)
    elif where == "list":
        func = lambda x: instance_norm(x, *held, use_input_stats=True)
    else:
        func = lambda x: instance_norm(x, MEAN, VAR, use_input_stats=True)
    before, x = [t.clone() for t in held], randn(B, 2, 4).requires_grad_()
    func(x)
    after = [t.clone() for t in held]
    for t, values in zip(held, before):
        t.copy_(values)
    result = transform(func)(x)
    for t, values in zip(held, after):
        equal(t, values)
    result.square().sum().backward()
    assert x.grad is not None
    for t, values in zip(held, before):
        t.copy_(values)


class GrowsAParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("weight", None)

    def forward(self, x):
        if self.weight is None:
            self.weight = nn.Parameter(torch.ones_like(x[0]).detach())
        return x * self.weight


def test_a_parameter_that_a_first_call_makes_inside_of_vmap_is_not_left_dead():
    net, x = GrowsAParameter(), randn(2, B, 3)
    torch.vmap(batch_jacobian(net))(x)
    equal(net(x[0].float()).detach(), x[0].float())


@pytest.mark.parametrize(
    "held",
    [
        torch.eye(3).double().to_sparse(),
        torch.full((), torch.nan).double().expand(3),
        torch.zeros(1).expand(10**12),
        torch.nn.UninitializedParameter(),
        torch.ones(3, device="meta"),
    ],
    ids=["sparse", "nan", "vast", "uninitialized", "meta"],
)
def test_a_tensor_that_cannot_be_copied_may_be_closed_over(held):
    func = lambda x: torch.logcumsumexp(x if held is not None else -x, 1)
    assert batch_hessian(fresh(func), engine="sum")(randn(B, 3)).shape == (B, 3, 3, 3)


def decorated(func):
    return lambda x: func(x)


@pytest.mark.parametrize("check", ["auto", False])
def test_statistics_behind_decorators_move_once(check):
    """Replacements run after the first run, and a module is found through many functions."""
    net, plain = (nn.InstanceNorm1d(2, track_running_stats=True).double() for _ in range(2))
    x = randn(B, 2, 5)
    plain(x)
    func = lambda x: net(x)
    for _ in range(6):
        func = fresh(decorated(func))
    batch_jacobian(fresh(func), check=check)(x.clone().requires_grad_())
    equal(net.running_mean, plain.running_mean)
    equal(net.running_var, plain.running_var)


def test_statistics_move_once_where_a_later_call_takes_another_way():
    """A settled run of other operations is the first of two: replacements run after it."""
    net, plain = (nn.InstanceNorm1d(2, track_running_stats=True).double() for _ in range(2))
    x = randn(B, 2, 5).abs()
    plain(x)
    hessian = batch_hessian(lambda x: net(x) if x.sum() > 0 else x.sin())
    for _ in range(3):
        hessian(-x)
    hessian(x)
    equal(net.running_mean, plain.running_mean)
    equal(net.running_var, plain.running_var)
