"""A sample of the sweep over PyTorch's operators and modules, and the sweep itself on trial.

The whole is ``python -m tests.sweeps.coverage``; what it found is in ``docs/coverage.md``.
"""

import functools
import json
import os
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from funcjac import batch_hessian, batch_jacobian
from tests.oracles import SINCE_2_13
from tests.sweeps.coverage import page, run
from tests.sweeps.coverage.judge import (
    CRASH,
    DOCUMENTED,
    FAILURES,
    REFUSED,
    RIGHT,
    STATE,
    TORCH,
    WRONG,
    judge,
)
from tests.sweeps.coverage.oracle import truth_of
from tests.sweeps.coverage.reproductions import REPRODUCTIONS
from tests.sweeps.coverage.run import Sweep, load, records_of
from tests.sweeps.coverage.samples import Case, Parts, Skipped, Unit, rng_of, units
from tests.sweeps.coverage.transforms import HESSIAN, JACOBIAN, TRANSFORMS, Transform

SEED, SAMPLE = 4, 150
SLOW = {"op ormqr", "op pca_lowrank"}  # as long as forty others; the sweep has them
PROMISED = [transform for transform in TRANSFORMS if transform.promised]


@functools.cache
def sampled() -> list[Unit]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [unit for unit in units() if not unit.name.startswith(("op _", "nn.Lazy"))]
    drawn = [unit for unit in rng_of(SEED).sample(found, SAMPLE) if unit.name not in SLOW]
    return sorted(drawn, key=lambda unit: unit.name)


@pytest.mark.parametrize("number", range(SAMPLE - len(SLOW)))
def test_auto_is_right_where_the_loop_over_rows_is(number: int) -> None:
    unit = sampled()[number]  # to list all units takes seconds, which collecting need not
    records = list(records_of(unit, 1, SEED, transforms=PROMISED))
    assert records
    failed = [r for r in records if r.get("class") in FAILURES]
    assert not failed, json.dumps(failed, indent=1)


# --- the harness on trial ----------------------------------------------------------------


def case_of(row, *, module: nn.Module | None = None, unit: str = "made up") -> Case:
    """Three rows ``(2,)`` of ``row``, one after the other."""
    args = (torch.linspace(0.3, 1.7, 6, dtype=torch.float64).reshape(3, 2),)

    def func(x: Tensor) -> Tensor:
        return torch.stack([row(inputs) for inputs in x.unbind(0)])

    make = lambda: Parts(lambda x: (row(x),), func, module)
    return Case(unit, "0 stack", make, args, (0,), source="0")


def sine(x: Tensor) -> Tensor:
    return x.sin() * x.flip(0)


def judged(make, case: Case | None = None, **words) -> str:
    case = case or case_of(sine)
    words = {"promised": True, "calls": 2, **words}
    transform = Transform("trial", make, words.pop("kind", JACOBIAN), {}, **words)
    return judge(case, truth_of(case), transform).kind


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: t.name)
def test_every_transform_is_right_on_a_plain_function(transform: Transform) -> None:
    case = case_of(sine)
    assert judge(case, truth_of(case), transform).kind == RIGHT


def test_a_wrong_number_is_silently_wrong() -> None:
    assert judged(lambda f, a: lambda x: batch_jacobian(f, a)(x) * (1 + 1e-6)) == WRONG
    assert judged(lambda f, a: lambda x: batch_hessian(f, a)(x) * 0, kind=HESSIAN) == WRONG


def test_wrong_from_the_second_call_on_is_silently_wrong() -> None:
    def make(func, argnums):
        jac, seen = batch_jacobian(func, argnums), []
        return lambda x: seen.append(jac(x)) or seen[0]

    assert judged(make) == WRONG
    assert judged(make, calls=1) == RIGHT


def test_another_shape_or_structure_is_silently_wrong() -> None:
    assert judged(lambda f, a: lambda x: batch_jacobian(f, a)(x)[0]) == WRONG
    assert judged(lambda f, a: lambda x: (batch_jacobian(f, a)(x),)) == WRONG
    assert judged(lambda f, a: lambda x: batch_jacobian(f, a)(x).mT) == WRONG


