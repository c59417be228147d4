"""Rules by which derivatives pass through one operation.

Derivatives come from PyTorch's own reverse-mode formulas; only structure is listed. Forward-mode
formulas are not used, so none of their errors can enter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._engines.rows import added
from funcjac._environment.torch_private import backward, over_basis, vector_jacobian
from funcjac._taylor.operation_kinds import (
    AFFINE,
    ALONG_DIMENSIONS,
    ELEMENTWISE,
    LINEAR,
    NUMBERED,
    OBSTINATE,
    PRODUCTS,
    decomposition,
)
from funcjac._taylor.propagation import (
    Derivative,
    Index,
    Jet,
    Recording,
    Site,
    Step,
    Tensors,
    on_one_row,
    propagate,
)
from funcjac._taylor.recorder import Node, Recorder, Slot
from funcjac.errors import UntraceableError


def make_recording(
    recorder: Recorder, outputs: Sequence[Tensor], *, create_graph: bool
) -> Recording:
    """Prepares what a :class:`Recorder` saw for propagation to ``outputs``.

    Raises:
        UntraceableError: a gradient hook is at work, or something has a history that was not
            recorded.
    """
    if recorder.failure is not None:
        raise recorder.failure
    values, slots = recorder.values, [recorder.slot(out) for out in outputs]
    used, curved = set[int](slot for slot in slots if slot is not None), set[int]()
    steps: list[Step] = []
    for node in reversed(recorder.nodes):
        if used.isdisjoint(node.outs):
            continue
        if any(values[slot]._backward_hooks for slot in node.outs if slot is not None):
            raise UntraceableError("a gradient hook changes derivatives on their way back")
        is_curved = not curved.isdisjoint(node.outs)
        steps.append(Step(node, rule_of(node.op), {*node.slots} - used, is_curved))
        used.update(node.slots)
        if is_curved or not _is_linear(node):
            curved.update(node.slots)
    keeps_rows = lambda: all(_keeps_rows(step.node, values) for step in steps)  # noqa: E731
    return Recording(values, slots, steps[::-1], create_graph, keeps_rows, {})


@functools.cache
def rule_of(op: Any) -> Callable[[Site], Derivative]:
    name = op.overloadpacket.__name__
    if op.namespace != "aten":
        return _opaque
    if torch.Tag.nondeterministic_seeded in op.tags or name in OBSTINATE:
        return _impassable
    if op._overloadname not in NUMBERED:
        if name in ("_to_copy", "clone", "add", "sub"):
            return _sum
        if name in LINEAR:
            return _linear
        if name in PRODUCTS or name in AFFINE:
            return _product
    if torch.Tag.pointwise in op.tags or name in ELEMENTWISE:
        return _elementwise
    return _opaque if decomposition(op) is None else _taken_apart


def _is_linear(node: Node) -> bool:
    """Whether an operation is linear in all of its arguments that depend on the input."""
    rule = rule_of(node.op)
    if rule is _product:
        return sum(type(arg) is Slot for arg in node.args[node.name in AFFINE :]) < 2
    return rule in (_linear, _sum)


def _keeps_rows(node: Node, values: Sequence[Tensor]) -> bool:
    """Whether rows stay in dimension 0, each by itself; ``False`` where nobody has looked."""
    xs, outs = ([values[s] for s in slots if s is not None] for slots in (node.slots, node.outs))
    if not outs or not all(t.ndim and t.shape[0] == outs[0].shape[0] for t in (*outs, *xs)):
        return False
    rule, name = rule_of(node.op), node.name
    if rule is _product and name != "mul":
        moving = [i for i, arg in enumerate(node.args) if type(arg) is Slot]
        return name in ("bmm", "baddbmm") or moving == [int(name in AFFINE)]
    if rule in (_sum, _product, _elementwise) or name in ("expand", "clone", "neg"):
        return all(t.ndim == outs[0].ndim for t in xs)
    if name not in ALONG_DIMENSIONS:
        return name in ("view", "_unsafe_view", "slice")  # which keep the first of as many rows
    ndim = max(t.ndim for t in (*xs, *outs))
    dims = node.args[1] if len(node.args) > 1 else 0
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return bool(dims) and all(isinstance(dim, int) and dim % ndim for dim in dims)


def _impassable(site: Site) -> Derivative:
    drawn = torch.Tag.nondeterministic_seeded in site.node.op.tags
    reason = "draws random numbers" if drawn else "has no second derivatives along directions"
    raise UntraceableError(f"{site.node.op} {reason}")


# --- linear operations and products ------------------------------------------------------------


def _linear(site: Site) -> Derivative:
    """Runs the operation on the derivatives, with zeros for constants that are added."""
    node = site.node
    # Strides may be others than those that a view asks for.
    op = torch.ops.aten.reshape.default if node.name == "view" else node.op
    bare = node._replace(op=op, args=_bare(node.args))

    def derivative(order: int) -> Tensors:
        stacks = site.stacks(order)
        if not stacks:
            return [None] * len(node.outs)
        return over_basis(lambda *rows: bare.run(dict(zip(stacks, rows))), *stacks.values())

    return derivative


def _bare(arg: Any) -> Any:
    """An argument without what it adds to the result."""
    if type(arg) is list:
        return [_bare(item) for item in arg]
    adds = isinstance(arg, Tensor) and arg.is_floating_point()
    return torch.zeros_like(arg) if adds else arg


def _sum(site: Site) -> Derivative:
    """``a + alpha b`` or ``a - alpha b``; of one argument, a copy."""
    node = site.node
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    factors = (1, -alpha if node.name == "sub" else alpha)
    terms = [(f, arg) for f, arg in zip(factors, node.args) if type(arg) is Slot]
    jets = [(factor, _spread(site.jets[slot], site.shape)) for factor, slot in terms]

    def derivative(order: int) -> Tensors:
        return [functools.reduce(added, [_scaled(f, jet[order - 1]) for f, jet in jets])]

    return derivative


def _spread(jet: Jet, shape: torch.Size) -> Jet:
    """A jet expanded to the shape of a result, as its value is."""
    ones = [1] * len(shape)
    return tuple(
        s
        if s is None or s.shape[1:] == shape
        else s.reshape(len(s), *ones[s.ndim - 1 :], *s.shape[1:]).expand(-1, *shape)
        for s in jet
    )


def _scaled(factor: Any, stack: Tensor | None) -> Tensor | None:
    return stack if stack is None or factor == 1 else factor * stack


def _product(site: Site) -> Derivative:
    """Leibniz' rule for ``a @ b`` and ``beta c + alpha a @ b``, by the operation itself."""
    node, scheme, shape = site.node, site.scheme, site.shape
    offset = node.args[0] if node.name in AFFINE else None
    first, second, *rest = node.args if offset is None else node.args[1:]
    if any(type(arg) is Slot for arg in rest):  # the bias of a convolution
        return _opaque(site)
    zero: Jet = (None,) * scheme.order
    a, b, c = (site.jets[arg] if type(arg) is Slot else zero for arg in (first, second, offset))
    if node.name == "mul":
        a, b = _spread(a, shape), _spread(b, shape)
    c = _spread(c, shape)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    multiply = _multiplication(site, first, second, rest)

    def derivative(order: int) -> Tensors:
        x, y = a[order - 1], b[order - 1]
        total = None if x is None else multiply(x, None)
        total = added(total, None if y is None else multiply(None, y))
        if order > 1:
            total = added(total, scheme.coefficient(order, (0, 1), (a, b), multiply))
        return [added(_scaled(alpha, total), _scaled(beta, c[order - 1]))]

    return derivative


