"""Which checks a program goes through."""

import random
from collections.abc import Iterator

from torch import Tensor

from tests.sweeps.programs.check import Check
from tests.sweeps.programs.program import Program, is_blind

ENGINES, MODES = ("vmap", "sum", "loop"), ("rev", "fwd")
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")


def checks(
    program: Program, rng: random.Random, share: float = 1.0, *, unchecked: bool = False
) -> Iterator[Check]:
    """Everything to hold a program to; of all but the first, only a random ``share``.

    ``unchecked`` adds calls with ``check=False``, which see what torch itself makes of it.
    """
    yield Check("batch_jacobian", points=(0, 1, 2, 0))
    for check in _further(program, rng, unchecked):
        if rng.random() < share:
            yield check


def _further(program: Program, rng: random.Random, unchecked: bool) -> Iterator[Check]:
    for engine in ENGINES:
        for mode in MODES:
            words = (("engine", engine), ("mode", mode))
            yield Check("batch_jacobian", words)
            yield Check("batch_jacobian", (*words, ("chunk_size", rng.randint(1, 2))))
            yield Check("batch_jacobian", words, backward=True)
            if unchecked and not is_blind(
                program
            ):  # forward mode sees through no_grad; verification says so
                yield Check("batch_jacobian", (*words, ("check", False)), points=(1,))
    yield Check("batch_jacobian", (("check", False),), points=(0, 1, 2))
    keeps = any(made.kind == "hidden" for made in program.steps)
    if "None" not in program.output and not keeps:  # which torch.func itself cannot
        yield Check("batch_jacobian", inside=True, points=(0, 1, 2))
    yield Check("batch_jacobian", backward=True, points=(0, 1, 2, 0, 1))
    if program.mixing:
        return
    yield from _second(program, rng)


def _second(program: Program, rng: random.Random) -> Iterator[Check]:
    single = isinstance(program.argnums, int)
    if single and not program.inputs[program.argnums].keys and "(" not in program.output[:1]:
        yield Check("batch_jacobian", nested=True, points=(0, 1, 2, 0))
        yield Check("batch_jacobian", (("mode", rng.choice(MODES)),), nested=True)
    for name in ("batch_hessian", "batch_hessian_diagonal", "batch_laplacian"):
        yield Check(name, points=(0, 1, 2, 0, 1, 2))
        if name != "batch_hessian":
            yield Check(name, (("mode", "taylor"),))
        for mode in NESTED:
            yield Check(name, (("mode", mode), ("engine", rng.choice(ENGINES))))
    if not single:
        return
    given = program.inputs[program.argnums]
    if not given.keys and len(given.shape) == 1 and given.in_dim is not None:
        n = given.shape[0]
        orders = [(0,), (n - 1, n - 1), (0, n - 1), (n // 2,), (0, 0, n - 1)]
        indices = tuple(rng.sample(orders, 2))
        yield Check("batch_partials", indices=indices, points=(0, 1, 2, 0))
        yield Check("batch_partials", (("mode", "taylor"),), indices=indices)
        yield Check(
            "batch_partials", (("mode", "rev"), ("engine", rng.choice(ENGINES))), indices=indices
        )
    if not given.keys and is_field(program):
        yield Check("batch_divergence", points=(0, 1, 2, 0))
        yield Check(
            "batch_divergence", (("mode", rng.choice(MODES)), ("engine", rng.choice(ENGINES)))
        )


def is_field(program: Program) -> bool:
    """Whether rows of the output have the shape of rows of the input."""
    given = program.inputs[program.argnums]
    with program.running() as scope:
        args = eval(program.arguments(0), scope)
        out = scope["func"](*args)
    same = isinstance(out, Tensor) and given.in_dim == 0 and program.out_dims == 0
    return same and out.shape == args[program.argnums].shape
