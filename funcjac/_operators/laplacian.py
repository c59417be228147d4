"""``batch_laplacian``: the trace of each row's Hessian, without the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments.call import Call, Options
from funcjac._engines import vmap
from funcjac._engines.basis import row_shape
from funcjac._engines.graph import Route
from funcjac._engines.run import Derivatives, Run
from funcjac._operators.directions import (
    Spec,
    check_spec,
    derivatives_along,
    directions,
    extras_of,
    of_row,
)
from funcjac._operators.operator import (
    NESTED,
    SecondOrder,
    as_block,
    by_output,
    finished,
    first_entries,
)
from funcjac._operators.transform import Transform
from funcjac._verification.finite_differences import Pair, difference
from funcjac._verification.probe import Entry, Probe, curvature, row_factors


@dataclass(frozen=True)
class Laplacian(SecondOrder):
    """``blocks[i]``: the Laplacian, first derivatives where returned, the standard error."""

    spec: Spec = field(default_factory=Spec)
    modes: ClassVar[tuple[str, ...]] = ("taylor", *NESTED)

    def words(self) -> list[str]:
        return self.spec.words()

    def as_numbers(self) -> tuple[Any, ...]:
        return self.spec.as_numbers()

    @classmethod
    def from_numbers(cls, numbers: tuple[Any, ...]) -> Laplacian:
        return cls(Spec.from_numbers(numbers))

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        del call, outputs
        spec = self.spec
        firsts = inputs if spec.samples is None else spec.samples
        return firsts, firsts if spec.return_error else 1, firsts

    def _directions(self, run: Run, j: int, *, exact: bool) -> Any:
        x, dim, extras = run.inputs[j], run.dims[j], run.call.extras
        return directions(run.call, self.spec, j, x, dim, extras, exact=exact)

    def compute(self, run: Run, route: Route) -> Derivatives:
        spec = self.spec
        slopes = run.call.options.return_value and spec.samples is None
        every = [self._directions(run, j, exact=slopes) for j in range(len(run.inputs))]
        each = spec.return_error
        pairs = derivatives_along(run, every, route, firsts=slopes, total=not each)
        rows, x = [], run.inputs[0]
        for i, out in enumerate(run.output.leaves):
            columns = [pair.seconds[i] for pair in pairs]
            row = _estimates(columns, out, x, spec)
            if slopes:
                shapes = [(*out.shape, *row_shape(y, dim)) for y, dim in zip(run.inputs, run.dims)]
                firsts = [pair.firsts[i] for pair in pairs]
                firsts = [None if f is None else f.movedim(0, -1) for f in firsts]
                blocks = [as_block(f, n, out, y) for f, n, y in zip(firsts, shapes, run.inputs)]
                row[1:1] = blocks
            rows.append(row)
        return Derivatives(rows, run.output)

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        totals: list[Any] = []
        slopes, come_along = [], None
        exact = call.options.return_value and self.spec.samples is None
        for j, x in enumerate(xs):
            left, right, weights = of_row(self.spec, j, x, extras)
            if self.spec.return_error:
                weights = torch.ones_like(weights)
            pairs, chunk = (left, right), call.options.chunk_size
            firsts, seconds, come_along = vmap.along(function, xs, j, pairs, mode, chunk)
            terms = [weights.to(s.dtype).view(-1, *[1] * (s.ndim - 1)) * s for s in seconds]
            if not totals:
                totals = terms
            elif self.spec.return_error:
                totals = [a + b for a, b in zip(totals, terms)]
            else:
                totals = [torch.cat([a, b]) for a, b in zip(totals, terms)]
            if exact:
                slopes.append([f.movedim(0, -1).reshape(*f.shape[1:], *x.shape) for f in firsts])
        rows = []
        for i, terms in enumerate(totals):
            if self.spec.return_error:
                error = terms.std(0) / terms.shape[0] ** 0.5
                rows.append([terms.mean(0), error])
            else:
                rows.append([terms.sum(0), *([s[i] for s in slopes] if exact else [])])
        return rows, come_along

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        exact = call.options.return_value and self.spec.samples is None
        return [(), *(super().by_inputs(call) if exact else [()])]

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along each direction, other rows by another factor."""
        shared = None in run.dims
        factors, seeds = (None, probe.seeds) if shared else row_factors(run, probe)
        total = run.inputs[0].new_zeros(() if shared else run.call.batch)
        size = total.detach()
        for j in range(len(run.inputs)):
            left, right, weights, _ = self._directions(run, j, exact=True)
            bends = curvature(
                run, probe.grads[j], j, left, left if right is None else right, factors
            )
            terms = weights.view(-1, *[1] * (bends.ndim - 1)) * bends
            over = list(range(terms.ndim)) if shared else 0
            total, size = total + terms.sum(over), size + terms.detach().abs().sum(over)
        first = first_entries(run, probe) if self.spec.samples is None else []
        return [Entry(seeds, total, total.detach(), None if shared else 0, size), *first]

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along every pair of directions."""
        total: list[Tensor] = []
        for j, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
            every = directions(call, self.spec, j, x, dim, call.extras, exact=True)
            right = every.left if every.right is None else every.right
            for one, two, weight in zip(every.left, right, every.weights):
                terms = [weight * out for out in difference(call, [{j: one}, {j: two}])]
                total = [a + b for a, b in zip(total, terms)] if total else terms
        yield total, [blocks[0] for blocks in result.blocks]

    def assemble(self, call: Call, result: Derivatives) -> Any:
        tree = by_output(result, lambda blocks: blocks[0])
        if self.spec.return_error:
            tree = tree, by_output(result, lambda blocks: blocks[-1])
        return finished(call, result, tree, 1 if self.spec.samples is None else None)


def _estimates(columns: Any, out: Tensor, x: Tensor, spec: Spec) -> list[Tensor]:
    """The sum of ``(1, B, *out)``; of samples ``(K, B, *out)`` their mean and its error."""
    total = None
    for column in columns:
        if column is not None:
            total = column if total is None else total + column
    if not spec.return_error:
        return [as_block(None if total is None else total[0], out.shape, out, x)]
    if total is None:
        return [as_block(None, out.shape, out, x)] * 2
    error = total.std(0) / total.shape[0] ** 0.5
    return [as_block(total.mean(0), out.shape, out, x), as_block(error, out.shape, out, x)]


def batch_laplacian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    weight: Tensor | Callable[..., Tensor] | None = None,
    weight_dim: int | None = None,
    samples: int | None = None,
    probes: str = "rademacher",
    generator: torch.Generator | None = None,
    return_error: bool = False,
    in_dims: Any = 0,
    out_dims: Any = 0,
    mode: str = "auto",
    engine: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    return_value: bool = False,
    randomness: str = "error",
    check: bool | str = "auto",
) -> Callable[..., Any]:
    """Computes the Laplacian of each row: the trace of its Hessian, without the Hessian.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``sum_i d^2 func(x)[b] / d
    x[b, i]^2``, of shape ``(B, *out)``; with a ``weight`` ``sum_ij W[i, j] H[b, i, j]``, as in the
    generator of a diffusion. Of several inputs, the sum over all of them. Computed as
    :func:`batch_hessian_diagonal` is, but second derivatives are added up on the way.

    Args:
        func: a batched function.
        argnums: positional argument or arguments to differentiate.
        weight: a vector ``(*in)`` or a symmetric matrix ``(*in, *in)``, definite or not, for one
            input tensor; or a function of the same arguments as ``func`` that returns one. The
            result can be differentiated by it.
        weight_dim: where ``weight`` has a batch dimension, ``None`` if all rows share it.
        samples: estimate from so many random probes in each row (Hutchinson), without bias,
            instead of the exact sum over all coordinates.
        probes: ``"rademacher"`` (entries 1 and -1) or ``"gaussian"``; rows share those of an
            argument that they share.
        generator: where probes are drawn from; ``None`` for PyTorch's default.
        return_error: ``(estimate, standard error)`` in place of the estimate, from the spread of
            at least two samples.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"taylor"``, a nested mode, or ``"auto"``, as in :func:`batch_hessian_diagonal`.
        engine: how rows are kept apart in the nested modes.
        chunk_size: coordinates (or samples) in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return the Jacobian and ``func``'s output, which come for free; from
            ``samples`` only the output does.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call,
            ``False`` none; as in :func:`batch_jacobian`.

    Returns:
        A function of the same arguments. It returns ``lap`` in the structure of the output;
        ``(lap, aux)`` with ``has_aux``; ``(lap, (jac, value))`` with ``return_value``;
        ``(lap, (jac, (value, aux)))`` with both; from ``samples`` without ``jac``.

    Raises:
        TypeError, ValueError: bad words or arguments; a ``weight`` that does not fit or is not
            symmetric.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain double backward.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``func`` once, and ``N + 1`` times its linear operations (``samples + 1`` for an
    estimate, up to ``2 N + 1`` with a matrix for each row); memory likewise. The nested modes hold
    all pairs of the directions of a chunk. A verified call takes as many
    passes backward more.

    Sources: R. Li et al., "A computational framework for neural network-based variational Monte
    Carlo with forward Laplacian", 2024; M. F. Hutchinson, 1989; pytorch/pytorch issue 53903.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> funcjac.batch_laplacian(lambda x: (x**2).sum(-1))(x)
        tensor([6., 6.], dtype=torch.float64)
        >>> weight = torch.tensor([1.0, 0.0, -2.0])
        >>> funcjac.batch_laplacian(lambda x: (x**2).sum(-1), weight=weight)(x)
        tensor([-2., -2.], dtype=torch.float64)
    """
    spec = Spec(weight, weight_dim, samples, probes, generator, return_error)
    check_spec("batch_laplacian", spec)
    options = Options(
        name="batch_laplacian",
        argnums=argnums,
        in_dims=in_dims,
        out_dims=out_dims,
        mode=mode,
        engine=engine,
        chunk_size=chunk_size,
        has_aux=has_aux,
        return_value=return_value,
        randomness=randomness,
        check=check,
        operator=Laplacian(spec),
    )
    return Transform(func, options, extras_of(spec))
