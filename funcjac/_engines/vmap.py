"""The engine ``vmap``: ``torch.func`` transforms of the function of one row, under ``torch.vmap``.

Rows are apart by construction. ``mode="rev"`` is ``torch.func.jacrev`` and ``mode="fwd"``
``torch.func.jacfwd``, with torch's own forward formulas; ``"auto"`` pulls back from one
``torch.func.vjp``, or transposes it where that takes fewer passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call, Output
from funcjac._engines.rows import as_block
from funcjac._engines.run_func import (
    Derivatives,
    check_aux,
    join_derivatives,
    join_tensors,
    split_derivatives,
    split_tensors,
)
from funcjac._environment.torch_private import load_forward_formulas, quiet_fallback

# (*rows) -> (outputs of a row, (the same, tensors of the aux))
RowFunction = Callable[..., tuple[tuple[Tensor, ...], Any]]
# (function of a row, rows of the inputs, operator's own tensors) -> blocks by output, that pair
RowCompute = Callable[..., tuple[list[list[Tensor]], Any]]


def by_vmap(call: Call, compute: RowCompute) -> Derivatives:
    """``compute`` on every row as a batch of one, under one ``torch.vmap``.

    A batch of one is a row already: it adds no vmap of its own.
    """
    layout, rest = call.layout, []
    dims = tuple([layout.dims[i] for i in layout.batched])

    def row(*leaves: Tensor) -> tuple[Tensor, ...]:
        tensors, others = split_derivatives(_of_row(call, leaves, compute))
        rest[:] = [others]
        return tuple(tensors)

    # Forward formulas write into copies of tangents, which must not share memory.
    leaves = [call.leaves[i].contiguous() for i in layout.batched]
    if call.batch == 1:
        rows = [leaf.select(dim or 0, 0) for leaf, dim in zip(leaves, dims)]
        tensors = [tensor.unsqueeze(0) for tensor in row(*rows)]
    else:
        with nullcontext() if torch.compiler.is_compiling() else quiet_fallback():
            tensors = torch.vmap(row, dims, 0, randomness=call.options.randomness)(*leaves)
    return join_derivatives(rest[0], tensors)


def _of_row(call: Call, leaves: Sequence[Tensor], compute: RowCompute) -> Derivatives:
    layout, rest = call.layout, []
    one = call.one_row(
        [leaf.unsqueeze(layout.dims[i] or 0) for leaf, i in zip(leaves, layout.batched)]
    )
    rows = list(call.leaves)
    for i, leaf in zip(layout.batched, leaves):
        rows[i] = leaf

    def function(*xs: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        dims = layout.diff_dims
        output = one([x if dim is None else x.unsqueeze(dim) for x, dim in zip(xs, dims)])
        aux, others = split_tensors(output.aux)
        rest[:] = [output.spec, others]
        outs = tuple([out[0] for out in output.leaves])
        return outs, (outs, tuple(aux))

    xs, extras = [rows[i] for i in layout.diff], rows[len(rows) - call.extra :]
    blocks, (outs, aux) = compute(function, xs, extras)
    check_aux(aux)
    spec, others = rest
    return Derivatives(
        blocks, Output(list(outs), spec, join_tensors(others, [leaf[0] for leaf in aux]))
    )


def in_result_type(call: Call, result: Derivatives) -> Derivatives:
    """Contiguous blocks, of the type that output and inputs of a block promote to."""
    inputs, names = call.inputs, call.options.operator.by_inputs(call)

    def typed(out: Tensor, block: Tensor, name: tuple[int, ...]) -> Tensor:
        return as_block(block, block.shape, out, [inputs[j] for j in name or (0,)])

    rows = zip(result.output.leaves, result.blocks)
    return result._replace(
        blocks=[[typed(out, *pair) for pair in zip(row, names)] for out, row in rows]
    )


# --- derivatives of a function of one row ------------------------------------------------------


def jacobian(f: RowFunction, xs: Sequence[Tensor], mode: str, chunk: int | None) -> Any:
    """``J[i][j]`` of shape ``(*out, *in)``, and what comes along."""
    argnums, has_elements = tuple(range(len(xs))), all(x.numel() for x in xs)
    if has_elements and mode == "rev":
        return torch.func.jacrev(f, argnums, has_aux=True, chunk_size=chunk)(*xs)
    # A compiler cannot trace jacfwd.
    if has_elements and mode == "fwd" and not torch.compiler.is_compiling():
        load_forward_formulas()
        if chunk is None:
            return torch.func.jacfwd(f, argnums, has_aux=True, randomness="same")(*xs)
        return _forward_in_chunks(f, xs, chunk)
    outs, pull, along = torch.func.vjp(f, *xs, has_aux=True)  # type: ignore[misc]
    outputs, inputs = (sum(t.numel() for t in ts) for ts in (outs, xs))
    is_reverse = mode == "rev" or (mode == "auto" and outputs <= 4 * inputs)
    return (_pulled if is_reverse else _pushed)(outs, xs, pull, chunk), along


def _forward_in_chunks(f: RowFunction, xs: Sequence[Tensor], chunk: int) -> Any:
    """What ``torch.func.jacfwd`` computes, which has no chunks."""
    columns, along = [], None
    for j, x in enumerate(xs):

        def push(tangent: Tensor, j: int = j) -> Any:
            of_input = lambda y: f(*xs[:j], y, *xs[j + 1 :])  # noqa: E731
            return torch.func.jvp(of_input, (xs[j],), (tangent,), has_aux=True)

        vectorized = torch.vmap(push, randomness="same", chunk_size=chunk)
        _, tangents, along = vectorized(_basis(x))
        columns.append(tangents)
    return _by_output(columns, xs), _first_of(along)


def _pulled(outs: Any, xs: Any, pull: Any, chunk: int | None) -> list[list[Tensor]]:
    zeros, blocks = [torch.zeros_like(out) for out in outs], []
    for i, out in enumerate(outs):
        product = lambda v, i=i: pull((*zeros[:i], v, *zeros[i + 1 :]))  # noqa: E731
        grads = _over_basis(product, out, chunk)
        blocks.append([g.reshape((*out.shape, *x.shape)) for g, x in zip(grads, xs)])
    return blocks


def _pushed(outs: Any, xs: Any, pull: Any, chunk: int | None) -> list[list[Tensor]]:
    """Columns by the transpose of a VJP, which uses reverse formulas only."""
    zeros = [torch.zeros_like(out) for out in outs]
    products = [torch.func.vjp(lambda *u, j=j: pull(u)[j], *zeros)[1] for j in range(len(xs))]
    return _by_output([_over_basis(p, x, chunk) for p, x in zip(products, xs)], xs)


def _by_output(columns: Sequence[Sequence[Tensor]], xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """``J[i][j]`` from tangents ``(N, *out)`` for each input and output."""
    return [
        [t.movedim(0, -1).reshape((*t.shape[1:], *x.shape)) for t, x in zip(tangents, xs)]
        for tangents in zip(*columns)
    ]


def _over_basis(product: Any, like: Tensor, chunk: int | None) -> Any:
    """``product`` of each vector of the standard basis."""
    chunk = chunk if like.numel() else None
    # Compilers cannot replay draws between chunks, and there are none.
    randomness = "same" if chunk is None else "different"
    return torch.vmap(product, randomness=randomness, chunk_size=chunk)(_basis(like))


def _basis(like: Tensor) -> Tensor:
    count = like.numel()
    return torch.eye(count, dtype=like.dtype, device=like.device).view(count, *like.shape)


def hessian(f: RowFunction, xs: Sequence[Tensor], mode: str, chunk: int | None) -> Any:
    """``H[i][j][k]``, ``J[i][j]`` and what comes along."""
    outer, inner = _split(mode)

    def first(*xs: Tensor) -> Any:
        jac, along = jacobian(f, xs, inner, chunk)
        return tuple([block for row in jac for block in row]), ([list(row) for row in jac], along)

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

    def of_pair(left: Tensor, right: Tensor) -> Any:
        def first(s: Tensor) -> Any:
            moved = [*xs[:j], xs[j] + s * right, *xs[j + 1 :]]
            slopes, come_along = partial(f, moved, [(j, left)], inner)
            return slopes, (slopes, come_along)

        zero = xs[j].new_zeros(())
        seconds, (slopes, come_along) = jacobian(first, [zero], outer, None)
        return slopes, tuple([second for (second,) in seconds]), come_along

    firsts, seconds, come_along = torch.vmap(of_pair, randomness="same", chunk_size=chunk)(*pairs)
    return list(firsts), list(seconds), _first_of(come_along)


def _first_of(tree: Any) -> Any:
    """What comes along is the same for every direction."""
    return tree[0] if isinstance(tree, Tensor) else type(tree)(map(_first_of, tree))


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
