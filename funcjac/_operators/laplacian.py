"""``batch_laplacian``: the trace of each row's Hessian, without the Hessian.

``sum_r weights[r] D^2 f [left[r], right[r]]``, along a basis that fits the weight, or probes. The
diagonal of the Hessian is the same before it is added up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from funcjac._arguments.call import Call, with_extras
from funcjac._arguments.check_tensors import check_arguments, check_input
from funcjac._engines import vmap
from funcjac._engines.nesting import Along, along
from funcjac._engines.rows import Directions, added, coordinates, join, row_shape
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._environment.torch_private import is_traced, is_transformed
from funcjac._operators.operator import Dims, Hutchinson, SecondOrder, Tensors
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform
from funcjac._taylor.propagation import Recording, along_directions, on_one_row, second_order, take
from funcjac._taylor.rules import make_recording
from funcjac._verification.central_differences import Pair, difference
from funcjac._verification.reference_vjp import Entry, Probe, curvature, row_factors
from funcjac.errors import refuse

Maybe = Tensor | None
# Derivatives of one tensor that are propagated together: 2**21 floats are 8 MiB.
_PASS_ELEMENTS = 2**21


@dataclass(frozen=True)
class HessianDiagonal(SecondOrder):
    """``blocks[i][j]``: second derivatives along directions in input ``j``, here its coordinates.

    First derivatives are behind them where they are returned.
    """

    order: ClassVar[int] = 1

    def directions(self, call: Call, xs: Tensors, dims: Dims, extras: Tensors) -> list[Directions]:
        """Directions in each input; of one row if no input has a batch dimension."""
        bases = [coordinates(x, dim) for x, dim in zip(xs, dims)]
        return [Directions(left, None, left.new_ones(len(left)), basis=True) for left in bases]

    def adds_up(self) -> bool:
        """Whether second derivatives are added up on the way, by weights."""
        return False

    def combine(self, seconds: Sequence[Maybe]) -> Sequence[Maybe]:
        """Blocks, from second derivatives ``(K, ...)`` along the directions of each input."""
        return list(map(_axis_last, seconds))

    def compute(self, run: Run, route: Route) -> Derivatives:
        directions = self.directions(run.call, run.inputs, run.dims, run.call.extras)
        if route.mode != "taylor":
            pairs = zip(along(run, directions, route), directions)
            columns: list[Any] = [(f, self._summed(s, d.weights)) for (f, s), d in pairs]
            return self.blocks(run, self._by_output(columns))
        outs, firsts, total = run.output.leaves, self.adds_jac(run.call), self.adds_up()
        recording = make_recording(run.recorder, outs, create_graph=run.create_graph)
        columns = []
        for j, (pairs, dim) in enumerate(zip(directions, run.dims)):
            pairs = pairs._replace(basis=pairs.basis and dim == 0)  # what a product may take it for
            columns.append(_by_taylor(recording, j, pairs, route.chunk, firsts, total))
        return self.blocks(run, self._by_output(columns))

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        derivatives, chunk, come_along = [], call.options.chunk_size, cast(Any, None)
        for j, pairs in enumerate(self.directions(call, xs, [None] * len(xs), extras)):
            slopes, seconds, come_along = vmap.along(f, xs, j, _both(pairs), mode, chunk)
            derivatives.append((slopes, self._summed(seconds, pairs.weights)))
        shapes = [[n for j in name for n in xs[j].shape] for name in self.by_inputs(call)]
        rows = zip(come_along[0], self._by_output(derivatives))
        blocks = [[v.reshape((*o.shape, *s)) for v, s in zip(values, shapes)] for o, values in rows]
        return blocks, come_along

    def _by_output(self, derivatives: Sequence[Any]) -> list[list[Any]]:
        slopes, seconds = zip(*derivatives)
        rows = zip(zip(*seconds), zip(*slopes))
        return [[*self.combine(second), *map(_axis_last, first)] for second, first in rows]

    def _summed(self, seconds: Sequence[Maybe], weights: Tensor) -> list[Maybe]:
        """Second derivatives ``(K, ...)``, or ``(1, ...)`` where they are added up."""
        if not self.adds_up():
            return list(seconds)
        return [
            None if s is None else torch.tensordot(weights.to(s.dtype), s, 1).unsqueeze(0)
            for s in seconds
        ]

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain double backward along each direction, other rows by another factor."""
        factors, seeds = row_factors(run, probe)
        if self.order == 0 and None in run.dims:  # only the sum over rows is known
            factors, seeds = None, probe.seeds
        directions, columns = self.directions(run.call, run.inputs, run.dims, run.call.extras), []
        for j, pairs in enumerate(directions):
            column = curvature(run, probe.grads[j], j, *_both(pairs), factors)
            columns.append(column.movedim(0, -1) * pairs.weights)
        return self.entries_of(run, probe, seeds, columns) + super().entries(run, probe)

    def entries_of(self, run: Run, probe: Probe, seeds: Any, columns: list[Tensor]) -> list[Entry]:
        """Entries from weighted second derivatives of each input, ``(B, K)`` or ``(K,)``."""
        entries = []
        for x, dim, rows in zip(run.inputs, run.dims, columns):
            like, seed = (x, probe.seeds) if dim is None else (x.movedim(dim, 0), seeds)
            entries.append(Entry(seed, rows.reshape(like.shape), like, None if dim is None else 0))
        return entries

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along each pair of directions."""
        seconds = []
        directions = self.directions(call, call.inputs, call.layout.diff_dims, call.extras)
        for j, pairs in enumerate(directions):
            rows = [difference(call, [{j: u}, {j: v}]) for u, v in zip(*_both(pairs))]
            stacks = list(map(torch.stack, zip(*rows))) or [None] * len(result.blocks)
            seconds.append(self._summed(stacks, pairs.weights))
        for expected, blocks in zip(map(self.combine, zip(*seconds)), result.blocks):
            for value, block in zip(expected, blocks[:1] if self.has_parts else blocks):
                if value is not None:  # of an estimate, without its error
                    yield [value.reshape(block.shape)], [block]


@dataclass(frozen=True)
class Laplacian(Hutchinson, HessianDiagonal):
    """``blocks[i]``: the Laplacian and its standard error, first derivatives where returned."""

    weight: Tensor | Callable[..., Tensor] | None = None
    weight_dim: int | None = None
    order: ClassVar[int] = 0

    def check(self, name: str) -> None:
        super().check(name)
        weight, dim = self.weight, self.weight_dim
        if dim is not None and (type(dim) is not int or weight is None):
            remedy = "It says where a weight that differs between rows has the batch."
            expected = "weight_dim to be None, or an int beside a weight"
            raise refuse(name, TypeError, expected, repr(dim), remedy)
        if not (weight is None or isinstance(weight, Tensor) or callable(weight)):
            _check_kind(name, weight)

    def prepare(self, call: Call, args: Any, kwargs: Any) -> Call:
        """The call with the weight, and with probes."""
        if self.weight is not None:
            weight = self.weight(*args, **kwargs) if callable(self.weight) else self.weight
            weight = _checked_weight(call, weight, self.weight_dim)
            call = with_extras(call, [weight], (None if self.weight_dim is None else 0,))
        return super().prepare(call, args, kwargs)

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        firsts = self.samples or inputs
        return firsts, firsts if self.return_error else 1, firsts

    def passes(self, mode: str, outputs: int, inputs: int) -> int:
        return super().passes(mode, outputs, self.samples or inputs)

    def adds_jac(self, call: Call) -> bool:
        return call.options.return_value and self.samples is None

    def directions(self, call: Call, xs: Tensors, dims: Dims, extras: Tensors) -> list[Directions]:
        weight, probes = (extras[0], extras[1:]) if self.weight is not None else (None, extras)
        drawn = probes or [None] * len(xs)
        return [self._along(call, weight, *parts) for parts in zip(xs, dims, drawn)]

    def _along(
        self, call: Call, weight: Any, x: Tensor, dim: int | None, probes: Tensor | None
    ) -> Directions:
        """Probes, the basis, or eigenvectors of a weight that all rows share."""
        row, shared = row_shape(x, dim), dim is None or self.weight_dim is None
        rows, basis = self.vectors(x, dim, probes), probes is None
        weights = x.new_full((len(rows),), 1 / (self.samples or 1))
        if basis and weight is not None and shared:
            if weight.ndim == len(row):
                weights, weight = weight.reshape(-1), None
            elif not (self.adds_jac(call) or weight.requires_grad or is_transformed()):
                values, vectors = torch.linalg.eigh(weight.detach().reshape(len(rows), -1).double())
                is_large = values.abs() >= torch.finfo(x.dtype).eps * values.abs().max()
                rows, basis = vectors.mT[is_large].to(x.dtype).view(-1, 1, *row), False
                weights, weight = values[is_large].to(x.dtype), None
        right = None if weight is None else _placed(_applied(weight, rows, shared), x, dim)
        return Directions(_placed(rows, x, dim), right, weights, basis)

    def adds_up(self) -> bool:
        return not self.return_error

    def combine(self, seconds: Sequence[Maybe]) -> Sequence[Maybe]:
        total = functools.reduce(added, seconds)
        if total is None:
            return [None] * (1 + self.return_error)
        return [total[0]] if self.adds_up() else self.estimates(total, 0)

    def entries_of(self, run: Run, probe: Probe, seeds: Any, columns: list[Tensor]) -> list[Entry]:
        shared = None in run.dims
        terms = torch.cat([c.flatten() if shared else c for c in columns], -1)
        total, size = terms.sum(-1), terms.detach().abs().sum(-1)
        return [Entry(seeds, total, total.detach(), None if shared else 0, size)]


def _both(pairs: Directions) -> tuple[Tensor, Tensor]:
    return pairs.left, pairs.left if pairs.right is None else pairs.right


def _axis_last(columns: Maybe) -> Maybe:
    return None if columns is None else columns.movedim(0, -1)


def _by_taylor(
    recording: Recording, j: int, pairs: Directions, chunk: int | None, firsts: bool, total: bool
) -> Along:
    """Derivatives along directions in input ``j``; their weighted sum ``(1, B, *out)`` if total."""
    count, graph = len(pairs.left), recording.create_graph
    largest = max((value.numel() for value in recording.values), default=0)
    step = chunk or max(_PASS_ELEMENTS // max(largest, 1), 1)
    outputs = len(recording.slots)
    sums: list[Maybe] = [None] * outputs

    def passes() -> Iterator[tuple[int, list[Maybe]]]:
        for start in range(0, max(count, 1), step):
            part = pairs.narrow(start, min(start + step, count))
            seeds, size = part.left, len(part.left)
            left = right = slice(0, size)
            if part.right is not None:
                seeds = on_one_row(lambda *stacks: torch.cat(stacks), part.left, part.right)
                right = slice(size, None)
            scheme = second_order(left, right, part.weights if total else None)
            each = [] if total else [(k, k + right.start) for k in range(size)]
            basis = seeds if part.basis and part.right is None else None
            jets = along_directions(recording._replace(basis=basis), {j: seeds}, scheme, each)
            slopes = [take(f, left) if firsts and f is not None else None for f, _ in jets]
            seconds = [second for _, second in jets]
            if total:
                sums[:] = map(added, sums, seconds)
            yield size, slopes if total else [*slopes, *seconds]

    joined = join(passes(), count, 0, outputs * (1 if total else 2), create_graph=graph)
    return joined[:outputs], sums if total else joined[outputs:]


def _placed(rows: Tensor, x: Tensor, dim: int | None) -> Tensor:
    """``(K, B or 1, *row)`` with the batch where the input has it."""
    if dim is None:
        return rows[:, 0]
    rows = rows.expand(rows.shape[0], x.shape[dim], *rows.shape[2:])
    return rows if dim == 0 else rows.movedim(1, dim + 1)


def _applied(weight: Tensor, rows: Tensor, shared: bool) -> Tensor:
    """The weight times each of ``(K, B or 1, *row)``."""
    weight = weight.unsqueeze(0) if shared else weight  # (B or 1, *row[, *row])
    if weight.ndim == rows.ndim - 1:
        return weight * rows
    flat = rows.reshape(*rows.shape[:2], -1)  # (K, B or 1, N)
    matrix = weight.reshape(len(weight), flat.shape[2], -1)
    products = torch.matmul(matrix, flat.movedim(0, -1)).movedim(-1, 0)
    return products.reshape(len(rows), -1, *rows.shape[2:])


def _checked_weight(call: Call, weight: Any, dim: int | None) -> Tensor:
    """The weight with the batch in front, if it has one; refuses what does not fit the input."""
    name = call.options.name
    if len(call.inputs) != 1:
        expected, remedy = "one input tensor with weight", "Name one in argnums."
        raise refuse(name, ValueError, expected, len(call.inputs), remedy)
    _check_kind(name, weight)
    (x,), (x_dim,) = call.inputs, call.layout.diff_dims
    row, shape = row_shape(x, x_dim), weight.shape
    if dim is not None:
        if x_dim is None:
            expected = "a batched input with weight_dim"
            remedy = "Expand it over the batch and give it its dimension in in_dims."
            raise refuse(name, ValueError, expected, "a shared one", remedy)
        if not -weight.ndim <= dim < weight.ndim or shape[dim] != call.batch:
            expected = f"weight to have a batch of {call.batch} in dimension {dim}"
            remedy = "A weight that is the same in all rows has no weight_dim."
            raise refuse(name, ValueError, expected, f"shape {tuple(shape)}", remedy)
        weight = weight.movedim(dim, 0)
        shape = weight.shape[1:]
    pairs = [zip(shape, s) for s in (row, row + row) if len(s) == len(shape)]
    if not any(all(n == m for n, m in sizes) for sizes in pairs):  # so that compilers can compare
        rows = "in each row" if dim is not None else "(and weight_dim if there is one for each row)"
        expected = f"weight of shape {tuple(row)} or {tuple(row + row)} {rows}"
        raise refuse(name, ValueError, expected, f"shape {tuple(shape)}")
    if not is_traced() and weight.is_inference():
        weight = weight.clone()
    weight = weight.to(x.device, x.dtype)
    if weight.numel() and not is_transformed():
        _check_entries(name, weight.detach(), row.numel() if len(shape) > len(row) else None)
    return weight


def _check_kind(name: str, weight: Any) -> None:
    real = "weight to be a tensor of real numbers, or a function that returns one"
    remedy = "Make one of it by torch.as_tensor, with the dtype of the input."
    check_input(name, weight, (real, real, "weight to be a dense tensor", remedy, remedy, remedy))
    check_arguments(name, [weight], "weight to be a tensor")


def _check_entries(name: str, weight: Tensor, size: int | None) -> None:
    """Raise unless vectors, or matrices of some size, can be weights."""
    largest = weight.abs().amax().item()
    if not math.isfinite(largest):
        remedy = "Leave out coordinates by a weight of 0."
        raise refuse(name, ValueError, "weight to be finite", largest, remedy)
    limit = 100 * torch.finfo(weight.dtype).eps * largest
    matrices = None if size is None else weight.reshape(-1, size, size)
    if matrices is not None and (matrices - matrices.mT).abs().amax() > limit:
        remedy = "Pass (W + W.mT) / 2, which has the same sum."
        raise refuse(name, ValueError, "a symmetric matrix as weight", "another", remedy)


@documented
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
    **keywords: Unpack[Keywords],
) -> Callable[..., Any]:
    """Computes the Laplacian of each row: the trace of its Hessian, without the Hessian.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``sum_i d^2 func(x)[b] / d
    x[b, i]^2``, of shape ``(B, *out)``; with a ``weight`` ``sum_ij W[i, j] H[b, i, j]``. Of several
    inputs, the sum over all. Computed as :func:`batch_hessian_diagonal` is, but second derivatives
    are added up on the way.

    Args:
        func: a batched function.
        argnums: positional argument or arguments to differentiate.
        weight: a vector ``(*in)`` or a symmetric matrix ``(*in, *in)``, definite or not, for one
            input tensor; or a function of the same arguments as ``func`` that returns one. The
            result can be differentiated by it.
        weight_dim: where ``weight`` has a batch dimension, ``None`` if all rows share it.
        {samples}
        mode: ``"taylor"``, a nested mode, or ``"auto"``, as in :func:`batch_hessian_diagonal`.
        {keywords}

    Returns:
        A function that returns ``lap`` in the structure of the output, or ``(lap, (jac, value))``
        with ``return_value``, from ``samples`` ``(lap, value)``.

    Raises:
        {errors}
        ValueError: ``weight`` does not fit or is not symmetric.

    Cost: ``func`` once, and ``N + 1`` times its linear operations (``samples + 1`` for an
    estimate, up to ``2 N + 1`` with a matrix for each row); memory likewise. A verified call takes
    as many passes backward more.

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
    operator = Laplacian(samples, probes, generator, return_error, weight, weight_dim)
    return make_transform("batch_laplacian", func, operator, argnums, keywords)
