"""Functions that the process-wide table of decisions has never seen.

What is remembered is shared by all transforms of a function, and a function is told by its code.
A test that counts calls, or expects a warning that is said once, takes a copy of its own.
"""

import functools
import itertools
import types
from collections.abc import Callable
from typing import Any

_NUMBERS = itertools.count()


def fresh(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a code object that equals no other."""
    code = func.__code__.replace(co_name=f"{func.__name__}_{next(_NUMBERS)}")
    made = types.FunctionType(
        code, func.__globals__, func.__name__, func.__defaults__, func.__closure__
    )
    made.__kwdefaults__ = func.__kwdefaults__
    return functools.update_wrapper(made, func, assigned=("__doc__", "__module__"), updated=())


class Counted:
    """A function that knows how often it ran, and on how many rows each time."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func, self.rows = func, []

    @property
    def count(self) -> int:
        return len(self.rows)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.rows.append(len(args[0]) if hasattr(args[0], "shape") else None)
        return self.func(*args, **kwargs)
