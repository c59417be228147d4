"""Forward or reverse, and in how many passes: the routes to a Jacobian."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from funcjac import _tree
from funcjac._native import SET_GRAD_ENABLED, with_memory

ENGINES = ("vmap", "sum", "loop")
MODES = ("fwd", "rev")
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")

# Basis elements that one pass may carry when chunk_size is None: 2**26 floats are 256 MiB.
_PASS_ELEMENTS = 2**26
_CACHED_ELEMENTS = 2**19  # 2 MiB
# A mode with this many times the passes of the other is not worth a measurement.
_HOPELESS = 4
# One pass forward costs about as much as the function, one backward about twice that.
_REVERSE_BIAS = 2
# Inputs up to which all pairs of them are propagated together for a Hessian.
_MOST_PAIRED = 12


@dataclass(frozen=True)
class Route:
    """One way to compute a Jacobian.

    Attributes:
        engine: how rows are kept apart.
        mode: ``"rev"`` pulls back the basis of the output, ``"fwd"`` pushes that of the input.
        chunk: basis vectors in one pass, ``None`` for all.
        vectorized: whether a pass carries its basis vectors at once, under vmap.
        transposed: forward mode as the transpose of a VJP, which uses reverse formulas only.
        slow: whether torch may carry basis vectors through an operation without a batching
            rule by a loop of its own.
    """

    engine: str
    mode: str
    chunk: int | None = None
    vectorized: bool = True
    transposed: bool = False
    slow: bool = False

    @property
    def how(self) -> str:
        """What sets it apart from other routes of the same engine and mode, in words."""
        words = [] if self.vectorized or self.engine == "loop" else ["one by one"]
        words += [f"{self.chunk} at once"] if self.vectorized and self.chunk else []
        words += ["transposed VJP"] if self.transposed else []
        words += ["loops inside torch"] if self.slow else []
        return ", ".join(words)

    def __str__(self) -> str:
        return f"{self.engine}/{self.mode}" + (f" ({self.how})" if self.how else "")

    @property
    def is_forward_formula(self) -> bool:
        """Whether torch's forward-mode formulas are used."""
        return "fwd" in self.mode and not self.transposed

    def is_differentiated_again(self, *, graph: bool) -> bool:
        """Whether forward formulas are used and differentiated, by this or by the user."""
        inner = self.mode.endswith("over_fwd")
        return self.is_forward_formula and (graph or inner)

    @property
    def runs_often(self) -> bool:
        """Whether ``func`` runs more than once for one Jacobian."""
        chunked = self.chunk is not None
        nested = "_over_" in self.mode
        return self.engine == "loop" or nested or (self.is_forward_formula and chunked)

    @property
    def is_functional(self) -> bool:
        """Whether ``func`` runs inside of torch.func."""
        return self.engine == "vmap" or self.is_forward_formula

    def passes(self, outputs: int, inputs: int) -> int:
        """Basis vectors to pull back or to push forward."""
        if self.mode == "taylor":
            return inputs
        counts = [outputs if mode == "rev" else inputs for mode in self.mode.split("_over_")]
        return counts[0] if len(counts) == 1 else counts[1] * inputs


# NOTE [Forward formulas that are wrong once differentiated again]
# PyTorch's forward-mode formulas of these operations are right (of some not even that), but
# their derivatives are not: forward-over-forward and reverse-over-forward give wrong numbers.
# Where a Jacobian will be differentiated again and one of them runs, "auto" goes backwards.
# Where forward mode is asked for, columns are computed as the transpose of a VJP
# (Route.transposed), which uses reverse formulas only, and verified together with their
# derivatives, for those of layer norm are wrong a third time around.
# tests/test_forward_safety.py derives the list from PyTorch's own database of operators: a
# release that mends or adds one fails that test with its name.
UNSAFE_FORWARD = frozenset(
    {
        "native_layer_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "_batch_norm_with_update",
        "_linalg_det",
        "_linalg_slogdet",
        "_linalg_solve_ex",
        "linalg_lu_solve",
        "scatter_reduce",
        "linalg_householder_product",
        "linalg_eig",
        "_linalg_eigh",
        "cholesky_inverse",
        "cumprod",
        "select_scatter",
        "_linear_cross_entropy_batch_chunked",
        "_linear_cross_entropy_batch_chunked_no_reduction",
    }
)


