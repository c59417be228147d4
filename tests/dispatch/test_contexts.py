"""Under ``no_grad``, ``inference_mode``, autocast, ``torch.compile``, anomaly mode, threads."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from funcjac import batch_hessian, batch_jacobian, batch_laplacian, explain
from tests.tensors import equal, randn

B = 4
ROUTES = [*itertools.product(("vmap", "sum", "loop"), ("fwd", "rev")), ("auto", "auto")]
every_route = pytest.mark.parametrize(("engine", "mode"), ROUTES)
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")


def network(*, grad=True):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)).double()
    return net.requires_grad_(grad)


def derivative(net, x):
    slope = 1 - net[:2](x) ** 2
    return torch.einsum("oh,bh,hi->boi", net[2].weight, slope, net[0].weight)


def second_derivative(net, x):
    hidden = net[:2](x)
    slope = -2 * hidden * (1 - hidden**2)
    first, last = net[0].weight, net[2].weight
    return torch.einsum("oh,bh,hi,hj->boij", last, slope, first, first)


# --- no_grad and inference mode ----------------------------------------------------------


@pytest.mark.quick
@every_route
@pytest.mark.parametrize("grad", [False, True])
def test_no_grad(grad, engine, mode):
    net, x = network(), randn(B, 3).requires_grad_(grad)
    jacobian = batch_jacobian(net, engine=engine, mode=mode, return_value=True)
    with torch.no_grad():
        for _ in range(3):
            jac, value = jacobian(x)
            assert not torch.is_grad_enabled()
            assert not jac.requires_grad
            assert not value.requires_grad
            equal(jac, derivative(net, x))


@every_route
def test_no_grad_nested(engine, mode):
    net, x = network(), randn(B, 3)
    words = {"engine": engine, "mode": mode}
    with torch.no_grad():
        found = batch_jacobian(batch_jacobian(net, **words), **words)(x)
        assert not found.requires_grad
        equal(found, second_derivative(net, x))


@every_route
def test_grad_and_no_grad_in_turn(engine, mode):
    """Grad mode is part of the signature: a decision for one is not used for the other."""
    net, x = network(), randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode)
    for enabled in (True, False, True, False, True):
        with torch.set_grad_enabled(enabled):
            jac = jacobian(x)
        assert jac.requires_grad == enabled
        equal(jac, derivative(net, x))


@every_route
def test_no_grad_around_a_backward_inside_func(engine, mode):
    """A no_grad block of the caller does not reach a gradient that func takes itself."""
    energy = lambda x: (x**3).sum()
    func = torch.func.grad(energy)
    x = randn(B, 3)
    with torch.no_grad():
        equal(batch_jacobian(func, engine=engine, mode=mode)(x), torch.diag_embed(6 * x))


@pytest.mark.quick
@every_route
@pytest.mark.parametrize("return_value", [False, True])
def test_inference_mode(return_value, engine, mode):
    net, x = network(), randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode, return_value=return_value)
    with torch.inference_mode():
        for _ in range(3):
            found = jacobian(x)
            jac = found[0] if return_value else found
            assert torch.is_inference_mode_enabled()
            assert not jac.requires_grad
            equal(jac, derivative(net, x))


@every_route
@pytest.mark.parametrize("inside", [False, True])
def test_input_made_in_inference_mode(inside, engine, mode):
    net = network()
    with torch.inference_mode():
        x = randn(B, 3)
    assert x.is_inference()
    with torch.inference_mode(inside):
        jac = batch_jacobian(net, engine=engine, mode=mode)(x)
        equal(jac.detach(), derivative(net, x.clone()).detach())


@every_route
def test_inference_tensor_in_a_keyword(engine, mode):
    with torch.inference_mode():
        x, scale = randn(B, 3), randn(3)
        jacobian = batch_jacobian(lambda x, scale: (x * scale).sin(), engine=engine, mode=mode)
        equal(jacobian(x, scale=scale), torch.diag_embed((x * scale).cos() * scale))


@every_route
def test_inference_mode_nested(engine, mode):
    net, x = network(), randn(B, 3)
    words = {"engine": engine, "mode": mode}
    with torch.inference_mode():
        found = batch_jacobian(batch_jacobian(net, **words), **words)(x)
        equal(found, second_derivative(net, x))


# --- autocast ----------------------------------------------------------------------------


def attempt(function, *, allowed):
    """What ``function`` returns; nothing where it raises and that is ``allowed``."""
    try:
        return function()
    except RuntimeError:
        if not allowed:
            raise
        return []


def normed():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 5))


@quiet
@every_route
@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad, engine, mode):
    net, x = normed(), torch.randn(B, 3)
    exact = batch_jacobian(normed().double(), engine="loop", mode="rev")(x.double()).detach()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        expected = torch.result_type(net(x), x)
        jacobian = batch_jacobian(net, engine=engine, mode=mode)
        found = attempt(lambda: [jacobian(x) for _ in range(2)], allowed=engine == "vmap")
    for jac in found:
        assert jac.dtype == expected == torch.float32
        torch.testing.assert_close(jac.double().detach(), exact, rtol=0.05, atol=0.05)
        assert not torch.equal(jac.double().detach(), exact)


@every_route
def test_autocast_is_part_of_the_signature(engine, mode):
    net, x = nn.Linear(3, 5), torch.randn(B, 3)
    jacobian = batch_jacobian(net, engine=engine, mode=mode, return_value=True)
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            _, value = jacobian(x)
        assert value.dtype == (torch.bfloat16 if enabled else torch.float32)


@every_route
def test_backward_through_autocast(engine, mode):
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 5)), torch.randn(B, 3)
    with torch.autocast("cpu", torch.bfloat16):
        jac = batch_jacobian(net, engine=engine, mode=mode)(x)
    jac.square().sum().backward()
    for parameter in (net[0].weight, net[2].weight):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


# --- torch.compile -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler(request):
    if "compile" not in request.node.name:
        yield
        return
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("engine", "backend"), [("vmap", "eager"), ("vmap", "aot_eager"), ("auto", "aot_eager")]
)
@pytest.mark.parametrize("mode", ["fwd", "rev", "auto"])
def test_compile(engine, mode, backend):
    net, x = network(grad=False), randn(B, 3)
    run = compiled(batch_jacobian(net, engine=engine, mode=mode), backend)
    equal(run(x), derivative(net, x))
    equal(run(2 * x), derivative(net, 2 * x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_several_orders_compile_in_one_process():
    x = randn(B, 3)
    for transform in (batch_jacobian, batch_hessian, batch_laplacian, batch_jacobian):
        transformed = transform(torch.sin, engine="vmap")
        equal(compiled(transformed)(x), transformed(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("modes", list(itertools.product(("fwd", "rev"), repeat=2)), ids=str)
def test_compile_nested(modes):
    net, x = network(grad=False), randn(B, 3)
    inner = batch_jacobian(net, mode=modes[0])
    run = compiled(batch_jacobian(inner, mode=modes[1]))
    equal(run(x), second_derivative(net, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_compile_and_backward(mode):
    net, x = network(), randn(B, 3)
    jac = compiled(batch_jacobian(net, mode=mode))(x)
    weight = randn(B, 5, 3)
    found = torch.autograd.grad((weight * jac).sum(), [net[0].weight, net[2].weight])
    loss = (weight * derivative(net, x)).sum()
    equal(found, torch.autograd.grad(loss, [net[0].weight, net[2].weight]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_with_other_code():
    net, x = network(grad=False), randn(B, 3)
    jacobian = batch_jacobian(net)
    run = compiled(lambda x: (jacobian(x).square().sum((1, 2)), net(x)))
    squares, value = run(x)
    equal(squares, derivative(net, x).square().sum((1, 2)))
    equal(value, net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_with_words():
    w, x = randn(5, 3), randn(3, B)
    func = lambda p, x, scale: ({"y": (x.T @ p["w"].T).sin() * scale}, {"x": x.T})
    jacobian = batch_jacobian(
        func, 1, in_dims=(None, 1), has_aux=True, return_value=True, chunk_size=2
    )
    jac, (value, _) = compiled(jacobian)({"w": w}, x, scale=2.0)
    inside = x.T @ w.T
    equal(jac["y"], 2 * inside.cos().unsqueeze(2) * w)
    equal(value["y"], 2 * inside.sin())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_after_eager_and_back():
    net, x = network(grad=False), randn(B, 3)
    jacobian = batch_jacobian(net)
    equal(jacobian(x), derivative(net, x))
    equal(compiled(jacobian, "eager")(x), derivative(net, x))
    equal(jacobian(x), derivative(net, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mode", ["rev", "fwd", "rev_over_rev", "taylor", "nested"])
@pytest.mark.filterwarnings("error:.*Dynamo:UserWarning")
def test_compiled_module_inside(mode, backend, capfd):
    """Right in each call, without a word; compiled where it is differentiated once."""
    net, x, runs = network(grad=False), randn(B, 3), []
    net.register_forward_hook(lambda *_: runs.append(torch.compiler.is_compiling()))
    compiled_net = torch.compile(net, backend=backend)
    if mode in ("rev", "fwd"):
        transformed, expected = batch_jacobian(compiled_net, mode=mode), derivative(net, x)
    elif mode == "nested":
        transformed = batch_jacobian(batch_jacobian(compiled_net))
        expected = second_derivative(net, x)
    else:
        transformed, expected = batch_hessian(compiled_net, mode=mode), second_derivative(net, x)
    runs.clear()
    for _ in range(3):
        equal(transformed(x), expected)
    assert any(runs) is (mode == "rev")
    assert explain(transformed, x).engine == "sum"
    assert capfd.readouterr().err == ""  # where Dynamo logs
    torch._dynamo.reset()


# --- other modes -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@every_route
def test_anomaly_mode(engine, mode):
    net, x = network(), randn(B, 3)
    with torch.autograd.detect_anomaly():
        equal(batch_jacobian(net, engine=engine, mode=mode)(x), derivative(net, x))


@every_route
def test_deterministic_algorithms(engine, mode):
    net, x = network(), randn(B, 3)
    torch.use_deterministic_algorithms(True)
    try:
        equal(batch_jacobian(net, engine=engine, mode=mode)(x), derivative(net, x))
    finally:
        torch.use_deterministic_algorithms(False)


@every_route
def test_default_dtype_of_the_user(engine, mode):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(B, 3, dtype=torch.float32)
        jac = batch_jacobian(torch.sin, engine=engine, mode=mode)(x)
    finally:
        torch.set_default_dtype(before)
    assert jac.dtype == torch.float32
    equal(jac, torch.diag_embed(x.cos()), 1e-6)


@every_route
def test_meta_device_of_the_user(engine, mode):
    """A device context of the caller does not move what funcjac makes."""
    x = randn(B, 3)
    with torch.device("meta"):
        jac = batch_jacobian(torch.sin, engine=engine, mode=mode)(x)
    equal(jac, torch.diag_embed(x.cos()))


@every_route
@pytest.mark.parametrize("same", [True, False], ids=["one transform", "one each"])
def test_threads(same, engine, mode):
    """Transforms hold no state that two calls at once could confuse."""
    net = network()
    shared = batch_jacobian(net, engine=engine, mode=mode)
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        jacobian = shared if same else batch_jacobian(net, engine=engine, mode=mode)
        try:
            for step in range(6):
                x = torch.randn(1 + step % 3, 3, generator=generator, dtype=torch.float64)
                equal(jacobian(x), derivative(net, x))
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_warnings_as_errors():
    """Torch's own warnings do not count as failures of an engine."""
    code = """
import torch, funcjac
net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 5))
inner = funcjac.batch_jacobian(net, engine="vmap", mode="fwd")
funcjac.batch_jacobian(inner, engine="vmap", mode="fwd")(torch.ones(2, 3))
"""
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
