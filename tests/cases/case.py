"""One function of a table, with its arguments and what must come of it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.tensors import set_seed

f32, f64 = torch.float32, torch.float64


@dataclass(frozen=True)
class Setup:
    """A function with its arguments; ``kept`` is a list in which the function leaves things."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One function.

    Attributes:
        group: heading under which the table of first derivatives has it.
        make: makes the function and its arguments.
        keywords: of the transform: argnums, in_dims, out_dims, randomness.
        expected: the exception that ``batch_jacobian`` must raise, ``None`` if it must be right.
        match: text of that exception.
        cannot: ways that need not manage, for torch fails or is wrong there, or operations cannot
            be recorded: a documented error is allowed, a wrong number nowhere. Routes such as
            ``vmap/fwd``, or ``vmap`` or ``fwd`` for all of those; modes such as ``taylor``;
            ``second``: plain autograd has no second derivative of it; ``third``: no third.
        cannot_twice: likewise where the Jacobian is to be differentiated.
        oracle: ``rows``, or ``batch`` where rows cannot run one after the other.
        twice: whether plain autograd differentiates the Jacobian once more.
        smooth: whether central differences see the derivative that autograd is asked for.
        moves: whether each run changes the function, so that each call needs one made anew.
        twin: makes of the function the same one from operations that plain autograd
            differentiates twice, where it does not differentiate those of the function.
    """

    name: str
    make: Callable[[], Setup]
    cannot: str = ""
    keywords: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    expected: type[Exception] | None = None
    match: str = ""
    cannot_twice: str = ""
    oracle: str = "rows"
    twice: bool = True
    smooth: bool = True
    moves: bool = False
    twin: Callable[..., Any] | None = None

    def build(self, dtype: torch.dtype | None = None) -> Setup:
        """A fresh function and fresh arguments, the same ones every time.

        ``dtype`` is the default dtype meanwhile, by which ``rounded`` goes.
        """
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript and CSR warn that they are old or new
            set_seed(0)
            torch.set_default_dtype(dtype or before)
            try:
                return self.make()
            finally:
                torch.set_default_dtype(before)

    def build_twin(self) -> Setup:
        """The same for the oracle, in float64."""
        setup = self.build(f64)
        return replace(setup, func=self.twin(setup.func)) if self.twin else setup

    def can(self, *ways: str, twice: bool = False) -> bool:
        """Whether all of ``ways`` must be right, and differentiable if ``twice``."""
        cannot = self.cannot + " " + self.cannot_twice * twice
        named = {part for way in ways for part in (way, *way.split("/"))}
        return not named & set(cannot.split())


def given(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Setup:
    return Setup(func, args, kwargs)


def rand(*shape: int, dtype: torch.dtype = f64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def rounded(*shape: int) -> Tensor:
    """Drawn in float64 and rounded to the default dtype: the same numbers in float32."""
    return rand(*shape).to(torch.get_default_dtype())


def x43(dtype: torch.dtype = f64) -> Tensor:
    return rand(4, 3, dtype=dtype)


def on_x(function: Callable[[Tensor], Any], *shape: int, dtype: torch.dtype = f64):
    return lambda: given(function, rand(*(shape or (4, 3)), dtype=dtype))


def module(make: Callable[[], nn.Module], *shape: int, dtype: torch.dtype = f64, train=False):
    """A module on a random input of ``shape``, in eval mode unless ``train``."""

    def setup() -> Setup:
        net = make().to(dtype).train(train)
        return given(net, rand(*(shape or (4, 3)), dtype=dtype))

    return setup
