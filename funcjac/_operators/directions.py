"""Along which directions an operator differentiates, and with which weights.

``sum_r weights[r] D^2 f [left[r], right[r]]`` is a Laplacian for the standard basis, a weighted
one for directions that are made from it and the weight, and an estimate for random probes
(M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._arguments.check_tensors import check_arguments
from funcjac._engines.assemble import Chunks, added
from funcjac._engines.basis import coordinates, row_shape
from funcjac._engines.graph import Route
from funcjac._engines.run import Run
from funcjac._engines.second_order import Along, Directions, along
from funcjac._environment.torch_private import is_traced, is_transformed
from funcjac._taylor import Recording, directional, largest, make_recording
from funcjac.errors import refuse

PROBES = ("rademacher", "gaussian")


@dataclass(frozen=True)
class Spec:
    """The keywords of a trace: its weight, and the random probes that estimate it."""

    weight: Tensor | Callable[..., Tensor] | None = None
    weight_dim: int | None = None
    samples: int | None = None
    probes: str = "rademacher"
    generator: torch.Generator | None = None
    return_error: bool = False

    @property
    def is_weighted(self) -> bool:
        return self.weight is not None

    def as_numbers(self) -> tuple[bool, int, bool]:
        return self.is_weighted, self.samples or 0, self.return_error

    @classmethod
    def from_numbers(cls, numbers: tuple[Any, ...]) -> Spec:
        """A specification without the weight itself, which a call carries in its extras."""
        is_weighted, samples, return_error = numbers
        weight: Any = torch.empty if is_weighted else None
        return cls(weight, samples=samples or None, return_error=return_error)

    def words(self) -> list[str]:
        """Keywords that differ from their defaults, printed; a tensor without its values."""
        given = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is field.default or (field.name != "weight" and value == field.default):
                continue
            text = (
                f"<{type(value).__name__}>"
                if isinstance(value, (Tensor, torch.Generator))
                else repr(value)
            )
            given.append(f"{field.name}={text}")
        return given


def placed(rows: Tensor, x: Tensor, dim: int | None) -> Tensor:
    """``(K, B or 1, *row)`` with the batch where the input has it."""
    if dim is None:
        return rows[:, 0]
    rows = rows.expand(rows.shape[0], x.shape[dim], *rows.shape[2:])
    return rows if dim == 0 else rows.movedim(1, dim + 1)


def directions(
    call: Call,
    spec: Spec,
    j: int,
    x: Tensor,
    dim: int | None,
    extras: Sequence[Tensor],
    *,
    exact: bool,
) -> Directions:
    """Directions in input ``j``; ``exact`` for the standard basis wherever it can be."""
    row = row_shape(x, dim)
    weight = extras[0] if spec.is_weighted else None
    shared = weight is None or call.layout.dims[len(call.leaves) - call.extra] is None
    if spec.samples is not None:
        probes = extras[spec.is_weighted + j]  # (B, k, *row), or (k, *row) of a shared input
        probes = probes.unsqueeze(1) if dim is None else probes.movedim(1, 0)
        even = x.new_full((len(probes),), 1 / len(probes))
        right = None if weight is None else placed(_applied(weight, probes, row, shared), x, dim)
        return Directions(placed(probes, x, dim), right, even, basis=False)
    left = coordinates(x, dim)
    if weight is None:
        return Directions(left, None, x.new_ones(len(left)), basis=True)
    is_vector = weight.ndim == len(row) + (not shared)
    if shared and is_vector:
        return Directions(left, None, weight.reshape(-1), basis=True)
    if shared and not (exact or weight.requires_grad or is_transformed()):
        values, vectors = torch.linalg.eigh(weight.detach().reshape(row.numel(), -1).double())
        kept = values.abs() >= torch.finfo(x.dtype).eps * values.abs().max()
        rows = vectors.mT[kept].to(x.dtype).view(-1, 1, *row)
        return Directions(placed(rows, x, dim), None, values[kept].to(x.dtype), basis=False)
    eye = torch.eye(row.numel(), dtype=x.dtype, device=x.device).view(-1, 1, *row)
    right = placed(_applied(weight, eye, row, shared), x, dim)
    return Directions(left, right, x.new_ones(len(left)), basis=True)


def _applied(weight: Tensor, rows: Tensor, row: torch.Size, shared: bool) -> Tensor:
    """The weight times each of ``(K, B or 1, *row)``."""
    weight = weight.unsqueeze(0) if shared else weight  # (B or 1, *row[, *row])
    if weight.ndim == len(row) + 1:
        return weight * rows
    size = row.numel()
    matrix = weight.reshape(len(weight), size, size)
    flat = rows.reshape(rows.shape[0], rows.shape[1], size)  # (K, B or 1, N)
    found = torch.matmul(matrix, flat.movedim(0, -1)).movedim(-1, 0)
    return found.reshape(rows.shape[0], -1, *row)


def check_spec(name: str, spec: Spec) -> None:
    """Refuse bad values of the keywords of a trace."""
    samples, dim = spec.samples, spec.weight_dim
    if samples is not None and (type(samples) is not int or samples < 1):
        kind = ValueError if type(samples) is int else TypeError
        raise refuse(name, kind, "samples to be None or a positive int", repr(samples))
    if not isinstance(spec.probes, str) or spec.probes not in PROBES:
        raise refuse(name, ValueError, "probes to be 'rademacher' or 'gaussian'", repr(spec.probes))
    if spec.generator is not None and not isinstance(spec.generator, torch.Generator):
        kind = type(spec.generator).__name__
        remedy = "Make one by torch.Generator().manual_seed(0)."
        raise refuse(name, TypeError, "generator to be a torch.Generator", kind, remedy)
    if type(spec.return_error) is not bool:
        raise refuse(name, TypeError, "return_error to be a bool", repr(spec.return_error))
    if spec.return_error and (samples is None or samples < 2):
        remedy = "The error is estimated from how far samples differ."
        expected = "at least two samples with return_error=True"
        raise refuse(name, ValueError, expected, samples, remedy)
    if dim is not None and (type(dim) is not int or spec.weight is None):
        remedy = "It says where a weight that differs between rows has the batch."
        expected = "weight_dim to be None, or an int beside a weight"
        raise refuse(name, TypeError, expected, repr(dim), remedy)
    weight = spec.weight
    if weight is not None and not isinstance(weight, Tensor) and not callable(weight):
        kind = type(weight).__name__
        expected = "weight to be a tensor or a function that returns one"
        remedy = "Make one of it by torch.as_tensor, with the dtype of the input."
        raise refuse(name, TypeError, expected, kind, remedy)


# --- what a call carries with it ----------------------------------------------------------


def extras_of(spec: Spec) -> Callable[..., tuple[list[Tensor], tuple[int | None, ...]]] | None:
    """A function of a call and its arguments to weight and probes, with their batch dimensions."""
    if not spec.is_weighted and spec.samples is None:
        return None
    return functools.partial(_extras, spec)


def _extras(
    spec: Spec, call: Call, args: Any, kwargs: Any
) -> tuple[list[Tensor], tuple[int | None, ...]]:
    tensors: list[Tensor] = []
    dims: list[int | None] = []
    if spec.is_weighted:
        weight = spec.weight(*args, **kwargs) if callable(spec.weight) else spec.weight
        tensors.append(_checked(call, spec, weight))
        dims.append(None if spec.weight_dim is None else 0)
    if spec.samples is not None:
        tensors += [_drawn(call, spec, j) for j in range(len(call.inputs))]
        dims += [None if dim is None else 0 for dim in call.layout.diff_dims]
    return tensors, tuple(dims)


def _drawn(call: Call, spec: Spec, j: int) -> Tensor:
    x, dim = call.inputs[j], call.layout.diff_dims[j]
    batch = () if dim is None else (call.batch,)  # what rows share moves the same way in all
    shape = (*batch, spec.samples or 0, *row_shape(x, dim))
    words: dict[str, Any] = {"device": x.device}
    if spec.generator is not None:
        words = {"device": spec.generator.device, "generator": spec.generator}
    if spec.probes == "gaussian":
        return torch.randn(shape, dtype=x.dtype, **words).to(x.device)
    return (2 * torch.randint(0, 2, shape, **words) - 1).to(x.device, x.dtype)


def _checked(call: Call, spec: Spec, weight: Any) -> Tensor:
    """The weight with the batch in front, if it has one.

    Raises:
        TypeError, ValueError: it is no vector and no symmetric matrix for the one input.
    """
    name, dim = call.options.name, spec.weight_dim
    if len(call.inputs) != 1:
        raise refuse(
            name,
            ValueError,
            "one input tensor with weight",
            len(call.inputs),
            "Name one in argnums.",
        )
    (x,) = call.inputs
    _check_kind(name, weight)
    row, shape = row_shape(x, call.layout.diff_dims[0]), weight.shape
    if dim is not None:
        if not -weight.ndim <= dim < weight.ndim or shape[dim] != call.batch:
            expected = f"weight to have a batch of {call.batch} in dimension {dim}"
            remedy = "A weight that is the same in all rows has no weight_dim."
            raise refuse(name, ValueError, expected, f"shape {tuple(shape)}", remedy)
        weight = weight.movedim(dim, 0)
        shape = weight.shape[1:]
    if not (_is_same(shape, row) or _is_same(shape, row + row)):
        whole, square = tuple(row), tuple(row + row)
        rows = "in each row" if dim is not None else "(and weight_dim if there is one for each row)"
        expected = f"weight of shape {whole} or {square} {rows}"
        raise refuse(name, ValueError, expected, f"shape {tuple(shape)}")
    if not is_traced() and weight.is_inference():
        weight = weight.clone()
    weight = weight.to(x.device, x.dtype)
    if weight.numel() and not is_transformed():
        square = (-1, row.numel()) if shape == row else (-1, row.numel(), row.numel())
        _check_entries(name, weight.detach().reshape(square))
    return weight


def _is_same(shape: torch.Size, other: torch.Size) -> bool:
    """Whether shapes are the same; a compiler compares unknown sizes one by one only."""
    return len(shape) == len(other) and all(n == m for n, m in zip(shape, other))


def _check_kind(name: str, weight: Any) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        remedy = "Make one of it by torch.as_tensor, with the dtype of the input."
        raise refuse(name, TypeError, "weight to be a tensor of real numbers", got, remedy)
    check_arguments(name, [weight], "weight to be a tensor")
    if weight.layout != torch.strided:
        remedy = "Call .to_dense() on it."
        raise refuse(name, TypeError, "weight to be a dense tensor", weight.layout, remedy)


def _check_entries(name: str, weight: Tensor) -> None:
    """Raise unless vectors ``(B or 1, N)``, or matrices ``(B or 1, N, N)``, can be weights."""
    largest = weight.abs().amax().item()
    if not math.isfinite(largest):
        remedy = "Leave out coordinates by a weight of 0."
        raise refuse(name, ValueError, "weight to be finite", largest, remedy)
    limit = 100 * torch.finfo(weight.dtype).eps * largest
    if weight.ndim == 3 and (weight - weight.mT).abs().amax() > limit:
        remedy = "Pass (W + W.mT) / 2, which has the same sum."
        raise refuse(name, ValueError, "a symmetric matrix as weight", "another", remedy)


def of_row(
    spec: Spec, j: int, x: Tensor, extras: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Directions in input ``j`` of one row, by its own weight and probes: left, right, weights."""
    count = x.numel()
    if spec.samples is not None:
        left = extras[spec.is_weighted + j]
    else:
        left = torch.eye(count, dtype=x.dtype, device=x.device).view(count, *x.shape)
    weights = x.new_full((len(left),), 1 / max(len(left), 1) if spec.samples is not None else 1)
    right = left if not spec.is_weighted else _applied(extras[0], left.unsqueeze(1), x.shape, True)
    return left, right.reshape(left.shape), weights


