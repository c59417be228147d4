"""Rows that depend on one another: finding out through the graph, and naming suspects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from funcjac._engines.run import Run
from funcjac._verification.compare import tolerance, wide
from funcjac._verification.probe import output_sizes, random_like, vjp
from funcjac.errors import BatchMixingError


def check_rows(run: Run, modules: Iterable[nn.Module]) -> None:
    """Raise if a cotangent in some rows reaches the input of others, for any two rows.

    One backward pass for each bit of the batch size, twice.

    Raises:
        BatchMixingError: it does.
    """
    order = torch.arange(run.call.batch, device="cpu")
    generator = torch.Generator("cpu").manual_seed(0)
    outs = run.output.leaves
    cotangents = [random_like(out, generator) / output_sizes(out) for out in outs]
    worst = 0.0
    for bit in range((run.call.batch - 1).bit_length()):
        # Any two rows differ in a bit, so each of them is once sender and once receiver.
        for sent in ((order >> bit) & 1, 1 - ((order >> bit) & 1)):
            worst = max(worst, _leak(run, cotangents, sent))
    if worst > 0:
        raise mixing_error(run.call.options.name, modules, worst)


def _leak(run: Run, cotangents: list[Tensor], sent: Tensor) -> float:
    """What reaches inputs of rows whose output is not asked for, relative to what should."""
    masked = [c * sent.to(c.device, c.dtype).view(-1, *[1] * (c.ndim - 1)) for c in cotangents]
    worst = 0.0
    for x, grad, dim in zip(
        run.inputs, vjp(run.output.leaves, run.inputs, masked, create_graph=False), run.dims
    ):
        if grad is None or dim is None or not grad.numel():
            continue
        rows = wide(grad).movedim(dim, 0).reshape(run.call.batch, -1).abs().nan_to_num(0, 0, 0)
        leak = rows[(sent == 0).to(rows.device)]  # zero, where rows are independent
        size = rows.amax(0)
        if (leak > tolerance([x.dtype]) / 100 * size).any():
            worst = max(worst, (leak.amax() / size.amax()).item())
    return worst


def mixing_error(
    name: str, modules: Iterable[nn.Module], size: float | None = None
) -> BatchMixingError:
    suspects = list(dict.fromkeys(_suspects(modules)))
    blame = (
        f"Suspects: {'; '.join(suspects)}."
        if suspects
        else "No module known to mix rows was found: look for reductions, sorts or softmax over "
        "the batch dimension, such as x.mean(0), for step sizes or iterations that are chosen for "
        "the whole batch (adaptive solvers), and for modules that take the batch second."
    )
    amount = "" if size is None else f", by {size:.1g} of the dependence on the same row"
    return BatchMixingError(
        f"{name}: expected each row of func's output to depend on the same row of its input "
        f"alone, but rows depend on one another{amount}. {blame}"
    )


def _suspects(modules: Iterable[nn.Module]) -> Iterator[str]:
    for root in modules:
        for path, module in root.named_modules():
            reason = _mixes(module)
            if reason:
                where = f"{path}: " if path else ""
                yield f"{where}{type(module).__name__} {reason}"


def _mixes(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.training:
            return "in training mode (call .eval(), or use GroupNorm)"
        if module.running_mean is None:
            return "without running statistics (set track_running_stats=True)"
    if getattr(module, "batch_first", True) is False and isinstance(
        module, (nn.RNNBase, nn.MultiheadAttention)
    ):
        return "with batch_first=False (its batch dimension is the second)"
    return None
