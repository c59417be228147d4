"""Wrong calls: what is raised, in which words, before func runs, with nothing changed."""

import collections
import itertools

import pytest
import torch
from torch import nn

import funcjac
from funcjac import batch_jacobian, check_batched, check_derivative, explain
from tests.fresh import Counted

B = 4
ENGINES = ("vmap", "sum", "loop", "auto")


def ones(*shape, dtype=torch.float64):
    return torch.ones(*shape, dtype=dtype)


# --- bad words: raised when the transform is made ----------------------------------------

# words of batch_jacobian, exception, what was expected, what came
WORDS = {
    "argnums float": (
        {"argnums": 1.0},
        TypeError,
        "argnums to be an int or a tuple of ints",
        "1.0",
    ),
    "argnums bool": ({"argnums": True}, TypeError, "argnums to be an int or a tuple", "True"),
    "argnums string": ({"argnums": "x"}, TypeError, "argnums to be an int or a tuple", "'x'"),
    "argnums None": ({"argnums": None}, TypeError, "argnums to be an int or a tuple", "None"),
    "argnums list": (
        {"argnums": [0, 1]},
        TypeError,
        "argnums to be an int or a tuple",
        r"\[0, 1\]",
    ),
    "argnums of floats": ({"argnums": (0, 1.0)}, TypeError, "argnums to be an int", r"\(0, 1.0\)"),
    "argnums empty": ({"argnums": ()}, ValueError, "argnums to name at least one", r"\(\)"),
    "argnums twice": ({"argnums": (0, 0)}, ValueError, "argnums to be unique", r"\(0, 0\)"),
    "in_dims float": ({"in_dims": 0.0}, TypeError, "in_dims to be an int or a tuple", "0.0"),
    "in_dims None": ({"in_dims": None}, TypeError, "in_dims to be an int or a tuple", "None"),
    "in_dims string": ({"in_dims": "0"}, TypeError, "in_dims to be an int or a tuple", "'0'"),
    "in_dims bool": ({"in_dims": True}, TypeError, "in_dims to be an int or a tuple", "True"),
    "in_dims dict": (
        {"in_dims": {"x": 0}},
        TypeError,
        "in_dims to be an int or a tuple",
        "{'x': 0}",
    ),
    "out_dims float": ({"out_dims": 0.0}, TypeError, "out_dims to be an int or a tree", "0.0"),
    "out_dims None": ({"out_dims": None}, TypeError, "out_dims to be an int or a tree", "None"),
    "out_dims inside": (
        {"out_dims": (0, None)},
        TypeError,
        "out_dims to be an int",
        r"\(0, None\)",
    ),
    "out_dims string": ({"out_dims": "0"}, TypeError, "out_dims to be an int or a tree", "'0'"),
    "mode unknown": (
        {"mode": "reverse"},
        ValueError,
        "mode to be one of 'fwd', 'rev'",
        "'reverse'",
    ),
    "mode None": ({"mode": None}, ValueError, "mode to be one of 'fwd', 'rev', 'auto'", "None"),
    "mode list": ({"mode": ["fwd"]}, ValueError, "mode to be one of", r"\['fwd'\]"),
    "mode of a Hessian": (
        {"mode": "fwd_over_rev"},
        ValueError,
        "mode to be one of",
        "'fwd_over_rev'",
    ),
    "engine unknown": ({"engine": "jit"}, ValueError, "engine to be one of 'sum', 'vmap'", "'jit'"),
    "engine None": ({"engine": None}, ValueError, "engine to be one of", "None"),
    "engine case": ({"engine": "Sum"}, ValueError, "engine to be one of", "'Sum'"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size to be None or a positive int", "0"),
    "chunk_size -1": ({"chunk_size": -1}, ValueError, "chunk_size to be None or a positive", "-1"),
    "chunk_size float": ({"chunk_size": 2.0}, TypeError, "chunk_size to be None or a", "2.0"),
    "chunk_size bool": ({"chunk_size": True}, TypeError, "chunk_size to be None or a", "True"),
    "chunk_size string": ({"chunk_size": "2"}, TypeError, "chunk_size to be None or a", "'2'"),
    "has_aux int": ({"has_aux": 1}, TypeError, "has_aux to be a bool", "1"),
    "has_aux None": ({"has_aux": None}, TypeError, "has_aux to be a bool", "None"),
    "return_value int": ({"return_value": 0}, TypeError, "return_value to be a bool", "0"),
    "return_value text": ({"return_value": "yes"}, TypeError, "return_value to be a bool", "'yes'"),
    "randomness unknown": ({"randomness": "any"}, ValueError, "randomness to be one of", "'any'"),
    "randomness None": ({"randomness": None}, ValueError, "randomness to be one of", "None"),
    "check unknown": (
        {"check": "always"},
        ValueError,
        "check to be 'auto', True or False",
        "'always'",
    ),
    "check None": ({"check": None}, ValueError, "check to be 'auto', True or False", "None"),
    "check int": ({"check": 1}, ValueError, "check to be 'auto', True or False", "1"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", WORDS)
def test_wrong_keywords_are_refused_at_once(name):
    words, kind, expected, got = WORDS[name]
    func = Counted(torch.sin)
    with pytest.raises(
        kind, match=rf"^batch_jacobian: expected {expected}.*, got {got}\."
    ) as found:
        batch_jacobian(func, **words)
    assert type(found.value) is kind
    assert func.count == 0


@pytest.mark.parametrize(
    "func",
    [None, 3, "sin", torch.ones(3), [torch.sin]],
    ids=["None", "number", "word", "tensor", "list"],
)
def test_func_must_be_callable(func):
    match = rf"^batch_jacobian: expected func to be callable, got {type(func).__name__}\."
    with pytest.raises(TypeError, match=match):
        batch_jacobian(func)


def test_options_go_by_keyword():
    with pytest.raises(TypeError, match="positional argument"):
        batch_jacobian(torch.sin, 0, 0)


# --- bad arguments: raised before func runs ----------------------------------------------

Call = collections.namedtuple("Call", ["words", "args", "kind", "expected", "got", "remedy"])
SHARE = "Set its entry of in_dims to None if all rows share it"
ARGUMENTS = {
    "int64 input": Call(
        {}, lambda: [ones(B, 3).long()], TypeError, "floating-point dtype", "torch.int64", "argnums"
    ),
    "bool input": Call(
        {}, lambda: [ones(B, 3).bool()], TypeError, "floating-point dtype", "torch.bool", "argnums"
    ),
    "uint8 input": Call(
        {}, lambda: [ones(B, 3).byte()], TypeError, "floating-point dtype", "torch.uint8", "argnums"
    ),
    "complex input": Call(
        {},
        lambda: [ones(B, 3, dtype=torch.complex128)],
        TypeError,
        "floating-point dtype",
        "torch.complex128",
        "torch.view_as_real",
    ),
    "complex leaf": Call(
        {},
        lambda: [{"a": ones(B, 3), "b": ones(B, dtype=torch.complex64)}],
        TypeError,
        "floating-point dtype",
        "torch.complex64",
        "torch.view_as_real",
    ),
    "sparse input": Call(
        {}, lambda: [ones(B, 3).to_sparse()], TypeError, "dense", "torch.sparse_coo", "to_dense"
    ),
    "CSR input": Call(
        {},
        lambda: [torch.sparse_csr_tensor([0, 1, 2], [0, 1], [1.0, 1.0], check_invariants=True)],
        TypeError,
        "dense",
        "torch.sparse_csr",
        "to_dense",
    ),
    "number in a differentiated tree": Call(
        {}, lambda: [{"a": ones(B, 3), "n": 3}], TypeError, "tensors only", "int", "argnums"
    ),
    "string in a differentiated tree": Call(
        {}, lambda: [[ones(B, 3), "x"]], TypeError, "tensors only", "str", "argnums"
    ),
    "differentiated number beside a batch": Call(
        {"argnums": 1}, lambda: [ones(B), 2.0], TypeError, "tensors only", "float", "argnums"
    ),
    "NumPy input": Call(
        {"argnums": 1},
        lambda: [ones(B), ones(B).numpy()],
        TypeError,
        "tensors only",
        "ndarray",
        "argnums",
    ),
    "differentiated None": Call(
        {"argnums": 1}, lambda: [ones(B), None], ValueError, "a tensor to differentiate", "none", ""
    ),
    "differentiated empty tree": Call(
        {"argnums": 1}, lambda: [ones(B), {}], ValueError, "a tensor to differentiate", "none", ""
    ),
    "argnums too large": Call(
        {"argnums": 1},
        lambda: [ones(B)],
        ValueError,
        "argnums to index 1 positional",
        "1",
        "position",
    ),
    "argnums too negative": Call(
        {"argnums": -3},
        lambda: [ones(B), ones(B)],
        ValueError,
        "argnums to index 2 positional",
        "-3",
        "position",
    ),
    "argnums partly too large": Call(
        {"argnums": (0, 2)},
        lambda: [ones(B), ones(B)],
        ValueError,
        "argnums to index 2 positional",
        r"\(0, 2\)",
        "position",
    ),
    "argnums the same after wrapping": Call(
        {"argnums": (0, -2)},
        lambda: [ones(B), ones(B)],
        ValueError,
        "argnums to be unique",
        r"\(0, -2\)",
        "",
    ),
    "no arguments": Call({}, list, ValueError, "", "", ""),
    "no tensors": Call({}, lambda: [3.0], ValueError, "at least one batched tensor", "", "in_dims"),
    "nothing batched": Call(
        {"in_dims": (None,)},
        lambda: [ones(B)],
        ValueError,
        "at least one batched tensor argument",
        r"in_dims=\(None,\)",
        "in_dims",
    ),
    "in_dims too short": Call(
        {"in_dims": (0,)},
        lambda: [ones(B), ones(B)],
        ValueError,
        "in_dims to have one entry for each of the 2",
        r"1 entries",
        "",
    ),
    "in_dims too long": Call(
        {"in_dims": (0, 0, 0)},
        lambda: [ones(B), ones(B)],
        ValueError,
        "in_dims to have one entry for each of the 2",
        r"3 entries",
        "",
    ),
    "in_dims not a prefix": Call(
        {"in_dims": ({"b": 0},)},
        lambda: [{"a": ones(B)}],
        ValueError,
        "in_dims to be an int or a prefix tree",
        r"\({'b': 0},\)",
        "",
    ),
    "in_dims deeper than the tree": Call(
        {"in_dims": ((0, 0),)},
        lambda: [ones(B)],
        ValueError,
        "a prefix tree of the arguments",
        "",
        "",
    ),
    "in_dims with a float": Call(
        {"in_dims": (0.0,)},
        lambda: [ones(B)],
        TypeError,
        "in_dims to hold ints and None",
        "float",
        "",
    ),
    "in_dims with a bool": Call(
        {"in_dims": (True,)},
        lambda: [ones(B, 3)],
        TypeError,
        "in_dims to hold ints and None",
        "bool",
        "",
    ),
    "dim out of range": Call(
        {"in_dims": 2},
        lambda: [ones(B, 3)],
        ValueError,
        "batch dimension 2",
        r"shape \(4, 3\)",
        SHARE,
    ),
    "negative dim out of range": Call(
        {"in_dims": -3},
        lambda: [ones(B, 3)],
        ValueError,
        "batch dimension -3",
        r"shape \(4, 3\)",
        SHARE,
    ),
    "0-d tensor": Call(
        {}, lambda: [ones(())], ValueError, "a batch dimension 0", r"shape \(\)", SHARE
    ),
    "0-d tensor beside a batch": Call(
        {}, lambda: [ones(B), ones(())], ValueError, "a batch dimension 0", r"shape \(\)", SHARE
    ),
    "unequal batch sizes": Call(
        {}, lambda: [ones(B), ones(3)], ValueError, "the same batch size", r"\[4, 3\]", "to None"
    ),
    "unequal batch sizes in a tree": Call(
        {},
        lambda: [{"a": ones(B), "b": ones(5, 2)}],
        ValueError,
        "the same batch size",
        r"\[4, 5\]",
        "to None",
    ),
    "batch of one beside a batch": Call(
        {},
        lambda: [ones(1, 3), ones(B, 3)],
        ValueError,
        "the same batch size",
        r"\[1, 4\]",
        "to None",
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:Sparse invariant")
@pytest.mark.parametrize("engine", ["auto", "sum"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_refused_before_func_runs(name, engine):
    words, make, kind, expected, got, remedy = ARGUMENTS[name]
    func, args = Counted(lambda *args: args[0]), make()
    jacobian = batch_jacobian(func, engine=engine, **words)
    match = rf"^batch_jacobian: expected .*{expected}.*, got .*{got}.*\..*{remedy}"
    for _ in range(2):  # nothing is remembered that would let the second call through
        with pytest.raises(kind, match=match) as found:
            jacobian(*args)
        assert type(found.value) is kind
    assert func.count == 0


def test_a_good_call_after_a_refused_one_is_right():
    jacobian = batch_jacobian(torch.sin)
    with pytest.raises(TypeError, match=r"torch.int64"):
        jacobian(ones(B, 3).long())
    assert jacobian(ones(B, 3)).shape == (B, 3, 3)
    with pytest.raises(TypeError, match=r"torch.int64"):
        jacobian(ones(B, 3).long())


@pytest.mark.parametrize("engine", ENGINES)
def test_shared_arguments_have_no_sum_trick(engine):
    jacobian = batch_jacobian(lambda w, x: w * x, in_dims=(None, 0), engine=engine)
    w, x = ones(3), ones(B, 3)
    if engine != "sum":
        torch.testing.assert_close(jacobian(w, x), torch.diag_embed(x))
        return
    with pytest.raises(ValueError, match=r"^batch_jacobian: engine='sum'.*rows share.*engine="):
        jacobian(w, x)


# --- bad outputs -------------------------------------------------------------------------

# what func returns, words, exception, what was expected, what came, remedy
Out = collections.namedtuple("Out", ["out", "words", "kind", "expected", "got", "remedy"])
AUX = "Return what is not a tensor as aux, with has_aux=True"
OUTPUTS = {
    "None": Out(lambda x: None, {}, TypeError, "func to return", "", ""),
    "number": Out(lambda x: 3.0, {}, TypeError, "func to return tensors", "float", AUX),
    "string": Out(lambda x: (x, "text"), {}, TypeError, "func to return tensors", "str", AUX),
    "number in a dict": Out(
        lambda x: {"a": x, "n": 1}, {}, TypeError, "return tensors", "int", AUX
    ),
    "empty tuple": Out(lambda x: (), {}, TypeError, "at least one tensor", "tuple", ""),
    "object": Out(lambda x: object(), {}, TypeError, "func to return tensors", "object", AUX),
    "NumPy": Out(lambda x: x.detach().numpy(), {}, TypeError, "return tensors", "ndarray", AUX),
    "integers": Out(lambda x: x.long(), {}, TypeError, "real floating-point", "torch.int64", "aux"),
    "booleans": Out(lambda x: x > 0, {}, TypeError, "real floating-point", "torch.bool", "aux"),
    "argmax": Out(
        lambda x: (x, x.argmax(1)), {}, TypeError, "floating-point", "torch.int64", "aux"
    ),
    "complex": Out(
        torch.fft.fft, {}, TypeError, "real floating-point", "torch.complex128", "view_as_real"
    ),
    "sparse": Out(
        lambda x: x.to_sparse(), {}, TypeError, "dense", "torch.sparse_coo", r"\.to_dense\(\)"
    ),
    "scalar": Out(
        lambda x: x.sum(),
        {},
        ValueError,
        "a batch of 4 in dimension 0",
        r"shape \(\)",
        "torch.vmap",
    ),
    "reduced batch": Out(
        lambda x: x.sum(0), {}, ValueError, "a batch of 4 in dimension 0", r"shape \(3,\)", "vmap"
    ),
    "kept dim": Out(
        lambda x: x[:1], {}, ValueError, "a batch of 4 in dimension 0", r"shape \(1, 3\)", "vmap"
    ),
    "transposed": Out(
        lambda x: x.T, {}, ValueError, "a batch of 4 in dimension 0", r"shape \(3, 4\)", "vmap"
    ),
    "wrong out_dims": Out(
        lambda x: x, {"out_dims": 1}, ValueError, "4 in dimension 1", r"shape \(4, 3\)", "vmap"
    ),
    "out_dims out of range": Out(
        lambda x: x, {"out_dims": 2}, ValueError, "4 in dimension 2", r"shape \(4, 3\)", "vmap"
    ),
    "negative out_dims": Out(
        lambda x: x, {"out_dims": -3}, ValueError, "4 in dimension -3", r"shape \(4, 3\)", "vmap"
    ),
    "out_dims not a prefix": Out(
        lambda x: {"a": x}, {"out_dims": {"b": 0}}, ValueError, "a prefix tree of func's", "b", ""
    ),
    "out_dims too long": Out(
        lambda x: (x, x), {"out_dims": (0, 0, 0)}, ValueError, "a prefix tree of func's", "0", ""
    ),
    "no pair": Out(
        lambda x: x,
        {"has_aux": True},
        TypeError,
        r"a pair \(output, aux\)",
        "Tensor",
        "drop has_aux",
    ),
    "a triple": Out(
        lambda x: (x, 1, 2), {"has_aux": True}, TypeError, r"a pair \(output, aux\)", "", "drop"
    ),
    "aux first": Out(
        lambda x: ("aux", x), {"has_aux": True}, TypeError, "func to return tensors", "str", "aux"
    ),
    "a list as a pair": Out(
        lambda x: [x, 1], {"has_aux": True}, TypeError, r"a pair \(output, aux\)", "list", "drop"
    ),
}


@pytest.mark.parametrize("check", ["auto", False])
@pytest.mark.parametrize(("engine", "mode"), list(itertools.product(ENGINES, ("fwd", "rev"))))
@pytest.mark.parametrize("name", OUTPUTS)
def test_wrong_outputs_are_refused(name, engine, mode, check):
    out, words, kind, expected, got, remedy = OUTPUTS[name]
    func, x = Counted(out), ones(B, 3)
    jacobian = batch_jacobian(func, engine=engine, mode=mode, check=check, **words)
    match = rf"^batch_jacobian: expected .*{expected}.*, got .*{got}.*\..*{remedy}"
    with pytest.raises(kind, match=match) as found:
        jacobian(x)
    assert type(found.value) is kind
    if engine in ("auto", "sum"):
        assert func.count == 1  # before any differentiation: it runs on the batch, and no more
    assert not x.requires_grad


# --- errors of the user's own ------------------------------------------------------------


class Mine(Exception):
    def __init__(self, one, *, two):
        super().__init__(one, two)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["rev", "auto"])
@pytest.mark.parametrize(
    "error",
    [
        Mine(1, two=2),
        ValueError("mine"),
        RuntimeError("mine, not vmap's"),
        NotImplementedError("mine"),
        AssertionError("mine"),
        StopIteration("mine"),
        KeyError("mine"),
        MemoryError("mine"),
        funcjac.VerificationError("mine"),
        funcjac.BatchMixingError("mine"),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_users_error_is_the_users(error, mode, engine):
    def func(x):
        raise error

    for transformed in (func, batch_jacobian(func, engine=engine, mode=mode)):
        with pytest.raises(type(error)) as found:
            batch_jacobian(transformed, engine=engine, mode=mode)(ones(B, 3))
        assert found.value is error
        assert found.value.__cause__ is None


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_shape_inside_func_is_pytorchs_error(engine):
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2 shapes cannot be multiplied"):
        batch_jacobian(nn.Linear(4, 2).double(), engine=engine)(ones(B, 3))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_signature_is_pythons_error(engine):
    jacobian = batch_jacobian(lambda x: x, engine=engine)
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        jacobian(ones(B), ones(B))
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        jacobian(ones(B), scale=2)


def test_errors_inside_torch_func_are_the_users_too():
    error = Mine(1, two=2)

    def func(x):
        raise error

    jacobian = batch_jacobian(func)
    for transform in (torch.vmap(jacobian), torch.func.grad(lambda x: jacobian(x).sum())):
        with pytest.raises(Mine) as found:
            transform(ones(2, B, 3))
        assert found.value is error


# --- an engine that cannot ---------------------------------------------------------------


def branches(x):
    """Nothing that vmap can do: a choice by the values of the batch."""
    return x.sin() if bool((x > -100).all()) else x


@pytest.mark.parametrize("mode", ["fwd", "rev"])
def test_an_engine_that_fails_says_so(mode):
    with pytest.raises(
        RuntimeError, match=r"^batch_jacobian: .*engine='vmap'.*'auto'|\"auto\""
    ) as found:
        batch_jacobian(branches, engine="vmap", mode=mode)(ones(B, 3))
    assert found.value.__cause__ is not None
    assert "vmap" in str(found.value.__cause__)
    assert 'engine="auto"' in str(found.value)


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach().sin()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no derivative here")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_function_without_a_derivative_is_refused(engine):
    said = "use an autograd.Function with functorch" if engine == "vmap" else "no derivative here"
    with pytest.raises((RuntimeError, NotImplementedError), match=said):
        batch_jacobian(Opaque.apply, engine=engine)(ones(B, 3))


# --- the other functions -----------------------------------------------------------------


@pytest.mark.parametrize("look", [explain, check_derivative])
@pytest.mark.parametrize(
    "given", [torch.sin, nn.Linear(3, 3), None, 3], ids=["function", "module", "None", "number"]
)
def test_explain_and_check_derivative_want_a_transform(look, given):
    with pytest.raises(TypeError, match=rf"^{look.__name__}: expected a .*, got .*batch_jacobian"):
        look(given, ones(B, 3))


CHECK_BATCHED = {
    "func": ((None, ones(B)), {}, TypeError, "func to be callable, got NoneType"),
    "one row": ((torch.sin, ones(1, 3)), {}, ValueError, "at least two rows, got 1"),
    "no rows": ((torch.sin, ones(0, 3)), {}, ValueError, "at least two rows, got 0"),
    "no arguments": ((torch.sin,), {}, ValueError, ""),
    "in_dims": ((torch.sin, ones(B)), {"in_dims": None}, TypeError, "in_dims to be an int"),
    "in_dims out of range": ((torch.sin, ones(B)), {"in_dims": 3}, ValueError, "batch dimension 3"),
    "out_dims": ((torch.sin, ones(B)), {"out_dims": "x"}, TypeError, "out_dims to be an int"),
    "unequal": ((torch.add, ones(B), ones(3)), {}, ValueError, "the same batch size, got"),
    "output": ((lambda x: x.sum(), ones(B)), {}, ValueError, r"a batch of 4 .*got shape \(\)"),
    "not a tensor": ((lambda x: "text", ones(B)), {}, TypeError, "return tensors, got str"),
}


@pytest.mark.parametrize("name", CHECK_BATCHED)
def test_check_batched_refuses_wrong_calls(name):
    args, words, kind, match = CHECK_BATCHED[name]
    with pytest.raises(kind, match=rf"^check_batched: expected .*{match}"):
        check_batched(*args, **words)


def test_the_table_is_long_enough():
    assert len(WORDS) + len(ARGUMENTS) + len(OUTPUTS) >= 60


def test_exceptions_are_what_they_say():
    assert issubclass(funcjac.BatchMixingError, ValueError)
    assert issubclass(funcjac.VerificationError, RuntimeError)
    assert issubclass(funcjac.EngineFallbackWarning, UserWarning)
    for kind in (
        funcjac.BatchMixingError,
        funcjac.VerificationError,
        funcjac.EngineFallbackWarning,
    ):
        assert kind.__module__ == "funcjac"
