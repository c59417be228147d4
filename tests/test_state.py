"""Nothing of the caller's is changed, and ``func`` runs no more often than it must."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor

from funcjac import (
    BatchMixingError,
    batch_jacobian,
    check_batched,
    check_derivative,
    explain,
)

B = 4
ROUTES = [*itertools.product(("vmap", "sum", "loop"), ("fwd", "rev")), ("auto", "auto")]
every_route = pytest.mark.parametrize(("engine", "mode"), ROUTES)
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
STEADY = 25


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def equal(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()


def is_documented(error):
    return str(error).startswith("batch_jacobian: ")


def attempt(jacobian, *args):
    """Call it often; a documented error is an answer, the state afterwards is what counts."""
    for _ in range(3):
        try:
            jacobian(*args)
        except (RuntimeError, ValueError) as error:
            if not is_documented(error):
                raise


# --- the caller's tensors ----------------------------------------------------------------


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


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unsqueeze(2))[0][:, -1]


@quiet
@every_route
@pytest.mark.parametrize("name", STATEFUL)
def test_a_module_is_as_before(name, engine, mode):
    module = STATEFUL[name]().double()
    before = snapshot(module)
    x = randn(B, 3)
    attempt(batch_jacobian(module, engine=engine, mode=mode, randomness="different"), x)
    assert snapshot(module) == before
    assert not wrapped_tensors(module)
    copy.deepcopy(module)
    module(x).sum().backward()


@quiet
@pytest.mark.parametrize("look", [explain, check_derivative])
@pytest.mark.parametrize("name", [name for name in STATEFUL if "train" not in name])
def test_looking_leaves_a_module_as_before(name, look):
    module = STATEFUL[name]().double()
    x = randn(B, 3)
    before, rng = snapshot(module), torch.get_rng_state()
    jacobian = batch_jacobian(module, randomness="different")
    try:
        look(jacobian, x)
    except (RuntimeError, BatchMixingError) as error:
        if not is_documented(error):
            raise
    assert snapshot(module) == before
    assert not wrapped_tensors(module)
    if look is check_derivative or name != "dropout":
        assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", [name for name in STATEFUL if "norm" not in name])
def test_check_batched_leaves_a_module_as_before(name):
    module = STATEFUL[name]().double()
    x = randn(B, 3)
    before, rng = snapshot(module), torch.get_rng_state()
    check_batched(module, x)
    assert snapshot(module) == before
    assert torch.equal(torch.get_rng_state(), rng)


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


def test_auto_leaves_no_dead_tensors_after_a_failed_vmap():
    """vmap fails half-way through this function: after it has stored its activation."""
    box, holder = {}, Keeps().double()

    def func(x):
        box["x"] = x
        y = holder(x)
        return y[y.detach() > -2].reshape(y.shape)

    x = randn(B, 3)
    with pytest.warns(match="left engine 'vmap'"):
        jac = batch_jacobian(func)(x)
    slope = 1 - torch.tanh(holder.linear(x)) ** 2
    equal(jac, slope.unsqueeze(2) * holder.linear.weight)
    assert holder.last is None
    assert "x" not in box or not is_functorch_wrapped_tensor(box["x"])


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


@quiet
@every_route
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_function_that_raises_on_the_kth_call(k, engine, mode):
    module = Collects().double()
    calls = []

    def func(x):
        calls.append(1)
        module(x)
        if len(calls) == k:
            raise KeyError("mine")
        return module.linear(x).tanh()

    x = randn(B, 3).requires_grad_()
    before = snapshot(module)
    jacobian = batch_jacobian(func, engine=engine, mode=mode)
    for _ in range(4):
        try:
            jac = jacobian(x)
        except KeyError:
            pass
        except RuntimeError as error:
            if not isinstance(error.__cause__, KeyError):
                raise
        else:
            slope = 1 - torch.tanh(module.linear(x)) ** 2
            equal(jac, slope.unsqueeze(2) * module.linear.weight)
        assert snapshot(module) == before
        assert x.requires_grad
        assert x.grad is None
    slope = 1 - torch.tanh(module.linear(x)) ** 2
    equal(jacobian(x), slope.unsqueeze(2) * module.linear.weight)


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


def test_interrupts_pass_through():
    calls = []

    def func(x):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return x.sin()

    with pytest.raises(KeyboardInterrupt):
        batch_jacobian(func)(randn(B, 3))


# --- random state ------------------------------------------------------------------------


@every_route
def test_a_plain_function_draws_nothing(engine, mode):
    x = randn(B, 3)
    rng = torch.get_rng_state()
    jacobian = batch_jacobian(network().requires_grad_(False), engine=engine, mode=mode)
    after_network = torch.get_rng_state()
    for _ in range(STEADY):
        jacobian(x)
        assert torch.equal(torch.get_rng_state(), after_network)
    assert not torch.equal(rng, after_network)


@pytest.mark.parametrize(("engine", "mode"), [("sum", "rev"), ("sum", "fwd"), ("loop", "rev")])
def test_a_random_function_draws_what_it_draws(engine, mode):
    """The random state afterwards is that after ``func(x)``, on every call."""
    func = lambda x: x * torch.rand(x.shape, dtype=x.dtype)
    x = randn(B, 3)
    jacobian = batch_jacobian(func, engine=engine, mode=mode, randomness="different")
    for _ in range(5):
        state = torch.get_rng_state()
        func(x)
        expected = torch.get_rng_state()
        torch.set_rng_state(state)
        jacobian(x)
        assert torch.equal(torch.get_rng_state(), expected)


@every_route
def test_random_state_after_a_failure(engine, mode):
    def func(x):
        torch.rand(3)
        raise ValueError("mine")

    x = randn(B, 3)
    before = torch.get_rng_state()
    torch.rand(3)
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    with pytest.raises(ValueError, match="mine"):
        batch_jacobian(func, engine=engine, mode=mode, randomness="different")(x)
    state = torch.get_rng_state()
    assert torch.equal(state, before) or torch.equal(state, drawn)


# --- how often func runs -----------------------------------------------------------------


def counted(func):
    def call(*args):
        call.count += 1
        return func(*args)

    call.count = 0
    return call


def steady(jacobian, call, x):
    for _ in range(STEADY):
        jacobian(x)
    call.count = 0
    jacobian(x)
    return call.count


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("engine", "runs"), [("vmap", 1), ("sum", 1), ("loop", B)], ids=lambda value: str(value)
)
def test_reverse_mode_runs_func_once(engine, runs, grad, chunk_size):
    call = counted(lambda x: torch.stack([x.sin(), x.cos()], 1))
    jacobian = batch_jacobian(call, engine=engine, mode="rev", chunk_size=chunk_size)
    assert steady(jacobian, call, randn(B, 3).requires_grad_(grad)) == runs


@pytest.mark.parametrize(
    ("chunk_size", "engine", "runs"),
    [(None, "vmap", 1), (None, "sum", 1), (2, "sum", 2), (2, "vmap", 2), (1, "loop", 3 * B)],
)
def test_forward_mode_runs_func_once_a_pass(chunk_size, engine, runs):
    call = counted(lambda x: torch.stack([x.sin(), x.cos()], 1))
    jacobian = batch_jacobian(call, engine=engine, mode="fwd", chunk_size=chunk_size)
    assert steady(jacobian, call, randn(B, 3)) <= runs


def test_auto_runs_func_once_when_settled():
    call = counted(network())
    assert steady(batch_jacobian(call, mode="rev"), call, randn(B, 3)) == 1


@pytest.mark.parametrize("engine", ["vmap", "sum"])
@pytest.mark.parametrize(("grad", "most"), [(False, 2), (True, 3)])
def test_the_first_call_runs_func_twice(grad, most, engine):
    """Once for the probe and once for the result, and nothing more."""
    call = counted(lambda x: x.sin())
    batch_jacobian(call, engine=engine, mode="rev")(randn(B, 3).requires_grad_(grad))
    assert call.count <= most


@pytest.mark.parametrize("engine", ["vmap", "sum"])
def test_check_false_still_runs_func_itself_first(engine):
    """Its own errors are the user's, so it runs on the batch once; then no more than needed."""
    call = counted(lambda x: x.sin())
    jacobian = batch_jacobian(call, engine=engine, mode="rev", check=False)
    jacobian(randn(B, 3))
    assert call.count <= 2
    assert steady(jacobian, call, randn(B, 3)) == 1


