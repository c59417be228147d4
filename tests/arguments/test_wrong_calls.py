"""Wrong calls of every public function: its documented error before any work, nothing changed.

One table of words that are refused when a transform is made, of arguments that are refused
before ``func`` runs, and of outputs that are refused after its first run; then functions that
raise midway or have side effects. What is unusual and right stands below it.
"""

import contextlib
import copy
import random
import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensorMode

from funcjac import (
    BatchMixingError,
    VerificationError,
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
quiet = pytest.mark.filterwarnings("ignore::funcjac.EngineFallbackWarning")
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


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# --- what must be as before ----------------------------------------------------------------


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


# --- the table: words ------------------------------------------------------------------------

ARGNUMS = "argnums to be an int"
TUPLES = tuple(TRANSFORMS)
ESTIMATES = ("batch_laplacian", "batch_divergence")
LAPLACIAN, PARTIALS = ("batch_laplacian",), ("batch_partials",)
WORDS = {
    "argnums float": Wrong({"argnums": 0.0}, None, TypeError, ARGNUMS, "0.0"),
    "argnums bool": Wrong({"argnums": False}, None, TypeError, ARGNUMS, "False"),
    "argnums None": Wrong({"argnums": None}, None, TypeError, ARGNUMS, "None"),
    "argnums list": Wrong({"argnums": [0]}, None, TypeError, ARGNUMS, r"\[0\]"),
    "argnums tensor": Wrong({"argnums": torch.tensor(0)}, None, TypeError, ARGNUMS, r"tensor\(0\)"),
    "argnums NumPy": Wrong({"argnums": numpy.int64(0)}, None, TypeError, ARGNUMS, ".*0.*"),
    "argnums with a bool": Wrong(
        {"argnums": (0, True)}, None, TypeError, ARGNUMS, r"\(0, True\)", TUPLES
    ),
    "argnums with a float": Wrong(
        {"argnums": (0, 1.0)}, None, TypeError, ARGNUMS, r"\(0, 1.0\)", TUPLES
    ),
    "argnums nested": Wrong({"argnums": ((0,),)}, None, TypeError, ARGNUMS, r"\(\(0,\),\)"),
    "argnums empty": Wrong({"argnums": ()}, None, ValueError, "argnums to name", r"\(\)", TUPLES),
    "argnums twice": Wrong(
        {"argnums": (1, 1)}, None, ValueError, "argnums to be unique", r"\(1, 1\)", TUPLES
    ),
    "in_dims None": Wrong({"in_dims": None}, None, TypeError, "in_dims to be an int", "None"),
    "in_dims bool": Wrong({"in_dims": False}, None, TypeError, "in_dims to be an int", "False"),
    "in_dims float": Wrong({"in_dims": 0.0}, None, TypeError, "in_dims to be an int", "0.0"),
    "in_dims dict": Wrong({"in_dims": {"x": 0}}, None, TypeError, "in_dims to be an int", "{.*}"),
    "in_dims tensor": Wrong(
        {"in_dims": torch.tensor(0)}, None, TypeError, "in_dims to be an int", "tensor.*"
    ),
    "out_dims None": Wrong({"out_dims": None}, None, TypeError, "out_dims to be an int", "None"),
    "out_dims bool": Wrong({"out_dims": True}, None, TypeError, "out_dims to be an int", "True"),
    "out_dims float": Wrong({"out_dims": 0.0}, None, TypeError, "out_dims to be an int", "0.0"),
    "out_dims with None": Wrong(
        {"out_dims": (0, None)}, None, TypeError, "out_dims to be an int", r"\(0, None\)"
    ),
    "mode unknown": Wrong({"mode": "reverse"}, None, ValueError, "mode to be one of", "'reverse'"),
    "mode None": Wrong({"mode": None}, None, ValueError, "mode to be one of", "None"),
    "mode bytes": Wrong({"mode": b"auto"}, None, ValueError, "mode to be one of", "b'auto'"),
    "mode array": Wrong({"mode": numpy.ones(2)}, None, ValueError, "mode to be one of", "array.*"),
    "mode of first order": Wrong(
        {"mode": "fwd"}, None, ValueError, "mode to be one of", "'fwd'", SECOND
    ),
    "mode of second order": Wrong(
        {"mode": "rev_over_rev"},
        None,
        ValueError,
        "mode to be one of",
        "'rev_over_rev'",
        ("batch_jacobian", "batch_divergence", "batch_partials"),
    ),
    "taylor for one row": Wrong(
        {"mode": "taylor", "engine": "vmap"}, None, ValueError, "engine to be .*", "'vmap'", TAYLOR
    ),
    "engine unknown": Wrong({"engine": "jit"}, None, ValueError, "engine to be one of", "'jit'"),
    "engine case": Wrong({"engine": "VMAP"}, None, ValueError, "engine to be one of", "'VMAP'"),
    "engine None": Wrong({"engine": None}, None, ValueError, "engine to be one of", "None"),
    "engine list": Wrong(
        {"engine": ["sum"]}, None, ValueError, "engine to be one of", r"\['sum'\]"
    ),
    "chunk_size 0": Wrong({"chunk_size": 0}, None, ValueError, "chunk_size to be None or", "0"),
    "chunk_size -3": Wrong({"chunk_size": -3}, None, ValueError, "chunk_size to be None or", "-3"),
    "chunk_size float": Wrong({"chunk_size": 2.0}, None, TypeError, "chunk_size to be None", "2.0"),
    "chunk_size bool": Wrong({"chunk_size": True}, None, TypeError, "chunk_size to be N", "True"),
    "chunk_size auto": Wrong(
        {"chunk_size": "auto"}, None, TypeError, "chunk_size to be None or", "'auto'"
    ),
    "has_aux int": Wrong({"has_aux": 1}, None, TypeError, "has_aux to be a bool", "1"),
    "return_value None": Wrong(
        {"return_value": None}, None, TypeError, "return_value to be a bool", "None"
    ),
    "randomness None": Wrong(
        {"randomness": None}, None, ValueError, "randomness to be one of", "None"
    ),
    "randomness bool": Wrong(
        {"randomness": True}, None, ValueError, "randomness to be one of", "True"
    ),
    "check once": Wrong({"check": "once"}, None, ValueError, "check to be 'auto'", "'once'"),
    "check None": Wrong({"check": None}, None, ValueError, "check to be 'auto'", "None"),
    "check 0": Wrong({"check": 0}, None, ValueError, "check to be 'auto'", "0"),
    "check array": Wrong({"check": numpy.ones(2)}, None, ValueError, "check to be 'a", "array.*"),
    # words of their own
    "samples 0": Wrong({"samples": 0}, None, ValueError, "samples to be", "0", ESTIMATES),
    "samples float": Wrong({"samples": 4.0}, None, TypeError, "samples to be", "4.0", ESTIMATES),
    "samples bool": Wrong({"samples": True}, None, TypeError, "samples to be", "True", ESTIMATES),
    "probes unknown": Wrong(
        {"samples": 2, "probes": "normal"}, None, ValueError, "probes to be", "'norma.*", ESTIMATES
    ),
    "probes array": Wrong(
        {"samples": 2, "probes": numpy.ones(2)},
        None,
        ValueError,
        "probes to be",
        "array.*",
        ESTIMATES,
    ),
    "generator NumPy": Wrong(
        {"samples": 2, "generator": numpy.random.default_rng()},
        None,
        TypeError,
        "generator to be a torch.Generator",
        "Generator",
        ESTIMATES,
    ),
    "return_error of one": Wrong(
        {"samples": 1, "return_error": True}, None, ValueError, "two samples", "1", ESTIMATES
    ),
    "return_error without samples": Wrong(
        {"return_error": True}, None, ValueError, "two samples", "None", ESTIMATES
    ),
    "weight list": Wrong({"weight": [1.0]}, None, TypeError, "weight to be a", "list", LAPLACIAN),
    "weight_dim alone": Wrong({"weight_dim": 0}, None, TypeError, "weight_dim to", "0", LAPLACIAN),
    "weight_dim bool": Wrong(
        {"weight": ones(B, 3), "weight_dim": True},
        None,
        TypeError,
        "weight_dim to be",
        "True",
        LAPLACIAN,
    ),
}


@pytest.mark.parametrize(("word", "name"), named(WORDS))
def test_words(word, name):
    words, _, kind, expected, got, _ = WORDS[word]
    func = Watched()
    match = rf"(?s)^{name}: expected .*{expected}.*, got {got}\."
    with unchanged(func, []), pytest.raises(kind, match=match) as found:
        TRANSFORMS[name](func, **words)
    assert type(found.value) is kind
    assert found.value.__cause__ is None
    assert func.count == 0


WRONG_INDICES = {
    "none": ([], ValueError),
    "an int": (0, TypeError),
    "a string": ("01", TypeError),
    "a generator": ((i for i in [(0,)]), TypeError),
    "nested": ([((0,),)], TypeError),
    "floats": ([(0.0,)], TypeError),
    "bools": ([(False,)], TypeError),
    "NumPy": ([(numpy.int64(1),)], TypeError),
    "slices": ([(slice(0, 1),)], TypeError),
    "a tensor": (torch.tensor([[0]]), TypeError),
}


@pytest.mark.parametrize("name", WRONG_INDICES)
def test_indices(name):
    indices, kind = WRONG_INDICES[name]
    func = Watched()
    with unchanged(func, []), pytest.raises(kind, match=r"^batch_partials: expected .*ind(ex|ic)"):
        batch_partials(func, indices)
    assert func.count == 0


@pytest.mark.parametrize(
    "func",
    [None, 0, "sin", torch.ones(3), [torch.sin], numpy.ones(2)],
    ids=["None", "number", "word", "tensor", "list", "array"],
)
def test_func_is_not_callable(func):
    for name, transform in TRANSFORMS.items():
        with pytest.raises(TypeError, match=f"^{name}: expected func to be callable, got "):
            transform(func)
    with pytest.raises(TypeError, match=r"^check_batched: expected func to be callable, got "):
        check_batched(func, randn(B, 3))
    for look in (explain, check_derivative):
        with pytest.raises(TypeError, match=f"^{look.__name__}: expected a function returned by"):
            look(func, randn(B, 3))


@by_name
def test_words_that_do_not_exist(name):
    func = Watched()
    with pytest.raises(TypeError, match="unexpected keyword argument 'dims'"):
        TRANSFORMS[name](func, dims=0)
    with pytest.raises(TypeError, match="positional argument"):
        TRANSFORMS[name](func, 0, 0)
    assert func.count == 0


# --- the table: arguments --------------------------------------------------------------------

FAKE, F8 = FakeTensorMode(), torch.float8_e4m3fn
FLOATS = "a differentiated argument of real floating-point dtype"
DENSE = "a differentiated argument that is dense"
BATCHED = "at least one batched tensor argument"
DIM = "an argument with a batch dimension"
VALUES = "values"  # what stands for tensors that have none, in whichever words
ALL = tuple(CALLS)


def jagged():
    return torch.nested.nested_tensor([ones(2, 3), ones(3, 3)], layout=torch.jagged)


def nested():
    return torch.nested.nested_tensor([ones(3)] * B)


def quantized():
    return torch.quantize_per_tensor(ones(B, 3).float(), 0.1, 0, torch.qint8)


ARGUMENTS = {
    "bool": Wrong({}, lambda: [ones(B, 3).bool()], TypeError, FLOATS, "torch.bool", OPERATORS),
    "uint8": Wrong({}, lambda: [ones(B, 3).byte()], TypeError, FLOATS, "torch.uint8", OPERATORS),
    "int64": Wrong({}, lambda: [ones(B, 3).long()], TypeError, FLOATS, "torch.int64", OPERATORS),
    "complex64": Wrong(
        {}, lambda: [ones(B, 3).cfloat()], TypeError, FLOATS, "torch.complex64", OPERATORS
    ),
    "complex in a tree": Wrong(
        {},
        lambda: [{"a": ones(B), "b": ones(B).cdouble()}],
        TypeError,
        FLOATS,
        "torch.c",
        OPERATORS,
    ),
    "quantized": Wrong({}, lambda: [quantized()], TypeError, FLOATS, "torch.qint8", OPERATORS),
    "COO": Wrong(
        {}, lambda: [ones(B, 3).to_sparse()], TypeError, DENSE, "torch.sparse_coo", OPERATORS
    ),
    "CSR": Wrong(
        {}, lambda: [ones(B, 3).to_sparse_csr()], TypeError, DENSE, "torch.sparse_csr", OPERATORS
    ),
    "BSR": Wrong(
        {},
        lambda: [ones(B, 4).to_sparse_bsr((2, 2))],
        TypeError,
        DENSE,
        "torch.sparse_bsr",
        OPERATORS,
    ),
    "oneDNN": Wrong(
        {}, lambda: [ones(B, 3).float().to_mkldnn()], TypeError, DENSE, "torch._mkldnn", OPERATORS
    ),
    "COO to check_batched": Wrong(
        {}, lambda: [ones(B, 3).to_sparse()], TypeError, "dense", "torch.sp", ("check_batched",)
    ),
    "COO of integers to check_batched": Wrong(
        {},
        lambda: [ones(B, 3), ones(B, 3).long().to_sparse()],
        TypeError,
        "dense",
        "torch.sp",
        ("check_batched",),
    ),
    "float8": Wrong(
        {}, lambda: [ones(B, 3).to(F8)], TypeError, FLOATS, "torch.float8.*torch.float32", OPERATORS
    ),
    "jagged": Wrong({}, lambda: [jagged()], TypeError, DENSE, "torch.jagged", OPERATORS),
    "nested": Wrong({}, lambda: [nested()], TypeError, "dense", ".*", ALL),
    "nested beside": Wrong({}, lambda: [ones(B, 3), nested()], TypeError, "dense", ".*", ALL),
    "meta": Wrong({}, lambda: [ones(B, 3).to("meta")], TypeError, VALUES, "meta", ALL),
    "meta in a tree": Wrong(
        {}, lambda: [[ones(B, 3), ones(B, 3).to("meta")]], TypeError, VALUES, "meta", OPERATORS
    ),
    "meta for all rows": Wrong(
        {"in_dims": (0, None)},
        lambda: [ones(B, 3), ones(3).to("meta")],
        TypeError,
        VALUES,
        "meta",
        ALL,
    ),
    "a parameter on meta": Wrong(
        {}, lambda: [nn.Parameter(ones(B, 3).to("meta"))], TypeError, VALUES, "meta", ALL
    ),
    "meta beside": Wrong(
        {}, lambda: [ones(B, 3), ones(B, 3).to("meta")], TypeError, VALUES, "meta", ALL
    ),
    "fake": Wrong({}, lambda: [FAKE.from_tensor(ones(B, 3))], TypeError, VALUES, "FakeTensor", ALL),
    "uninitialized": Wrong(
        {}, lambda: [nn.UninitializedParameter()], TypeError, ".*initialized", "Uninit", ALL
    ),
    "no arguments": Wrong({}, list, ValueError, "", "0", ALL),
    "None": Wrong({}, lambda: [None], ValueError, BATCHED, "", ALL),
    "a number": Wrong({}, lambda: [3.0], ValueError, BATCHED, "", ALL),
    "a string": Wrong({}, lambda: ["x"], ValueError, BATCHED, "", ALL),
    "a list of lists": Wrong({}, lambda: [[[1.0], [2.0]]], ValueError, BATCHED, "", ALL),
    "NumPy": Wrong(
        {}, lambda: [numpy.ones((B, 3))], ValueError, BATCHED, ".*ndarray.*torch.from_numpy", ALL
    ),
    "an empty tree": Wrong({}, lambda: [{}], ValueError, BATCHED, "", ALL),
    "a set": Wrong({}, lambda: [{1.0}], ValueError, BATCHED, "", ALL),
    "an iterator": Wrong({}, lambda: [iter([ones(B)])], ValueError, BATCHED, "", ALL),
    "a class": Wrong({}, lambda: [torch.Tensor], ValueError, BATCHED, "", ALL),
    "NumPy differentiated": Wrong(
        {"argnums": 1},
        lambda: [ones(B), numpy.ones(B)],
        TypeError,
        "tensors only",
        "ndarray",
        OPERATORS,
    ),
    "None differentiated": Wrong(
        {"argnums": 1},
        lambda: [ones(B), None],
        ValueError,
        "a tensor to differentiate",
        "none",
        OPERATORS,
    ),
    "a number in a tree": Wrong(
        {}, lambda: [(ones(B, 3), 2)], TypeError, "tensors only", "int", OPERATORS
    ),
    "argnums too large": Wrong(
        {"argnums": 1}, lambda: [ones(B, 3)], ValueError, "argnums to index 1", "1", OPERATORS
    ),
    "argnums too small": Wrong(
        {"argnums": -2}, lambda: [ones(B, 3)], ValueError, "argnums to index 1", "-2", OPERATORS
    ),
    "argnums huge": Wrong(
        {"argnums": 10**30}, lambda: [ones(B, 3)], ValueError, "argnums to index", "1", OPERATORS
    ),
    "argnums the same": Wrong(
        {"argnums": (1, -1)},
        lambda: [ones(B, 3)] * 2,
        ValueError,
        "argnums to be unique",
        r"\(1, -1\)",
        TUPLES,
    ),
    "in_dims too short": Wrong(
        {"in_dims": (0,)}, lambda: [ones(B, 3)] * 2, ValueError, "in_dims to have one", "1", ALL
    ),
    "in_dims too long": Wrong(
        {"in_dims": (0, 0)}, lambda: [ones(B, 3)], ValueError, "in_dims to have one", "2", ALL
    ),
    "in_dims empty": Wrong(
        {"in_dims": ()}, lambda: [ones(B, 3)], ValueError, "in_dims to have one", "0", ALL
    ),
    "in_dims of another tree": Wrong(
        {"in_dims": ({"b": 0},)}, lambda: [{"a": ones(B)}], ValueError, "a prefix tree", "", ALL
    ),
    "in_dims deeper": Wrong(
        {"in_dims": ((0, 0),)}, lambda: [ones(B, 3)], ValueError, "a prefix tree", "", ALL
    ),
    "in_dims with a bool": Wrong(
        {"in_dims": (True,)}, lambda: [ones(B, 3)], TypeError, "ints and None", "bool", ALL
    ),
    "in_dims with a string": Wrong(
        {"in_dims": ("0",)}, lambda: [ones(B, 3)], TypeError, "ints and None", "str", ALL
    ),
    "in_dims out of range": Wrong(
        {"in_dims": 2}, lambda: [ones(B, 3)], ValueError, f"{DIM} 2", r"shape \(4, 3\)", ALL
    ),
    "in_dims below range": Wrong(
        {"in_dims": (-3,)}, lambda: [ones(B, 3)], ValueError, f"{DIM} -3", r"shape \(4, 3\)", ALL
    ),
    "nothing batched": Wrong(
        {"in_dims": (None,)}, lambda: [ones(B, 3)], ValueError, BATCHED, r"in_dims=\(None,\)", ALL
    ),
    "0-d": Wrong({}, lambda: [ones(())], ValueError, f"{DIM} 0", r"shape \(\)", ALL),
    "0-d beside": Wrong(
        {}, lambda: [ones(B, 3), ones(())], ValueError, f"{DIM} 0", r"shape \(\)", ALL
    ),
    "unequal batches": Wrong(
        {}, lambda: [ones(B, 3), ones(2, 3)], ValueError, "the same batch", r"\[4, 2\]", ALL
    ),
    "empty beside a batch": Wrong(
        {}, lambda: [ones(0, 3), ones(B, 3)], ValueError, "the same batch", r"\[0, 4\]", ALL
    ),
    "a batch of one beside": Wrong(
        {}, lambda: [ones(1, 3), ones(B, 3)], ValueError, "the same batch", r"\[1, 4\]", ALL
    ),
    "unequal after in_dims": Wrong(
        {"in_dims": (0, 1)},
        lambda: [ones(B, 3), ones(B, 3)],
        ValueError,
        "the same batch",
        r"\[4, 3\]",
        ALL,
    ),
    # of one transform
    "one row": Wrong(
        {}, lambda: [ones(1, 3)], ValueError, "at least two rows", "1", ("check_batched",)
    ),
    "no row": Wrong(
        {}, lambda: [ones(0, 3)], ValueError, "at least two rows", "0", ("check_batched",)
    ),
    "index out of range": Wrong(
        {}, lambda: [ones(B, 1)], ValueError, "indices between -1 and 0", ".*", PARTIALS
    ),
    "partials of nothing": Wrong(
        {}, lambda: [ones(B, 0)], ValueError, "indices|rows", ".*", PARTIALS
    ),
    "partials of a matrix": Wrong(
        {}, lambda: [ones(B, 3, 2)], ValueError, "rows", r"\(3, 2\)", PARTIALS
    ),
    "weight too short": Wrong(
        {"weight": ones(2)}, lambda: [ones(B, 3)], ValueError, "weight of s", "shape", LAPLACIAN
    ),
    "weight not square": Wrong(
        {"weight": ones(3, 2)}, lambda: [ones(B, 3)], ValueError, "weight of s", "shape", LAPLACIAN
    ),
    "weight of no dimension": Wrong(
        {"weight": ones(())}, lambda: [ones(B, 3)], ValueError, "weight of s", "shape", LAPLACIAN
    ),
    "weight with rows": Wrong(
        {"weight": ones(B, 3)}, lambda: [ones(B, 3)], ValueError, "weight of s", "shape", LAPLACIAN
    ),
    "weight of another batch": Wrong(
        {"weight": ones(2, 3), "weight_dim": 0},
        lambda: [ones(B, 3)],
        ValueError,
        "weight to have a batch of 4",
        "shape",
        LAPLACIAN,
    ),
    "weight not symmetric": Wrong(
        {"weight": ones(3, 3).triu()},
        lambda: [ones(B, 3)],
        ValueError,
        "symmetric",
        "",
        LAPLACIAN,
    ),
    "weight of integers": Wrong(
        {"weight": ones(3).long()},
        lambda: [ones(B, 3)],
        TypeError,
        "weight to be a tensor of real",
        "torch.int64",
        LAPLACIAN,
    ),
    "weight complex": Wrong(
        {"weight": ones(3).cfloat()},
        lambda: [ones(B, 3)],
        TypeError,
        "weight to be a tensor of real",
        "torch.complex64",
        LAPLACIAN,
    ),
    "weight sparse": Wrong(
        {"weight": torch.eye(3).to_sparse()},
        lambda: [ones(B, 3)],
        TypeError,
        "weight to be .*dense",
        "torch.sparse_coo",
        LAPLACIAN,
    ),
    "weight on meta": Wrong(
        {"weight": ones(3).to("meta")},
        lambda: [ones(B, 3)],
        TypeError,
        "weight .*values",
        "meta",
        LAPLACIAN,
    ),
    "weight infinite": Wrong(
        {"weight": torch.full((3, 3), torch.inf)},
        lambda: [ones(B, 3)],
        ValueError,
        "weight .*finite",
        "",
        LAPLACIAN,
    ),
    "weight vector infinite": Wrong(
        {"weight": torch.tensor([1.0, torch.inf, 1.0])},
        lambda: [ones(B, 3)],
        ValueError,
        "weight .*finite",
        "inf",
        LAPLACIAN,
    ),
    "weight fake": Wrong(
        {"weight": FAKE.from_tensor(ones(3))},
        lambda: [ones(B, 3)],
        TypeError,
        "weight .*values",
        "FakeTensor",
        LAPLACIAN,
    ),
    "weight NaN": Wrong(
        {"weight": torch.full((3, 3), torch.nan)},
        lambda: [ones(B, 3)],
        ValueError,
        "weight .*finite",
        "",
        LAPLACIAN,
    ),
    "weight for two": Wrong(
        {"weight": ones(3), "argnums": (0, 1)},
        lambda: [ones(B, 3)] * 2,
        ValueError,
        "one input tensor with weight",
        "2",
        LAPLACIAN,
    ),
    "weight from a function": Wrong(
        {"weight": lambda x: None},
        lambda: [ones(B, 3)],
        TypeError,
        "weight to be a tensor of real",
        "NoneType",
        LAPLACIAN,
    ),
}


@pytest.mark.filterwarnings(*BETA)
@pytest.mark.parametrize(("entry", "name"), named(ARGUMENTS))
def test_arguments(entry, name):
    words, make, kind, expected, got, _ = ARGUMENTS[entry]
    func, args = Watched(), make()
    tensors = [leaf for leaf in leaves(args) if isinstance(leaf, torch.Tensor)]
    transformed = CALLS[name](func, **words)
    match = rf"(?s)^{SPOKEN.get(name, name)}: expected .*{expected}.*, got .*{got}.*\."
    for _ in range(2):  # nothing is remembered that would let the second call through
        with unchanged(func, tensors), pytest.raises(kind, match=match) as found:
            transformed(*args)
        assert type(found.value) is kind
        assert func.count == 0
        assert "tensor(" not in str(found.value)  # whole tensors say nothing
    if name in TRANSFORMS and not words:  # and nothing that would spoil a good one
        x = randn(B, 3)
        close(transformed(x), TRANSFORMS[name](torch.sin)(x))


@by_name
def test_arguments_by_keyword_are_not_differentiated(name):
    func = Watched(torch.sin)
    match = f"^{name}: expected argnums to index 0 positional arguments, got 0.*by position"
    with pytest.raises(ValueError, match=match):
        TRANSFORMS[name](func)(input=randn(B, 3))
    assert func.count == 0


@pytest.mark.filterwarnings(*BETA)
@by_name
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ones(3).to("meta"), "tensors with values, got meta"),
        (lambda: [FAKE.from_tensor(ones(3))], "tensors with values, got FakeTensor"),
        (nested, "tensors of dense layout, got a nested tensor"),
        (nn.UninitializedParameter, "tensors of an initialized shape, got Uninit"),
    ],
)
def test_strange_tensors_by_keyword(make, expected, name):
    func, x, beside = Watched(), randn(B, 3), make()
    for _ in range(2):
        with pytest.raises(TypeError, match=f"^{name}: expected {expected}"):
            TRANSFORMS[name](func)(x, beside=beside)
    assert func.count == 0


