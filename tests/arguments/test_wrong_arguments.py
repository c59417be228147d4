"""Wrong arguments of every public function: refused before ``func`` runs, nothing changed."""

import numpy
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from funcjac import batch_jacobian, batch_laplacian, check_batched, check_derivative, explain
from tests.tensors import randn
from tests.watched import (
    BETA,
    CALLS,
    OPERATORS,
    SPOKEN,
    TRANSFORMS,
    TUPLES,
    B,
    Watched,
    Wrong,
    by_name,
    close,
    leaves,
    named,
    ones,
    unchanged,
)

LAPLACIAN, PARTIALS = ("batch_laplacian",), ("batch_partials",)

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
def test_wrong_arguments_are_refused_before_func_runs(entry, name):
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
def test_strange_tensors_may_come_by_keyword(make, expected, name):
    func, x, beside = Watched(), randn(B, 3), make()
    for _ in range(2):
        with pytest.raises(TypeError, match=f"^{name}: expected {expected}"):
            TRANSFORMS[name](func)(x, beside=beside)
    assert func.count == 0


@by_name
def test_tensors_without_values_are_refused_in_transforms(name):
    """Shapes go through torch.func without values, as they do through plain functions."""
    x = randn(B, 3)
    right = TRANSFORMS[name](torch.sin)(x)
    found = torch.vmap(TRANSFORMS[name](torch.sin))(ones(2, B, 3).to("meta"))
    for got, expected in zip(*([t] if isinstance(t, torch.Tensor) else t for t in (found, right))):
        assert got.is_meta
        assert got.shape == (2, *expected.shape)


@pytest.mark.filterwarnings(*BETA)
def test_a_nested_weight_is_refused():
    with pytest.raises(TypeError, match=r"expected weight to be .*dense.*, got a nested tensor"):
        batch_laplacian(torch.sin, weight=nested())(randn(B, 3))


def test_what_came_is_cut_where_it_is_long():
    for words in ({"mode": torch.zeros(900)}, {"in_dims": {i: 0 for i in range(900)}}):
        with pytest.raises((TypeError, ValueError), match=r"\.\.\.\.") as found:
            batch_jacobian(torch.sin, **words)
        assert len(str(found.value)) < 500


def test_check_batched_wants_arguments():
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
def test_explain_and_checks_inside_of_a_transform_are_refused(look):
    func = Watched()
    given = func if look is check_batched else batch_jacobian(func)
    for transform in (torch.vmap, lambda f: torch.func.jacrev(f)):
        with pytest.raises(RuntimeError, match=f"^{look.__name__}: expected to be called outside"):
            transform(lambda x: (look(given, x.unsqueeze(0)), x)[1])(randn(B, 3))
    assert func.count == 0