def _multiplication(site: Site, first: Any, second: Any, rest: list[Any]) -> Any:
    """Multiplies two stacks; with ``None`` for a stack, the argument's value takes its place."""
    node = site.node
    rest = [None, *rest[1:]] if node.name == "convolution" else rest  # without the bias

    def value(arg: Any) -> Any:
        return site.recording.value(arg) if type(arg) is Slot else arg

    def multiply(x: Tensor | None, y: Tensor | None) -> Any:
        a, b = value(first) if x is None else x, value(second) if y is None else y
        if node.name == "mul":
            return a * b
        if node.name in ("mm", "bmm", *AFFINE):
            if y is not None or b.ndim != 2:
                return a @ b
            if a is site.recording.basis and len(a) == len(b) and a.shape[1] > 1:
                rows = b.clone(memory_format=torch.contiguous_format)  # a view would spoil strides
                return rows.unsqueeze(1).expand(-1, a.shape[1], -1)
            return on_one_row(lambda stack: stack @ b, a)

        def run(*rows: Tensor) -> list[Tensor]:
            return [node.op(a if x is None else rows[0], b if y is None else rows[-1], *rest)]

        return over_basis(run, *[stack for stack in (x, y) if stack is not None])[0]

    return multiply


# --- elementwise operations --------------------------------------------------------------------


def _elementwise(site: Site) -> Derivative:
    """The chain rule of any order, for an operation that works on each element by itself."""
    scheme, of_nodes = site.scheme, site.recording.partials
    key = site.node.outs, site.node.slots, scheme.order
    partials = of_nodes[key] = of_nodes.get(key) or _Partials(site)
    jets = [_spread(jet, site.shape) for jet in site.jets.values()]
    multiply = functools.partial(on_one_row, torch.mul)

    def derivative(order: int) -> Tensors:
        total: Tensor | None = None
        for name in scheme.names(order, len(jets)):
            partial = partials[name]
            stack = None if partial is None else scheme.coefficient(order, name, jets, multiply)
            if partial is not None and stack is not None:
                total = partial * stack if total is None else torch.addcmul(total, partial, stack)
        return [total]

    return derivative


