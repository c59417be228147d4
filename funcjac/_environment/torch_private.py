"""Functions of torch's private API.

Whether a transform is at work (``peek_interpreter_stack``) and the switch of vmap's slow
fallback are needed; the others only save time, and say what runs without them.
"""

import functools
import importlib
import itertools
import operator
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = Sequence[Tensor | None]

_FUNCTORCH: Any = getattr(torch._C, "_functorch", None)
_ENGINE: Any = getattr(torch.autograd.Variable, "_execution_engine", None)
_VMAP: Any = getattr(getattr(_FUNCTORCH, "TransformType", None), "Vmap", None)
_is_zero: Any = getattr(Tensor, "_is_zerotensor", lambda _: False)

# Raised by torch inside of a function to leave it: no failure of the function.
_STOP = getattr(torch.utils.checkpoint, "_StopRecomputationError", None)
CONTROL_FLOW: tuple[type[Exception], ...] = () if _STOP is None else (_STOP,)

# Wrong once differentiated three times. Without it, nothing is replaced.
updating_batch_norm: Any = getattr(torch.ops.aten, "_batch_norm_with_update", None)
# Raises where a compiled graph finds a tensor to be false, as nothing public does.
assert_async: Any = getattr(torch, "_assert_async", lambda *_: None)

_NONE = type(None)
_MODES: Any = getattr(torch._C, "_TorchDispatchModeKey", None)
_PROXY, _FAKE = getattr(_MODES, "PROXY", None), getattr(_MODES, "FAKE", None)
_dispatch_mode: Any = getattr(torch._C, "_get_dispatch_mode", lambda _: None)


def has_levels(*, dual: bool = False) -> bool:
    """Whether a torch.func transform is at work, or a ``dual`` level."""
    if dual and forward_ad._current_level >= 0:
        return True
    # Dynamo takes the stack for an object even where there is none.
    return type(_FUNCTORCH.peek_interpreter_stack()) is not _NONE


def is_traced() -> bool:
    """Whether a compiler, or ``make_fx``, traces what runs, and values cannot be looked at.

    Dynamo of torch 2.11 does not always say that it compiles: its tensors are fake.
    """
    return bool(torch.compiler.is_compiling() or _dispatch_mode(_PROXY) or _dispatch_mode(_FAKE))


def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, which Dynamo of torch 2.11 takes to be true at all times."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def is_functional() -> bool:
    """Whether a tracer or a torch.func transform is at work, asked many times in each call."""
    if torch.compiler.is_compiling() or type(_FUNCTORCH.peek_interpreter_stack()) is not _NONE:
        return True
    return _dispatch_mode(_PROXY) is not None or _dispatch_mode(_FAKE) is not None


def is_transformed() -> bool:
    """The same, or a dual level, which belongs to the process."""
    return forward_ad._current_level >= 0 or is_functional()


def sees_values() -> bool:
    """Whether values can be looked at: no ``torch.vmap``, no compiler; without this API, never."""
    stack = getattr(pyfunctorch, "retrieve_all_functorch_interpreters", None)
    if stack is None or torch.compiler.is_compiling():
        return False
    return all(level.key() != _VMAP for level in stack())


