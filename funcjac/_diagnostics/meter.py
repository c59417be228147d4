"""Counts operations and memory of what runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments import pytree
from funcjac._environment.torch_private import EagerMode, with_memory


class Meter(EagerMode):
    """Counts what runs under it.

    Attributes:
        peak: bytes of tensors made under it that were alive at once, at most.
        flops: floating-point operations of matrix products and convolutions.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # noqa: PLC0415  slow to import

        super().__init__()
        self.now = self.peak = self.flops = 0
        self._is_paused = False
        self._formulas = flop_registry
        self._sizes: dict[int, int] = {}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Where nothing is counted."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        args, kwargs = with_memory(args), with_memory(kwargs or {})
        if self._is_paused:
            return func(*args, **kwargs)
        for tensor in _tensors((args, kwargs)):  # what was there before does not count
            self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)
        out = func(*args, **kwargs)
        formula = self._formulas.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage._cdata)
        return out

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tensors(tree) if t.layout == torch.strided]
