"""``batch_divergence``: the trace of each row's Jacobian, without the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call, Options
from funcjac._engines import vmap
from funcjac._engines.basis import coordinates, row_shape
from funcjac._engines.divergence import divergence
from funcjac._engines.graph import Route
from funcjac._engines.run import Derivatives, Run
from funcjac._operators.directions import Spec, check_spec, extras_of
from funcjac._operators.operator import Operator, finished
from funcjac._operators.transform import Transform
from funcjac._verification.finite_differences import Pair, difference
from funcjac._verification.probe import Entry, Probe, row_factors, vjp
from funcjac.errors import refuse


@dataclass(frozen=True)
class Divergence(Operator):
    """One block: the trace, or an estimate and its standard error."""

    spec: Spec = field(default_factory=Spec)

    def words(self) -> list[str]:
        return self.spec.words()

    def as_numbers(self) -> tuple[Any, ...]:
        return self.spec.as_numbers()

    @classmethod
    def from_numbers(cls, numbers: tuple[Any, ...]) -> Divergence:
        return cls(Spec.from_numbers(numbers))

    def check_output(self, call: Call, outs: Sequence[Tensor]) -> None:
        check_square(call, [tuple(out.shape[1:]) for out in outs])

    def compute(self, run: Run, route: Route) -> Derivatives:
        out, x = run.output.leaves[0], run.inputs[0]
        dtype = torch.result_type(out, x)
        if not any(y.shape[1:].numel() for y in run.output.leaves):
            zero = out.new_zeros(run.call.batch, dtype=dtype)
            return Derivatives([[zero] * (1 + self.spec.return_error)], run.output)
        probes = None if self.spec.samples is None else run.call.extras
        total = divergence(run, route, probes).to(dtype)
        return Derivatives([_estimates(total, self.spec)], run.output)

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        if self.spec.samples is not None and call.options.mode != "fwd":
            return self._row_of_samples(call, function, xs, extras)
        jac, along = vmap.jacobian(function, xs, mode, call.options.chunk_size)
        check_square(call, [tuple(out.shape) for out in along[0]])
        total: Any = 0
        for i, x in enumerate(xs):
            matrix = jac[i][i].reshape(x.numel(), x.numel())
            if self.spec.samples is None:
                total = total + matrix.diagonal().sum()
            else:
                rows = extras[i].reshape(self.spec.samples, -1).to(matrix.dtype)
                total = total + ((rows @ matrix) * rows).sum(-1)
        return [_estimates(total, self.spec)], along

    def _row_of_samples(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor]
    ) -> Any:
        outs, pull, along = torch.func.vjp(function, *xs, has_aux=True)  # type: ignore[misc]
        check_square(call, [tuple(out.shape) for out in outs])

        def product(*probes: Tensor) -> Tensor:
            grads = pull(tuple([p.to(out.dtype) for p, out in zip(probes, outs)]))
            return torch.stack([(g * p).sum() for g, p in zip(grads, probes)]).sum()

        chunk = call.options.chunk_size
        if len(xs) == 1:
            total = torch.vmap(product, randomness="same", chunk_size=chunk)(*extras)
        else:
            jac = vmap.jacobian(function, xs, "rev", chunk)[0]
            total: Any = 0
            for i, x in enumerate(xs):
                matrix, rows = jac[i][i].reshape(x.numel(), x.numel()), extras[i].flatten(1)
                total = total + ((rows.to(matrix.dtype) @ matrix) * rows).sum(-1)
        return [_estimates(total, self.spec)], along

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        return [(), ()]

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """One plain backward for each coordinate or sample, other rows by another factor."""
        batch, outs = run.call.batch, run.output.leaves
        factors, _ = row_factors(run, probe)
        factors = probe.scale * factors.to(outs[0].dtype)  # they are its seeds
        shared = None in run.dims  # then only the sum over rows is known
        total = outs[0].new_zeros(() if shared else batch)
        size = total.detach()
        for i, (x, dim) in enumerate(zip(run.inputs, run.dims)):
            flat = outs[i].reshape(batch, -1)
            samples = self.spec.samples
            for n in range(flat.shape[1] if samples is None else samples):
                sample = None if samples is None else run.call.extras[i][:, n].reshape(batch, -1)
                scalar = flat[:, n] if sample is None else (flat * sample).sum(1)
                (grad,) = vjp([scalar], [x], [factors], create_graph=run.create_graph)
                if grad is None:
                    continue
                rows = grad.unsqueeze(0) if dim is None else grad.movedim(dim, 0)
                rows = rows.reshape(len(rows), -1)
                term = rows[:, n] if sample is None else (rows * sample).sum(1) / samples
                term = term.sum() if shared else term
                total, size = total + term, size + term.detach().abs()
        return [Entry([factors], total, total.detach(), None if shared else 0, size)]

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along each coordinate, or each sample."""
        total = torch.zeros_like(result.blocks[0][0])
        for i, (x, dim) in enumerate(zip(call.inputs, call.layout.diff_dims)):
            if self.spec.samples is None:
                moves = list(coordinates(x, dim))
                rows = torch.eye(len(moves), dtype=x.dtype, device=x.device).unsqueeze(1)
            else:
                probes = call.extras[i].movedim(1, 0) / self.spec.samples**0.5  # (k, B, *row)
                moves = list(probes if dim in (0, None) else probes.movedim(1, dim + 1))
                rows = probes.reshape(len(probes), call.batch, -1)
            for move, row in zip(moves, rows):
                slope = difference(call, [{i: move}])[i].reshape(call.batch, -1)
                total = total + (slope * row).sum(1)
        yield [total], [result.blocks[0][0]]

    def assemble(self, call: Call, result: Derivatives) -> Any:
        (blocks,) = result.blocks
        return finished(call, result, tuple(blocks) if len(blocks) > 1 else blocks[0], None)


