"""One transform of one case: called, compared, and put into a class."""

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funcjac import BatchMixingError, VerificationError
from tests.fresh import fresh
from tests.sweeps.coverage.oracle import Truth
from tests.sweeps.coverage.samples import Case, Parts
from tests.sweeps.coverage.transforms import MisshapenError, Transform, contracted

# From good to bad; a case has the worst class of its calls.
RIGHT = "right"
DOCUMENTED = "documented error"
TORCH = "as wrong as torch"
REFUSED = "refused, though the loop is right"
WRONG = "silently wrong"
STATE = "changed the caller's state"
CRASH = "crash or undocumented error"
CLASSES = (RIGHT, DOCUMENTED, TORCH, REFUSED, WRONG, STATE, CRASH)
FAILURES = (REFUSED, WRONG, STATE, CRASH)
# Units whose plain backward torch itself rounds to so much: 1 / 6 of hardsigmoid is a float32.
ROUNDED = {r"(?i)hardsigmoid": 1e-7}


@dataclass(frozen=True)
class Outcome:
    kind: str
    detail: str = ""

    @property
    def rank(self) -> int:
        return CLASSES.index(self.kind)


def judge(case: Case, truth: Truth, transform: Transform) -> Outcome:
    """The worst of some calls, the rows in another order in each."""
    parts = case.make()
    argnums = case.argnums if len(case.argnums) > 1 else case.argnums[0]
    func = inner = parts.func
    if transform.vouched:  # what other columns have seen must not help
        func = fresh(lambda *args: inner(*args))
    transformed = transform.of(func, argnums)
    found = []
    for turn in range(transform.calls):
        outcome = _one_call(case, truth, transform, parts, transformed, turn)
        if outcome.detail and transform.calls > 1 and turn:
            outcome = Outcome(outcome.kind, f"call {turn + 1}: {outcome.detail}")
        found.append(outcome)
        if outcome.kind in (CRASH, STATE):
            break
    return max(found, key=lambda outcome: outcome.rank)


def _one_call(case, truth, transform, parts, transformed, turn) -> Outcome:
    args = [x.roll(turn, 0).clone() for x in case.args]
    if transform.backward:
        for i in case.argnums:
            args[i].requires_grad_()
    effects = Effects.of(case, args, parts.module)
    state = State.take(args, case.constants, parts.module)
    error, gradients = None, None
    found: list[tuple[Any, int]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if transform.inside == "grad":
                result, gradients = _in_grad(transformed, truth, transform, case, args, turn)
                found = [(result, turn)]
            elif transform.inside == "vmap":
                found = _in_vmap(transformed, args, turn)
            else:
                result = transformed(*args)
                found = [(result, turn)]
                changed = effects.beyond(state, once=transform.once)
                if transform.backward and case.independent and not changed:
                    gradients = _gradients(result, truth, transform, case, parts, args, turn)
        except MisshapenError as problem:
            return Outcome(WRONG, str(problem))
        except Exception as problem:
            error = problem
    changed = effects.beyond(state, once=transform.once and error is None)
    if changed:
        return Outcome(STATE, "; ".join(sorted(changed)))
    if error is not None:
        outcome = _of_error(error, case, truth, transform)
    elif not case.independent and transform.vouched:
        return Outcome(DOCUMENTED, "rows depend on one another, and nobody looks")
    elif not case.independent:
        return Outcome(WRONG, "rows depend on one another, and a result came back")
    else:
        try:
            outcomes = [_of_result(r, gradients, case, truth, transform, t) for r, t in found]
            outcome = max(outcomes, key=lambda outcome: outcome.rank)
        except MisshapenError as problem:
            outcome = Outcome(WRONG, str(problem))
    if transform.inside == "vmap" and outcome.kind in FAILURES:
        return _beside_vmap(outcome, case, truth, transform, args, turn)
    return outcome


def _gradients(result, truth, transform, case, parts: Parts, args, turn) -> list[Tensor]:
    jac = transform.kind.read(result, truth, case)
    loss = contracted(jac, truth.weights.roll(turn, 0))
    wanted = [args[i] for i in case.argnums]
    if parts.module is not None:
        wanted += [p for p in parts.module.parameters() if p.requires_grad]
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in wanted]
    return list(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))


