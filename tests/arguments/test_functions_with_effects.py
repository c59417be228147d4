"""Functions with side effects: each call changes what one plain call would."""

import copy

import pytest
import torch
from torch import nn

from funcjac import BatchMixingError, VerificationError
from tests.tensors import quiet, randn
from tests.watched import (
    CALLS,
    SPOKEN,
    TRANSFORMS,
    B,
    Watched,
    by_name,
    close,
    of_process,
    unchanged,
)

ENGINES = ("auto", "vmap", "sum", "loop")


class Moves(nn.Module):
    """Changes what it holds and what it is given, in every way there is."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3, 3).double()
        self.register_buffer("total", torch.zeros(3).double())
        self.last, self.seen, self.by_name = None, [], {}

    def forward(self, x):
        if self.how == "buffer":
            self.total += x.detach().mean(0)
        elif self.how == "reassigned":
            self.total = self.total + 1
        elif self.how == "new buffer":
            self.register_buffer("other", torch.ones(3))
        elif self.how == "attribute":
            self.last = x
        elif self.how == "list":
            self.seen.append(x)
        elif self.how == "dict":
            self.by_name["x"] = x
        elif self.how == "training":
            self.train(not self.training)
        elif self.how == "hook":
            self.linear.register_forward_hook(lambda *args: None)
        elif self.how == "parameter":
            with torch.no_grad():
                self.linear.weight *= 1.0
                self.linear.bias += 1
                self.linear.bias -= 1
        elif self.how == "requires_grad":
            self.linear.bias.requires_grad_(False)
        return self.linear(x).tanh()


HOWS = ("buffer", "reassigned", "new buffer", "attribute", "list", "dict", "training", "hook")


def held(module):
    """As ``of_module``, but a version may move where a value is put back."""
    return [
        (
            sorted(vars(m)),
            m.training,
            len(m._forward_hooks),
            [(t.requires_grad, t.tolist()) for t in (*m.parameters(), *m.buffers())],
            [len(v) for v in vars(m).values() if isinstance(v, (list, dict))],
        )
        for m in module.modules()
    ]


@by_name
@pytest.mark.parametrize("how", [*HOWS, "parameter", "requires_grad"])
def test_a_module_changes_as_in_one_plain_run(how, name):
    """Each call changes it as one plain call would."""
    module, x = Moves(how), randn(B, 3)
    plain, process = copy.deepcopy(module), of_process()
    transformed = TRANSFORMS[name](module)
    expected = TRANSFORMS[name](lambda x: module.linear(x).tanh())(x)
    for _ in range(4):
        close(transformed(x), expected)
        plain(x)
        assert held(module) == held(plain)
        assert of_process() == process


@by_name
@pytest.mark.parametrize(
    "draw", [lambda x: torch.rand(1), lambda x: torch.randn_like(x), lambda x: torch.manual_seed(3)]
)
def test_random_state_is_as_after_one_plain_run(draw, name):
    """Or sets a seed: the random state afterwards is that after a plain call."""
    func, x = Watched(lambda x: (draw(x), x.sin())[1]), randn(B, 3)
    transformed, right = TRANSFORMS[name](func), TRANSFORMS[name](torch.sin)(x)
    for _ in range(3):
        state = torch.get_rng_state()
        draw(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        close(transformed(x), right)
        assert torch.equal(torch.get_rng_state(), after)


@quiet
@by_name
@pytest.mark.parametrize("work", [lambda x: x.mul_(2), lambda x: x.t_().t_(), torch.relu_])
@pytest.mark.parametrize("engine", ENGINES)
def test_work_in_place_spares_the_input(engine, work, name):
    func, x = Watched(lambda x: work(x).sin()), randn(B, 3)
    x += 0.1 * x.sign()  # no kink at zero
    before, right = x.clone(), TRANSFORMS[name](lambda x: work(x.clone()).sin())(x)
    transformed = TRANSFORMS[name](func, engine=engine)
    for _ in range(3):
        close(transformed(x), right)
        assert torch.equal(x, before)
        assert x.stride() == before.stride()
        assert not x.requires_grad


@by_name
def test_records_of_the_user_have_one_entry_for_each_call(name):
    """What func counts and keeps has one entry for each call."""
    seen, counts = [], {"runs": 0}

    def func(x):
        counts["runs"] += 1
        seen.append(x.shape)
        return x.sin()

    x, transformed = randn(B, 3), TRANSFORMS[name](func)
    for calls in range(1, 4):
        close(transformed(x), TRANSFORMS[name](torch.sin)(x))
        assert counts["runs"] == len(seen) == calls


@quiet
@by_name
def test_settings_of_the_process_are_put_back_as_func_does(name):
    """Switches that func flips are its own, and it does with them what it would by itself."""

    def func(x):
        with torch.no_grad(), torch.random.fork_rng():
            torch.rand(3)
        return x.sin()

    x = randn(B, 3)
    before = of_process()
    close(TRANSFORMS[name](func)(x), TRANSFORMS[name](torch.sin)(x))
    assert of_process() == before


def test_rows_that_mix_change_nothing_of_the_process():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(), randn(B, 3)
    for name, call in CALLS.items():
        if name == "check_derivative":
            continue  # it compares, and does not judge rows
        process = of_process()
        with pytest.raises(BatchMixingError, match=f"^{SPOKEN.get(name, name)}: .*1: BatchNorm1d"):
            call(net)(x)
        assert of_process() == process


def test_what_autograd_cannot_see_changes_nothing():
    for name in TRANSFORMS:
        func, x = Watched(lambda x: torch.from_numpy(x.detach().numpy()).sin()), randn(B, 3)
        with unchanged(func, [x]), pytest.raises(VerificationError, match=f"^{name}: "):
            TRANSFORMS[name](func)(x)