def _estimates(total: Tensor, spec: Spec) -> list[Tensor]:
    """The trace, or of samples ``(…, k)`` their mean and its error."""
    if spec.samples is None:
        return [total.contiguous()]
    blocks = [total.mean(-1).contiguous()]
    if spec.return_error:
        blocks.append((total.std(-1) / spec.samples**0.5).contiguous())
    return blocks


def check_square(call: Call, outs: list[tuple[int, ...]]) -> None:
    """Raise unless outputs and inputs have rows of the same shapes.

    Raises:
        ValueError: they do not, or rows share an input of an estimate.
    """
    dims = call.layout.diff_dims
    if call.extra and None in dims:
        remedy = "Expand it over the batch and give it its dimension in in_dims."
        expected = "batched inputs with samples"
        raise refuse(call.options.name, ValueError, expected, "a shared one", remedy)
    rows = [tuple(row_shape(x, dim)) for x, dim in zip(call.inputs, dims)]
    if rows != outs:
        raise refuse(
            call.options.name,
            ValueError,
            f"func to return rows of the shapes of its input, {rows}",
            outs,
            "A divergence is the trace of a square Jacobian.",
        )


def batch_divergence(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    samples: int | None = None,
    probes: str = "rademacher",
    generator: torch.Generator | None = None,
    return_error: bool = False,
    in_dims: Any = 0,
    out_dims: Any = 0,
    mode: str = "auto",
    engine: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    return_value: bool = False,
    randomness: str = "error",
    check: bool | str = "auto",
) -> Callable[..., Any]:
    """Computes the divergence of each row: the trace of its Jacobian, without the Jacobian.

    For ``func: (B, *in) -> (B, *in)`` the returned function gives ``sum_i d func(x)[b, i] / d
    x[b, i]``, of shape ``(B,)``: the change of the log-density along a continuous flow. Of several
    inputs and as many outputs, leaf by leaf, the sum over all.

    Args:
        func: a batched function whose output has rows of the shape of its input.
        argnums: positional argument or arguments to differentiate.
        samples: estimate from so many random probes in each row (Hutchinson), without bias: one
            pass for each instead of one for each coordinate.
        probes: ``"rademacher"`` (entries 1 and -1) or ``"gaussian"``.
        generator: where probes are drawn from; ``None`` for PyTorch's default.
        return_error: ``(estimate, standard error)`` in place of the estimate, from the spread of
            at least two samples.
        in_dims: batch dimension of each positional argument, as in :func:`batch_jacobian`.
        out_dims: where ``func`` puts the batch dimension.
        mode: ``"rev"``, ``"fwd"`` or ``"auto"``, as in :func:`batch_jacobian`.
        engine: ``"vmap"``, ``"sum"``, ``"loop"`` or ``"auto"``, as in :func:`batch_jacobian`.
        chunk_size: coordinates (or samples) in one pass.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return ``func``'s output, from the same run.
        randomness: ``"different"``, ``"same"`` or ``"error"``, as in :func:`batch_jacobian`.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call,
            ``False`` none; as in :func:`batch_jacobian`.

    Returns:
        A function of the same arguments. It returns ``div``; ``(div, aux)`` with ``has_aux``;
        ``(div, value)`` with ``return_value``; ``(div, (value, aux))`` with both.

    Raises:
        TypeError, ValueError: bad words or arguments; output rows of another shape than the
            input's.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: nothing agrees with plain backward passes.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``.

    Cost: ``N`` passes, forward or backward, for all rows at once, or ``samples`` passes; memory of
    as many as are carried at once. A verified call takes as many again.

    Sources: M. F. Hutchinson, 1989; W. Grathwohl et al., "FFJORD", 2019.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> div = funcjac.batch_divergence(torch.sin)(x)
        >>> torch.allclose(div, x.cos().sum(-1))
        True
    """
    spec = Spec(None, None, samples, probes, generator, return_error)
    check_spec("batch_divergence", spec)
    options = Options(
        name="batch_divergence",
        argnums=argnums,
        in_dims=in_dims,
        out_dims=out_dims,
        mode=mode,
        engine=engine,
        chunk_size=chunk_size,
        has_aux=has_aux,
        return_value=return_value,
        randomness=randomness,
        check=check,
        operator=Divergence(spec),
    )
    return Transform(func, options, extras_of(spec))
