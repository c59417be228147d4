"""``batch_partials``: mixed partial derivatives of any order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._arguments.layout import as_constants
from funcjac._engines import vmap
from funcjac._engines.nesting import Index, by_order, nested_partials
from funcjac._engines.rows import as_block, batch_first, coordinates, row_shape, row_sizes
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._operators.hessian import stacked_coordinates
from funcjac._operators.operator import SecondOrder, Tensors
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform
from funcjac._taylor.propagation import along_directions, mixed, rows_of, take
from funcjac._taylor.rules import make_recording
from funcjac._verification.central_differences import Pair, difference
from funcjac._verification.reference_vjp import Entry, Probe, row_factors, vjp
from funcjac.errors import refuse

# The input of each coordinate, and its number there.
Places = list[tuple[int, int]]


@dataclass(frozen=True)
class Partials(SecondOrder):
    """``blocks[i][e]``: partial derivative ``e`` of output ``i``, or the output itself."""

    indices: tuple[Index, ...]
    modes: ClassVar[tuple[str, ...]] = ("taylor", "rev")

    @property
    def highest(self) -> int:
        return max(map(len, self.indices))

    def keywords(self) -> list[str]:
        return [repr(list(self.indices))]

    @property
    def has_parts(self) -> bool:
        return True

    def check_inputs(self, call: Call) -> None:
        """Refuse inputs whose rows are no vectors or numbers, or too short for the indices."""
        name, size = call.options.name, 0
        for x, dim in zip(call.inputs, call.layout.diff_dims):
            row = row_shape(x, dim)
            if len(row) > 1:
                expected, remedy = "an input with rows (d,)", "Reshape it inside of func."
                raise refuse(name, ValueError, expected, f"rows {tuple(row)}", remedy)
            size += row.numel()
        entries = list(itertools.chain.from_iterable(as_constants(self.indices)))
        if min(entries, default=0) < -size or max(entries, default=-1) >= size:
            expected = f"indices between {-size} and {size - 1}"
            raise refuse(name, ValueError, expected, list(self.indices))

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        """Terms that Taylor propagates, and gradients, those of higher orders counted double."""
        return _count(self.indices, inputs)

    def passes(self, mode: str, outputs: int, inputs: int) -> int:
        if mode == "taylor":
            return sum(_count(self.indices, inputs)[:2])
        return outputs * sum(map(len, by_order(_names(self.indices, inputs))))

    def adds_jac(self, call: Call) -> bool:
        return False

    def own_inputs(self, call: Call) -> list[tuple[int, ...]]:
        return [()] * len(self.indices)

    def compute(self, run: Run, route: Route) -> Derivatives:
        sizes = tuple(map(int, row_sizes(run.inputs, run.call.layout.diff_dims)))
        places, names, distinct = _named(self.indices, sizes)
        columns: Sequence[Any] = [{}] * len(run.output.leaves)
        if distinct and route.mode == "taylor":
            columns = _by_taylor(run, distinct, places, route.chunk)
        elif distinct:
            columns = nested_partials(run, distinct, places)
        rows: list[list[Tensor]] = [[] for _ in run.output.leaves]
        for e, name in enumerate(names):
            # One index twice, or the value, must not come as one tensor under two names.
            twice = name in names[:e] or (run.call.options.return_value and not name)
            x = run.inputs[places[name[0]][0] if name else 0]
            for i, out in enumerate(run.output.leaves):
                block = as_block(columns[i][name] if name else out, out.shape, out, [x])
                rows[i].append(block.clone() if twice else block)
        return Derivatives(rows, run.output)

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        basis = [(j, vector) for j, x in enumerate(xs) for vector in coordinates(x, None)]
        mode = "transposed" if mode in ("auto", "taylor") else mode
        columns, along = [], None
        for name in _names(self.indices, len(basis)):
            outs, along = vmap.partial(f, xs, [basis[entry] for entry in name], mode)
            columns.append(outs)
        return [list(row) for row in zip(*columns)], along

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain nested backward of each row's scalar, other rows by another factor."""
        x, shared = run.inputs[0], None in run.dims
        places, names, _ = _named(self.indices, tuple(row_sizes(run.inputs, run.dims)))
        factors = x.new_ones(1) if shared else row_factors(run, probe)[0]
        gradients: dict[Index, list[Tensor | None]] = {(): probe.grads}
        entries = []
        for name in names:
            if not name:
                pairs = zip(probe.seeds, run.output.leaves)
                rows = [(s.to(o.dtype) * o).reshape(run.call.batch, -1).sum(1) for s, o in pairs]
                entries.append(Entry(probe.seeds, sum(rows[1:], rows[0]), rows[0].detach(), 0))
                continue
            field: Tensor | None = None
            for n, entry in enumerate(name):
                if name[:n] not in gradients:
                    weights = [None if field is None else torch.ones_like(field) * factors]
                    gradients[name[:n]] = vjp([field], run.inputs, weights, create_graph=True)
                field = _coordinate(run, gradients[name[:n]], *places[entry])
            grad = factors.new_zeros(len(factors)) if field is None else field
            grad = grad if run.create_graph else grad.detach()
            grad, times = grad.sum() if shared else grad, factors ** (len(name) - 1)
            seeds = [s * times.to(s.dtype).view(-1, *[1] * (s.ndim - 1)) for s in probe.seeds]
            entries.append(Entry(seeds, grad, grad.detach(), None if shared else 0))
        return entries

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along the coordinates of each index."""
        inputs = enumerate(zip(call.inputs, call.layout.diff_dims))
        moves = [{j: vector} for j, (x, dim) in inputs for vector in coordinates(x, dim)]
        for e, index in enumerate(self.indices):
            expected = difference(call, [moves[entry] for entry in index])
            yield expected, [blocks[e] for blocks in result.blocks]


def _by_taylor(run: Run, names: Sequence[Index], places: Places, chunk: int | None) -> list[Any]:
    """For each output and index ``(B, *out)``, ``None`` for zero."""
    columns: list[Any] = [{} for _ in run.output.leaves]
    step = chunk or len(names)
    recording = make_recording(run.recorder, run.output.leaves, create_graph=run.create_graph)
    for start in range(0, len(names), step):
        part = names[start : start + step]
        used = sorted({entry for name in part for entry in name})
        indices = [tuple([used.index(entry) for entry in name]) for name in part]
        scheme, rows = mixed(indices, run.inputs[0].device)
        live, taken = {places[entry][0] for entry in used}, rows_of(used, run.inputs[0].device)
        stacks = stacked_coordinates(run).items()
        seeds = {j: take(stack, taken) for j, stack in stacks if j in live}
        pairs = sorted({index for index in indices if len(index) == scheme.order == 2})
        jets = along_directions(recording, seeds, scheme, pairs)
        for (name, index), (column, jet) in itertools.product(
            zip(part, indices), zip(columns, jets)
        ):
            stack = jet[len(index) - 1]
            column[name] = None if stack is None else stack[rows[index]]
    return columns


def _coordinate(run: Run, grads: Sequence[Tensor | None], j: int, n: int) -> Tensor | None:
    """Coordinate ``n`` of the gradient by input ``j``, ``(B,)``, or ``(1,)`` of a shared one."""
    grad = grads[j]
    if grad is None:
        return None
    rows = batch_first(grad, run.dims[j], 1)
    return rows.reshape(len(rows), -1)[:, n]


@functools.lru_cache(1024)
def _named(
    indices: tuple[Index, ...], sizes: tuple[int, ...]
) -> tuple[Places, tuple[Index, ...], list[Index]]:
    """The place of each coordinate; names of indices; those that differ, without the value's."""
    names = _names(indices, sum(sizes))
    places = [(j, n) for j, size in enumerate(sizes) for n in range(size)]
    return places, names, [name for name in dict.fromkeys(names) if name]


