"""``batch_jacobian``: the Jacobian of each row of a batch."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from funcjac import _tree
from funcjac._batched import Call, Operator, Options, transform_behind
from funcjac._bind import bind, check_inputs, with_extras
from funcjac._engines import Jacobian, Memory, solve, solve_transformed, solve_within
from funcjac._kinds import is_uninitialized
from funcjac._modes import MODES, prefers_forward, routes
from funcjac._native import is_transformed
from funcjac._operators import with_elements, with_empty
from funcjac._passes import jacobian
from funcjac._state import levels_of_others
from funcjac._words import check_options

P = ParamSpec("P")
R = TypeVar("R")
# What an operator needs beside the arguments: tensors and their batch dimensions.
Extras = Callable[..., tuple[list[Tensor], tuple["int | None", ...]]]


@dataclass(frozen=True)
class Transform:
    """What a transformed function is made of, for ``explain`` and for nesting."""

    func: Callable[..., Any]
    options: Options
    extras: Extras | None = None
    memory: Memory = field(default_factory=Memory)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        call = bind(self.func, self.options, self.memory.layouts, args, kwargs)
        check_inputs(call)
        if self.extras is None:
            return call
        leaves, dims = self.extras(call, args, kwargs)
        return with_extras(call, self.memory.layouts, leaves, dims)

    def within(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, clone: bool, simply: bool
    ) -> Any:
        """The result as a level of another transform, which verifies the two together."""
        call = self.bind(args, kwargs)._replace(clone=clone, simply=simply)
        return self.result(call, solve_within)

    def result(self, call: Call, solve: Callable[[Call, Memory], Jacobian]) -> Any:
        full = with_elements(call, self.memory.layouts)
        found = solve(full, self.memory)
        found = found if full is call else with_empty(call, found)
        return self.options.operator.assemble(call, found)


def batch_jacobian(
    func: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    in_dims: Any = 0,
    out_dims: Any = 0,
    mode: str = "auto",
    engine: str = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    return_value: bool = False,
    randomness: str = "error",
    check: bool | str = "auto",
) -> Callable[..., Any]:
    """Computes the Jacobian of each row of a batch.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives
    ``J[b] = d func(x)[b] / d x[b]``, of shape ``(B, *out, *in)``, and never the
    ``(B, *out, B, *in)`` of :func:`torch.autograd.functional.jacobian`. It is itself a batched
    function: ``batch_jacobian(batch_jacobian(func))`` gives second derivatives
    ``(B, *out, *in, *in)``. Like :func:`torch.func.jacrev` under :func:`torch.vmap`, except that
    ``func`` sees a batch, that keyword arguments are not mapped, that results are verified, and
    that another engine runs where ``vmap`` cannot.

    Args:
        func: a batched function: row ``b`` of its output depends on row ``b`` of its batched
            inputs alone. A function ``g`` of one sample enters as ``torch.vmap(g)``.
        argnums: positional argument or arguments to differentiate. An int adds no level to the
            result, a tuple adds a tuple inside each output leaf.
        in_dims: batch dimension of each positional argument, an int for all, or a tuple or
            prefix tree with ``None`` for what all rows share. A shared argument can be
            differentiated too: ``(B, *out, *param)``. What is no tensor is always shared.
        out_dims: where ``func`` puts the batch dimension; results have it first.
        mode: ``"rev"`` pulls back the basis of a row's output (one pass for each element),
            ``"fwd"`` pushes forward that of its input; ``"auto"`` goes by sizes and clock.
        engine: ``"vmap"``, ``"sum"`` (the sum trick, by plain autograd), ``"loop"``, or
            ``"auto"``: vmap first, what works if it fails, in the end the fastest that was
            verified.
        chunk_size: basis vectors in one pass. ``None`` for as many as keep what goes into or
            comes out of a pass within 2**26 numbers (inside of other transforms, all). It bounds
            memory and never changes values. Chunks go into one preallocated result, except
            where it is to be differentiated: there they are joined at the end.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return ``func``'s output, from the same forward pass.
        randomness: ``"different"`` draws for each row, ``"same"`` once for all rows, ``"error"``
            refuses. All columns of a row see the same draw.
        check: ``"auto"`` verifies the first call of each signature (trees, shapes, dtypes,
            devices, modes, modules that ``func`` can reach), ``True`` every call, ``False`` none.

    Returns:
        A function of the same arguments. It returns ``jac``; ``(jac, aux)`` with ``has_aux``;
        ``(jac, value)`` with ``return_value``; ``(jac, (value, aux))`` with both. ``jac`` has
        the structure of the output outside and that of the input inside. Its leaves are
        contiguous, of the dtype that output and input promote to, differentiable if grad mode is
        on and something requires grad, and zero where an output does not depend on an input.

    Raises:
        TypeError: the words or arguments are of the wrong kind, the input or output is not
            real, floating-point and dense.
        ValueError: bad ``argnums``, ``in_dims``, ``out_dims``, ``mode``, ``engine``,
            ``chunk_size``, ``randomness`` or ``check``; no batched argument; unequal batch
            sizes; an output that is no batch.
        BatchMixingError: rows of the output depend on other rows of the input.
        VerificationError: no engine agrees with plain autograd, or autograd cannot see how the
            output depends on the input.
        RuntimeError: the engine and mode that were asked for cannot differentiate ``func``;
            ``func`` draws random numbers and ``randomness`` is ``"error"``. What ``func``
            raises itself is passed on as it is.

    Cost: ``rev`` runs ``func`` once and pulls back as many cotangents as a row of the output has
    elements; ``fwd`` pushes as many tangents as a row of the input has elements. A pass that
    carries ``k`` of them holds ``k`` times the memory of one. The first call of a signature
    takes three or four times as long, and the next few try other engines and modes.

    Sources: torch.func (vmap, vjp, jvp); the sum trick of pytorch/functorch issue 328 and
    TensorFlow's ``batch_jacobian``; pytorch/pytorch issue 23475, which asked for this.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> jac = funcjac.batch_jacobian(torch.sin)(x)
        >>> jac.shape
        torch.Size([2, 3, 3])
        >>> torch.allclose(jac, torch.diag_embed(x.cos()))
        True
        >>> funcjac.batch_jacobian(funcjac.batch_jacobian(torch.sin))(x).shape
        torch.Size([2, 3, 3, 3])
    """
    options = Options(
        operator=JACOBIAN,
        name="batch_jacobian",
        argnums=argnums,
        in_dims=in_dims,
        out_dims=out_dims,
        mode=mode,
        engine=engine,
        chunk_size=chunk_size,
        has_aux=has_aux,
        return_value=return_value,
        randomness=randomness,
        check=check,
    )
    return transformed(func, options)


def transformed(
    func: Callable[..., Any], options: Options, extras: Extras | None = None
) -> Callable[..., Any]:
    """The function that a transform returns, with the name of what it transforms.

    Raises:
        TypeError, ValueError: bad words.
    """
    check_options(func, options)
    transform = Transform(func, options, extras)

    def function(*args: Any, **kwargs: Any) -> Any:
        return evaluate(transform, args, kwargs)

    functools.update_wrapper(function, func, updated=())
    vars(function)["__funcjac__"] = transform
    transform.memory.function = function
    return function


def evaluate(transform: Transform, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_transformed():
        others = levels_of_others([transform.func, args, kwargs])
        if others is not None:
            with others:
                return evaluate(transform, args, kwargs)
        call = transform.bind(args, kwargs)
        return transform.result(call, solve_transformed)
    if torch.is_inference_mode_enabled() or any(map(_is_inference, _tree.tensors(args))):
        with torch.inference_mode(False), torch.no_grad():
            return evaluate(transform, *usable((args, kwargs)))
    call = transform.bind(args, kwargs)
    return transform.result(call, solve)


def assemble(call: Call, result: Jacobian) -> Any:
    """Output structure outside, input structure inside; then value and aux as asked for."""
    options, output, in_spec = call.options, result.output, call.layout.in_spec
    trees = [_tree.unflatten(in_spec, blocks) for blocks in result.blocks]
    jac = _tree.unflatten(output.spec, trees)
    if not options.return_value:
        return (jac, output.aux) if options.has_aux else jac
    value = _tree.unflatten(output.spec, output.leaves)
    return jac, (value, output.aux) if options.has_aux else value


JACOBIAN = Operator(
    modes=MODES,
    kernel=jacobian,
    routes=lambda options, sizes, on_cpu: routes(
        options.engine, options.mode, options.chunk_size, sizes, on_cpu=on_cpu
    ),
    within=lambda sizes, safe: "fwd" if safe and prefers_forward(*sizes) else "rev",
    assemble=assemble,
)


def transform_of(transformed: Any, name: str) -> Transform:
    """What a transformed function is made of.

    Raises:
        TypeError: it does not come from funcjac.
    """
    transform = transform_behind(transformed)
    if transform is None:
        raise TypeError(
            f"{name}: expected a function returned by a funcjac transform, got "
            f"{type(transformed).__name__}. Wrap it first, as in batch_jacobian(func)."
        )
    return transform


def _is_inference(leaf: Any) -> bool:
    if type(leaf) is not Tensor and (not isinstance(leaf, Tensor) or is_uninitialized(leaf)):
        return False
    return leaf.is_inference()


def looks(function: Callable[P, R]) -> Callable[P, R]:
    """Makes ``function`` raise inside of transforms, where values cannot be looked at."""

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        others = levels_of_others([args, kwargs]) if is_transformed() else nullcontext()
        if others is None:
            raise RuntimeError(
                f"{function.__name__}: expected to be called outside of torch.func transforms and "
                "torch.compile, where values can be looked at. Call it on plain tensors."
            )
        with others:
            return function(*args, **kwargs)

    return outside


def usable(tree: Any) -> Any:
    """Copies of inference tensors, which autograd cannot save."""
    return _tree.map_tensors(lambda x: x.clone() if _is_inference(x) else x, tree)
