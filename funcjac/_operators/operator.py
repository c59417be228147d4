"""``Operator``: how a transform computes, verifies and arranges its derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, with_extras
from funcjac._dispatch import choose_engine_mode_chunk as rule
from funcjac._engines.rows import as_block, identity, row_shape
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._verification.central_differences import Pair, difference, random_moves, times
from funcjac._verification.reference_vjp import Entry, Probe
from funcjac.errors import refuse

Tensors = Sequence[Tensor]
Dims = Sequence[int | None]
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")


@dataclass(frozen=True)
class Operator:
    """Computes the derivatives of one transform, of a run or of a row, and their references.

    One with tensors of its own has ``prepare(call, args, kwargs)``, which returns the call with
    them.

    Attributes:
        modes: what ``mode`` may be, beside ``"auto"``.
        is_second_order: whether ``func`` is differentiated more than once.
        order: by how many inputs a block is differentiated, with axes for each.
    """

    modes: ClassVar[tuple[str, ...]] = ("fwd", "rev")
    is_second_order: ClassVar[bool] = False
    order: ClassVar[int] = 0

    @property
    def has_parts(self) -> bool:
        """Whether the result for one output and input is more than one block."""
        return False

    def keywords(self) -> list[str]:
        """The operator's own keywords that differ from their defaults, printed."""
        return changed_keywords(self, [field.name for field in fields(self)])

    def as_numbers(self) -> tuple[tuple[str, Any], ...]:
        """The operator's own keywords for a compiler to pass: ``True`` for what is no number."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        kinds = (int, float, str, tuple)
        return tuple([(n, v if isinstance(v, kinds) else True) for n, v in values if v is not None])

    @classmethod
    def from_numbers(cls, numbers: tuple[tuple[str, Any], ...]) -> Operator:
        """An operator that computes the same: tensors of its own are extras of a call."""
        return cls(**dict(numbers))

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        """First and second derivatives of each output, and gradients differentiated further."""
        return inputs, 0, 0

    def route(self, call: Call, sizes: rule.Sizes) -> Route:
        """The mode and the chunk that the rule gives."""
        return rule.first_order_route(call.options.mode, call.options.chunk_size, sizes)

    def passes(self, mode: str, outputs: int, inputs: int) -> int:
        """Passes through the graph of one run, or directions that are propagated."""
        counts = [outputs if part == "rev" else inputs for part in mode.split("_over_")]
        return inputs if mode == "taylor" else counts[0] if len(counts) == 1 else counts[1] * inputs

    def check(self, name: str) -> None:
        """Refuse bad keywords of the operator's own."""

    def check_inputs(self, call: Call) -> None:
        """Refuse rows that the operator is not defined for, before ``func`` runs."""

    def check_output(self, call: Call, outs: Sequence[Tensor]) -> None:
        """Refuse what ``func`` returned, before any differentiation."""

    def adds_jac(self, call: Call) -> bool:
        """Whether the Jacobian is returned as well: the last blocks of each output."""
        return False

    def own_inputs(self, call: Call) -> list[tuple[int, ...]]:
        """For each of the operator's own blocks: the inputs that it has axes of."""
        inputs = range(len(call.layout.diff))  # a compiler that saw two orders takes no repeat=
        return list(itertools.product(*[inputs for _ in range(self.order)]))

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        """The same for every block, those of the Jacobian too."""
        jac = [(j,) for j in range(len(call.layout.diff))] if self.adds_jac(call) else []
        return self.own_inputs(call) + jac

    def compute(self, run: Run, route: Route) -> Derivatives:
        """Derivatives through the graph, or the record, of one run."""
        raise NotImplementedError

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        """The same of one row by torch.func: blocks by output, and what comes along."""
        raise NotImplementedError

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """References by plain autograd, for blocks that are contracted with a cotangent."""
        pairs = zip(probe.grads, run.inputs, run.dims)
        return [Entry(probe.seeds, grad, x, dim) for grad, x, dim in pairs]

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Pairs of central differences and computed values; here along one random direction."""
        moves, dims, computed = random_moves(call), call.layout.diff_dims, []
        for blocks in result.blocks:
            terms = []
            for product, name in zip(blocks, self.own_inputs(call)):
                for j in reversed(name):
                    product = times(product, moves[j], dims[j])
                terms.append(product)
            computed.append(sum(terms[1:], terms[0]))
        yield difference(call, [moves] * self.order), computed

    def tree(self, call: Call, result: Derivatives) -> Any:
        """The operator's own blocks: output structure outside, input structure inside."""
        if not self.has_parts:
            return by_output(result, lambda blocks: _by_input(call, blocks, self.order))
        spec, parts = result.output.spec, zip(*result.blocks)
        return tuple([pytree.unflatten(spec, list(blocks)) for blocks in parts])

    def assemble(self, call: Call, result: Derivatives) -> Any:
        """The user's tree with aux, with the value, and with the Jacobian."""
        options, output, tree = call.options, result.output, self.tree(call, result)
        if not options.return_value:
            return (tree, output.aux) if options.has_aux else tree
        value = pytree.unflatten(output.spec, output.leaves)
        rest = (value, output.aux) if options.has_aux else value
        if self.adds_jac(call):
            first = -len(call.layout.diff)
            rest = by_output(result, lambda blocks: _by_input(call, blocks[first:], 1)), rest
        return tree, rest


