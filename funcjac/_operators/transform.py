"""``Transform``: the object that a transform returns, to call, print, copy and pickle."""

from __future__ import annotations

import copy
import functools
import inspect
import textwrap
import threading
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack as Unpack  # which torch and optree require

from funcjac._arguments import pytree
from funcjac._arguments.call import bind
from funcjac._arguments.check_keywords import check_options
from funcjac._arguments.check_tensors import is_uninitialized
from funcjac._arguments.layout import Options
from funcjac._dispatch.attempt import Outcome
from funcjac._dispatch.inside_transforms import solve_inside
from funcjac._dispatch.solve import solve
from funcjac._environment.torch_private import is_functional, is_transformed, whole
from funcjac._operators.operator import Operator, changed_keywords
from funcjac.errors import refuse

Public = TypeVar("Public", bound=Callable[..., Any])
# The keywords that all transforms share, in their order.
KEYWORDS = tuple([f.name for f in fields(Options) if f.name not in ("name", "operator")])


class Keywords(TypedDict, total=False):
    """The types of the keywords behind ``argnums``; :class:`Options` has their defaults."""

    in_dims: Any
    out_dims: Any
    mode: str
    engine: str
    chunk_size: int | None
    has_aux: bool
    return_value: bool
    randomness: str
    check: bool | str


# Levels of torch's forward mode belong to the process: one thread at a time.
DUAL_LEVELS = threading.RLock()

# Texts of docstrings, in the place of a name in braces.
_DOCUMENTATION = {
    "{keywords}": """\
in_dims: batch dimension of each positional argument, an int for all, or a tuple or prefix
    tree with ``None`` for what all rows share. A shared argument can be differentiated too:
    ``(B, *out, *param)``. What is no tensor is always shared.
out_dims: where ``func`` puts the batch dimension; results have it first.
engine: ``"sum"`` (the sum trick, by plain autograd on the one run of ``func``), ``"vmap"``
    (``torch.func`` of the function of one row under ``torch.vmap``), ``"loop"``, or ``"auto"``:
    the sum trick, vmap for arguments that rows share and inside of ``torch.vmap``, and the next
    one where one fails. ``mode="taylor"`` needs ``"sum"`` or ``"auto"``.
chunk_size: basis vectors (coordinates, samples) per pass; ``None`` leaves it to the rule:
    what stays in a processor's cache, in bounded memory. It never changes values.
has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object. The transform returns
    ``(result, aux)``.
return_value: also return ``func``'s output, from the same run, as ``(result, value)``, or
    ``(result, (value, aux))`` with ``has_aux``. Where second derivatives bring the Jacobian
    along, it is ``(result, (jac, value))``, or ``(result, (jac, (value, aux)))``.
randomness: ``"different"``, ``"same"`` or ``"error"`` for draws in ``func`` where
    ``torch.vmap`` or the loop runs it, as in ``torch.vmap``. In the one run of the sum trick a
    draw is what it is in a plain call.
check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call, ``False``
    none: the caller vouches for the rows. The key is the transform's keywords, the function
    with the modules, functions, strings, bools and ints that it closes over, ``training``
    flags, trees, dtypes, devices and sizes of a row, not the batch size. All transforms of
    the process share what is known of a key.""",
    "{samples}": """\
samples: estimate from so many random probes in each row (Hutchinson), without bias, instead
    of the exact sum over all coordinates.
probes: ``"rademacher"`` (entries 1 and -1) or ``"gaussian"``; rows share those of an argument
    that they share.
generator: where probes are drawn from; ``None`` for PyTorch's default.
return_error: ``(estimate, standard error)`` in place of the estimate, from the spread of at
    least two samples.""",
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


def documented(function: Public) -> Public:
    """Completes a docstring and a signature by the texts and keywords that transforms share."""
    if function.__doc__:  # there is none under python -OO
        for name, text in _DOCUMENTATION.items():
            text = textwrap.indent(text, " " * 8).lstrip()
            function.__doc__ = function.__doc__.replace(name, text)
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    kind, names = inspect.Parameter.KEYWORD_ONLY, Keywords.__annotations__
    common = [f for f in fields(Options) if f.name in names]
    shared = [inspect.Parameter(f.name, kind, default=f.default, annotation=f.type) for f in common]
    vars(function)["__signature__"] = signature.replace(parameters=[*own, *shared])
    return function


def _bound(transform: Transform, instance: Any, owner: Any = None) -> Any:
    """Binds like a function where a transform is an attribute of a class."""
    kind: Any = functools.partial if torch.compiler.is_compiling() else types.MethodType
    return transform if instance is None else kind(transform, instance)


class Binding:
    """The same for Dynamo before torch 2.13, which for a function looks on the class alone."""

    __call__ = staticmethod(_bound)

    def __get__(self, transform: Any, owner: Any = None) -> Any:
        return _bound.__call__ if transform is None else functools.partial(_bound, transform)


class Transform:
    """A transformed function, which can be called, printed, copied and pickled."""

    __get__: Any = _bound if torch.__version__ >= "2.13" else Binding()

    def __init__(self, func: Callable[..., Any], options: Options) -> None:
        check_options(func, options)
        self.func, self.options = func, options
        shared = [repr(getattr(options, name)) for name in KEYWORDS if name != "check"]
        self.__funcjac_key__ = (options.name, *shared, *options.operator.keywords())
        self._has_parts = options.return_value or options.has_aux or options.operator.has_parts
        self.__name__ = options.name  # of what has none: torch.vmap would ask for the repr
        functools.update_wrapper(self, func, updated=())
        delattr(self, "__wrapped__")  # it would be copied and pickled a second time

    @whole
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options = self.options
        if options.engine != "vmap" or "fwd" not in options.mode or torch.compiler.is_compiling():
            return self.evaluate(args, kwargs)
        with DUAL_LEVELS:
            return self.evaluate(args, kwargs)

    def evaluate(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], outcome: Outcome | None = None
    ) -> Any:
        """The result; ``outcome`` takes down what happened on the way."""
        key, options = self.__funcjac_key__, self.options
        if is_transformed():
            call = bind(self.func, options, args, kwargs, compiling=torch.compiler.is_compiling())
            result = solve_inside(call, key)
        else:
            is_inference = torch.is_inference_mode_enabled()
            call = None if is_inference else bind(self.func, options, args, kwargs)
            if call is None or any(map(_is_inference, call.leaves)):
                with torch.inference_mode(False), torch.no_grad():
                    args, kwargs = usable((args, kwargs))
                    return self.evaluate(args, kwargs, outcome)
            result = solve(call, key, outcome)
        is_tree = result.output.spec is not None or type(options.argnums) is not int
        if self._has_parts or is_tree or not call.layout.plain:
            return options.operator.assemble(call, result)
        return result.blocks[0][0]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.func)

    def __repr__(self) -> str:
        func, options = self.func, self.options
        brief = f"{type(func).__name__}(…)" if isinstance(func, nn.Module) else repr(func)
        name = getattr(func, "__qualname__", None) or brief.partition("\n")[0]
        keywords = [*options.operator.keywords(), *changed_keywords(options, KEYWORDS)]
        return f"{options.name}({', '.join([name, *keywords])})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Transform:
        """A copy of the function too, with modules that it closes over as they are copied."""
        new = copy.copy(self)
        memo[id(self)] = new
        new.func = _copied(self.func, memo)
        return new


