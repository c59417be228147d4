"""What every transform states of itself: what it computes, of one run or of one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call
from funcjac._dispatch.rule import Sizes, first_order_route, prefers_taylor, second_order_route
from funcjac._engines.graph import Route
from funcjac._engines.run import Derivatives, Run
from funcjac._verification.probe import Entry, Probe

NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")


@dataclass(frozen=True)
class Operator:
    """One transform.

    Attributes:
        modes: what ``mode`` may be, beside ``"auto"``.
        is_second_order: whether ``func`` is differentiated more than once.
        is_jacobian: whether each block is the whole derivative of an output by an input.
    """

    modes: ClassVar[tuple[str, ...]] = ("fwd", "rev")
    is_second_order: ClassVar[bool] = False
    is_jacobian: ClassVar[bool] = False

    def words(self) -> list[str]:
        """The operator's own keywords that differ from their defaults, printed."""
        return []

    def as_numbers(self) -> tuple[Any, ...]:
        """The operator's own keywords as far as ``compute`` reads them, for a compiler to pass."""
        return ()

    @classmethod
    def from_numbers(cls, numbers: tuple[Any, ...]) -> Operator:
        """An operator that computes the same as the one of ``as_numbers``."""
        return cls(*numbers)

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        """First and second derivatives of each output, and gradients differentiated further."""
        del call, outputs
        return inputs, 0, 0

    def route(self, call: Call, sizes: Sizes) -> Route:
        """The mode and the chunk that the rule gives."""
        return first_order_route(call.options.mode, call.options.chunk_size, sizes)

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        """Whether operations are recorded as ``func`` runs."""
        del call, outputs, inputs
        return False

    def check_output(self, call: Call, outs: Sequence[Tensor]) -> None:
        """Refuse what ``func`` returned, before any differentiation."""

    def compute(self, run: Run, route: Route) -> Derivatives:
        """Derivatives through the graph, or the record, of one run."""
        raise NotImplementedError

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        """The same of one row by torch.func: blocks by output, and what comes along."""
        raise NotImplementedError

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        """For each block: the inputs that it is differentiated by, with axes of their own."""
        return [(j,) for j in range(len(call.layout.diff))]

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """What blocks contracted with a cotangent must come to, by plain autograd."""
        pairs = zip(probe.grads, run.inputs, run.dims)
        return [Entry(probe.seeds, grad, x, dim) for grad, x, dim in pairs]

    def assemble(self, call: Call, result: Derivatives) -> Any:
        """The user's tree: output structure outside, input structure inside."""
        raise NotImplementedError


class SecondOrder(Operator):
    """What second-order transforms share."""

    modes: ClassVar[tuple[str, ...]] = NESTED
    is_second_order: ClassVar[bool] = True

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        options = call.options
        if options.mode != "auto" or options.engine not in ("auto", "sum"):
            return options.mode == "taylor"
        return prefers_taylor(outputs, self.count(call, outputs, inputs))

    def route(self, call: Call, sizes: Sizes) -> Route:
        counts = self.count(call, sizes.outputs, sizes.inputs)
        return second_order_route(call.options.mode, call.options.chunk_size, sizes, counts)


def first_entries(run: Run, probe: Probe) -> list[Entry]:
    """The first derivatives, where they are returned as well."""
    if not run.call.options.return_value:
        return []
    pairs = zip(probe.grads, run.inputs, run.dims)
    return [Entry(probe.seeds, grad, x, dim) for grad, x, dim in pairs]


def by_output(result: Derivatives, pick: Any) -> Any:
    return pytree.unflatten(result.output.spec, [pick(blocks) for blocks in result.blocks])


def finished(call: Call, result: Derivatives, tree: Any, slopes: int | None) -> Any:
    """With aux, with the value, and with first derivatives: those from block ``slopes`` on."""
    options, output = call.options, result.output
    if not options.return_value:
        return (tree, output.aux) if options.has_aux else tree
    value = pytree.unflatten(output.spec, output.leaves)
    more = (value, output.aux) if options.has_aux else value
    if slopes is None:
        return tree, more
    spec, n = call.layout.in_spec, len(call.layout.diff)
    jac = by_output(result, lambda blocks: pytree.unflatten(spec, blocks[slopes : slopes + n]))
    return tree, (jac, more)


def as_block(value: Tensor | None, shape: Sequence[int], out: Tensor, x: Tensor) -> Tensor:
    """A contiguous block of the result type of ``out`` and ``x``; zeros for ``None``."""
    dtype = out.dtype if out.dtype == x.dtype else torch.result_type(out, x)
    if value is None:
        return out.new_zeros(tuple(shape), dtype=dtype)
    value = value if value.dtype == dtype else value.to(dtype)
    value = value if value.shape == shape else value.reshape(tuple(shape))
    return value if value.is_contiguous() else value.contiguous()
