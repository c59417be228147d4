"""``batch_jacobian``: the Jacobian of each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from funcjac._arguments import pytree
from funcjac._arguments.call import Call
from funcjac._engines import vmap
from funcjac._engines.graph import Route, jacobian
from funcjac._engines.run import Derivatives, Run
from funcjac._operators.transform import Operator, Tensors, by_output, documented, make_transform
from funcjac._verification.finite_differences import Pair, difference, random_moves, times


@dataclass(frozen=True)
class Jacobian(Operator):
    """``blocks[i][j]``: the derivative of output ``i`` by input ``j``."""

    is_jacobian: ClassVar[bool] = True

    def compute(self, run: Run, route: Route) -> Derivatives:
        return jacobian(run, route)

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        del extras
        jac, along = vmap.jacobian(f, xs, mode, call.options.chunk_size)
        return [list(row) for row in jac], along

    def differences(self, call: Call, result: Derivatives) -> Iterator[Pair]:
        """Along one random direction."""
        moves, dims = random_moves(call), call.layout.diff_dims
        products = [
            [times(block, moves[j], dim) for j, (block, dim) in enumerate(zip(blocks, dims))]
            for blocks in result.blocks
        ]
        yield difference(call, [moves]), [sum(terms[1:], terms[0]) for terms in products]

    def tree(self, call: Call, result: Derivatives) -> Any:
        return by_output(result, lambda blocks: pytree.unflatten(call.layout.in_spec, blocks))


@documented
def batch_jacobian(  # noqa: D417  {keywords} are documented once
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
        mode: ``"rev"`` pulls back the basis of a row's output (one pass for each element),
            ``"fwd"`` pushes forward that of its input, as the transpose of a vector-Jacobian
            product (with ``engine="vmap"`` by torch's forward formulas); ``"auto"`` goes by sizes.
        {keywords}

    Returns:
        A function of the same arguments. It returns ``jac``; ``(jac, aux)`` with ``has_aux``;
        ``(jac, value)`` with ``return_value``; ``(jac, (value, aux))`` with both. ``jac`` has
        the structure of the output outside and that of the input inside. Its leaves are
        contiguous, of the dtype that output and input promote to, differentiable if grad mode is
        on and something requires grad, and zero where an output does not depend on an input.

    Raises:
        {errors}

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
    return make_transform("batch_jacobian", Jacobian(), locals())
