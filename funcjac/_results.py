"""From blocks to what the user gets: output structure outside, input structure inside."""

from __future__ import annotations

from typing import Any

from funcjac import _tree
from funcjac._batched import Call
from funcjac._passes import Jacobian


def hessian_tree(call: Call, result: Jacobian) -> Any:
    spec, n = call.layout.in_spec, len(call.layout.diff)

    def square(blocks: list[Any]) -> Any:
        rows = [_tree.unflatten(spec, blocks[j * n : (j + 1) * n]) for j in range(n)]
        return _tree.unflatten(spec, rows)

    return _finished(call, result, _by_output(result, square), n * n)


def diagonal_tree(call: Call, result: Jacobian) -> Any:
    spec, n = call.layout.in_spec, len(call.layout.diff)
    found = _by_output(result, lambda blocks: _tree.unflatten(spec, blocks[:n]))
    return _finished(call, result, found, n)


def scalar_tree(call: Call, result: Jacobian, *, error: bool, slopes: bool) -> Any:
    """One number for each output, or the number and its standard error."""
    found = _by_output(result, lambda blocks: blocks[0])
    if error:
        found = found, _by_output(result, lambda blocks: blocks[-1])
    return _finished(call, result, found, 1 if slopes else None)


def trace_tree(call: Call, result: Jacobian) -> Any:
    (blocks,) = result.blocks
    return _finished(call, result, tuple(blocks) if len(blocks) > 1 else blocks[0], None)


def partials_tree(call: Call, result: Jacobian) -> Any:
    count = len(result.blocks[0])
    found = tuple(_by_output(result, lambda blocks, e=e: blocks[e]) for e in range(count))
    return _finished(call, result, found, None)


def _by_output(result: Jacobian, pick: Any) -> Any:
    return _tree.unflatten(result.output.spec, [pick(blocks) for blocks in result.blocks])


def _finished(call: Call, result: Jacobian, found: Any, slopes: int | None) -> Any:
    """With aux, with the value, and with first derivatives: those from block ``slopes`` on."""
    options, output = call.options, result.output
    if not options.return_value:
        return (found, output.aux) if options.has_aux else found
    value = _tree.unflatten(output.spec, output.leaves)
    more = (value, output.aux) if options.has_aux else value
    if slopes is None:
        return found, more
    spec, n = call.layout.in_spec, len(call.layout.diff)
    jac = _by_output(result, lambda blocks: _tree.unflatten(spec, blocks[slopes : slopes + n]))
    return found, (jac, more)