@dataclass(frozen=True)
class Hutchinson:
    """Random probes that estimate the trace of each row, or none for the exact trace."""

    samples: int | None = None
    probes: str = "rademacher"
    generator: torch.Generator | None = None
    return_error: bool = False

    def check(self, name: str) -> None:
        samples, probes, generator = self.samples, self.probes, self.generator
        if samples is not None and (type(samples) is not int or samples < 1):
            kind = ValueError if type(samples) is int else TypeError
            raise refuse(name, kind, "samples to be None or a positive int", repr(samples))
        if not isinstance(probes, str) or probes not in ("rademacher", "gaussian"):
            expected = "probes to be 'rademacher' or 'gaussian'"
            raise refuse(name, ValueError, expected, repr(probes))
        if generator is not None and not isinstance(generator, torch.Generator):
            kind = type(generator).__name__
            remedy = "Make one by torch.Generator().manual_seed(0)."
            raise refuse(name, TypeError, "generator to be a torch.Generator", kind, remedy)
        if type(self.return_error) is not bool:
            raise refuse(name, TypeError, "return_error to be a bool", repr(self.return_error))
        if self.return_error and (samples is None or samples < 2):
            remedy = "The error is estimated from how far samples differ."
            expected = "at least two samples with return_error=True"
            raise refuse(name, ValueError, expected, samples, remedy)

    @property
    def has_parts(self) -> bool:
        return self.return_error

    def prepare(self, call: Call, args: Any, kwargs: Any) -> Call:
        """Adds probes of each input, ``(B, k, *row)``, of a shared one ``(k, *row)``."""
        if self.samples is None:
            return call
        probes, dims = [], call.layout.diff_dims
        for x, dim in zip(call.inputs, dims):
            rows = () if dim is None else (call.batch,)  # what rows share moves the same way in all
            probes.append(self._drawn((*rows, self.samples, *row_shape(x, dim)), x))
        return with_extras(call, probes, tuple([None if dim is None else 0 for dim in dims]))

    def _drawn(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        keywords: dict[str, Any] = {"device": like.device}
        if self.generator is not None:  # a compiler takes none
            keywords = {"device": self.generator.device, "generator": self.generator}
        if self.probes == "gaussian":
            return torch.randn(shape, dtype=like.dtype, **keywords).to(like.device)
        return (2 * torch.randint(0, 2, shape, **keywords) - 1).to(like.device, like.dtype)

    def vectors(self, x: Tensor, dim: int | None, probes: Tensor | None) -> Tensor:
        """The basis of a row, or the probes of an input: ``(K, B or 1, *row)``."""
        if probes is not None:
            return probes.unsqueeze(1) if dim is None else probes.movedim(1, 0)
        row = row_shape(x, dim)
        return identity(row.numel(), x).view(row.numel(), 1, *row)

    def own_inputs(self, call: Call) -> list[tuple[int, ...]]:
        return [()] * (1 + self.return_error)

    def estimates(self, values: Tensor, dim: int) -> list[Tensor]:
        """The trace; of samples along ``dim`` their mean, and its standard error."""
        if self.samples is None:
            return [values]
        mean = values.mean(dim)
        return [mean, values.std(dim) / self.samples**0.5] if self.return_error else [mean]


class SecondOrder(Operator):
    """A second-order transform: blocks of its own, then the Jacobian where it is returned."""

    modes: ClassVar[tuple[str, ...]] = ("taylor", *NESTED)
    is_second_order: ClassVar[bool] = True

    @property
    def highest(self) -> int:
        """The order of the highest derivatives."""
        return 2

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        options = call.options
        if options.mode != "auto" or options.engine not in ("auto", "sum"):
            return options.mode == "taylor"
        return rule.prefers_taylor(outputs, self.count(call, outputs, inputs))

    def route(self, call: Call, sizes: rule.Sizes) -> Route:
        counts = self.count(call, sizes.outputs, sizes.inputs)
        return rule.second_order_route(call.options.mode, call.options.chunk_size, sizes, counts)

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        return inputs, inputs, inputs

    def adds_jac(self, call: Call) -> bool:
        return call.options.return_value

    def blocks(self, run: Run, derivatives: list[list[Any]]) -> Derivatives:
        """Blocks of values: for each output its own, then the Jacobian's; ``None`` for zeros."""
        xs, names, rows = run.inputs, self.by_inputs(run.call), []
        shapes = list(map(row_shape, xs, run.dims))
        for out, values in zip(run.output.leaves, derivatives):
            row = []
            for value, name in zip(values, names):
                shape = (*out.shape, *[size for j in name for size in shapes[j]])
                row.append(as_block(value, shape, out, [xs[j] for j in name or (0,)]))
            rows.append(row)
        return Derivatives(rows, run.output)

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """Those of the Jacobian where it is returned, behind the operator's own."""
        return super().entries(run, probe) if self.adds_jac(run.call) else []


def by_output(result: Derivatives, pick: Any) -> Any:
    return pytree.unflatten(result.output.spec, [pick(blocks) for blocks in result.blocks])


def _by_input(call: Call, blocks: list[Any], order: int) -> Any:
    """Blocks by one input, or by each pair of inputs, in the structure of the input."""
    if not order:
        return blocks[0]
    n = len(call.layout.diff)
    size = n ** (order - 1)
    parts = [blocks[j * size : (j + 1) * size] for j in range(n)]
    return pytree.unflatten(call.layout.in_spec, [_by_input(call, p, order - 1) for p in parts])


def changed_keywords(thing: Any, names: Sequence[str]) -> list[str]:
    """Fields of a dataclass that differ from their defaults, printed; tensors without values."""
    defaults = {field.name: field.default for field in fields(thing)}
    printed = []
    for name in names:
        value, default = getattr(thing, name), defaults[name]
        if isinstance(value, (Tensor, torch.Generator)):
            printed.append(f"{name}=<{type(value).__name__}>")
        elif value is not default and value != default:
            printed.append(f"{name}={value!r}")
    return printed
