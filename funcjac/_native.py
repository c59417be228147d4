"""What funcjac uses of torch's private API.

Whether a transform is at work (``peek_interpreter_stack``) and the switch of vmap's slow
fallback are needed; what else is used only saves time, and says what runs without it.
"""

import functools
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch import pyfunctorch
from torch.utils._pytree import tree_map_only

Tensors = Sequence[Tensor | None]

_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)


# What a no_grad block comes down to.
SET_GRAD_ENABLED: Any = getattr(torch._C, "_set_grad_enabled", None)
# Raised by torch inside of a function to leave it: no failure of the function.
_STOP = getattr(torch.utils.checkpoint, "_StopRecomputationError", None)
CONTROL_FLOW: tuple[type[Exception], ...] = () if _STOP is None else (_STOP,)


def is_transformed() -> bool:
    """Whether a torch.func transform, a dual level or a compiler is at work."""
    return is_functional() or torch.autograd.forward_ad._current_level > _LEVELS.others


def is_functional() -> bool:
    """The same, but for dual levels, which belong to the process."""
    return torch.compiler.is_compiling() or _FUNCTORCH.peek_interpreter_stack() is not None


class _Levels(threading.local):
    """The innermost dual level that is another thread's, as far as this one knows."""

    others = -1


_LEVELS = _Levels()


@contextmanager
def beside_levels() -> Iterator[None]:
    """Where the dual levels of now are those of other threads."""
    before, _LEVELS.others = _LEVELS.others, torch.autograd.forward_ad._current_level
    try:
        yield
    finally:
        _LEVELS.others = before


def is_wrapped(value: object) -> bool:
    """Whether a tensor belongs to a torch.func transform.

    Without it nothing counts as wrapped, and a function that stores activations in a
    plain list may find dead tensors there.
    """
    probe = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", None)
    return probe is not None and isinstance(value, Tensor) and probe(value)


# Dual levels are the process's, not the thread's, and so are the switches of vmap_fallback and
# the random state. One lock for all, and for all first calls: two would be taken both ways.
PROCESS = threading.RLock()


def with_memory(args: Any) -> Any:
    """Arguments of an operation, for a dispatch mode to run it with.

    Forward mode makes zeros without memory, which operations below a mode read all the same:
    the process would die. Without this private API they do.
    """
    if torch.autograd.forward_ad._current_level < 0:
        return args
    return tree_map_only(Tensor, lambda x: torch.zeros_like(x) if _is_zero(x) else x, args)


_is_zero: Any = getattr(Tensor, "_is_zerotensor", lambda _: False)


@contextmanager
def forward_levels() -> Iterator[None]:
    """Where forward mode may enter its levels: one thread at a time."""
    with PROCESS:
        _load_decompositions()
        yield


@functools.cache
def _load_decompositions() -> None:
    """Load what torch loads at its first dual number, without its warning about TorchScript.

    Without this private API the first pass loads it, and warns.
    """
    load = getattr(torch.autograd.forward_ad, "_maybe_load_decompositions", None)
    if load is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load()


def outside_transforms() -> AbstractContextManager[Any]:
    """Leaves all torch.func transforms for a while, to put tensors back that they captured.

    Without it nothing is left, and torch.func refuses the write with an error.
    """
    leave = getattr(pyfunctorch, "temporarily_clear_interpreter_stack", nullcontext)
    return leave()


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
    try:
        found = function(*[_FUNCTORCH._add_batch_dim(vector, 0, level) for vector in vectors])
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


@contextmanager
def vmap_fallback(*, allowed: bool) -> Iterator[None]:
    """Whether an operation without a batching rule may run as a loop inside torch, or raises.

    Where it may, torch's warning is off meanwhile; torch cannot tell whether it was on, and
    it is on afterwards.
    """
    with PROCESS:
        before = _FUNCTORCH._is_vmap_fallback_enabled()
        _FUNCTORCH._set_vmap_fallback_enabled(allowed)
        if allowed:
            _FUNCTORCH._set_vmap_fallback_warning_enabled(False)
        try:
            yield
        finally:
            _FUNCTORCH._set_vmap_fallback_enabled(before)
            if allowed:
                _FUNCTORCH._set_vmap_fallback_warning_enabled(True)


# Wrong once differentiated twice, or three times. Without them, nothing is replaced.
fused_weight_norm: Any = getattr(torch, "_weight_norm", None)
legit_batch_norm: Any = getattr(torch, "_native_batch_norm_legit", None)
updating_batch_norm: Any = getattr(torch.ops.aten, "_batch_norm_with_update", None)


@functools.cache
def keep_memory() -> None:
    """Let the allocator keep memory between calls rather than hand it back page by page.

    PyTorch has no cache for the memory of processors. The C library gives large blocks back to
    the system, and every page of the next ones costs a fault, more than the arithmetic on it,
    unless it has once seen a block of 32 MiB go: from then on it keeps up to twice that much.
    This block is never written to. (``mallopt(3)``, "dynamic mmap threshold", of glibc; other
    libraries do not mind.)
    """
    with suppress(RuntimeError, MemoryError):  # it only saves time
        torch.empty(2**25 - 2**13, dtype=torch.uint8, device="cpu")


_FEWEST = 2**18  # multiplications from which a look at oneDNN pays


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x (..., K) @ y (K, N)``, by oneDNN where that is faster and nothing is differentiated.

    PyTorch sends ``mm`` of float32 to MKL, which on processors of other makers runs at half
    the speed. Without the private operation, ``torch.matmul`` runs.
    """
    plain = torch.is_grad_enabled() or x.dtype != torch.float32 or y.dtype != torch.float32
    if plain or x.device.type != "cpu" or x.numel() * y.shape[1] < _FEWEST or not _onednn_wins():
        return torch.matmul(x, y)
    return _onednn(x.reshape(-1, x.shape[-1]), y).view(*x.shape[:-1], y.shape[1])


def _onednn(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, y.t(), None, "none", [], "")


@functools.cache
def _onednn_wins() -> bool:
    """Whether oneDNN multiplies float32 matrices at least a quarter faster, measured once."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, y = torch.ones(2048, 64, device="cpu"), torch.ones(64, 64, device="cpu")
    try:
        _onednn(x, y)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    times: dict[Callable[..., Any], float] = {}
    for run in (torch.mm, _onednn) * 7:
        start = time.perf_counter()
        run(x, y)
        times[run] = min(times.get(run, math.inf), time.perf_counter() - start)
    return times[_onednn] < 0.8 * times[torch.mm]
