"""Unusual tensors that are right: dtypes, views, subclasses, few rows."""

import pytest
import torch
from torch import nn

from tests.tensors import quiet, randn
from tests.watched import TAYLOR, TRANSFORMS, B, Watched, by_name, close, unchanged


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
def test_unusual_tensors_are_differentiated(entry, name):
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
def test_a_negative_view_is_right_without_verification(name):
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
def test_few_rows_have_the_shape_of_many(shape, name):
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
def test_rows_without_elements_have_a_result(shape, name):
    func, x = Watched(), randn(*shape)
    with unchanged(func, [x]):
        found = TRANSFORMS[name](func)(x)
    assert found.shape[0] == shape[0]
    assert found.numel() == (B if shape == (B,) or (name == "batch_divergence" and shape[0]) else 0)