# --- inside of torch.func ----------------------------------------------------------------


def _in_grad(transformed, truth, transform, case, args, turn) -> tuple[Any, list[Tensor] | None]:
    """The result, as aux, and gradients through it where the loop over rows has them."""
    gives = "hessian" not in truth.errors and truth.weights is not None

    def loss(*args: Tensor) -> tuple[Tensor, Any]:
        result = transformed(*args)
        if not gives:
            return sum(args[i].sum() for i in case.argnums), result
        jac = transform.kind.read(result, truth, case)
        return contracted(jac, truth.weights.roll(turn, 0)), result

    gradients, result = torch.func.grad(loss, case.argnums, has_aux=True)(*args)
    return result, list(gradients) if gives else None


def _in_vmap(transformed, args: list[Tensor], turn: int) -> list[tuple[Any, int]]:
    """The results of two batches under one ``torch.vmap``, and how rows are rolled in them."""
    both = torch.vmap(transformed)(*_two(args))
    return [(tree_map(lambda x, i=i: x[i].contiguous(), both), turn + i) for i in range(2)]


def _two(args: list[Tensor]) -> list[Tensor]:
    return [torch.stack([x, x.roll(1, 0)]) for x in args]


def _beside_vmap(outcome: Outcome, case: Case, truth: Truth, transform, args, turn) -> Outcome:
    """An outcome under ``torch.vmap``, beside what torch itself makes of the rows there."""
    func, argnums = case.make().func, case.argnums

    def row(*inputs: Tensor) -> Tensor:
        outs = func(*[x.unsqueeze(0) for x in inputs])
        return torch.cat([out.reshape(-1) for out in ([outs] if type(outs) is Tensor else outs)])

    def rows(*args: Tensor) -> tuple[Tensor, Tensor]:
        values, jacs = [], []
        for inputs in zip(*[x.unbind(0) for x in args]):
            values.append(row(*inputs))
            jac = torch.func.jacrev(row, argnums)(*inputs)
            jacs.append(torch.cat([block.flatten(1) for block in jac], 1))
        return torch.stack(values), torch.stack(jacs)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values, jacs = torch.vmap(rows)(*_two(args))
            if transform.kind.order == "hessian":
                torch.vmap(torch.func.jacrev(lambda *args: rows(*args)[1]))(*_two(args))
    except Exception as error:
        words = f"torch.vmap of each row raises {type(error).__name__}: {str(error)[:200]}"
        return Outcome(DOCUMENTED, f"{words} (here: {outcome.detail[:200]})")
    if _gap(values[0].flatten(1), truth.value.roll(turn, 0), 1e-9):
        return Outcome(TORCH, f"torch.vmap gives other values (here: {outcome.detail[:200]})")
    right = truth.differences.get("jacobian", truth.jac)
    right = right if transform.kind.order == "jacobian" else None
    if outcome.kind == WRONG and right is not None and _gap(jacs[0], right.roll(turn, 0), 1e-6):
        return Outcome(WRONG, f"{outcome.detail} (torch.vmap of each row is wrong, too)")
    return outcome


# --- results -----------------------------------------------------------------------------


def _of_result(result, gradients, case, truth: Truth, transform, turn) -> Outcome:
    kind = transform.kind
    found = kind.read(result, truth, case).detach()
    plain = {"jacobian": truth.jac, "hessian": truth.hess}[kind.order]
    own = [size for pattern, size in ROUNDED.items() if re.search(pattern, case.unit)]
    kind = replace(kind, tolerance=max([kind.tolerance, *own]))
    outcome = _compare(found, plain, truth, kind, turn)
    if outcome.kind != RIGHT or gradients is None:
        return outcome
    return _compare_gradients(gradients, case, truth, turn)


