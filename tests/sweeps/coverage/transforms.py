"""The transforms of the sweep: one list. A later transform joins it in a line.

Each is a name, how to make it of a batched function, and which derivatives of the oracle it gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcjac import batch_hessian, batch_hessian_diagonal, batch_jacobian, batch_laplacian
from tests.sweeps.coverage.oracle import Truth
from tests.sweeps.coverage.samples import Case


class MisshapenError(AssertionError):
    """A result without the structure or shapes that it should have."""


@dataclass(frozen=True)
class Kind:
    """A derivative: which of the oracle's it is, and how to read it off a result, flat."""

    order: str
    right: Callable[[Tensor], Tensor]
    read: Callable[[Any, Truth, Case], Tensor]
    tolerance: float


def _leaves(result: Any, outer: int, *inner: int) -> list[Any]:
    """Flat leaves of nested tuples with so many items at each level, one item standing bare."""
    found = [result]
    for count in (outer, *inner):
        if count > 1:
            if not all(isinstance(x, tuple) and len(x) == count for x in found):
                raise MisshapenError(f"has no tuple of {count}")
            found = [x for tree in found for x in tree]
    if not all(type(x) is Tensor for x in found):
        raise MisshapenError("has leaves that are no tensors")
    return found


def _read(result: Any, truth: Truth, depth: int) -> Tensor:
    """``depth`` levels of input inside that of the output, as ``(B, M, N, ..., N)``."""
    outs, ins = truth.out_shapes, truth.in_shapes
    batch = truth.value.shape[0]
    leaves = _leaves(result, len(outs), *[len(ins)] * depth)

    def join(leaves: list[Tensor], before: tuple[torch.Size, ...], left: int) -> Tensor:
        if not left:
            (leaf,) = leaves
            shape = (batch, *[n for s in before for n in s])
            if leaf.shape != shape:
                raise MisshapenError(f"has shape {tuple(leaf.shape)}, not {shape}")
            if not leaf.is_contiguous():
                raise MisshapenError("is not contiguous")
            return leaf.reshape(batch, *[s.numel() for s in before])
        part = len(leaves) // len(ins)
        found = [
            join(leaves[j * part : (j + 1) * part], (*before, shape), left - 1)
            for j, shape in enumerate(ins)
        ]
        return torch.cat(found, 1 + len(before))

    part = len(leaves) // len(outs)
    found = [
        join(leaves[i * part : (i + 1) * part], (shape,), depth) for i, shape in enumerate(outs)
    ]
    return torch.cat(found, 1)


JACOBIAN = Kind("jacobian", lambda jac: jac, lambda r, t, _: _read(r, t, 1), 1e-8)
HESSIAN = Kind("hessian", lambda hess: hess, lambda r, t, _: _read(r, t, 2), 1e-6)
DIAGONAL = Kind(
    "hessian", lambda hess: hess.diagonal(dim1=2, dim2=3), lambda r, t, _: _read(r, t, 1), 1e-6
)
LAPLACIAN = Kind(
    "hessian",
    lambda hess: hess.diagonal(dim1=2, dim2=3).sum(-1),
    lambda r, t, _: _read(r, t, 0),
    1e-6,
)


def contracted(jac: Tensor, weights: Tensor) -> Tensor:
    return (jac * weights).sum()


@dataclass(frozen=True)
class Transform:
    """One column of the table.

    Attributes:
        make: of a batched function and ``argnums`` the transformed function.
        kind: what comes out, ``backward`` a gradient through it as well.
        promised: whether it must be right wherever the loop over rows is.
        calls: how often it is called, with rows in another order each time.
        inside: ``"grad"`` or ``"vmap"``, the transform of torch.func that it is called in.
    """

    name: str
    make: Callable[..., Callable[..., Any]]
    kind: Kind
    words: dict[str, Any]
    promised: bool = False
    backward: bool = False
    calls: int = 2
    inside: str = ""

    @property
    def second(self) -> bool:
        """Whether second derivatives are asked for."""
        return self.kind.order == "hessian" or self.backward or self.inside == "grad"

    @property
    def vouched(self) -> bool:
        """Whether nobody looks if rows depend on one another."""
        return self.words.get("check") is False or self.inside == "vmap"

    @property
    def once(self) -> bool:
        """Whether what one plain run of the function changes is all that may have changed."""
        return self.words.get("engine", "sum") == "sum" and self.inside != "vmap"

    def of(self, func: Callable[..., Any], argnums: int | tuple[int, ...]) -> Callable[..., Any]:
        return self.make(func, argnums, **self.words)


def _nested(func: Callable[..., Any], argnums: int | tuple[int, ...], **words: Any) -> Any:
    return batch_jacobian(batch_jacobian(func, argnums, **words), argnums, **words)


NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")
ROUTES = [(engine, mode) for engine in ("vmap", "sum", "loop") for mode in ("rev", "fwd")]

TRANSFORMS = [
    Transform("batch_jacobian", batch_jacobian, JACOBIAN, {}, promised=True, calls=3),
    Transform("check=False", batch_jacobian, JACOBIAN, {"check": False}, promised=True),
    Transform("in torch.func.grad", batch_jacobian, JACOBIAN, {}, promised=True, inside="grad"),
    Transform("in torch.vmap", batch_jacobian, JACOBIAN, {}, promised=True, inside="vmap"),
    *[
        Transform(
            f"batch_jacobian {engine}/{mode}",
            batch_jacobian,
            JACOBIAN,
            {"engine": engine, "mode": mode},
        )
        for engine, mode in ROUTES
    ],
    # Torch's own forward formulas, where nobody looks at what they give.
    Transform(
        "vmap/fwd check=False",
        batch_jacobian,
        JACOBIAN,
        {"engine": "vmap", "mode": "fwd", "check": False},
        calls=1,
    ),
    Transform(
        "fwd in torch.vmap", batch_jacobian, JACOBIAN, {"mode": "fwd"}, inside="vmap", calls=1
    ),
    Transform("backward", batch_jacobian, JACOBIAN, {}, promised=True, backward=True, calls=3),
    Transform("backward rev", batch_jacobian, JACOBIAN, {"mode": "rev"}, backward=True, calls=1),
    Transform("backward fwd", batch_jacobian, JACOBIAN, {"mode": "fwd"}, backward=True, calls=1),
    Transform("nested", _nested, HESSIAN, {}, promised=True),
    Transform("batch_hessian", batch_hessian, HESSIAN, {}, promised=True),
    Transform("batch_hessian in torch.vmap", batch_hessian, HESSIAN, {}, inside="vmap", calls=1),
    *[
        Transform(f"batch_hessian {mode}", batch_hessian, HESSIAN, {"mode": mode}, calls=1)
        for mode in NESTED
    ],
    Transform("batch_hessian_diagonal", batch_hessian_diagonal, DIAGONAL, {}, promised=True),
    Transform(
        "batch_hessian_diagonal taylor",
        batch_hessian_diagonal,
        DIAGONAL,
        {"mode": "taylor"},
        calls=1,
    ),
    Transform("batch_laplacian", batch_laplacian, LAPLACIAN, {}, promised=True),
    Transform("batch_laplacian taylor", batch_laplacian, LAPLACIAN, {"mode": "taylor"}, calls=1),
]
