"""A random cotangent and its plain vector-Jacobian product."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._batched import Call, Output, transform_behind
from funcjac._linear import Context, plain_inputs
from funcjac.errors import brief

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.1}
# No number that a user would seed with: the cotangent must not be the input itself.
_SEED = 0x6A61_636F_6269


class Entry(NamedTuple):
    """One column of blocks, as plain autograd has it.

    Attributes:
        seeds: what the block of each output is contracted with, from its first dimension on.
        grad: what comes of that; ``None`` for zero, which has the form of ``like``.
        dim: where ``grad`` has the batch; ``None`` for the sum over all rows.
        size: of the terms that ``grad`` is a sum of, which may cancel.
    """

    seeds: list[Tensor]
    grad: Tensor | None
    like: Tensor
    dim: int | None
    size: Tensor | None = None


@dataclass(frozen=True)
class Probe:
    """A random cotangent and its plain VJP.

    Attributes:
        seeds: the cotangent, for each output leaf ``(B, *out)``.
        grads: what plain autograd pulls back to each input; ``None`` where nothing depends on it.
        entries: what the blocks must come to.
        within: dtypes that ``func`` computes in, where those are asked for.
        floor: size in each row of what derivatives may be rounded to: slopes, where they are
            second ones.
        output: what ``func`` returned.
        seed: of the random cotangent.
    """

    call: Call
    inputs: list[Tensor]
    seeds: list[Tensor]
    grads: list[Tensor | None]
    output: Output
    draw: "_Draw"
    seed: int
    floor: Tensor
    entries: list[Entry]
    within: tuple[torch.dtype, ...] = ()


def verifier(call: Call, context: Context, seed: int = 0, scale: float = 1.0) -> Probe:
    """Run ``func`` once, and get by plain autograd what the operator's blocks must come to.

    With ``scale``, all of that is ``scale`` times as large, and rounded in another way.
    """
    reference = call.options.operator.reference
    if reference is None:
        return probe(call, context, seed=seed, scale=scale)
    found = probe(call, Context(graph=True), seed=seed, scale=scale)
    if call.batch == 0 or not any(x.numel() for x in call.inputs):
        return found
    try:
        with torch.enable_grad():
            entries = reference(found, graph=context.graph)
    except (RuntimeError, NotImplementedError) as error:
        raise _undifferentiable(call.options.name, error) from error
    return replace(
        found, entries=entries, floor=torch.maximum(_floor(call, found.grads), found.floor)
    )


def _floor(call: Call, grads: Sequence[Tensor | None]) -> Tensor:
    """Size of derivatives in each row, ``(B,)``, of which further ones are differences."""
    found = torch.zeros(call.batch, device=call.inputs[0].device)
    for grad, dim in zip(grads, call.layout.diff_dims):
        if grad is not None and grad.numel():
            rows = grad.detach().unsqueeze(0) if dim is None else grad.detach().movedim(dim, 0)
            found = found + wide(rows).abs().reshape(len(rows), -1).amax(1).expand(call.batch)
    return found.nan_to_num(0, 0, 0)


# Of what rounding a slope does to a second derivative, what rounding the output does to a slope.
_FLAT = 0.1
# In float64 digits last for ten times that, and for inputs as large as this, by which slopes
# are divided and must not drown.
_LARGE = {torch.float64: 1e3}


def _resolution(call: Call, products: list[Tensor]) -> Tensor:
    """What is left, ``(B,)``, of derivatives of a constant."""
    largest = [x.detach().abs().nan_to_num(0, 0, 0).max() for x in call.inputs if x.numel()]
    found = torch.zeros(call.batch, device=call.inputs[0].device)
    for product in products:
        sizes = wide(product.detach()).abs().nan_to_num(0, 0, 0).unsqueeze(-1).flatten(1)
        found = torch.maximum(found, sizes.amax(1)) if sizes.numel() else found
    shares = [float(one) / _LARGE.get(one.dtype, 1.0) for one in largest]
    room = 10 if all(one.dtype == torch.float64 for one in (*largest, *products)) else 1
    return room * _FLAT * found / max([1.0, *shares])


def probe(
    call: Call,
    context: Context,
    rows: Tensor | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> Probe:
    """Run ``func`` once and pull a random cotangent back; ``rows`` masks rows of it with 0."""
    draw = _Draw(torch.Generator("cpu").manual_seed(_SEED + seed), rows, scale)
    inputs = plain_inputs(call, context)
    with torch.enable_grad():
        scalar, seeds, output, floor = _contract(call, inputs, draw)
        grads = _pull_back(call.options.name, scalar, inputs, graph=context.graph)
    dims = call.layout.diff_dims
    entries = [Entry(seeds, g, x, dim) for g, x, dim in zip(grads, inputs, dims)]
    return Probe(call, inputs, seeds, list(grads), output, draw, seed, floor, entries)


@dataclass(frozen=True)
class _Draw:
    """Where random numbers come from, the rows that get any, and by what they are multiplied."""

    generator: torch.Generator
    rows: Tensor | None
    scale: float


def _contract(
    call: Call, inputs: list[Tensor], draw: _Draw
) -> tuple[Tensor, list[Tensor], Output, Tensor]:
    """``sum(seed * output)`` by plain autograd, the seeds, and sizes of what is a difference.

    Where ``func`` is a transform itself, the test is differentiated once more: its Jacobian
    is contracted with a cotangent of the inner function and a tangent of the inner inputs,
    through a VJP with a graph, and none of the transform's own code runs.
    """
    inner = nested(call, inputs)
    if inner is None:
        output = call(inputs)
        drawn = [draw.scale * random_like(out, draw.generator) for out in output.leaves]
        seeds = [seed / _sizes(out) for seed, out in zip(drawn, output.leaves)]
        if draw.rows is not None:
            seeds = [seed * _rowwise(draw.rows, seed) for seed in seeds]
        pairs = zip(seeds, output.leaves)
        products = [s.to(o.dtype) * o for s, o in pairs]
        return total(p.sum() for p in products), seeds, output, _resolution(call, products)
    aliases = plain_inputs(inner, Context(graph=True))
    scalar, outer, output, floor = _contract(inner, aliases, draw)
    grads = _pull_back(call.options.name, scalar, aliases, graph=True)
    tangents = [random_like(x, draw.generator) for x in aliases]
    dims = inner.layout.diff_dims
    seeds = [
        outer_product(seed, tangent, dim) for seed in outer for tangent, dim in zip(tangents, dims)
    ]
    parts = [(g * t).sum() for g, t in zip(grads, tangents) if g is not None]
    floor = torch.maximum(_floor(inner, grads), floor)
    return total(parts or [scalar.detach() * 0]), seeds, output, floor


def _pull_back(
    name: str, scalar: Tensor, inputs: list[Tensor], *, graph: bool
) -> Sequence[Tensor | None]:
    if not scalar.requires_grad:
        return [None] * len(inputs)
    try:
        return torch.autograd.grad(scalar, inputs, create_graph=graph, allow_unused=True)
    except RuntimeError as error:
        hint = ""
        if "scaled_dot_product" in str(error):
            hint = (
                " Run it inside `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`, "
                "which has all derivatives."
            )
        raise _undifferentiable(name, error, hint) from error


def _undifferentiable(name: str, error: Exception, hint: str = "") -> RuntimeError:
    return RuntimeError(
        f"{name}: expected func to be differentiable by plain autograd, which any verified "
        f"engine is compared with, got {brief(error)}.{hint}"
    )


def nested(call: Call, inputs: list[Tensor]) -> Call | None:
    """The call that ``func`` would make if it is itself a transform whose output is a Jacobian."""
    inner = transform_behind(call.func)
    if inner is None or inner.options.return_value:
        return None
    if inner.options.operator.reference or call.options.operator.reference:
        return None  # no Jacobian of a Jacobian: the inner transform runs, and verifies itself
    if inner.options.has_aux != call.options.has_aux:
        return None
    args = _tree.unflatten(call.layout.spec, call.with_inputs(inputs).leaves)
    return inner.bind(args, call.kwargs)._replace(clone=call.clone, composed=call.composed)


def total(parts: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, of which there may be none."""
    return sum(parts, torch.zeros((), device="cpu"))


