"""The recipe "Add a transform" of docs/architecture.md, followed step by step."""

import pickle
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from funcjac import (
    BatchMixingError,
    VerificationError,
    batch_jacobian,
    check_derivative,
    explain,
)

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
MODULE = "funcjac._operators.row_sums"
ROUTES = [(e, m) for e in ("sum", "vmap", "loop", "auto") for m in ("rev", "fwd", "auto")]
by_route = pytest.mark.parametrize(("engine", "mode"), ROUTES)
B = 4


def recipe():
    """The text of the section, and its blocks by language."""
    text = PAGE.read_text("utf-8").partition("## Add a transform\n")[2].partition("\n## ")[0]
    return text, re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def public():
    """What ``funcjac`` exports once the recipe is followed."""
    text, blocks = recipe()
    file = next(code for language, code in blocks if language == "python")
    line = next(code for language, code in blocks if language == "text")
    assert f"`{MODULE.replace('.', '/')}.py`" in text
    module = types.ModuleType(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, MODULE, module)
        exec(compile(file, str(PAGE), "exec"), vars(module))
        names = {}
        exec(line, names)
        yield types.SimpleNamespace(**names, RowSums=module.RowSums, module=module)


def test_the_tables_of_the_third_step_exist():
    step = recipe()[0].partition("**3. The tests**")[2].partition("**4.")[0]
    tables = re.findall(r"`([A-Z]+)`", step)
    assert len(tables) == 3
    texts = [path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    for table in tables:
        assert any(re.search(rf"^{table} = ", text, re.MULTILINE) for text in texts), table


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def equal(result, expected, tolerance=1e-9):
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def weight():
    return randn(3, 5)


@by_route
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_closed_form(public, weight, engine, mode, chunk_size):
    """``d (sin(x) A)_o / d x_i = cos(x_i) A_io``."""
    x, keywords = randn(B, 3), dict(engine=engine, mode=mode, chunk_size=chunk_size)
    transform = public.batch_row_sums(lambda x: x.sin() @ weight, **keywords)
    for _ in range(3):
        equal(transform(x), x.cos() @ weight)


@pytest.mark.parametrize("size", [0, 1, 6])
@pytest.mark.parametrize("batch", [0, 1, B])
def test_sizes(public, batch, size):
    x = randn(batch, size)
    equal(public.batch_row_sums(lambda x: x.square().sum(1))(x), 2 * x.sum(1))
    equal(public.batch_row_sums(torch.sin)(x), x.cos())


def test_numbers_as_samples(public):
    x = randn(B)
    equal(public.batch_row_sums(torch.sin)(x), x.cos())


@by_route
def test_sums_run_over_all_inputs(public, engine, mode):
    x, tree = randn(B, 3), {"y": randn(2, B), "z": randn(B)}
    func = lambda x, tree: {
        "out": (x.square().sum(1) * tree["z"] + tree["y"].exp().sum(0)).unsqueeze(1)
    }
    dims = (0, {"y": 1, "z": 0})
    transform = public.batch_row_sums(func, (0, 1), in_dims=dims, engine=engine, mode=mode)
    by_x, by_z, by_y = 2 * x.sum(1) * tree["z"], x.square().sum(1), tree["y"].exp().sum(0)
    equal(transform(x, tree)["out"], (by_x + by_z + by_y).unsqueeze(1))


@pytest.mark.parametrize("engine", ["vmap", "loop", "auto"])
def test_shared_argument(public, weight, engine):
    x = randn(B, 3)
    transform = public.batch_row_sums(torch.matmul, 1, in_dims=(0, None), engine=engine)
    equal(transform(x, weight), x.sum(1, keepdim=True).expand(B, 5))


def test_value_and_aux(public):
    x = randn(B, 3)
    func = lambda x: (x.sin(), "note")
    keywords = dict(has_aux=True, return_value=True)
    sums, (value, aux) = public.batch_row_sums(func, **keywords)(x)
    equal(sums, x.cos())
    equal(value, x.sin())
    assert aux == "note"


def test_out_dims(public):
    x = randn(B, 3)
    equal(public.batch_row_sums(lambda x: x.sin().T, out_dims=1)(x), x.cos())


@by_route
def test_the_result_can_be_differentiated(public, weight, engine, mode):
    x = randn(B, 3).requires_grad_()
    transform = public.batch_row_sums(lambda x: x.sin() @ weight, engine=engine, mode=mode)
    (grad,) = torch.autograd.grad(transform(x).sum(), x)
    equal(grad, -x.sin().detach() * weight.sum(1))


def test_transforms_nest(public, weight):
    x = randn(B, 3)
    sums = public.batch_row_sums(lambda x: x.sin() @ weight)
    equal(batch_jacobian(sums)(x), -x.sin().unsqueeze(1) * weight.T)
    equal(torch.vmap(sums)(x.unsqueeze(0))[0], x.cos() @ weight)
    equal(torch.func.grad(lambda x: sums(x).sum())(x), -x.sin() * weight.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_func_runs_once_and_the_result_is_verified(public, dtype):
    net = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5)).to(dtype)
    x = randn(B, 3, dtype=dtype)
    report = explain(public.batch_row_sums(net), x)
    assert (report.engine, report.runs, report.verified) == ("sum", 1, True)
    expected = batch_jacobian(net)(x).sum(2)
    equal(public.batch_row_sums(net, check=True)(x), expected, 1e-5)


def test_samples_that_mix_are_refused(public):
    with pytest.raises(BatchMixingError, match=r"^batch_row_sums: "):
        public.batch_row_sums(lambda x: x.sin() * x.sum(0))(randn(B, 3))


@pytest.mark.parametrize("shared", [False, True])
def test_a_wrong_result_is_refused(public, weight, shared, monkeypatch):
    """The entries see a factor in any block."""
    summed = public.module._summed
    monkeypatch.setattr(public.module, "_summed", lambda *args: [1.01 * summed(*args)[0]])
    engine = "vmap" if shared else "sum"
    transform = public.batch_row_sums(torch.matmul, int(shared), in_dims=(0, None), engine=engine)
    with pytest.raises(VerificationError, match="with a random cotangent is off by"):
        transform(randn(B, 3), weight)


class Halved(torch.autograd.Function):
    """Twice its input, with half of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_central_differences(public):
    x = randn(B, 3)
    assert check_derivative(public.batch_row_sums(lambda x: x.prod(1).sin()), x).ok
    assert not check_derivative(public.batch_row_sums(Halved.apply), x).ok


def curve(x):
    return x.sin()


def test_it_is_printed_and_pickled(public):
    x, transform = randn(B, 3), public.batch_row_sums(curve, chunk_size=2)
    assert repr(transform) == "batch_row_sums(curve, chunk_size=2)"
    equal(pickle.loads(pickle.dumps(transform))(x), x.cos())
