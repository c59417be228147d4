"""One run of ``func`` under autograd: what every engine, mode and verification starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Output


class Derivatives(NamedTuple):
    """What a transform computes: ``blocks[i][e]`` for output ``i`` and entry ``e``."""

    blocks: list[list[Tensor]]
    output: Output


class Facts(NamedTuple):
    """What a graph tells of the run that made it.

    Attributes:
        signature: hash of the names of the nodes, in the order of a walk.
        names: of the nodes.
        operations: number of nodes.
        widest: elements of the widest tensor that a gradient flows through.
        has_leaves: whether tensors require grad that are not differentiated here (parameters).
    """

    signature: int
    names: list[str]
    operations: int
    widest: int
    has_leaves: bool


class Run(NamedTuple):
    """One run of a call, with the graph that leads from ``output`` to ``inputs``.

    Attributes:
        inputs: leaves of the library's own, or copies in the caller's graph.
        create_graph: whether results will be differentiated again.
        recorder: what Taylor propagation recorded of the run.
    """

    call: Call
    inputs: list[Tensor]
    output: Output
    create_graph: bool = False
    recorder: Any = None

    @property
    def dims(self) -> tuple[int | None, ...]:
        return self.call.layout.diff_dims


class ChangedInputError(RuntimeError):
    """``func`` wrote into its input; part of the dispatch, never shown."""


# Marks leaves of the library's own once their call is over: nobody differentiates by them.
_DONE = "_funcjac_done"


def attached(output: Output) -> list[Tensor]:
    """Outputs, and tensors of the aux that have a graph."""
    if output.aux is None:
        return output.leaves
    return [*output.leaves, *[x for x in pytree.tensors(output.aux) if x.requires_grad]]


def retire(run: Run) -> None:
    """Mark what a run differentiated by, in a graph that outlives the call."""
    for x in run.inputs:
        if x.is_leaf:
            vars(x)[_DONE] = True


def make_inputs(call: Call, *, copy: bool = False) -> list[Tensor]:
    """Inputs to differentiate by: never the caller's own tensors, whose hooks would run.

    ``copy`` keeps them from a ``func`` that nobody has seen, which may write into its input.
    """
    keeps_graph = torch.is_grad_enabled()
    return [
        x.clone()
        if keeps_graph and x.requires_grad
        else (x.detach().clone() if copy else x.detach()).requires_grad_()
        for x in call.inputs
    ]


def run_once(call: Call, recorder_of: Any = None, *, copy: bool = False) -> Run:
    """Run ``func`` on the whole batch under autograd.

    Raises:
        ChangedInputError: it wrote into its input.
    """
    inputs = make_inputs(call, copy=copy)
    if recorder_of is not None:  # a negation that is a mere bit would look like a constant
        inputs = [x.resolve_neg().detach().requires_grad_() if x.is_neg() else x for x in inputs]
    versions = [x._version for x in inputs]
    recorder = None if recorder_of is None else recorder_of(inputs)
    try:
        with torch.enable_grad():
            if recorder is None:
                output = call(inputs)
            else:
                with recorder:
                    output = call(inputs)
    except RuntimeError as error:
        if call.clone or "leaf Variable" not in str(error):
            raise
        raise ChangedInputError from error
    if not call.clone and [x._version for x in inputs] != versions:
        raise ChangedInputError
    return Run(call, inputs, output, recorder=recorder)


def plain_values(call: Call) -> list[Tensor]:
    """Outputs without a graph, of a ``func`` that may differentiate by itself."""
    with torch.enable_grad():
        outs = call._replace(clone=True)(make_inputs(call)).leaves
    return [out.detach() for out in outs]


def read_graph(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Facts:
    """Walk the graph from ``outputs`` back to ``inputs``, once, in a fixed order."""
    names: list[str] = []
    widest, has_leaves = 1, False
    stops = {x.grad_fn for x in inputs if x.grad_fn is not None}
    stack: list[Any] = [out.grad_fn for out in reversed(outputs) if out.grad_fn is not None]
    seen = set(stops)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        names.append(name)
        if name == "torch::autograd::AccumulateGrad":
            variable = node.variable
            if not has_leaves and _DONE not in variable.__dict__:
                has_leaves = not any(variable is x for x in inputs)
            continue
        for metadata in node._input_metadata:
            size = 1
            for length in metadata.shape:
                size *= length
            if size > widest:
                widest = size
        for parent, _ in node.next_functions:
            if parent is not None:
                stack.append(parent)
    return Facts(hash(tuple(names)), names, len(names), widest, has_leaves)


def graph_nodes(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes that lead to ``roots``, not through ``inputs``."""
    seen = {x.grad_fn for x in inputs if x.grad_fn is not None}
    stack = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions if parent is not None]


def graph_leaves(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors that require grad and that lead to ``roots``, not through ``inputs``."""
    for node in graph_nodes(roots, inputs):
        variable = getattr(node, "variable", None)
        if variable is not None and _DONE not in variable.__dict__:
            yield variable


def detached(result: Derivatives) -> Derivatives:
    """A result without its graph, which would outlive the call."""
    blocks = [[b.detach() if b.requires_grad else b for b in row] for row in result.blocks]
    output = result.output
    aux = None if output.aux is None else pytree.map_tensors(Tensor.detach, output.aux)
    leaves = [out.detach() for out in output.leaves]
    return Derivatives(blocks, Output(leaves, output.spec, aux))
