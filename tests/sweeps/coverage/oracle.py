"""What is right: a loop over rows in plain autograd, itself judged by central differences.

Nothing of funcjac or torch.func is used. Derivatives are held flat: ``(B, M)``, ``(B, M, N)``,
``(B, M, N, N)``, all outputs and all differentiated inputs of a row side by side.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.oracles import gradients
from tests.sweeps.coverage.samples import Case, Parts

f64 = torch.float64
STEP = 1e-3


@dataclass
class Truth:
    """Derivatives of each row, and what is wrong with those of plain autograd.

    Attributes:
        jac: by plain autograd, ``None`` where it raises: then ``errors["jacobian"]``.
        wrong: names of derivatives in which central differences contradict plain autograd.
        differences: derivatives by central differences, where they are needed.
        kinks: rows at which one-sided differences disagree.
        blur: what rounding leaves of second differences in each row, where those were taken.
    """

    value: Tensor
    out_shapes: list[torch.Size]
    in_shapes: list[torch.Size]
    jac: Tensor | None = None
    hess: Tensor | None = None
    weights: Tensor | None = None
    gradients: list[Tensor] | None = None
    errors: dict[str, Exception] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    kinks: list[int] = field(default_factory=list)
    blur: Tensor | None = None


def truth_of(case: Case) -> Truth:
    """All derivatives of all rows of ``case``."""
    if not case.independent:  # there is nothing that would be right
        outs = case.make().func(*[x.clone() for x in case.args])
        outs = [outs] if isinstance(outs, Tensor) else outs
        value = torch.cat([out.detach().flatten(1) for out in outs], 1)
        shapes = [case.args[i].shape[1:] for i in case.argnums]
        return Truth(value, [out.shape[1:] for out in outs], shapes)
    rows = [_Row(case, b) for b in range(case.args[0].shape[0])]
    values = [row.value(row.flat) for row in rows]
    truth = Truth(torch.stack(values), rows[0].shapes, rows[0].in_shapes)
    size = (len(rows), values[0].numel(), rows[0].flat.numel())
    generator = torch.Generator().manual_seed(3)
    truth.weights = torch.randn(size, generator=generator, dtype=f64)
    try:
        truth.jac = torch.stack([row.jacobian(row.flat) for row in rows])
    except Exception as error:
        truth.errors["jacobian"] = error
    try:
        found = [row.second(w) for row, w in zip(rows, truth.weights)]
        truth.hess = torch.stack([hess for hess, _, _ in found])
        inputs = [torch.stack(column) for column in zip(*[grads for _, grads, _ in found])]
        parameters = [sum(column) for column in zip(*[grads for _, _, grads in found])]
        truth.gradients = inputs + parameters
    except Exception as error:
        truth.errors["hessian"] = error
    _judge(truth, rows)
    return truth


def truth_through(case: Case, truth: Truth) -> Truth:
    """``truth`` if plain autograd still gives it where the batched function has a batch of one.

    ``torch.vmap`` in the function may itself lose it: then what was right is kept as
    ``differences``, and what plain autograd gives takes its place.
    """

    def make() -> Parts:
        parts = case.make()

        def row(*inputs: Tensor) -> tuple[Tensor, ...]:
            outs = parts.func(*[x.unsqueeze(0) for x in inputs])
            return tuple(out[0] for out in ([outs] if isinstance(outs, Tensor) else outs))

        return Parts(row, parts.func, parts.module)

    other = truth_of(replace(case, make=make))
    pairs = {"jacobian": (truth.jac, other.jac), "hessian": (truth.hess, other.hess)}
    for name, (right, found) in pairs.items():
        if right is None or name in truth.wrong:
            continue
        if found is not None:
            gap = (found - right).abs().nan_to_num(0, 0, 0).max()
            if gap <= 1e-7 * right.abs().nan_to_num(0, 0, 0).max() + 1e-11:
                continue
            other.wrong[name] = f"through torch.vmap, off by {float(gap):.1e}"
        other.differences[name] = right
    return other


def _judge(truth: Truth, rows: list["_Row"]) -> None:
    """Hold plain autograd against central differences along a random direction."""
    first, second = _Verdict(), _Verdict()
    for b, row in enumerate(rows):
        if not row.exact:
            continue
        generator = torch.Generator().manual_seed(b)
        v = torch.rand(row.flat.shape, generator=generator, dtype=f64) - 0.5
        if truth.jac is not None:
            along = _along(row.value, row.flat, v)
            if along.kink:
                truth.kinks.append(b)
            first.look(truth.jac[b] @ v, along, truth.jac[b].abs().max())
        if truth.hess is not None and truth.jac is not None:
            along = _along(row.jacobian, row.flat, v)
            if along.kink and b not in truth.kinks:
                truth.kinks.append(b)
            scale = truth.hess[b].abs().max() + 1e-3 * truth.jac[b].abs().max()
            second.look(truth.hess[b] @ v, along, scale)
    if first.wrong:
        truth.wrong["jacobian"] = first.wrong
    if second.wrong:
        truth.wrong["hessian"] = second.wrong
    if truth.jac is None or "jacobian" in truth.wrong:
        truth.differences["jacobian"] = _by_differences([r.value for r in rows], rows)
        slopes = [functools.partial(_slopes, r.value) for r in rows]
        truth.differences["hessian"] = _by_differences(slopes, rows)
        sizes = truth.value.nan_to_num(0, 0, 0).abs().flatten(1).amax(1)
        finest = torch.tensor([_step(row.flat) / 4 for row in rows], dtype=f64)
        truth.blur = torch.finfo(f64).eps * sizes / finest**2
    elif truth.hess is None or "hessian" in truth.wrong:
        truth.differences["hessian"] = _by_differences([r.jacobian for r in rows], rows)
    if "hessian" in truth.differences and truth.weights is not None:
        # Plain gradients are wrong too; those by parameters are left.
        flat = torch.einsum("bmn,bmnk->bk", truth.weights, truth.differences["hessian"])
        parts = flat.split([shape.numel() for shape in truth.in_shapes], 1)
        pairs = zip(parts, truth.in_shapes)
        truth.gradients = [part.reshape(len(part), *shape) for part, shape in pairs]


def _slopes(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """``(M, N)``"""
    basis = torch.eye(len(z), dtype=f64)
    return torch.stack([_along(function, z, e).slope for e in basis], -1)


def _by_differences(functions: list[Callable[[Tensor], Tensor]], rows: list["_Row"]) -> Tensor:
    found = []
    for function, row in zip(functions, rows):
        basis = torch.eye(len(row.flat), dtype=f64)
        found.append(torch.stack([_along(function, row.flat, e).slope for e in basis], -1))
    return torch.stack(found)


def _step(z: Tensor) -> float:
    return STEP * max(1e-2, min(1.0, float(z.abs().max()) if len(z) else 1.0))


@dataclass
class _Along:
    slope: Tensor
    error: Tensor
    kink: bool


def _along(function: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> _Along:
    """Directional derivative by Richardson's extrapolation, and how far to trust it."""
    middle = function(z)
    step = _step(z)
    slopes, bends = [], []
    for h in (step, step / 2, step / 4):
        plus, minus = function(z + h * v), function(z - h * v)
        slopes.append((plus - minus) / (2 * h))
        bends.append(((plus - 2 * middle + minus) / h).abs().nan_to_num().max())
    finer = (4 * slopes[2] - slopes[1]) / 3
    coarser = (4 * slopes[1] - slopes[0]) / 3
    noise = 1e-14 * middle.abs().nan_to_num().max() / step
    error = (finer - coarser).abs().nan_to_num(float("inf")).max() + noise
    size = slopes[2].abs().nan_to_num().max()
    # At a kink the second difference shrinks like h, elsewhere like h squared.
    kink = bool(bends[2] > 0.7 * bends[1] > 0.4 * bends[0] and bends[2] > 1e-6 * size + 100 * noise)
    return _Along(finer, error, kink)


