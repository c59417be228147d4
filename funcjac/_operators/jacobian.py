"""The Jacobian of each row: ``batch_jacobian`` of functions, ``batch_jacobian_of`` of tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from funcjac._arguments.call import Call, as_output, bind
from funcjac._arguments.check_keywords import check_options
from funcjac._arguments.layout import Options
from funcjac._dispatch.attempt import Attempt, Outcome, plainly
from funcjac._dispatch.decisions import FunctionKey, decision_of
from funcjac._dispatch.engines import by_sum
from funcjac._engines import vmap
from funcjac._engines.rows import row_shape
from funcjac._engines.run_func import Derivatives, Run, computed, detached, kind_of, read_graph
from funcjac._engines.sum import jacobian
from funcjac._environment.torch_private import is_traced, sees_values, whole
from funcjac._operators.operator import Operator, Tensors
from funcjac._operators.transform import Keywords, Unpack, documented, make_transform
from funcjac.errors import refuse


@dataclass(frozen=True)
class Jacobian(Operator):
    """``blocks[i][j]``: the derivative of output ``i`` by input ``j``."""

    order: ClassVar[int] = 1

    compute = staticmethod(jacobian)  # type: ignore[assignment]

    def compute_row(self, call: Call, f: Any, xs: Tensors, extras: Tensors, mode: str) -> Any:
        return vmap.jacobian(f, xs, mode, call.options.chunk_size)


@documented
def batch_jacobian(
    func: Callable[..., Any], argnums: int | tuple[int, ...] = 0, **keywords: Unpack[Keywords]
) -> Callable[..., Any]:
    """Computes the Jacobian of each row of a batch.

    For ``func: (B, *in) -> (B, *out)`` the returned function gives ``J[b] = d func(x)[b] / d
    x[b]``, of shape ``(B, *out, *in)``. It is a batched function, too, so that transforms nest.
    Like :func:`torch.func.jacrev` under :func:`torch.vmap`, except that ``func`` sees a batch, that
    keyword arguments are not mapped, that results are verified, and that another engine runs
    where ``vmap`` cannot.

    Args:
        func: a batched function: row ``b`` of its output depends on row ``b`` of its batched
            inputs alone. A function ``g`` of one sample enters as ``torch.vmap(g)``.
        argnums: positional argument or arguments to differentiate. A tuple adds a tuple inside
            each output leaf.
        mode: ``"rev"`` pulls back the basis of a row's output, ``"fwd"`` pushes forward that of
            its input, as the transpose of a vector-Jacobian product (with ``engine="vmap"`` by
            torch's forward formulas); ``"auto"`` goes by sizes.
        {keywords}

    Returns:
        A function that returns ``jac``, output structure outside, input structure inside. Leaves
        are contiguous, of the dtype that output and input promote to, differentiable if grad mode
        is on and something requires grad, and zero where an output does not depend on an input.

    Raises:
        {errors}

    Cost: one run of ``func``, and a backward pass for each element of a row of the output, or in
    ``fwd`` one more than a row of the input has elements. A pass that carries ``k`` basis vectors
    holds ``k`` times the memory of one. A verified call takes one more pass.

    Sources: torch.func (vmap, vjp, jvp); the sum trick of pytorch/functorch issue 328 and
    TensorFlow's ``batch_jacobian``; pytorch/pytorch issue 23475, which asked for this.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
        >>> torch.allclose(funcjac.batch_jacobian(torch.sin)(x), torch.diag_embed(x.cos()))
        True
        >>> funcjac.batch_jacobian(funcjac.batch_jacobian(torch.sin))(x).shape
        torch.Size([2, 3, 3, 3])
    """
    return make_transform("batch_jacobian", func, Jacobian(), argnums, keywords)


@whole
def batch_jacobian_of(
    outputs: Any,
    inputs: Any,
    *,
    in_dims: Any = 0,
    out_dims: Any = 0,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    retain_graph: bool = True,
    check: bool | str = "auto",
) -> Any:
    """Computes the Jacobian of each row of ``outputs`` by the same row of ``inputs``.

    ``outputs`` ``(B, *out)`` were computed from ``inputs`` ``(B, *in)`` under autograd, by
    operations that keep rows apart. The result has shape ``(B, *out, *in)``. Applied to its own
    result, it gives second derivatives.

    Args:
        outputs: a tensor, or a tree of tensors.
        inputs: a tensor that requires grad, or a tree of such.
        in_dims: batch dimension of the inputs, an int for all, or a tree of ints.
        out_dims: batch dimension of the outputs; the result has it first.
        mode: ``"rev"``, ``"fwd"`` (the transpose of a vector-Jacobian product) or ``"auto"``.
        chunk_size: basis vectors per pass; ``None`` leaves it to the rule.
        create_graph: whether the result can be differentiated; ``None`` follows grad mode.
        retain_graph: ``False`` frees the graph afterwards, by one more backward pass.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each graph (by the kinds of its nodes),
            ``True`` every call, ``False`` none. With a hook on an input, or a retained
            gradient, nothing is verified: it would see random numbers.

    Returns:
        The Jacobian, output structure outside, input structure inside; zero where an output does
        not depend on an input.

    Raises:
        TypeError, ValueError: bad keywords; inputs that do not require grad; outputs without a
            graph; unequal batch sizes.
        BatchMixingError: rows of the outputs depend on other rows of the inputs.
        VerificationError: the result does not agree with a plain vector-Jacobian product.

    Cost: the passes of :func:`batch_jacobian`; nothing is run again.

    Sources: the sum trick of pytorch/functorch issue 328; TensorFlow's ``batch_jacobian``.

    Example:
        >>> import torch, funcjac
        >>> x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
        >>> u = torch.stack([x.prod(-1), x.sin().sum(-1)], -1)
        >>> u_x = funcjac.batch_jacobian_of(u, x)
        >>> u_x.shape
        torch.Size([2, 2, 3])
        >>> u_xx = funcjac.batch_jacobian_of(u_x[:, 1], x)
        >>> torch.allclose(u_xx, torch.diag_embed(-x.sin()))
        True
    """
    name, in_dims = "batch_jacobian_of", in_dims if type(in_dims) is int else (in_dims,)
    keywords = name, 0, in_dims, out_dims, mode, "sum", chunk_size, False, False, "error", check
    traced = is_traced()
    options = None if traced else _OPTIONS.get(repr(keywords))
    if options is None:
        options = Options(*keywords, Jacobian())
        check_options(batch_jacobian_of, options)
        if not traced and len(_OPTIONS) < _MOST_OPTIONS:
            _OPTIONS[repr(keywords)] = options
    graph = torch.is_grad_enabled() if create_graph is None else create_graph
    for flag, value, also in (("create", graph, "None or "), ("retain", retain_graph, "")):
        if type(value) is not bool:
            raise refuse(name, TypeError, f"{flag}_graph to be {also}a bool", repr(value))
    run = _as_run(options, outputs, inputs, graph)
    if not traced:
        return options.operator.assemble(run.call, _in_plain_code(run, retain_graph))
    from funcjac._dispatch.compiled import solve_existing  # noqa: PLC0415  it loads Dynamo

    result = solve_existing(run.call, run.output, graph=graph)
    return options.operator.assemble(run.call, result)


# Keywords that were checked, by how they print: of other types they print otherwise.
_OPTIONS: dict[str, Options] = {}
_MOST_OPTIONS = 1024


def _in_plain_code(run: Run, retain_graph: bool) -> Derivatives:
    retained = [(x, x.grad) for x in run.inputs if x.retains_grad and not x.is_leaf]
    try:
        result = _solved(run)
        if not retain_graph:
            live = [out for out in run.output.leaves if out.requires_grad]
            torch.autograd.grad(live, run.inputs, [*map(torch.zeros_like, live)], allow_unused=True)
    finally:
        for x, grad in retained:  # a retained gradient is that of backward(), not of these passes
            x.grad = grad
    return result if run.create_graph else detached(result)


def _as_run(options: Options, outputs: Any, inputs: Any, graph: bool) -> Run:
    """The run that made tensors, from their graph."""
    compiling = torch.compiler.is_compiling()
    name, call = options.name, bind(batch_jacobian_of, options, (inputs,), {}, compiling=compiling)
    if not all(x.requires_grad for x in call.inputs):
        remedy = "Call requires_grad_() on them before outputs are computed."
        raise refuse(name, ValueError, "inputs that require grad", "one that does not", remedy)
    output = as_output(options, outputs, call.batch)
    if not any(out.requires_grad for out in output.leaves):
        expected, got = "outputs that were computed from inputs", "tensors without a graph"
        remedy = "Compute them from inputs with grad mode on, and without detach()."
        raise refuse(name, ValueError, expected, got, remedy)
    return Run(call, call.inputs, output, graph)


def _solved(run: Run) -> Derivatives:
    """The derivatives by the known route, or by the first of the rule that works and is right."""
    call, graph, facts = run.call, run.create_graph, read_graph(run)[1]
    rows = tuple([(row_shape(x, dim), x.dtype) for x, dim in zip(run.inputs, run.dims)])
    shapes = tuple([out.shape[1:] for out in run.output.leaves])
    keywords = (call.options.name, call.options.mode, call.options.chunk_size)
    decision = decision_of((*keywords, facts.signature, rows, shapes, graph))
    decision.calls += 1
    hooked = any(x._backward_hooks or (x.retains_grad and not x.is_leaf) for x in run.inputs)
    unseen = hooked or not call.batch or not any(x.numel() for x in run.inputs)
    check = False if unseen or not sees_values() else call.options.check
    routes = decision.routes.get(kind_of(run, facts))
    is_seen = routes and (not check or (facts.signature, routes[0].mode) in decision.signatures)
    if routes and is_seen and not decision.is_due(check, call.batch):
        with suppress(RuntimeError):  # values may decide: everything is tried
            return computed(run, *routes)
    # No replacements are looked for: nothing can be run again.
    call = call._replace(replaced=True, options=replace(call.options, check=check))
    function, run = FunctionKey(batch_jacobian_of), run._replace(call=call)
    run = plainly(run, facts.nodes) if check is False and call.batch else run
    try:
        with torch.set_grad_enabled(graph):
            return by_sum(Attempt(call, function, decision, Outcome(), run))
    except Exception:
        decision.left.clear()
        decision.routes.clear()
        raise