def _compare(found: Tensor, plain: Tensor | None, truth: Truth, kind, turn) -> Outcome:
    order = kind.order
    blind = ~truth.value.isfinite().reshape(*truth.value.shape, *[1] * (found.ndim - 2))

    def right_of(whole: Tensor) -> Tensor:
        """Of what is not finite, no derivative is known."""
        return torch.where(blind, torch.nan, kind.right(whole)).roll(turn, 0)

    below = 1e-9 * _row_max(truth.jac) if order == "hessian" and truth.jac is not None else None
    if order in truth.differences:
        right = right_of(truth.differences[order])
        # Differences see no less than rounding of the values over their step, or its square.
        noise = (1e-10 if order == "jacobian" else 1e-7) * _row_max(truth.value.unsqueeze(-1))
        if order == "hessian" and truth.blur is not None:
            noise = torch.maximum(noise, truth.blur)
        noise = noise.roll(turn, 0)
        floor = _floor(below, turn, 1e-5)
        gap = _gap(found, right, 1e-4, noise if floor is None else floor + noise)
        if not gap:
            return Outcome(RIGHT)
        if plain is None:
            return Outcome(WRONG, f"plain autograd raises, and not what differences give: {gap}")
        if not _gap(found, right_of(plain), kind.tolerance, below):
            return Outcome(TORCH, truth.wrong.get(order, "the first derivative is wrong"))
        return Outcome(WRONG, f"plain autograd is wrong, and this too: {gap}")
    if plain is None:  # nothing to compare with: the first derivative is in doubt
        return Outcome(TORCH, "the first derivative of plain autograd is wrong or missing")
    gap = _gap(found, right_of(plain), kind.tolerance, _floor(below, turn))
    if gap and "jacobian" in truth.wrong:
        return Outcome(TORCH, gap)
    return Outcome(WRONG, gap + _where(truth)) if gap else Outcome(RIGHT)


def _where(truth: Truth) -> str:
    return f" (not smooth at rows {truth.kinks})" if truth.kinks else ""


def _floor(below: Tensor | None, turn: int, factor: float = 1.0) -> Tensor | None:
    return None if below is None else below.roll(turn, 0) * (factor / 1e-9 if factor < 1 else 1)


def _row_max(x: Tensor) -> Tensor:
    return x.nan_to_num(0, 0, 0).abs().flatten(1).amax(1)


def _gap(found: Tensor, right: Tensor, tolerance: float, floor: Tensor | None = None) -> str:
    """What is wrong with ``found``, relative to the largest derivative of the row; ``""``."""
    known = right.isfinite()
    strange = known & ~found.isfinite()
    if strange.any():
        return f"not finite in {int(strange.sum())} of {found.numel()} places"
    allowed = tolerance * _row_max(right) + 1e-12
    if floor is not None:
        allowed = allowed + floor
    error = _row_max(torch.where(known, found - right, 0))
    if bool((error <= allowed).all()):
        return ""
    b = int((error / allowed).argmax())
    return f"row {b} off by {float(error[b]):.1e}, its largest is {float(_row_max(right)[b]):.1e}"


