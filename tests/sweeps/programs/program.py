"""A program: steps of Python source that make one batched function, with its inputs."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BATCH = 3
MOST_ELEMENTS = 24  # of a row of a variable
MOST_OUTPUTS, MOST_INPUTS = 6, 6
VALUES = 3  # how many points each program is tried at
LARGE, ROUNDING = 1e4, 1e-9
f64 = torch.float64

HEADER = """import random

import torch
import torch.nn.functional as F
from torch import nn
from funcjac import *

torch.set_default_dtype(torch.float64)


def const(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed, make):
    torch.manual_seed(seed)
    return make().eval()


class Dice(nn.Module):
    "Another factor in each run of the function, which is counted, and seen by what is kept."

    def __init__(self, seed):
        super().__init__()
        self.seed, self.runs, self.at, self.last = seed, 0, None, None
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.at is None:
            self.runs, self.count, self.last = self.runs + 1, self.count + 1, x
        draw = random.Random(self.seed + (self.at or self.runs))
        return x * draw.uniform(0.5, 1.5)
"""

# Operations that plain autograd differentiates wrongly the second time, and others in their place.
TWINS = {
    r"(\w+)\.logcumsumexp\((-?\d+)\)": (
        r"torch.stack([\1.narrow(\2, 0, i + 1).logsumexp(\2) for i in range(\1.shape[\2])], \2)"
    )
}


@dataclass(frozen=True)
class Step:
    """``body`` makes the variable ``name``; ``setup`` makes constants and modules, once."""

    kind: str
    name: str
    body: tuple[str, ...]
    setup: tuple[str, ...] = ()
    mixing: bool = False


@dataclass(frozen=True)
class Input:
    """A positional argument: float or integer, of the whole batch or shared, a tree or not."""

    name: str
    shape: tuple[int, ...]
    in_dim: int | None = 0
    integer: bool = False
    keys: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """The lines that take it apart and put its batch dimension first."""
        if self.keys:
            return tuple(f"{self.name}_{key} = {self.name}[{key!r}]" for key in self.keys)
        if self.in_dim not in (0, None):
            return (f"{self.name} = {self.name}.movedim({self.in_dim}, 0)",)
        return ()

    def names(self) -> list[str]:
        return [f"{self.name}_{key}" for key in self.keys] or [self.name]

    def expression(self, seed: int) -> str:
        batch = () if self.in_dim is None else (BATCH,)
        shape = ", ".join(map(str, (*batch, *self.shape)))
        if self.integer:
            return f"(const({seed}, {shape}) * 50).long().abs() % 2"
        if self.keys:
            leaves = [f"{key!r}: const({seed + i}, {shape})" for i, key in enumerate(self.keys)]
            return "{" + ", ".join(leaves) + "}"
        if self.in_dim not in (0, None):
            return f"const({seed}, {shape}).movedim(0, {self.in_dim})"
        return f"const({seed}, {shape})"


@dataclass(frozen=True)
class Program:
    seed: int
    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    output: str  # the expression that is returned
    argnums: int | tuple[int, ...] = 0
    out_dims: int = 0

    @property
    def in_dims(self) -> tuple[int | None, ...]:
        return tuple(given.in_dim for given in self.inputs)

    @property
    def mixing(self) -> bool:
        return any(step.mixing for step in self.steps)

    @property
    def words(self) -> dict[str, Any]:
        return {"argnums": self.argnums, "in_dims": self.in_dims, "out_dims": self.out_dims}

    def source(self) -> str:
        """The definition of ``func``, with everything that it needs."""
        lines = [line for step in self.steps for line in step.setup]
        names = ", ".join(given.name for given in self.inputs)
        body = [line for given in self.inputs for line in given.lines()]
        body += [line for step in self.steps for line in step.body]
        text = "\n".join([*lines, "", "", f"def func({names}):"])
        return "\n    ".join([text, *body, f"return {self.output}"]) + "\n"

    def arguments(self, point: int) -> str:
        """The expression of the arguments at one of the points."""
        seeds = [1000 * (self.seed % 1000) + 100 * point + 10 * i for i in range(len(self.inputs))]
        each = [given.expression(s) for given, s in zip(self.inputs, seeds)]
        return "(" + ", ".join(each) + ",)"

    @contextlib.contextmanager
    def running(self, *, twin: bool = False, draw: int | None = 1) -> Iterator[dict[str, Any]]:
        """The names that the source, or its twin, defines, as long as float64 is the default.

        Dice that it holds give that ``draw`` always, or for ``None`` another one in each run.
        """
        source = self.source()
        for operation, other in TWINS.items() if twin else ():
            source = re.sub(operation, other, source)
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                scope: dict[str, Any] = {}
                exec(HEADER + source, scope)
                for die in dice(scope):
                    die.at = draw
                yield scope
            finally:
                torch.set_default_dtype(before)


def dice(scope: dict[str, Any]) -> list[Any]:
    return [x for x in scope.values() if type(x).__name__ == "Dice"]


def is_blind(program: Program) -> bool:
    """Whether autograd is kept from a part of it."""
    lines = [line for made in program.steps for line in made.body]
    return any(word in line for line in lines for word in ("detach", "no_grad", ".data"))


def is_moderate(x: Tensor) -> bool:
    """Finite, not large, and not all rounding, which the README says may be refused."""
    size = float(x.abs().max()) if x.numel() else 0.0
    return size == 0 or ROUNDING < size < LARGE