class _Partials(dict[Index, "Tensor | None"]):
    """Partial derivatives of an elementwise operation, by the numbers of its variables.

    They are tensors of the result's shape: plain autograd gives them by differentiating the sum
    of the result again and again.
    """

    def __init__(self, site: Site) -> None:
        self.create_graph, self.order = site.recording.create_graph, site.scheme.order
        node, values = site.node, site.recording.values
        x, out = values[node.slots[0]], values[node.outs[0] or 0]
        self.inputs = [x]
        # The graph of func's run serves, where both are still in it and of one shape.
        attached = x.requires_grad and out.requires_grad and x.shape == out.shape
        if len(node.slots) > 1 or not attached:
            with torch.enable_grad():
                copies = {slot: x.expand(site.shape) for slot, x in site.variables().items()}
                self.inputs, (out, *_) = list(copies.values()), node.run(copies)
        self[()] = out

    def __missing__(self, name: Index) -> Tensor | None:
        """All of one order, which are needed together."""
        count, graph = len(self.inputs), self.create_graph or len(name) < self.order
        for lower in itertools.combinations_with_replacement(range(count), len(name) - 1):
            partial, grads = self[lower], [None] * count
            if partial is not None:
                ones = partial.new_ones(()).expand(partial.shape)
                with torch.set_grad_enabled(graph):
                    grads = backward(partial, self.inputs, ones, retain=True, graph=graph)
            self.update({tuple(sorted((*lower, i))): grad for i, grad in enumerate(grads)})
        return self[name]


# --- operations of unknown structure -----------------------------------------------------------


def _opaque(site: Site) -> Derivative:
    """Any operation, by three reverse passes for a second derivative.

    By transposes of vector-Jacobian products, not by forward-mode formulas (J. Townsend, "A new
    trick for calculating Jacobian vector products", 2017).
    """
    if site.scheme.order > 2:
        raise UntraceableError(f"{site.node.op} has no rule for derivatives of order three")
    variables = site.variables()
    with torch.enable_grad():
        results = site.node.run(variables)
        places = [i for i, out in enumerate(results) if getattr(out, "requires_grad", False)]
        cotangents, grads = _pulled([results[i] for i in places], list(variables.values()))
    graph = site.recording.create_graph

    def pushed(*tangents: Tensor) -> Tensors:
        return _contracted(grads, tangents, cotangents, graph=graph)

    def derivative(order: int) -> Tensors:
        tangents, slopes = list(site.stacks(order).values()), site.stacks(1)
        with torch.enable_grad():
            stacks = over_basis(pushed, *tangents) if tangents else [None] * len(places)
            if order == 2 and slopes:
                curvature = _curvature(site, places, slopes)
                stacks = [added(a, b) for a, b in zip(stacks, curvature)]
        return list(map(dict(zip(places, stacks)).get, range(len(results))))

    return derivative


def _curvature(site: Site, places: list[int], slopes: dict[int, Tensor]) -> Tensors:
    """Second derivatives of the results, each pair of directions with copies of its own."""
    variables = site.variables()
    left, right = zip(*map(site.scheme.pairs, slopes.values()))
    copies = [x.expand(len(stack), *x.shape) for x, stack in zip(variables.values(), left)]

    def run(*rows: Tensor) -> Tensors:
        results = site.node.run(dict(zip(variables, rows)))
        return [results[place] for place in places]

    cotangents, grads = _pulled(over_basis(run, *copies), copies)
    along_left = _contracted(grads, left, copies, graph=True)
    seconds = _contracted(along_left, right, cotangents, graph=site.recording.create_graph)
    return [None if second is None else site.scheme.weighted(second) for second in seconds]


def _pulled(outs: Sequence[Any], inputs: list[Tensor]) -> tuple[list[Tensor], Tensors]:
    """Cotangents, and the vector-Jacobian products as linear functions of them."""
    cotangents = [torch.zeros_like(out, requires_grad=True) for out in outs]
    return cotangents, vector_jacobian(outs, inputs, cotangents, retain=True, graph=True)


def _contracted(
    outs: Tensors, vectors: Sequence[Tensor], inputs: list[Tensor], *, graph: bool
) -> Tensors:
    """Gradient of ``sum(outs * vectors)`` by ``inputs``."""
    pairs = [(out, v) for out, v in zip(outs, vectors) if out is not None and out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    live, vectors = zip(*pairs)
    return vector_jacobian(live, inputs, vectors, retain=True, graph=graph)


def _taken_apart(site: Site) -> Derivative:
    """Propagates through the decomposition of an operation."""
    values = site.variables()
    recorder = Recorder(list(values.values()))
    with torch.enable_grad(), recorder:
        outs = site.node._replace(op=decomposition(site.node.op)).run(values)
    if len(outs) != len(site.node.outs):
        raise UntraceableError(f"{site.node.op} does not return what its decomposition does")
    inner = make_recording(recorder, outs, create_graph=site.recording.create_graph)
    seeds = {number: site.jets[slot] for number, slot in enumerate(values)}
    jets = propagate(inner, seeds, site.scheme)
    return lambda order: [jet[order - 1] for jet in jets]
