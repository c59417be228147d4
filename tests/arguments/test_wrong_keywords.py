"""Wrong keywords of every public function: refused when the transform is made, nothing changed."""

import numpy
import pytest
import torch

from funcjac import batch_partials, check_batched, check_derivative, explain
from tests.tensors import randn
from tests.watched import (
    SECOND,
    TAYLOR,
    TRANSFORMS,
    TUPLES,
    B,
    Watched,
    Wrong,
    by_name,
    named,
    ones,
    unchanged,
)

ARGNUMS = "argnums to be an int"

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
def test_wrong_keywords_are_refused_at_once(word, name):
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
def test_wrong_indices_are_refused_at_once(name):
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
def test_func_must_be_callable(func):
    for name, transform in TRANSFORMS.items():
        with pytest.raises(TypeError, match=f"^{name}: expected func to be callable, got "):
            transform(func)
    with pytest.raises(TypeError, match=r"^check_batched: expected func to be callable, got "):
        check_batched(func, randn(B, 3))
    for look in (explain, check_derivative):
        with pytest.raises(TypeError, match=f"^{look.__name__}: expected a function returned by"):
            look(func, randn(B, 3))


@by_name
def test_unknown_keywords_are_refused(name):
    func = Watched()
    with pytest.raises(TypeError, match="unexpected keyword argument 'dims'"):
        TRANSFORMS[name](func, dims=0)
    with pytest.raises(TypeError, match="positional argument"):
        TRANSFORMS[name](func, 0, 0)
    assert func.count == 0


def nested():
    return torch.nested.nested_tensor([ones(3)] * B)
