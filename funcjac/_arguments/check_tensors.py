"""Which kinds of tensors can be looked at and differentiated."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from funcjac._environment.torch_private import is_transformed
from funcjac.errors import refuse

# What can be computed with: of narrower types PyTorch only knows how to store them.
_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


def check_arguments(name: str, leaves: Iterable[Any], what: str = "tensors") -> None:
    """Refuse tensors that nothing can be computed of, differentiated or not.

    Raises:
        TypeError: a tensor has no values, no shape yet, or rows of different shapes.
    """
    for x in leaves:
        if type(x) is Tensor:  # asked of every argument of every call
            if x.is_nested or x.is_meta:
                _check_strange(name, x, what)
        elif isinstance(x, Tensor):
            _check_strange(name, x, what)


def is_uninitialized(x: object) -> bool:
    """Whether it is a lazy module's tensor, which must not be asked for anything."""
    return isinstance(x, (UninitializedParameter, UninitializedBuffer))


class _Words(NamedTuple):
    """What is asked of a tensor, and remedies."""

    tensor: tuple[str, str]
    real: str
    of_complex: str
    of_integers: str
    dense: str


_INPUT = _Words(
    (
        "the differentiated argument to hold tensors only",
        "Name the tensors to differentiate in argnums.",
    ),
    "a differentiated argument of real floating-point dtype",
    "Use torch.view_as_real for complex inputs.",
    "Pass integers as another argument and leave them out of argnums.",
    "a differentiated argument that is dense",
)
_OUTPUT = _Words(
    ("func to return tensors", "Return what is not a tensor as aux, with has_aux=True."),
    "func to return real floating-point tensors",
    "Use torch.view_as_real for complex outputs, and aux for integers.",
    "Return integers and booleans as aux, with has_aux=True.",
    "func to return dense tensors",
)


def check_input(name: str, leaf: Any) -> None:
    """Refuse what cannot be differentiated.

    Raises:
        TypeError: it is not a dense tensor of real floating-point dtype.
    """
    _check(name, leaf, _INPUT)


def check_output(name: str, leaf: Any) -> None:
    """Refuse an output that has no Jacobian.

    Raises:
        TypeError: it is not a dense tensor of real floating-point dtype, with values.
    """
    _check(name, leaf, _OUTPUT)
    if type(leaf) is not Tensor or leaf.is_nested or leaf.is_meta:
        _check_strange(name, leaf, "func to return tensors")


def _check(name: str, leaf: Any, words: _Words) -> None:
    if not isinstance(leaf, Tensor):
        expected, remedy = words.tensor
        raise refuse(name, TypeError, expected, type(leaf).__name__, remedy)
    if leaf.dtype not in _DTYPES:
        remedy = words.of_complex if leaf.is_complex() else words.of_integers
        if leaf.is_floating_point():
            remedy = "Convert it to torch.float32 first, which can be computed with."
        raise refuse(name, TypeError, words.real, leaf.dtype, remedy)
    if leaf.layout != torch.strided:
        raise refuse(name, TypeError, words.dense, leaf.layout, "Call .to_dense() on it.")


def _check_strange(name: str, x: Tensor, what: str) -> None:
    """Refuse what has no values or no shape; compilers and transforms bring their own kinds."""
    if torch.compiler.is_compiling():
        return
    if is_uninitialized(x):
        remedy = "Run the module once on a batch first, which gives it its shape."
        raise refuse(name, TypeError, f"{what} of an initialized shape", type(x).__name__, remedy)
    if x.is_nested and x.layout == torch.strided:  # a jagged one has a shape, and can be beside
        remedy = "Pad its rows to one shape, as torch.nested.to_padded_tensor does."
        raise refuse(name, TypeError, f"{what} of dense layout", "a nested tensor", remedy)
    # A fake tensor names a device that its values are not on.
    is_fake = type(x) not in (Tensor, torch.nn.Parameter) and hasattr(x, "fake_mode")
    if (x.is_meta or is_fake) and not is_transformed():
        remedy = "Move it to a device that holds its values, or compute it from such tensors."
        got = type(x).__name__ if is_fake else x.device
        raise refuse(name, TypeError, f"{what} with values", got, remedy)
