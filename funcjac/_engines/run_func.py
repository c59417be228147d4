"""One run of ``func`` under autograd: what every engine, mode and verification starts from."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Output


class Derivatives(NamedTuple):
    """What a transform computes: ``blocks[i][e]`` for output ``i`` and entry ``e``."""

    blocks: list[list[Tensor]]
    output: Output


class Route(NamedTuple):
    """How derivatives are computed.

    Attributes:
        mode: ``"rev"``, ``"fwd"``, a nested mode, or ``"taylor"``.
        chunk: basis vectors per pass, ``None`` for all.
    """

    mode: str
    chunk: int | None = None

    @property
    def way(self) -> tuple[str, bool]:
        """What is refused at once: a mode, and whether vectors go one by one."""
        return self.mode, self.chunk == 1


class Facts(NamedTuple):
    """What a graph tells of the run that made it.

    Attributes:
        signature: hash of the names of the nodes, in the order of a walk.
        nodes: those that are no leaves.
        operations: number of nodes.
    """

    signature: int
    nodes: list[Any]
    operations: int

    @property
    def widest(self) -> int:
        """Elements of the widest tensor that a gradient flows through."""
        shapes = [metadata.shape for node in self.nodes for metadata in node._input_metadata]
        return max(map(math.prod, shapes), default=1)


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
    inputs, keeps_graph = [], torch.is_grad_enabled()
    for i in call.layout.diff:
        x = call.leaves[i]
        if keeps_graph and x.requires_grad:
            inputs.append(x.clone())
        else:
            x = x.detach()
            inputs.append((x.clone() if copy else x).requires_grad_())
    return inputs


def run_once(call: Call, recorder_of: Any = None, *, copy: bool = False) -> Run:
    """Run ``func`` on the whole batch under autograd.

    Raises:
        ChangedInputError: it wrote into its input.
    """
    inputs, recorder = make_inputs(call, copy=copy), None
    if recorder_of is not None:  # a negation that is a mere bit would look like a constant
        inputs = [x.resolve_neg().detach().requires_grad_() if x.is_neg() else x for x in inputs]
        recorder = recorder_of(inputs)
    versions = list(map(_version, inputs))
    try:
        if recorder is None and torch.is_grad_enabled():
            output = call(inputs)
        else:
            with torch.enable_grad(), recorder or contextlib.nullcontext():
                output = call(inputs)
    except RuntimeError as error:
        if call.clone or "leaf Variable" not in str(error):
            raise
        raise ChangedInputError from error
    if not call.clone and list(map(_version, inputs)) != versions:
        raise ChangedInputError
    return Run(call, inputs, output, recorder=recorder)


_version = operator.attrgetter("_version")


def plain_values(call: Call) -> list[Tensor]:
    """Outputs without a graph, of a ``func`` that may differentiate by itself."""
    with torch.enable_grad():
        outs = call._replace(clone=True)(make_inputs(call)).leaves
    return [out.detach() for out in outs]


def read_graph(run: Run) -> tuple[Run, Facts]:
    """Walk the graph of a run back to its inputs, once, in the order of graph_nodes.

    Returns:
        The run, which creates a graph if its result can be differentiated, and what was seen.
    """
    call, inputs, output, create_graph, recorder = run
    graph = torch.is_grad_enabled()
    names: list[str] = []
    nodes: list[Any] = []
    seen: set[Any] = {None, *map(_grad_fn, inputs)}
    outs = output.leaves if output.aux is None else attached(output)
    stack: list[Any] = list(zip(map(_grad_fn, outs), itertools.repeat(0)))
    while stack:  # of every call: a generator would take twice as long
        node, _ = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        name = node.name()
        names.append(name)
        if name == "torch::autograd::AccumulateGrad":
            if graph and not create_graph:  # by what is not differentiated here: parameters
                x = node.variable
                create_graph = _DONE not in x.__dict__ and id(x) not in map(id, inputs)
            continue
        nodes.append(node)
        stack += node.next_functions
    if graph and not create_graph:
        for i in (*call.layout.diff, *range(len(call.leaves) - call.extra, len(call.leaves))):
            create_graph = create_graph or call.leaves[i].requires_grad
    facts = Facts(hash(tuple(names)), nodes, len(names))
    return Run(call, inputs, output, create_graph, recorder), facts


_grad_fn = operator.attrgetter("grad_fn")


def kind_of(run: Run, facts: Facts) -> Any:
    """What runs have in common that take one route."""
    return facts.signature, run.create_graph, run.call.batch, *map(_shape, run.output.leaves)


_shape = operator.attrgetter("shape")


def computed(run: Run, route: Route, nested: Route) -> Derivatives:
    """The derivatives by one route, with a graph where one is kept.

    One infinite factor makes all directions of Taylor propagation NaN: ``nested`` runs then.
    """
    operator = run.call.options.operator
    needs_graph = run.create_graph or operator.is_second_order
    if torch.is_grad_enabled() != needs_graph:
        with torch.set_grad_enabled(needs_graph):
            return computed(run, route, nested)
    result = operator.compute(run, route)
    if route.mode == "taylor" and not _is_finite(result):
        return operator.compute(run, nested)
    return result


def _is_finite(result: Derivatives) -> bool:
    return all(bool(block.isfinite().all()) for row in result.blocks for block in row)


def graph_nodes(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
    """The nodes that lead to ``roots``, not through ``inputs``, in a fixed order."""
    nodes: list[Any] = []
    seen = {x.grad_fn for x in inputs if x.grad_fn is not None}
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes.append(node)
        for parent, _ in node.next_functions:
            if parent is not None:
                stack.append(parent)
    return nodes


def graph_leaves(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors that require grad and that lead to ``roots``, not through ``inputs``."""
    for node in graph_nodes(roots, inputs):
        variable = getattr(node, "variable", None)
        if variable is not None and _DONE not in variable.__dict__:
            yield variable


