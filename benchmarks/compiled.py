"""Cost of compiled transforms beside compiled and eager code by hand, and beside JAX.

Everything that is compared runs in one process on one thread, in random order in every round, and
must give the same numbers first. Times are seconds of the processor that the process takes, which
a machine that is shared with others disturbs less than the clock on the wall. Sections:

* ``step``: derivatives, loss and the gradients of all parameters, compiled, beside an eager loop
  of ``autograd.grad``, beside compiled code for this one network by hand (``adjoint``: jets of
  first order and gradients of each layer; ``taylor``: jets of second order) and beside a compiled
  ``vmap(jacrev(jacrev))``, as ``vmap(hessian)`` does not compile;
* ``frozen``: second derivatives without training, beside folx and nested ``jvp`` under ``jax.jit``;
* ``jacobian``: beside the better of compiled ``vmap(jacrev)`` and ``vmap(jacfwd)``;
* ``compile``: seconds of the first call, with those of the C++ compiler, beside by hand.

``--cached`` takes compiled code from the cache of earlier runs, and leaves ``compile`` out.
"""

import importlib
import os
import resource
import shutil
import sys
import tempfile
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

if "--cached" in sys.argv:
    sys.argv.remove("--cached")
    CACHED = True
else:  # before torch reads it
    CACHED, LOADED = False, tempfile.mkdtemp()  # what loading the compilers leaves in the cache
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import common
import torch
from common import Clock, Func, Run
from jacobians import cases as first_order_cases
from networks import mlp
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jacfwd, jacrev, vmap
from training_steps import gradients

import funcjac


@dataclass(frozen=True)
class Case:
    """Ways to one result, and limits.

    Attributes:
        ways: by name, functions of ``args``; the first is ours. Compiled if they have no dot in
            their name; ``eager.`` and ``jax.`` are called as they are.
        args: what they are called with.
        limits: by other names joined by ``|``, of which the fastest counts, the largest ratio.
        finish: makes of what a way returns what is timed with it, a backward pass.
    """

    ways: dict[str, Func]
    args: tuple[Any, ...]
    limits: dict[str, float]
    finish: Callable[[Any], Any] = field(default=lambda result: result)


# --- steps -------------------------------------------------------------------------------


