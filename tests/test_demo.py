"""The README and the pages of the docs run, and so does ``python -m funcjac``."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from funcjac import batch_jacobian
from funcjac._demo.demonstration import digits, make_networks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# What the blocks of a page import beside the library's own dependencies; see ``make clients``.
IMPORTED = {"clients": ("laplace", "deepxde", "scipy")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_in_order(page, capsys, monkeypatch):
    monkeypatch.setenv("DDE_BACKEND", "pytorch")  # DeepXDE reads it when it is imported
    for library in IMPORTED.get(page.stem, ()):
        pytest.importorskip(library, reason=f"{library} is not installed: make clients")
    blocks = _blocks(page.read_text("utf-8"))
    torch.manual_seed(0)
    scope = {}
    checked = 0
    for block in blocks:
        if "aoti_compile_and_package" in block:  # takes a minute: tests/dispatch/test_compiled.py
            continue
        exec(compile(block, page.name, "exec"), scope)
        checked += _check_shapes(block, scope)
    printed = capsys.readouterr().out
    for found in re.findall(r"^ *print\(.*\)  # \.\.\. (.*)$", "".join(blocks), re.MULTILINE):
        assert found.removesuffix(" ...") in printed, found
    if page.name == "README.md":
        assert len(blocks) > 8
        assert checked > 8
        assert "BatchNorm1d in training mode" in printed


def test_pages_with_blocks_are_found():
    with_blocks = [page.name for page in PAGES if _blocks(page.read_text("utf-8"))]
    assert {"README.md", "engines.md", "verification.md"} <= set(with_blocks)
    assert {"architecture.md", "keywords.md", "recipes.md", "taylor.md"} <= set(with_blocks)


def _blocks(text):
    """Blocks of Python; blank lines before each make line numbers those of the page."""
    return [
        "\n" * text[: found.start(1)].count("\n") + found[1]
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


def _check_shapes(block, scope):
    """Hold lines such as ``x.shape  # (3, 10)`` against what comes out, and count them."""
    found = re.findall(r"^(\S.*\.shape) +# (\([\d, ()]+\))", block, re.MULTILINE)
    for expression, said in found:
        shapes = eval(expression, scope)
        single = isinstance(shapes, torch.Size)
        assert (tuple(shapes) if single else tuple(map(tuple, shapes))) == eval(said), expression
    return len(found)


def test_readme_shows_every_folder_of_the_package():
    text = (ROOT / "README.md").read_text("utf-8")
    folders = {path.parent.name for path in (ROOT / "funcjac").glob("_*/__init__.py")}
    shown = set(re.findall(r"`funcjac/(\w+)/`", text))
    assert shown == folders - {"__pycache__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#\s]+)\)", prose)
    missing = [link for link in links if ":" not in link and not (page.parent / link).exists()]
    assert missing == []
    assert page.name != "README.md" or len(links) > 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_named_files_exist(page):
    """Paths such as ``benchmarks/rule.py``; a recipe names a new file."""
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`((?:\w+/)+\w+\.py)", prose)) - {"funcjac/_operators/row_sums.py"}
    roots = (ROOT, ROOT / "funcjac")
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert missing == []
    assert page.stem != "architecture" or len(named) > 4


def test_every_keyword_has_a_section():
    page = (ROOT / "docs" / "keywords.md").read_text("utf-8")
    shown = dict(re.findall(r"^## (\w+) = (.+)$", page, re.MULTILINE))
    parameters = list(inspect.signature(batch_jacobian).parameters.values())[1:]
    assert list(shown) == [parameter.name for parameter in parameters]
    assert {p.name: p.default for p in parameters} == {k: eval(v) for k, v in shown.items()}


def test_readme_is_short():
    assert 150 <= len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 200


def test_digits():
    images, labels = digits()
    assert images.shape == (256, 1, 8, 8)
    assert labels.shape == (256,)
    assert (images.min(), images.max()) == (0, 1)
    assert torch.equal(images * 16, (images * 16).round())
    assert labels.bincount().tolist() == [26, 26, 26, 26, 25, 26, 25, 25, 26, 25]
    assert labels[:5].tolist() == [0, 1, 2, 3, 4]
    for net in make_networks().values():
        assert net(images).shape == (256, 10)


@pytest.fixture(scope="module")
def demo():
    """What the demonstration prints, as a user without a terminal sees it."""
    done = subprocess.run(
        [sys.executable, "-m", "funcjac"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_demo_answers_the_question(demo):
    for call, shape in {
        "autograd.functional.jacobian(net, x)": "(3, 10, 3, 5)",
        "batch_jacobian(net)(x)": "(3, 10, 5)",
        "batch_jacobian(batch_jacobian(net))(x)": "(3, 10, 5, 5)",
    }.items():
        assert re.search(rf"^{re.escape(call)} +{re.escape(shape)} ", demo, re.MULTILINE)
    differences = re.findall(r"(\S+) from the loop", demo.partition("2. ")[0])
    assert len(differences) == 2
    assert all(float(difference) < 1e-6 for difference in differences)


def test_demo_tables(demo):
    convolutional, lstm = demo.split("\n2. ")[1].split("\n3. ")
    found, failed = _rows(convolutional)
    assert not failed
    assert len(found) == 5  # and the loop, which is the reference
    found, failed = _rows(lstm)
    assert "funcjac.batch_jacobian" in found
    assert "vmap(jacfwd)" in failed
    for section in (convolutional, lstm):
        assert "Warning" not in section.partition("funcjac.batch_jacobian")[2]
        assert "(128, 10, 1, 8, 8)" in section
        assert "engine='sum', mode='rev'" in section
        assert "func runs once" in section
        assert "verified against a plain VJP" in " ".join(section.split())


def _rows(section):
    """Largest differences of the ways that worked, and the errors of those that did not."""
    largest = float(re.search(r"entries up to (\S+)", section)[1])
    pattern = r"^(\S.*?)  +[\d.]+ m?s +[\d.]+ MiB +(\S+)$"
    rows = dict(re.findall(pattern, section, re.MULTILINE))
    assert rows.pop("loop over rows") == "reference"
    found = {name: float(difference) for name, difference in rows.items()}
    assert all(difference < 1e-5 * largest for difference in found.values()), found
    failed = dict(re.findall(r"^(\S.*?)  +(\w+Error: .+)$", section, re.MULTILINE))
    return found, failed


def test_demo_is_tidy(demo):
    lines = demo.split("\n")
    assert [line for line in lines if len(line) > 100 or line != line.rstrip()] == []
    assert "\r" not in demo
