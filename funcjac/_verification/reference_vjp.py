"""The reference: a random cotangent, pulled back by plain autograd through the one run's graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from funcjac._engines.rows import join
from funcjac._engines.run_func import Run
from funcjac._environment.torch_private import Tensors, vector_jacobian

# No number that a user would seed with: the cotangent must not be the input itself.
RNG_SEED = 0x6A61_636F_6269


class Entry(NamedTuple):
    """The reference for one column of blocks.

    Attributes:
        seeds: what the block of each output is contracted with, from its first dimension on.
        grad: the contraction by plain autograd; ``None`` for zeros like ``like``.
        dim: batch dimension of ``grad``; ``None`` for the sum over all rows.
        size: of the terms that ``grad`` is a sum of, which may cancel.
    """

    seeds: list[Tensor]
    grad: Tensor | None
    like: Tensor
    dim: int | None
    size: Tensor | None = None


class Probe(NamedTuple):
    """A random cotangent, its pullback, and the source of further random numbers.

    Attributes:
        seeds: the cotangent, for each output leaf ``(B, *out)``.
        grads: the gradient by each input; ``None`` where nothing depends on it.
    """

    seeds: list[Tensor]
    grads: list[Tensor | None]
    generator: torch.Generator


def make_reference(run: Run, number: int) -> tuple[Probe, list[Entry]]:
    """The probe of a number, and what the blocks of a result must come to."""
    generator = torch.Generator("cpu").manual_seed(RNG_SEED + number)
    outs, operator = run.output.leaves, run.call.options.operator
    drawn = [random_like(out, generator) for out in outs]
    seeds = [seed / output_sizes(out) for seed, out in zip(drawn, outs)]
    create_graph = run.create_graph or operator.is_second_order
    with torch.enable_grad():  # references differentiate what they compute
        try:
            grads = vjp(outs, run.inputs, seeds, create_graph=create_graph)
        except RuntimeError:  # an operation may refuse a large cotangent
            seeds = drawn
            grads = vjp(outs, run.inputs, seeds, create_graph=create_graph)
        probe = Probe(seeds, grads, generator)
        return probe, operator.entries(run, probe)


def vjp(
    outs: Tensors, inputs: Sequence[Tensor], cotangents: Tensors, *, create_graph: bool
) -> list[Tensor | None]:
    """``torch.autograd.grad``, with ``None`` for whatever does not depend on an input."""
    live = [(o, c) for o, c in zip(outs, cotangents) if o is not None and o.requires_grad]
    if not live:
        return [None] * len(inputs)
    roots, vectors = zip(*live)
    return list(vector_jacobian(roots, inputs, vectors, retain=True, graph=create_graph))


def random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    drawn = torch.randn(like.shape, generator=generator, dtype=dtype, device="cpu")
    return drawn.to(like.device, like.dtype)


def output_sizes(out: Tensor) -> Tensor:
    """Size of each output over the batch, so that large ones do not hide small ones."""
    if out.shape[0] == 0:
        return out.new_ones(out.shape[1:])
    size = out.detach().abs().amax(0).nan_to_num(1, 1, 1)
    return size.masked_fill_(size <= torch.finfo(size.dtype).tiny ** 0.5, 1)


def outer_product(seed: Tensor, tangent: Tensor, dim: int | None) -> Tensor:
    """``(B, *out), (..., B, ...) -> (B, *out, *in)``, the batch of ``tangent`` at ``dim``."""
    rows = tangent.expand(len(seed), *tangent.shape) if dim is None else tangent.movedim(dim, 0)
    left = seed.reshape(*seed.shape, *[1] * (rows.ndim - 1))
    return left * rows.reshape(len(seed), *[1] * (seed.ndim - 1), *rows.shape[1:])


def row_factors(run: Run, probe: Probe) -> tuple[Tensor, list[Tensor]]:
    """A random factor for each row, and the cotangent times it, so that mixing of rows shows.

    Equal directions in all rows are what the sum trick uses itself.
    """
    x = run.inputs[0]
    drawn = torch.rand(run.call.batch, generator=probe.generator, device="cpu", dtype=torch.float64)
    factors = (drawn + 0.5).to(x.device, x.dtype)
    rows = [seed * factors.to(seed.dtype).view(-1, *[1] * (seed.ndim - 1)) for seed in probe.seeds]
    return factors, rows


def curvature(
    run: Run, grad: Tensor | None, j: int, left: Tensor, right: Tensor, factors: Tensor | None
) -> Tensor:
    """``right . H left`` in each row for each pair ``(K, B)``, ``(K,)`` of a shared input."""
    x, dim = run.inputs[j], run.dims[j]
    if dim is not None and factors is not None:
        factors = factors.view(*[1] * dim, -1, *[1] * (x.ndim - 1 - dim))

    def products() -> Iterator[tuple[int, list[Tensor | None]]]:
        for tangent, vector in zip(left, right):
            if dim is not None and factors is not None:
                tangent = tangent * factors
            (row,) = vjp([grad], [x], [tangent], create_graph=run.create_graph)
            product = torch.zeros_like(x) if row is None else row * vector
            if dim is not None:
                product = product.movedim(dim, 0).reshape(x.shape[dim], -1).sum(1)
            yield 1, [(product.sum() if dim is None else product).unsqueeze(0)]

    (result,) = join(products(), len(left), 0, 1, create_graph=run.create_graph)
    return x.new_zeros((0,) if dim is None else (0, x.shape[dim])) if result is None else result
