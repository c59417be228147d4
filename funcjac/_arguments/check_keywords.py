"""Checks the keywords of a transform when it is made."""

from typing import Any

from funcjac._arguments import pytree
from funcjac._arguments.call import ENGINES, Options
from funcjac.errors import refuse

_RANDOMNESS = ("error", "different", "same")


def check_options(func: Any, options: Options) -> None:
    """Refuse bad keywords when the transform is made."""
    name = options.name
    if not callable(func):
        remedy = "Pass the function itself, and its arguments to what the transform returns."
        raise refuse(name, TypeError, "func to be callable", type(func).__name__, remedy)
    _check_argnums(name, options.argnums)
    _check_dims(name, options)
    for keyword, allowed in (
        ("mode", (*options.operator.modes, "auto")),
        ("engine", (*ENGINES, "auto")),
        ("randomness", _RANDOMNESS),
    ):
        value = getattr(options, keyword)
        if not isinstance(value, str) or value not in allowed:  # NumPy has no one answer to in
            listed = ", ".join(map(repr, allowed))
            raise refuse(name, ValueError, f"{keyword} to be one of {listed}", repr(value))
    size = options.chunk_size
    if size is not None and (type(size) is not int or size < 1):
        kind = ValueError if type(size) is int else TypeError
        raise refuse(name, kind, "chunk_size to be None or a positive int", repr(size))
    for keyword in ("has_aux", "return_value"):
        if type(getattr(options, keyword)) is not bool:
            got = repr(getattr(options, keyword))
            raise refuse(name, TypeError, f"{keyword} to be a bool", got)
    if options.mode == "taylor" and options.engine not in ("auto", "sum"):
        expected = "engine to be 'auto' or 'sum' with mode='taylor', which runs the whole batch"
        raise refuse(name, ValueError, expected, repr(options.engine))
    is_auto = isinstance(options.check, str) and options.check == "auto"
    if not is_auto and type(options.check) is not bool:
        raise refuse(name, ValueError, "check to be 'auto', True or False", repr(options.check))


def _check_argnums(name: str, argnums: Any) -> None:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    remedy = "The first argument is 0."
    if not numbers:
        raise refuse(name, ValueError, "argnums to name at least one argument", "()", remedy)
    if any(type(argnum) is not int for argnum in numbers):
        expected = "argnums to be an int or a tuple of ints"
        raise refuse(name, TypeError, expected, repr(argnums), remedy)
    if len(set(numbers)) != len(numbers):
        remedy = "Name each argument once."
        raise refuse(name, ValueError, "argnums to be unique", repr(argnums), remedy)


def _check_dims(name: str, options: Options) -> None:
    in_dims, out_dims = options.in_dims, options.out_dims
    if type(in_dims) is not int and not isinstance(in_dims, (tuple, list)):
        expected = "in_dims to be an int or a tuple with one entry for each positional argument"
        remedy = "Write None in the tuple for what all rows share."
        raise refuse(name, TypeError, expected, repr(in_dims), remedy)
    if any(type(leaf) is not int for leaf in pytree.flatten_args(out_dims)[0]):
        expected = "out_dims to be an int or a tree of ints"
        remedy = "Every output of a batched function has a batch dimension."
        raise refuse(name, TypeError, expected, repr(out_dims), remedy)
