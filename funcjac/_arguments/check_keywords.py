"""Checks the keywords of a transform when it is made."""

from typing import Any

from funcjac._arguments import pytree
from funcjac._arguments.layout import ENGINES, Options
from funcjac.errors import refuse


def check_options(func: Any, options: Options) -> None:
    """Refuse bad keywords when the transform is made."""

    def check(is_right: bool, kind: type[Exception], expected: str, got: Any, *remedy: str) -> None:
        if not is_right:
            raise refuse(options.name, kind, expected, got, *remedy)

    remedy = "Pass the function itself, and its arguments to what the transform returns."
    check(callable(func), TypeError, "func to be callable", type(func).__name__, remedy)
    _check_argnums(check, options.argnums)
    _check_dims(check, options.in_dims, options.out_dims)
    for keyword, *allowed in (
        ("mode", *options.operator.modes, "auto"),
        ("engine", *ENGINES, "auto"),
        ("randomness", "error", "different", "same"),
    ):
        value = getattr(options, keyword)
        is_right = isinstance(value, str) and value in allowed  # NumPy has no one answer to in
        listed = ", ".join(map(repr, allowed))
        check(is_right, ValueError, f"{keyword} to be one of {listed}", repr(value))
    size, expected = options.chunk_size, "chunk_size to be None or a positive int"
    check(size is None or type(size) is int, TypeError, expected, repr(size))
    check(size is None or size > 0, ValueError, expected, repr(size))
    for keyword in ("has_aux", "return_value"):
        value = getattr(options, keyword)
        check(type(value) is bool, TypeError, f"{keyword} to be a bool", repr(value))
    is_right = options.mode != "taylor" or options.engine in ("auto", "sum")
    expected = "engine to be 'auto' or 'sum' with mode='taylor', which runs the whole batch"
    check(is_right, ValueError, expected, repr(options.engine))
    is_right = type(options.check) in (bool, str) and options.check in ("auto", True, False)
    check(is_right, ValueError, "check to be 'auto', True or False", repr(options.check))


def _check_argnums(check: Any, argnums: Any) -> None:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    remedy = "The first argument is 0."
    check(numbers, ValueError, "argnums to name at least one argument", "()", remedy)
    is_right = all(type(argnum) is int for argnum in numbers)
    check(is_right, TypeError, "argnums to be an int or a tuple of ints", repr(argnums), remedy)
    is_right, remedy = len(set(numbers)) == len(numbers), "Name each argument once."
    check(is_right, ValueError, "argnums to be unique", repr(argnums), remedy)


def _check_dims(check: Any, in_dims: Any, out_dims: Any) -> None:
    is_right = type(in_dims) is int or isinstance(in_dims, (tuple, list))
    expected = "in_dims to be an int or a tuple with one entry for each positional argument"
    remedy = "Write None in the tuple for what all rows share."
    check(is_right, TypeError, expected, repr(in_dims), remedy)
    is_right = all(type(leaf) is int for leaf in pytree.leaves(out_dims))
    remedy = "Every output of a batched function has a batch dimension."
    check(is_right, TypeError, "out_dims to be an int or a tree of ints", repr(out_dims), remedy)
