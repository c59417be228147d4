"""``docs/compiled_functions.md`` is true: a sample of its rows, and its counts."""

import re

import pytest
import torch

from tests.cases import first_order, second_order
from tests.cases.case import Case
from tests.sweeps import compiled

FIRST, SECOND = (
    dict(re.findall(r"^\| `(\w+)` \| (\w+) \|$", part, re.M))
    for part in compiled.PAGE.read_text("utf-8").split("## Second derivatives")
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("_fresh_compiler"),
]


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def by_name(cases: list[Case]):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def test_every_function_has_a_row_and_none_is_wrong():
    assert {case.name for case in first_order.CASES} == set(FIRST)
    assert len(SECOND) > 150
    cells = [*FIRST.values(), *SECOND.values()]
    assert set(cells) <= {"right", *compiled.REASONS}
    assert cells.count("right") > 0.8 * len(cells)


def test_refusals_are_documented():
    """Each reason on the page stands in ``docs/compile.md``, where its remedy is."""
    page = (compiled.PAGE.parent / "compile.md").read_text("utf-8")
    used = {*FIRST.values(), *SECOND.values()} - {"right"}
    assert used
    assert [reason for reason in used if f"`{reason}`" not in page] == []


@by_name(first_order.CASES[::12])
def test_first_derivatives(case):
    assert compiled.first_derivatives(case) == FIRST[case.name]


@by_name([case for case in second_order.CASES if case.name in SECOND][::18])
def test_second_derivatives(case):
    assert compiled.second_derivatives(case, "diagonal") == SECOND[case.name]
