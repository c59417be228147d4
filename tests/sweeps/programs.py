"""Random batched functions, as source, and what every transform must make of them.

A program is a list of steps; each is a few lines of Python that make one new variable from earlier
ones, all with the batch first. ``generate(seed)`` writes one, trying each step as it goes, and
``Program.source()`` is a script that stands alone. ``python -m tests.sweeps.programs --minutes 10``
draws programs for as long as one likes and prints a reproducer, made as short as it gets, for each
failure.
"""

import argparse
import contextlib
import functools
import math
import random
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import optree
import torch
from torch import Tensor, nn

import funcjac
from tests import oracles

BATCH = 3
MOST_ELEMENTS = 24  # of a row of a variable
MOST_OUTPUTS, MOST_INPUTS = 6, 6
VALUES = 3  # how many points each program is tried at
LARGE, ROUNDING = 1e4, 1e-9
f64 = torch.float64

HEADER = """import random

import torch
import torch.nn.functional as F
from torch import nn
from funcjac import *

torch.set_default_dtype(torch.float64)


def const(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed, make):
    torch.manual_seed(seed)
    return make().eval()


class Dice(nn.Module):
    "Another factor in each run of the function, which is counted, and seen by what is kept."

    def __init__(self, seed):
        super().__init__()
        self.seed, self.runs, self.at, self.last = seed, 0, None, None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.at is None:
            self.runs, self.count, self.last = self.runs + 1, self.count + 1, x
        draw = random.Random(self.seed + (self.at or self.runs))
        return x * draw.uniform(0.5, 1.5)
"""

# Operations that plain autograd differentiates wrongly the second time, and others in their place.
TWINS = {
    r"(\w+)\.logcumsumexp\((-?\d+)\)": (
        r"torch.stack([\1.narrow(\2, 0, i + 1).logsumexp(\2) for i in range(\1.shape[\2])], \2)"
    )
}


@dataclass(frozen=True)
class Step:
    """``body`` makes the variable ``name``; ``setup`` makes constants and modules, once."""

    kind: str
    name: str
    body: tuple[str, ...]
    setup: tuple[str, ...] = ()
    mixing: bool = False


@dataclass(frozen=True)
class Input:
    """A positional argument: float or integer, of the whole batch or shared, a tree or not."""

    name: str
    shape: tuple[int, ...]
    in_dim: int | None = 0
    integer: bool = False
    keys: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """The lines that take it apart and put its batch dimension first."""
        if self.keys:
            return tuple(f"{self.name}_{key} = {self.name}[{key!r}]" for key in self.keys)
        if self.in_dim not in (0, None):
            return (f"{self.name} = {self.name}.movedim({self.in_dim}, 0)",)
        return ()

    def names(self) -> list[str]:
        return [f"{self.name}_{key}" for key in self.keys] or [self.name]

    def expression(self, seed: int) -> str:
        batch = () if self.in_dim is None else (BATCH,)
        shape = ", ".join(map(str, (*batch, *self.shape)))
        if self.integer:
            return f"(const({seed}, {shape}) * 50).long().abs() % 2"
        if self.keys:
            leaves = [f"{key!r}: const({seed + i}, {shape})" for i, key in enumerate(self.keys)]
            return "{" + ", ".join(leaves) + "}"
        if self.in_dim not in (0, None):
            return f"const({seed}, {shape}).movedim(0, {self.in_dim})"
        return f"const({seed}, {shape})"


@dataclass(frozen=True)
class Program:
    seed: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    output: str  # the expression that is returned
    argnums: int | tuple[int, ...] = 0
    out_dims: int = 0

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        return tuple(given.in_dim for given in self.inputs)

    @property
    def mixing(self) -> bool:
        return any(step.mixing for step in self.steps)

    @property
    def words(self) -> dict[str, Any]:
        return {"argnums": self.argnums, "in_dims": self.in_dims, "out_dims": self.out_dims}

    def source(self) -> str:
        """The definition of ``func``, with everything that it needs."""
        lines = [line for step in self.steps for line in step.setup]
        names = ", ".join(given.name for given in self.inputs)
        body = [line for given in self.inputs for line in given.lines()]
        body += [line for step in self.steps for line in step.body]
        text = "\n".join([*lines, "", "", f"def func({names}):"])
        return "\n    ".join([text, *body, f"return {self.output}"]) + "\n"

    def arguments(self, point: int) -> str:
        """The expression of the arguments at one of the points."""
        seeds = [1000 * (self.seed % 1000) + 100 * point + 10 * i for i in range(len(self.inputs))]
        each = [given.expression(s) for given, s in zip(self.inputs, seeds)]
        return "(" + ", ".join(each) + ",)"

    @contextlib.contextmanager
    def running(self, *, twin: bool = False, draw: int | None = 1) -> Iterator[dict[str, Any]]:
        """The names that the source, or its twin, defines, as long as float64 is the default.

        Dice that it holds give that ``draw`` always, or for ``None`` another one in each run.
        """
        source = self.source()
        for operation, other in TWINS.items() if twin else ():
            source = re.sub(operation, other, source)
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                scope: dict[str, Any] = {}
                exec(HEADER + source, scope)
                for die in dice(scope):
                    die.at = draw
                yield scope
            finally:
                torch.set_default_dtype(before)


# --- steps -------------------------------------------------------------------------------


