"""Transforms, functions that know how often they ran, and all that a call must leave unchanged."""

import contextlib
import random
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import torch.distributed.tensor  # assert_close imports it, which changes filters of warnings
from torch import nn
from torch._C._functorch import peek_interpreter_stack

from funcjac import (
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_laplacian,
    batch_partials,
    check_batched,
    check_derivative,
    explain,
)

B = 4

INDICES = [(0,), (1, 1)]

# What torch says itself where such a tensor is made
BETA = (
    "ignore:Sparse CSR",
    "ignore:.*nested tensors",
    "ignore:torch.quantize",
    "ignore:.*[Qq]uantized",
    "ignore:Named tensors",
)


def partials(func, *args, **words):
    return batch_partials(func, INDICES, *args, **words)


TRANSFORMS = {
    "batch_jacobian": batch_jacobian,
    "batch_hessian": batch_hessian,
    "batch_hessian_diagonal": batch_hessian_diagonal,
    "batch_laplacian": batch_laplacian,
    "batch_divergence": batch_divergence,
    "batch_partials": partials,
}

MODES = {
    "batch_jacobian": ("rev", "fwd", "auto"),
    "batch_hessian": ("fwd_over_rev", "rev_over_rev", "auto"),
    "batch_hessian_diagonal": ("taylor", "rev_over_rev", "auto"),
    "batch_laplacian": ("taylor", "rev_over_rev", "auto"),
    "batch_divergence": ("rev", "fwd", "auto"),
    "batch_partials": ("taylor", "rev", "auto"),
}

by_name = pytest.mark.parametrize("name", TRANSFORMS)

SECOND = tuple(name for name in TRANSFORMS if name not in ("batch_jacobian", "batch_divergence"))

TAYLOR = ("batch_hessian_diagonal", "batch_laplacian", "batch_partials")

# What takes arguments: the transforms, and those that look at one
CALLS = {
    **{name: lambda func, t=t, **words: t(func, **words) for name, t in TRANSFORMS.items()},
    "explain": lambda func, **words: lambda *args: explain(batch_jacobian(func, **words), *args),
    "check_derivative": lambda func, **words: (
        lambda *args: check_derivative(batch_jacobian(func, **words), *args)
    ),
    "check_batched": lambda func, **words: lambda *args: check_batched(func, *args, **words),
}

SPOKEN = {"explain": "batch_jacobian", "check_derivative": "batch_jacobian"}

OPERATORS = tuple(name for name in CALLS if name != "check_batched")


def ones(*shape, dtype=torch.float64):
    return torch.ones(*shape, dtype=dtype)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Watched(nn.Module):
    """A function that knows how often it ran, with all that a call could change."""

    def __init__(self, func=lambda x, *rest: x.sin()):
        super().__init__()
        self.func, self.tally = func, SimpleNamespace(runs=0)  # a module's own lists are put back
        self.linear = nn.Linear(3, 3).double()
        self.linear.weight.grad = torch.ones(3, 3).double()
        self.linear.bias.requires_grad_(False)
        self.register_buffer("runs", torch.zeros(()))
        self.note, self.train_me = "as before", nn.Dropout(0.5).eval()
        self.linear.register_forward_hook(lambda *args: None)

    @property
    def count(self):
        return self.tally.runs

    def forward(self, *args, **kwargs):
        self.tally.runs += 1
        return self.func(*args, **kwargs)


def of_tensor(x):
    """What can be known of any tensor, whatever its kind."""
    plain = not isinstance(x, nn.parameter.UninitializedTensorMixin)
    if not plain:
        return id(x), x.requires_grad
    dense = type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided
    dense = dense and not x.is_nested and not x.is_quantized and x.device.type == "cpu"
    return (
        id(x),
        type(x),
        None if x.is_inference() else x._version,
        x.requires_grad,
        None if not x.is_leaf or x.grad is None else (id(x.grad), x.grad.tolist()),
        str(x.detach().double().tolist()) if dense and x.is_floating_point() else None,
        x.data_ptr() if dense else None,
        x._backward_hooks,
    )


def of_module(module):
    return [
        (
            sorted(vars(m)),
            m.training,
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._backward_hooks),
            [of_tensor(t) for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))],
            {k: id(v) for k, v in vars(m).items() if not k.startswith("_")},
        )
        for m in module.modules()
    ]


def of_process():
    return {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "random state": torch.get_rng_state().tolist(),
        "random": random.getstate(),
        "numpy": str(numpy.random.get_state()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "transforms": peek_interpreter_stack(),
        "dual level": torch.autograd.forward_ad._current_level,
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "fallback": torch._C._functorch._is_vmap_fallback_enabled(),
        "threads": torch.get_num_threads(),
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "multithreading": torch._C._is_multithreading_enabled(),
        "filters": list(warnings.filters),
    }


@contextlib.contextmanager
def unchanged(module, tensors):
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    before = of_process(), of_module(module), [of_tensor(x) for x in tensors]
    yield
    assert of_process() == before[0]
    assert of_module(module) == before[1]
    assert [of_tensor(x) for x in tensors] == before[2]


def leaves(args):
    for arg in args:
        if isinstance(arg, dict):
            yield from leaves(arg.values())
        elif isinstance(arg, (list, tuple)):
            yield from leaves(arg)
        else:
            yield arg


class Wrong(NamedTuple):
    """A wrong call.

    Attributes:
        words: of the transform.
        args: what it is called with; ``None`` where making it is refused already.
        kind: of the exception, exactly.
        expected: what the message expects, as a pattern.
        got: what it says that came.
        names: of the transforms it is wrong for.
    """

    words: dict[str, Any]
    args: Any
    kind: type[Exception]
    expected: str
    got: str
    names: tuple[str, ...] = tuple(TRANSFORMS)


def named(table):
    """Every entry with each of its names."""
    return [(entry, name) for entry, wrong in table.items() for name in wrong.names]


TUPLES = tuple(TRANSFORMS)
