"""From PyTorch's databases to batched functions: three rows of one sample.

A *unit* is an operator, or a module in train or eval mode. A *case* is one sample of it in
one form: ``stack`` runs the rows one after the other, ``vmap`` lets torch batch them, ``batch``
is a module on a batch of its own. The databases are private to PyTorch: where a release moves
them, ``units`` fails at once.
"""

import copy
import functools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.tensors import set_seed

f64 = torch.float64
ROWS = 3
# A sample is taken whole up to these sizes of a row, else a few of its elements are moved.
MOST_IN, MOST_OUT, MOST_PRODUCT = 40, 40, 480
FEW = 6
HUGE = 200_000


@dataclass(frozen=True)
class Parts:
    """A batched function, the same function of one row, and the module in it."""

    row: Callable[..., tuple[Tensor, ...]]
    func: Callable[..., Any]
    module: nn.Module | None = None


@dataclass(frozen=True)
class Case:
    """One sample in one form.

    Attributes:
        make: fresh parts, the same ones every time.
        args: batched arguments, rows first.
        argnums: which of them are differentiated.
        constants: other tensors that the function holds.
        independent: whether rows are, as far as values tell.
        source: the same for forms of the same rows, which have the same derivatives.
    """

    unit: str
    name: str
    make: Callable[[], Parts]
    args: tuple[Tensor, ...]
    argnums: tuple[int, ...]
    constants: tuple[Tensor, ...] = ()
    independent: bool = True
    source: str = ""


@dataclass(frozen=True)
class Skipped:
    unit: str
    name: str
    reason: str


@dataclass(frozen=True)
class Unit:
    name: str
    cases: Callable[[int, int], Iterator[Case | Skipped]] = field(repr=False)


class Unusable(Exception):
    """A sample that is no case, and why."""


def units() -> list[Unit]:
    """All operators and modules."""
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    found = [Unit(f"op {op.full_name}", functools.partial(op_cases, op)) for op in op_db]
    found += [
        Unit(f"{info.name} {mode}", functools.partial(module_cases, info, mode == "train"))
        for info in module_db
        for mode in ("eval", "train")
    ]
    names: dict[str, int] = {}
    for i, unit in enumerate(found):  # a few operators are there twice
        names[unit.name] = names.get(unit.name, 0) + 1
        if names[unit.name] > 1:
            found[i] = Unit(f"{unit.name} ({names[unit.name]})", unit.cases)
    return found


def rng_of(*words: object) -> random.Random:
    """The same draw for the same words, in every process."""
    return random.Random(zlib.crc32(repr(words).encode()))


# --- operators ---------------------------------------------------------------------------


def op_cases(op: Any, samples: int, seed: int) -> Iterator[Case | Skipped]:
    unit = f"op {op.full_name}"
    if not op.supports_autograd:
        yield Skipped(unit, "", "has no derivative, as the database says")
        return
    if not op.supports_dtype(f64, "cpu"):
        yield Skipped(unit, "", "does not run in float64 on CPUs")
        return
    set_seed(seed)
    given = list(op.sample_inputs("cpu", f64, requires_grad=True))

    def piece(i: int) -> Callable[[], tuple[Any, Any]]:
        sample = given[i]

        def call(tree: Any) -> Any:
            value, args, kwargs = tree
            # Wrappers keep the input in the domain: symmetric, triangular, masked.
            out = op.gradcheck_wrapper(op.get_op(), value, *args, **kwargs)
            return sample.output_process_fn_grad(out)

        return lambda: ((sample.input, sample.args, sample.kwargs), lambda: (call, None))

    yield from _chosen(unit, len(given), piece, samples, seed)


