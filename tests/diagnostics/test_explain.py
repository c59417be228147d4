"""``explain``, ``check_batched`` and ``check_derivative``: what they tell."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import funcjac
from funcjac import batch_jacobian, check_batched, check_derivative, explain
from tests.cases.modules import WrongBackward
from tests.fresh import Counted
from tests.tensors import randn

B = 4
ENGINES, MODES = ("vmap", "sum", "loop"), ("fwd", "rev")
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def network():
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    return net.requires_grad_(False)


def branches(x):
    return x.sin() if bool((x > -100).all()) else x


# --- explain -----------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(("engine", "mode"), list(itertools.product(ENGINES, MODES)))
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_explain_names_what_runs(chunk_size, engine, mode):
    jacobian = batch_jacobian(network(), engine=engine, mode=mode, chunk_size=chunk_size)
    found = explain(jacobian, randn(B, 3))
    assert isinstance(found, funcjac.Explanation)
    assert (found.name, found.engine, found.mode) == ("batch_jacobian", engine, mode)
    assert (found.batch, found.outputs, found.inputs) == (B, 5, 3)
    passes = 5 if mode == "rev" else 3
    assert found.passes == passes
    assert 1 <= found.chunk <= (chunk_size or passes)
    assert found.verified
    assert not found.differentiable
    assert found.attempts == ()
    assert found.runs >= 1


@pytest.mark.parametrize("mode", ["auto", *MODES])
def test_explain_tells_what_later_calls_do(mode):
    net = network()
    func = Counted(net)
    jacobian, x = batch_jacobian(func, mode=mode), randn(B, 3)
    found = explain(jacobian, x)
    assert func.rows == [B] * found.runs
    func.rows.clear()
    jacobian(x)
    assert func.rows == [B]
    again = explain(jacobian, x)
    assert (again.engine, again.mode, again.passes) == (found.engine, found.mode, found.passes)


@pytest.mark.quick
def test_explain_counts_runs_and_operations():
    few, many = (explain(batch_jacobian(func), randn(B, 3)) for func in (torch.sin, network()))
    assert few.runs == many.runs == 1
    assert 1 <= few.operations < many.operations < 50
    assert few.widest == B * 3 < many.widest


def test_explain_says_when_there_was_a_second_run():
    """Of shared arguments there is no derivative for each row in the graph of the batch."""
    func = Counted(lambda w, x: (w * x).sin())
    found = explain(batch_jacobian(func, in_dims=(None, 0)), randn(3), randn(B, 3))
    assert found.engine == "vmap"
    assert found.runs == func.count > 1
    assert any("share" in reason for reason in found.reasons)


def test_explain_changes_no_result():
    jacobian, x = batch_jacobian(network()), randn(B, 3)
    before = jacobian(x)
    explain(jacobian, x)
    assert torch.equal(jacobian(x), before)


@pytest.mark.parametrize("what", ["x", "module", "nothing", "no_grad"])
def test_explain_tells_whether_there_is_a_graph(what):
    net = network().requires_grad_(what in ("module", "no_grad"))
    with torch.set_grad_enabled(what != "no_grad"):
        found = explain(batch_jacobian(net), randn(B, 3).requires_grad_(what == "x"))
    assert found.differentiable == (what in ("x", "module"))


def test_explain_without_verification():
    found = explain(batch_jacobian(network(), check=False), randn(B, 3))
    assert not found.verified
    assert "not verified (check=False)" in str(found)


def test_explain_under_inference_mode():
    net = network()
    with torch.inference_mode():
        found = explain(batch_jacobian(net), randn(B, 3))
    assert not found.differentiable


@quiet
def test_explain_names_the_exception_that_ruled_an_engine_out():
    func = lambda w, x: branches(w * x)
    found = explain(batch_jacobian(func, in_dims=(None, 0)), randn(3), randn(B, 3))
    assert found.engine == "loop"
    assert any("vmap" in reason and "RuntimeError" in reason for reason in found.reasons)
    assert "RuntimeError" in str(found)


def test_reasons_are_words():
    found = explain(batch_jacobian(network()), randn(B, 3))
    assert isinstance(found.reasons, tuple)
    assert all(isinstance(reason, str) and reason for reason in found.reasons)


def test_explain_measures_if_it_is_told_to():
    found = explain(batch_jacobian(network()), randn(B, 3), measure=True)
    assert len(found.attempts) >= 2
    for attempt in found.attempts:
        assert attempt.engine in ENGINES
        assert attempt.mode in MODES
        assert attempt.chunk_size is None or attempt.chunk_size >= 1
        assert attempt.seconds is None or attempt.seconds > 0
    assert any(attempt.seconds is not None for attempt in found.attempts)
    best = min((a for a in found.attempts if a.seconds is not None), key=lambda a: a.seconds)
    assert best.engine in str(found)


def test_measuring_changes_no_later_result():
    jacobian, x = batch_jacobian(network()), randn(B, 3)
    before = jacobian(x)
    explain(jacobian, x, measure=True)
    assert torch.equal(jacobian(x), before)


def test_explain_counts_floating_point_operations():
    """Two products with a weight, ``(B, n) @ (n, m)``, and their pullbacks of the whole basis."""
    net = nn.Linear(3, 5, bias=False).double().requires_grad_(False)
    found = explain(batch_jacobian(net, engine="sum", mode="rev"), randn(B, 3))
    forward = 2 * B * 3 * 5
    assert found.flops == forward + 5 * forward
    bigger = explain(batch_jacobian(net, engine="sum", mode="rev"), randn(2 * B, 3))
    assert bigger.flops == 2 * found.flops


def test_explain_estimates_memory():
    found = explain(batch_jacobian(network(), engine="vmap", mode="rev"), randn(B, 3))
    assert found.memory >= B * 5 * 3 * 8  # the result itself
    bigger = explain(batch_jacobian(network(), engine="vmap", mode="rev"), randn(100 * B, 3))
    assert 50 * found.memory < bigger.memory < 200 * found.memory


def test_chunks_bound_the_memory():
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    net.requires_grad_(False)
    words = {"engine": "vmap", "mode": "rev"}
    x = randn(64, 3)
    whole = explain(batch_jacobian(net, **words), x)
    chunked = explain(batch_jacobian(net, chunk_size=4, **words), x)
    assert whole.chunk == 64
    assert chunked.chunk <= 4
    assert chunked.memory < whole.memory / 2


def test_explain_prints_what_it_holds():
    found = explain(batch_jacobian(network(), mode="rev"), randn(B, 3))
    lines = str(found).splitlines()
    assert lines[0].startswith("batch_jacobian: batch of 4, 3 inputs -> 5 outputs")
    assert f"engine='{found.engine}', mode='rev': 5 passes" in str(found)
    assert "FLOP" in str(found)
    assert max(map(len, lines)) <= 250


def test_explain_is_frozen():
    found = explain(batch_jacobian(torch.sin), randn(B, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.engine = "loop"


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)], ids=str)
def test_explain_of_nothing(shape):
    found = explain(batch_jacobian(torch.sin), randn(*shape))
    assert (found.batch, found.inputs) == shape


def test_explain_with_all_the_words():
    func = lambda p, x, scale: ({"y": (p["w"] * x.T).sin() * scale}, "aux")
    jacobian = batch_jacobian(
        func, (1, 0), in_dims=(None, 1), has_aux=True, return_value=True, randomness="same"
    )
    found = explain(jacobian, {"w": randn(3)}, randn(3, B), scale=2.0)
    assert (found.batch, found.outputs, found.inputs) == (B, 3, 6)


def test_explain_of_two_levels():
    found = explain(batch_jacobian(batch_jacobian(network())), randn(B, 3))
    assert (found.batch, found.outputs, found.inputs) == (B, 15, 3)


def test_explain_raises_what_the_call_raises():
    with pytest.raises(funcjac.BatchMixingError):
        explain(batch_jacobian(lambda x: x - x.mean(0)), randn(B, 3))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        explain(batch_jacobian(torch.sin), torch.ones(B, 3).long())


# --- check_batched -----------------------------------------------------------------------


def test_check_batched_returns_nothing():
    assert check_batched(torch.sin, randn(B, 3)) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_check_batched_in_every_dtype(dtype):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).to(dtype)
    check_batched(net, torch.randn(B, 3).to(dtype))
    with pytest.raises(funcjac.BatchMixingError):
        check_batched(lambda x: x - x.mean(0), torch.randn(B, 3).to(dtype))


def test_check_batched_with_trees_and_words():
    func = lambda tree, w, *, scale: {"y": tree["x"].T @ w * scale, "z": tree["i"] * 1.0}
    tree = {"x": randn(3, B), "i": torch.arange(B)}
    in_dims = ({"x": 1, "i": 0}, None)
    check_batched(func, tree, randn(3, 2), in_dims=in_dims, scale=2.0)
    mixing = lambda tree, w, *, scale: func(tree, w, scale=scale)["y"] + tree["i"].sum()
    with pytest.raises(funcjac.BatchMixingError):
        check_batched(mixing, tree, randn(3, 2), in_dims=in_dims, scale=2.0)


def test_check_batched_of_integers_only():
    table = nn.Embedding(10, 3).double()
    check_batched(table, torch.arange(B))
    with pytest.raises(funcjac.BatchMixingError):
        check_batched(lambda i: table(i) + i.sum(), torch.arange(B))


def test_check_batched_of_random_functions():
    """The random state is replayed, so a draw of its own does not count as mixing."""
    check_batched(lambda x: x * torch.rand_like(x), randn(B, 3))
    rng = torch.get_rng_state()
    check_batched(nn.Dropout(), randn(B, 3))
    check_batched(nn.Dropout(), x := torch.ones(B, 3))
    assert torch.equal(x, torch.ones(B, 3))
    torch.set_rng_state(rng)


def test_check_batched_raises_the_users_error():
    error = KeyError("mine")

    def func(x):
        raise error

    with pytest.raises(KeyError) as found:
        check_batched(func, randn(B, 3))
    assert found.value is error


def test_check_batched_under_no_grad_and_inference_mode():
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            check_batched(torch.sin, randn(B, 3))
            with pytest.raises(funcjac.BatchMixingError):
                check_batched(lambda x: x - x.mean(0), randn(B, 3))


@pytest.mark.quick
@pytest.mark.parametrize("batch", [2, 3, 5])
def test_check_batched_of_few_rows(batch):
    with pytest.raises(funcjac.BatchMixingError):
        check_batched(lambda x: x - x.mean(0), randn(batch, 3))


# --- check_derivative --------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_check_derivative_compares_everything(dtype, limit):
    report = check_derivative(batch_jacobian(network().to(dtype)), torch.randn(B, 3).to(dtype))
    assert report.ok
    pairs = [(c.engine, c.mode) for c in report.comparisons]
    assert sorted(pairs) == sorted(itertools.product(ENGINES, MODES))
    assert all(c.difference < limit for c in report.comparisons)
    assert all(c.error == "" for c in report.comparisons)
    assert report.central_difference < report.central_tolerance


def test_check_derivative_prints_a_table():
    lines = str(check_derivative(batch_jacobian(network()), randn(B, 3))).splitlines()
    assert lines[0].split()[:3] == ["engine", "mode", "difference"]
    assert len(lines) == 1 + 6 + 1
    assert sum("agrees" in line for line in lines) == 7
    assert lines[-1].startswith("central")


@quiet
def test_check_derivative_tells_who_fails_and_how():
    report = check_derivative(batch_jacobian(branches), randn(B, 3))
    assert report.ok
    errors = {(c.engine, c.mode): c.error for c in report.comparisons}
    for mode in MODES:
        assert errors["vmap", mode].startswith("RuntimeError: ")
        assert errors["sum", mode] == errors["loop", mode] == ""
    assert "RuntimeError" in str(report)


def half_detached(x):
    return x.sin() + x.detach() ** 2


@quiet
@pytest.mark.parametrize("func", [WrongBackward.apply, half_detached])
def test_check_derivative_sees_what_a_probe_cannot(func):
    for _ in range(5):
        x = randn(B, 3)
        report = check_derivative(batch_jacobian(func), x)
        assert not report.ok
        assert "WRONG" in str(report)


def test_check_derivative_of_trees_and_shared_arguments():
    func = lambda p, x: {"y": (p["w"] * x).sin(), "z": p["b"] + x[:, 0]}
    p = {"w": randn(3), "b": randn(1).squeeze()}
    jacobian = batch_jacobian(func, (0, 1), in_dims=(None, 0))
    report = check_derivative(jacobian, p, randn(B, 3))
    assert report.ok
    assert {c.engine for c in report.comparisons if c.error} == {"sum"}


def test_check_derivative_with_dims_and_words():
    func = lambda x, *, scale: ((x.T * scale).sin().T, "aux")
    jacobian = batch_jacobian(func, in_dims=1, out_dims=1, has_aux=True, return_value=True)
    report = check_derivative(jacobian, randn(3, B), scale=2.0)
    assert report.ok


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_check_derivative_of_a_random_function(randomness):
    func = lambda x: x.sin() * torch.rand_like(x)
    jacobian = batch_jacobian(func, randomness=randomness)
    rng = torch.get_rng_state()
    report = check_derivative(jacobian, torch.linspace(-1, 1, 12).double().reshape(B, 3))
    assert torch.equal(torch.get_rng_state(), rng)
    loops = [c for c in report.comparisons if c.engine == "loop"]
    assert all(c.difference is not None and c.difference < 1e-9 for c in loops)


def test_check_derivative_of_two_levels():
    jacobian = batch_jacobian(batch_jacobian(network()))
    assert check_derivative(jacobian, randn(B, 3)).ok


def test_check_derivative_raises_the_users_error():
    error = KeyError("mine")

    def func(x):
        raise error

    with pytest.raises(KeyError) as found:
        check_derivative(batch_jacobian(func), randn(B, 3))
    assert found.value is error


def test_check_derivative_of_an_empty_batch():
    report = check_derivative(batch_jacobian(torch.sin), randn(0, 3))
    assert report.ok


def test_check_derivative_in_inference_mode():
    net = network()
    with torch.inference_mode():
        assert check_derivative(batch_jacobian(net), randn(B, 3)).ok
