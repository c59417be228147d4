"""Whether torch's forward formula of an operation may be differentiated again, found by trying.

The function ``s`` that is differentiated is the operation between two quadratic maps, so that its
input moves with curvature and its output is curved again, at the very point of the sample:
``s(x) = sum w (y + d (y - y0)^2 / 2)`` for ``y = op(x + c (x - x0)^2 / 2)``. One number is
compared, ``t2 . H . t1`` for random directions: by reverse over forward and forward over forward,
with reverse over reverse, and where these disagree with central differences of the gradient, and
that with those of the values. Nothing of funcjac is used.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

# Of the many samples of an operation, these many are tried, spread over all of them.
SAMPLES = 4
# Samples with more numbers than this are slow and show nothing that small ones do not.
MOST = 300
REL, ABS = 1e-6, 1e-8
SEED = 3
SHIFT = 0.01  # between the two rows of a batch
f64 = torch.float64


@dataclass(frozen=True)
class Function:
    """A function of some tensors, and the point at which it is looked at.

    ``carried`` are integers that come with the point, such as pivots; ``run`` reads them there.
    """

    run: Callable[[list[Tensor]], Any]
    point: list[Tensor]
    carried: list[Tensor] = field(default_factory=list)


class Trial:
    """One function at one point, with its directions."""

    def __init__(self, function: Function) -> None:
        self.function, self.point = function, [x.detach().clone() for x in function.point]
        self.generator = torch.Generator().manual_seed(SEED)
        self.first = [self._direction(x) for x in self.point]
        self.second = [self._direction(x) for x in self.point]
        self.bend = [self._direction(x) for x in self.point]
        with torch.no_grad():
            self.outs = [out.detach().clone() for out in self._outs(self.point)]
        self.weights = [(self._randn(out), self._randn(out)) for out in self.outs]

    def _randn(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=f64)

    def _direction(self, x: Tensor) -> Tensor:
        """Random, but symmetric where ``x`` is, and zero where ``x`` is.

        Formulas of decompositions hold for such directions only.
        """
        direction = self._randn(x) * (x != 0)
        if x.ndim > 1 and x.shape[-1] == x.shape[-2] and torch.equal(x, x.mT):
            direction = direction + direction.mT
        return direction

    def _outs(self, inputs: list[Tensor]) -> list[Tensor]:
        torch.default_generator.manual_seed(SEED)  # that of all devices takes 1 ms
        leaves = optree.tree_leaves(self.function.run(inputs))
        outs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()]
        outs = [torch.view_as_real(out.resolve_conj()) if out.is_complex() else out for out in outs]
        return [out for out in outs if out.dtype == f64]

    def scalar(self, *inputs: Tensor) -> Tensor:
        return self._scalar(inputs, self.point, self.outs)

    def _scalar(self, inputs: Any, point: Any, outs: Any) -> Tensor:
        bent = []
        for x, x0, bend in zip(inputs, point, self.bend):
            shift = x - x0
            bent.append(x + bend * shift * shift / 2)
        total = sum(x.sum() * 0 for x in inputs)
        for out, out0, (weight, curve) in zip(self._outs(bent), outs, self.weights):
            shift = out - out0
            total = total + (weight * (out + curve * shift * shift / 2)).sum()
        return total

    def gradient(self, inputs: list[Tensor], *, graph: bool = False) -> list[Tensor]:
        inputs = inputs if graph else [x.detach().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(self.scalar(*inputs), inputs, create_graph=graph))

    def reverse_over_reverse(self) -> float:
        inputs = [x.clone().requires_grad_() for x in self.point]
        slope = dot(self.gradient(inputs, graph=True), self.first)
        return dot(torch.autograd.grad(slope, inputs), self.second).item()

    def reverse_over_forward(self) -> float:
        inputs = [x.clone().requires_grad_() for x in self.point]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, self.first)]
            slope = forward_ad.unpack_dual(self.scalar(*duals)).tangent
            return dot(torch.autograd.grad(slope, inputs), self.second).item()

    def forward_over_forward(self) -> float:
        first, second = tuple(self.first), tuple(self.second)

        def slope(*inputs: Tensor) -> Tensor:
            return torch.func.jvp(self.scalar, inputs, first)[1]

        return torch.func.jvp(slope, tuple(self.point), second)[1].item()

    def batched(self, *, forward: bool) -> float:
        """For two rows and two tangents at once, as under vmap; of all numbers the last."""
        other = [x + SHIFT * t for x, t in zip(self.point, self.first)]
        rows = [torch.stack(pair) for pair in zip(other, self.point)]
        with torch.no_grad():
            outs = [torch.stack(pair) for pair in zip(self._outs(other), self.outs)]
        tangents = tuple(torch.stack(pair) for pair in zip(self.second, self.first))
        second, carried = tuple(self.second), list(self.function.carried)

        def row(point: list[Tensor], outs: list[Tensor], given: list[Tensor]) -> Tensor:
            self.function.carried[:] = given

            def slope(*inputs: Tensor) -> Tensor:
                value = lambda *x: self._scalar(x, point, outs)
                along = lambda *t: torch.func.jvp(value, inputs, t)[1]
                return torch.vmap(along, randomness="same")(*tangents)[1]

            if forward:
                return torch.func.jvp(slope, tuple(point), second)[1]
            grads = torch.func.grad(slope, tuple(range(len(point))))(*point)
            return dot(grads, second)

        twice = [torch.stack([x, x]) for x in carried]
        try:
            return torch.vmap(row, randomness="same")(rows, outs, twice)[1].item()
        finally:
            self.function.carried[:] = carried

    def truth(self) -> float | None:
        """By central differences of the plain gradient, ``None`` where a kink or a pole is near.

        Nothing is judged where the gradient is wrong itself: that is another defect.
        """
        here = dot(self.gradient(self.point), self.first).item()
        for h in (1e-4, 1e-5):
            with torch.no_grad():
                sides = [self.scalar(*self._moved(self.first, s)).item() for s in (h, -h)]
            if not is_close((sides[0] - sides[1]) / (2 * h), here, 1e-4, 1e-5):
                return None
        found = []
        for h in (1e-4, 1e-5):
            grads = [dot(self.gradient(self._moved(self.second, s)), self.first) for s in (h, -h)]
            found.append(((grads[0] - grads[1]) / (2 * h)).item())
        return found[1] if is_close(*found, 1e-3, 1e-4) else None

    def _moved(self, direction: list[Tensor], step: float) -> list[Tensor]:
        return [x + step * t for x, t in zip(self.point, direction)]

    def wrong_ways(self, *, batched: bool = False) -> list[str] | None:
        """Ways through forward mode that give a wrong number, ``None`` where nothing can tell.

        An error is no wrong number, and NaN is none where plain reverse mode gives it as well.
        """
        if not self.outs or not self.point:
            return []
        plain = number(self.reverse_over_reverse)
        if plain is not None and math.isnan(plain):
            return []
        ways = {
            "rev over fwd": self.reverse_over_forward,
            "fwd over fwd": self.forward_over_forward,
        }
        if batched:
            ways["rev over fwd under vmap"] = lambda: self.batched(forward=False)
            ways["fwd over fwd under vmap"] = lambda: self.batched(forward=True)
        found = {name: number(way) for name, way in ways.items()}
        suspects = {
            name: value
            for name, value in found.items()
            if value is not None and not (plain is not None and is_close(value, plain, REL, ABS))
        }
        truth = number(self.truth) if suspects else None
        if suspects and (truth is None or not math.isfinite(truth)):
            return None
        if plain is not None and truth is not None and is_close(plain, truth, 1e-2, 1e-3):
            return list(suspects)
        return [name for name, value in suspects.items() if not is_close(value, truth, 1e-2, 1e-3)]


def dot(one: Any, other: Any) -> Tensor:
    return sum(((a * b).sum() for a, b in zip(one, other)), torch.zeros((), dtype=f64))


def is_close(one: float, other: float, rel: float, absolute: float) -> bool:
    return abs(one - other) <= absolute + rel * max(abs(one), abs(other))


def number(way: Callable[[], float | None]) -> float | None:
    """``None`` where torch refuses: an error is no wrong number."""
    try:
        return way()
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return None


# --- which operation is to blame -----------------------------------------------------------


class Tape(TorchDispatchMode):
    """The operations that a call comes down to, with arguments, and which of these move.

    An argument moves if it is one of the inputs or was made of them.
    """

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any], Any, list[int]]] = []
        self.moving = {_memory(x) for x in inputs}
        self.alive: list[Any] = []  # so that no address is given twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves, spec = optree.tree_flatten((args, kwargs or {}), none_is_leaf=True)
        moving = [i for i, x in enumerate(leaves) if _memory(x) in self.moving]
        kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self.calls.append((func, kept, spec, moving))
        out = func(*args, **(kwargs or {}))
        self.alive.append((leaves, out))
        if moving:
            self.moving |= {_memory(x) for x in optree.tree_leaves(out)} - {None}
        return out


def _memory(leaf: Any) -> int | None:
    """Views are new tensors to autograd; what they share is their storage."""
    return leaf.untyped_storage().data_ptr() or None if isinstance(leaf, Tensor) else None


def function_of(run: Callable[..., Any], args: Any, kwargs: Any) -> Function:
    """``run`` of those of its arguments that require a gradient."""
    leaves, spec = optree.tree_flatten((args, kwargs), none_is_leaf=True)
    return _function(run, leaves, spec, [i for i, x in enumerate(leaves) if requires_grad(x)])


def _function(run: Callable[..., Any], leaves: list[Any], spec: Any, active: list[int]) -> Function:
    rest = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
    whole = [i for i in active if rest[i].dtype in (torch.int32, torch.int64)]
    active = [i for i in active if rest[i].dtype == f64 and rest[i].numel()]
    carried = [rest[i] for i in whole]

    def call(inputs: list[Tensor]) -> Any:
        given = list(rest)
        for i, x in zip([*active, *whole], [*inputs, *carried]):
            given[i] = x
        args, kwargs = optree.tree_unflatten(spec, given)
        return run(*args, **kwargs)

    return Function(call, [rest[i] for i in active], carried)


def requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def tape_of(function: Function) -> Tape:
    torch.manual_seed(SEED)
    inputs = [x.clone().requires_grad_() for x in function.point]
    with Tape(inputs) as tape:
        function.run(inputs)
    return tape


def names_of(function: Function) -> set[str]:
    return {call[0].overloadpacket.__name__ for call in tape_of(function).calls}


def blamed(function: Function) -> set[str]:
    """Operations of the function that are wrong by themselves, with what they were given.

    If none is, those of which nothing can tell: eigenvectors by themselves are no function.
    """
    found: dict[str, bool] = {}
    for func, leaves, spec, moving in tape_of(function).calls:
        name = func.overloadpacket.__name__
        if found.get(name) or not moving or name == "detach":
            continue
        whole = _function(func, leaves, spec, moving)
        for k in range(len(func._schema.returns)):
            # One output after the other: some cannot be differentiated.
            run = lambda inputs, k=k: optree.tree_leaves(whole.run(inputs))[k : k + 1]
            try:
                ways = Trial(Function(run, whole.point, whole.carried)).wrong_ways(batched=True)
            except (RuntimeError, TypeError):  # it changes its argument
                continue
            if ways or ways is None:
                found[name] = found.get(name, False) or bool(ways)
    certain = {name for name, is_wrong in found.items() if is_wrong}
    return certain or set(found)


# --- torch's own samples ---------------------------------------------------------------------


def spread(items: Iterator[Any], count: int) -> list[Any]:
    every = list(items)
    step = max(len(every) / count, 1)
    return [every[int(i * step)] for i in range(min(count, len(every)))]


def is_small(sample: Any) -> bool:
    leaves = optree.tree_leaves((sample.input, sample.args, sample.kwargs))
    return sum(x.numel() for x in leaves if isinstance(x, Tensor)) <= MOST


def samples_of(info: Any, dtype: torch.dtype, count: int, most: int) -> list[Any]:
    """``count`` small ones of the first ``most`` samples.

    Without what ``info.sample_inputs`` does for each: it seeds all devices and reads the stack.
    """
    torch.manual_seed(SEED)
    every = info.sample_inputs_func(info, "cpu", dtype, True)
    return spread((s for s in itertools.islice(every, most) if is_small(s)), count)


def functions_of(info: Any, count: int = SAMPLES, most: int = 400) -> Iterator[Function]:
    """The samples of an operation of torch's own list, as torch's gradient tests call them."""
    for sample in samples_of(info, f64, count, most):

        def run(*args, _sample=sample, **kwargs):
            out = info.gradcheck_wrapper(info.get_op(), *args, **kwargs)
            return _sample.output_process_fn_grad(out)

        yield function_of(run, (sample.input, *sample.args), sample.kwargs)


def findings(info: Any) -> dict[str, set[str]]:
    """Each operation to blame for a wrong sample, and the ways in which it is wrong."""
    functions = [function for function in functions_of(info) if function.point]
    sizes = [sum(x.numel() for x in function.point) for function in functions]
    found: dict[str, set[str]] = {}
    for function, size in zip(functions, sizes):
        try:
            # vmap is slow, so the largest sample alone goes through it
            ways = Trial(function).wrong_ways(batched=size == max(sizes))
        except (RuntimeError, TypeError):  # sparse, or the sample alone does not run
            continue
        for name in (blamed(function) or {"nothing by itself"}) if ways else ():
            found.setdefault(name, set()).update(ways)
    return found


def operations() -> dict[str, Any]:
    """Torch's own list of differentiable operations, by name and variant."""
    from torch.testing._internal.common_methods_invocations import op_db

    found = {}
    for info in op_db:
        if info.supports_autograd and f64 in info.supported_dtypes("cpu"):
            found[f"{info.name} {info.variant_test_name}".strip()] = info
    return found