def _names(indices: tuple[Index, ...], total: int) -> tuple[Index, ...]:
    """Indices with their coordinates counted from 0, in order."""
    return tuple([tuple(sorted(entry % total for entry in index)) for index in indices])


@functools.lru_cache(1024)
def _count(indices: tuple[Index, ...], inputs: int) -> tuple[int, int, int]:
    names = _names(indices, inputs)
    sizes = range(1, max(map(len, names)) + 1)
    parts = {part for name in names for k in sizes for part in itertools.combinations(name, k)}
    if not parts:
        return 0, 0, 0
    passes = sum(2**order * len(step) for order, step in enumerate(by_order(names)))
    firsts = sum(len(part) == 1 for part in parts)
    return firsts, len(parts) - firsts, passes - 1


@documented
def batch_partials(
    func: Callable[..., Any],
    indices: Sequence[Sequence[int]],
    argnums: int | tuple[int, ...] = 0,
    **keywords: Unpack[Keywords],
) -> Callable[..., Any]:
    """Computes chosen partial derivatives of each row, of any order.

    For ``func: (B, d) -> (B, *out)`` and ``indices`` such as ``[(0,), (1, 1), (0, 0, 1)]`` the
    returned function gives a tuple with ``d func / d x_0``, ``d^2 func / d x_1^2`` and
    ``d^3 func / d x_0^2 d x_1`` of each row, each of shape ``(B, *out)``. What they share of lower
    order is computed once.

    Args:
        func: a batched function of rows ``(d,)``.
        indices: the coordinates of each derivative; their order within one does not matter,
            negative ones count from the end, and ``()`` is the value.
        argnums: the positional argument or arguments to differentiate, each of rows ``(d,)`` or
            ``()``. Coordinates are numbered through in their order: of ``u(x, t)`` with columns
            ``x`` and ``t``, ``argnums=(0, 1)``, ``(0,)`` is ``u_x`` and ``(1,)`` is ``u_t``.
        mode: ``"taylor"``; ``"rev"``, one differentiation nested in another for each entry; or
            ``"auto"``: Taylor where it takes fewer operations and can follow ``func``.
        {keywords}

    Returns:
        A function that returns a tuple ``partials``, each in the structure of the output, or
        ``(partials, value)`` with ``return_value``.

    Raises:
        {errors}
        TypeError, ValueError: ``indices`` are no tuples of ints or out of range; an input is not
            ``(B, d)``.

    Cost: ``func`` once, and its linear operations once for each derivative and each one of lower
    order that it needs; memory likewise. A verified call takes a backward pass for each more.

    Sources: the formula of Faà di Bruno; see :mod:`funcjac._taylor`.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
        >>> wave = lambda x: x[:, 0].sin() * x[:, 1] ** 2
        >>> u_x, u_xxt = funcjac.batch_partials(wave, [(0,), (0, 0, 1)])(x)
        >>> torch.allclose(u_xxt, -x[:, 0].sin() * 2 * x[:, 1])
        True
    """
    _check_indices("batch_partials", indices)
    operator = Partials(tuple([tuple(index) for index in indices]))
    return make_transform("batch_partials", func, operator, argnums, keywords)


def _check_indices(name: str, indices: Any) -> None:
    kinds = (list, tuple)
    if not isinstance(indices, kinds) or not all(isinstance(index, kinds) for index in indices):
        remedy = "Write [(0,), (1, 1)] for the derivatives by x_0 and twice by x_1."
        raise refuse(name, TypeError, "indices to be a list of tuples", repr(indices), remedy)
    if not indices:
        remedy = "Write [(0,)] for the derivative by x_0."
        raise refuse(name, ValueError, "at least one index", repr(indices), remedy)
    if any(type(entry) is not int for index in indices for entry in index):
        remedy = "Write (0, 1) for the derivative by x_0 and x_1."
        raise refuse(name, TypeError, "indices to hold tuples of ints", repr(indices), remedy)
