"""``batch_divergence``: the trace of each row's Jacobian, without the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call
from funcjac._engines import vmap
from funcjac._engines.rows import flat_rows, row_shape
from funcjac._engines.run_func import Derivatives, Route, Run
from funcjac._engines.sum import divergence
from funcjac._operators.operator import Hutchinson, Operator, Tensors
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform
from funcjac._verification.central_differences import Pair, difference
from funcjac._verification.reference_vjp import Entry, Probe, row_factors, vjp
from funcjac.errors import refuse


@dataclass(frozen=True)
class Divergence(Hutchinson, Operator):
    """One block: the trace, or an estimate and its standard error."""

    def check_output(self, call: Call, outs: Sequence[Tensor]) -> None:
        _check_square(call, outs, 1)

    def passes(self, mode: str, outputs: int, inputs: int) -> int:
        return self.samples or outputs

    def compute(self, run: Run, route: Route) -> Derivatives:
        out, dtype = run.output.leaves[0], torch.result_type(run.output.leaves[0], run.inputs[0])
        blocks = [out.new_zeros(run.call.batch, dtype=dtype)] * (1 + self.return_error)
        if any(y.shape[1:].numel() for y in run.output.leaves):
            total = divergence(run, route, run.call.extras or None).to(dtype)
            blocks = [block.contiguous() for block in self.estimates(total, -1)]
        return Derivatives([blocks], run.output)

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        chunk = call.options.chunk_size
        if self.samples is not None and call.options.mode != "fwd" and len(xs) == 1:
            outs, pull, along = torch.func.vjp(f, *xs, has_aux=True)  # type: ignore[misc]
            _check_square(call, outs, 0)

            def product(probe: Tensor) -> Tensor:
                (grad,) = pull((probe.to(outs[0].dtype),))
                return (grad * probe).sum()

            total = torch.vmap(product, randomness="same", chunk_size=chunk)(extras[0])
            return [self.estimates(total, -1)], along
        jac, along = vmap.jacobian(f, xs, mode, chunk)
        _check_square(call, along[0], 0)
        total: Any = 0
        for i, x in enumerate(xs):
            matrix = jac[i][i].reshape(x.numel(), x.numel())
            if self.samples is None:
                total = total + matrix.diagonal().sum()
            else:
                rows = extras[i].reshape(self.samples, -1).to(matrix.dtype)
                total = total + ((rows @ matrix) * rows).sum(-1)
        return [self.estimates(total, -1)], along

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """One plain backward for each coordinate or sample, other rows by another factor."""
        batch, outs = run.call.batch, run.output.leaves
        factors = row_factors(run, probe)[0].to(outs[0].dtype)  # they are its seeds
        shared = None in run.dims  # then only the sum over rows is known
        # A list of small tensors would keep the C library from using large memory again.
        total = size = outs[0].new_zeros(() if shared else batch)
        for i, (out, x, dim) in enumerate(zip(outs, run.inputs, run.dims)):
            for vector in self._vectors(run.call, i):
                scalar = (out.reshape(batch, -1) * vector.to(out.dtype)).sum(1)
                (grad,) = vjp([scalar], [x], [factors], create_graph=run.create_graph)
                if grad is not None:
                    rows = grad.unsqueeze(0) if dim is None else grad.movedim(dim, 0)
                    products = rows.reshape(len(rows), -1) * vector
                    products = products.where(vector != 0, 0)  # NaN beside the diagonal stays out
                    term = products.sum() if shared else products.sum(1)
                    total, size = total + term, size + term.detach().abs()
        return [Entry([factors], total, total.detach(), None if shared else 0, size)]

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along each coordinate, or each sample."""
        total = torch.zeros_like(result.blocks[0][0])
        for i, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
            for vector in self._vectors(call, i):
                move = vector.view(-1, *row_shape(x, dim))
                move = move[0] if dim is None else move.movedim(0, dim)
                slope = difference(call, [{i: move}])[i].reshape(call.batch, -1)
                total = total + (slope * vector).sum(1)
        yield [total], [result.blocks[0][0]]

    def _vectors(self, call: Call, i: int) -> Tensor:
        """The basis of input ``i``, ``(N, 1, N)``, or its probes, ``(k, B, N)``, to be averaged."""
        probes = call.extras[i] if self.samples else None
        vectors = self.vectors(call.inputs[i], call.layout.diff_dims[i], probes)
        return flat_rows(vectors, 0, call.batch) / (self.samples or 1) ** 0.5

    def tree(self, call: Call, result: Derivatives) -> Any:
        (blocks,) = result.blocks
        return tuple(blocks) if len(blocks) > 1 else blocks[0]


def _check_square(call: Call, outs: Tensors, skip: int) -> None:
    """Raise unless outputs and inputs have rows of the same shapes, batched ones for samples."""
    name, dims = call.options.name, call.layout.diff_dims
    if call.extra and None in dims:
        remedy = "Expand it over the batch and give it its dimension in in_dims."
        raise refuse(name, ValueError, "batched inputs with samples", "a shared one", remedy)
    rows = [tuple(row_shape(x, dim)) for x, dim in zip(call.inputs, dims)]
    shapes = [tuple(out.shape[skip:]) for out in outs]
    if rows != shapes:
        expected = f"func to return rows of the shapes of its input, {rows}"
        remedy = "A divergence is the trace of a square Jacobian."
        raise refuse(name, ValueError, expected, shapes, remedy)


@documented
def batch_divergence(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    samples: int | None = None,
    probes: str = "rademacher",
    generator: torch.Generator | None = None,
    return_error: bool = False,
    **keywords: Unpack[Keywords],
) -> Callable[..., Any]:
    """Computes the divergence of each row: the trace of its Jacobian, without the Jacobian.

    For ``func: (B, *in) -> (B, *in)`` the returned function gives ``sum_i d func(x)[b, i] / d
    x[b, i]``, of shape ``(B,)``: the change of the log-density along a continuous flow. Of several
    inputs and as many outputs, leaf by leaf, the sum over all.

    Args:
        func: a batched function whose output has rows of the shape of its input.
        argnums: positional argument or arguments to differentiate.
        {samples}
        mode: ``"rev"``, ``"fwd"`` or ``"auto"``, as in :func:`batch_jacobian`.
        {keywords}

    Returns:
        A function that returns ``div``, or ``(div, value)`` with ``return_value``.

    Raises:
        {errors}
        ValueError: output rows have another shape than the input's.

    Cost: ``N`` passes, forward or backward, for all rows at once, or ``samples`` passes; memory of
    as many as are carried at once. A verified call takes as many again.

    Sources: M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989;
    W. Grathwohl et al., "FFJORD", 2019.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> div = funcjac.batch_divergence(torch.sin)(x)
        >>> torch.allclose(div, x.cos().sum(-1))
        True
    """
    operator = Divergence(samples, probes, generator, return_error)
    return make_transform("batch_divergence", func, operator, argnums, keywords)
