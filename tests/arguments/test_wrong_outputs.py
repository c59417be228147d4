"""Wrong outputs of ``func``: refused after its first run, with the remedy, nothing changed."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.arguments.test_wrong_arguments import ARGUMENTS
from tests.arguments.test_wrong_keywords import WORDS, WRONG_INDICES
from tests.tensors import randn
from tests.watched import BETA, CALLS, OPERATORS, SPOKEN, B, Watched, named, ones, unchanged

FAKE, F8 = FakeTensorMode(), torch.float8_e4m3fn

ALL = tuple(CALLS)


def nested():
    return torch.nested.nested_tensor([ones(3)] * B)


def quantized():
    return torch.quantize_per_tensor(ones(B, 3).float(), 0.1, 0, torch.qint8)


AUX = r"aux, with has_aux=True"

BATCH = r"func to return a batch of 4 in dimension 0"


class Output(NamedTuple):
    """What ``func`` may not return, and the words of the transform."""

    func: Any
    kind: type[Exception]
    expected: str
    got: str
    remedy: str
    names: tuple[str, ...]
    words: dict[str, Any]


def output(func, kind, expected, got, remedy="", names=ALL, **words):
    return Output(func, kind, expected, got, remedy, names, words)


OUTPUTS = {
    "None": output(lambda x: None, TypeError, "func to return", "None"),
    "a number": output(lambda x: 3.0, TypeError, "return tensors", "float", AUX),
    "a string": output(lambda x: "x", TypeError, "return tensors", "str", AUX),
    "an item": output(lambda x: x.sum().item(), TypeError, "return tensors", "float", AUX),
    "a generator": output(lambda x: (y for y in [x]), TypeError, "tensors", "generator", AUX),
    "a set": output(lambda x: {x}, TypeError, "func to return tensors", "set", AUX),
    "a class": output(lambda x: torch.Tensor, TypeError, "func to return tensors", "", AUX),
    "a module": output(lambda x: nn.Identity(), TypeError, "return tensors", "Identity", AUX),
    "NumPy": output(lambda x: x.detach().numpy(), TypeError, "tensors", "ndarray", AUX),
    "an empty tree": output(lambda x: {}, TypeError, "at least one tensor", "dict"),
    "a tree of None": output(lambda x: [None], TypeError, "at least one tensor", "list"),
    "a number in a tree": output(lambda x: [x, 1], TypeError, "tensors", "int", AUX),
    "integers": output(lambda x: x.long(), TypeError, "floating-point", "torch.int64", AUX),
    "booleans": output(lambda x: x > 0, TypeError, "floating-point", "torch.bool", AUX),
    "complex": output(torch.fft.fft, TypeError, "real floating", "torch.complex128", "view_as_re"),
    "COO": output(lambda x: x.to_sparse(), TypeError, "dense", "torch.sparse_coo", "to_dense"),
    "CSR": output(lambda x: x.to_sparse_csr(), TypeError, "dense", "torch.sparse_csr", "to_dense"),
    "nested": output(
        lambda x: torch.nested.as_nested_tensor(list(x)), TypeError, "dense", "", "to_"
    ),
    "quantized": output(
        lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        TypeError,
        "real floating-point",
        "torch.qint8",
    ),
    "meta": output(lambda x: x.to("meta"), TypeError, "values", "meta"),
    "float8": output(
        lambda x: x.to(F8), TypeError, "real floating-point", "torch.float8", "torch.float32"
    ),
    "a constant on meta": output(lambda x: torch.ones(B, 3, device="meta"), TypeError, "v", "meta"),
    "a scalar": output(lambda x: x.sum(), ValueError, BATCH, r"shape \(\)", "torch.vmap"),
    "a mean": output(lambda x: x.mean(0), ValueError, BATCH, r"shape \(3,\)", "torch.vmap"),
    "one row": output(lambda x: x[:1], ValueError, BATCH, r"shape \(1, 3\)", "torch.vmap"),
    "no row": output(lambda x: x[:0], ValueError, BATCH, r"shape \(0, 3\)", "torch.vmap"),
    "another row": output(lambda x: torch.cat([x, x]), ValueError, BATCH, r"shape \(8, 3\)", "vm"),
    "transposed": output(lambda x: x.T, ValueError, BATCH, r"shape \(3, 4\)", "torch.vmap"),
    "one of two": output(lambda x: (x, x.mT), ValueError, BATCH, r"shape \(3, 4\)", "torch.vmap"),
    "another dimension": output(
        lambda x: x, ValueError, "in dimension 1", r"shape \(4, 3\)", "vmap", out_dims=1
    ),
    "out_dims too large": output(
        lambda x: x, ValueError, "in dimension 5", r"shape \(4, 3\)", "vmap", out_dims=5
    ),
    "out_dims of another tree": output(
        lambda x: {"a": x}, ValueError, "out_dims to be", "{'b': 0}", out_dims={"b": 0}
    ),
    "out_dims too long": output(
        lambda x: (x, x), ValueError, "out_dims to be", r"\(0, 0, 0\)", out_dims=(0, 0, 0)
    ),
    "out_dims empty": output(lambda x: x, ValueError, "out_dims to be", r"\(\)", out_dims=()),
    "no pair": output(
        lambda x: x, TypeError, "a pair", "Tensor", "drop has_aux", OPERATORS, has_aux=True
    ),
    "a triple": output(
        lambda x: (x, 1, 2), TypeError, "a pair", "tuple", "drop has_aux", OPERATORS, has_aux=True
    ),
    "a list as a pair": output(
        lambda x: [x, 1], TypeError, "a pair", "list", "drop has_aux", OPERATORS, has_aux=True
    ),
    "aux first": output(
        lambda x: (1, x), TypeError, "return tensors", "int", "aux", OPERATORS, has_aux=True
    ),
    "another field": output(lambda x: x[:, :2], ValueError, "", "", "", ("batch_divergence",)),
    "two for one": output(lambda x: (x, x), ValueError, "", "", "", ("batch_divergence",)),
}


@pytest.mark.filterwarnings(*BETA)
@pytest.mark.parametrize(("entry", "name"), named(OUTPUTS))
def test_wrong_outputs_are_refused_after_the_first_run(entry, name):
    out, kind, expected, got, remedy, _, words = OUTPUTS[entry]
    func, x = Watched(out), randn(B, 3)
    transformed = CALLS[name](func, **words)
    match = rf"(?s)^{SPOKEN.get(name, name)}: expected .*{expected}.*, got .*{got}.*\..*{remedy}"
    for calls in (1, 2):
        with unchanged(func, [x]), pytest.raises(kind, match=match) as found:
            transformed(x)
        assert type(found.value) is kind
        assert "tensor(" not in str(found.value)
        assert func.count == calls  # on the batch, before any differentiation


def test_the_table_is_long():
    assert len(WORDS) + len(ARGUMENTS) + len(OUTPUTS) + len(WRONG_INDICES) >= 100