def nonstrict_trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps Dynamo, which this imports, out of a function; later tracers go into it."""
    trace = getattr(torch.compiler, "nonstrict_trace", None)  # from torch 2.14 on
    return (trace or importlib.import_module("torch._dynamo").nonstrict_trace)(function)


def assumed_constant(function: Any) -> Any:
    """``torch.compiler.assume_constant_result``, which loads Dynamo; without, it is traced."""
    function._dynamo_marked_constant = True
    return function


def bypassing_wrapper() -> Any:
    """Lets a dispatch mode see into a graph of Dynamo; without it no Taylor in compiled code."""
    wraps = importlib.import_module("torch._higher_order_ops.wrap")
    return getattr(wraps, "dynamo_bypassing_wrapper", None)


_autograd: Any = getattr(torch._C, "_autograd", None)
_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", lambda _: ())


def saves_by_hooks() -> bool:
    """Whether hooks (of a checkpoint) are at work on what autograd saves; without this, yes."""
    return _top_hooks(False) is not None


def is_wrapped(value: object) -> bool:
    """Whether a tensor belongs to a torch.func transform; without this, none does."""
    probe = getattr(_FUNCTORCH, "is_functorch_wrapped_tensor", None)
    return probe is not None and isinstance(value, Tensor) and probe(value)


def with_memory(args: Any) -> Any:
    """Arguments of an operation, for a dispatch mode to run it with.

    Operations below a mode read the zeros of forward mode, which have no memory: the process would
    die, as it does without this private API.
    """
    if forward_ad._current_level < 0:
        return args
    return pytree.tree_map_only(Tensor, lambda x: torch.zeros_like(x) if _is_zero(x) else x, args)


_EVAL_FRAME: Any = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)


def whole(function: Any) -> Any:
    """Lets Dynamo trace a function as a part of a graph, or not at all, nor what it calls.

    Without this private API, Dynamo compiles it in pieces where a graph breaks inside of it, of
    which some take what others computed for traced: results are wrong.
    """
    if hasattr(_EVAL_FRAME, "set_code_exec_strategy"):
        skip = _EVAL_FRAME._FrameAction.SKIP
        strategy = _EVAL_FRAME._FrameExecStrategy(skip, skip)
        _EVAL_FRAME.set_code_exec_strategy(function.__code__, strategy)
    return function


def uncompiled() -> Any:
    """A context that runs what ``func`` compiled as written, to be differentiated twice, or None.

    Dynamo would go into dispatch modes, too. Between two graphs of a compiled caller, torch refuses
    it.
    """
    is_within = is_traced() or getattr(_EVAL_FRAME, "get_eval_frame_callback", bool)()
    if is_within or "torch._dynamo" not in sys.modules:
        return None
    return _shared(_STANCES, lambda: torch.compiler.set_stance("force_eager"))


_STANCES, _RULES = list[Any](), list[Any]()  # one for each call at work, of any thread
_LOCK = threading.Lock()


@contextmanager
def _shared(users: list[Any], make: Callable[[], Any]) -> Iterator[None]:
    """A context that belongs to the process, until the last of its users is done."""
    with _LOCK:
        context = users[0] if users else make()
        if not users:
            context.__enter__()
        users.append(context)
    try:
        yield
    finally:
        with _LOCK:
            context = users.pop()
            if not users:
                context.__exit__(None, None, None)


# Operations of derivatives whose batching rules in torch read symbolic sizes as numbers; bmm, whose
# rule repeats the matrices of each row for all vectors of a basis; mm and the backward pass of
# convolutions, after which rows are turned; before 2.13 that has no derivative for symbolic sizes.
_BATCHED = "diagonal_backward gelu_backward glu_backward mish_backward slice_backward"
_BATCHED += " unfold_backward cat gather linalg_cross scatter.src scatter_add bmm mm"
_BATCHED += " cummaxmin_backward" + " convolution_backward" * (torch.__version__ >= "2.13")


@contextmanager
def batching_rules() -> Iterator[None]:
    """Rules of our own for these operations, while tensors are traced.

    Without this API, a compiled Jacobian through them is compiled again for each batch size.
    """
    if not is_traced():  # but run, by a backend that keeps the graph as it is
        yield
        return
    with _shared(_RULES, _registered), enable_python_dispatcher():
        yield


@contextmanager
def _registered() -> Iterator[None]:
    key: Any = torch._C.DispatchKey.FuncTorchBatched
    names = [name if "." in name else f"{name}.default" for name in _BATCHED.split()]
    ops = [operator.attrgetter(name)(torch.ops.aten) for name in names]
    ops = [op for op in ops if key not in getattr(op, "py_kernels", {key})]
    for op in ops:
        op.py_impl(key)(functools.partial(_RULES_OF.get(op._schema.name, _batched), op, key))
    yield
    for op in ops:
        del op.py_kernels[key]
        op._dispatch_cache.clear()


def _batched(op: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
    """``op`` of each entry of a batch, which becomes the first dimension of all its tensors."""
    level, tensors = _FUNCTORCH.maybe_current_level(), pytree.tree_leaves(args)
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    pairs = [_FUNCTORCH._unwrap_batched(x, level) for x in tensors]
    count = [x.shape[dim] for x, dim in pairs if dim is not None][:1]
    if not count or {x.ndim for x in tensors} != {max(tensors[0].ndim, 1)}:
        return op._op_dk(key, *args, **kwargs)
    front = (x.expand(*count, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs)
    given = {a.name: a.default_value for a in op._schema.arguments}  # left out: cat along 0
    given |= dict(zip(given, args)) | kwargs
    for name, value in given.items():
        if name == "input_sizes":
            given[name] = [*count, *value]
        elif name.startswith("dim"):
            given[name] = value + (value >= 0)
        else:
            given[name] = pytree.tree_map_only(Tensor, lambda _: next(front), value)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        return _FUNCTORCH._add_batch_dim(op(**given), 0, level)


def _joined(op: Any, key: Any, *matrices: Tensor) -> Any:
    """Joins the factors that differ, ``k`` for each row, and repeats none of the others.

    What is the same in all rows, as at the start of a pass, is multiplied once.
    """
    level, at = _FUNCTORCH.maybe_current_level(), int(op is torch.ops.aten.bmm.default)
    (a, i), (b, j) = (_FUNCTORCH._unwrap_batched(x, level) for x in matrices)
    narrows = [type(n) is int for n in b.shape] != [True, True] or b.shape[0] >= b.shape[1]
    rows = None if i is None else a.movedim(i, 1)
    alike = not at and rows is not None and type(rows.stride(0)) is int and rows.stride(0) == 0
    if (i is None) == (j is None) or not (at or alike or (rows is not None and not narrows)):
        return op._op_dk(key, *matrices)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        if rows is None:  # (B, m, n) times (B, n, k p)
            columns = b.movedim(j, 2)
            out = op(a, columns.flatten(2)).unflatten(2, columns.shape[2:])
            return _FUNCTORCH._add_batch_dim(out, 2, level)
        if alike:  # (k, n) times (n, p)
            out = op(rows[0], b).unsqueeze(1).expand(-1, rows.shape[0], -1)
            return _FUNCTORCH._add_batch_dim(out, 0, level)
        out = op(rows.flatten(at, at + 1), b).unflatten(at, rows.shape[at : at + 2])
        return _FUNCTORCH._add_batch_dim(out, 1, level)  # (B, k m, n) or (B k, n): batch first


def _convolved(op: Any, key: Any, grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
    """The gradient by the input alone, whose values it does not need: of ``k`` for each row."""
    level = _FUNCTORCH.maybe_current_level()
    (rows, i), (weight, j) = (_FUNCTORCH._unwrap_batched(t, level) for t in (grad, weight))
    if i is None or j is not None or list(rest[-1]) != [True, False, False]:
        return op._op_dk(key, grad, x, weight, *rest)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
        rows = rows.movedim(i, 1)
        images = rows.flatten(0, 1)  # (B k, ...)
        like = images.new_empty(()).expand(images.shape[0], *x.shape[1:])
        out = op(images, like, weight, *rest)[0].unflatten(0, rows.shape[:2])
        return _FUNCTORCH._add_batch_dim(out, 1, level), None, None


_RULES_OF = {"aten::mm": _joined, "aten::bmm": _joined, "aten::convolution_backward": _convolved}


class EagerMode(TorchDispatchMode):
    """A mode that is never compiled."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """``False``: torch's own guard against being compiled imports the compiler."""
        return False


