"""Checks that tensors can be looked at and differentiated."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from funcjac._environment.torch_private import is_transformed
from funcjac.errors import refuse

# What can be computed with: of narrower types PyTorch only knows how to store them.
DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))


# What is expected of a tensor, of its dtype and of its layout; remedies for what is no tensor, is
# complex, or holds integers.
_OF_INPUT = (
    "the differentiated argument to hold tensors only",
    "a differentiated argument of real floating-point dtype",
    "a differentiated argument that is dense",
    "Name the tensors to differentiate in argnums.",
    "Use torch.view_as_real for complex inputs.",
    "Pass integers as another argument and leave them out of argnums.",
)
_OF_OUTPUT = (
    "func to return tensors",
    "func to return real floating-point tensors",
    "func to return dense tensors",
    "Return what is not a tensor as aux, with has_aux=True.",
    "Use torch.view_as_real for complex outputs, and aux for integers.",
    "Return integers and booleans as aux, with has_aux=True.",
)


def check_input(name: str, leaf: Any, words: tuple[str, ...] = _OF_INPUT) -> None:
    """Refuse what cannot be differentiated."""
    tensor, real, dense, of_others, of_complex, of_integers = words
    if not isinstance(leaf, Tensor):
        raise refuse(name, TypeError, tensor, type(leaf).__name__, of_others)
    if leaf.dtype not in DTYPES:
        remedy = of_complex if leaf.is_complex() else of_integers
        if leaf.is_floating_point():
            remedy = "Convert it to torch.float32 first, which can be computed with."
        raise refuse(name, TypeError, real, leaf.dtype, remedy)
    if leaf.layout != torch.strided:
        raise refuse(name, TypeError, dense, leaf.layout, "Call .to_dense() on it.")


def check_output(name: str, leaf: Any) -> None:
    """Refuse an output that has no Jacobian."""
    check_input(name, leaf, _OF_OUTPUT)
    check_arguments(name, [leaf], "func to return tensors")


def check_arguments(name: str, leaves: Iterable[Any], what: str = "tensors") -> None:
    """Refuse tensors that nothing can be computed of, differentiated or not."""
    for x in leaves:
        is_plain = type(x) is Tensor and not (x.is_nested or x.is_meta)  # asked at every call
        if not is_plain and isinstance(x, Tensor) and not torch.compiler.is_compiling():
            _check_strange(name, x, what)


def is_uninitialized(x: object) -> bool:
    """Whether it is a lazy module's tensor, which must not be asked for anything."""
    return isinstance(x, (UninitializedParameter, UninitializedBuffer))


def _check_strange(name: str, x: Tensor, what: str) -> None:
    """Refuse what has no values or no shape; transforms bring their own kinds."""
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