class Draft:
    """A program in the making: its variables, with the values they have at one point."""

    def __init__(self, rng: random.Random, inputs: list[Input], seed: int) -> None:
        self.rng, self.count = rng, 0
        self.scope: dict[str, Any] = {}
        exec(HEADER, self.scope)
        program = Program(seed, tuple(inputs), (), "")
        values = eval(program.arguments(0), self.scope)
        self.scope.update({given.name: value for given, value in zip(inputs, values)})
        for line in [line for given in inputs for line in given.lines()]:
            exec(line, self.scope)
        floats = [given for given in inputs if not given.integer]
        self.rows = [n for g in floats if g.in_dim is not None for n in g.names()]
        self.shared = [n for g in floats if g.in_dim is None for n in g.names()]
        self.integers = [g.name for g in inputs if g.integer]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.scope[name].shape)

    def fresh(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def pick(self, least: int = 2, most: int = 5) -> str:
        """A variable with so many dimensions; late ones are likelier, so that programs are deep."""
        found = [n for n in self.rows if least <= len(self.shape(n)) <= most]
        found = [n for n in found if math.prod(self.shape(n)[1:])]
        if not found:
            raise Inapplicable
        return self.rng.choice(found[-3:] if self.rng.random() < 0.8 else found)

    def like(self, name: str) -> str:
        """Another variable of the same shape, if there is one."""
        same = [n for n in self.rows if self.shape(n) == self.shape(name)]
        return self.rng.choice(same)

    def dim(self, name: str) -> int:
        """A dimension that is not the batch, by either of its names."""
        ndim = len(self.shape(name))
        dim = self.rng.randrange(1, ndim)
        return dim - ndim if self.rng.random() < 0.5 else dim

    def const(self, *shape: int) -> tuple[str, str]:
        """``(name, setup line)`` of a fixed tensor."""
        name = self.fresh("c")
        return name, f"{name} = const({', '.join(map(str, (self.rng.randrange(10**6), *shape)))})"

    def module(self, expression: str) -> tuple[str, str]:
        name = self.fresh("m")
        return name, f"{name} = seeded({self.rng.randrange(10**6)}, lambda: {expression})"

    def try_step(self, kind: str, mixing: bool) -> Step | None:
        """The step if it runs, and is of modest size and value."""
        try:
            made = STEPS[kind](self) if not mixing else MIXING[kind](self)
        except Inapplicable:
            return None
        body, setup = made if isinstance(made, tuple) else (made, ())
        lines = [body] if isinstance(body, str) else list(body)
        name = self.fresh("v")
        lines[-1] = f"{name} = {lines[-1]}"
        setup = (setup,) if isinstance(setup, str) else tuple(setup)
        scope = dict(self.scope)
        exec("\n".join(setup), scope)
        try:
            exec("\n".join(lines), scope)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise AssertionError(f"{kind}: {lines}, {setup}: {error}") from error
        value = scope[name]
        small = value.ndim >= 1 and value.shape[0] == BATCH and value.ndim <= 5
        small = small and 1 <= value[0].numel() <= MOST_ELEMENTS
        if not small or not bool(value.isfinite().all()) or float(value.abs().max()) > LARGE:
            return None
        self.scope.update(scope)
        self.rows.append(name)
        return Step(kind, name, tuple(lines), setup, mixing)


class Inapplicable(Exception):
    """No variable fits the step."""


Made = str | tuple[Any, Any]
STEPS: dict[str, Callable[[Draft], Made]] = {}
MIXING: dict[str, Callable[[Draft], Made]] = {}


def step(func: Callable[[Draft], Made]) -> Callable[[Draft], Made]:
    STEPS[func.__name__] = func
    return func


def mixing(func: Callable[[Draft], Made]) -> Callable[[Draft], Made]:
    MIXING[func.__name__] = func
    return func


SMOOTH = (
    "{v}.sin()", "{v}.cos()", "{v}.tanh()", "{v}.sigmoid()", "({v} / 3).exp()", "{v} ** 2",
    "{v} ** 3 / 4", "({v} * {v} + 1).log()", "({v} * {v} + 1).sqrt()", "1 / ({v} * {v} + 1)",
    "F.softplus({v})", "F.gelu({v})", "F.silu({v})", "F.elu({v})", "F.mish({v})", "torch.atan({v})",
    "torch.erf({v})", "torch.sinh({v} / 4)", "({v} * {v} + 1) ** 1.5", "({v} * {v} + 1).rsqrt()",
    "torch.expm1({v} / 3)", "F.logsigmoid({v})", "torch.sinc({v})", "({v} * {v} + 1).lgamma()",
    "torch.asinh({v})", "F.gelu({v}, approximate='tanh')", "F.tanhshrink({v})", "F.celu({v})",
    "F.selu({v})", "torch.log1p({v} * {v})", "F.softsign({v})", "({v} * {v} + 0.5).reciprocal()",
    "torch.special.i0({v} / 2)", "torch.xlogy({v} * {v} + 1, {v} * {v} + 2)",
    "torch.polygamma(1, {v} * {v} + 1)",
)  # fmt: skip
KINKED = (
    "{v}.abs()", "F.relu({v})", "{v}.clamp(-0.5, 0.7)", "F.leaky_relu({v}, 0.2)", "F.hardtanh({v})",
    "{v}.clamp(min=0.1)", "F.softshrink({v}, 0.3)", "F.hardswish({v})", "F.relu6({v})",
    "F.threshold({v}, 0.1, 0.2)", "torch.maximum({v}, {v} ** 2)", "{v}.minimum({v}.sin())",
    "{v}.frac()", "{v}.sign() * {v} ** 2", "F.hardsigmoid({v})",
    "F.prelu({v}, torch.full((1,), 0.3))", "torch.nan_to_num({v})", "F.rrelu({v})",
)  # fmt: skip


@step
def smooth(d: Draft) -> Made:
    return d.rng.choice(SMOOTH).format(v=d.pick(1))


@step
def kinked(d: Draft) -> Made:
    return d.rng.choice(KINKED).format(v=d.pick(1))


@step
def linear(d: Draft) -> Made:
    v = d.pick()
    out = d.rng.randint(1, 4)
    weight, made = d.const(out, d.shape(v)[-1])
    forms = [
        f"F.linear({v}, {weight})",
        f"{v} @ {weight}.T",
        f"torch.matmul({v}, {weight}.mT) + 0.3",
    ]
    return d.rng.choice(forms), made


@step
def linear_module(d: Draft) -> Made:
    v, out = d.pick(), d.rng.randint(1, 4)
    act = d.rng.choice(["Tanh", "SiLU", "Softplus", "GELU", "ELU", "Mish"])
    net, made = d.module(
        f"nn.Sequential(nn.Linear({d.shape(v)[-1]}, {out}), nn.{act}(), nn.Linear({out}, {out}))"
    )
    return f"{net}({v})", made


@step
def in_place_module(d: Draft) -> Made:
    v = d.pick()
    n = d.shape(v)[-1]
    net, made = d.module(
        f"nn.Sequential(nn.Linear({n}, {n}), nn.ReLU(inplace=True), nn.Linear({n}, 2))"
    )
    return f"{net}({v})", made


@step
def convolution(d: Draft) -> Made:
    v = d.pick(3, 3)
    channels, length = d.shape(v)[1:]
    width = d.rng.randint(1, min(3, length))
    extra = d.rng.choice(
        ["", ", padding=1", ", padding=1, padding_mode='circular'", ", bias=False"]
    )
    if "circular" in extra and length < 2:
        extra = ""
    net, made = d.module(f"nn.Conv1d({channels}, {d.rng.randint(1, 3)}, {width}{extra})")
    return f"{net}({v})", made


@step
def pool(d: Draft) -> Made:
    v = d.pick(3, 3)
    if d.shape(v)[-1] < 2:
        raise Inapplicable
    forms = [
        "F.avg_pool1d({v}, 2)", "F.max_pool1d({v}, 2)", "F.adaptive_avg_pool1d({v}, 2)",
        "F.interpolate({v}, scale_factor=2.0, mode='linear')", "F.pad({v}, (1, 1))",
        "F.pad({v}, (1, 0), mode='replicate')", "F.lp_pool1d({v} + 5, 2, 2)", "{v}.unfold(2, 2, 1)",
        "F.pad({v}, (1, 1), mode='reflect')",
    ]  # fmt: skip
    return d.rng.choice(forms).format(v=v)


@step
def recurrent(d: Draft) -> Made:
    v = d.pick(3, 3)
    kind = d.rng.choice(["GRU", "LSTM", "RNN"])
    net, made = d.module(f"nn.{kind}({d.shape(v)[-1]}, 2, batch_first=True)")
    return f"{net}({v})[0]", made


@step
def attention(d: Draft) -> Made:
    v = d.pick(3, 3)
    if d.rng.random() < 0.4:
        return f"F.scaled_dot_product_attention({v}, {v}.sin(), {v})"
    n = d.shape(v)[-1]
    weights = d.rng.choice(["True", "False"])
    net, made = d.module(f"nn.MultiheadAttention({n}, 1, batch_first=True)")
    return f"{net}({v}, {v}, {v}, need_weights={weights})[0]", made


@step
def reshape(d: Draft) -> Made:
    v = d.pick(1)
    shape = d.shape(v)
    n, forms = math.prod(shape[1:]), [f"{v}.flatten(1)" if len(shape) > 1 else f"{v}.unsqueeze(-1)"]
    for k in range(1, n + 1):
        if n % k == 0:
            forms += [
                f"{v}.reshape(len({v}), {k}, {n // k})",
                f"{v}.reshape({v}.shape[0], -1, {k})",
            ]
    forms += [f"{v}.unsqueeze(1)", f"{v}[:, None]", f"{v}.contiguous().view({v}.size(0), -1)"]
    forms += [
        f"{v}.unsqueeze(-1)",
        f"{v}.unsqueeze(-1).squeeze(-1)",
        f"{v}.flatten(1).unflatten(1, (-1, 1))",
    ]
    return d.rng.choice([f for f in forms if len(shape) > 1 or "(1)" not in f])


@step
def permute(d: Draft) -> Made:
    v = d.pick(3)
    order = list(range(1, len(d.shape(v))))
    d.rng.shuffle(order)
    forms = [f"{v}.permute(0, {', '.join(map(str, order))})", f"{v}.transpose(1, -1)", f"{v}.mT"]
    forms += [f"{v}.movedim(1, -1)", f"{v}.swapaxes(-1, -2)"]
    return d.rng.choice(forms)


@step
def expand(d: Draft) -> Made:
    v = d.pick(2, 3)
    tail = ", ".join(["-1"] * (len(d.shape(v)) - 1))
    ones = ", ".join(["1"] * (len(d.shape(v)) - 1))
    forms = [
        f"{v}.unsqueeze(1).expand(-1, 2, {tail})",
        f"{v}.repeat(1, 2{', 1' * (len(d.shape(v)) - 2)})",
    ]
    forms += [
        f"{v}.repeat_interleave(2, dim=-1)",
        f"{v}[:, None].expand(len({v}), 2, *{v}.shape[1:])",
    ]
    forms += [f"torch.tile({v}, ({ones}, 2))[..., 0]"]
    return d.rng.choice(forms)


@step
def sliced(d: Draft) -> Made:
    v = d.pick()
    n = d.shape(v)[-1]
    i = d.rng.randrange(n)
    forms = [
        f"{v}[..., {i}:]", f"{v}[..., :{i + 1}]", f"{v}[..., ::2]", f"{v}[:, -1:]",
        f"{v}[..., {i}]", f"{v}.narrow(-1, {i}, 1)", f"{v}.select(-1, {i})", f"{v}[:, [0, -1]]",
        f"{v}[..., [{i}, 0, {i}]]", f"{v}[:, torch.tensor([0, 0])]", f"{v}[:, ..., None, {i}]",
        f"{v}.flip(-1)", f"{v}.roll(1, -1)",
        f"{v}[..., torch.arange({n}) != {i}]" if n > 1 else f"{v}.flip(1)", f"{v}.unbind(-1)[{i}]",
        f"{v}.take_along_dim(torch.tensor({i}).expand_as({v}[..., :1]), -1)",
    ]  # fmt: skip
    return d.rng.choice(forms)


@step
def diagonal(d: Draft) -> Made:
    v = d.pick(2, 3)
    if len(d.shape(v)) == 2:
        return f"torch.diag_embed({v})"
    return d.rng.choice([f"{v}.diagonal(dim1=1, dim2=2)", f"{v}.tril()", f"{v}.triu(1)"])


@step
def where(d: Draft) -> Made:
    v = d.pick(1)
    forms = [
        "torch.where({v} > 0.2, {v} ** 2, {v}.sin())", "{v}.masked_fill({v} > 0.3, 0.5)",
        "{v} * ({v} > 0)", "torch.where({v} > {w}, {v}, {w} * 2)",
        "torch.where({v} > 0, {v}, torch.zeros_like({v}))",
        "torch.where({v}.detach().abs() > 0.4, ({v} / 2).exp(), {v})",
        "({v} > 0).to({v}.dtype) * {w}",
    ]  # fmt: skip
    return d.rng.choice(forms).format(v=v, w=d.like(v))


@step
def gather(d: Draft) -> Made:
    v = d.pick(2, 2)
    n = d.shape(v)[-1]
    i = d.rng.randrange(n)
    forms = [
        f"{v}.gather(1, torch.full((len({v}), 2), {i}))",
        f"{v}.index_select(1, torch.tensor([{i}, 0]))",
        f"{v}.scatter(1, torch.zeros(len({v}), 1, dtype=torch.long), {v}[:, -1:] ** 2)",
        f"{v}.scatter_add(1, torch.zeros(len({v}), {n}, dtype=torch.long), {v}.sin())",
        f"{v}.index_add(1, torch.tensor([{i}]), {v}[:, :1] ** 2)",
        f"{v}.index_fill(1, torch.tensor([{i}]), 0.3)",
        f"{v}.index_copy(1, torch.tensor([{i}]), {v}[:, :1].cos())",
        f"{v}.gather(1, {v}.argsort(1))", f"{v}.sort(-1).values", f"{v}.topk(1, -1).values",
        f"{v}.gather(1, {v}.argmax(1, keepdim=True))",
        f"{v}.scatter_reduce(1, torch.zeros(len({v}), {n}, dtype=torch.long), {v}.sin(), 'mean')",
        f"{v}.scatter_reduce(1, torch.zeros(len({v}), 1).long(), {v}[:, :1] + 3, 'prod')",
        f"{v}.masked_scatter(torch.ones_like({v}, dtype=torch.bool), {v}.flip(1) ** 2)",
    ]  # fmt: skip
    return d.rng.choice(forms)


@step
def by_integer(d: Draft) -> Made:
    """A side input of integers picks entries or factors."""
    if not d.integers:
        raise Inapplicable
    k, v = d.rng.choice(d.integers), d.pick(2, 2)
    forms = [f"{v} * (1.0 + {k}[:, None])", f"torch.where({k}[:, None] == 1, {v} ** 2, {v})"]
    if d.shape(v)[1] > 1:
        forms += [f"{v}.gather(1, {k}[:, None])", f"{v}[torch.arange(len({v})), {k}]"]
        forms += [f"({v} * F.one_hot({k}, {d.shape(v)[1]})).sum(1)"]
    return d.rng.choice(forms)


REDUCTIONS = (
    "{v}.sum({d})", "{v}.mean({d}, keepdim=True)", "{v}.amax({d})", "{v}.logsumexp({d})",
    "{v}.prod({d})", "torch.linalg.vector_norm({v} + 2, dim={d})",
    "({v} + 2).norm(dim={d}, keepdim=True)", "{v}.cumsum({d})", "{v}.cumprod({d})",
    "{v}.max({d}).values", "{v}.amin({d}, keepdim=True)", "{v}.logcumsumexp({d})",
    "{v}.median({d}).values", "{v}.cummax({d}).values", "({v} + 3).norm(p=3, dim={d})",
    "{v}.diff(dim={d}, prepend={v}.narrow({d}, 0, 1) * 0)", "{v}.square().mean({d}).sqrt()",
    "torch.special.logsumexp({v}, {d})", "torch.trapezoid({v}, dim={d})",
)  # fmt: skip


@step
def reduction(d: Draft) -> Made:
    v = d.pick()
    return d.rng.choice(REDUCTIONS).format(v=v, d=d.dim(v))


@step
def spread(d: Draft) -> Made:
    v = d.pick()
    dim = d.dim(v)
    if d.shape(v)[dim] < 2:
        raise Inapplicable
    return d.rng.choice([
        f"{v}.var({dim})", f"{v}.std({dim}, keepdim=True)", f"torch.var_mean({v}, {dim})[0]",
        f"{v}.var({dim}, correction=0)", f"({v} - {v}.mean({dim}, keepdim=True))",
    ])  # fmt: skip


@step
def product(d: Draft) -> Made:
    v = d.pick(2, 3)
    if len(d.shape(v)) == 2:
        forms = [
            "torch.einsum('bi,bj->bij', {v}, {w}.sin())", "{v}.unsqueeze(2) @ {w}.unsqueeze(1)",
            "({v} * {w}).sum(1)", "torch.einsum('bi,bi->b', {v}, {w})",
            "torch.bmm({v}[:, None], {w}[:, :, None]).squeeze(1)",
            "torch.cdist({v}[:, None] + 2, {w}[:, None] ** 2 - 3)",
            "F.cosine_similarity({v} + 2, {w} - 3, dim=1)",
        ]  # fmt: skip
    else:
        forms = [
            "torch.bmm({v}, {w}.mT)", "{v} @ {w}.transpose(1, 2)",
            "torch.einsum('bij,bkj->bik', {v}, {w})", "torch.baddbmm({v} @ {v}.mT, {v}, {w}.mT)",
            "torch.einsum('bij,bij->bi', {v}, {w})",
            "torch.tensordot({v}, torch.ones(2, {n}), dims=([2], [1]))",
        ]  # fmt: skip
    return d.rng.choice(forms).format(v=v, w=d.like(v), n=d.shape(v)[-1])


@step
def pointwise(d: Draft) -> Made:
    v = d.pick(1)
    forms = [
        "{v} + {w}", "{v} * {w}", "{v} - 2 * {w}", "{v} / ({w} ** 2 + 1)",
        "torch.atan2({v}, {w} ** 2 + 1)", "torch.hypot({v}, {w} + 3)", "torch.logaddexp({v}, {w})",
        "torch.lerp({v}, {w}, 0.3)", "torch.addcmul({v}, {w}, {v})", "({v} ** 2 + 1) ** {w}.tanh()",
        "torch.where({w} > 0, {v}, {w})", "torch.addcdiv({v}, {w}, {v} ** 2 + 1)",
        "F.smooth_l1_loss({v}, {w} + 3, reduction='none')",
    ]  # fmt: skip
    return d.rng.choice(forms).format(v=v, w=d.like(v))


@step
def normalized(d: Draft) -> Made:
    v = d.pick(2, 4)
    n, dim = d.shape(v)[-1], d.dim(v)
    if d.shape(v)[dim] == 1:  # a constant, up to rounding
        raise Inapplicable
    forms = [
        f"{v}.softmax({dim})",
        f"F.log_softmax({v}, {dim})",
        f"F.normalize({v} + 2, dim={dim})",
    ]
    forms += [f"F.softmin({v}, dim={dim})", f"F.normalize({v} + 3, p=3.0, dim={dim})"]
    if n > 1:
        forms += [f"F.layer_norm({v}, ({n},))", f"F.rms_norm({v}, ({n},))"]
    if n > 1 and len(d.shape(v)) > 2:
        forms += [
            f"F.group_norm({v}, 1)",
            f"F.group_norm({v}, {d.shape(v)[1]})",
            f"F.instance_norm({v})",
        ]
    return d.rng.choice(forms)


@step
def norm_module(d: Draft) -> Made:
    v = d.pick(2, 3)
    channels = d.shape(v)[1]
    forms = [
        f"nn.BatchNorm1d({channels})",
        f"nn.GroupNorm(1, {channels})",
        f"nn.LayerNorm({d.shape(v)[-1]})",
    ]
    if math.prod(d.shape(v)[1:]) < 2 or d.shape(v)[-1] < 2:
        forms = forms[:1]
    net, made = d.module(d.rng.choice(forms))
    return f"{net}({v})", made


@step
def joined(d: Draft) -> Made:
    v = d.pick()
    w, dim = d.like(v), d.dim(v)
    forms = [
        f"torch.cat([{v}, {w}.sin()], {dim})", f"torch.stack([{v}, {w}], 1)",
        f"torch.cat([{v}, {v}.new_ones({v}.shape)], -1)", f"torch.stack([{v} * 2, {w}.cos()], -1)",
        f"torch.cat({v}.split(1, {dim})[::-1], {dim})", f"{v}.chunk(2, {dim})[0]",
        f"sum({v}.split(1, {dim}))", f"torch.hstack([{v}, {w}])",
    ]  # fmt: skip
    if len(d.shape(v)) == 2:
        forms += [
            f"F.glu(torch.cat([{v}, {w}], 1))",
            f"F.pad({v}, (1, 0), value=0.5)",
            f"torch.column_stack([{v}, {w}])",
        ]
    return d.rng.choice(forms)


@step
def in_place(d: Draft) -> Made:
    v = d.pick(2, 3)
    w, t, n = d.like(v), d.fresh("t"), d.shape(v)[-1]
    i = d.rng.randrange(n)
    start = d.rng.choice(
        [
            f"{v}.clone()",
            f"{v} * 2",
            f"torch.zeros_like({v})",
            f"{v}.sin()",
            f"{v}.new_zeros({v}.shape)",
        ]
    )
    change = d.rng.choice([
        f"{t}.add_({w})", f"{t}.mul_({w}.cos())", f"{t}[..., {i}] = {w}[..., 0] ** 2",
        f"{t}[..., :1].copy_({w}[..., -1:])", f"{t}.masked_fill_({w} > 0.1, 0.4)",
        f"{t}[:, 0] += {w}[:, -1]", f"{t}.tanh_()", f"{t}.clamp_(-0.6, 0.8)",
        f"{t}[{w} > 0.2] = 0.7", f"{t}[..., {i}:].mul_({w}[..., {i}:])", f"{t}.sub_({w}).div_(2)",
        f"{t}.copy_({w} ** 2)",
        f"{t}.index_put_((torch.arange(len({t})), torch.tensor([0])), {w}[:, 0] ** 2)",
        f"{t}.zero_()", f"{t}.addcmul_({w}, {w})", f"{t} *= {w}",
        f"{t}.select(-1, {i}).add_(1.5).mul_({w}[..., 0])",
        f"{t}.index_add_(-1, torch.tensor([{i}]), {w}[..., :1].sin())", f"{t}.fill_(0.5)",
        f"{t}.lerp_({w}, 0.3)",
        f"{t} = {t}.contiguous(); {t}.flatten(1)[:, 0].mul_(3)",  # a view for batches of any size
        f"{t}[{w} > 0] *= 2",
        f"{t}.transpose(0, 1)[0].add_({w}[:, 0])", f"{t}.exp_().add_({w})",
        f"{t}.unsqueeze_(1).squeeze_(1)", f"{t}[..., {i}] = 0.3", f"torch.sin({w}, out=None)",
        f"F.relu_({t})", f"{t}.pow_(2)",
        f"{t}.data.mul_(1.0)" if d.rng.random() < 0.2 else f"{t}.neg_()",
    ])  # fmt: skip
    more = d.rng.choice([(), (), (f"{t}.mul_({v})",), (f"{t} += 0.5 * {w}",)])
    return [f"{t} = {start}", change, *more, t], ()


@step
def control_flow(d: Draft) -> Made:
    v, t = d.pick(2, 3), d.fresh("t")
    forms = [
        [f"{t} = {v} ** 2 if {v}.shape[-1] % 2 else {v}.sin()", f"{t} * 2"],
        [f"{t} = {v}", f"for i in range({v}.shape[1]): {t} = {t} + {v}[:, i : i + 1].sin()", t],
        [f"{t} = [{v}[:, i] ** (i + 1) for i in range({v}.shape[1])]", f"torch.stack({t}, 1)"],
        [f"{t} = {v}", f"while {t}.ndim < 4: {t} = {t}.unsqueeze(1)", f"{t}.sin()"],
        [
            f"{t} = {v}.new_zeros({v}.shape)",
            f"for i in range({v}.shape[-1]): {t}[..., i] = {v}[..., i] * {v}[..., i - 1]",
            t,
        ],
        [f"{t} = {v}.numel() // len({v})", f"{v} * {t} / 4"],
    ]  # fmt: skip
    return d.rng.choice(forms), ()


@step
def branch_on_values(d: Draft) -> Made:
    """Row by row, as a Python branch on values has to be."""
    v, t = d.pick(2, 2), d.fresh("t")
    return [
        f"{t} = [r ** 2 if float(r.sum()) > 0 else r.sin() for r in {v}]",
        f"torch.stack({t})",
    ], ()


@step
def hidden(d: Draft) -> Made:
    """A draw that no seed of torch's moves, and side effects."""
    net, made = d.module(f"Dice({d.rng.randrange(10**6)})")
    return f"{net}({d.pick(1)})", made


@step
def blind(d: Draft) -> Made:
    v, t = d.pick(1), d.fresh("t")
    w = d.like(v)
    forms = [
        [f"{v} * {w}.detach()"],
        ["with torch.no_grad():", f"    {t} = {w}.cos()", f"{v} * {t}"],
        [f"{v}.sin() + {w}.detach() ** 2"],
        [f"{v} - {w}.clone().detach()"],
        ["with torch.no_grad():", f"    {t} = ({w} > 0).to({w}.dtype)", f"{v} ** 2 * {t}"],
    ]
    return d.rng.choice(forms), ()


@step
def with_shared(d: Draft) -> Made:
    if not d.shared:
        raise Inapplicable
    s, v = d.rng.choice(d.shared), d.pick()
    rows, last = d.shape(s)[0], d.shape(v)[-1]
    forms = [f"{v} * {s}.sum().sin()", f"{v} + {s}.prod() / 3", f"({v} * {s}[0, 0]).tanh()"]
    if d.shape(s)[1] == last:
        forms += [f"{v} @ {s}.T", f"F.linear({v}, {s}).tanh()", f"{v} * {s}[0]"] * 2
    if rows == last:
        forms += [f"{v} @ {s}"] * 3
    return d.rng.choice(forms)


@step
def matrix(d: Draft) -> Made:
    v = d.pick(3, 3)
    a, n = d.fresh("t"), d.shape(v)[1]
    make = f"{a} = {v} @ {v}.mT + 2 * torch.eye({n})"
    forms = [
        f"torch.linalg.det({a})", f"torch.linalg.slogdet({a})[1]", f"torch.linalg.inv({a})",
        f"torch.linalg.cholesky({a})", f"torch.linalg.solve({a}, {v})", f"torch.logdet({a})",
        f"torch.linalg.matrix_exp({a} / 5)", f"torch.linalg.solve({a}, {v}[..., 0])",
        f"torch.linalg.matrix_power({a} / 2, 2)", f"{a}.diagonal(dim1=-2, dim2=-1).sum(-1)",
        f"torch.linalg.matrix_norm({a})", f"torch.cholesky_solve({v}, torch.linalg.cholesky({a}))",
        f"torch.linalg.pinv({a})",
    ]  # fmt: skip
    return [make, d.rng.choice(forms)], ()


@step
def transformed(d: Draft) -> Made:
    v = d.pick(2, 2)
    forms = [
        f"torch.vmap(lambda r: r.sin() * r.sum())({v})",
        f"torch.func.jvp(torch.sin, ({v},), ({v}.cos(),))[1]",
        f"torch.func.grad(lambda t: (t ** 3).sum())({v})",
        f"torch.vmap(torch.func.grad(lambda r: r.prod().sin()))({v})",
        f"torch.fft.rfft({v}).abs().square()" if d.shape(v)[1] > 1 else f"{v}.sin()",
    ]  # fmt: skip
    return d.rng.choice(forms)


@mixing
def centered(d: Draft) -> Made:
    v = d.pick()
    forms = [
        "{v} - {v}.mean(0)", "{v} * {v}.sum(0, keepdim=True).sin()", "{v}.softmax(0)",
        "{v}.cumsum(0)", "{v}.roll(1, 0)", "{v}.flip(0) * {v}", "{v} / ({v}.norm() + 1)",
        "F.normalize({v} + 2, dim=0)", "{v}[torch.arange(len({v}) - 1, -1, -1)].sin()",
        "{v} * {v}.max()", "({v}.flatten(1) @ {v}.flatten(1).T).softmax(-1) @ {v}.flatten(1)",
        "{v}.cumprod(0)", "{v} + {v}[:1] ** 2", "torch.cat([{v}[1:], {v}[:1]]).cos()",
        "{v} + {v}[-1] * 0.01", "{v}.reshape(-1).roll(1).reshape({v}.shape)",
    ]  # fmt: skip
    return d.rng.choice(forms).format(v=v)


@mixing
def training_norm(d: Draft) -> Made:
    v = d.pick(2, 2)
    return f"F.batch_norm({v}, None, None, training=True)"


# --- generating ---------------------------------------------------------------------------

MIXED_SHARE = 0.08


def generate(seed: int) -> Program | None:
    """The program of a seed, or ``None`` where its values are no good to compare."""
    rng = random.Random(seed)
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = _draft(rng, seed)
        finally:
            torch.set_default_dtype(before)
    return program if program is not None and is_fair(program) else None


def _inputs(rng: random.Random) -> list[Input]:
    shape = rng.choice(
        [(3,), (2,), (4,), (5,), (2, 2), (2, 3), (3, 2), (1,), (), (1, 3), (1, 2, 2), (6,)]
    )
    keys = ("p", "a") if rng.random() < 0.08 and math.prod(shape) <= 3 else ()
    in_dim = rng.choice([1, -1]) if rng.random() < 0.12 and shape and not keys else 0
    inputs = [Input("x", shape, in_dim, keys=keys)]
    if rng.random() < 0.3:
        inputs.append(Input("y", rng.choice([(3,), (2,), (2, 2)])))
    if rng.random() < 0.25:
        inputs.append(Input("s", (rng.randint(1, 3), rng.randint(1, 3)), None))
    if rng.random() < 0.25:
        inputs.append(Input("k", (), integer=True))
    return inputs


def _draft(rng: random.Random, seed: int) -> Program | None:
    inputs = _inputs(rng)
    draft = Draft(rng, inputs, seed)
    first = len(draft.rows)
    count, steps = rng.randint(1, 9), []
    mix_at = rng.randrange(count) if rng.random() < MIXED_SHARE else -1
    for attempt in range(4 * count):
        mixed = len(steps) == mix_at and not any(s.mixing for s in steps)
        kind = rng.choice(list(MIXING if mixed else STEPS))
        made = draft.try_step(kind, mixed)
        steps += [made] if made is not None else []
        if len(steps) == count:
            break
    if not steps:
        return None
    argnums: int | tuple[int, ...] = 0
    floats = [i for i, given in enumerate(inputs) if not given.integer]
    if len(floats) > 1 and rng.random() < 0.4:
        argnums = rng.choice([(0, floats[1]), (floats[1], 0), floats[1], -len(inputs) + floats[-1]])
    output, out_dims = _output(draft, first)
    return Program(seed, tuple(inputs), tuple(steps), output, argnums, out_dims)


def _output(draft: Draft, first: int) -> tuple[str, int]:
    rng = draft.rng

    def small(name: str) -> str:
        n = math.prod(draft.shape(name)[1:])
        return (
            name if n <= MOST_OUTPUTS else f"{name}.flatten(1)[:, :{rng.randint(2, MOST_OUTPUTS)}]"
        )

    last = small(draft.rows[-1])
    if rng.random() < 0.15 and len(draft.rows) > first + 1:
        other = small(rng.choice(draft.rows[first:]))
        form = rng.choice(
            ["({a}, {b})", "{{'z': {a}, 'a': {b}}}", "[{a}, ({b},)]", "({a}, None, {b})"]
        )
        return form.format(a=last, b=other), 0
    if rng.random() < 0.1 and "flatten" in last:
        return f"({last}).movedim(0, 1)", 1
    return last, 0


def is_fair(program: Program) -> bool:
    """Whether values and derivatives are moderate, and no kink is near, at every point."""
    try:
        with program.running() as scope:
            return all(_is_smooth_at(program, scope, point) for point in range(VALUES))
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return False  # plain autograd cannot do it either


def _is_smooth_at(program: Program, scope: dict[str, Any], point: int) -> bool:
    """Plain first and second derivatives along a direction, against central differences."""
    args = eval(program.arguments(point), scope)
    leaves, spec = optree.tree_flatten(args)
    floats = [i for i, x in enumerate(leaves) if x.is_floating_point()]
    torch.manual_seed(point)
    direction = [torch.randn_like(leaves[i]) for i in floats]
    weights: list[Tensor] = []

    def scalar(inputs: list[Tensor]) -> Tensor:
        given = list(leaves)
        for i, x in zip(floats, inputs):
            given[i] = x.clone()
        outs = optree.tree_leaves(scope["func"](*optree.tree_unflatten(spec, given)))
        if not weights:
            weights.extend(torch.randn_like(out) for out in outs)
        return sum((w * out).sum() for w, out in zip(weights, outs))

    def slope(step: float, *, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [(leaves[i] + step * t).requires_grad_() for i, t in zip(floats, direction)]
        value = scalar(inputs)
        zero = value.new_zeros(())
        if not value.requires_grad:
            return value, zero, zero
        grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        first = sum((g * t).sum() for g, t in zip(grads, direction))
        if not twice or not first.requires_grad:
            return value, first, zero
        grads = torch.autograd.grad(first, inputs, materialize_grads=True)
        return value, first, sum((g * t).sum() for g, t in zip(grads, direction))

    here = slope(0.0, twice=True)
    if not all(is_moderate(v) for v in here):
        return False
    if is_blind(program):  # the differences would see through it
        return True
    h = 1e-5
    plus, minus = slope(h, twice=False), slope(-h, twice=False)
    return all(
        abs(float((plus[n] - minus[n]) / (2 * h) - here[n + 1]))
        < 1e-4 * (1 + abs(float(here[n + 1])))
        for n in (0, 1)
    )


def is_blind(program: Program) -> bool:
    """Whether autograd is kept from a part of it."""
    lines = [line for made in program.steps for line in made.body]
    return any(word in line for line in lines for word in ("detach", "no_grad", ".data"))


def dice(scope: dict[str, Any]) -> list[Any]:
    return [x for x in scope.values() if type(x).__name__ == "Dice"]


# --- checking -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A transform with some words, called as often as points are given."""

    transform: str
    words: tuple[tuple[str, Any], ...] = ()
    points: tuple[int, ...] = (0, 1)
    indices: tuple[tuple[int, ...], ...] = ()
    nested: bool = False
    backward: bool = False
    inside: bool = False  # of torch.func.grad, which carries the result along

    @property
    def is_auto(self) -> bool:
        given = dict(self.words)
        return given.get("engine", "auto") == "auto" and given.get("mode", "auto") == "auto"

    def make(self, program: Program, scope: dict[str, Any]) -> Callable[..., Any]:
        return eval(self.expression(program), {**scope, **vars(funcjac)})

    def expression(self, program: Program) -> str:
        words = {key: v for key, v in program.words.items() if v != 0}
        if all(dim == 0 for dim in program.in_dims):
            words.pop("in_dims")
        words |= dict(self.words)
        argnums = words.pop("argnums", 0)
        given = [f"{key}={value!r}" for key, value in words.items()]
        given = ([f"argnums={argnums!r}"] if argnums != 0 else []) + given
        if self.indices:
            given = [repr(list(self.indices)), *given]
        inner = f"{self.transform}({', '.join(['func', *given])})"
        if self.inside:
            zero = f"lambda *args: (torch.zeros(()), {inner}(*args))"
            return f"lambda *args: torch.func.grad({zero}, has_aux=True)(*args)[1]"
        if not self.nested:
            return inner
        again = [g for g in given if not g.startswith("out_dims")]
        return f"{self.transform}({', '.join([inner, *again])})"


@dataclass
class Failure:
    """What went wrong: ``kind`` and where; programs are shrunk as long as these stay."""

    program: Program
    check: Check
    kind: str
    text: str = ""

    def key(self) -> tuple[str, str]:
        return self.kind, self.text[:60] if self.kind == "error" else ""

    def reproducer(self) -> str:
        lines = [HEADER, self.program.source(), ""]
        lines += [f"transform = {self.check.expression(self.program)}"]
        lines += [
            f"for args in [{', '.join(self.program.arguments(p) for p in self.check.points)}]:"
        ]
        if self.check.backward:
            lines += ["    wrt = args[0]['a'] if isinstance(args[0], dict) else args[0]"]
            lines += ["    wrt.requires_grad_()"]
        lines += ["    found = transform(*args)", "    print(found)"]
        if self.check.backward:
            lines += ["    print(torch.autograd.grad(found.square().sum(), wrt))"]
        return "\n".join(lines) + "\n"


@functools.lru_cache(maxsize=256)
def expected(program: Program, check: Check, point: int, draw: int = 1) -> Any:
    """What plain autograd makes of one row after the other."""
    with program.running(twin=True, draw=draw) as scope:
        return right_by_rows(program, check, scope, eval(program.arguments(point), scope))


def right_by_rows(program: Program, check: Check, scope: dict[str, Any], args: Any) -> Any:
    func, words = scope["func"], program.words
    name = check.transform
    if check.backward:
        leaves = [x for x in optree.tree_leaves(args) if x.is_floating_point()]
        for x in leaves:
            x.requires_grad_()
        return gradients(oracles.by_rows(func, args, graph=True, **words), leaves)
    if name == "batch_jacobian" and not check.nested:
        return oracles.by_rows(func, args, **words)
    if name in ("batch_hessian", "batch_jacobian"):
        return oracles.hessian(func, args, **words)
    if name == "batch_partials":
        return oracles.partials(func, args, check.indices, **words)
    oracle = getattr(oracles, name.removeprefix("batch_").removeprefix("hessian_"))
    return oracle(func, args, **words)


def gradients(jac: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Of a fixed contraction of the Jacobian."""
    loss = sum(((i + 1) * block.square()).sum() for i, block in enumerate(optree.tree_leaves(jac)))
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(loss, leaves, materialize_grads=True))


def is_documented(error: Exception, name: str) -> bool:
    known = type(error) in (TypeError, ValueError, RuntimeError)
    known = known or isinstance(error, (funcjac.BatchMixingError, funcjac.VerificationError))
    return known and str(error).startswith(f"{name}: ")


def run(program: Program, check: Check) -> Failure | None:
    """The first failure of a check, if any."""
    with program.running(draw=None) as scope:
        if program.mixing:
            return _run_mixing(program, check, scope)
        transform = check.make(program, scope)
        for point in check.points:
            draw = max([die.runs for die in dice(scope)], default=0) + 1
            try:
                right = expected(program, check, point, draw)
            except (RuntimeError, NotImplementedError):
                return None  # plain autograd cannot differentiate so often
            if not all(map(is_moderate, optree.tree_leaves(right))):
                return None
            failure = _compare(program, check, scope, transform, point, right)
            if failure is not None:
                return failure
            if any(die.runs > draw for die in dice(scope)):
                return None  # as columns of different draws may come of it
    return None


def runs_once(program: Program, check: Check) -> bool:
    """Whether one plain run must be all that a call takes.

    Not where an engine was asked for that runs it again, where an argument that rows share is
    differentiated, where torch is wrong or where the function writes into its argument.
    """
    engine = dict(check.words).get("engine", "auto")
    once = engine in ("auto", "sum") and not check.inside
    return once and not takes_shared(program) and not may_be_replaced(program)


def takes_shared(program: Program) -> bool:
    """Whether an argument that rows share is differentiated."""
    wanted = (program.argnums,) if isinstance(program.argnums, int) else program.argnums
    return any(program.in_dims[i] is None for i in wanted)


AGAIN = re.compile(
    "norm|attention|Multihead|Norm|det|solve|chol|logcumsum|logaddexp|hardsig|cumprod|scatter"
    r"|\*\*|pow|pdist|cdist|unpool|in_place|_\(|\+=|\*=|\] ="
)


def may_be_replaced(program: Program) -> bool:
    lines = [line for made in program.steps for line in (*made.setup, *made.body)]
    return any(AGAIN.search(line) for line in lines)


def is_moderate(x: Tensor) -> bool:
    """Finite, not large, and not all rounding, which the README says may be refused."""
    size = float(x.abs().max()) if x.numel() else 0.0
    return size == 0 or ROUNDING < size < LARGE


def _compare(program, check, scope, transform, point, right) -> Failure | None:
    args = eval(program.arguments(point), scope)
    leaves = [x for x in optree.tree_leaves(args)]
    if check.backward:
        for x in leaves:
            x.requires_grad_(x.is_floating_point())
    kept = held(scope) + leaves
    before = [(x, x.detach().clone(), x.requires_grad) for x in kept]
    started = [die.runs for die in dice(scope)]
    try:
        found = transform(*args)
        if check.backward:
            found = gradients(found, [x for x in leaves if x.is_floating_point()])
    except Exception as error:
        if is_documented(error, check.transform) and (
            not check.is_auto or (started and not runs_once(program, check))
        ):
            return None
        return Failure(program, check, "error", f"{type(error).__name__}: {error}")
    ran = [die.runs - n for die, n in zip(dice(scope), started)]
    for die, n in zip(dice(scope), ran):
        if runs_once(program, check) and n != 1:
            return Failure(program, check, "runs", f"{n} runs of func in one call")
        if dict(check.words).get("engine") == "vmap" or takes_shared(program):
            continue  # what func keeps belongs to a transform
        if die.count != die.runs or type(die.last) is not Tensor:
            return Failure(program, check, "state", "what func counts or keeps is not there")
        if torch._C._functorch.is_functorch_wrapped_tensor(die.last):
            return Failure(program, check, "state", "func kept a wrapper")
    if any(n != 1 for n in ran):
        return None  # each run drew another number
    for x, value, requires_grad in before:
        if x.requires_grad is not requires_grad or not torch.equal(x.detach(), value):
            return Failure(program, check, "state", "a tensor of the caller's was changed")
        if x.grad is not None or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return Failure(program, check, "state", "a gradient or a wrapper was left")
    text = difference(found, right)
    if text is not None and any(len(index) > 2 for index in check.indices):
        draw = max([die.runs for die in dice(scope)], default=1)
        with program.running(twin=True, draw=draw) as other:
            # Differences see through what autograd is kept from.
            right = found if is_blind(program) else third(program, check, other, args)
            text = difference(found, right, 1e-5)
    return None if text is None else Failure(program, check, "wrong", text)


def third(program: Program, check: Check, scope: dict[str, Any], args: Any) -> Any:
    """Partials, the third by differences of second ones.

    Plain third derivatives of some norms are wrong: see tests/torch_faults/test_plain_wrong.py.
    """
    h, at = 1e-5, program.argnums
    x = args[at].detach()
    found = []
    for index in check.indices:
        if len(index) < 3:
            found += oracles.partials(scope["func"], args, [index], **program.words)
            continue
        sides = []
        for sign in (h, -h):
            step = torch.zeros_like(x)
            step.movedim(program.in_dims[at], 0)[:, index[0]] = sign
            moved = (*args[:at], x + step, *args[at + 1 :]) if at >= 0 else None
            moved = moved or (*args[:at], x + step, *(args[at + 1 :] if at < -1 else ()))
            sides += oracles.partials(scope["func"], moved, [index[1:]], **program.words)
        found.append(optree.tree_map(lambda a, b: (a - b) / (2 * h), *sides, namespace="funcjac"))
    return tuple(found)


def held(scope: dict[str, Any]) -> list[Tensor]:
    """Constants, parameters and buffers of the program."""
    found = [x for x in scope.values() if isinstance(x, Tensor)]
    modules = [x for x in scope.values() if isinstance(x, nn.Module)]
    for module in [m for m in modules if m not in dice(scope)]:
        found += [*module.parameters(), *module.buffers()]
    return found


def difference(found: Any, right: Any, rtol: float = 1e-7) -> str | None:
    ours, spec = optree.tree_flatten(found, namespace="funcjac")
    theirs, right_spec = optree.tree_flatten(right, namespace="funcjac")
    if spec != right_spec:
        return f"structure {spec} instead of {right_spec}"
    for one, other in zip(ours, theirs):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{tuple(one.shape)} {one.dtype} instead of {tuple(other.shape)} {other.dtype}"
        scale = float(other.abs().max()) if other.numel() else 0.0
        if not torch.allclose(
            one.detach(), other.detach(), rtol=rtol, atol=rtol / 100 * (1 + scale)
        ):
            off = (one.detach() - other.detach()).abs().max()
            return f"off by {float(off):.3g}, where the largest entry is {scale:.3g}"
    return None


def _run_mixing(program: Program, check: Check, scope: dict[str, Any]) -> Failure | None:
    """Rows that do mix must be refused, by auto and by every engine that verifies."""
    args = eval(program.arguments(check.points[0]), scope)
    if not rows_mix(program, scope, args):
        return None
    if check.nested or check.backward or dict(check.words).get("check") is False:
        return None
    try:
        check.make(program, scope)(*args)
    except (funcjac.BatchMixingError, funcjac.VerificationError):
        return None
    except Exception as error:
        if not check.is_auto and is_documented(error, check.transform):
            return None
        return Failure(program, check, "error", f"{type(error).__name__}: {error}")
    return Failure(program, check, "mixing", "rows that mix were not refused")


def rows_mix(program: Program, scope: dict[str, Any], args: Any) -> bool:
    """Whether some output row has a derivative by another row of what is differentiated."""
    leaves, spec = optree.tree_flatten(args)
    dims = optree.broadcast_prefix(program.in_dims, args, none_is_leaf=True)
    wanted = (program.argnums,) if isinstance(program.argnums, int) else program.argnums
    sizes = [len(optree.tree_leaves(arg)) for arg in args]
    for a in [a % len(args) for a in wanted]:
        for i in range(sum(sizes[:a]), sum(sizes[: a + 1])):
            if dims[i] is None:
                continue

            def outs(x, i=i):
                given = [*leaves[:i], x.clone(), *leaves[i + 1 :]]
                found = optree.tree_leaves(scope["func"](*optree.tree_unflatten(spec, given)))
                return torch.cat(
                    [o.movedim(program.out_dims, 0).reshape(BATCH, -1) for o in found], 1
                )

            full = torch.autograd.functional.jacobian(outs, leaves[i])  # (B, M, *x)
            full = full.movedim(dims[i] + 2 if dims[i] >= 0 else dims[i], 1)
            size = full.abs().flatten(2).sum(2)
            off = size - torch.diag_embed(size.diagonal())
            if float(off.max()) > 1e-6 * (1 + float(size.max())):
                return True
    return False


# --- which checks ---------------------------------------------------------------------------

ENGINES, MODES = ("vmap", "sum", "loop"), ("rev", "fwd")
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")


def checks(
    program: Program, rng: random.Random, share: float = 1.0, *, unchecked: bool = False
) -> Iterator[Check]:
    """Everything to hold a program to; of all but the first, only a random ``share``.

    ``unchecked`` adds calls with ``check=False``, which see what torch itself makes of it.
    """
    yield Check("batch_jacobian", points=(0, 1, 2, 0))
    for check in _further(program, rng, unchecked):
        if rng.random() < share:
            yield check


def _further(program: Program, rng: random.Random, unchecked: bool) -> Iterator[Check]:
    for engine in ENGINES:
        for mode in MODES:
            words = (("engine", engine), ("mode", mode))
            yield Check("batch_jacobian", words)
            yield Check("batch_jacobian", (*words, ("chunk_size", rng.randint(1, 2))))
            yield Check("batch_jacobian", words, backward=True)
            if unchecked and not is_blind(
                program
            ):  # forward mode sees through no_grad; verification says so
                yield Check("batch_jacobian", (*words, ("check", False)), points=(1,))
    yield Check("batch_jacobian", (("check", False),), points=(0, 1, 2))
    keeps = any(made.kind == "hidden" for made in program.steps)
    if "None" not in program.output and not keeps:  # which torch.func itself cannot
        yield Check("batch_jacobian", inside=True, points=(0, 1, 2))
    yield Check("batch_jacobian", backward=True, points=(0, 1, 2, 0, 1))
    if program.mixing:
        return
    yield from _second(program, rng)


def _second(program: Program, rng: random.Random) -> Iterator[Check]:
    single = isinstance(program.argnums, int)
    if single and not program.inputs[program.argnums].keys and "(" not in program.output[:1]:
        yield Check("batch_jacobian", nested=True, points=(0, 1, 2, 0))
        yield Check("batch_jacobian", (("mode", rng.choice(MODES)),), nested=True)
    for name in ("batch_hessian", "batch_hessian_diagonal", "batch_laplacian"):
        yield Check(name, points=(0, 1, 2, 0, 1, 2))
        if name != "batch_hessian":
            yield Check(name, (("mode", "taylor"),))
        for mode in NESTED:
            yield Check(name, (("mode", mode), ("engine", rng.choice(ENGINES))))
    if not single:
        return
    given = program.inputs[program.argnums]
    if not given.keys and len(given.shape) == 1 and given.in_dim is not None:
        n = given.shape[0]
        orders = [(0,), (n - 1, n - 1), (0, n - 1), (n // 2,), (0, 0, n - 1)]
        indices = tuple(rng.sample(orders, 2))
        yield Check("batch_partials", indices=indices, points=(0, 1, 2, 0))
        yield Check("batch_partials", (("mode", "taylor"),), indices=indices)
        yield Check(
            "batch_partials", (("mode", "rev"), ("engine", rng.choice(ENGINES))), indices=indices
        )
    if not given.keys and is_field(program):
        yield Check("batch_divergence", points=(0, 1, 2, 0))
        yield Check(
            "batch_divergence", (("mode", rng.choice(MODES)), ("engine", rng.choice(ENGINES)))
        )


def is_field(program: Program) -> bool:
    """Whether rows of the output have the shape of rows of the input."""
    given = program.inputs[program.argnums]
    with program.running() as scope:
        args = eval(program.arguments(0), scope)
        out = scope["func"](*args)
    same = isinstance(out, Tensor) and given.in_dim == 0 and program.out_dims == 0
    return same and out.shape == args[program.argnums].shape


# --- shrinking -------------------------------------------------------------------------------


def shrink(failure: Failure, seconds: float = 30.0) -> Failure:
    """The shortest program found that fails alike: without steps, with variables for steps."""
    until, best, progress = time.monotonic() + seconds, failure, True
    for points in (best.check.points[:1], best.check.points[:2]):
        check = replace(best.check, points=points)
        found = _fails(best.program, replace(best, check=check))
        if found is not None:
            best = found
            break
    best = _fails(pruned(best.program), best) or best
    while progress and time.monotonic() < until:
        progress = False
        for candidate in smaller(best.program):
            candidate = pruned(candidate)
            if time.monotonic() > until:
                break
            if _size(candidate) >= _size(best.program):
                continue
            found = _fails(candidate, best)
            if found is not None:
                best, progress = found, True
                break
    return best


def _size(program: Program) -> tuple[int, int]:
    return sum(made.kind != "alias" for made in program.steps), len(program.source())


def pruned(program: Program) -> Program:
    """Without the steps that nothing of the output comes from."""
    used, kept = set(re.findall(r"\w+", program.output)), []
    for made in reversed(program.steps):
        if made.name in used:
            kept.append(made)
            used |= {word for line in made.body for word in re.findall(r"\w+", line)}
    return replace(program, steps=tuple(reversed(kept)))


def _fails(program: Program, failure: Failure) -> Failure | None:
    try:
        if not program.mixing and not is_fair(program):
            return None
        found = run(program, failure.check)
    except Exception:
        return None
    return found if found is not None and found.key() == failure.key() else None


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one step less, or with a variable in its place."""
    names = [n for given in program.inputs if not given.integer for n in given.names()]
    made = [s.name for s in program.steps]
    for name in made:
        yield replace(program, output=name, out_dims=0)
    for i, gone in enumerate(program.steps):
        rest = (*program.steps[:i], *program.steps[i + 1 :])
        yield replace(program, steps=rest)
        for other in [*made[:i], *names]:
            alias = Step("alias", gone.name, (f"{gone.name} = {other}",))
            if gone.kind != "alias":
                yield replace(program, steps=(*program.steps[:i], alias, *program.steps[i + 1 :]))
        if len(gone.body) > 1 and gone.kind in ("in_place", "control_flow"):
            for k in range(1, len(gone.body) - 1):
                fewer = replace(gone, body=(*gone.body[:k], *gone.body[k + 1 :]))
                yield replace(program, steps=(*program.steps[:i], fewer, *program.steps[i + 1 :]))
    for i, given in enumerate(program.inputs[1:], 1):
        text = program.source().split("def func", 1)[1].split(":", 1)[1]
        if (
            given.name not in text.split()
            and isinstance(program.argnums, int)
            and program.argnums == 0
        ):
            yield replace(program, inputs=(*program.inputs[:i], *program.inputs[i + 1 :]))


# --- running -----------------------------------------------------------------------------------


@dataclass
class Tally:
    programs: int = 0
    unfair: int = 0
    checks: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def search(
    seed: int,
    seconds: float,
    *,
    share: float = 1.0,
    stop: bool = True,
    unchecked: bool = False,
    tell: Callable[[Tally, Failure | None], None] = lambda tally, failure: None,
) -> Tally:
    """Draw programs from ``seed`` on until the time is over, or the first failure."""
    tally, start = Tally(), time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        tally.seconds = elapsed
        program = generate(seed)
        if program is None:
            tally.unfair += 1
        else:
            tally.programs += 1
            failed: set[Any] = set()
            for check in checks(program, random.Random(seed), share, unchecked=unchecked):
                tally.checks += 1
                failure = run(program, check)
                if failure is None or (failure.key(), check.transform) in failed:
                    continue
                failed.add((failure.key(), check.transform))
                failure = shrink(failure)
                tally.failures.append(failure)
                tell(tally, failure)
                if stop:
                    return tally
        seed += 1
        tell(tally, None)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Random programs through every transform.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--share", type=float, default=0.3, help="share of the checks for each")
    parser.add_argument("--stop", action="store_true", help="stop at the first failure")
    parser.add_argument("--unchecked", action="store_true", help="also with check=False")
    given = parser.parse_args()
    torch.set_num_threads(1)
    last = [time.monotonic()]

    def tell(tally: Tally, failure: Failure | None) -> None:
        if failure is not None:
            words = f"seed {failure.program.seed}: {failure.kind}: {failure.text}"
            print(f"\n# {words}\n{failure.reproducer()}", flush=True)  # noqa: T201
        if time.monotonic() - last[0] > 5:
            last[0] = time.monotonic()
            print(  # noqa: T201
                f"{tally.seconds:6.0f} s: {tally.programs} programs, {tally.unfair} left out, "
                f"{tally.checks} checks, {len(tally.failures)} failures",
                file=sys.stderr,
                flush=True,
            )

    words = {"share": given.share, "stop": given.stop, "unchecked": given.unchecked}
    tally = search(given.seed, 60 * given.minutes, tell=tell, **words)
    print(f"{tally.programs} programs, {tally.checks} checks, {len(tally.failures)} failures")  # noqa: T201
    sys.exit(bool(tally.failures))


if __name__ == "__main__":
    main()