@functools.cache
def load_forward_formulas() -> None:
    """Load what torch loads at its first dual number, without its warning about TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(forward_ad, "_maybe_load_decompositions", lambda: None)()


def backward(
    out: Any, inputs: Sequence[Tensor], cotangent: Tensor, *, retain: bool, graph: bool
) -> Tensors:
    """``torch.autograd.grad`` of a tensor, or a place in a graph; ``None`` for no dependence."""
    if type(out) is not GradientEdge and not out.requires_grad:
        return (None,) * len(inputs)
    if _ENGINE is None or type(out) not in _ROOTS:
        return vector_jacobian((out,), inputs, (cotangent,), retain=retain, graph=graph)
    return _ENGINE.run_backward(  # as below, without another step
        (out,), (cotangent,), retain, graph, tuple(inputs), True, accumulate_grad=False
    )


_ROOTS = {Tensor, GradientEdge}


def vector_jacobian(
    outs: Sequence[Any], inputs: Sequence[Tensor], cotangents: Tensors, *, retain: bool, graph: bool
) -> Tensors:
    """``torch.autograd.grad`` of tensors that require grad, without its checks if possible.

    They take as long as the backward pass of a small layer, and half a second to import.
    """
    if _ENGINE is None or not _ROOTS.issuperset(map(type, outs)):
        return torch.autograd.grad(outs, inputs, cotangents, retain, graph, allow_unused=True)
    return _ENGINE.run_backward(
        tuple(outs), tuple(cotangents), retain, graph, tuple(inputs), True, accumulate_grad=False
    )


_warn_of_fallback: Any = getattr(_FUNCTORCH, "_set_vmap_fallback_warning_enabled", lambda _: None)


@contextmanager
def quiet_fallback() -> Iterator[None]:
    """Silence torch's warning of operations that vmap runs as a loop; it is on afterwards."""
    _warn_of_fallback(False)
    try:
        yield
    finally:
        _warn_of_fallback(True)


_ZEROS = itertools.repeat(0)


def over_basis(function: Callable[..., Tensors], *vectors: Tensor) -> Tensors:
    """``function`` of each of ``vectors`` ``(k, ...)`` at once; ``None`` results stay ``None``.

    Equals ``torch.vmap(function, randomness="same")``, which runs in compiled code and without
    this private API, but for its handling of trees, which costs more than a small backward pass.
    """
    if torch.compiler.is_compiling() or not hasattr(_FUNCTORCH, "_vmap_increment_nesting"):
        return _by_vmap(function, vectors)
    count, results = len(vectors[0]), []
    level = _FUNCTORCH._vmap_increment_nesting(count, "same")
    _warn_of_fallback(False)  # an operation without a batching rule runs as a loop in torch
    try:
        outs = function(*map(_FUNCTORCH._add_batch_dim, vectors, _ZEROS, itertools.repeat(level)))
        for out in outs:
            is_zero = out is None
            results.append(None if is_zero else _FUNCTORCH._remove_batch_dim(out, level, count, 0))
        return results
    finally:
        _warn_of_fallback(True)
        _FUNCTORCH._vmap_decrement_nesting()


def _by_vmap(function: Callable[..., Tensors], vectors: tuple[Tensor, ...]) -> Tensors:
    is_absent: list[bool] = []

    def present(*vectors: Tensor) -> tuple[Tensor, ...]:
        outs = function(*vectors)
        is_absent[:] = [out is None for out in outs]
        return tuple(out for out in outs if out is not None)

    tensors = iter(torch.vmap(present, randomness="same")(*vectors))
    return [None if absent else next(tensors) for absent in is_absent]