def outer_product(seed: Tensor, tangent: Tensor, dim: int | None) -> Tensor:
    """``(B, *out), (..., B, ...) -> (B, *out, *in)``, the batch of ``tangent`` at ``dim``."""
    rows = tangent.expand(len(seed), *tangent.shape) if dim is None else tangent.movedim(dim, 0)
    left = seed.reshape(*seed.shape, *[1] * (rows.ndim - 1))
    return left * rows.reshape(len(seed), *[1] * (seed.ndim - 1), *rows.shape[1:])


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    drawn = torch.randn(like.shape, generator=generator, dtype=dtype, device="cpu")
    return drawn.to(like.device, like.dtype)


def _sizes(out: Tensor) -> Tensor:
    """Size of each output over the batch, so that large ones do not hide small ones."""
    if out.shape[0] == 0:
        return out.new_ones(out.shape[1:])
    size = out.detach().abs().amax(0).nan_to_num(1, 1, 1)
    return torch.where(size > torch.finfo(size.dtype).tiny ** 0.5, size, 1)


def _rowwise(rows: Tensor, like: Tensor) -> Tensor:
    return rows.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


def has_hidden_leaves(found: Probe) -> bool:
    """Whether the output was computed from tensors that require grad and were not found."""
    outs = [out for out in found.output.leaves if out.grad_fn is not None]
    return any(True for out in outs for _ in graph_leaves(out))


def graph_leaves(root: Tensor) -> Iterator[Tensor]:
    """The user's leaf tensors that require grad and that ``root`` was computed from."""
    for node in _graph_nodes(root):
        variable = getattr(node, "variable", None)
        if variable is not None and "funcjac" not in variable.__dict__:
            yield variable


def is_blind(found: Probe) -> bool:
    """Whether a gradient has no finite number in it, so that nothing was verified."""
    given = [entry.grad for entry in found.entries if entry.grad is not None]
    return any(grad.numel() > 0 and not grad.isfinite().any() for grad in given)


def is_zero(found: Probe) -> bool:
    """Whether all derivatives vanish, so that little was verified."""
    return not any(entry.grad is not None and entry.grad.any() for entry in found.entries)


def is_final(root: Tensor) -> bool:
    """Whether ``backward()`` from ``root`` raises, by a node that says that it has none."""
    return any(node.name().endswith("::Error") for node in _graph_nodes(root))


def _graph_nodes(root: Tensor) -> Iterator[Any]:
    stack, seen = [root.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def wide(tensor: Tensor) -> Tensor:
    """In a dtype that can be compared."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def tolerance(dtypes: list[torch.dtype], device: torch.device) -> float:
    """Relative difference up to which results of these dtypes count as equal."""
    if torch.is_autocast_enabled(device.type):
        dtypes = [*dtypes, torch.get_autocast_dtype(device.type)]
    return max(_TOLERANCE.get(dtype, 0.2) for dtype in dtypes)
