"""What every transform must make of a program: rows in plain autograd, and a refusal of mixing."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

import funcjac
from tests import oracles
from tests.sweeps.programs.program import BATCH, HEADER, Program, dice, is_blind, is_moderate


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
    r"|topk|sort|kthvalue|\.(max|min|median|mode)\("  # whose derivative is a scatter
)


def may_be_replaced(program: Program) -> bool:
    lines = [line for made in program.steps for line in (*made.setup, *made.body)]
    return any(AGAIN.search(line) for line in lines)


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
        # An output without a graph takes another run, which tells whether it was detached.
        expected_runs = (1, 2) if any(not x.any() for x in optree.tree_leaves(right)) else (1,)
        if runs_once(program, check) and n not in expected_runs:
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
