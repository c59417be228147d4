"""The steps that a program may have: each draws lines that make one new variable."""

import math
import random
from collections.abc import Callable
from typing import Any

from tests.sweeps.programs.program import BATCH, HEADER, LARGE, MOST_ELEMENTS, Input, Program, Step


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
