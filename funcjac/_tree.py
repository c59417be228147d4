"""Trees of tensors. The only importer of optree.

Dataclasses may be registered with optree globally or in the namespace
``"funcjac"``.
"""

from collections.abc import Callable
from typing import Any

import optree
from torch import Tensor

NAMESPACE = "funcjac"

Tree = Any
TreeSpec = optree.PyTreeSpec


def flatten(tree: Tree) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of an output or an input; ``None`` is structure."""
    return optree.tree_flatten(tree, namespace=NAMESPACE)


def flatten_args(tree: Tree) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of arguments; ``None`` is a leaf, as it is in ``in_dims``."""
    return optree.tree_flatten(tree, none_is_leaf=True, namespace=NAMESPACE)


def unflatten(spec: TreeSpec | None, leaves: list[Any]) -> Tree:
    """The tree of ``leaves``; without a ``spec`` it is the one leaf itself."""
    if spec is None:
        return leaves[0]
    return optree.tree_unflatten(spec, leaves)


def broadcast(prefix: Tree, tree: Tree) -> list[Any]:
    """One entry of ``prefix`` for each leaf of ``tree`` (``None`` is a leaf of both).

    Raises:
        ValueError: ``prefix`` is not a prefix tree of ``tree``.
    """
    return optree.broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=NAMESPACE)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The same tree with ``function`` of its tensors."""
    return optree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf,
        tree,
        none_is_leaf=True,
        namespace=NAMESPACE,
    )


class _Bare(str):
    """Text that stands without quotes where it is part of a tree."""

    __slots__ = ()
    __repr__ = str.__str__


def sketch(tree: Tree) -> str:
    """The tree in one short line: shapes of tensors, kinds of all else."""

    def leaf(x: Any) -> _Bare:
        shape = str(tuple(x.shape)) if isinstance(x, Tensor) else ""
        return _Bare(f"{type(x).__name__}{shape}")

    text = repr(optree.tree_map(leaf, tree, namespace=NAMESPACE))
    return text if len(text) <= 200 else text[:200] + "..."


def tensors(tree: Tree) -> list[Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