def test_nan_is_silently_wrong() -> None:
    assert judged(lambda f, a: lambda x: batch_jacobian(f, a)(x) * float("nan")) == WRONG


def test_a_detached_jacobian_is_wrong_in_backward() -> None:
    make = lambda f, a: lambda x: batch_jacobian(f, a)(x).detach()
    assert judged(make) == RIGHT
    assert judged(make, backward=True) == WRONG


def test_changed_state_is_noticed() -> None:
    def with_effect(effect):
        def make(func, argnums):
            jac = batch_jacobian(func, argnums)

            def call(x):
                found = jac(x)
                effect(x)
                return found

            return call

        return make

    assert judged(with_effect(lambda x: None)) == RIGHT
    assert judged(with_effect(lambda x: x.add_(1))) == STATE
    assert judged(with_effect(lambda x: x.add_(0))) == STATE
    assert judged(with_effect(lambda x: x.requires_grad_())) == STATE
    assert judged(with_effect(lambda x: setattr(x, "grad", x.detach()))) == STATE
    assert judged(with_effect(lambda x: torch.rand(1))) == STATE


def test_a_changed_module_is_noticed() -> None:
    module = nn.Linear(2, 2).double()
    case = case_of(module, module=module)
    assert judged(batch_jacobian, case) == RIGHT

    def forgetful(func, argnums):
        return lambda x: [batch_jacobian(func, argnums)(x), setattr(module, "last", x)][0]

    assert judged(forgetful, case) == STATE


class Counting(nn.Module):
    """Counts its runs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x.sin()


def test_effects_of_one_plain_run_are_as_they_should_be_and_of_two_are_not() -> None:
    def make() -> Parts:
        module = Counting()
        return Parts(lambda x: (x.sin(),), module, module)

    counted = replace(case_of(sine), make=make)
    assert judged(batch_jacobian, counted) == RIGHT
    twice = lambda f, a: lambda x: [f(x), batch_jacobian(f, a)(x)][1]
    assert judged(twice, counted) == STATE
    none = lambda f, a: lambda x: torch.diag_embed(x.cos())
    assert judged(none, counted) == STATE


@pytest.mark.parametrize("inside", ["grad", "vmap"])
def test_what_is_wrong_inside_of_torch_func_is_silently_wrong(inside: str) -> None:
    assert judged(batch_jacobian, inside=inside) == RIGHT
    assert judged(lambda f, a: lambda x: batch_jacobian(f, a)(x) * 1.001, inside=inside) == WRONG
    detached = lambda f, a: lambda x: batch_jacobian(f, a)(x).detach()
    assert judged(detached, inside=inside) == (WRONG if inside == "grad" else RIGHT)


def test_inside_of_vmap_torch_itself_may_fail() -> None:
    def branching(x: Tensor) -> Tensor:
        return x.sin() if x.sum() > 0 else x.cos()

    def raising(func, argnums):
        return lambda x: func(x) / 0 if x.sum() > 0 else func(x)

    assert judged(raising, case_of(branching), inside="vmap") == DOCUMENTED
    assert judged(raising, inside="vmap") == CRASH


def test_odd_errors_are_crashes_and_promised_ones_are_not() -> None:
    def raising(error):
        def call(x):
            raise error

        return lambda func, argnums: call

    assert judged(raising(KeyError("odd"))) == CRASH
    assert judged(raising(RuntimeError("batch_jacobian: something happened"))) == CRASH
    promised = ValueError("batch_jacobian: expected one thing, got another. Do this.")
    assert judged(raising(promised)) == REFUSED
    assert judged(raising(promised), promised=False) == DOCUMENTED


def test_rows_that_mix_must_be_refused() -> None:
    mixing = replace(case_of(sine), independent=False)
    make = lambda: Parts(lambda x: (x,), lambda x: x - x.mean(0), None)
    mixing = replace(mixing, make=make)
    assert judged(batch_jacobian, mixing) == DOCUMENTED
    assert judged(functools.partial(batch_jacobian, check=False), mixing) == WRONG


class Deceptive(torch.autograd.Function):
    """The identity, with a gradient of two."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_differences_convict_plain_autograd() -> None:
    case = case_of(Deceptive.apply)
    truth = truth_of(case)
    assert "jacobian" in truth.wrong
    torch.testing.assert_close(
        truth.differences["jacobian"], torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    )
    assert judged(functools.partial(batch_jacobian, engine="sum"), case) == TORCH
    right = lambda f, a: lambda x: torch.eye(2, dtype=x.dtype).repeat(3, 1, 1)
    assert judged(right, case) == RIGHT
    assert judged(lambda f, a: lambda x: right(f, a)(x) * 3, case) == WRONG


