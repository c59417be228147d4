"""The engine ``vmap``: ``torch.func`` transforms of the function of one row, under ``torch.vmap``.

Rows are apart by construction. ``mode="rev"`` is ``torch.func.jacrev`` and ``mode="fwd"``
``torch.func.jacfwd``, with torch's own forward formulas; ``"auto"`` pulls back from one
``torch.func.vjp``, or transposes it where that takes fewer passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Output
from funcjac._engines.run import Derivatives
from funcjac._environment.torch_private import load_forward_formulas, quiet_fallback

# (*rows) -> (outputs of a row, what comes along)
RowFunction = Callable[..., tuple[tuple[Tensor, ...], Any]]
# (function of a row, rows of the inputs, operator's own tensors) -> blocks by output, along
RowCompute = Callable[..., tuple[list[list[Tensor]], Any]]


def by_vmap(call: Call, compute: RowCompute) -> Derivatives:
    """``compute`` on every row as a batch of one, under one ``torch.vmap``.

    A batch of one is a row already: it adds no vmap of its own.
    """
    layout, rest = call.layout, []
    dims = tuple([layout.dims[i] for i in layout.batched])

    def row(*leaves: Tensor) -> tuple[Tensor, ...]:
        tensors, others = _of_row(call, leaves, compute)
        rest[:] = [others]
        return tensors

    # Forward formulas write into copies of tangents, which must not share memory.
    leaves = [call.leaves[i].contiguous() for i in layout.batched]
    if call.batch == 1:
        rows = [leaf.select(dim or 0, 0) for leaf, dim in zip(leaves, dims)]
        tensors = [tensor.unsqueeze(0) for tensor in row(*rows)]
    elif torch.compiler.is_compiling():
        tensors = torch.vmap(row, dims, 0, randomness=call.options.randomness)(*leaves)
    else:
        with quiet_fallback():
            tensors = torch.vmap(row, dims, 0, randomness=call.options.randomness)(*leaves)
    return _joined(rest[0], tensors)


def _of_row(
    call: Call, leaves: Sequence[Tensor], compute: RowCompute
) -> tuple[tuple[Tensor, ...], Any]:
    layout = call.layout
    one = call.one_row(
        [leaf.unsqueeze(layout.dims[i] or 0) for leaf, i in zip(leaves, layout.batched)]
    )
    rows = dict(zip(layout.batched, leaves))
    xs = [rows.get(i, call.leaves[i]) for i in layout.diff]
    others: list[Any] = []

    def function(*xs: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        dims = layout.diff_dims
        output = one([x if dim is None else x.unsqueeze(dim) for x, dim in zip(xs, dims)])
        aux, kept = split_tensors(output.aux)
        others[:] = [output.spec, kept]
        outs = tuple([out[0] for out in output.leaves])
        return outs, (outs, tuple(aux))

    first = len(call.leaves) - call.extra
    extras = [rows.get(i, call.leaves[i]) for i in range(first, len(call.leaves))]
    blocks, (outs, aux) = compute(function, xs, extras)
    if any(leaf.ndim == 0 or leaf.shape[0] != 1 for leaf in aux):
        raise ValueError(
            "expected aux tensors with a batch dimension in front where rows run one by one, got "
            f"shapes {[tuple(leaf.shape) for leaf in aux]} for a batch of one"
        )
    flat = [block for row in blocks for block in row]
    sizes = [len(row) for row in blocks]
    return (*flat, *outs, *[leaf[0] for leaf in aux]), (sizes, len(outs), others)


def _joined(rest: Any, tensors: Sequence[Tensor]) -> Derivatives:
    sizes, outputs, (spec, kept) = rest
    remaining = iter(tensors)
    # What does not depend on the row came out of vmap as one row, expanded.
    blocks = [[next(remaining).contiguous() for _ in range(size)] for size in sizes]
    outs = [next(remaining) for _ in range(outputs)]
    return Derivatives(blocks, Output(outs, spec, join_tensors(kept, remaining)))


def in_result_type(call: Call, result: Derivatives) -> Derivatives:
    """Blocks in the type that an output and the inputs it is differentiated by promote to."""
    inputs, names = call.inputs, call.options.operator.by_inputs(call)
    blocks = []
    for out, row in zip(result.output.leaves, result.blocks):
        typed = []
        for block, name in zip(row, names):
            dtype = out.dtype
            for x in [inputs[j] for j in name] or inputs[:1]:
                if x.ndim and x.dtype != dtype:  # a number does not widen a tensor
                    dtype = torch.promote_types(dtype, x.dtype)
            typed.append(block if block.dtype == dtype else block.to(dtype))
        blocks.append(typed)
    return result._replace(blocks=blocks)


def split_tensors(tree: Any) -> tuple[list[Tensor], Any]:
    """The tensors of a tree, and what is needed to put it together again."""
    if tree is None:
        return [], None
    leaves, spec = pytree.flatten(tree)
    is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
    others = [None if yes else leaf for leaf, yes in zip(leaves, is_tensor)]
    return [leaf for leaf, yes in zip(leaves, is_tensor) if yes], (spec, is_tensor, others)


def join_tensors(kept: Any, tensors: Iterable[Tensor]) -> Any:
    if kept is None:
        return None
    spec, is_tensor, others = kept
    remaining = iter(tensors)
    leaves = [next(remaining) if yes else other for yes, other in zip(is_tensor, others)]
    return pytree.unflatten(spec, leaves)


# --- derivatives of a function of one row ------------------------------------------------------


def jacobian(f: RowFunction, xs: Sequence[Tensor], mode: str, chunk: int | None) -> Any:
    """``J[i][j]`` of shape ``(*out, *in)``, and what comes along."""
    live = [j for j, x in enumerate(xs) if x.numel()]
    if len(live) < len(xs):
        return _beside_empty(f, xs, live, mode, chunk)
    argnums = tuple(range(len(xs)))
    if mode == "fwd" and torch.compiler.is_compiling():  # which cannot trace jacfwd
        mode = "transposed"
    if mode == "rev":
        return torch.func.jacrev(f, argnums, has_aux=True, chunk_size=chunk)(*xs)
    if mode == "fwd":
        load_forward_formulas()
        if chunk is None:
            return torch.func.jacfwd(f, argnums, has_aux=True, randomness="same")(*xs)
        return _forward_in_chunks(f, xs, chunk)
    outs, pull, along = torch.func.vjp(f, *xs, has_aux=True)  # type: ignore[misc]
    outputs, inputs = (sum(t.numel() for t in ts) for ts in (outs, xs))
    if mode == "transposed" or outputs > 4 * inputs:
        return _pushed(outs, xs, pull, chunk), along
    return _pulled(outs, xs, pull, chunk), along


def _forward_in_chunks(f: RowFunction, xs: Sequence[Tensor], chunk: int) -> Any:
    """What ``torch.func.jacfwd`` computes, which has no chunks."""
    columns, along = [], None
    for j, x in enumerate(xs):

        def column(tangent: Tensor, j: int = j) -> Any:
            only = lambda y: f(*xs[:j], y, *xs[j + 1 :])  # noqa: E731
            return torch.func.jvp(only, (xs[j],), (tangent,), has_aux=True)

        vectors = torch.vmap(column, randomness="same", chunk_size=chunk)
        _, tangents, along = vectors(_basis(x))
        columns.append([t.movedim(0, -1).reshape(*t.shape[1:], *x.shape) for t in tangents])
    return [list(row) for row in zip(*columns)], _first_of(along)


def _beside_empty(
    f: RowFunction, xs: Sequence[Tensor], live: list[int], mode: str, chunk: int | None
) -> Any:
    """Where inputs have no elements, the others are differentiated alone."""

    def of_live(*given: Tensor) -> Any:
        every = list(xs)
        for j, x in zip(live, given):
            every[j] = x
        return f(*every)

    if live:
        jac, along = jacobian(of_live, [xs[j] for j in live], mode, chunk)
    else:
        outs, along = f(*xs)
        jac = [[] for _ in outs]
    blocks = []
    for out, row in zip(along[0], jac):
        given = iter(row)
        blocks.append(
            [next(given) if x.numel() else out.new_zeros((*out.shape, *x.shape)) for x in xs]
        )
    return blocks, along


def _pulled(outs: Any, xs: Any, pull: Any, chunk: int | None) -> list[list[Tensor]]:
    blocks = []
    zeros = [torch.zeros_like(out) for out in outs]
    for i, out in enumerate(outs):
        vectors = _basis(out)

        def pull_one(vector: Tensor, i: int = i) -> Any:
            return pull((*zeros[:i], vector, *zeros[i + 1 :]))

        grads = _over(pull_one, chunk)(vectors)
        blocks.append([g.reshape(*out.shape, *x.shape) for g, x in zip(grads, xs)])
    return blocks


def _pushed(outs: Any, xs: Any, pull: Any, chunk: int | None) -> list[list[Tensor]]:
    """Columns by the transpose of a VJP, which uses reverse formulas only."""
    zeros = [torch.zeros_like(out) for out in outs]
    columns = []
    for j, x in enumerate(xs):
        push: Any = torch.func.vjp(lambda *u, j=j: pull(u)[j], *zeros)[1]
        tangents = _over(push, chunk)(_basis(x))
        columns.append(
            [t.movedim(0, -1).reshape(*o.shape, *x.shape) for t, o in zip(tangents, outs)]
        )
    return [list(row) for row in zip(*columns)]


def _over(function: Any, chunk: int | None) -> Any:
    """Many vectors at once; compilers cannot replay draws between chunks, and there are none."""
    randomness = "same" if chunk is None else "different"
    return torch.vmap(function, randomness=randomness, chunk_size=chunk)


def _basis(like: Tensor) -> Tensor:
    count = like.numel()
    eye = torch.eye(count, dtype=like.dtype, device=like.device)
    return eye.view(count, *like.shape)


def hessian(f: RowFunction, xs: Sequence[Tensor], mode: str, chunk: int | None) -> Any:
    """``H[i][j][k]``, ``J[i][j]`` and what comes along."""
    outer, inner = _split(mode)

    def first(*xs: Tensor) -> Any:
        jac, along = jacobian(f, xs, inner, chunk)
        jac = [list(row) for row in jac]
        return tuple([block for row in jac for block in row]), (jac, along)

    hess, (jac, along) = jacobian(first, xs, outer, chunk)
    n = len(xs)
    return [hess[i * n : (i + 1) * n] for i in range(len(jac))], jac, along


def _split(mode: str) -> tuple[str, str]:
    if mode in ("auto", "taylor"):
        return "transposed", "auto"
    outer, inner = mode.split("_over_")
    return outer, inner


def along(
    f: RowFunction,
    xs: Sequence[Tensor],
    j: int,
    pairs: tuple[Tensor, Tensor],
    mode: str,
    chunk: Any,
) -> Any:
    """First derivatives along ``left`` and second ones along pairs, each ``(K, *out)``."""
    outer, inner = _split(mode)
    inner = "transposed" if inner == "auto" else inner
    zero = xs[j].new_zeros(())

    def of_pair(left: Tensor, right: Tensor) -> Any:
        def value(s: Tensor, t: Tensor) -> Any:
            return f(*xs[:j], xs[j] + t * left + s * right, *xs[j + 1 :])

        def first(s: Tensor) -> Any:
            slopes, come_along = jacobian(functools.partial(value, s), [zero], inner, None)
            slopes = tuple([slope for (slope,) in slopes])
            return slopes, (slopes, come_along)

        seconds, (slopes, come_along) = jacobian(first, [zero], outer, None)
        return slopes, tuple([second for (second,) in seconds]), come_along

    firsts, seconds, come_along = torch.vmap(of_pair, randomness="same", chunk_size=chunk)(*pairs)
    return list(firsts), list(seconds), _first_of(come_along)


def _first_of(tree: Any) -> Any:
    """What comes along is the same for every direction."""
    outs, aux = tree
    return tuple([out[0] for out in outs]), tuple([leaf[0] for leaf in aux])


def partial(f: RowFunction, xs: Sequence[Tensor], directions: Sequence[Any], mode: str) -> Any:
    """The mixed derivative of the outputs along ``directions``, each ``(j, vector)``."""
    if not directions:
        return f(*xs)
    (j, vector), rest = directions[0], directions[1:]

    def shifted(t: Tensor) -> Any:
        moved = [*xs[:j], xs[j] + t * vector, *xs[j + 1 :]]
        return partial(f, moved, rest, mode)

    slopes, come_along = jacobian(shifted, [xs[j].new_zeros(())], mode, None)
    return tuple([slope for (slope,) in slopes]), come_along
