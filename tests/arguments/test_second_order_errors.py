"""Wrong calls of the second-order transforms: what is raised, in which words; and warnings."""

import functools
import inspect
import warnings

import pytest
import torch
from torch import nn

import funcjac
from funcjac import (
    BatchMixingError,
    EngineFallbackWarning,
    VerificationError,
    batch_divergence,
    batch_hessian,
    batch_hessian_diagonal,
    batch_laplacian,
    batch_partials,
    check_derivative,
    explain,
)
from tests.cases.modules import LastStep, Legacy
from tests.fresh import Counted
from tests.tensors import equal

B = 4
NESTED = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd", "auto")
TAYLOR = ("taylor", *NESTED)
FIRST = ("fwd", "rev", "auto")
partials = functools.partial(batch_partials, indices=[(0,), (1, 1)])
OPERATORS = {
    "batch_hessian": (batch_hessian, NESTED),
    "batch_hessian_diagonal": (batch_hessian_diagonal, TAYLOR),
    "batch_laplacian": (batch_laplacian, TAYLOR),
    "batch_partials": (partials, ("taylor", "rev", "auto")),
    "batch_divergence": (batch_divergence, FIRST),
}
by_name = pytest.mark.parametrize("name", OPERATORS)
ROUTES = [(name, mode) for name, (_, modes) in OPERATORS.items() for mode in modes]
by_route = pytest.mark.parametrize(("name", "mode"), ROUTES)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


# --- words that all share ----------------------------------------------------------------

WORDS = {
    "argnums float": ({"argnums": 1.0}, TypeError, "argnums to be an int or a tuple"),
    "argnums empty": ({"argnums": ()}, ValueError, "argnums to name at least one"),
    "argnums twice": ({"argnums": (0, 0)}, ValueError, "argnums to be unique"),
    "in_dims None": ({"in_dims": None}, TypeError, "in_dims to be an int or a tuple"),
    "out_dims float": ({"out_dims": 0.0}, TypeError, "out_dims to be an int or a tree"),
    "mode unknown": ({"mode": "reverse"}, ValueError, "mode to be one of"),
    "mode None": ({"mode": None}, ValueError, "mode to be one of"),
    "engine unknown": ({"engine": "jit"}, ValueError, "engine to be one of"),
    "chunk_size 0": ({"chunk_size": 0}, ValueError, "chunk_size to be None or a positive"),
    "chunk_size float": ({"chunk_size": 2.0}, TypeError, "chunk_size to be None or a positive"),
    "has_aux int": ({"has_aux": 1}, TypeError, "has_aux to be a bool"),
    "return_value int": ({"return_value": 0}, TypeError, "return_value to be a bool"),
    "randomness unknown": ({"randomness": "any"}, ValueError, "randomness to be one of"),
    "check None": ({"check": None}, ValueError, "check to be 'auto', True or False"),
}
OF_ANOTHER_FAMILY = {
    "batch_hessian": ("fwd", "rev", "jet", "fwd_over_nothing"),
    "batch_hessian_diagonal": ("fwd", "rev", "jet"),
    "batch_laplacian": ("fwd", "rev", "hutchinson"),
    "batch_partials": ("fwd", "fwd_over_rev", "rev_over_rev"),
    "batch_divergence": ("taylor", "fwd_over_rev", "rev_over_rev"),
}


@by_name
@pytest.mark.parametrize("word", WORDS)
def test_wrong_keywords_are_refused_at_once(word, name):
    words, kind, expected = WORDS[word]
    func = Counted(torch.sin)
    with pytest.raises(kind, match=rf"^{name}: expected {expected}.*, got "):
        OPERATORS[name][0](func, **words)
    assert func.count == 0


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name, modes in OF_ANOTHER_FAMILY.items() for mode in modes]
)
def test_modes_of_another_family_are_refused(mode, name):
    with pytest.raises(
        ValueError, match=f"^{name}: .* mode to be one of .*, got '{mode}'"
    ) as found:
        OPERATORS[name][0](torch.sin, mode=mode)
    assert all(repr(allowed) in str(found.value) for allowed in OPERATORS[name][1])