@pytest.mark.parametrize("engine", ["vmap", "sum"])
def test_check_true_costs_one_run_more(engine):
    call = counted(lambda x: x.sin())
    jacobian = batch_jacobian(call, engine=engine, mode="rev", check=True)
    assert steady(jacobian, call, randn(B, 3)) == 2


def test_auto_settles():
    """No call after the first hundred runs func more often than the one before."""
    call = counted(network())
    jacobian = batch_jacobian(call)
    x = randn(B, 3)
    for _ in range(100):
        jacobian(x)
    counts = []
    for _ in range(5):
        call.count = 0
        jacobian(x)
        counts.append(call.count)
    assert len(set(counts)) == 1


def test_decisions_belong_to_one_transform():
    """Two transforms of one function know nothing of each other."""
    call = counted(lambda x: x.sin())
    x = randn(B, 3)
    first, second = (batch_jacobian(call, engine="sum", mode="rev") for _ in range(2))
    first(x)
    probed = call.count
    assert steady(first, call, x) == 1
    call.count = 0
    second(x)
    assert call.count == probed > 1


def test_memory_does_not_grow_with_signatures():
    jacobian = batch_jacobian(torch.sin, engine="sum", mode="rev", check=False)
    for batch in range(1, 400):
        jacobian(torch.ones(batch, 1))
    memory = jacobian.__funcjac__.memory
    assert len(memory.records) <= 256


def test_no_graph_or_batch_is_kept_alive():
    import gc
    import weakref

    net, x = network(), randn(B, 3)
    jacobian = batch_jacobian(net)
    for _ in range(3):
        jac = jacobian(x)
    found = [weakref.ref(x), weakref.ref(jac)]
    del x, jac
    gc.collect()
    assert [ref() for ref in found] == [None, None]
