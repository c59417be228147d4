"""Refusals that a replacement shares with the operation it stands for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def refuse_unless(fits: bool, message: str) -> None:
    """Raise for arguments that torch's operation refuses, and simpler operations would take.

    Raises:
        RuntimeError: as PyTorch does.
    """
    if not fits:
        raise RuntimeError(message)


def refuse_unless_shaped(shape: Sequence[int], **tensors: Tensor | None) -> None:
    """Raise unless each of ``tensors`` is ``None`` or has ``shape``.

    Raises:
        RuntimeError: as PyTorch does.
    """
    for name, tensor in tensors.items():
        fits = tensor is None or tuple(tensor.shape) == tuple(shape)
        refuse_unless(fits, f"Expected {name} to be of shape {tuple(shape)}")