@by_name
def test_func_must_be_callable(name):
    with pytest.raises(TypeError, match=f"^{name}: expected func to be callable, got int"):
        OPERATORS[name][0](3)


@by_name
@pytest.mark.parametrize(
    ("func", "make", "kind", "expected"),
    [
        (torch.sin, lambda: torch.arange(12).view(4, 3), TypeError, "a differentiated argument"),
        (torch.abs, lambda: randn(4, 3).cfloat(), TypeError, "a differentiated argument"),
        (torch.fft.fft, lambda: randn(4, 3), TypeError, "func to return real floating-point"),
        (lambda x: x.argsort(1), lambda: randn(4, 3), TypeError, "func to return real floating"),
        (lambda x: x.sum().item(), lambda: randn(4, 3), TypeError, "func to return tensors"),
        (lambda x: x.sum(), lambda: randn(4, 3), ValueError, "func to return a batch of 4"),
        (torch.sin, lambda: 3.0, (TypeError, ValueError), ""),
    ],
)
def test_wrong_inputs_and_outputs_are_refused(func, make, kind, expected, name):
    transformed = OPERATORS[name][0](func)
    for _ in range(2):
        with pytest.raises(kind, match=f"^{name}: expected {expected}"):
            transformed(make())


@by_name
def test_unequal_batches_are_refused(name):
    transformed = OPERATORS[name][0](lambda x, y: x.sin())
    with pytest.raises(ValueError, match=f"^{name}: expected all batched arguments to have"):
        transformed(randn(4, 3), randn(2, 3))


# --- words of one transform --------------------------------------------------------------


def call(transform, *args, func=torch.sin, x=None, **words):
    """Some words can only be judged once the input is there."""
    x = randn(B, 3) if x is None else x
    return transform(func, *args, **words)(x)


def asymmetric():
    found = torch.eye(3).double()
    found[0, 2] = 1
    return found


BAD_WEIGHTS = {
    "too short": (lambda: randn(2), None, ValueError),
    "too long": (lambda: randn(4), None, ValueError),
    "not square": (lambda: randn(3, 2), None, ValueError),
    "a number": (lambda: randn(), None, ValueError),
    "three dimensions": (lambda: randn(3, 3, 3), None, ValueError),
    "rows without weight_dim": (lambda: randn(B, 3), None, ValueError),
    "wrong batch": (lambda: randn(2, 3), 0, ValueError),
    "wrong place of the batch": (lambda: randn(3, B), 0, ValueError),
    "weight_dim out of range": (lambda: randn(B, 3), 2, ValueError),
    "weight_dim float": (lambda: randn(B, 3), 0.0, TypeError),
    "weight_dim bool": (lambda: randn(B, 3), True, TypeError),
    "weight_dim tuple": (lambda: randn(B, 3), (0,), TypeError),
    "a list": (lambda: [1.0, 2.0, 3.0], None, TypeError),
    "a float": (lambda: 2.0, None, TypeError),
    "a string": (lambda: "identity", None, TypeError),
    "complex": (lambda: randn(3).cfloat(), None, TypeError),
    "not symmetric": (asymmetric, None, ValueError),
    "one row not symmetric": (
        lambda: torch.stack([torch.eye(3).double()] * 3 + [asymmetric()]),
        0,
        ValueError,
    ),
}


@pytest.mark.parametrize("mode", ["taylor", "rev_over_rev", "auto"])
@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_wrong_weights_are_refused(name, mode):
    make, dim, kind = BAD_WEIGHTS[name]
    word = "weight_dim" if kind is TypeError and dim is not None else "weight"
    with pytest.raises(kind, match=f"^batch_laplacian: expected .*{word}"):
        call(batch_laplacian, weight=make(), weight_dim=dim, mode=mode)


def test_wrong_weights_from_a_function_are_refused():
    for weight, kind in ((lambda x: randn(2), ValueError), (lambda x: "no", TypeError)):
        with pytest.raises(kind, match=r"^batch_laplacian: expected .*weight"):
            call(batch_laplacian, weight=weight)


def test_an_asymmetric_weight_from_a_function_is_refused():
    with pytest.raises(ValueError, match=r"^batch_laplacian: expected .*symmetric"):
        call(batch_laplacian, weight=lambda x: asymmetric())


