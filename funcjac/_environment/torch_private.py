"""What funcjac uses of torch's private API.

Whether a transform is at work (``peek_interpreter_stack``) and the switch of vmap's slow
fallback are needed; what else is used only saves time, and says what runs without it.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Tensors = Sequence[Tensor | None]

_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)


# Raised by torch inside of a function to leave it: no failure of the function.
_STOP = getattr(torch.utils.checkpoint, "_StopRecomputationError", None)
CONTROL_FLOW: tuple[type[Exception], ...] = () if _STOP is None else (_STOP,)


def is_transformed() -> bool:
    """Whether a torch.func transform, a dual level or a compiler is at work."""
    return is_functional() or torch.autograd.forward_ad._current_level >= 0


def sees_values() -> bool:
    """Whether values can be looked at: no level of ``torch.vmap``, no compiler.

    Without this private API they cannot, and rows are kept apart by torch.func.
    """
    stack = getattr(pyfunctorch, "retrieve_all_functorch_interpreters", None)
    if stack is None or torch.compiler.is_compiling():
        return False
    return all(level.key() != _VMAP for level in stack())


_VMAP: Any = getattr(getattr(_FUNCTORCH, "TransformType", None), "Vmap", None)


def is_functional() -> bool:
    """The same, but for dual levels, which belong to the process."""
    return is_traced() or has_levels()


def has_levels() -> bool:
    """Whether a torch.func transform is at work.

    Asked by type, as Dynamo takes the stack for an object even where there is none.
    """
    return type(_FUNCTORCH.peek_interpreter_stack()) is not _NONE


_NONE = type(None)


def is_traced() -> bool:
    """Whether a compiler, or ``make_fx``, traces what runs.

    Without the private half, ``make_fx`` would trace verification, which looks at values.
    """
    return torch.compiler.is_compiling() or _dispatch_mode(_PROXY) is not None


_PROXY: Any = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)
_dispatch_mode: Any = getattr(torch._C, "_get_dispatch_mode", lambda _: None)


# Raises where a compiled graph finds a tensor to be false, as nothing public does.
assert_async: Any = getattr(torch, "_assert_async", lambda *_: None)


def nonstrict_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Dynamo out of a function; what comes after Dynamo traces into it.

    It imports the compiler: call it where one is at work already.
    """
    trace = getattr(torch.compiler, "nonstrict_trace", None)  # from torch 2.14 on
    return (trace or importlib.import_module("torch._dynamo").nonstrict_trace)(function)


def bypassing_wrapper() -> Any:
    """Runs what Dynamo traced of a function inside of a Python function that it did not trace.

    The only way to have a dispatch mode see the operations of a part of a graph. Without this
    private API ``None``, and Taylor propagation does not run in compiled code.
    """
    wraps = importlib.import_module("torch._higher_order_ops.wrap")
    return getattr(wraps, "dynamo_bypassing_wrapper", None)


def is_wrapped(value: object) -> bool:
    """Whether a tensor belongs to a torch.func transform.

    Without it nothing counts as wrapped, and a function that stores activations in a
    plain list may find dead tensors there.
    """
    probe = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", None)
    return probe is not None and isinstance(value, Tensor) and probe(value)


def with_memory(args: Any) -> Any:
    """Arguments of an operation, for a dispatch mode to run it with.

    Forward mode makes zeros without memory, which operations below a mode read all the same:
    the process would die. Without this private API they do.
    """
    if torch.autograd.forward_ad._current_level < 0:
        return args
    return tree_map_only(Tensor, lambda x: torch.zeros_like(x) if _is_zero(x) else x, args)


class EagerMode(TorchDispatchMode):
    """A mode of what is never compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """``False``: torch's own guard against being compiled imports the compiler."""
        return False


_is_zero: Any = getattr(Tensor, "_is_zerotensor", lambda _: False)


@functools.cache
def load_forward_formulas() -> None:
    """Load what torch loads at its first dual number, without its warning about TorchScript.

    Without this private API the first pass loads it, and warns.
    """
    load = getattr(torch.autograd.forward_ad, "_maybe_load_decompositions", None)
    if load is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()


