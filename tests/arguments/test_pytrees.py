"""Trees of torch's pytree, integer leaves, negative argnums and missing batch dimensions."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree as torch_pytree

from funcjac import batch_hessian, batch_hessian_diagonal, batch_jacobian
from tests.cases.modules import network
from tests.tensors import equal, f64, randn

B = 4


@dataclass
class State:
    """Known to torch's pytree only."""

    position: Any
    velocity: Any


torch_pytree.register_pytree_node(
    State, lambda s: ([s.position, s.velocity], None), lambda leaves, _: State(*leaves)
)


class ModelOutput(OrderedDict):
    """As in transformers: a dictionary whose class torch's pytree knows."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


torch_pytree.register_pytree_node(
    ModelOutput,
    lambda out: (list(out.values()), list(out)),
    lambda leaves, names: ModelOutput(zip(names, leaves)),
)


@pytest.mark.quick
def test_a_dataclass_of_torch_pytree_goes_in_and_out():
    def step(state):
        return State(state.position + 0.1 * state.velocity, -state.position.sin())

    state = State(randn(B, 3), randn(B, 3))
    jac, value = batch_jacobian(step, return_value=True)(state)
    eye = torch.eye(3, dtype=f64).expand(B, 3, 3)
    assert type(jac) is type(value) is type(jac.position) is State
    equal(jac.position.position, eye)
    equal(jac.position.velocity, 0.1 * eye)
    equal(jac.velocity.position, torch.diag_embed(-state.position.cos()))
    equal(jac.velocity.velocity, torch.zeros(B, 3, 3, dtype=f64))
    equal(value.velocity, -state.position.sin())


@pytest.mark.quick
def test_a_model_output_keeps_its_class():
    net = network(5)
    func = lambda x: ModelOutput(logits=net(x), hidden=x.sin())
    x = randn(B, 3)
    jac = batch_jacobian(func)(x)
    assert type(jac) is ModelOutput
    assert list(jac) == ["logits", "hidden"]
    equal(jac.logits, batch_jacobian(net)(x))
    equal(jac.hidden, torch.diag_embed(x.cos()))
    hess = batch_hessian(func)(x)
    assert type(hess) is ModelOutput
    equal(hess.logits, batch_hessian(net)(x))


def test_what_vmap_of_jacrev_takes_is_taken():
    func = lambda state: ModelOutput(energy=(state.position * state.velocity).sum(-1))
    state = State(randn(B, 3), randn(B, 3))
    found = batch_jacobian(func)(state)
    right = torch.vmap(torch.func.jacrev(func))(state)
    equal(found.energy.position, right.energy.position)
    equal(found.energy.velocity, right.energy.velocity)


@pytest.mark.quick
def test_an_integer_leaf_of_a_tree_is_a_constant():
    """Positions and atomic numbers, as interatomic potentials have them."""
    charges = torch.tensor([1.0, 6.0, 8.0], dtype=f64)

    def energy(atoms):
        return (charges[atoms["z"]].unsqueeze(-1) * atoms["pos"].sin()).sum((1, 2))

    atoms = {"pos": randn(B, 5, 3), "z": torch.randint(3, (B, 5)), "mask": torch.ones(B, 5) > 0}
    jac = batch_jacobian(energy)(atoms)
    assert list(jac) == ["pos", "z", "mask"]
    assert jac["z"] is None
    assert jac["mask"] is None
    equal(jac["pos"], charges[atoms["z"]].unsqueeze(-1) * atoms["pos"].cos())
    diagonal = batch_hessian_diagonal(energy)(atoms)
    assert diagonal["z"] is None
    equal(diagonal["pos"], -charges[atoms["z"]].unsqueeze(-1) * atoms["pos"].sin())


@pytest.mark.parametrize("name", ["state", "control"])
def test_a_missing_batch_dimension_is_named_first(name):
    """``f(state (4,), control (1,))``: both lack the batch."""
    args = {"state": (randn(4), randn(1)), "control": (randn(B, 4), randn(()))}[name]
    with pytest.raises(ValueError, match=r"^batch_jacobian: expected") as found:
        batch_jacobian(lambda state, control: state * control.sum(-1, keepdim=True))(*args)
    text = str(found.value)
    assert "batch dimension" in text
    before = text.find("in_dims")
    assert before < 0 or text.find("batch dimension") < before


ENGINES = ("auto", "vmap", "sum", "loop")


@pytest.mark.quick
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("check", ["auto", False])
def test_negative_argnums_count_from_the_end(check, mode, engine):
    """``torch.func.jacfwd`` and ``hessian`` are silently wrong with them."""
    x, y, z = randn(B, 3), randn(B, 3), randn(B, 3)
    words = {"engine": engine, "mode": mode, "check": check}
    found = batch_jacobian(lambda x, y, z: x * y + z**2, -1, **words)(x, y, z)
    equal(found, torch.diag_embed(2 * z))
    found = batch_jacobian(lambda x, y, z: x * y + z**2, (-2, 0), **words)(x, y, z)
    equal(found, (torch.diag_embed(x), torch.diag_embed(y)))


@pytest.mark.parametrize("mode", ["fwd_over_rev", "rev_over_rev", "fwd_over_fwd", "auto"])
def test_negative_argnums_of_second_order_count_from_the_end(mode):
    x, y = randn(B, 3), randn(B, 3)
    found = batch_hessian(lambda x, y: (x * y.sin()).sum(1), -1, mode=mode)(x, y)
    equal(found, torch.diag_embed(-x * y.sin()))