# --- results as lists of tensors ---------------------------------------------------------------


def split_derivatives(result: Derivatives) -> tuple[list[Tensor], Any]:
    """The tensors of a result, and what is needed to put it together again."""
    blocks, (outs, spec, aux) = result
    tensors, rest = split_tensors(aux)
    flat = [block for row in blocks for block in row]
    return [*flat, *outs, *tensors], ([len(row) for row in blocks], len(outs), spec, rest)


def join_derivatives(rest: Any, tensors: Iterable[Tensor]) -> Derivatives:
    """Undoes :func:`split_derivatives`."""
    sizes, outputs, spec, aux_rest = rest
    remaining = iter(tensors)
    blocks = [[next(remaining) for _ in range(size)] for size in sizes]
    outs = [next(remaining) for _ in range(outputs)]
    return Derivatives(blocks, Output(outs, spec, join_tensors(aux_rest, remaining)))


def split_tensors(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, and what is needed to put it together again."""
    if tree is None:
        return [], None
    leaves, spec = pytree.flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, (spec, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def join_tensors(rest: Any, tensors: Iterable[Tensor]) -> Any:
    """Undoes :func:`split_tensors`."""
    if rest is None:
        return None
    (spec, others), remaining = rest, iter(tensors)
    leaves = [next(remaining) if other is None else other for other in others]
    return pytree.unflatten(spec, leaves)


def check_aux(aux: Any) -> None:
    """Refuse tensors in the aux of a batch of one that have no batch."""
    shapes = [tuple(x.shape) for x in pytree.tensors(aux)]
    if any(shape[:1] != (1,) for shape in shapes):
        raise ValueError(
            "expected aux tensors with a batch dimension in front where rows run one by one, got "
            f"shapes {shapes} for a batch of one"
        )


def detached(result: Derivatives) -> Derivatives:
    """A result without its graph, which would outlive the call."""
    blocks, output = result
    for row in blocks:
        row[:] = map(Tensor.detach, row)
    aux = None if output.aux is None else pytree.map_tensors(Tensor.detach, output.aux)
    leaves = list(map(Tensor.detach, output.leaves))
    return Derivatives(blocks, Output(leaves, output.spec, aux))