def test_weight_dim_needs_a_weight():
    with pytest.raises(TypeError, match=r"^batch_laplacian: expected weight_dim .*weight"):
        call(batch_laplacian, weight_dim=0)


def test_a_weight_for_each_row_wants_batched_inputs():
    """Of a shared input, the sum over rows would not tell one weight from another."""
    laplacian = batch_laplacian(torch.mul, in_dims=(None, 0), weight=randn(B, 3), weight_dim=0)
    with pytest.raises(ValueError, match=r"^batch_laplacian: expected a batched input .* in_dims"):
        laplacian(randn(3), randn(B, 3))


@pytest.mark.parametrize("argnums", [(0, 1), (0,)])
def test_a_weight_wants_one_input(argnums):
    laplacian = batch_laplacian(lambda x, y: x * y, argnums, weight=torch.ones(3).double())
    if len(argnums) == 1:  # a tuple of one is one tensor
        equal(laplacian(randn(B, 3), randn(B, 3)), torch.zeros(B, 3).double())
        return
    with pytest.raises(ValueError, match=r"^batch_laplacian: expected .*(weight|single|one)"):
        laplacian(randn(B, 3), randn(B, 3))
    tree = batch_laplacian(lambda d: d["x"] * d["y"], weight=torch.ones(3).double())
    with pytest.raises(ValueError, match=r"^batch_laplacian: expected .*(weight|single|one)"):
        tree({"x": randn(B, 3), "y": randn(B, 3)})


ESTIMATES = {
    "samples 0": ({"samples": 0}, ValueError, "samples"),
    "samples negative": ({"samples": -1}, ValueError, "samples"),
    "samples float": ({"samples": 2.0}, TypeError, "samples"),
    "samples bool": ({"samples": True}, TypeError, "samples"),
    "probes unknown": (
        {"samples": 2, "probes": "x"},
        ValueError,
        "probes to be .*'rademacher'.*'gaussian'",
    ),
    "probes None": (
        {"samples": 2, "probes": None},
        ValueError,
        "probes to be .*'rademacher'.*'gaussian'",
    ),
    "generator int": ({"samples": 2, "generator": 3}, TypeError, "generator"),
    "error without samples": ({"return_error": True}, ValueError, "samples"),
    "error of one sample": ({"samples": 1, "return_error": True}, ValueError, "samples"),
    "return_error int": ({"samples": 2, "return_error": 1}, TypeError, "return_error to be a bool"),
}


@pytest.mark.parametrize("name", ["batch_laplacian", "batch_divergence"])
@pytest.mark.parametrize("word", ESTIMATES)
def test_wrong_keywords_of_estimates_are_refused(word, name):
    words, kind, expected = ESTIMATES[word]
    func = Counted(torch.sin)
    with pytest.raises(kind, match=rf"^{name}: expected .*{expected}"):
        OPERATORS[name][0](func, **words)
    assert func.count == 0


# indices, kind; what depends on d is known when the input is there
INDICES = {
    "empty": ([], ValueError),
    "too large": ([(3,)], ValueError),
    "too large in a list": ([[3]], ValueError),
    "too small": ([(0, -4)], ValueError),
    "an int": (0, TypeError),
    "ints": ([0, 1], TypeError),
    "a string": ("01", TypeError),
    "strings": ([("0",)], TypeError),
    "floats": ([(0.0,)], TypeError),
    "bools": ([(True,)], TypeError),
    "None": (None, TypeError),
    "a set": ({(0,)}, TypeError),
}


@pytest.mark.parametrize("mode", ["taylor", "rev", "auto"])
@pytest.mark.parametrize("name", INDICES)
def test_wrong_indices_are_refused(name, mode):
    indices, kind = INDICES[name]
    with pytest.raises(kind, match=r"^batch_partials: expected .*ind(ex|ices)"):
        call(batch_partials, indices, mode=mode)


@pytest.mark.parametrize("mode", ["taylor", "rev", "auto"])
def test_partials_of_matrices_are_refused(mode):
    with pytest.raises(ValueError, match=r"^batch_partials: expected "):
        call(batch_partials, [(0,)], x=randn(B, 3, 2), mode=mode)


