"""``batch_jacobian_of``: the Jacobian of each row of tensors that exist."""

from __future__ import annotations

from typing import Any

import torch

from funcjac._arguments import pytree
from funcjac._arguments.bind import batch_size, check_inputs, make_layout
from funcjac._arguments.call import Call, Options, as_output
from funcjac._arguments.check_keywords import check_options
from funcjac._arguments.check_tensors import check_arguments
from funcjac._dispatch.decisions import decision_of
from funcjac._dispatch.rule import Sizes
from funcjac._engines.basis import elements_of_rows, row_shape, row_sizes
from funcjac._engines.run import Derivatives, Run, detached, read_graph
from funcjac._environment.torch_private import is_traced, sees_values
from funcjac._operators.jacobian import Jacobian
from funcjac._verification.backward import backward_mismatch
from funcjac._verification.compare import agrees_with_units, mismatch
from funcjac._verification.rows import check_rows
from funcjac.errors import VerificationError, refuse

_NAME = "batch_jacobian_of"


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
    operations that keep rows apart. The result has shape ``(B, *out, *in)``. Like
    ``batch_jacobian``, except that it takes tensors and their graph instead of a function; like
    TensorFlow's ``tape.batch_jacobian``. Applied to its own result it gives second derivatives.

    Args:
        outputs: a tensor, or a tree of tensors.
        inputs: a tensor that requires grad, or a tree of such.
        in_dims: batch dimension of the inputs, an int for all, or a tree of ints.
        out_dims: batch dimension of the outputs; the result has it first.
        mode: ``"rev"``, ``"fwd"`` (the transpose of a vector-Jacobian product) or ``"auto"``.
        chunk_size: basis vectors per pass; ``None`` leaves it to the rule.
        create_graph: whether the result can be differentiated; ``None`` follows grad mode.
        retain_graph: ``False`` frees the graph afterwards, by one more backward pass.
        check: ``"auto"`` verifies calls 1, 2, 4, 8, … of each graph (by the names of its nodes),
            ``True`` every call, ``False`` none.

    Returns:
        The Jacobian, in the structure of ``outputs`` outside and that of ``inputs`` inside; zero
        where an output does not depend on an input.

    Raises:
        TypeError, ValueError: bad keywords; inputs that do not require grad; outputs without a
            graph; unequal batch sizes.
        BatchMixingError: rows of the outputs depend on other rows of the inputs.
        VerificationError: the result does not agree with a plain vector-Jacobian product.

    Cost: as many passes through the graph as a row of the output has elements (``rev``), or one
    more than a row of the input has (``fwd``); nothing is run again.

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
    options = Options(
        name=_NAME,
        in_dims=in_dims if type(in_dims) is int else (in_dims,),
        out_dims=out_dims,
        mode=mode,
        engine="sum",
        chunk_size=chunk_size,
        check=check,
        operator=Jacobian(),
    )
    check_options(batch_jacobian_of, options)
    if create_graph is not None and type(create_graph) is not bool:
        raise refuse(_NAME, TypeError, "create_graph to be None or a bool", repr(create_graph))
    if type(retain_graph) is not bool:
        raise refuse(_NAME, TypeError, "retain_graph to be a bool", repr(retain_graph))
    graph = torch.is_grad_enabled() if create_graph is None else create_graph
    run = _as_run(options, outputs, inputs)._replace(create_graph=graph)
    result = _in_a_traced_graph(run) if is_traced() else _in_plain_code(run, retain_graph)
    return options.operator.assemble(run.call, result)


def _in_a_traced_graph(run: Run) -> Derivatives:
    from funcjac._dispatch.compiled import solve_existing  # noqa: PLC0415  it loads Dynamo

    return solve_existing(run.call, run.output, graph=run.create_graph)


def _in_plain_code(run: Run, retain_graph: bool) -> Derivatives:
    kept = [(x, x.grad) for x in run.inputs if x.retains_grad and not x.is_leaf]
    result = _solved(run)
    if not retain_graph:
        live = [out for out in run.output.leaves if out.requires_grad]
        zeros = [torch.zeros_like(out) for out in live]
        torch.autograd.grad(live, run.inputs, zeros, allow_unused=True)
    for x, grad in kept:  # a retained gradient is that of backward(), not of these passes
        x.grad = grad
    return result if run.create_graph else detached(result)


def _as_run(options: Options, outputs: Any, inputs: Any) -> Run:
    leaves, spec = pytree.flatten_args((inputs,))
    check_arguments(_NAME, leaves)
    layout = make_layout(options, (inputs,), leaves, spec)
    batch = batch_size(_NAME, layout, leaves)
    call = Call(batch_jacobian_of, options, layout, leaves, {}, batch)
    check_inputs(call)
    if not all(x.requires_grad for x in call.inputs):
        remedy = "Call requires_grad_() on them before outputs are computed."
        raise refuse(_NAME, ValueError, "inputs that require grad", "one that does not", remedy)
    output = as_output(options, outputs, batch)
    if not any(out.requires_grad for out in output.leaves):
        remedy = "Compute them from inputs with grad mode on, and without detach()."
        got = "tensors without a graph"
        raise refuse(_NAME, ValueError, "outputs that were computed from inputs", got, remedy)
    return Run(call, call.inputs, output)


def _solved(run: Run) -> Derivatives:
    options, outs = run.call.options, run.output.leaves
    facts = read_graph(outs, run.inputs)
    sizes = Sizes(
        run.call.batch,
        elements_of_rows(outs),
        sum(row_sizes(run.inputs, run.dims)),
        facts.widest,
        run.create_graph,
        all(x.device.type == "cpu" for x in run.inputs),
    )
    rows = tuple([(row_shape(x, dim), x.dtype) for x, dim in zip(run.inputs, run.dims)])
    shapes = tuple([out.shape[1:] for out in outs])
    key = (_NAME, options.mode, options.chunk_size, facts.signature, rows, shapes, run.create_graph)
    decision = decision_of(key)
    decision.calls += 1
    route = options.operator.route(run.call, sizes)
    routes = dict.fromkeys((route, route._replace(chunk=1)))
    hooked = any(x._backward_hooks or (x.retains_grad and not x.is_leaf) for x in run.inputs)
    check = decision.is_due(options.check, run.call.batch) and not hooked and sees_values()
    problem = None
    for candidate in routes:
        if candidate in decision.left:
            continue
        with torch.set_grad_enabled(run.create_graph):
            result = options.operator.compute(run, candidate)
        problem = _problem(run, result, decision.calls) if check else None
        if problem is None:
            decision.rows |= check and run.call.batch > 1
            return result
        decision.left[candidate] = problem
    decision.left.clear()
    raise VerificationError(f"{_NAME}: the result was verified and refused: {problem}.")


def _problem(run: Run, result: Derivatives, number: int) -> str | None:
    if not run.call.batch or not any(x.numel() for x in run.inputs):
        return None
    problem, _ = mismatch(run, result, number)
    if problem is not None:
        check_rows(run, [])
        problem = None if agrees_with_units(run, result) else problem
    if problem is None and run.create_graph:
        problem = backward_mismatch(run, result, number)
    return problem
