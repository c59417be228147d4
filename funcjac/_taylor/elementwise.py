"""Elementwise operations, by the chain rule of any order.

Their derivatives are tensors of the result's shape: plain autograd gives them by
differentiating the sum of the result again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcjac._environment.torch_private import backward
from funcjac._taylor.jets import Derivative, Index, Site, on_one_row, spread


def elementwise(site: Site) -> Derivative:
    """Propagates through an operation that works on each element by itself."""
    scheme, of_nodes = site.scheme, site.recording.partials
    key = site.node.outs, site.node.slots, scheme.order
    partials = of_nodes[key] = of_nodes.get(key) or _Partials(site)
    jets = [spread(jet, site.shape) for jet in site.jets.values()]
    multiply = functools.partial(on_one_row, torch.mul)

    def derivative(order: int) -> Sequence[Tensor | None]:
        terms: list[Any] = [((i,), jet[order - 1]) for i, jet in enumerate(jets)]
        terms += scheme.higher(order, jets, multiply, lambda numbers: partials(numbers) is None)
        total: Tensor | None = None
        for numbers, stack in terms:
            partial = partials(numbers)
            if partial is not None and stack is not None:
                total = partial * stack if total is None else torch.addcmul(total, partial, stack)
        return [total]

    return derivative


class _Partials:
    """Partial derivatives of an elementwise operation, by the numbers of its variables."""

    def __init__(self, site: Site) -> None:
        self.create_graph, self.order = site.recording.create_graph, site.scheme.order
        out, self.inputs = _graph(site)
        self.known: dict[Index, Tensor | None] = {(): out}

    def __call__(self, numbers: Index) -> Tensor | None:
        if numbers not in self.known:
            lower, grads = self(numbers[:-1]), [None] * len(self.inputs)
            graph = self.create_graph or len(numbers) < self.order
            if lower is not None:
                ones = lower.new_ones(()).expand(lower.shape)
                with torch.set_grad_enabled(graph):
                    grads = backward(lower, self.inputs, ones, retain=True, graph=graph)
            for i, grad in enumerate(grads):
                self.known[tuple(sorted((*numbers[:-1], i)))] = grad
        return self.known[numbers]


def _graph(site: Site) -> tuple[Tensor, list[Tensor]]:
    """Result and arguments: in the graph of ``func``'s run, or of the same shape in another one."""
    values = site.recording.values
    x, out = values[site.node.slots[0]], values[site.node.outs[0] or 0]
    attached = x.requires_grad and out.requires_grad and x.shape == out.shape
    if len(site.node.slots) == 1 and attached:
        return out, [x]
    with torch.enable_grad():
        copies = {slot: x.expand(site.shape) for slot, x in site.variables().items()}
        return site.node.run(copies)[0], list(copies.values())