def transport(batch: int, *widths: int) -> Case:
    """u_t + u_x u_x = u_xx / 10 in points (x, t)."""
    net, points = mlp(*widths), torch.rand(batch, 2)
    layers = [module for module in net if isinstance(module, nn.Linear)]
    partials = funcjac.batch_partials(net, [(1,), (0,), (0, 0)])
    whole = vmap(jacrev(jacrev(net)))  # hessian, which is jacfwd of jacrev, does not compile
    slopes = vmap(jacrev(net))

    def loss(u_t: Tensor, u_x: Tensor, u_xx: Tensor) -> Tensor:
        return (u_t + u_x.square() - 0.1 * u_xx).square().mean()

    def by_hand(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (first,) = grad(net(x).sum(), x, create_graph=True)
        u_x, u_t = first[:, :1], first[:, 1:]
        (second,) = grad(u_x.sum(), x, create_graph=True)
        return loss(u_t, u_x, second[:, :1])

    def by_hessian(x: Tensor) -> Tensor:
        first = slopes(x)
        return loss(first[..., 1], first[..., 0], whole(x)[..., 0, 0])

    def by_taylor(x: Tensor) -> Tensor:
        weight, last = layers[0].weight, len(layers) - 2
        z = nn.functional.linear(x, weight, layers[0].bias)
        z_x, z_t = (weight[:, k].expand_as(z) for k in (0, 1))
        z_xx: Any = 0
        for k, layer in enumerate(layers[1:]):
            y = z.tanh()
            slope = 1 - y * y
            bent = (slope * z_x, slope * z_t, slope * z_xx - 2 * y * slope * z_x * z_x)
            z_x, z_t, z_xx = (part @ layer.weight.T for part in bent)
            z = layer(y) if k < last else z
        return loss(z_t, z_x, z_xx)

    def by_adjoints(x: Tensor) -> Tensor:
        z = layers[0](x)
        z_x = layers[0].weight[:, 0].expand_as(z)
        seen = []
        for k, layer in enumerate(layers[1:]):
            y = z.tanh()
            slope = 1 - y * y
            seen.append((y, slope, z_x))
            if k < len(layers) - 2:
                z, z_x = layer(y), (slope * z_x) @ layer.weight.T
        gradient: Tensor = layers[-1].weight.expand(len(x), -1)
        u_xx: Any = 0
        for (y, slope, z_x), layer in zip(seen[::-1], layers[-2::-1]):
            gradient = gradient * slope
            u_xx = u_xx - 2 * (gradient * y * z_x * z_x).sum(1, keepdim=True)
            gradient = gradient @ layer.weight
        return loss(gradient[:, 1:], gradient[:, :1], u_xx)

    ways = {
        "funcjac": lambda x: loss(*partials(x)),
        "eager.loop": by_hand,
        "vmap(jacrev(jacrev))": by_hessian,
        "taylor": by_taylor,
        "adjoint": by_adjoints,
    }
    limits = {"eager.loop": 0.6, "vmap(jacrev(jacrev))": 0.7}
    return Case(ways, (points,), limits, lambda value: gradients(value, net))


def three_outputs() -> Case:
    """All second derivatives along coordinates, and the Jacobian, of three outputs."""
    net, points = mlp(3, 64, 64, 64, 3), torch.rand(1000, 3)
    layers = [module for module in net if isinstance(module, nn.Linear)]
    transform = funcjac.batch_hessian_diagonal(net, return_value=True)
    whole, slopes = vmap(jacrev(jacrev(net))), vmap(jacrev(net))

    def loss(diagonal: Tensor, jac: Tensor) -> Tensor:  # both (B, 3, 3)
        return (diagonal.sum(2) - jac.square().sum(2)).square().mean()

    def ours(x: Tensor) -> Tensor:
        diagonal, (jac, _) = transform(x)
        return loss(diagonal, jac)

    def by_hand(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        firsts = [grad(out.sum(), x, create_graph=True)[0] for out in net(x).unbind(1)]
        seconds = [
            grad(slope.sum(), x, create_graph=True)[0][:, i]
            for first in firsts
            for i, slope in enumerate(first.unbind(1))
        ]
        return loss(torch.stack(seconds, 1).unflatten(1, (3, 3)), torch.stack(firsts, 1))

    def by_hessian(x: Tensor) -> Tensor:
        return loss(whole(x).diagonal(dim1=2, dim2=3), slopes(x))

    def by_taylor(x: Tensor) -> Tensor:
        z = layers[0](x)
        first = layers[0].weight.T.unsqueeze(1)  # (3, 1, 64)
        second: Any = 0
        for layer in layers[1:]:
            y = z.tanh()
            slope = 1 - y * y
            bent = slope * second - 2 * y * slope * first * first
            z, first, second = (
                layer(y),
                (slope * first) @ layer.weight.T,
                bent @ layer.weight.T,
            )
        return loss(second.movedim(0, 2), first.movedim(0, 2))

    ways = {
        "funcjac": ours,
        "eager.loop": by_hand,
        "vmap(jacrev(jacrev))": by_hessian,
        "taylor": by_taylor,
    }
    limits = {"eager.loop": 0.35, "vmap(jacrev(jacrev))": 0.7}
    return Case(ways, (points,), limits, lambda value: gradients(value, net))


# --- beside JAX --------------------------------------------------------------------------


def frozen(batch: int, *widths: int, diagonal: bool = False) -> Case:
    """Laplacians of one output, or diagonals of Hessians, without training."""
    net, points = mlp(*widths).requires_grad_(False), torch.randn(batch, widths[0])
    transform = funcjac.batch_hessian_diagonal if diagonal else funcjac.batch_laplacian
    ways: dict[str, Func] = {"funcjac": transform(net)}
    layers = [module for module in net if isinstance(module, nn.Linear)]

    def by_taylor(x: Tensor) -> Tensor:
        """The same by hand, for tanh networks."""
        z = layers[0](x)
        first: Tensor = layers[0].weight.T.unsqueeze(1)  # (N, 1, H)
        second: Any = 0
        for k, layer in enumerate(layers[1:]):
            y = z.tanh()
            slope = 1 - y * y
            squares = first * first if diagonal else (first * first).sum(0)
            second = (slope * second - 2 * y * slope * squares) @ layer.weight.T
            if k < len(layers) - 2:
                z, first = layer(y), (slope * first) @ layer.weight.T
        return second.movedim(0, 2) if diagonal else second

    if diagonal:  # laid out as a transform's result is: one kernel more
        ways["taylor, contiguous"] = lambda x: by_taylor(x).contiguous()
    ways["taylor"] = by_taylor
    ways |= jax_ways(layers, points, diagonal)
    others = "|".join(name for name in ways if name.startswith("jax."))
    return Case(ways, (points,), {others: 1.0} if others else {})


def jax_ways(layers: Sequence[nn.Linear], points: Tensor, diagonal: bool) -> dict[str, Func]:
    try:  # they take seconds to import
        folx, jax, jnp = map(importlib.import_module, ("folx", "jax", "jax.numpy"))
    except ImportError:
        print("jax and folx are not installed: pip install '.[benchmarks]'")
        return {}
    params = [(jnp.asarray(m.weight.numpy().T), jnp.asarray(m.bias.numpy())) for m in layers]
    x = jnp.asarray(points.numpy())

    def net(params: Any, row: Any) -> Any:
        for weight, bias in params[:-1]:
            row = jnp.tanh(row @ weight + bias)
        return row @ params[-1][0] + params[-1][1]

    def nested(params: Any, row: Any) -> Any:
        func = lambda row: net(params, row)

        def second(direction: Any) -> Any:
            slope = lambda row: jax.jvp(func, (row,), (direction,))[1]
            return jax.jvp(slope, (row,), (direction,))[1]

        seconds = jax.vmap(second)(jnp.eye(len(row)))  # (N, M)
        return seconds.T if diagonal else seconds.sum(0)

    def forward(params: Any, row: Any) -> Any:
        return folx.forward_laplacian(lambda row: net(params, row))(row).laplacian

    functions = {"jax.nested": nested} | ({} if diagonal else {"jax.folx": forward})
    return {name: jax_way(jax, func, params, x) for name, func in functions.items()}


def jax_way(jax: Any, func: Any, params: Any, x: Any) -> Func:
    compiled = jax.jit(jax.vmap(func, (None, 0)))

    def run(_: Tensor) -> Any:
        return torch.from_dlpack(jax.block_until_ready(compiled(params, x)))

    return run


# --- Jacobians ---------------------------------------------------------------------------


def jacobian(name: str) -> Case:
    case = first_order_cases()[name]
    func, args = case.make(), case.data(case.batch)
    by_hand = case.by_hand(func, args)
    ways = {"funcjac": case.transform(func), "vmap(jacrev)": by_hand["vmap(jacrev)"]}
    if "vmap(jacfwd)" in by_hand:
        ways["vmap(jacfwd)"] = by_hand["vmap(jacfwd)"]
    else:
        per_row = lambda params, x: functional_call(mlp(10, 32, 32, 3), params, (x,))
        ways["vmap(jacfwd)"] = vmap(jacfwd(per_row), (None, 0))
    return Case(ways, args, {"vmap(jacrev)|vmap(jacfwd)": 1.05})


def cases() -> dict[str, Callable[[], Case]]:
    first_order = [name for name in first_order_cases() if "Laplacian" not in name]
    return {
        "step u_t, u_x, u_xx 2-32x3-1 B=1000": lambda: transport(1000, 2, 32, 32, 32, 1),
        "step u_t, u_x, u_xx 2-64x4-1 B=1000": lambda: transport(1000, 2, 64, 64, 64, 64, 1),
        "step diagonal, Jacobian 3-64x3-3 B=1000": three_outputs,
        "frozen Laplacian 50-256-256-1 B=32": lambda: frozen(32, 50, 256, 256, 1),
        "frozen Laplacian 10-64-64-1 B=256": lambda: frozen(256, 10, 64, 64, 1),
        "frozen Laplacian 30-128x3-1 B=64": lambda: frozen(64, 30, 128, 128, 128, 1),
        "frozen diagonal 3-64x3-3 B=1024": lambda: frozen(1024, 3, 64, 64, 64, 3, diagonal=True),
    } | {f"jacobian {name}": lambda name=name: jacobian(name) for name in first_order}


# --- measuring ---------------------------------------------------------------------------


def processor() -> float:
    """Seconds of this process and of compilers that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def forget_kernels() -> None:
    """Back to what was compiled before all cases: two ways may have kernels in common."""
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"])  # what is loaded needs its file no more
    shutil.copytree(LOADED, os.environ["TORCHINDUCTOR_CACHE_DIR"])
    torch._inductor.utils.clear_caches()


def alone(way: Func) -> Func:
    """The same with code of its own: Dynamo looks through all that it knows of one code object."""
    wrapper = lambda *args: way(*args)
    code, scope = wrapper.__code__.replace(), wrapper.__globals__
    return types.FunctionType(code, scope, "way", None, wrapper.__closure__)


def made(case: Case) -> tuple[dict[str, Run], dict[str, float], dict[str, str]]:
    """Ways that run and are right, seconds that their first call took, and why others are out."""
    runs: dict[str, Run] = {}
    firsts: dict[str, float] = {}
    reasons: dict[str, str] = {}
    expected = None
    for name, way in case.ways.items():
        func = way if "." in name else torch.compile(alone(way), fullgraph=True)
        run: Run = lambda func=func: case.finish(func(*case.args))
        if not CACHED and "." not in name:
            forget_kernels()
        start = processor()
        try:
            result = run()
        except Exception as error:  # compilers refuse in many ways
            reasons[name] = f"fails: {' '.join(str(error).split())[:60]}"
            continue
        firsts[name] = processor() - start
        expected = result if expected is None else expected
        wrong = common.difference(result, expected)
        if wrong:
            reasons[name] = wrong
        else:
            runs[name] = run
    return runs, firsts, reasons


def timed(runs: dict[str, Run], quick: bool) -> dict[str, float]:
    """Median seconds of the processor, of a few calls in each round."""

    def clock(run: Run, repeats: int) -> float:
        start = time.process_time()
        for _ in range(repeats):
            run()
        return (time.process_time() - start) / repeats

    clocks: dict[str, Clock] = {}
    for name, run in runs.items():
        common.seconds(run, 5)
        repeats = max(1, int(0.006 / common.seconds(run, 3)))
        clocks[name] = lambda run=run, repeats=repeats: clock(run, repeats)
    return common.interleaved(clocks, 2 if quick else 8, 3 if quick else 15)


def measure(case: Case, quick: bool) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    runs, firsts, reasons = made(case)
    return timed(runs, quick), firsts, reasons


def misses(case: Case, times: dict[str, float], firsts: dict[str, float]) -> list[str]:
    lines = []
    for others, limit in case.limits.items():
        known = [times[name] for name in others.split("|") if name in times]
        ratio = times["funcjac"] / min(known) if known else 0
        if ratio > limit:
            lines.append(f"{ratio:.2f} of {others}, limit {limit:g}")
    hand = [firsts[name] for name in firsts if "." not in name and name != "funcjac"]
    if not CACHED and hand and firsts["funcjac"] > 1.5 * max(hand):
        lines.append(f"compiled in {firsts['funcjac']:.1f} s, by hand in {max(hand):.1f} s")
    return lines


def main() -> None:
    arguments = common.options(__doc__, baseline=False)
    version = f"torch {torch.__version__}, one thread, float32"
    print(f"{version}; milliseconds of the processor, medians, and as a fraction of each way")
    missed = []
    # Loads the compilers, and what they load for a transform: whoever is first would pay for it.
    for func in (lambda x: (x @ x).tanh().sum(0), funcjac.batch_laplacian(torch.tanh)):
        torch.compile(func)(torch.ones(32, 32))
    if not CACHED:
        shutil.copytree(os.environ["TORCHINDUCTOR_CACHE_DIR"], LOADED, dirs_exist_ok=True)
    for name, make in cases().items():
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        torch._dynamo.reset()
        case = make()
        times, firsts, reasons = measure(case, arguments.quick)
        if "funcjac" not in times:
            missed.append(f"{name}: {reasons['funcjac']}")
            continue
        usual = times["funcjac"]
        print(f"{name:<42}{usual * 1e3:9.3f} ms", flush=True)
        for way, value in times.items():
            first = "" if CACHED or "." in way else f"   first call {firsts[way]:6.1f} s"
            print(f"    {way:<38}{value * 1e3:9.3f} ms   {usual / value:5.2f}{first}")
        for way, reason in reasons.items():
            print(f"    {way:<38}{reason}")
        missed += [f"{name}: {text}" for text in misses(case, times, firsts)]
    common.report(missed)


if __name__ == "__main__":
    main()
