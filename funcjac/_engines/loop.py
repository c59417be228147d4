"""The engine ``loop``: one row after the other, by plain autograd; the last resort."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call, Output
from funcjac._engines.run import Derivatives
from funcjac._engines.vmap import join_tensors, split_tensors
from funcjac._environment.state import rng_state, set_rng_state


def by_loop(call: Call, compute: Callable[[Call], Derivatives], *, create_graph: bool) -> Any:
    """``compute`` on every row as a batch of one."""
    same = rng_state() if call.options.randomness == "same" else None
    rows: list[list[Tensor] | None] = []
    rest, error = None, None
    for b in range(call.batch):
        if same is not None:
            set_rng_state(same)
        try:
            tensors, rest = _flat(compute(call.one_row(row_of(call, b))))
            rows.append(tensors if create_graph else [t.detach() for t in tensors])
        except torch.linalg.LinAlgError as raised:  # a singular row stops no other
            error = raised
            rows.append(None)
    like = next((row for row in rows if row is not None), None)
    if like is None:
        assert error is not None
        raise error
    whole = [[torch.full_like(t, torch.nan) for t in like] if r is None else r for r in rows]
    return _joined(rest, [torch.stack(column) for column in zip(*whole)])


def row_of(call: Call, b: int) -> list[Tensor]:
    """The batched leaves of row ``b``, as a batch of one."""
    layout = call.layout
    return [call.leaves[i].narrow(layout.dims[i] or 0, b, 1) for i in layout.batched]


def _flat(result: Derivatives) -> tuple[list[Tensor], Any]:
    aux, kept = split_tensors(result.output.aux)
    if any(leaf.ndim == 0 or leaf.shape[0] != 1 for leaf in aux):
        raise ValueError(
            "expected aux tensors with a batch dimension in front where rows run one by one, got "
            f"shapes {[tuple(leaf.shape) for leaf in aux]} for a batch of one"
        )
    flat = [block for row in result.blocks for block in row]
    sizes = [len(row) for row in result.blocks]
    outs = result.output.leaves
    return [t[0] for t in (*flat, *outs, *aux)], (sizes, len(outs), result.output.spec, kept)


def _joined(rest: Any, tensors: list[Tensor]) -> Derivatives:
    sizes, outputs, spec, kept = rest
    remaining = iter(tensors)
    blocks = [[next(remaining) for _ in range(size)] for size in sizes]
    outs = [next(remaining) for _ in range(outputs)]
    return Derivatives(blocks, Output(outs, spec, join_tensors(kept, remaining)))
