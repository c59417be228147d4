"""An ``Operator`` states what a transform computes; users call a ``Transform``."""

from __future__ import annotations

import copy
import functools
import textwrap
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from funcjac._arguments import pytree
from funcjac._arguments.bind import bind, check_inputs
from funcjac._arguments.call import Call, Options
from funcjac._arguments.check_keywords import check_options
from funcjac._arguments.check_tensors import is_uninitialized
from funcjac._dispatch.attempt import Outcome
from funcjac._dispatch.inside_transforms import solve_inside
from funcjac._dispatch.rule import Sizes, first_order_route, prefers_taylor, second_order_route
from funcjac._dispatch.solve import solve
from funcjac._engines.basis import row_shape
from funcjac._engines.graph import Route
from funcjac._engines.run import Derivatives, Run
from funcjac._environment.torch_private import is_functional, is_transformed
from funcjac._verification.finite_differences import Pair
from funcjac._verification.probe import Entry, Probe

P = ParamSpec("P")
R = TypeVar("R")
Tensors = Sequence[Tensor]
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")
# The keywords that all transforms share.
KEYWORDS = tuple([f.name for f in fields(Options) if f.name not in ("name", "operator")])
# Levels of torch's forward mode belong to the process: one thread at a time.
DUAL_LEVELS = threading.RLock()

# What docstrings say in the place of {keywords} and {errors}.
_DOCUMENTATION = {
    "{keywords}": """\
in_dims: batch dimension of each positional argument, an int for all, or a tuple or prefix
    tree with ``None`` for what all rows share. A shared argument can be differentiated too:
    ``(B, *out, *param)``. What is no tensor is always shared.
out_dims: where ``func`` puts the batch dimension; results have it first.
engine: ``"sum"`` (the sum trick, by plain autograd on the one run of ``func``), ``"vmap"``
    (``torch.func`` of the function of one row under ``torch.vmap``), ``"loop"``, or
    ``"auto"``: the sum trick, vmap for arguments that rows share and inside of
    ``torch.vmap``, and the next one where one fails. ``mode="taylor"`` runs the whole batch,
    and needs ``"sum"`` or ``"auto"``.
chunk_size: basis vectors (coordinates, samples) per pass; ``None`` leaves it to the rule:
    what stays in a processor's cache, in bounded memory. It never changes values. Chunks go
    into one preallocated result; where it is to be differentiated, they are joined at the end.
has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
return_value: also return ``func``'s output, from the same run, and the Jacobian where second
    derivatives along all coordinates are computed.
randomness: ``"different"``, ``"same"`` or ``"error"`` for draws in ``func`` where
    ``torch.vmap`` or the loop runs it, as in ``torch.vmap``. In the one run of the sum trick a
    draw is what it is in a plain call.
check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call, ``False``
    none: the caller vouches for the rows. The key is the transform's keywords, the function
    with the modules, functions, strings, bools and ints that it closes over, ``training``
    flags, trees, dtypes, devices and sizes of a row, not the batch size. All transforms of
    the process share what is known of a key.""",
    "{errors}": """\
TypeError: keywords or arguments are of the wrong kind; the input or output is not real,
    floating-point and dense.
ValueError: a keyword has a bad value; no argument is batched, batch sizes differ, or the
    output is no batch.
BatchMixingError: rows of the output depend on other rows of the input.
VerificationError: no engine agrees with plain autograd, or autograd cannot see how the
    output depends on the input.
RuntimeError: the engine and mode that were asked for cannot differentiate ``func``; ``func``
    draws random numbers and ``randomness`` is ``"error"``. What ``func`` raises itself is
    passed on as it is.""",
}


def documented(function: Callable[P, R]) -> Callable[P, R]:
    """Completes a docstring by what all transforms have in common."""
    if function.__doc__:  # there is none under python -OO
        for name, text in _DOCUMENTATION.items():
            text = textwrap.indent(text, " " * 8).lstrip()
            function.__doc__ = function.__doc__.replace(name, text)
    return function


