"""Trees of tensors. The only importer of optree.

Classes may be registered with torch's pytree, or with optree globally or in the namespace
``"funcjac"``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import optree
import torch
from torch import Tensor
from torch.utils import _pytree as torch_pytree

NAMESPACE = "funcjac"

Tree = Any
TreeSpec = optree.PyTreeSpec


def flatten(tree: Tree, *, none_is_leaf: bool = False) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of an output or an input; ``None`` is structure."""
    keywords: Any = {"none_is_leaf": none_is_leaf, "namespace": NAMESPACE}
    if torch.compiler.is_compiling():
        return optree.tree_flatten(tree, _is_constant, **keywords)
    leaves, spec = optree.tree_flatten(tree, **keywords)
    nodes = getattr(torch_pytree, "SUPPORTED_NODES", {})
    unknown = {type(leaf) for leaf in leaves if type(leaf) is not Tensor} & nodes.keys()
    for kind in unknown:
        _register(kind, nodes[kind])
    return flatten(tree, none_is_leaf=none_is_leaf) if unknown else (leaves, spec)


def flatten_args(tree: Tree) -> tuple[list[Any], TreeSpec]:
    """Leaves and structure of arguments; ``None`` is a leaf, as it is in ``in_dims``."""
    return flatten(tree, none_is_leaf=True)


def leaves(tree: Tree) -> list[Any]:
    """Leaves alone, of which ``None`` is one."""
    if torch.compiler.is_compiling():
        return optree.tree_leaves(tree, none_is_leaf=True, namespace=NAMESPACE)
    return flatten_args(tree)[0]


def _is_constant(tree: Tree) -> bool:
    """Whether a tree is a dict without tensors, whose structure Dynamo cannot keep."""
    return isinstance(tree, dict) and not any(isinstance(leaf, Tensor) for leaf in leaves(tree))


def _register(kind: type, node: Any) -> None:
    """Register with optree, in funcjac's namespace, what is registered with torch's pytree."""

    def take_apart(tree: Tree) -> tuple[list[Any], Any, None]:
        children, context = node.flatten_fn(tree)
        return list(children), _Context(repr(context), context), None

    def put_together(context: Any, children: Any) -> Tree:
        return node.unflatten_fn(list(children), context.value)

    optree.register_pytree_node(kind, take_apart, put_together, namespace=NAMESPACE)


@dataclass(frozen=True)
class _Context:
    """What torch's pytree keeps of a node; equal if it is printed alike."""

    text: str
    value: Any = field(compare=False, repr=False)


def unflatten(spec: TreeSpec | None, leaves: list[Any]) -> Tree:
    """The tree of ``leaves``; without a ``spec`` it is the one leaf itself."""
    return leaves[0] if spec is None else optree.tree_unflatten(spec, leaves)


def broadcast(prefix: Tree, tree: Tree) -> list[Any]:
    """One entry of a prefix tree for each leaf of ``tree`` (``None`` is a leaf of both)."""
    if not torch.compiler.is_compiling():
        return optree.broadcast_prefix(prefix, tree, none_is_leaf=True, namespace=NAMESPACE)
    containers = (tuple, list, dict)
    if not isinstance(prefix, containers) or _is_constant(tree):
        return [prefix] * len(flatten_args(tree)[0])
    trees = (prefix, tree) if isinstance(tree, containers) else (prefix, ())
    keys, expected = (sorted(x) if isinstance(x, dict) else range(len(x)) for x in trees)
    if keys != expected:
        raise ValueError("expected a prefix tree")
    return [dim for key in keys for dim in broadcast(prefix[key], tree[key])]


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The same tree with ``function`` of its tensors."""
    return optree.tree_map(
        lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf,
        tree,
        none_is_leaf=True,
        namespace=NAMESPACE,
    )


def sketch(tree: Tree) -> str:
    """The tree in one short line: shapes of tensors, kinds of all else."""

    def leaf(x: Any) -> str:
        return f"<{type(x).__name__}{tuple(x.shape) if isinstance(x, Tensor) else ''}>"

    text = repr(optree.tree_map(leaf, tree, namespace=NAMESPACE))
    text = text.replace("'<", "").replace(">'", "")  # without the quotes of a text
    return text if len(text) <= 200 else text[:200] + "..."


def tensors(tree: Tree) -> list[Tensor]:
    """The leaves that are tensors."""
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, Tensor)]
