"""One run of ``func``: the operations that depend on the input, and their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from funcjac.errors import UntraceableError

# Position of an argument, and its position in the list that stands there.
Place = tuple[int, "int | None"]


class Node(NamedTuple):
    """One operation that depends on the input.

    Attributes:
        places: of the arguments that depend on the input; ``slots`` name their values.
        outs: slots of the results, ``None`` for a result without derivative.
    """

    op: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    places: tuple[Place, ...]
    slots: tuple[int, ...]
    outs: tuple[int | None, ...] = ()

    @property
    def name(self) -> str:
        return self.op.overloadpacket.__name__

    def run(self, values: dict[int, Any]) -> list[Any]:
        """Results, with ``values`` in the slots."""
        return as_list(self.op(*self.args_with(values), **self.kwargs))

    def args_with(self, values: dict[int, Any]) -> list[Any]:
        """Arguments, with ``values`` in some of the slots."""
        args = list(self.args)
        for (i, j), slot in zip(self.places, self.slots):
            if slot in values:
                tensor = values[slot]
                args[i] = tensor if j is None else [*args[i][:j], tensor, *args[i][j + 1 :]]
        return args


class Recording(NamedTuple):
    """One run of ``func``, ready for propagation.

    Attributes:
        values: by slot.
        slots: of the outputs; ``None`` for one that does not depend on the input.
        steps: operations that the outputs need, each with the slots that nobody uses after it, and
            whether it leads to an operation that is not linear. Elsewhere, lower derivatives serve
            nothing but themselves.
        partials: of elementwise operations, which serve all directions.
    """

    values: list[Tensor]
    slots: list[int | None]
    steps: list[tuple[Node, set[int], bool]]
    create_graph: bool
    partials: dict[Any, Any]

    def value(self, slot: int) -> Tensor:
        """Tensor in a slot.

        Raises:
            UntraceableError: it is a copy of an overwritten tensor, to which no graph leads.
        """
        value = self.values[slot]
        if self.create_graph and not value.requires_grad:
            raise UntraceableError("a tensor that depends on the input was overwritten later on")
        return value


def as_list(out: Any) -> list[Any]:
    """Results of an operation."""
    return list(out) if isinstance(out, (tuple, list)) else [out]