@by_name
def test_tensors_without_values_in_transforms(name):
    """Shapes go through torch.func without values, as they do through plain functions."""
    x = randn(B, 3)
    right = TRANSFORMS[name](torch.sin)(x)
    found = torch.vmap(TRANSFORMS[name](torch.sin))(ones(2, B, 3).to("meta"))
    for got, expected in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, right))):
        assert got.is_meta
        assert got.shape == (2, *expected.shape)


@pytest.mark.filterwarnings(*BETA)
def test_a_nested_weight():
    with pytest.raises(TypeError, match=r"expected weight to be .*dense.*, got a nested tensor"):
        batch_laplacian(torch.sin, weight=nested())(randn(B, 3))


def test_what_came_is_cut_where_it_is_long():
    for words in ({"mode": torch.zeros(900)}, {"in_dims": {i: 0 for i in range(900)}}):
        with pytest.raises((TypeError, ValueError), match=r"\.\.\.\.") as found:
            batch_jacobian(torch.sin, **words)
        assert len(str(found.value)) < 500


def test_check_batched_without_arguments():
    with pytest.raises(ValueError, match="expected a batched argument, got 0 arguments") as found:
        check_batched(torch.sin)
    assert "argnums" not in str(found.value)


def test_trees_in_messages_are_short():
    func = Watched()
    many = [{"a": ones(2 * B)} for _ in range(100)]
    with pytest.raises(
        ValueError, match=r"The arguments are \(\[\{'a': Tensor\(8,\)\}, .*\.\.\."
    ) as found:
        batch_jacobian(func, in_dims=({"b": 0},))(many)
    assert len(str(found.value)) < 500
    with pytest.raises(ValueError, match=r"The output is \(Tensor\(4, 3\), None\)\."):
        batch_jacobian(lambda x: (x, None), out_dims={"b": 0})(ones(B, 3))


