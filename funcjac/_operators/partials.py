"""``batch_partials``: mixed partial derivatives of any order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments.call import Call, Options
from funcjac._engines import vmap
from funcjac._engines.basis import coordinates, row_shape, row_sizes
from funcjac._engines.graph import Route
from funcjac._engines.run import Derivatives, Run
from funcjac._engines.second_order import Index, by_order, nested_partials
from funcjac._environment.torch_private import is_traced
from funcjac._operators.directions import recording_of
from funcjac._operators.hessian import stacked_coordinates
from funcjac._operators.operator import SecondOrder, as_block, by_output, finished
from funcjac._operators.transform import Transform
from funcjac._taylor import mixed_partials
from funcjac._verification.finite_differences import Pair, difference
from funcjac._verification.probe import Entry, Probe, row_factors, vjp
from funcjac.errors import refuse


@dataclass(frozen=True)
class Partials(SecondOrder):
    """``blocks[i][e]``: partial derivative ``e`` of output ``i``, or the output itself."""

    indices: tuple[Index, ...] = ()
    modes: ClassVar[tuple[str, ...]] = ("taylor", "rev")

    def words(self) -> list[str]:
        return [repr(list(self.indices))]

    def as_numbers(self) -> tuple[Any, ...]:
        return (self.indices,)

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        """Terms that Taylor propagates, and gradients, those of higher orders counted double."""
        del call, outputs
        return _count(self.indices, inputs)

    def compute(self, run: Run, route: Route) -> Derivatives:
        places = _places(run)
        names = _names(self.indices, len(places))
        compute = self._by_taylor if route.mode == "taylor" else self._nested
        step, columns = route.chunk or len(names), []
        if route.mode != "taylor":
            step = len(names)
        for start in range(0, len(names), step):
            columns += compute(run, names[start : start + step], places)
        x, rows = run.inputs[0], []
        value_is_taken = run.call.options.return_value
        for i, out in enumerate(run.output.leaves):
            row = []
            for e, name in enumerate(names):
                y = x if not name else run.inputs[places[name[0]][0]]
                block = as_block(out if not name else columns[e][i], out.shape, out, y)
                # One index twice, or the value, must not come as one tensor under two names.
                twice = name in names[:e] or (value_is_taken and not name)
                row.append(block.clone() if twice else block)
            rows.append(row)
        return Derivatives(rows, run.output)

    def _nested(self, run: Run, names: Sequence[Index], places: Any) -> list[Any]:
        if not any(names):
            return [list(run.output.leaves) for _ in names]
        return nested_partials(run, names, places.__getitem__)

    def _by_taylor(self, run: Run, names: Sequence[Index], places: Any) -> list[Any]:
        used = sorted({entry for name in names for entry in name})
        if not used:
            return [list(run.output.leaves) for _ in names]
        seeds = {j: seed[used] for j, seed in stacked_coordinates(run).items()}
        live = {places[entry][0] for entry in used}
        numbers = {entry: k for k, entry in enumerate(used)}
        indices = [tuple(numbers[entry] for entry in name) for name in names]
        given = {j: seed for j, seed in seeds.items() if j in live}
        return mixed_partials(recording_of(run), given, indices)

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        del call, extras
        vectors = [
            (j, torch.eye(x.numel(), dtype=x.dtype, device=x.device)[n].view(x.shape))
            for j, x in enumerate(xs)
            for n in range(x.numel())
        ]
        mode = "transposed" if mode in ("auto", "taylor") else mode
        columns, along = [], None
        for index in self.indices:
            name = _sorted(index, len(vectors))
            outs, along = vmap.partial(function, xs, [vectors[entry] for entry in name], mode)
            columns.append(outs)
        return [list(row) for row in zip(*columns)], along

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        return [()] * len(self.indices)

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Plain nested backward of each row's scalar, other rows by another factor."""
        places, batch = _places(run), run.call.batch
        factors = None if None in run.dims else row_factors(run, probe)[0]
        fields = _Fields(run, probe, places, factors)
        entries = []
        for name in _names(self.indices, len(places)):
            if not name:
                pairs = zip(probe.seeds, run.output.leaves)
                rows = [(s.to(o.dtype) * o).reshape(batch, -1).sum(1) for s, o in pairs]
                entries.append(Entry(probe.seeds, sum(rows[1:], rows[0]), rows[0].detach(), 0))
                continue
            x, value = run.inputs[places[name[-1]][0]], fields(name)
            grad = x.new_zeros(1 if factors is None else batch) if value is None else value
            grad = grad if run.create_graph else grad.detach()
            if factors is None:
                entries.append(Entry(probe.seeds, grad.sum(), grad.detach().sum(), None))
                continue
            times = factors ** (len(name) - 1)
            seeds = [s * times.to(s.dtype).view(-1, *[1] * (s.ndim - 1)) for s in probe.seeds]
            entries.append(Entry(seeds, grad, grad.detach(), 0))
        return entries

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along the coordinates of each index."""
        every = [
            (j, one)
            for j, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims))
            for one in coordinates(x, dim)
        ]
        for e, index in enumerate(self.indices):
            moves = [{every[i][0]: every[i][1]} for i in index]
            yield difference(call, moves), [blocks[e] for blocks in result.blocks]

    def assemble(self, call: Call, result: Derivatives) -> Any:
        count = len(result.blocks[0])
        tree = tuple([by_output(result, lambda b, e=e: b[e]) for e in range(count)])
        return finished(call, result, tree, None)


class _Fields:
    """Derivatives of each row's scalar, ``(B,)``, times factors; each order nested in the next."""

    def __init__(
        self, run: Run, probe: Probe, places: list[tuple[int, int]], factors: Tensor | None
    ) -> None:
        self.run, self.places, self.factors = run, places, factors
        self.known: dict[Index, Sequence[Tensor | None]] = {(): probe.grads}

    def __call__(self, name: Index) -> Tensor | None:
        j, n = self.places[name[-1]]
        grad, dim = self._gradient(name[:-1])[j], self.run.dims[j]
        if grad is None:
            return None
        if dim is None:
            return grad.reshape(-1)[n].unsqueeze(0)
        return grad.movedim(dim, 0).reshape(self.run.call.batch, -1)[:, n]

    def _gradient(self, name: Index) -> Sequence[Tensor | None]:
        if name not in self.known:
            field = self(name)
            ones = None if field is None else torch.ones_like(field)
            cotangent = ones if self.factors is None or ones is None else ones * self.factors
            grads = vjp([field], self.run.inputs, [cotangent], create_graph=True)
            self.known[name] = grads
        return self.known[name]


