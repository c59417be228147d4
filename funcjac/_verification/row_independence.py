"""Rows that depend on one another: shown by the graph, with modules that are suspects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from funcjac._engines.run_func import Run
from funcjac._verification.reference_vjp import RNG_SEED, output_sizes, random_like, vjp
from funcjac._verification.tolerance import magnitude, tolerance
from funcjac.errors import BatchMixingError


def halves(batch: int) -> Iterator[Tensor]:
    """Masks of rows, ``(B,)``: of any two rows, each is in one of them without the other."""
    order = torch.arange(batch, device="cpu")
    for bit in range((batch - 1).bit_length()):  # any two rows differ in a bit
        rows = (order >> bit) % 2 == 1
        yield rows
        yield ~rows


def check_rows(run: Run, modules: Iterable[nn.Module]) -> None:
    """Raise if a cotangent in some rows reaches the input of others, for any two rows."""
    generator = torch.Generator("cpu").manual_seed(RNG_SEED)
    outs = run.output.leaves
    cotangents = [random_like(out, generator) / output_sizes(out) for out in outs]
    leak = max([_leak(run, cotangents, rows) for rows in halves(run.call.batch)], default=0.0)
    if leak > 0:
        raise mixing_error(run.call.options.name, modules, leak)


def _leak(run: Run, cotangents: list[Tensor], rows: Tensor) -> float:
    """What reaches inputs of other rows than those asked for, relative to what should."""
    masked = [c * rows.to(c.device, c.dtype).view(-1, *[1] * (c.ndim - 1)) for c in cotangents]
    grads = vjp(run.output.leaves, run.inputs, masked, create_graph=False)
    worst = 0.0
    for x, grad, dim in zip(run.inputs, grads, run.dims):
        if grad is None or dim is None or not grad.numel():
            continue
        sizes = magnitude(grad).movedim(dim, 0).reshape(run.call.batch, -1)
        leak, size = sizes[~rows.to(sizes.device)], sizes.amax(0)
        if (leak > tolerance([x.dtype]) / 100 * size).any():
            worst = max(worst, (leak.amax() / size.amax()).item())
    return worst


def mixing_error(
    name: str, modules: Iterable[nn.Module], size: float | None = None
) -> BatchMixingError:
    blame = (
        "No module known to mix rows was found: look for reductions, sorts or softmax over "
        "the batch dimension, such as x.mean(0), for step sizes or iterations that are chosen for "
        "the whole batch (adaptive solvers), and for modules that take the batch second."
    )
    if suspects := dict.fromkeys(_suspects(modules)):
        blame = f"Suspects: {'; '.join(suspects)}."
    amount = "" if size is None else f", by {size:.1g} of the dependence on the same row"
    return BatchMixingError(
        f"{name}: expected each row of func's output to depend on the same row of its input "
        f"alone, but rows depend on one another{amount}. {blame}"
    )


def _suspects(modules: Iterable[nn.Module]) -> Iterator[str]:
    for path, module in (pair for root in modules for pair in root.named_modules()):
        if reason := _mixes(module):
            yield f"{path}{': ' if path else ''}{type(module).__name__} {reason}"


def _mixes(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training:
            return "in training mode (call .eval(), or use GroupNorm)"
        if module.running_mean is None:
            return "without running statistics (set track_running_stats=True)"
    if isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and not module.batch_first:
        return "with batch_first=False (its batch dimension is the second)"
    return None
