"""What a row of the table of torch's faults says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What an operation may have wrong.
KINDS = {
    "single_pass": "its backward runs once and frees what it needs: a graph serves one pass",
    "forward": "the forward formula",
    "forward_vmap": "the forward formula under torch.vmap",
    "forward_again": "forward formulas of second order: over reverse, over forward, under reverse",
    "vmap": "derivatives of reverse mode, where the operation itself runs under torch.vmap",
    "batching": "the plain first reverse derivative, where cotangents are batched",
    "batching_again": "the plain second one, where cotangents of the first are batched",
    "reverse_1": "the plain first reverse derivative",
    "reverse_2": "the plain second reverse derivative, or there is none",
    "reverse_3": "the plain third reverse derivative, or there is none",
    "argnums": "a transform of torch.func, for negative argnums",
}
FIRST_ORDER = frozenset({"reverse_1", "batching", "vmap", "single_pass"})
HIGHER_ORDER = frozenset({"batching_again", "reverse_2", "reverse_3"})
FORWARD = frozenset({"forward", "forward_vmap"})


@dataclass(frozen=True)
class Fault:
    """One operation that PyTorch differentiates wrongly.

    Attributes:
        op: name of the ATen operation, or name and overload.
        wrong: what is wrong, of ``KINDS``.
        nodes: names of the autograd nodes that show the operation in a graph; with ``.k`` only
            where a gradient flows into output ``k`` of the node.
        replacements: what runs instead of each Python call, of which all derivatives are right.
        in_transforms: what runs instead in torch.func alone, where plain derivatives are right or
            values decide what is.
        since: the first release of torch that has the fault, as far as known: none below 2.11
            was looked at.
        note: what is wrong, where the kind does not say it.
        link: an issue or a page.
        compiles: whether torch.compile can look up the Python calls.
    """

    op: str
    wrong: frozenset[str]
    nodes: tuple[str, ...] = ()
    replacements: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    in_transforms: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)
    since: str = "2.11"
    note: str = ""
    link: str = ""
    compiles: bool = True

    @property
    def calls(self) -> tuple[Any, ...]:
        """The Python calls to intercept."""
        return tuple({**self.replacements, **self.in_transforms})


def fault(
    op: str,
    wrong: str,
    nodes: str = "",
    replacements: Mapping[Any, Callable[..., Any]] | None = None,
    in_transforms: Mapping[Any, Callable[..., Any]] | None = None,
    issue: int = 0,
    since: str = "2.11",
    note: str = "",
    compiles: bool = True,
) -> Fault:
    """A row; calls that this release of torch does not have are ``None`` and drop out."""
    kinds = frozenset(wrong.split())
    assert kinds <= KINDS.keys(), f"unknown kinds of fault: {kinds - KINDS.keys()}"
    link = f"https://github.com/pytorch/pytorch/issues/{issue}" if issue else ""
    return Fault(
        op,
        kinds,
        tuple(nodes.split()),
        _known(replacements),
        _known(in_transforms),
        since,
        note,
        link,
        compiles,
    )


def _known(replacements: Mapping[Any, Callable[..., Any]] | None) -> dict[Any, Any]:
    return {call: run for call, run in (replacements or {}).items() if call is not None}
