"""Draws programs from a seed, and leaves out those that no oracle can judge."""

import math
import random
import warnings
from typing import Any

import optree
import torch
from torch import Tensor

from tests.sweeps.programs.program import (
    MOST_OUTPUTS,
    VALUES,
    Input,
    Program,
    is_blind,
    is_moderate,
)
from tests.sweeps.programs.steps import MIXING, STEPS, Draft
from tests.tensors import set_seed

MIXED_SHARE = 0.08


def generate(seed: int) -> Program | None:
    """The program of a seed, or ``None`` where its values are no good to compare."""
    rng = random.Random(seed)
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = _draft(rng, seed)
        finally:
            torch.set_default_dtype(before)
    return program if program is not None and is_fair(program) else None


def _inputs(rng: random.Random) -> list[Input]:
    shape = rng.choice(
        [(3,), (2,), (4,), (5,), (2, 2), (2, 3), (3, 2), (1,), (), (1, 3), (1, 2, 2), (6,)]
    )
    keys = ("p", "a") if rng.random() < 0.08 and math.prod(shape) <= 3 else ()
    in_dim = rng.choice([1, -1]) if rng.random() < 0.12 and shape and not keys else 0
    inputs = [Input("x", shape, in_dim, keys=keys)]
    if rng.random() < 0.3:
        inputs.append(Input("y", rng.choice([(3,), (2,), (2, 2)])))
    if rng.random() < 0.25:
        inputs.append(Input("s", (rng.randint(1, 3), rng.randint(1, 3)), None))
    if rng.random() < 0.25:
        inputs.append(Input("k", (), integer=True))
    return inputs


def _draft(rng: random.Random, seed: int) -> Program | None:
    inputs = _inputs(rng)
    draft = Draft(rng, inputs, seed)
    first = len(draft.rows)
    count, steps = rng.randint(1, 9), []
    mix_at = rng.randrange(count) if rng.random() < MIXED_SHARE else -1
    for attempt in range(4 * count):
        mixed = len(steps) == mix_at and not any(s.mixing for s in steps)
        kind = rng.choice(list(MIXING if mixed else STEPS))
        made = draft.try_step(kind, mixed)
        steps += [made] if made is not None else []
        if len(steps) == count:
            break
    if not steps:
        return None
    argnums: int | tuple[int, ...] = 0
    floats = [i for i, given in enumerate(inputs) if not given.integer]
    if len(floats) > 1 and rng.random() < 0.4:
        argnums = rng.choice([(0, floats[1]), (floats[1], 0), floats[1], -len(inputs) + floats[-1]])
    output, out_dims = _output(draft, first)
    return Program(seed, tuple(inputs), tuple(steps), output, argnums, out_dims)


def _output(draft: Draft, first: int) -> tuple[str, int]:
    rng = draft.rng

    def small(name: str) -> str:
        n = math.prod(draft.shape(name)[1:])
        return (
            name if n <= MOST_OUTPUTS else f"{name}.flatten(1)[:, :{rng.randint(2, MOST_OUTPUTS)}]"
        )

    last = small(draft.rows[-1])
    if rng.random() < 0.15 and len(draft.rows) > first + 1:
        other = small(rng.choice(draft.rows[first:]))
        form = rng.choice(
            ["({a}, {b})", "{{'z': {a}, 'a': {b}}}", "[{a}, ({b},)]", "({a}, None, {b})"]
        )
        return form.format(a=last, b=other), 0
    if rng.random() < 0.1 and "flatten" in last:
        return f"({last}).movedim(0, 1)", 1
    return last, 0


def is_fair(program: Program) -> bool:
    """Whether values and derivatives are moderate, and no kink is near, at every point."""
    try:
        with program.running() as scope:
            return all(_is_smooth_at(program, scope, point) for point in range(VALUES))
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return False  # plain autograd cannot do it either


def _keeps_a_graph(program: Program, scope: dict[str, Any], args: Any) -> bool:
    """Whether some of each output's dependence on the inputs is left, as none is refused."""
    chosen = program.argnums if isinstance(program.argnums, tuple) else (program.argnums,)
    for x in optree.tree_leaves([args[i] for i in chosen]):
        if x.is_floating_point():
            x.requires_grad_()
    outs = optree.tree_leaves(scope["func"](*optree.tree_map(torch.clone, args)))
    return all(out.requires_grad for out in outs)


def _is_smooth_at(program: Program, scope: dict[str, Any], point: int) -> bool:
    """Plain first and second derivatives along a direction, against central differences."""
    args = eval(program.arguments(point), scope)
    leaves, spec = optree.tree_flatten(args)
    floats = [i for i, x in enumerate(leaves) if x.is_floating_point()]
    set_seed(point)
    direction = [torch.randn_like(leaves[i]) for i in floats]
    weights: list[Tensor] = []

    def scalar(inputs: list[Tensor]) -> Tensor:
        given = list(leaves)
        for i, x in zip(floats, inputs):
            given[i] = x.clone()
        outs = optree.tree_leaves(scope["func"](*optree.tree_unflatten(spec, given)))
        if not weights:
            weights.extend(torch.randn_like(out) for out in outs)
        return sum((w * out).sum() for w, out in zip(weights, outs))

    def slope(step: float, *, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [(leaves[i] + step * t).requires_grad_() for i, t in zip(floats, direction)]
        value = scalar(inputs)
        zero = value.new_zeros(())
        if not value.requires_grad:
            return value, zero, zero
        grads = torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True)
        first = sum((g * t).sum() for g, t in zip(grads, direction))
        if not twice or not first.requires_grad:
            return value, first, zero
        grads = torch.autograd.grad(first, inputs, materialize_grads=True)
        return value, first, sum((g * t).sum() for g, t in zip(grads, direction))

    here = slope(0.0, twice=True)
    if not all(is_moderate(v) for v in here):
        return False
    if is_blind(program):  # the differences would see through it
        return _keeps_a_graph(program, scope, args)
    h = 1e-5
    plus, minus = slope(h, twice=False), slope(-h, twice=False)
    return all(
        abs(float((plus[n] - minus[n]) / (2 * h) - here[n + 1]))
        < 1e-4 * (1 + abs(float(here[n + 1])))
        for n in (0, 1)
    )