def _compare_gradients(gradients, case: Case, truth: Truth, turn: int) -> Outcome:
    if truth.gradients is None:
        return Outcome(DOCUMENTED, "the loop has no gradients to compare with")
    count = len(case.argnums)
    by_differences = "hessian" in truth.differences
    gradients = gradients[: len(truth.gradients)]
    right = [g.roll(turn, 0) if i < count else g for i, g in enumerate(truth.gradients)]
    right = right[: len(gradients)]  # inside of torch.func, those by arguments alone
    floor = _largest(truth.differences.get("jacobian", torch.zeros(())))
    below = 0.0 if truth.jac is None else _largest(truth.jac)
    blur = 0.0
    if truth.blur is not None and truth.weights is not None:
        blur = float((truth.weights.abs().sum((1, 2)) * truth.blur).max())
    for i, (one, other) in enumerate(zip(gradients, right, strict=True)):
        known = other.isfinite()
        if bool((known & ~one.isfinite()).any()):
            return Outcome(WRONG, "gradient not finite")
        error, scale = _largest(torch.where(known, one - other, 0)), _largest(other)
        tolerance = 1e-4 if by_differences else 1e-7
        if error > tolerance * (scale + by_differences * floor) + 1e-11 + 1e-9 * below + blur:
            name = f"argument {i}" if i < count else f"parameter {i - count}"
            words = f"gradient by {name} off by {error:.1e}, the largest is {scale:.1e}"
            return Outcome(WRONG, words + _where(truth))
    return Outcome(RIGHT)