@pytest.mark.parametrize("look", [explain, check_derivative, check_batched])
def test_looking_inside_of_a_transform(look):
    func = Watched()
    given = func if look is check_batched else batch_jacobian(func)
    for transform in (torch.vmap, lambda f: torch.func.jacrev(f)):
        with pytest.raises(RuntimeError, match=f"^{look.__name__}: expected to be called outside"):
            transform(lambda x: (look(given, x.unsqueeze(0)), x)[1])(randn(B, 3))
    assert func.count == 0


# --- the table: outputs ----------------------------------------------------------------------

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
def test_outputs(entry, name):
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


# --- functions that raise midway ---------------------------------------------------------------


class Mine(Exception):
    pass


class Backward(torch.autograd.Function):
    """Raises where it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise Mine("backward")

    @staticmethod
    def jvp(ctx, tangent):
        raise Mine("jvp")


def in_vmap(x):
    if peek_interpreter_stack() is not None:
        raise Mine("inside of torch.func")
    return x.sin()


def for_one_row(x):
    if x.shape[0] == 1:
        raise Mine("one row")
    return x.sin()


ENGINES = ("auto", "vmap", "sum", "loop")
ROUTES = [(n, e, m) for n in TRANSFORMS for e in ENGINES for m in MODES[n]]
ROUTES = [r for r in ROUTES if r[2] != "taylor" or r[1] in ("auto", "sum")]
by_route = pytest.mark.parametrize(("name", "engine", "mode"), ROUTES)


def tried(run):
    """What ``run`` raised, if it did."""
    try:
        run()
    except (Mine, RuntimeError) as error:
        return error
    return None


@quiet
@by_route
@pytest.mark.parametrize("k", [1, 2])
def test_raising_on_the_kth_run(k, name, engine, mode):
    """It reaches the user as itself, as the cause of what an engine says, or was not needed."""
    error = Mine(k)

    def raises(x):
        if func.count == k:
            raise error
        return x.sin()

    func, x = Watched(raises), randn(B, 3)
    transformed = TRANSFORMS[name](func, engine=engine, mode=mode)
    right = TRANSFORMS[name](torch.sin)(x)
    for _ in range(3):
        with unchanged(func, [x]):
            raised = tried(lambda: close(transformed(x), right))
        if raised is not None and raised is not error:
            assert raised.__cause__ is error
            assert type(raised) is RuntimeError
            assert (engine, mode) != ("auto", "auto")
            assert str(raised).startswith(f"{name}: ")
    close(transformed(x), right)
    if k == 1:
        func.tally.runs = 0
        with unchanged(func, [x]), pytest.raises((Mine, RuntimeError)) as found:
            TRANSFORMS[name](func, engine=engine, mode=mode)(x)
        # A known key starts with the engine that was asked for; a plain run then tells nothing.
        assert error in (found.value, found.value.__cause__)


@by_route
def test_raising_in_backward(name, engine, mode):
    func, x = Watched(lambda x: Backward.apply(x)), randn(B, 3)
    transformed = TRANSFORMS[name](func, engine=engine, mode=mode)
    for _ in range(2):
        with unchanged(func, [x]), pytest.raises(Mine, match=r"^(backward|jvp)$") as found:
            transformed(x)
        assert found.value.__cause__ is None


@quiet
@by_route
@pytest.mark.parametrize("raises", [in_vmap, for_one_row])
def test_raising_where_an_engine_runs_it(raises, name, engine, mode):
    func, x = Watched(raises), randn(B, 3)
    transformed = TRANSFORMS[name](func, engine=engine, mode=mode)
    right = TRANSFORMS[name](torch.sin)(x)
    for _ in range(2):
        with unchanged(func, [x]):
            raised = tried(lambda: close(transformed(x), right))
        if raised is not None:
            assert isinstance(raised.__cause__, Mine)
            assert type(raised) is RuntimeError
            assert engine != "auto"
            assert str(raised).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("look", "k"),
    [
        (explain, 1),
        (check_derivative, 1),
        (check_derivative, 3),
        (check_batched, 1),
        (check_batched, 2),
    ],
)
def test_looking_at_what_raises(k, look):
    error = Mine(k)

    def raises(x):
        if func.count >= k:
            raise error
        return x.sin()

    func, x = Watched(raises), randn(B, 3)
    given = func if look is check_batched else batch_jacobian(func)
    with unchanged(func, [x]):
        raised = tried(lambda: look(given, x))
    assert error in (raised, raised.__cause__)


@pytest.mark.parametrize("name", ["batch_jacobian", "batch_hessian", "batch_laplacian"])
def test_raising_from_some_run_on(name):
    error = Mine("from now on")

    def raises(x):
        if func.count > 2:
            raise error
        return x.sin()

    func, x = Watched(raises), randn(B, 3)
    transformed = TRANSFORMS[name](func)
    for _ in range(2):
        transformed(x)
    for _ in range(2):
        with unchanged(func, [x]), pytest.raises(Mine) as found:
            transformed(x)
        assert found.value is error


# --- side effects --------------------------------------------------------------------------------


class Moves(nn.Module):
    """Changes what it holds and what it is given, in every way there is."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.linear = nn.Linear(3, 3).double()
        self.register_buffer("total", torch.zeros(3).double())
        self.last, self.seen, self.by_name = None, [], {}

    def forward(self, x):
        if self.how == "buffer":
            self.total += x.detach().mean(0)
        elif self.how == "reassigned":
            self.total = self.total + 1
        elif self.how == "new buffer":
            self.register_buffer("other", torch.ones(3))
        elif self.how == "attribute":
            self.last = x
        elif self.how == "list":
            self.seen.append(x)
        elif self.how == "dict":
            self.by_name["x"] = x
        elif self.how == "training":
            self.train(not self.training)
        elif self.how == "hook":
            self.linear.register_forward_hook(lambda *args: None)
        elif self.how == "parameter":
            with torch.no_grad():
                self.linear.weight *= 1.0
                self.linear.bias += 1
                self.linear.bias -= 1
        elif self.how == "requires_grad":
            self.linear.bias.requires_grad_(False)
        return self.linear(x).tanh()