# --- what a transform computes ---------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """What one transform computes, of one run or of one row, and how it is verified.

    Attributes:
        modes: what ``mode`` may be, beside ``"auto"``.
        is_second_order: whether ``func`` is differentiated more than once.
        is_jacobian: whether each block is the whole derivative of an output by an input.
    """

    modes: ClassVar[tuple[str, ...]] = ("fwd", "rev")
    is_second_order: ClassVar[bool] = False
    is_jacobian: ClassVar[bool] = False

    def keywords(self) -> list[str]:
        """The operator's own keywords that differ from their defaults, printed."""
        return []

    def prepare(self, call: Call, args: Any, kwargs: Any) -> Call:
        """Refuse bad inputs, and add the operator's own tensors to a call."""
        del args, kwargs
        return call

    def count(self, call: Call, outputs: int, inputs: int) -> tuple[int, int, int]:
        """First and second derivatives of each output, and gradients differentiated further."""
        del call, outputs
        return inputs, 0, 0

    def route(self, call: Call, sizes: Sizes) -> Route:
        """The mode and the chunk that the rule gives."""
        return first_order_route(call.options.mode, call.options.chunk_size, sizes)

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        """Whether operations are recorded as ``func`` runs."""
        del call, outputs, inputs
        return False

    def check_output(self, call: Call, outs: Sequence[Tensor]) -> None:
        """Refuse what ``func`` returned, before any differentiation."""

    def adds_jac(self, call: Call) -> bool:
        """Whether the Jacobian is returned as well: the last blocks of each output."""
        del call
        return False

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        """For each block: the inputs that it is differentiated by, with axes of their own."""
        return [(j,) for j in range(len(call.layout.diff))]

    def compute(self, run: Run, route: Route) -> Derivatives:
        """Derivatives through the graph, or the record, of one run."""
        raise NotImplementedError

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        """The same of one row by torch.func: blocks by output, and what comes along."""
        raise NotImplementedError

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        """What blocks contracted with a cotangent must come to, by plain autograd."""
        pairs = zip(probe.grads, run.inputs, run.dims)
        return [Entry(probe.seeds, grad, x, dim) for grad, x, dim in pairs]

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """What central differences say, and what was computed."""
        raise NotImplementedError

    def tree(self, call: Call, result: Derivatives) -> Any:
        """The user's tree: output structure outside, input structure inside."""
        raise NotImplementedError

    def assemble(self, call: Call, result: Derivatives) -> Any:
        """The user's tree with aux, with the value, and with the Jacobian."""
        options, output, tree = call.options, result.output, self.tree(call, result)
        if not options.return_value:
            return (tree, output.aux) if options.has_aux else tree
        value = pytree.unflatten(output.spec, output.leaves)
        rest = (value, output.aux) if options.has_aux else value
        if not self.adds_jac(call):
            return tree, rest
        spec, n = call.layout.in_spec, len(call.layout.diff)
        jac = by_output(result, lambda blocks: pytree.unflatten(spec, blocks[-n:]))
        return tree, (jac, rest)