def _largest(x: Tensor) -> float:
    return float(x.nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


# --- errors ------------------------------------------------------------------------------


def _of_error(error: Exception, case: Case, truth: Truth, transform: Transform) -> Outcome:
    detail = f"{type(error).__name__}: {str(error).strip()[:600]}"
    second = transform.second
    own = [truth.errors.get("jacobian"), truth.errors.get("hessian") if second else None]
    own += [_error_in_grad(case)] if transform.inside == "grad" else []
    own = [other for other in own if other is not None]
    # A first derivative is right or not whatever becomes of the second.
    wrong = truth.wrong if second else truth.wrong.get("jacobian")
    loop_is_right = not own and not wrong and case.independent
    if not case.independent and isinstance(error, BatchMixingError):
        return Outcome(DOCUMENTED, detail)
    own += [] if case.independent else [_own_error(case)]
    if not is_documented(error) and not any(_is_same(error, other) for other in own):
        return Outcome(CRASH, detail + _where(truth))
    if loop_is_right and transform.promised:
        return Outcome(REFUSED, detail + _where(truth))
    return Outcome(DOCUMENTED, detail)


def _is_same(error: Exception, other: Exception | None) -> bool:
    """Whether torch says the same of the loop, or of the function itself."""
    if other is None:
        return False
    missing = re.compile(r"(the )?derivative for \S+ is not implemented")  # of this or another
    if missing.match(str(error)) and missing.match(str(other)):
        return True
    return type(error) is type(other) and str(error)[:40] == str(other)[:40]


def _own_error(case: Case) -> Exception | None:
    try:
        case.make().func(*[x.clone() for x in case.args])
    except Exception as error:
        return error
    return None


def _error_in_grad(case: Case) -> Exception | None:
    """What the function itself raises inside of ``torch.func.grad``: it may not write there."""
    func = case.make().func

    def total(*args: Tensor) -> Tensor:
        outs = func(*args)
        return sum(out.sum() for out in ([outs] if isinstance(outs, Tensor) else outs))

    try:
        torch.func.grad(total, case.argnums)(*[x.clone() for x in case.args])
    except Exception as error:
        return error
    return None


def is_documented(error: Exception) -> bool:
    """Whether an error is in the words that the documentation promises."""
    text = str(error)
    name = r"batch_(jacobian|hessian|hessian_diagonal|laplacian|divergence|partials): "
    if not re.match(name, text):
        return False
    if isinstance(error, (BatchMixingError, VerificationError)):
        return True
    if re.match(name + r"engine='\w+' with mode='\w+' cannot differentiate func", text):
        return type(error) in (RuntimeError, ValueError)
    known = type(error) in (TypeError, ValueError, RuntimeError)
    return known and bool(re.match(name + "expected ", text)) and ", got " in text


# --- state -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effects:
    """What one plain run changes: buffers that move, draws.

    Attributes:
        texts: what changes.
        after: tensors of the module as the run leaves them, ``None`` if it raises.
        rng: the random state after it.
    """

    texts: set[str]
    after: dict[str, Tensor] | None
    rng: Tensor

    @classmethod
    def of(cls, case: Case, args: list[Tensor], module: nn.Module | None) -> "Effects":
        """Of a run that starts where ``module`` is now."""
        parts = case.make()
        if parts.module is not None and module is not None:
            parts.module.load_state_dict(module.state_dict())
        own = [x.detach().clone() for x in args]
        before = State.take(own, case.constants, parts.module)
        after = None
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with suppress(Exception):
                parts.func(*own)
                after = {name: x.detach().clone() for name, x, *_ in before.tensors}
            texts = {text for text in before.differences() if not text.startswith("argument")}
            for name, x, value, *_ in before.tensors:  # which all runs share
                if name.startswith("constant"):
                    x.copy_(value)
            return cls(texts, after, torch.get_rng_state())

    def beyond(self, state: "State", *, once: bool) -> set[str]:
        """What has changed otherwise, or more often, than in one plain run."""
        found = set(state.differences()) - self.texts
        if not once or self.after is None:
            return found
        for name, x, *_ in state.tensors:
            other = self.after.get(name)
            if name.startswith("argument") or other is None:
                continue
            if not torch.allclose(x.double(), other.double(), 1e-9, 1e-12, equal_nan=True):
                found.add(f"{name} is not as one plain run leaves it")
        if not torch.equal(self.rng, torch.get_rng_state()):
            found.add("the random state is not as one plain run leaves it")
        return found


@dataclass(frozen=True)
class State:
    """What is the caller's, and must be as after one plain run."""

    tensors: list[tuple[str, Tensor, Tensor, int, bool, Any]]
    modules: list[tuple[nn.Module, dict]]
    rng: Tensor
    globals: dict[str, Any]

    @classmethod
    def take(cls, args: Any, constants: Any, module: nn.Module | None) -> "State":
        named = [(f"argument {i}", x) for i, x in enumerate(args)]
        named += [(f"constant {i}", x) for i, x in enumerate(constants)]
        if module is not None:
            named += list(module.named_parameters()) + list(module.named_buffers())
        tensors = [
            (name, x, x.detach().clone(), x._version, x.requires_grad, x.grad) for name, x in named
        ]
        inner = list(module.modules()) if module is not None else []
        modules = [(m, _attributes(m)) for m in inner]
        return cls(tensors, modules, torch.get_rng_state(), _globals())

    def differences(self) -> list[str]:
        found = []
        for name, x, value, version, requires_grad, grad in self.tensors:
            if not bool(((x == value) | (x.isnan() & value.isnan())).all()):
                found.append(f"{name} was written to")
            if x._version != version and name.startswith("argument"):
                found.append(f"{name} has a new version")
            if x.requires_grad is not requires_grad:
                found.append(f"requires_grad of {name} changed")
            if x.grad is not grad:
                found.append(f"grad of {name} changed")
            if x._backward_hooks:
                found.append(f"{name} has hooks")
        for module, before in self.modules:
            now = _attributes(module)
            changed = [k for k in {**before, **now} if before.get(k, now) is not now.get(k, before)]
            if changed:
                found.append(f"{type(module).__name__}: {changed} changed")
        if not torch.equal(self.rng, torch.get_rng_state()):
            found.append("the random state moved")
        now = _globals()
        found += [f"{key} changed" for key in now if now[key] != self.globals[key]]
        return found


def _attributes(module: nn.Module) -> dict:
    """The objects that a module holds, and what is in its containers (hooks, too)."""
    found: dict[Any, Any] = dict(vars(module))
    for key, value in vars(module).items():
        if isinstance(value, dict):
            found.update({(key, name): inner for name, inner in value.items()})
        elif isinstance(value, list):
            found.update({(key, i): inner for i, inner in enumerate(value)})
    return found


def _globals() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "transforms": torch._C._functorch.peek_interpreter_stack() is None,
        "forward-mode level": torch.autograd.forward_ad._current_level,
        "vmap fallback": torch._C._functorch._is_vmap_fallback_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


Judge = Callable[[Case, Truth, Transform], Outcome]
