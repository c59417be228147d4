"""Rows that depend on one another: finding out, and naming suspects."""

from collections.abc import Iterator

import torch
from torch import nn

from funcjac._batched import Call
from funcjac._passes import Context
from funcjac._probe import probe, tolerance, wide
from funcjac._reach import Reach
from funcjac.errors import BatchMixingError


def check_rows(call: Call, reached: Reach) -> None:
    """Raise if a cotangent in half of the rows reaches the input of the other half.

    Raises:
        BatchMixingError: it does.
    """
    if call.batch < 2:
        return
    generator = torch.Generator().manual_seed(call.batch)
    rows = torch.randperm(call.batch, generator=generator) % 2
    found = probe(call, Context(), rows)
    for x, grad, dim in zip(found.inputs, found.grads, call.layout.diff_dims):
        if grad is None or dim is None:
            continue
        size = wide(grad).movedim(dim, 0).reshape(call.batch, -1).abs().amax(1).nan_to_num(0)
        leak = size[rows.to(size.device) == 0].max()
        if leak > tolerance([x.dtype], x.device) / 100 * size.max():
            raise mixing_error(call.options.name, reached)


def mixing_error(name: str, reached: Reach) -> BatchMixingError:
    suspects = list(_suspects(reached))
    blame = (
        f"Suspects: {'; '.join(suspects)}."
        if suspects
        else "No module known to mix rows was found: look for reductions, sorts or softmax over "
        "the batch dimension, such as x.mean(0), and for modules that take the batch second."
    )
    return BatchMixingError(
        f"{name}: expected each row of func's output to depend on the same row of its input "
        f"alone, but rows depend on one another. {blame}"
    )


def _suspects(reached: Reach) -> Iterator[str]:
    children = {id(m) for module in reached.modules.values() for m in module.children()}
    roots = [m for i, m in reached.modules.items() if i not in children]
    for root in roots:
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
