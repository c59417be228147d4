"""Rules by which derivatives pass through one operation.

Derivatives come from PyTorch's own reverse-mode formulas; only structure is listed. Forward-mode
formulas are not used, so none of their errors can enter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac._engines.rows import added
from funcjac._environment.torch_private import backward, over_basis, vector_jacobian
from funcjac._taylor.jets import Index, Jet, Scheme, on_one_row, spread
from funcjac._taylor.operations import (
    AFFINE,
    ALONG_DIMENSIONS,
    ELEMENTWISE,
    LINEAR,
    NUMBERED,
    OBSTINATE,
    PRODUCTS,
    decomposition,
)
from funcjac._taylor.recorder import Node, Slot
from funcjac.errors import UntraceableError

Tensors = Sequence["Tensor | None"]
# Derivatives of the results of one operation, by order.
Derivative = Callable[[int], Tensors]


class Recording(NamedTuple):
    """One run of ``func``, ready for propagation.

    Attributes:
        values: by slot.
        slots: of the outputs; ``None`` for one that does not depend on the input.
        steps: operations that the outputs need, each with the slots that nobody uses after it, and
            whether it leads to an operation that is not linear. Elsewhere, lower derivatives serve
            nothing but themselves.
        partials: of elementwise operations, which serve all directions.
        basis: first derivatives of the input, where they are its standard basis in each row.
    """

    values: list[Tensor]
    slots: Sequence[int | None]
    steps: list[tuple[Node, set[int], bool]]
    create_graph: bool
    partials: dict[Any, Any]
    basis: Tensor | None = None

    def value(self, slot: int) -> Tensor:
        """Tensor in a slot, unless it is a copy of an overwritten one, to which no graph leads."""
        value = self.values[slot]
        if self.create_graph and not value.requires_grad:
            raise UntraceableError("a tensor that depends on the input was overwritten later on")
        return value


class Site(NamedTuple):
    """One operation, and the jets that reach it, by slot."""

    node: Node
    recording: Recording
    jets: dict[int, Jet]
    scheme: Scheme

    @property
    def shape(self) -> torch.Size:
        """Shape of the first result."""
        return self.recording.values[self.node.outs[0] or 0].shape

    def stacks(self, order: int) -> dict[int, Tensor]:
        """Derivatives of one order, zeros written out; nothing if all are zero."""
        stacks = {slot: jet[order - 1] for slot, jet in self.jets.items()}
        count = next((len(stack) for stack in stacks.values() if stack is not None), None)
        if count is None:
            return {}
        values = self.recording.values
        return {
            slot: values[slot].new_zeros((count, *values[slot].shape)) if stack is None else stack
            for slot, stack in stacks.items()
        }

    def variables(self) -> dict[int, Tensor]:
        """Values, cut off from the operations that made them unless a graph is wanted."""
        values = {slot: self.recording.value(slot) for slot in self.jets}
        if not self.recording.create_graph:
            return {slot: value.detach().requires_grad_() for slot, value in values.items()}
        with torch.enable_grad():
            return {slot: value.view_as(value) for slot, value in values.items()}


@functools.cache
def rule_of(op: Any) -> Callable[[Site], Derivative] | None:
    """Rule of an operation; ``None`` for one that is taken apart by its decomposition."""
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
    return _opaque if decomposition(op) is None else None


def is_linear(node: Node) -> bool:
    """Whether an operation is linear in all of its arguments that depend on the input."""
    rule = rule_of(node.op)
    if rule is _product:
        return sum(type(arg) is Slot for arg in node.args[node.name in AFFINE :]) < 2
    return rule in (_linear, _sum)


def node_keeps_rows(node: Node, values: Sequence[Tensor]) -> bool:
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
    jets = [(factor, spread(site.jets[slot], site.shape)) for factor, slot in terms]

    def derivative(order: int) -> Tensors:
        return [functools.reduce(added, [_scaled(f, jet[order - 1]) for f, jet in jets])]

    return derivative


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
        a, b = spread(a, shape), spread(b, shape)
    c = spread(c, shape)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    multiply = _multiplication(site, first, second, rest)

    def derivative(order: int) -> Tensors:
        x, y = a[order - 1], b[order - 1]
        total = None if x is None else multiply(x, None)
        total = added(total, None if y is None else multiply(None, y))
        for _, stack in scheme.higher(order, (a, b), multiply, lambda numbers: numbers != (0, 1)):
            total = added(total, stack)
        return [added(_scaled(alpha, total), _scaled(beta, c[order - 1]))]

    return derivative


def _multiplication(site: Site, first: Any, second: Any, rest: list[Any]) -> Any:
    """Multiplies two stacks; with ``None`` for a stack, the argument's value takes its place."""
    node = site.node
    rest = [None, *rest[1:]] if node.name == "convolution" else rest  # without the bias

    def value(arg: Any) -> Any:
        return site.recording.value(arg) if type(arg) is Slot else arg

    def multiply(x: Tensor | None, y: Tensor | None) -> Tensor:
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

        (product,) = over_basis(run, *[stack for stack in (x, y) if stack is not None])
        assert product is not None
        return product

    return multiply