HOWS = ("buffer", "reassigned", "new buffer", "attribute", "list", "dict", "training", "hook")


def held(module):
    """As ``of_module``, but a version may move where a value is put back."""
    return [
        (
            sorted(vars(m)),
            m.training,
            len(m._forward_hooks),
            [(t.requires_grad, t.tolist()) for t in (*m.parameters(), *m.buffers())],
            [len(v) for v in vars(m).values() if isinstance(v, (list, dict))],
        )
        for m in module.modules()
    ]


@by_name
@pytest.mark.parametrize("how", [*HOWS, "parameter", "requires_grad"])
def test_a_module_that_changes_itself(how, name):
    """Each call changes it as one plain call would."""
    module, x = Moves(how), randn(B, 3)
    plain, process = copy.deepcopy(module), of_process()
    transformed = TRANSFORMS[name](module)
    expected = TRANSFORMS[name](lambda x: module.linear(x).tanh())(x)
    for _ in range(4):
        close(transformed(x), expected)
        plain(x)
        assert held(module) == held(plain)
        assert of_process() == process


@by_name
@pytest.mark.parametrize(
    "draw", [lambda x: torch.rand(1), lambda x: torch.randn_like(x), lambda x: torch.manual_seed(3)]
)
def test_a_function_that_draws(draw, name):
    """Or sets a seed: the random state afterwards is that after a plain call."""
    func, x = Watched(lambda x: (draw(x), x.sin())[1]), randn(B, 3)
    transformed, right = TRANSFORMS[name](func), TRANSFORMS[name](torch.sin)(x)
    for _ in range(3):
        state = torch.get_rng_state()
        draw(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        close(transformed(x), right)
        assert torch.equal(torch.get_rng_state(), after)


@quiet
@by_name
@pytest.mark.parametrize("work", [lambda x: x.mul_(2), lambda x: x.t_().t_(), torch.relu_])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_function_that_works_in_place(engine, work, name):
    func, x = Watched(lambda x: work(x).sin()), randn(B, 3)
    x += 0.1 * x.sign()  # no kink at zero
    before, right = x.clone(), TRANSFORMS[name](lambda x: work(x.clone()).sin())(x)
    transformed = TRANSFORMS[name](func, engine=engine)
    for _ in range(3):
        close(transformed(x), right)
        assert torch.equal(x, before)
        assert x.stride() == before.stride()
        assert not x.requires_grad


@by_name
def test_the_users_own_records(name):
    """What func counts and keeps has one entry for each call."""
    seen, counts = [], {"runs": 0}

    def func(x):
        counts["runs"] += 1
        seen.append(x.shape)
        return x.sin()

    x, transformed = randn(B, 3), TRANSFORMS[name](func)
    for calls in range(1, 4):
        close(transformed(x), TRANSFORMS[name](torch.sin)(x))
        assert counts["runs"] == len(seen) == calls


@quiet
@by_name
def test_a_function_that_changes_the_process(name):
    """Switches that func flips are its own, and it does with them what it would by itself."""

    def func(x):
        with torch.no_grad(), torch.random.fork_rng():
            torch.rand(3)
        return x.sin()

    x = randn(B, 3)
    before = of_process()
    close(TRANSFORMS[name](func)(x), TRANSFORMS[name](torch.sin)(x))
    assert of_process() == before


def test_rows_that_mix_change_nothing_of_the_process():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(), randn(B, 3)
    for name, call in CALLS.items():
        if name == "check_derivative":
            continue  # it compares, and does not judge rows
        process = of_process()
        with pytest.raises(BatchMixingError, match=f"^{SPOKEN.get(name, name)}: .*1: BatchNorm1d"):
            call(net)(x)
        assert of_process() == process


def test_what_autograd_cannot_see_changes_nothing():
    for name in TRANSFORMS:
        func, x = Watched(lambda x: torch.from_numpy(x.detach().numpy()).sin()), randn(B, 3)
        with unchanged(func, [x]), pytest.raises(VerificationError, match=f"^{name}: "):
            TRANSFORMS[name](func)(x)


# --- unusual, and right ----------------------------------------------------------------------


class Mark(torch.Tensor):
    """A subclass that changes nothing."""


def negated():
    """The negation is a bit of the tensor, and not yet in its memory."""
    return torch.randn(B, 3, dtype=torch.complex128).conj().imag


def inferred():
    with torch.inference_mode():
        return randn(B, 3)


UNUSUAL = {
    "float16": lambda: randn(B, 3).half(),
    "bfloat16": lambda: randn(B, 3).bfloat16(),
    "a parameter": lambda: nn.Parameter(randn(B, 3)),
    "a subclass": lambda: randn(B, 3).as_subclass(Mark),
    "an inference tensor": inferred,
    "one row for all": lambda: randn(1, 3).expand(B, 3),
    "transposed": lambda: randn(3, B).T,
    "every second": lambda: randn(2 * B, 6)[::2, ::2],
    "not a number": lambda: torch.full((B, 3), torch.nan).double(),
    "infinite": lambda: torch.full((B, 3), torch.inf).double(),
    "negated": negated,
    "of a graph": lambda: randn(B, 3).requires_grad_() * 2,
    "read-only": lambda: torch.frombuffer(bytearray(bytes(8 * 3 * B)), dtype=torch.float64).view(
        B, 3
    ),
}
# What a subclass makes of results hides their history: mode='taylor' is left, and says so.
LEFT = {("a subclass", name): quiet for name in TAYLOR}


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        pytest.param(entry, name, marks=LEFT.get((entry, name), ()))
        for entry in UNUSUAL
        for name in TRANSFORMS
    ],
)
def test_unusual_tensors(entry, name):
    x = UNUSUAL[entry]()
    func = Watched(lambda x: x.tanh())
    plain = torch.empty(B, 3, dtype=torch.float64).copy_(x.detach()).as_subclass(torch.Tensor)
    right = TRANSFORMS[name](torch.tanh)(plain)
    loose = {torch.float16: 2e-2, torch.bfloat16: 1e-1}.get(x.dtype, 1e-9)
    transformed = TRANSFORMS[name](func)
    for _ in range(3):
        with unchanged(func, [x]):
            found = transformed(x)
        for got, expected in zip(
            *([t] if isinstance(t, torch.Tensor) else t for t in (found, right))
        ):
            assert got.dtype == x.dtype
            torch.testing.assert_close(
                got.detach().double(), expected, rtol=loose, atol=loose, equal_nan=True
            )


