"""Products with matrices of each row, for all basis vectors of a pass, without copies of those."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten
_BMM, _EXPAND, _ALIAS = _aten.bmm.default, _aten.expand.default, _aten.alias.default
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_RESHAPES = {_EXPAND, _aten.clone.default, *_VIEWS}


class _Stack(NamedTuple):
    """The matrices that a tensor holds, ``k`` for each row."""

    tensor: Tensor  # held, so that no other one gets its id
    whole: Tensor  # the same, (k, B, m, n)
    shared: Tensor | None  # (B, m, n), if all k are these


class SharedMatrices(TorchDispatchMode):
    """Below vmap, matmul repeats the matrices of each row ``k`` times, to multiply ``k B`` pairs.

    Here the other factors are joined: ``(B, k m, n)`` times ``(B, n, p)``, or ``(B, m, n)`` times
    ``(B, n, k p)``. Nobody uses the copies then, and a compiler drops them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stacks: dict[int, _Stack] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _BMM:
            stacks: list[Any] = [self.stacks.get(id(x)) for x in args]
            product = _product(*stacks) if None not in stacks else None
            if product is not None:
                return self._shown(product.flatten(0, 1), product, None)
        x: Any = args[0] if func in _RESHAPES else None
        stack = self.stacks.get(id(x))
        if stack is not None and func in _VIEWS and _same(args[1], stack.whole.shape):
            return _ALIAS(stack.whole)
        if func._schema.is_mutable:  # a write may reach any of them
            self.stacks.clear()
        out = func(*args, **(kwargs or {}))
        if func is _EXPAND and out.ndim == 4 and stack is None:
            stack = _Stack(out, out, x if _same(x.shape, out.shape[1:]) else None)
        if stack is not None and _is_form(out.shape, *stack.whole.shape):
            self._shown(out, stack.whole, stack.shared)
        return out

    def _shown(self, tensor: Tensor, whole: Tensor, shared: Tensor | None) -> Tensor:
        self.stacks[id(tensor)] = _Stack(tensor, whole, shared)
        return tensor


def _same(left: Any, right: Any) -> bool:
    """Whether shapes are equal; no guard compares symbolic ones."""
    pairs = zip(left, right)
    return len(left) == len(right) and all(statically_known_true(m == n) for m, n in pairs)


def _is_form(shape: Any, k: int, batch: int, m: int, n: int) -> bool:
    return _same(shape, (k, batch, m, n)) or _same(shape, (k * batch, m, n))


def _product(left: Any, right: Any) -> Tensor | None:
    """``(k, B, m, p)``, if one side repeats its matrices."""
    (_, a, shared_left), (_, b, shared_right) = left, right
    if shared_right is not None:
        rows = a.transpose(0, 1).flatten(1, 2)  # (B, k m, n)
        return _BMM(rows, shared_right).unflatten(1, (a.shape[0], a.shape[2])).transpose(0, 1)
    if shared_left is not None:
        columns = b.permute(1, 2, 0, 3).flatten(2)  # (B, n, k p)
        return _BMM(shared_left, columns).unflatten(2, (b.shape[0], b.shape[3])).permute(2, 0, 1, 3)
    return None