class Recorder(TorchDispatchMode):
    """Collects the names of what runs under it, and the dtypes that gradients flow in."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self._blocks = Blocks()

    @property
    def is_forward_safe(self) -> bool:
        """Whether forward formulas of all that ran may be differentiated again.

        They see through a ``no_grad`` block.
        """
        return UNSAFE_FORWARD.isdisjoint(self.names) and not self._blocks.seen

    def __enter__(self) -> "Recorder":
        self._blocks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._blocks.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.names |= {name, f"{name}.{func._overloadname}"}
        self.dtypes |= {x.dtype.to_real() for x in _tree.tensors(args) if x.requires_grad}
        return func(*with_memory(args), **with_memory(kwargs or {}))


class Blocks(TorchFunctionMode):
    """Notes numbers made of others in a ``no_grad`` block: forward formulas see through it."""

    seen = inside = False

    def __torch_function__(self, func: Any, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        if func is SET_GRAD_ENABLED:
            self.inside = args == (False,)
        elif self.inside and not self.seen:
            made = found is None or _has_numbers(found)  # None: written into another
            self.seen = made and _has_numbers((args, kwargs))
        return found


def _has_numbers(tree: Any) -> bool:
    return any(x.is_floating_point() or x.is_complex() for x in _tree.tensors(tree))


def prefers_forward(outputs: int, inputs: int) -> bool:
    return _REVERSE_BIAS * inputs < outputs


def routes(
    engine: str,
    mode: str,
    chunk_size: int | None,
    sizes: tuple[int, int, int],
    *,
    on_cpu: bool = True,
) -> list[Route]:
    """Routes in order, for ``sizes`` (batch, elements of an output row, of an input row)."""
    batch, outputs, inputs = sizes
    forward_first = mode == "fwd" or (mode == "auto" and prefers_forward(outputs, inputs))
    order = ("fwd", "rev") if forward_first else ("rev", "fwd")
    modes = order if mode == "auto" else (mode,)
    width = batch * max(outputs, inputs)
    found = []
    for e in ENGINES:
        for m in modes if engine in ("auto", e) else ():
            count, other = (outputs, inputs) if m == "rev" else (inputs, outputs)
            chunk = chunk_size or _chunk(count, width)
            if chunk is None and on_cpu and e == "sum":
                chunk = _in_cache(count, batch * other)
            found += _variants(e, m, chunk)
    if engine == "auto":  # vmap in the mode that the sizes call for, then on to the next engine
        found = [r for r in found if r.engine != "vmap" or r.mode == modes[0]]
    return found


def second_routes(
    options: Any, sizes: tuple[int, int, int], on_cpu: bool, *, first: str, modes: tuple[str, ...]
) -> list[Route]:
    """Routes to second derivatives: ``first`` is the engine that comes first, or Taylor.

    ``modes`` are the nested ones that are worth trying when nobody asks for one.
    """
    del on_cpu
    engine, mode, (batch, outputs, inputs) = options.engine, options.mode, sizes
    found = []
    pairs = first == "taylor" or (options.chunk_size is None and inputs <= _MOST_PAIRED)
    if mode in ("auto", "taylor") and engine in ("auto", "sum") and pairs:
        chunk = options.chunk_size
        found += [Route("sum", "taylor", chunk), Route("sum", "taylor", chunk, slow=True)]
    modes = modes if mode == "auto" else (mode,) if mode != "taylor" else ()
    order = ("sum", "vmap", "loop") if first == "taylor" else ENGINES
    nested: list[Route] = []
    chunk = options.chunk_size or _chunk_of_both(batch, outputs, inputs)
    for e in order:
        for m in modes if engine in ("auto", e) else ():
            # What func runs may change later on: no forward formula is chosen unasked.
            nested += _variants(e, m, chunk)
    nested = [r for r in nested if mode != "auto" or not r.is_forward_formula]
    nested.sort(key=lambda route: route.transposed)
    return found + nested if first == "taylor" else nested + found


def partial_routes(options: Any, sizes: tuple[int, int, int], on_cpu: bool) -> list[Route]:
    """Routes to mixed partial derivatives: Taylor, or one backward pass after another."""
    del sizes, on_cpu
    engine, mode, chunk = options.engine, options.mode, options.chunk_size
    found = []
    if mode in ("auto", "taylor") and engine in ("auto", "sum"):
        found += [Route("sum", "taylor", chunk), Route("sum", "taylor", chunk, slow=True)]
    if mode == "taylor":
        return found
    engines = ("sum", "vmap", "loop") if engine == "auto" else (engine,)
    for e in engines:
        found.append(Route(e, "rev" if mode == "auto" else mode, chunk, vectorized=False))
    return found


def _chunk_of_both(batch: int, outputs: int, inputs: int) -> int | None:
    """Basis vectors in one pass of either level, so that both together stay within a size."""
    width = batch * max(outputs, inputs)
    fitting = max(int((_PASS_ELEMENTS / max(width, 1)) ** 0.5), 1)
    return None if fitting >= max(outputs, inputs) else fitting


def _variants(engine: str, mode: str, chunk: int | None) -> Iterator[Route]:
    for transposed in (False, True) if "fwd" in mode else (False,):
        if engine == "loop":
            yield Route(engine, mode, 1, vectorized=False, transposed=transposed)
            continue
        if chunk != 1 or engine == "vmap":
            yield Route(engine, mode, chunk, transposed=transposed)
        if engine == "sum":
            if chunk != 1:
                yield Route(engine, mode, chunk, transposed=transposed, slow=True)
            yield Route(engine, mode, 1, vectorized=False, transposed=transposed)


def _chunk(count: int, width: int) -> int | None:
    """Basis vectors in one pass so that a pass stays within a fixed size, or ``None`` for all."""
    fitting = max(_PASS_ELEMENTS // max(width, 1), 1)
    return None if fitting >= count else fitting


def _in_cache(count: int, width: int) -> int | None:
    """Basis vectors whose results of ``width`` numbers stay in the cache together, if not all.

    A large result that is computed in one piece is written twice, to fresh memory each time,
    whose page faults cost more than further passes.
    """
    fitting = max(_CACHED_ELEMENTS // max(width, 1), 2)
    return None if fitting >= count else -(-count // -(-count // fitting))


def is_worth_a_try(route: Route, best: Route, outputs: int, inputs: int) -> bool:
    """Whether ``route`` could be the cheaper one, by the number of its passes."""
    if route.engine == "loop":
        return False
    return route.passes(outputs, inputs) < _HOPELESS * max(best.passes(outputs, inputs), 1)


def sizes_of(rows: Iterable[torch.Tensor], dims: Iterable[int | None]) -> int:
    """Elements of one row of all ``rows`` together."""
    return sum(
        row.numel() // max(row.shape[dim], 1) if dim is not None else row.numel()
        for row, dim in zip(rows, dims)
    )