# --- elementwise operations --------------------------------------------------------------------


def _elementwise(site: Site) -> Derivative:
    """The chain rule of any order, for an operation that works on each element by itself."""
    scheme, of_nodes = site.scheme, site.recording.partials
    key = site.node.outs, site.node.slots, scheme.order
    partials = of_nodes[key] = of_nodes.get(key) or _Partials(site)
    jets = [spread(jet, site.shape) for jet in site.jets.values()]
    multiply = functools.partial(on_one_row, torch.mul)

    def derivative(order: int) -> Tensors:
        terms: list[Any] = [((i,), jet[order - 1]) for i, jet in enumerate(jets)]
        terms += scheme.higher(order, jets, multiply, lambda numbers: partials(numbers) is None)
        total: Tensor | None = None
        for numbers, stack in terms:
            partial = partials(numbers)
            if partial is not None and stack is not None:
                total = partial * stack if total is None else torch.addcmul(total, partial, stack)
        return [total]

    return derivative


class _Partials:
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
        self.known: dict[Index, Tensor | None] = {(): out}

    def __call__(self, numbers: Index) -> Tensor | None:
        if numbers not in self.known:
            lower, grads = self(numbers[:-1]), [None] * len(self.inputs)
            graph = self.create_graph or len(numbers) < self.order
            if lower is not None:
                ones = lower.new_ones(()).expand(lower.shape)
                with torch.set_grad_enabled(graph):
                    grads = backward(lower, self.inputs, ones, retain=True, graph=graph)
            for i, grad in enumerate(grads):
                self.known[tuple(sorted((*numbers[:-1], i)))] = grad
        return self.known[numbers]


# --- operations of unknown structure -----------------------------------------------------------


def _opaque(site: Site) -> Derivative:
    """Any operation, by three reverse passes for a second derivative.

    By transposes of vector-Jacobian products, not by forward-mode formulas (J. Townsend, "A new
    trick for calculating Jacobian vector products", 2017).
    """
    if site.scheme.order > 2:
        raise UntraceableError(f"{site.node.op} has no rule for derivatives of order three")
    variables, graph = site.variables(), site.recording.create_graph
    with torch.enable_grad():
        results = site.node.run(variables)
        places = [i for i, out in enumerate(results) if getattr(out, "requires_grad", False)]
        cotangents, grads = _pulled([results[i] for i in places], list(variables.values()))

    def pushed(*tangents: Tensor) -> Tensors:
        return _contracted(grads, tangents, cotangents, graph=graph)

    def derivative(order: int) -> Tensors:
        tangents, slopes = list(site.stacks(order).values()), site.stacks(1)
        with torch.enable_grad():
            stacks = over_basis(pushed, *tangents) if tangents else [None] * len(places)
            if order == 2 and slopes:
                curvature = _curvature(site, places, slopes)
                stacks = [added(a, b) for a, b in zip(stacks, curvature)]
        by_place = dict(zip(places, stacks))
        return [by_place.get(place) for place in range(len(results))]

    return derivative


def _curvature(site: Site, places: list[int], slopes: dict[int, Tensor]) -> Tensors:
    """Second derivatives of the results, each pair of directions with copies of its own."""
    scheme, variables = site.scheme, site.variables()
    left, right = zip(*map(scheme.pairs, slopes.values()))
    copies = [x.expand(len(stack), *x.shape) for x, stack in zip(variables.values(), left)]

    def run(*rows: Tensor) -> Tensors:
        results = site.node.run(dict(zip(variables, rows)))
        return [results[place] for place in places]

    cotangents, grads = _pulled(over_basis(run, *copies), copies)
    along_left = _contracted(grads, left, copies, graph=True)
    seconds = _contracted(along_left, right, cotangents, graph=site.recording.create_graph)
    return [None if second is None else scheme.weighted(second) for second in seconds]


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
