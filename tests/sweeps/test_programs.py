"""Random programs through every transform, engine and mode, against rows in plain autograd.

``python -m tests.sweeps.programs --minutes 10 --seed 1`` looks further.
"""

import optree
import pytest
import torch

from tests.sweeps.programs import check as checking
from tests.sweeps.programs.check import Check, expected, run
from tests.sweeps.programs.generate import generate
from tests.sweeps.programs.program import Input, Program, Step
from tests.sweeps.programs.search import search
from tests.sweeps.programs.shrink import shrink
from tests.sweeps.programs.steps import MIXING, STEPS

SEED, SECONDS, SHARE = 0, 12, 0.2


def test_random_programs_are_differentiated_right() -> None:
    tally = search(SEED, SECONDS, share=SHARE)
    report = [f"# {f.kind}: {f.text}\n{f.reproducer()}" for f in tally.failures]
    assert not tally.failures, "\n".join(report)
    assert tally.checks > 0


# --- the tool itself -----------------------------------------------------------------------


def program(*lines: str, mixing: bool = False) -> Program:
    steps = [Step("test", f"v{i}", (f"v{i} = {line}",)) for i, line in enumerate(lines)]
    steps[-1] = Step("test", steps[-1].name, steps[-1].body, mixing=mixing)
    return Program(0, (Input("x", (3,)),), tuple(steps), steps[-1].name)


CUBE = program("x.sin()", "x / 2", "v1 ** 3")


def test_a_seed_gives_one_program() -> None:
    one, other = (generate(7) for _ in range(2))
    assert one is not None
    assert one == other
    assert one.source() != generate(8).source()


def test_steps_of_every_kind_are_drawn() -> None:
    kinds = set()
    for seed in range(250):
        made = generate(seed)
        kinds |= {step.kind for step in made.steps} if made is not None else set()
    missing = ({*STEPS} | {*MIXING}) - kinds
    assert not missing


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ("batch_jacobian", {}),
        ("batch_jacobian", {"nested": True}),
        ("batch_jacobian", {"backward": True}),
        ("batch_hessian", {}),
        ("batch_hessian_diagonal", {}),
        ("batch_laplacian", {}),
        ("batch_partials", {"indices": ((0,), (1, 2), (0, 0, 0))}),
        ("batch_divergence", {}),
    ],
)
def test_a_wrong_factor_is_found(transform, words, monkeypatch) -> None:
    check = Check(transform, **words)
    assert run(CUBE, check) is None

    right = checking.right_by_rows

    def wrong(*args):
        return optree.tree_map(lambda x: x * 1.0001, right(*args))

    expected.cache_clear()
    monkeypatch.setattr(checking, "right_by_rows", wrong)
    monkeypatch.setattr(checking, "third", lambda *args: wrong(CUBE, check, *args[2:]))
    failure = run(CUBE, check)
    expected.cache_clear()
    assert failure is not None
    assert failure.kind == "wrong"


def test_what_plain_autograd_has_wrong_is_not_the_yardstick() -> None:
    summed = program("x.logcumsumexp(1)", "torch.stack([v0 * 2, v0.cos()], -1)")
    for words in ({"engine": "vmap", "mode": "fwd"}, {}):
        check = Check("batch_jacobian", tuple(words.items()), backward=True)
        assert run(summed, check) is None


def test_rows_that_mix_must_be_refused(monkeypatch) -> None:
    mixed = program("x - x.mean(0)", mixing=True)
    check = Check("batch_jacobian")
    assert run(mixed, check) is None
    monkeypatch.setattr(Check, "make", lambda *_: lambda x: x)
    failure = run(mixed, check)
    assert failure is not None
    assert failure.kind == "mixing"


def test_a_change_of_the_callers_tensors_is_found(monkeypatch) -> None:
    monkeypatch.setattr(Check, "make", lambda *_: lambda x: x.add_(1))
    failure = run(CUBE, Check("batch_jacobian"))
    assert failure is not None
    assert failure.kind == "state"


def test_a_failure_is_made_short_and_stands_alone(monkeypatch) -> None:
    long = program("x.sin()", "v0 * 2", "v1.cos()", "v0 ** 3")
    monkeypatch.setattr(checking, "difference", lambda *args: "off by much")
    failure = run(long, Check("batch_jacobian", points=(0, 1)))
    assert failure is not None
    short = shrink(failure)
    assert len(short.program.steps) == 1
    assert len(short.check.points) == 1
    exec(short.reproducer(), {"print": lambda *_: None, "__name__": "reproducer"})


@pytest.fixture(autouse=True)
def _default_dtype():
    """The reproducer sets it, as a script may."""
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)