class _Verdict:
    def __init__(self) -> None:
        self.wrong = ""

    def look(self, found: Tensor, along: _Along, scale: Tensor) -> None:
        if along.kink or not bool(found.isfinite().all() and along.slope.isfinite().all()):
            return
        gap = (found - along.slope).abs().max()
        if gap > 1e-5 * scale + 1e-9 + 100 * along.error:
            self.wrong = f"off by {float(gap):.1e} where the largest is {float(scale):.1e}"


class _Row:
    """Row ``b`` of a case as a function of one flat vector."""

    def __init__(self, case: Case, b: int) -> None:
        self.parts = case.make()
        self.argnums = case.argnums
        self.args = [x[b].detach().clone() for x in case.args]
        inputs = [self.args[i] for i in case.argnums]
        self.in_shapes = [x.shape for x in inputs]
        self.flat = torch.cat([x.reshape(-1) for x in inputs])
        self.shapes: list[torch.Size] = []
        self.exact = True  # whether values are precise enough for differences
        module = self.parts.module
        self.parameters = [p for p in module.parameters() if p.requires_grad] if module else []

    def _leaves(self, z: Tensor) -> list[Tensor]:
        sizes = [shape.numel() for shape in self.in_shapes]
        parts = z.detach().split(sizes)
        return [
            part.reshape(shape).clone().requires_grad_()
            for part, shape in zip(parts, self.in_shapes)
        ]

    def _run(self, leaves: list[Tensor]) -> Tensor:
        args = list(self.args)
        for i, leaf in zip(self.argnums, leaves):
            args[i] = leaf.clone()
        outs = self.parts.row(*args)
        self.shapes = [out.shape for out in outs]
        self.exact = all(out.dtype == f64 for out in outs)
        return torch.cat([out.reshape(-1).double() for out in outs])

    def value(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(self._leaves(z))

    def jacobian(self, z: Tensor) -> Tensor:
        """``(M, N)``, without a graph."""
        leaves = self._leaves(z)
        outs = self._run(leaves)
        return torch.stack([_gradient(out, leaves, graph=False) for out in outs])

    def second(self, weight: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The Hessian ``(M, N, N)``, and gradients of ``(weight * jac).sum()``."""
        leaves = self._leaves(self.flat)
        outs = self._run(leaves)
        jac = torch.stack([_gradient(out, leaves, graph=True) for out in outs])
        loss = (weight * jac).sum()
        wanted = leaves + self.parameters
        grads = gradients(loss, wanted, create_graph=False)
        hess = [
            torch.stack([_gradient(entry, leaves, graph=False) for entry in row]) for row in jac
        ]
        return torch.stack(hess).detach(), grads[: len(leaves)], grads[len(leaves) :]


def _gradient(out: Tensor, leaves: list[Tensor], *, graph: bool) -> Tensor:
    grads = gradients(out, leaves, create_graph=graph)
    return torch.cat([grad.reshape(-1) for grad in grads])