@pytest.mark.parametrize("name", TAYLOR)
def test_a_negative_view_without_verification(name):
    x = negated()
    plain = torch.empty(B, 3, dtype=torch.float64).copy_(x)
    found = TRANSFORMS[name](torch.tanh, check=False)(x)
    close(found, TRANSFORMS[name](torch.tanh)(plain))
    assert not x.requires_grad
    leaf, other = x.detach().requires_grad_(), plain.requires_grad_()  # with a graph
    assert leaf.is_neg()
    for inp in (leaf, other):
        got = TRANSFORMS[name](torch.tanh, mode="taylor", check=False)(inp)
        sum(t.sum() for t in ([got] if isinstance(got, torch.Tensor) else got)).backward()
    close(leaf.grad.resolve_neg(), other.grad)


@by_name
@pytest.mark.parametrize("shape", [(0, 3), (1, 3)])
def test_few_rows(shape, name):
    func, x = Watched(), randn(*shape)
    with unchanged(func, [x]):
        found = TRANSFORMS[name](func)(x)
    for got, expected in zip(
        *(
            [t] if isinstance(t, torch.Tensor) else t
            for t in (found, TRANSFORMS[name](torch.sin)(randn(B, 3)))
        )
    ):
        assert got.shape[0] == shape[0]
        assert got.shape[1:] == expected.shape[1:]


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "batch_partials"])
@pytest.mark.parametrize("shape", [(B,), (B, 0), (0, 0), (B, 2, 0)])
def test_rows_of_no_size(shape, name):
    func, x = Watched(), randn(*shape)
    with unchanged(func, [x]):
        found = TRANSFORMS[name](func)(x)
    assert found.shape[0] == shape[0]
    assert found.numel() == (B if shape == (B,) or (name == "batch_divergence" and shape[0]) else 0)