class SecondOrder(Operator):
    """A second-order transform: blocks of its own, then the Jacobian where it is returned."""

    modes: ClassVar[tuple[str, ...]] = ("taylor", *NESTED)
    is_second_order: ClassVar[bool] = True

    def uses_taylor(self, call: Call, outputs: int, inputs: int) -> bool:
        options = call.options
        if options.mode != "auto" or options.engine not in ("auto", "sum"):
            return options.mode == "taylor"
        return prefers_taylor(outputs, self.count(call, outputs, inputs))

    def route(self, call: Call, sizes: Sizes) -> Route:
        counts = self.count(call, sizes.outputs, sizes.inputs)
        return second_order_route(call.options.mode, call.options.chunk_size, sizes, counts)

    def adds_jac(self, call: Call) -> bool:
        return call.options.return_value

    def derivatives(self, run: Run, route: Route) -> tuple[list[Any], list[Any]]:
        """By output: values of the operator's own blocks, and those of the Jacobian."""
        raise NotImplementedError

    def row_derivatives(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        """The same of one row by torch.func, and what comes along."""
        raise NotImplementedError

    def own_inputs(self, call: Call) -> list[tuple[int, ...]]:
        """:meth:`by_inputs` of the operator's own blocks."""
        raise NotImplementedError

    def own_entries(self, run: Run, probe: Probe) -> list[Entry]:
        """:meth:`entries` of the operator's own blocks."""
        raise NotImplementedError

    def compute(self, run: Run, route: Route) -> Derivatives:
        own, jac = self.derivatives(run, route)
        names, adds_jac = self.by_inputs(run.call), self.adds_jac(run.call)
        shapes = [row_shape(x, dim) for x, dim in zip(run.inputs, run.dims)]
        rows = []
        for i, out in enumerate(run.output.leaves):
            row = []
            for value, name in zip([*own[i], *jac[i]] if adds_jac else own[i], names):
                shape = [*out.shape, *[size for j in name for size in shapes[j]]]
                row.append(as_block(value, shape, out, [run.inputs[j] for j in name or (0,)]))
            rows.append(row)
        return Derivatives(rows, run.output)

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        own, jac, along = self.row_derivatives(call, f, xs, extras, mode)
        names, adds_jac = self.by_inputs(call), self.adds_jac(call)
        rows = []
        for i, out in enumerate(along[0]):
            values = zip([*own[i], *jac[i]] if adds_jac else own[i], names)
            inner = [
                (value, [size for j in name for size in xs[j].shape]) for value, name in values
            ]
            rows.append([value.reshape(*out.shape, *sizes) for value, sizes in inner])
        return rows, along

    def by_inputs(self, call: Call) -> list[tuple[int, ...]]:
        return self.own_inputs(call) + (super().by_inputs(call) if self.adds_jac(call) else [])

    def entries(self, run: Run, probe: Probe) -> list[Entry]:
        jac = super().entries(run, probe) if self.adds_jac(run.call) else []
        return self.own_entries(run, probe) + jac


def by_output(result: Derivatives, pick: Any) -> Any:
    return pytree.unflatten(result.output.spec, [pick(blocks) for blocks in result.blocks])


def as_block(
    value: Tensor | None, shape: Sequence[int], out: Tensor, inputs: Sequence[Tensor]
) -> Tensor:
    """A contiguous block of the type that ``out`` and ``inputs`` promote to; ``None`` for zeros."""
    dtype = out.dtype
    for x in inputs:
        if x.dtype != dtype and x.ndim:  # a number does not widen a tensor
            dtype = torch.promote_types(dtype, x.dtype)
    if value is None:
        return out.new_zeros(shape, dtype=dtype)
    value = value if value.dtype == dtype else value.to(dtype)
    return value.reshape(shape).contiguous()


def changed_keywords(thing: Any, names: Sequence[str]) -> list[str]:
    """Fields of a dataclass that differ from their defaults, printed; tensors without values."""
    printed = []
    for field in fields(thing):
        value = getattr(thing, field.name)
        if field.name not in names or value is field.default:
            continue
        if isinstance(value, (Tensor, torch.Generator)):
            printed.append(f"{field.name}=<{type(value).__name__}>")
        elif value != field.default:
            printed.append(f"{field.name}={value!r}")
    return printed


# --- what users call -------------------------------------------------------------------------


class Transform:
    """A transformed function, which can be called, printed, copied and pickled.

    Attributes:
        func: what it transforms.
        options: its keywords.
    """

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        check_options(func, options)
        self.func, self.options = func, options
        shared = [repr(getattr(options, name)) for name in KEYWORDS if name != "check"]
        self.__funcjac_key__ = (options.name, *shared, *options.operator.keywords())
        functools.update_wrapper(self, func, updated=())
        vars(self).pop("__wrapped__", None)  # it would be copied and pickled a second time

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.options.engine == "vmap" and "fwd" in self.options.mode
        if not forward or torch.compiler.is_compiling():
            return self.evaluate(args, kwargs, Outcome())
        with DUAL_LEVELS:
            return self.evaluate(args, kwargs, Outcome())

    def evaluate(self, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome) -> Any:
        """The result, with what happened on the way in ``outcome``."""
        key, operator = self.__funcjac_key__, self.options.operator
        if is_transformed():
            call = self.bind(args, kwargs)
            return operator.assemble(call, solve_inside(call, key))
        call = None if torch.is_inference_mode_enabled() else self.bind(args, kwargs)
        if call is None or any(map(_is_inference, call.leaves)):
            with torch.inference_mode(False), torch.no_grad():
                args, kwargs = usable((args, kwargs))
                return self.evaluate(args, kwargs, outcome)
        return operator.assemble(call, solve(call, key, outcome))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = bind(self.func, self.options, args, kwargs)
        check_inputs(call)
        return self.options.operator.prepare(call, args, kwargs)

    def __repr__(self) -> str:
        func, options = self.func, self.options
        brief = f"{type(func).__name__}(…)" if isinstance(func, nn.Module) else repr(func)
        name = getattr(func, "__qualname__", None) or brief.partition("\n")[0]
        keywords = [*options.operator.keywords(), *changed_keywords(options, KEYWORDS)]
        return f"{options.name}({', '.join([name, *keywords])})"

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """Bind like a function where it is an attribute of a class."""
        return self if instance is None else types.MethodType(self, instance)

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        """A copy of the function too, with modules that it closes over as they are copied."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.func = _copied(self.func, memo)
        return new


def make_transform(name: str, operator: Operator, arguments: dict[str, Any]) -> Transform:
    """What a public function returns, from the ``locals()`` that hold its arguments."""
    keywords = {keyword: arguments[keyword] for keyword in KEYWORDS}
    return Transform(arguments["func"], Options(name=name, operator=operator, **keywords))


def _copied(func: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(func, types.FunctionType) or not func.__closure__:
        return copy.deepcopy(func, memo)
    cells = tuple([_copied_cell(cell, memo) for cell in func.__closure__])
    if all(new is old for new, old in zip(cells, func.__closure__)):
        return func
    new = types.FunctionType(
        func.__code__, func.__globals__, func.__name__, func.__defaults__, cells
    )
    new.__kwdefaults__ = func.__kwdefaults__
    return functools.update_wrapper(new, func)


def _copied_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    try:
        content = cell.cell_contents
    except ValueError:  # a name that is bound later
        return cell
    if isinstance(content, types.FunctionType):
        copied = _copied(content, memo)
        return cell if copied is content else types.CellType(copied)
    if isinstance(content, nn.Module) or id(content) in memo:
        return types.CellType(copy.deepcopy(content, memo))
    return cell


def transform_of(transformed: Any, name: str) -> Transform:
    """Its argument, if it comes from a transform.

    Raises:
        TypeError: it does not come from funcjac.
    """
    if not isinstance(transformed, Transform):
        raise TypeError(
            f"{name}: expected a function returned by a funcjac transform, got "
            f"{type(transformed).__name__}. Wrap it first, as in batch_jacobian(func)."
        )
    return transformed


def _is_inference(leaf: Any) -> bool:
    if type(leaf) is not Tensor and (not isinstance(leaf, Tensor) or is_uninitialized(leaf)):
        return False
    return leaf.is_inference()


def looks(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` raise inside of transforms, where values cannot be looked at."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_functional():
            raise RuntimeError(
                f"{function.__name__}: expected to be called outside of torch.func transforms and "
                "torch.compile, where values can be looked at. Call it on plain tensors."
            )
        return function(*args, **kwargs)

    return outside


def usable(tree: Any) -> Any:
    """Copies of inference tensors, which autograd cannot save."""
    return pytree.map_tensors(lambda x: x.clone() if _is_inference(x) else x, tree)
