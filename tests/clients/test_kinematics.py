"""pytorch_kinematics: its ``jacobian()``, and where its own backward is not differentiable."""

import pytest
import torch

from funcjac import batch_hessian, batch_jacobian, check_derivative
from tests.oracles import by_differences
from tests.tensors import equal, randn

kinematics = pytest.importorskip(
    "pytorch_kinematics", reason="pytorch_kinematics is not installed: make clients"
)

# Two revolute joints, a prismatic one, and a tool. Without turned joint frames: their rotations
# are read in single precision.
ARM = """<robot name="arm">
<link name="base"/><link name="a"/><link name="b"/><link name="c"/><link name="tool"/>
<joint name="turn" type="revolute"><parent link="base"/><child link="a"/>
  <origin xyz="0 0 0.5" rpy="0 0 0"/><axis xyz="0 0 1"/>
  <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
<joint name="lift" type="revolute"><parent link="a"/><child link="b"/>
  <origin xyz="0 0.125 0.25" rpy="0 0 0"/><axis xyz="0 1 0"/>
  <limit lower="-3" upper="3" effort="1" velocity="1"/></joint>
<joint name="reach" type="prismatic"><parent link="b"/><child link="c"/>
  <origin xyz="0.5 0 0" rpy="0 0 0"/><axis xyz="1 0 0"/>
  <limit lower="-1" upper="1" effort="1" velocity="1"/></joint>
<joint name="mount" type="fixed"><parent link="c"/><child link="tool"/>
  <origin xyz="0.125 0 0.25" rpy="0 0 0"/></joint>
</robot>"""


@pytest.fixture
def arm():
    return kinematics.build_serial_chain_from_urdf(ARM, "tool").to(dtype=torch.float64)


def position(arm):
    return lambda q: arm.forward_kinematics(q).get_matrix()[:, :3, 3]


def rotation(arm):
    return lambda q: arm.forward_kinematics(q).get_matrix()[:, :3, :3]


def test_the_jacobian_of_the_tool(arm):
    """Above the linear velocity, below the angular one, ``dR/dq R^T`` of the rotation."""
    q = randn(5, 3)
    jac = arm.jacobian(q)
    assert jac.shape == (5, 6, 3)
    equal(batch_jacobian(position(arm))(q), jac[:, :3])
    by_q, turned = batch_jacobian(rotation(arm), return_value=True)(q)
    spin = torch.einsum("biks,bjk->bijs", by_q, turned)
    equal(torch.stack([spin[:, 2, 1], spin[:, 0, 2], spin[:, 1, 0]], 1), jac[:, 3:])


def test_inverse_kinematics_of_a_batch(arm):
    """Gauss-Newton steps of all poses at once reach poses that exist."""
    goal = position(arm)(torch.tensor([[0.4, -0.6, 0.3], [-0.9, 0.5, -0.2]]).double())
    q = torch.zeros(2, 3).double()
    for _ in range(20):
        jac, reached = batch_jacobian(position(arm), return_value=True)(q)
        q = q + torch.linalg.solve(jac, (goal - reached).unsqueeze(2)).squeeze(2)
    equal(position(arm)(q), goal)


def test_second_derivatives_need_its_differentiable_backward(arm):
    """Its default backward is a formula of saved numbers: autograd sees it as constant.

    Plain double backward gives zeros, too. ``check_derivative`` holds them against differences.
    """
    q = randn(5, 3)
    default = batch_hessian(position(arm))
    assert torch.equal(default(q), torch.zeros(5, 3, 3, 3).double())
    assert not check_derivative(default, q).ok

    tool = arm.get_frame_indices("tool")

    def differentiable(q):
        return arm.forward_kinematics_tensor(q, analytical_grad=False)[tool][0][:, :3, 3]

    equal(batch_jacobian(differentiable)(q), batch_jacobian(position(arm))(q))
    equal(
        batch_hessian(differentiable)(q),
        by_differences(lambda q: arm.jacobian(q)[:, :3], (q,)),
        1e-7,
    )