# --- along directions, by either method ------------------------------------------------

# Derivatives of one tensor that are propagated together: 2**21 floats are 8 MiB.
_PASS_ELEMENTS = 2**21


def recording_of(run: Run) -> Recording:
    """What Taylor propagation follows of a run.

    Raises:
        UntraceableError: it does something through which nothing can be propagated.
    """
    return make_recording(run.recorder, run.output.leaves, create_graph=run.create_graph)


def derivatives_along(
    run: Run, given: Sequence[Directions], route: Route, *, firsts: bool, total: bool
) -> list[Along]:
    """First and second derivatives along directions, given for each input.

    With ``total``, second derivatives come as their weighted sum, ``(1, B, *out)``.
    """
    if route.mode == "taylor":
        recording = recording_of(run)
        return [
            _by_taylor(recording, j, pairs, route.chunk, firsts=firsts, total=total)
            for j, pairs in enumerate(given)
        ]
    result = along(run, given, route)
    if not total:
        return result
    return [Along(a.firsts, _weighted(a.seconds, g.weights)) for a, g in zip(result, given)]


def _weighted(seconds: Sequence[Tensor | None], weights: Tensor) -> list[Tensor | None]:
    return [
        None if s is None else torch.tensordot(weights.to(s.dtype), s, 1).unsqueeze(0)
        for s in seconds
    ]


def _by_taylor(
    recording: Recording, j: int, given: Directions, chunk: int | None, *, firsts: bool, total: bool
) -> Along:
    count = len(given.left)
    step = chunk or max(_PASS_ELEMENTS // max(largest(recording), 1), 1)
    if count <= step:
        weights = given.weights if total else None
        pair = directional(recording, j, given.left, given.right, weights, firsts=firsts)
        return Along(*pair)
    outs = len(recording.slots)
    slopes = [Chunks(count, recording.create_graph) for _ in range(outs)]
    bends = [Chunks(count, recording.create_graph) for _ in range(outs)]
    sums: list[Tensor | None] = [None] * outs
    for start in range(0, count, step):
        part = given.narrow(start, min(start + step, count))
        weights = part.weights if total else None
        first, second = directional(recording, j, part.left, part.right, weights, firsts=firsts)
        for i in range(outs):
            slopes[i].add(first[i], len(part.left))
            if total:
                sums[i] = added(sums[i], second[i], graph=recording.create_graph)
            else:
                bends[i].add(second[i], len(part.left))
    return Along([c.result() for c in slopes], sums if total else [c.result() for c in bends])