def backward(
    out: Any, inputs: Sequence[Tensor], cotangent: Tensor, *, retain: bool, graph: bool
) -> Tensors:
    """``torch.autograd.grad`` of a tensor, or a place in a graph; ``None`` for no dependence."""
    if isinstance(out, Tensor) and not out.requires_grad:
        return (None,) * len(inputs)
    return vector_jacobian((out,), inputs, (cotangent,), retain=retain, graph=graph)


def vector_jacobian(
    outs: Sequence[Any],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Any],
    *,
    retain: bool,
    graph: bool,
) -> Tensors:
    """``torch.autograd.grad`` of tensors that require grad.

    The autograd engine itself, without the checks of ``torch.autograd.grad``, which take
    as long as the backward pass of a small layer, and half a second to import at the first call.
    Without it, ``torch.autograd.grad``.
    """
    if _ENGINE is None or not all(type(out) in (Tensor, GradientEdge) for out in outs):
        return torch.autograd.grad(outs, inputs, cotangents, retain, graph, allow_unused=True)
    return _ENGINE.run_backward(
        tuple(outs), tuple(cotangents), retain, graph, tuple(inputs), True, accumulate_grad=False
    )


@contextmanager
def quiet_fallback() -> Iterator[None]:
    """Where an operation without a batching rule runs as a loop inside torch, without a warning.

    Torch cannot tell whether its warning was on; it is on afterwards.
    """
    warn = getattr(_FUNCTORCH, "_set_vmap_fallback_warning_enabled", lambda _: None)
    warn(False)
    try:
        yield
    finally:
        warn(True)


def over_basis(function: Callable[..., Tensors], *vectors: Tensor) -> Tensors:
    """``function`` of each of ``vectors`` ``(k, ...)`` at once; ``None`` results stay ``None``.

    Does what ``torch.vmap(function, randomness="same")`` does, without its handling of trees,
    which costs more than the backward pass of a small network. Private API: without it
    ``torch.vmap`` runs, as it does under ``torch.compile``.
    """
    if torch.compiler.is_compiling() or not _HAS_LEVELS:
        return _by_vmap(function, vectors)
    count = len(vectors[0])
    level = _FUNCTORCH._vmap_increment_nesting(count, "same")
    # An operation without a batching rule runs as a loop inside torch, which needs no warning.
    _FUNCTORCH._set_vmap_fallback_warning_enabled(False)
    try:
        found = function(*[_FUNCTORCH._add_batch_dim(vector, 0, level) for vector in vectors])
        return [
            None if t is None else _FUNCTORCH._remove_batch_dim(t, level, count, 0) for t in found
        ]
    finally:
        _FUNCTORCH._set_vmap_fallback_warning_enabled(True)
        _FUNCTORCH._vmap_decrement_nesting()


_HAS_LEVELS = all(
    hasattr(_FUNCTORCH, name)
    for name in (
        "_vmap_increment_nesting",
        "_vmap_decrement_nesting",
        "_add_batch_dim",
        "_remove_batch_dim",
        "_set_vmap_fallback_warning_enabled",
    )
)


def _by_vmap(function: Callable[..., Tensors], vectors: tuple[Tensor, ...]) -> Tensors:
    places: list[int] = []

    def present(*vectors: Tensor) -> tuple[Tensor, ...]:
        found = function(*vectors)
        places[:] = [len(found), *[i for i, tensor in enumerate(found) if tensor is not None]]
        return tuple(tensor for tensor in found if tensor is not None)

    tensors = torch.vmap(present, randomness="same")(*vectors)
    result: list[Tensor | None] = [None] * places[0]
    for i, tensor in zip(places[1:], tensors):
        result[i] = tensor
    return result


# Wrong once differentiated twice, or three times. Without them, nothing is replaced.
fused_weight_norm: Any = getattr(torch, "_weight_norm", None)
legit_batch_norm: Any = getattr(torch, "_native_batch_norm_legit", None)
updating_batch_norm: Any = getattr(torch.ops.aten, "_batch_norm_with_update", None)