def _places(run: Run) -> list[tuple[int, int]]:
    """The input of each coordinate, and its number there."""
    sizes = row_sizes(run.inputs, run.dims)
    return [(j, n) for j, size in enumerate(sizes) for n in range(size)]


@functools.lru_cache(1024)
def _names(indices: tuple[Index, ...], total: int) -> tuple[Index, ...]:
    return tuple([_sorted(index, total) for index in indices])


@functools.lru_cache(1024)
def _count(indices: tuple[Index, ...], inputs: int) -> tuple[int, int, int]:
    names = _names(indices, inputs)
    closure = {part for name in names for part in _parts(name)}
    if not closure:
        return 0, 0, 0
    passes = sum(2**order * len(step) for order, step in enumerate(by_order(names)))
    firsts = sum(len(name) == 1 for name in closure)
    return firsts, len(closure) - firsts, passes - 1


def _sorted(index: Index, total: int) -> Index:
    """An index with its coordinates counted from 0, in order."""
    return tuple(sorted(entry % total for entry in index))


def _parts(name: Index) -> set[Index]:
    sizes = range(1, len(name) + 1)
    return {part for size in sizes for part in itertools.combinations(name, size)}


def batch_partials(
    func: Callable[..., Any],
    indices: Sequence[Sequence[int]],
    argnums: int | tuple[int, ...] = 0,
    *,
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
    """Computes chosen partial derivatives of each row, of any order.

    For ``func: (B, d) -> (B, *out)`` and ``indices`` such as ``[(0,), (1, 1), (0, 0, 1)]`` the
    returned function gives a tuple with ``d func / d x_0``, ``d^2 func / d x_1^2`` and
    ``d^3 func / d x_0^2 d x_1`` of each row, each of shape ``(B, *out)``. They are pushed through
    the operations of one run of ``func``, and what they share of lower order is computed once.

    Args:
        func: a batched function of rows ``(d,)``.
        indices: the coordinates of each derivative; their order within one does not matter,
            negative ones count from the end, and ``()`` is the value.
        argnums: the positional argument or arguments to differentiate, each of rows ``(d,)`` or
            ``()``. Coordinates are numbered through in their order: of ``u(x, t)`` with columns
            ``x`` and ``t``, ``argnums=(0, 1)``, ``(0,)`` is ``u_x`` and ``(1,)`` is ``u_t``.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"taylor"``; ``"rev"``, one differentiation nested in another for each entry; or
            ``"auto"``: Taylor where it takes fewer operations and can follow ``func``.
        engine: how rows are kept apart in the nested modes, as in :func:`batch_jacobian`.
        chunk_size: derivatives in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return ``func``'s output, from the same run.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call,
            ``False`` none; as in :func:`batch_jacobian`.

    Returns:
        A function of the same arguments. It returns a tuple ``partials``, each in the structure
        of the output; ``(partials, aux)`` with ``has_aux``; ``(partials, value)`` with
        ``return_value``; ``(partials, (value, aux))`` with both.

    Raises:
        TypeError, ValueError: bad words or arguments; indices that are no tuples of ints or out
            of range; an input that is not ``(B, d)``.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain nested backward passes.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``func`` once, and its linear operations once for each derivative and each one of lower
    order that it needs; memory likewise. A verified call takes a backward
    pass for each more.

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
    options = Options(
        name="batch_partials",
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
        operator=operator,
    )
    return Transform(func, options, _check_input)


def _check_indices(name: str, indices: Any) -> None:
    if not isinstance(indices, (list, tuple)) or not all(
        isinstance(i, (tuple, list)) for i in indices
    ):
        remedy = "Write [(0,), (1, 1)] for the derivatives by x_0 and twice by x_1."
        raise refuse(name, TypeError, "indices to be a list of tuples", repr(indices), remedy)
    if not indices:
        remedy = "Write [(0,)] for the derivative by x_0."
        raise refuse(name, ValueError, "at least one index", repr(indices), remedy)
    if any(type(entry) is not int for index in indices for entry in index):
        remedy = "Write (0, 1) for the derivative by x_0 and x_1."
        raise refuse(name, TypeError, "indices to hold tuples of ints", repr(indices), remedy)


def _check_input(call: Call, args: Any, kwargs: Any) -> tuple[list[Any], tuple[int | None, ...]]:
    """Refuse inputs whose rows are no vectors or numbers, or too short for the indices."""
    del args, kwargs
    rows = [row_shape(x, dim) for x, dim in zip(call.inputs, call.layout.diff_dims)]
    check = _check_rows if is_traced() else _check_rows_once
    check(call.options.name, call.options.operator.indices, tuple(rows))
    return [], ()


def _check_rows(name: str, indices: tuple[Index, ...], rows: tuple[torch.Size, ...]) -> None:
    for row in rows:
        if len(row) > 1:
            remedy = "Reshape it inside of func."
            raise refuse(name, ValueError, "an input with rows (d,)", f"rows {tuple(row)}", remedy)
    size = sum(row.numel() for row in rows)
    if any(not -size <= entry < size for index in indices for entry in index):
        raise refuse(name, ValueError, f"indices between {-size} and {size - 1}", list(indices))


_check_rows_once = functools.lru_cache(1024)(_check_rows)
