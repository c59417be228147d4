"""Rows that depend on one another: finding out, and naming suspects."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from funcjac._batched import Call
from funcjac._linear import Context
from funcjac._probe import probe, tolerance, wide
from funcjac._reach import Reach
from funcjac.errors import BatchMixingError


def check_rows(call: Call, reached: Reach) -> None:
    """Raise if a cotangent in some rows reaches the input of others, for any two rows.

    One forward and one backward pass for each bit of the batch size, twice.

    Raises:
        BatchMixingError: it does.
    """
    order = torch.arange(call.batch, device="cpu")
    for bit in range((call.batch - 1).bit_length()):
        # Any two rows differ in a bit, so each of them is once sender and once receiver.
        for sent in ((order >> bit) & 1, 1 - ((order >> bit) & 1)):
            if _leaks(call, sent):
                raise mixing_error(call.options.name, reached)


def _leaks(call: Call, sent: Tensor) -> bool:
    """Whether a cotangent in the rows that are ``sent`` reaches the input of another row."""
    found = probe(call, Context(), sent)
    for x, grad, dim in zip(found.inputs, found.grads, call.layout.diff_dims):
        if grad is None or dim is None:
            continue
        size = wide(grad).movedim(dim, 0).reshape(call.batch, -1).abs().nan_to_num(0, 0, 0)
        leak = size[(sent == 0).to(size.device)]  # zero, where rows are independent
        if (leak > tolerance([x.dtype], x.device) / 100 * size.amax(0)).any():
            return True
    return False


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
