"""``batch_jacobian``: the Jacobian of each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from funcjac._arguments import pytree
from funcjac._arguments.call import Call, Options
from funcjac._engines import vmap
from funcjac._engines.run import Derivatives, Route, Run
from funcjac._engines.sum import jacobian
from funcjac._operators.operator import Operator, finished
from funcjac._operators.transform import Transform
from funcjac._verification.central_differences import Pair, difference, random_moves, times


@dataclass(frozen=True)
class Jacobian(Operator):
    """``blocks[i][j]``: the derivative of output ``i`` by input ``j``."""

    is_jacobian: ClassVar[bool] = True

    def compute(self, run: Run, route: Route) -> Derivatives:
        return jacobian(run, route)

    def compute_row(
        self, call: Call, function: Any, xs: Sequence[Tensor], extras: Sequence[Tensor], mode: str
    ) -> Any:
        del extras
        jac, along = vmap.jacobian(function, xs, mode, call.options.chunk_size)
        return [list(row) for row in jac], along

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along one random direction."""
        moves, dims = random_moves(call), call.layout.diff_dims
        products = [
            [times(block, moves[j], dim) for j, (block, dim) in enumerate(zip(blocks, dims))]
            for blocks in result.blocks
        ]
        yield difference(call, [moves]), [sum(terms[1:], terms[0]) for terms in products]

    def assemble(self, call: Call, result: Derivatives) -> Any:
        spec = call.layout.in_spec
        trees = [pytree.unflatten(spec, blocks) for blocks in result.blocks]
        return finished(call, result, pytree.unflatten(result.output.spec, trees), None)


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
            ``"fwd"`` pushes forward that of its input, as the transpose of a vector-Jacobian
            product (with ``engine="vmap"`` by torch's forward formulas); ``"auto"`` goes by sizes.
        engine: ``"sum"`` (the sum trick, by plain autograd on the one run of ``func``),
            ``"vmap"`` (``torch.func`` of the function of one row under ``torch.vmap``), ``"loop"``,
            or ``"auto"``: the sum trick, vmap for arguments that rows share and inside of
            ``torch.vmap``, and the next one where one fails.
        chunk_size: basis vectors per pass; ``None`` leaves it to the rule: what stays in a
            processor's cache, in bounded memory. It never changes values. Chunks go into one
            preallocated result; where it is to be differentiated, they are joined at the end.
        has_aux: ``func`` returns ``(output, aux)``; ``aux`` is any object.
        return_value: also return ``func``'s output, from the same forward pass.
        randomness: of draws in ``func`` where ``torch.vmap`` or the loop runs it, as in
            ``torch.vmap``. In the one run of the sum trick a draw is what it is in a plain call.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each key, ``True`` every call, ``False``
            none: the caller vouches for the rows. The key is the transform's keywords, the
            function with the modules, functions, strings, bools and ints that it closes over,
            ``training`` flags, trees, dtypes, devices and sizes of a row, not the batch size. All
            transforms of the process share what is known of a key.

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

    Cost: one run of ``func`` and, in ``rev``, a backward pass for each element of a row of the
    output; in ``fwd`` one more than a row of the input has elements. A pass that carries ``k``
    basis vectors holds ``k`` times the memory of one. A verified call takes one more pass.

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
        operator=Jacobian(),
    )
    return Transform(func, options)
