"""Rules by which derivatives pass through one operation.

Derivatives come from PyTorch's own reverse-mode formulas; only structure is listed. Forward-mode
formulas are not used, so none of their errors can enter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from funcjac._engines.rows import added
from funcjac._environment.torch_private import backward, is_traced, over_basis, vector_jacobian
from funcjac._taylor import operation_kinds as kinds
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
    used = set[int](slot for slot in slots if slot is not None)
    steps: list[Step] = []
    for node in reversed(recorder.nodes):
        if used.isdisjoint(node.outs):
            continue
        if any(values[slot]._backward_hooks for slot in node.outs if slot is not None):
            raise UntraceableError("a gradient hook changes derivatives on their way back")
        steps.append(Step(node, rule_of(node.op), {*node.slots} - used))
        used.update(node.slots)
    keeps_rows = lambda: all(_keeps_rows(step.node, values) for step in steps)  # noqa: E731
    return Recording(values, slots, steps[::-1], create_graph, keeps_rows)


@functools.cache
def rule_of(op: Any) -> Callable[[Site], Derivative]:
    name = op.overloadpacket.__name__
    if op.namespace != "aten":
        return _opaque
    if torch.Tag.nondeterministic_seeded in op.tags or name in kinds.OBSTINATE:
        return _impassable
    if op._overloadname not in kinds.NUMBERED:
        if name in ("_to_copy", "clone", "add", "sub"):
            return _sum
        if name in kinds.LINEAR:
            return _linear
        if name in kinds.PRODUCTS or name in kinds.AFFINE:
            return _product
    if torch.Tag.pointwise in op.tags or name in kinds.ELEMENTWISE:
        return _elementwise
    return _taken_apart if name in kinds.DECOMPOSITIONS else _opaque


def _keeps_rows(node: Node, values: Sequence[Tensor]) -> bool:
    """Whether rows stay in dimension 0, each by itself; ``False`` where nobody has looked."""
    xs, outs = ([values[s] for s in slots if s is not None] for slots in (node.slots, node.outs))
    if not outs or not all(t.ndim and t.shape[0] == outs[0].shape[0] for t in (*outs, *xs)):
        return False
    rule, name = rule_of(node.op), node.name
    if rule is _product and name != "mul":
        moving = [i for i, arg in enumerate(node.args) if type(arg) is Slot]
        return name in ("bmm", "baddbmm") or moving == [int(name in kinds.AFFINE)]
    if rule in (_sum, _product, _elementwise) or name in ("expand", "clone", "neg"):
        return all(t.ndim == outs[0].ndim for t in xs)
    if name not in kinds.ALONG_DIMENSIONS:
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
    dtype = site.recording.values[node.slots[0]].dtype
    joins = not node.name.startswith(("index", "gather", "scatter"))
    bare = node._replace(op=op, args=_bare(node.args, dtype, joins))

    def derivative(order: int) -> Tensors:
        stacks = site.stacks(order)
        if not stacks:
            return [None] * len(node.outs)
        return over_basis(lambda *rows: bare.run(dict(zip(stacks, rows))), *stacks.values())

    return derivative


def _bare(arg: Any, dtype: torch.dtype, joins: bool) -> Any:
    """An argument without what it adds to the result; integers are indices, or are joined."""
    if type(arg) is list:
        return [_bare(item, dtype, joins) for item in arg]
    adds = isinstance(arg, Tensor) and (joins or arg.is_floating_point() or arg.is_complex())
    return torch.zeros_like(arg, dtype=dtype) if adds else arg


def _sum(site: Site) -> Derivative:
    """``a + alpha b`` or ``a - alpha b``; of one argument, a copy."""
    node = site.node
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    factors = (1, -alpha if node.name == "sub" else alpha)
    terms = [(f, arg) for f, arg in zip(factors, node.args) if type(arg) is Slot]
    jets = [(factor, _spread(site.jets[slot], site.shapes[0])) for factor, slot in terms]

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
    node, scheme, shape = site.node, site.scheme, site.shapes[0]
    offset = node.args[0] if node.name in kinds.AFFINE else None
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
        if node.name in ("mm", "bmm", *kinds.AFFINE):
            if y is not None or b.ndim != 2:
                return a @ b
            b = _with_own_view(b)
            if a is site.recording.basis and len(a) == len(b) and a.shape[1] > 1:
                rows = b.clone(memory_format=torch.contiguous_format)  # a view would spoil strides
                return rows.unsqueeze(1).expand(-1, a.shape[1], -1)
            return on_one_row(lambda stack: stack @ b, a)

        def run(*rows: Tensor) -> list[Any]:
            return [node.op(a if x is None else rows[0], b if y is None else rows[-1], *rest)]

        return over_basis(run, *[stack for stack in (x, y) if stack is not None])[0]

    return multiply


def _with_own_view(weight: Tensor) -> Tensor:
    """A transposed weight by a view of its own: compilers add its gradients inside of products.

    Those of one view are added first and turned then, which takes a kernel for each sum.
    """
    node = weight.grad_fn
    base = weight._base if node is not None and node.name() == "TBackward0" else None
    if node is None or base is None or not (base.requires_grad and is_traced()):
        return weight
    return base.t() if get_gradient_edge(base).node is node.next_functions[0][0] else weight


# --- elementwise operations --------------------------------------------------------------------


def _elementwise(site: Site) -> Derivative:
    """The chain rule of any order, for an operation that works on each element by itself."""
    scheme, partials = site.scheme, _partials(site)
    jets = [_spread(jet, site.shapes[0]) for jet in site.jets.values()]

    def multiply(*stacks: Tensor) -> Tensor:
        return on_one_row(lambda *stacks: functools.reduce(torch.mul, stacks), *stacks)

    def derivative(order: int) -> Tensors:
        total: Any = None
        is_row = False
        for name in scheme.names(order, len(jets)):
            partial = partials[name]
            stack = None if partial is None else scheme.coefficient(order, name, jets, multiply)
            if partial is not None and stack is not None:
                is_row = len(stack) == 1 and is_traced()  # fuses with what has the value's shape
                stack = stack.squeeze(0) if is_row else stack
                total = partial * stack if total is None else torch.addcmul(total, partial, stack)
        return [total.unsqueeze(0) if is_row else total]

    return derivative


def _partials(site: Site) -> dict[Index, Tensor | None]:
    """Partial derivatives of an elementwise operation, by the numbers of its variables.

    They are tensors of the result's shape: plain autograd gives them by differentiating the sum
    of the result again and again.
    """
    node, values, highest = site.node, site.recording.values, site.scheme.order
    x, out = values[node.slots[0]], values[node.outs[0] or 0]
    inputs = [x]
    # The graph of func's run serves, where both are still in it and of one shape.
    attached = x.requires_grad and out.requires_grad and x.shape == out.shape
    if len(node.slots) > 1 or not attached:
        with torch.enable_grad():
            copies = {slot: x.expand(site.shapes[0]) for slot, x in site.variables().items()}
            inputs, (out, *_) = list(copies.values()), node.run(copies)
    partials: dict[Index, Tensor | None] = {(): out}
    for order in range(1, highest + 1):
        graph = site.recording.create_graph or order < highest
        for lower in itertools.combinations_with_replacement(range(len(inputs)), order - 1):
            partial, grads = partials[lower], [None] * len(inputs)
            if partial is not None:
                ones = partial.new_ones(()).expand(partial.shape)
                with torch.set_grad_enabled(graph):
                    grads = backward(partial, inputs, ones, retain=True, graph=graph)
            partials.update({tuple(sorted((*lower, i))): grad for i, grad in enumerate(grads)})
    return partials


# --- operations of unknown structure -----------------------------------------------------------


def _opaque(site: Site) -> Derivative:
    """Any operation; its variables count as one, and so do its results."""
    scheme, variables = site.scheme, site.variables()
    xs, shapes = list(variables.values()), site.shapes
    stacks = [site.stacks(order).values() for order in range(1, scheme.order + 1)]
    jet = tuple(
        torch.cat([s.unsqueeze(1).flatten(1) for s in row], 1) if row else None for row in stacks
    )

    def run(*rows: Tensor) -> list[Any]:
        outs = zip(shapes, site.node.run(dict(zip(variables, rows))))
        return [torch.cat([out.flatten() for shape, out in outs if shape is not None])]

    @torch.enable_grad()
    def along(*directions: Tensor) -> Tensor | None:
        """A derivative of any order: a product with all directions but one, transposed.

        By vector-Jacobian products, not by forward-mode formulas (J. Townsend, "A new trick for
        calculating Jacobian vector products", 2017).
        """
        copies = [x.expand(len(directions[0]), *x.shape).contiguous() for x in xs]
        roots: Sequence[Any] = over_basis(run, *copies)
        vectors = cotangents = [torch.zeros_like(roots[0], requires_grad=True)]
        for direction in directions:
            roots = _pulled(roots, vectors, copies, graph=True)
            parts = zip(direction.split([x.numel() for x in xs], 1), copies)
            vectors = [part.reshape(x.shape).to(x.dtype) for part, x in parts]
        return _pulled(roots, vectors, cotangents, graph=site.recording.create_graph)[0]

    def derivative(order: int) -> Tensors:
        names = scheme.names(order, 1)
        terms = [scheme.coefficient(order, name, [jet], along) for name in names]
        total = functools.reduce(added, terms)
        if total is None:
            return [None] * len(shapes)
        columns = iter(total.split([math.prod(shape) for shape in shapes if shape is not None], 1))
        return [None if s is None else next(columns).reshape(len(total), *s) for s in shapes]

    return derivative


def _pulled(outs: Tensors, vectors: Any, inputs: list[Tensor], *, graph: bool) -> Tensors:
    """Gradient of ``sum(outs * vectors)`` by ``inputs``."""
    pairs = [(out, v) for out, v in zip(outs, vectors) if out is not None and out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    live, cotangents = zip(*pairs)
    return vector_jacobian(live, inputs, cotangents, retain=True, graph=graph)


def _taken_apart(site: Site) -> Derivative:
    """Propagates through the decomposition of an operation."""
    values = site.variables()
    recorder = Recorder(list(values.values()))
    with torch.enable_grad(), recorder:
        outs = site.node._replace(op=kinds.DECOMPOSITIONS[site.node.name]).run(values)
    inner = make_recording(recorder, outs, create_graph=site.recording.create_graph)
    seeds = {number: site.jets[slot] for number, slot in enumerate(values)}
    jets = propagate(inner, seeds, site.scheme)
    return lambda order: [jet[order - 1] for jet in jets]
