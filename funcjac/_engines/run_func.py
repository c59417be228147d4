"""One run of ``func`` under autograd: what every engine, mode and verification starts from."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Output
from funcjac._environment.torch_private import uncompiled


class Derivatives(NamedTuple):
    """What a transform computes: ``blocks[i][e]`` for output ``i`` and entry ``e``."""

    blocks: list[list[Tensor]]
    output: Output


class Route(NamedTuple):
    """How derivatives are computed."""

    mode: str  # "rev", "fwd", a nested mode, or "taylor"
    chunk: int | None = None  # basis vectors per pass, ``None`` for all

    @property
    def way(self) -> tuple[str, bool]:
        """What is refused at once: a mode, and whether vectors go one by one."""
        return self.mode, self.chunk == 1


class Facts(NamedTuple):
    """What a graph tells of the run that made it."""

    signature: int  # hash of the kinds of its nodes, in the order of a walk
    nodes: list[Any]

    @property
    def widest(self) -> int:
        """Elements of the widest tensor that a gradient flows through, but for leaves."""
        nodes = [node for node in self.nodes if type(node) is not _LEAF]
        shapes = [metadata.shape for node in nodes for metadata in node._input_metadata]
        return max(map(math.prod, shapes), key=hint, default=1)  # which adds no guard


def hint(size: Any) -> int:
    """The size that a compiler sees now, of one that may change."""
    return size if isinstance(size, int) else size.node.hint or 1


class Run(NamedTuple):
    """One run of a call, with the graph that leads from ``output`` to ``inputs``."""

    call: Call
    inputs: list[Tensor]  # leaves of the library's own, or copies in the caller's graph
    output: Output
    create_graph: bool = False  # whether results will be differentiated again
    recorder: Any = None  # what Taylor propagation recorded

    @property
    def dims(self) -> tuple[int | None, ...]:
        return self.call.layout.diff_dims


class ChangedInputError(RuntimeError):
    """``func`` wrote into its input, and whether that is lost; part of the dispatch."""


# Marks leaves of the library's own once their call is over: nobody differentiates by them.
_DONE = "_funcjac_done"
with torch.inference_mode(False):
    _LEAF: Any = type(get_gradient_edge(torch.zeros(1, requires_grad=True)).node)
# Types that say which operation a node is of; others are made anew, or stand for many.
_NAMED: set[type] = set()


def attached(output: Output) -> list[Tensor]:
    """Outputs, and tensors of the aux that have a graph."""
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
        stance = None
        if call.compiles:
            again = call.options.operator.is_second_order or call.options.mode == "fwd"
            stance = uncompiled() if again or any(map(_grad_fn, inputs)) else None
        if recorder is None and stance is None and torch.is_grad_enabled():
            output = call(inputs)
        else:
            with torch.enable_grad(), stance or nullcontext(), recorder or nullcontext():
                output = call(inputs)
    except RuntimeError as error:
        if call.clone or "leaf Variable" not in str(error):
            raise
        raise ChangedInputError(_are_lost(call, inputs, versions)) from error
    if not call.clone and list(map(_version, inputs)) != versions:
        raise ChangedInputError(_are_lost(call, inputs, versions))
    return Run(call, inputs, output, recorder=recorder)


_version = operator.attrgetter("_version")


def _are_lost(call: Call, inputs: list[Tensor], versions: list[int]) -> bool:
    """Whether what ``func`` wrote over was the caller's."""
    changed = [(x, y) for x, y, v in zip(call.inputs, inputs, versions) if y._version != v]
    return any(x.numel() and x.data_ptr() == y.data_ptr() for x, y in changed)


def plain_values(call: Call) -> list[Tensor]:
    """Outputs without a graph, of a ``func`` that may differentiate by itself."""
    with torch.enable_grad():
        outs = call._replace(clone=True)(make_inputs(call)).leaves
    return [out.detach() for out in outs]


def graph_nodes(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Any]:
    """The nodes that lead to ``roots``, not through ``inputs``, in a fixed order."""
    nodes: list[Any] = []
    seen: set[Any] = {None, *map(_grad_fn, inputs)}
    stack: list[Any] = list(zip(map(_grad_fn, roots), itertools.repeat(0)))
    while stack:  # in every call: a generator would take twice as long
        node, _ = stack.pop()
        if node not in seen:
            seen.add(node)
            nodes.append(node)
            stack += node.next_functions
    return nodes


def graph_leaves(roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """The leaf tensors that require grad and that lead to ``roots``, not through ``inputs``."""
    for node in graph_nodes(roots, inputs):
        if type(node) is _LEAF and _DONE not in node.variable.__dict__:
            yield node.variable


def read_graph(run: Run) -> tuple[Run, Facts]:
    """The run, which creates a graph if its result can be differentiated, and facts of its own."""
    call, inputs, output, create_graph, recorder = run
    nodes = graph_nodes(output.leaves if output.aux is None else attached(output), inputs)
    types = tuple(map(type, nodes))  # names would take a fourth of the walk
    signature = hash(types if _NAMED.issuperset(types) else _kinds(nodes, types))
    if torch.is_grad_enabled() and not create_graph:
        for i in (*call.layout.diff, *range(len(call.leaves) - call.extra, len(call.leaves))):
            create_graph = create_graph or call.leaves[i].requires_grad
        own = set(map(id, inputs))  # and by what is not differentiated here: parameters
        for node in nodes if _LEAF in types and not create_graph else ():
            if type(node) is _LEAF and id(node.variable) not in own:
                create_graph = create_graph or _DONE not in node.variable.__dict__
    return Run(call, inputs, output, create_graph, recorder), Facts(signature, nodes)


_grad_fn = operator.attrgetter("grad_fn")


def _kinds(nodes: list[Any], types: tuple[type, ...]) -> tuple[Any, ...]:
    """Types of nodes if all are torch's own, one for each operation; names otherwise."""
    built = [kind for kind in types if kind.__module__ == "builtins"]  # in torch's own C++
    _NAMED.update([kind for kind in built if kind.__name__ != "CppFunction"])
    return types if _NAMED.issuperset(types) else tuple([node.name() for node in nodes])


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
    if route.mode != "taylor" or all(b.isfinite().all() for row in result.blocks for b in row):
        return result
    return operator.compute(run, nested)


# --- results as lists of tensors ---------------------------------------------------------------


def split_derivatives(result: Derivatives) -> tuple[list[Tensor], Any]:
    """The tensors of a result, and what is needed to put it together again."""
    outs, spec, aux = result.output
    tensors, rest = split_tensors((result.blocks, outs, aux))
    return tensors, (rest, spec)


def join_derivatives(rest: Any, tensors: Iterable[Tensor]) -> Derivatives:
    """Undoes :func:`split_derivatives`."""
    others, spec = rest
    blocks, outs, aux = join_tensors(others, tensors)
    return Derivatives(blocks, Output(outs, spec, aux))


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