@pytest.mark.parametrize("mode", FIRST)
@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize(
    "func",
    [
        lambda x: x[:, :2],
        lambda x: x.sum(1),
        lambda x: torch.cat([x, x], 1),
        lambda x: x[:, :, None],
        lambda x: (x, x),
    ],
)
def test_divergence_wants_a_field(func, samples, mode):
    with pytest.raises(ValueError, match=r"^batch_divergence: expected "):
        call(batch_divergence, func=func, samples=samples, mode=mode)


# --- mixing, blindness, own errors -------------------------------------------------------


@by_route
def test_rows_that_mix_are_refused(name, mode):
    for func in (lambda x: (x - x.mean(0)) ** 3, lambda x: x.exp().softmax(0)):
        transformed = OPERATORS[name][0](func, mode=mode)
        for _ in range(2):
            with pytest.raises(BatchMixingError, match=f"^{name}: .*rows"):
                transformed(randn(B, 3))


@by_name
def test_batch_norm_in_training_mode_is_named(name):
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    with pytest.raises(BatchMixingError, match=f"^{name}: .*1: BatchNorm1d in training mode"):
        OPERATORS[name][0](net)(randn(B, 3))
    net.eval()
    OPERATORS[name][0](net)(randn(B, 3))


@by_route
def test_a_function_that_autograd_cannot_see_is_refused(name, mode):
    for func in (lambda x: x.detach().sin(), lambda x: torch.tensor(x.tolist()).double() ** 3):
        with pytest.raises(VerificationError, match=f"^{name}: .*autograd"):
            OPERATORS[name][0](func, mode=mode)(randn(B, 3))


@by_route
def test_errors_of_func_are_passed_on(name, mode):
    def func(x):
        if x.sum() > 0:
            raise KeyError("the user's own")
        return x.sin()

    transformed = OPERATORS[name][0](func, mode=mode)
    for _ in range(2):
        with pytest.raises(KeyError, match="the user's own"):
            transformed(torch.ones(B, 3).double())


# --- falling back ------------------------------------------------------------------------

UNFOLLOWED = {
    "lstm": (lambda: LastStep(nn.LSTM(3, 3, batch_first=True)).double(), (B, 2, 3)),
    "legacy": (lambda: lambda x: Legacy.apply(x.sin()), (B, 3)),
}


@pytest.mark.parametrize("transform", [batch_hessian_diagonal, batch_laplacian])
@pytest.mark.parametrize("name", UNFOLLOWED)
def test_taylor_says_what_it_cannot_follow(name, transform):
    """By itself another mode runs, saying so once at most; asked for, Taylor raises or is right."""
    make, shape = UNFOLLOWED[name]
    func, x = make(), randn(*shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EngineFallbackWarning)
        right = transform(func, mode="rev_over_rev")(x)
    transformed = transform(func)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            equal(transformed(x), right)
    assert len(said) <= 1
    for warning in said:
        assert warning.category is EngineFallbackWarning
        assert str(warning.message).startswith(f"{transform.__name__}: ")
    try:
        found = transform(func, mode="taylor")(x)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        if not str(error).startswith(f"{transform.__name__}: "):
            raise
    else:
        equal(found, right)


# --- what is promised about the names ----------------------------------------------------


@by_name
def test_keywords_are_those_of_batch_jacobian(name):
    common = inspect.signature(funcjac.batch_jacobian).parameters
    ours = inspect.signature(getattr(funcjac, name)).parameters
    defaults = {key: p.default for key, p in ours.items() if key in common}
    assert defaults == {key: p.default for key, p in common.items()}
    assert list(defaults) == list(common)
    positional = [n for n, p in ours.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    indices = ["indices"] * (name == "batch_partials")
    assert positional == ["func", *indices, "argnums"]
    assert list(OPERATORS) == [*filter(lambda n: n in vars(funcjac), OPERATORS)]


@by_name
def test_explain_and_check_derivative_take_each_transform(name):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), randn(B, 3)
    transformed = OPERATORS[name][0](net)
    found = explain(transformed, x)
    assert isinstance(found, funcjac.Explanation)
    assert name in str(found)
    assert found.mode in {*OPERATORS[name][1], "taylor"}
    report = check_derivative(transformed, x)
    assert report.ok, str(report)