def test_differences_acquit_plain_autograd_at_kinks_and_elsewhere() -> None:
    for row in (sine, torch.exp, lambda x: (x - x[0]).abs() + x, lambda x: x.round()):
        truth = truth_of(case_of(row))
        assert not truth.wrong


THERE = [case for case in REPRODUCTIONS if SINCE_2_13 or "linear_cross" not in case.code]


@pytest.mark.parametrize("case", THERE, ids=lambda case: case.name)
def test_plain_autograd_is_wrong_there(case) -> None:
    """Take it out of the list once a PyTorch release has mended it."""
    torch.manual_seed(0)
    words = {"torch": torch}
    exec(case.code, words)  # as the page shows it
    f = words["f"]
    made = case_of(lambda z: f(z).reshape(-1), unit=case.name)
    truth = truth_of(replace(made, args=(words["x"].unsqueeze(0),)))
    assert list(truth.wrong) == [["jacobian", "hessian"][case.order - 1]]


def unit_of(name: str, row) -> Unit:
    return Unit(name, lambda samples, seed: iter([case_of(row, unit=name)]))


def dying(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and not _in_oracle():
        os._exit(11)
    return x.sin()


def _in_oracle() -> bool:
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "tests.sweeps.coverage.oracle":
            return True
        frame = frame.f_back
    return False


def hanging(x: Tensor) -> Tensor:
    if not _in_oracle():
        time.sleep(60)
    return x.sin()


def test_dead_and_hanging_children_are_crashes(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "PATIENCE", 1.0)
    path = tmp_path / "results.jsonl"
    found = [unit_of("dying", dying), unit_of("hanging", hanging), unit_of("fine", sine)]
    found.append(Unit("none", lambda samples, seed: iter([Skipped("none", "", "no samples")])))
    Sweep(path, 1, 0, 2, TRANSFORMS[:1]).run(found)
    kinds = {r["unit"]: r["class"] for r in load(path) if "class" in r}
    assert kinds == {"dying": CRASH, "hanging": CRASH, "fine": RIGHT}
    size = path.stat().st_size
    Sweep(path, 1, 0, 2, TRANSFORMS[:1]).run(found)  # nothing is left to do
    assert path.stat().st_size == size
    text = page.write(load(path))
    assert "| dying | 0 stack | batch_jacobian | crash | the process died" in text
    assert "| no samples | 1 |" in text


def test_a_sweep_goes_on_where_it_was_cut(tmp_path) -> None:
    path = tmp_path / "results.jsonl"
    Sweep(path, 1, 0, 1, TRANSFORMS[:3]).run([unit_of("fine", sine)])
    lines = path.read_text().splitlines()
    kept = [line for line in lines if '"class"' in line][:2]
    path.write_text("\n".join(kept) + '\n{"unit": "fi')  # as a kill leaves it
    path.write_text(path.read_text() + "\n")
    Sweep(path, 1, 0, 1, TRANSFORMS[:3]).run([unit_of("fine", sine)])
    names = [r["transform"] for r in load(path) if "class" in r]
    assert names == [transform.name for transform in TRANSFORMS[:3]]
    Sweep(path, 1, 0, 1, TRANSFORMS[:4]).run([unit_of("fine", sine)])  # a column more
    names = [r["transform"] for r in load(path) if "class" in r]
    assert names == [transform.name for transform in TRANSFORMS[:4]]
