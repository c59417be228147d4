"""``check_batched``: whether rows depend on one another, by values and by the graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcjac._arguments.call import Call, bind
from funcjac._arguments.check_keywords import check_options
from funcjac._arguments.layout import Options
from funcjac._dispatch.decisions import FunctionKey
from funcjac._engines.run_func import plain_values, run_once
from funcjac._environment.state import rng_state, set_rng_state
from funcjac._operators.jacobian import Jacobian
from funcjac._operators.transform import check_outside, usable
from funcjac._verification.row_independence import check_rows, halves, mixing_error
from funcjac._verification.tolerance import tolerance
from funcjac.errors import refuse


def check_batched(
    func: Callable[..., Any], *args: Any, in_dims: Any = 0, out_dims: Any = 0, **kwargs: Any
) -> None:
    """Raises if the rows of ``func``'s output depend on other rows of its input.

    Two tests for any two rows, each with the random state replayed: other values in one row
    must leave the output of the other as it was, and a random cotangent in one must not reach
    the input of the other. They miss mixing that happens only for other values of the input
    than those given. Cost: two runs of ``func`` and two backward passes for each bit of the
    batch size.

    Args:
        func: a batched function.
        *args: its arguments, with at least two rows.
        in_dims: batch dimension of each argument, as in :func:`torch.vmap`.
        out_dims: where ``func`` puts the batch dimension.
        **kwargs: given to ``func`` as they are.

    Raises:
        BatchMixingError: rows depend on one another; the message names suspects.
        ValueError: fewer than two rows, or bad ``in_dims`` or ``out_dims``.
        TypeError: a batched argument is not dense, or ``func`` does not return real
            floating-point tensors.

    Example:
        >>> import torch, funcjac
        >>> funcjac.check_batched(torch.sin, torch.ones(4, 3))
        >>> funcjac.check_batched(lambda x: x - x.mean(0), torch.eye(4, 3))
        Traceback (most recent call last):
        ...
        funcjac.BatchMixingError: check_batched: expected each row of func's output ...
    """
    name, argnums = "check_batched", tuple(range(len(args))) or 0
    check_outside(name)
    options = Options(name, argnums, in_dims, out_dims, operator=Jacobian())
    check_options(func, options)
    if not args:
        remedy = "Pass the arguments of func behind it, as in check_batched(func, x)."
        raise refuse(name, ValueError, "a batched argument", "0 arguments", remedy)
    with torch.inference_mode(False), torch.no_grad():
        args, kwargs = usable((args, kwargs))
        call = _by_batched_floats(bind(func, options, args, kwargs, differentiate=False))
        modules, rng = FunctionKey(func).modules, rng_state()
        try:
            before = [out.clone() for out in plain_values(call)]
            for rows in halves(call.batch):
                set_rng_state(rng)
                after = plain_values(_with_others_in(call, rows))
                if any(_differ(*outs, ~rows) for outs in zip(before, after)):
                    raise mixing_error(name, modules)
            set_rng_state(rng)
            if call.layout.diff:
                check_rows(run_once(call._replace(clone=True)), modules)
        finally:
            set_rng_state(rng)


def _by_batched_floats(call: Call) -> Call:
    """The call, differentiated by all that is batched; refused if rows cannot be told apart."""
    name, layout = call.options.name, call.layout
    if call.batch < 2:
        remedy = "Pass a batch of two rows or more, of which one can be changed."
        raise refuse(name, ValueError, "at least two rows", call.batch, remedy)
    for i in layout.batched:
        if call.leaves[i].layout != torch.strided:
            expected, got = "batched arguments that are dense", call.leaves[i].layout
            remedy = "Call .to_dense() on them, or set in_dims to None for what all rows share."
            raise refuse(name, TypeError, expected, got, remedy)
    diff = tuple([i for i in layout.batched if call.leaves[i].is_floating_point()])
    dims = tuple([layout.dims[i] for i in diff])
    return call._replace(layout=replace(layout, diff=diff, diff_dims=dims))


def _with_others_in(call: Call, rows: Tensor) -> Call:
    """The call with the values of another row in ``rows``."""
    order, leaves = torch.arange(call.batch, device="cpu"), list(call.leaves)
    source = torch.where(rows, order[~rows][0], order)
    for i in call.layout.batched:
        leaves[i] = leaves[i].index_select(call.layout.dims[i] or 0, source.to(leaves[i].device))
    return call._replace(leaves=leaves)


def _differ(before: Tensor, after: Tensor, rows: Tensor) -> bool:
    limit = tolerance([before.dtype]) / 100
    size = before.abs().nan_to_num(0, 0, 0).amax(0) if before.numel() else 0
    moves = (before - after)[rows.to(before.device)].abs().nan_to_num(0)
    return bool((moves > limit * size).any())