def make_transform(
    name: str, func: Any, operator: Operator, argnums: Any, keywords: Keywords
) -> Transform:
    """Makes the result of a public function; refuses keywords that it does not have."""
    for keyword in keywords:
        if keyword not in KEYWORDS:
            raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}")
    operator.check(name)
    return Transform(func, Options(name, argnums, operator=operator, **keywords))


def _copied(func: Any, memo: dict[int, Any]) -> Any:
    if not isinstance(func, types.FunctionType) or not func.__closure__:
        return copy.deepcopy(func, memo)
    cells = tuple([_copied_cell(cell, memo) for cell in func.__closure__])
    if all(new is old for new, old in zip(cells, func.__closure__)):
        return func
    parts = func.__code__, func.__globals__, func.__name__, func.__defaults__, cells
    new = types.FunctionType(*parts)
    new.__kwdefaults__ = func.__kwdefaults__
    return functools.update_wrapper(new, func)


def _copied_cell(cell: types.CellType, memo: dict[int, Any]) -> types.CellType:
    content = None if cell == types.CellType() else cell.cell_contents  # or bound later
    if not isinstance(content, (types.FunctionType, nn.Module)) and id(content) not in memo:
        return cell
    copied = _copied(content, memo)
    return cell if copied is content else types.CellType(copied)


def transform_of(transformed: Any, name: str) -> Transform:
    """Refuses everything but the result of a transform, and being called inside of one."""
    check_outside(name)
    if not isinstance(transformed, Transform):
        expected, got = "a function returned by a funcjac transform", type(transformed).__name__
        raise refuse(name, TypeError, expected, got, "Wrap it first, as in batch_jacobian(func).")
    return transformed


def _is_inference(leaf: Any) -> bool:
    is_tensor = type(leaf) is Tensor or (isinstance(leaf, Tensor) and not is_uninitialized(leaf))
    return is_tensor and leaf.is_inference()


def check_outside(name: str) -> None:
    """Raises inside of transforms, where values cannot be looked at."""
    if is_functional():
        raise RuntimeError(
            f"{name}: expected to be called outside of torch.func transforms and torch.compile, "
            "where values can be looked at. Call it on plain tensors."
        )


def usable(tree: Any) -> Any:
    """Copies of inference tensors, which autograd cannot save."""
    return pytree.map_tensors(lambda x: x.clone() if _is_inference(x) else x, tree)
