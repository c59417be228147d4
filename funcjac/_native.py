"""What funcjac needs of torch's private API, each with what happens where it is gone."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor | None]

_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)


def is_transformed() -> bool:
    """Whether a torch.func transform, a dual level or a compiler is at work.

    Without it plain autograd would be tried inside of torch.func, which raises.
    """
    return (
        torch.compiler.is_compiling()
        or _FUNCTORCH.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_wrapped(value: object) -> bool:
    """Whether a tensor belongs to a torch.func transform.

    Without it nothing counts as wrapped, and a function that stores activations in a
    plain list may find dead tensors there.
    """
    probe = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", None)
    return probe is not None and isinstance(value, Tensor) and probe(value)


def backward(
    out: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, *, retain: bool, graph: bool
) -> Tensors:
    """``torch.autograd.grad`` of one tensor, with ``None`` for inputs it does not depend on.

    The autograd engine itself, without the checks of ``torch.autograd.grad``, which take
    as long as the backward pass of a small layer. Without it, ``torch.autograd.grad``.
    """
    if not out.requires_grad:
        return (None,) * len(inputs)
    if _ENGINE is None or type(out) is not Tensor:
        return torch.autograd.grad(out, inputs, cotangent, retain, graph, allow_unused=True)
    return _ENGINE.run_backward(
        (out,), (cotangent,), retain, graph, tuple(inputs), True, accumulate_grad=False
    )


def over_basis(function: Callable[[Tensor], Tensors], vectors: Tensor) -> Tensors:
    """``function`` of each of ``vectors`` ``(k, ...)`` at once; ``None`` results stay ``None``.

    Does what ``torch.vmap(function, randomness="same")`` does, without its handling of trees,
    which costs more than the backward pass of a small network. Private API: without it
    ``torch.vmap`` runs, as it does under ``torch.compile``.
    """
    if torch.compiler.is_compiling() or not _HAS_LEVELS:
        return _by_vmap(function, vectors)
    count = vectors.shape[0]
    level = _FUNCTORCH._vmap_increment_nesting(count, "same")
    try:
        found = function(_FUNCTORCH._add_batch_dim(vectors, 0, level))
        return [
            None if t is None else _FUNCTORCH._remove_batch_dim(t, level, count, 0) for t in found
        ]
    finally:
        _FUNCTORCH._vmap_decrement_nesting()


_HAS_LEVELS = all(
    hasattr(_FUNCTORCH, name)
    for name in (
        "_vmap_increment_nesting",
        "_vmap_decrement_nesting",
        "_add_batch_dim",
        "_remove_batch_dim",
    )
)


def _by_vmap(function: Callable[[Tensor], Tensors], vectors: Tensor) -> Tensors:
    places: list[int] = []

    def present(vector: Tensor) -> tuple[Tensor, ...]:
        found = function(vector)
        places[:] = [len(found), *[i for i, tensor in enumerate(found) if tensor is not None]]
        return tuple(tensor for tensor in found if tensor is not None)

    tensors = torch.vmap(present, randomness="same")(vectors)
    result: list[Tensor | None] = [None] * places[0]
    for i, tensor in zip(places[1:], tensors):
        result[i] = tensor
    return result


class _VmapFallback:
    """Torch's slow batching of operations without a rule: refused, or used without a word."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed

    def __enter__(self) -> None:
        self.before = _FUNCTORCH._is_vmap_fallback_enabled()
        _FUNCTORCH._set_vmap_fallback_enabled(self.allowed)
        _FUNCTORCH._set_vmap_fallback_warning_enabled(False)

    def __exit__(self, *_: object) -> None:
        _FUNCTORCH._set_vmap_fallback_enabled(self.before)
        _FUNCTORCH._set_vmap_fallback_warning_enabled(True)


def vmap_fallback(*, allowed: bool) -> AbstractContextManager[None]:
    """Whether an operation without a batching rule may run as a loop inside torch, or raises.

    Private API. Without it such operations run slowly, with torch's own warning, and are
    left only when another engine is measured to be faster.
    """
    return nullcontext() if torch.compiler.is_compiling() else _VmapFallback(allowed)
