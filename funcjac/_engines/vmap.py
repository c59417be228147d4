"""The engine ``vmap``: ``torch.func`` transforms of the function of one row, under ``torch.vmap``.

Rows are apart by construction. ``mode="rev"`` is ``torch.func.jacrev`` and ``mode="fwd"``
``torch.func.jacfwd``, with torch's own forward formulas; ``"auto"`` pulls back from one
``torch.func.vjp``, or transposes it where that takes fewer passes. Other engines, whose rows are
kept apart here inside of transforms, ask for ``"pulled"`` or ``"transposed"``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call, Output
from funcjac._engines.rows import as_block, mirrored
from funcjac._engines.run_func import Derivatives, check_aux, join_tensors, split_tensors
from funcjac._environment.torch_private import load_forward_formulas, quiet_fallback

Tensors = Sequence[Tensor]
# (*rows) -> (outputs of a row, what comes along)
RowFunction = Callable[..., tuple[tuple[Tensor, ...], Any]]
# (function of a row, rows of the inputs, operator's own tensors) -> blocks by output, and what
# comes along: outputs, and tensors of the aux
RowCompute = Callable[..., tuple[list[list[Tensor]], Any]]
_REVERSE = ("rev", "pulled")


def by_vmap(call: Call, compute: RowCompute) -> Derivatives:
    """``compute`` on every row as a batch of one, under one ``torch.vmap``.

    A batch of one is a row already: it adds no vmap of its own. Blocks are contiguous, of the type
    that output and inputs promote to.
    """
    layout, rest = call.layout, []
    dims = tuple([layout.dims[i] for i in layout.batched])

    def row(*leaves: Tensor) -> tuple[Tensor, ...]:
        tensors, rest[:] = _of_row(call, leaves, compute)
        return tuple(tensors)

    # Forward formulas write into copies of tangents, which must not share memory.
    leaves = [call.leaves[i].contiguous() for i in layout.batched]
    if call.batch == 1:
        rows = [leaf.select(dim or 0, 0) for leaf, dim in zip(leaves, dims)]
        tensors = [tensor.unsqueeze(0) for tensor in row(*rows)]
    else:
        with nullcontext() if torch.compiler.is_compiling() else quiet_fallback():
            tensors = torch.vmap(row, dims, 0, randomness=call.options.randomness)(*leaves)
    kinds, spec, others = rest
    columns, outs, aux = join_tensors(kinds, tensors)
    blocks, names = [], call.options.operator.by_inputs(call)
    for out, column in zip(outs, columns):
        inputs = [[call.inputs[j] for j in name or (0,)] for name in names]
        blocks.append([as_block(b, b.shape, out, xs) for b, xs in zip(column, inputs)])
    return Derivatives(blocks, Output(outs, spec, join_tensors(others, aux)))


def _of_row(call: Call, leaves: Tensors, compute: RowCompute) -> tuple[Tensors, list[Any]]:
    """Tensors of one row: blocks, outputs and aux; and how to join them."""
    layout, rest = call.layout, []
    dims = [layout.dims[i] or 0 for i in layout.batched]
    one = call.one_row([leaf.unsqueeze(dim) for leaf, dim in zip(leaves, dims)])
    row = call.one_row(leaves)

    def function(*xs: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        pairs = zip(xs, layout.diff_dims)
        output = one([x if dim is None else x.unsqueeze(dim) for x, dim in pairs])
        aux, others = split_tensors(output.aux)
        rest[:] = [output.spec, others]
        outs = tuple([out[0] for out in output.leaves])
        return outs, (outs, tuple(aux))

    blocks, (outs, aux) = compute(function, row.inputs, row.extras)
    check_aux(aux)
    tensors, kinds = split_tensors((blocks, list(outs), [leaf[0] for leaf in aux]))
    return tensors, [kinds, *rest]


# --- derivatives of a function of one row ------------------------------------------------------


def jacobian(f: RowFunction, xs: Tensors, mode: str, chunk: int | None) -> Any:
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
    is_reverse = mode in _REVERSE or (mode == "auto" and outputs <= 4 * inputs)
    if is_reverse:
        return _pulled(outs, xs, pull, chunk), along
    zeros = [torch.zeros_like(out) for out in outs]  # columns by the transpose of a VJP
    products = [torch.func.vjp(lambda *u, j=j: pull(u)[j], *zeros)[1] for j in range(len(xs))]
    return _by_output([_over_basis(p, x, chunk) for p, x in zip(products, xs)], xs), along


def _forward_in_chunks(f: RowFunction, xs: Tensors, chunk: int) -> Any:
    """What ``torch.func.jacfwd`` computes, which has no chunks."""
    columns, along = [], None
    for j, x in enumerate(xs):

        def push(tangent: Tensor, j: int = j) -> Any:
            of_input = lambda y: f(*xs[:j], y, *xs[j + 1 :])  # noqa: E731
            return torch.func.jvp(of_input, (xs[j],), (tangent,), has_aux=True)

        _, tangents, along = _over_basis(push, x, chunk, "same")
        columns.append(tangents)
    return _by_output(columns, xs), _first_of(along)


def _pulled(outs: Tensors, xs: Tensors, pull: Any, chunk: int | None) -> list[list[Tensor]]:
    zeros, blocks = [torch.zeros_like(out) for out in outs], []
    for i, out in enumerate(outs):
        product = lambda v, i=i: pull((*zeros[:i], v, *zeros[i + 1 :]))  # noqa: E731
        grads = _over_basis(product, out, chunk)
        blocks.append([g.reshape((*out.shape, *x.shape)) for g, x in zip(grads, xs)])
    return blocks


def _by_output(columns: Sequence[Tensors], xs: Tensors) -> list[list[Tensor]]:
    """``J[i][j]`` from tangents ``(N, *out)`` for each input and output."""
    return [
        [t.movedim(0, -1).reshape((*t.shape[1:], *x.shape)) for t, x in zip(tangents, xs)]
        for tangents in zip(*columns)
    ]


def _over_basis(product: Any, like: Tensor, chunk: int | None, draws: str = "different") -> Any:
    """``product`` of each vector of the standard basis."""
    chunk, count = chunk if like.numel() else None, like.numel()
    basis = torch.eye(count, dtype=like.dtype, device=like.device).view(count, *like.shape)
    # Compilers cannot replay draws between chunks, and func has made its own before.
    randomness = "same" if chunk is None else draws
    return torch.vmap(product, randomness=randomness, chunk_size=chunk)(basis)


def hessian(f: RowFunction, xs: Tensors, mode: str, chunk: int | None) -> Any:
    """``H[i][j][k]``, ``J[i][j]`` and what comes along."""
    outer, inner = _split(mode)

    def first(*xs: Tensor) -> Any:
        jac, along = jacobian(f, xs, inner, chunk)
        blocks = tuple([block for row in jac for block in row])
        return blocks, (blocks, along)

    hess, (jac, along) = jacobian(first, xs, outer, chunk)
    n, ndims = len(xs), [x.ndim for x in xs]
    hess, jac = ([rows[i : i + n] for i in range(0, len(rows), n)] for rows in (hess, jac))
    return hess if outer in _REVERSE else [mirrored(bands, ndims) for bands in hess], jac, along


def _split(mode: str) -> list[str]:
    return ["transposed", "auto"] if mode in ("auto", "taylor") else mode.split("_over_")


def along(f: RowFunction, xs: Tensors, j: int, pairs: Tensors, mode: str, chunk: int | None) -> Any:
    """First derivatives along ``left`` and second ones along pairs, each ``(K, *out)``."""
    outer, inner = _split(mode)
    inner = "transposed" if inner == "auto" else inner

    def of_pair(left: Tensor, right: Tensor) -> Any:
        def first(*xs: Tensor) -> Any:
            slopes, come_along = partial(f, xs, [(j, left)], inner)
            return slopes, (slopes, come_along)

        seconds, (slopes, come_along) = partial(first, xs, [(j, right)], outer)
        return slopes, seconds, come_along

    firsts, seconds, come_along = torch.vmap(of_pair, randomness="same", chunk_size=chunk)(*pairs)
    return list(firsts), list(seconds), _first_of(come_along)


def _first_of(tree: Any) -> Any:
    """What comes along is the same for every direction."""
    return tree[0] if isinstance(tree, Tensor) else type(tree)(map(_first_of, tree))


def partial(f: RowFunction, xs: Tensors, directions: Sequence[Any], mode: str) -> Any:
    """The mixed derivative of the outputs along ``directions``, each ``(j, vector)``."""
    if not directions:
        return f(*xs)
    (j, vector), rest = directions[0], directions[1:]

    def shifted(t: Tensor) -> Any:
        return partial(f, [*xs[:j], xs[j] + t * vector, *xs[j + 1 :]], rest, mode)

    slopes, come_along = jacobian(shifted, [xs[j].new_zeros(())], mode, None)
    return tuple([slope for (slope,) in slopes]), come_along