def _chosen(unit, count, piece, samples, seed) -> Iterator[Case | Skipped]:
    """Small samples, spread over the list; others with a few of their elements moved."""
    order = list(dict.fromkeys([count // 2, 0, count - 1]))
    rest = [i for i in range(count) if i not in order]
    rng_of(unit, seed).shuffle(rest)
    taken, large, reasons = 0, [], []
    for i in (order + rest)[: 3 * samples + 3] if count else []:
        if taken >= samples:
            break
        try:
            cases = list(_forms(unit, str(i), *piece(i)(), seed))
        except _TooLarge:
            large.append(i)
            continue
        except Unusable as error:
            reasons.append((i, str(error)))
            continue
        taken += 1
        yield from cases
    for i in large[: samples - taken]:
        try:
            cases = list(_forms(unit, f"{i} few", *piece(i)(), seed, few=True))
        except Unusable as error:
            reasons.append((i, str(error)))
            continue
        taken += 1
        yield from cases
    for i, reason in reasons:
        yield Skipped(unit, str(i), reason)
    if not taken and not reasons:
        yield Skipped(unit, "", "has no samples")


class _TooLarge(Exception):
    pass


# --- one sample --------------------------------------------------------------------------


def _forms(unit, name, tree, make_call, seed, *, few=False) -> Iterator[Case]:
    """``stack``, and ``vmap`` where torch gives the same values by it."""
    row_of, rows, constants = _row(unit, name, tree, make_call, seed, few)
    args = tuple(torch.stack(column) for column in zip(*rows))

    def make(form: str) -> Parts:
        row, module = row_of()
        return Parts(row, {"stack": _stacked, "vmap": _mapped}[form](row), module)

    argnums = tuple(range(len(args)))
    rest = (args, argnums, constants, True, name)
    yield Case(unit, f"{name} stack", lambda: make("stack"), *rest)
    if _same_by_vmap(make, args):
        yield Case(unit, f"{name} vmap", lambda: make("vmap"), *rest)


def _row(unit, name, tree, make_call, seed, few):
    """A function of one row, its rows of arguments, and constants."""
    leaves, spec = tree_flatten(tree)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.layout != torch.strided or leaf.is_nested):
            raise Unusable("has sparse or nested tensors")
    where = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    if not where:
        raise Unusable("nothing to differentiate")
    if any(leaves[i].dtype != f64 for i in where):
        raise Unusable("has inputs of another dtype")
    leaves = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
    size = sum(leaves[i].numel() for i in where)
    if size == 0:
        raise Unusable("has empty inputs")
    if size > HUGE:
        raise Unusable("is huge")

    def bare() -> tuple[Callable[..., list[Tensor]], nn.Module | None]:
        call, module = make_call()

        def function(*inputs: Tensor) -> list[Tensor]:
            given = list(leaves)
            for i, x in zip(where, inputs):
                given[i] = x
            return _real_leaves(call(tree_unflatten(given, spec)))

        return function, module

    base = [leaves[i] for i in where]
    function, _ = bare()
    outs, kept, drawn = _look(function, base)
    outputs = sum(outs[k].numel() for k in kept)
    if outputs == 0:
        raise Unusable("has empty outputs")
    fits = size <= MOST_IN and outputs <= MOST_OUT and size * outputs <= MOST_PRODUCT
    if not fits and not few:
        raise _TooLarge
    seeded = functools.partial(_seeded, drawn=drawn)
    rng = torch.Generator().manual_seed(zlib.crc32(f"{unit} {name} {seed}".encode()))

    if fits:

        def row_of():
            function, module = bare()
            return seeded(lambda *inputs: tuple(function(*inputs)[k] for k in kept)), module

        rows = _perturbed(row_of()[0], base, rng)
    else:
        picks, spread = _few_inputs(base, rng)
        chosen = _few_outputs(seeded(lambda *i: tuple(function(*i))), base, spread, kept, rng)

        def row_of():
            function, module = bare()

            def row(*moved: Tensor) -> tuple[Tensor, ...]:
                full = [
                    (x + basis @ z).reshape(like.shape)
                    for x, basis, z, like in zip(fixed, spread, moved, base)
                ]
                found = function(*full)
                return tuple(found[k].reshape(-1)[index] for k, index in chosen)

            return seeded(row), module

        # As numbers of their own size, they are rounded as they would be elsewhere.
        flat = [x.reshape(-1) for x in base]
        moving = [x.isfinite() & (basis != 0).any(1) for x, basis in zip(flat, spread)]
        start = [basis.mT @ torch.where(m, x, 0) for x, basis, m in zip(flat, spread, moving)]
        fixed = [torch.where(m, 0, x) for x, m in zip(flat, moving)]
        row, moves = row_of()[0], [torch.zeros(len(p), dtype=f64) for p in picks]
        rows = _perturbed(lambda *m: row(*map(torch.add, start, m)), moves, rng)
        rows = [list(map(torch.add, start, moves)) for moves in rows]
    constants = tuple(
        x for i, x in enumerate(leaves) if isinstance(x, Tensor) and (i not in where or not fits)
    )
    return row_of, rows, constants


def _real_leaves(out: Any) -> list[Tensor]:
    leaves = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
    if any(x.layout != torch.strided or x.is_nested for x in leaves):
        raise Unusable("has sparse or nested outputs")
    return [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in leaves]


def _look(function, base) -> tuple[list[Tensor], list[int], bool]:
    """Outputs, which of them are differentiable, and whether they are drawn at random."""
    found = []
    for seed in (1, 1, 2):
        with torch.random.fork_rng(devices=[]):
            set_seed(seed)
            before = torch.get_rng_state()
            try:
                found.append(function(*[_attached(x) for x in base]))
            except Unusable:
                raise
            except Exception as error:
                raise Unusable(f"does not run: {type(error).__name__}") from error
            drawn = not torch.equal(before, torch.get_rng_state())
    outs = found[0]
    kept = [k for k, x in enumerate(outs) if x.is_floating_point() and x.requires_grad]
    if not kept:
        raise Unusable("has no differentiable output")
    for k in kept:
        if not torch.equal(outs[k].nan_to_num(), found[1][k].nan_to_num()):
            raise Unusable("is not deterministic, for a given seed")
    return outs, kept, drawn


def _attached(x: Tensor) -> Tensor:
    """Not a leaf, for operators that work in place."""
    return x.clone().requires_grad_().clone() if x.is_floating_point() else x


def _seeded(row, *, drawn: bool):
    """``row`` with the same draw every time, and nothing drawn from the caller's generator."""
    if not drawn:
        return row

    def fixed(*args: Tensor) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            set_seed(5)
            return row(*args)

    return fixed


def _few_inputs(base: list[Tensor], rng: torch.Generator):
    """Which elements move, and matrices ``(numel, moves)`` that move them towards the mean."""
    share = max(2, FEW // len(base))
    picks, spread = [], []
    for x in base:
        index = torch.randperm(x.numel(), generator=rng)[: min(share, x.numel())]
        matrix = torch.zeros(x.numel(), len(index), dtype=f64)
        flat = x.reshape(-1)
        matrix[index, torch.arange(len(index))] = torch.where(flat > flat.mean(), -1, 1)[index].to(
            f64
        )
        picks.append(index)
        spread.append(matrix)
    return picks, spread


def _to_mean(x: Tensor) -> Tensor:
    """Signs of moves by which probabilities stay such."""
    return torch.where(x > x.mean(), -1, 1).to(f64)


def _few_outputs(function, base, spread, kept, rng):
    """Some elements of each output, most of them such as move with the input."""
    moved = [
        (x.reshape(-1) + m @ (0.01 * torch.rand(m.shape[1], generator=rng, dtype=f64))).view_as(x)
        for x, m in zip(base, spread)
    ]
    with torch.no_grad():
        before, after = function(*base), function(*moved)
    chosen = []
    for k in kept:
        differs = (before[k] != after[k]).reshape(-1).double()
        order = torch.rand(len(differs), generator=rng, dtype=f64) - differs
        order = order.argsort()
        share = max(1, FEW // len(kept))
        chosen.append((k, order[:share]))
    return chosen


def _perturbed(row, base: list[Tensor], rng: torch.Generator) -> list[list[Tensor]]:
    """The sample and copies nearby, as far off as the domain of the function allows."""
    with torch.no_grad():
        first = row(*[x.clone() for x in base])
    for move in (_around, _inwards):
        size = 0.1
        while size > 1e-5:
            rows = [base, *[[move(x, size, rng) for x in base] for _ in range(ROWS - 1)]]
            if all(_is_like(row, moved, first) for moved in rows[1:]):
                return rows
            size /= 10
    raise Unusable("does not run nearby")


def _around(x: Tensor, size: float, rng: torch.Generator) -> Tensor:
    noise = [torch.rand(x.shape, generator=rng, dtype=f64) - 0.5 for _ in range(2)]
    return x * (1 + size * noise[1]) + size * 0.2 * noise[0]


def _inwards(x: Tensor, size: float, rng: torch.Generator) -> Tensor:
    """Between the least and the largest element, for probabilities and the like."""
    towards = x.mean() - x if x.any() else 1
    return x + size * torch.rand(x.shape, generator=rng, dtype=f64) * towards


def _is_like(row, inputs, first) -> bool:
    try:
        with torch.no_grad():
            found = row(*[x.clone() for x in inputs])
    except Exception:
        return False
    return all(
        a.shape == b.shape and bool((a.isfinite() | ~b.isfinite()).all())
        for a, b in zip(found, first)
    )


# --- forms -------------------------------------------------------------------------------


def _single(outs: tuple[Tensor, ...]) -> Any:
    return outs[0] if len(outs) == 1 else tuple(outs)


def _stacked(row):
    def func(*args: Tensor) -> Any:
        # Clones, as as_strided reaches through a view into the rows beside it.
        rows = [row(*[x.clone() for x in inputs]) for inputs in zip(*[x.unbind(0) for x in args])]
        return _single(tuple(torch.stack(column) for column in zip(*rows)))

    return func


def _mapped(row):
    return torch.vmap(lambda *inputs: _single(row(*inputs)))


def _same_by_vmap(make, args) -> bool:
    """Whether torch can batch the row, and gets its values right."""
    try:
        right = optree.tree_leaves(make("stack").func(*[x.clone() for x in args]))
        found = optree.tree_leaves(make("vmap").func(*[x.clone() for x in args]))
        return all(
            torch.allclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)
            for a, b in zip(right, found)
        )
    except Exception:
        return False


# --- modules -----------------------------------------------------------------------------


def module_cases(info: Any, training: bool, samples: int, seed: int) -> Iterator[Case | Skipped]:
    unit = f"{info.name} {'train' if training else 'eval'}"
    set_seed(seed)
    given = info.module_inputs_func(
        info, device="cpu", dtype=f64, requires_grad=True, training=training
    )
    given = [sample for sample in given if sample.forward_input is not None]

    @functools.cache
    def built(i: int) -> nn.Module:
        words = given[i].constructor_input
        with torch.random.fork_rng(devices=[]):
            set_seed(seed)
            module = info.module_cls(*words.args, **words.kwargs).to(f64)
            if any(map(torch.nn.parameter.is_lazy, module.parameters())):
                forward = given[i].forward_input
                with torch.no_grad():
                    module(*forward.args, **forward.kwargs)
        return module.train(training)

    def piece(i: int):
        def make_call():
            module = copy.deepcopy(built(i))
            return lambda tree: module(*tree[0], **tree[1]), module

        def tree_and_call():
            try:
                built(i)
            except Exception as error:
                raise Unusable(f"cannot be made: {type(error).__name__}") from error
            forward = given[i].forward_input
            return (forward.args, forward.kwargs), make_call

        return tree_and_call

    yield from _chosen(unit, len(given), piece, samples, seed)
    for i in list(dict.fromkeys([len(given) // 2, 0]))[:samples] if given else []:
        try:
            yield from _batched(unit, f"{i} batch", *piece(i)(), seed)
        except Unusable as error:
            yield Skipped(unit, f"{i} batch", str(error))


def _batched(unit, name, tree, make_call, seed) -> Iterator[Case]:
    """The module on the batch that the sample is, up to three rows of it."""
    leaves, spec = tree_flatten(tree)
    tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    diff = [i for i in tensors if leaves[i].requires_grad and leaves[i].dtype == f64]
    if not diff or any(leaves[i].ndim == 0 for i in diff):
        raise Unusable("has no batch of its own")
    batch = leaves[diff[0]].shape[0]
    if batch < 2 or any(leaves[i].shape[0] != batch for i in diff):
        raise Unusable("has no batch of its own")
    rows = min(batch, ROWS)
    mapped = [i for i in tensors if leaves[i].ndim and leaves[i].shape[0] == batch]
    leaves = [
        x.detach().clone()[:rows] if i in mapped else x.detach().clone() if i in tensors else x
        for i, x in enumerate(leaves)
    ]

    def function_of(call):
        def function(*inputs: Tensor) -> list[Tensor]:
            given = list(leaves)
            for i, x in zip(mapped, inputs):
                given[i] = x
            return _real_leaves(call(tree_unflatten(given, spec)))

        return function

    call, _ = make_call()
    outs, kept, drawn = _look(function_of(call), [leaves[i] for i in mapped])
    if any(outs[k].ndim == 0 or outs[k].shape[0] != rows for k in kept):
        raise Unusable("has no batch of its own")
    rng = torch.Generator().manual_seed(zlib.crc32(f"{unit} {name} {seed}".encode()))
    picks = {
        i: torch.randperm(leaves[i][0].numel(), generator=rng)[: max(2, FEW // len(diff))]
        for i in diff
    }
    spread = {}
    for i, index in picks.items():
        spread[i] = torch.zeros(len(index), leaves[i][0].numel(), dtype=f64)
        spread[i][torch.arange(len(index)), index] = _to_mean(leaves[i])[0].reshape(-1)[index]
    total = sum(outs[k][0].numel() for k in kept)
    every = max(1, total // FEW)
    chosen = [(k, torch.arange(0, outs[k][0].numel(), every)) for k in kept]

    def make() -> Parts:
        call, module = make_call()
        function = function_of(call)

        def on_batch(*args: Tensor) -> tuple[Tensor, ...]:
            size = args[0].shape[0]
            moves, others = args[: len(diff)], args[len(diff) :]
            full = dict(zip([i for i in mapped if i not in diff], others[len(diff) :]))
            for i, move, start in zip(diff, moves, others):
                full[i] = start + (move @ spread[i]).reshape(size, *leaves[i].shape[1:])
            outs = function(*[full[i] for i in mapped])
            return tuple(outs[k].reshape(size, -1)[:, index] for k, index in chosen)

        seeded = _seeded(on_batch, drawn=drawn)

        def row(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(out[0] for out in seeded(*[x.unsqueeze(0) for x in inputs]))

        return Parts(row, lambda *args: _single(seeded(*args)), module)

    args = [0.01 * torch.rand(rows, len(picks[i]), generator=rng, dtype=f64) for i in diff]
    args += [leaves[i] for i in diff]
    args += [leaves[i] for i in mapped if i not in diff]
    independent = _is_independent(make, tuple(args))
    argnums = tuple(range(len(diff)))
    constants = tuple(leaves[i] for i in tensors if i not in mapped)
    yield Case(unit, name, make, tuple(args), argnums, constants, independent, name)


def _is_independent(make, args) -> bool:
    """Whether no row of the output moves with another row of the inputs."""
    outs = optree.tree_leaves(make().func(*args))
    for b in range(args[0].shape[0]):
        moved = [x.clone() for x in args]
        for x in moved:
            if x.is_floating_point():
                x[b] += 0.01 * (x.mean() - x[b]) if x.unique().numel() > 1 else 0.001
        others = [i for i in range(args[0].shape[0]) if i != b]
        for out, after in zip(outs, optree.tree_leaves(make().func(*moved))):
            if not torch.allclose(out[others], after[others], 1e-9, 1e-11, equal_nan=True):
                return False
    for b in range(args[0].shape[0]):
        try:
            row = make().row(*[x[b] for x in args])
        except Exception as error:
            raise Unusable("does not run on a batch of one") from error
        for out, alone in zip(outs, row):
            if not torch.allclose(out[b], alone, rtol=1e-9, atol=1e-11, equal_nan=True):
                raise Unusable("means something else on a batch of one")
    return True
