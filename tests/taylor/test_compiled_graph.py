"""The graph that compilers get of a transform, what Dynamo guards, and where a graph breaks."""

import pytest
import torch
import torch._dynamo.testing
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from funcjac import (
    batch_hessian,
    batch_hessian_diagonal,
    batch_jacobian,
    batch_jacobian_of,
    batch_laplacian,
)
from tests.dispatch.test_compiled import B, compiled, network, randn


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def traced(function, *args):
    """The operations of the forward graph, as its compiler gets it."""
    return [node.target.overloadpacket.__name__ for node in traced_nodes(function, *args)]


def traced_nodes(function, *args):
    found = []

    def collect(graph_module, inputs):
        found.extend(nodes(graph_module))
        return graph_module

    def nodes(graph_module):
        calls = (n for n in graph_module.graph.nodes if n.op == "call_function")
        return [n for n in calls if hasattr(n.target, "overloadpacket")]

    with torch.no_grad():
        compiled(function, aot_autograd(fw_compiler=collect))(*args)
    return found


def test_taylor_propagation_makes_a_flat_graph():
    """One product for each layer and order, and no gradient differentiated once more."""
    net = network()
    names = traced(batch_laplacian(net), randn(B, 3))
    products = [name for name in names if name in ("mm", "addmm", "bmm")]
    # Value of the first layer, and what the second adds: slopes of the first one are its weight.
    assert len(products) == 1 + 1
    nested = traced(batch_laplacian(net, mode="rev_over_rev"), randn(B, 3))
    assert len(names) < 0.5 * len(nested)


def test_directions_that_rows_share_pass_the_first_layer_once():
    """Also those that are not the standard basis."""
    weight = torch.tensor([[2.0, 1, 0], [1, 3, 0], [0, 0, 1]], dtype=torch.float64)
    net = network()
    nodes = traced_nodes(batch_laplacian(net, weight=weight), randn(B, 3))
    rows = [node.meta["val"].shape[0] for node in nodes if node.target is torch.ops.aten.mm.default]
    assert rows == [2 * 3, B]  # the pairs of directions; what the last layer adds


def test_the_rule_chooses_the_mode():
    """Forward mode for a wide output: rows of the basis of the input go through the graph."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 40)).double()
    names = traced(batch_jacobian(net), randn(B, 2))
    assert "eye" in names
    assert names != traced(batch_jacobian(net, mode="rev"), randn(B, 2))
    assert names == traced(batch_jacobian(net, mode="fwd"), randn(B, 2))


@pytest.mark.parametrize(("widths", "mode"), [((3, 8, 5), "fwd"), ((5, 2, 10), "rev")])
def test_few_more_outputs_than_inputs(widths, mode):
    """Forward mode, but where reverse mode passes nothing wider than the output behind a layer."""
    first, hidden, last = widths
    net = nn.Sequential(nn.Linear(first, hidden), nn.Tanh(), nn.Linear(hidden, last)).double()
    names = traced(batch_jacobian(net), randn(B, first))
    other = "rev" if mode == "fwd" else "fwd"
    assert names == traced(batch_jacobian(net, mode=mode), randn(B, first))
    assert names != traced(batch_jacobian(net, mode=other), randn(B, first))


def test_a_last_layer_takes_no_product():
    net = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    names = traced(batch_jacobian(net), randn(B, 7))
    products = [name for name in names if name in ("mm", "addmm", "bmm")]
    assert len(products) == 2  # value of the first layer, and back through it


def test_what_all_rows_share_passes_the_first_layer_once():
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    nodes = traced_nodes(batch_jacobian(net, mode="fwd"), randn(B, 3))
    rows = [node.meta["val"].shape[0] for node in nodes if node.target is torch.ops.aten.mm.default]
    assert rows == [3, 3 * B]


def test_wide_rows_are_not_turned_at_the_end():
    net = nn.Sequential(nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    names = traced(batch_jacobian(net, mode="rev"), randn(B, 9))
    last = len(names) - names[::-1].index("mm")
    assert "clone" not in names[last:]


def test_gradients_of_weights_are_added_before_they_are_turned():
    """A compiler adds products in the products themselves, but not what turns them."""
    net, graphs = network(), []

    def collect(graph_module, inputs):
        graphs.append(graph_module.graph)
        return make_boxed_func(graph_module)

    step = compiled(batch_hessian_diagonal(net), aot_autograd(fw_compiler=collect))
    step(randn(B, 3)).square().sum().backward()
    sums = graphs[1].find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    weights = [n for n in sums if n.meta["val"].shape in {p.shape for p in net.parameters()}]
    assert weights
    assert all(user.op == "output" for node in weights for user in node.users)


@pytest.mark.parametrize("transform", [batch_jacobian, batch_laplacian])
def test_operators_are_replaced_once(transform):
    """``x ** y``, which Python defines in a class, as ``pow``, whose replacement runs it again."""
    operator = transform(lambda x: x[:, :1] ** x[:, 1:2])
    function = transform(lambda x: torch.pow(x[:, :1], x[:, 1:2]))
    names = traced(operator, randn(B, 2).exp())
    assert names == traced(function, randn(B, 2).exp())


def test_hessian_by_an_exponent_of_zero():
    x = torch.tensor([[0.7, 1.0], [1.3, 0.0], [2.0, 2.0]], dtype=torch.float64)
    hessian = batch_hessian(lambda x: x[:, 0] ** x[:, 1], mode="rev_over_rev")
    torch.testing.assert_close(compiled(hessian)(x), hessian(x))


def test_guards_do_not_compare_the_table_of_replacements():
    transform = batch_jacobian(network())
    function = lambda x: transform(x)
    compiled(function)(randn(B, 3))
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(function.__code__)
    (guards,) = [str(entry.guard_manager) for entry in entries]
    assert "check_tensors" in guards
    assert "_PLACES" not in guards


def ones(*shape):
    return torch.ones(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    "func",
    [
        lambda x: torch.cat([ones(len(x), 1), x.exp()], 1),
        lambda x: torch.slice_scatter(x.exp(), ones(len(x), 1), 1, 0, 1),
        lambda x: torch.diagonal_scatter(
            x.unsqueeze(1).exp() * ones(3, 1), ones(len(x), 3), 0, 1, 2
        ),
    ],
    ids=["cat", "slice_scatter", "diagonal_scatter"],
)
def test_integers_that_are_values_add_nothing_to_derivatives(func):
    """Torch refuses some of them beside gradients, and they counted as indices here."""
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    laplacian = batch_laplacian(func, mode="taylor")
    expected = func(x) - func(torch.full_like(x, -torch.inf))  # the exponential is its derivative
    torch.testing.assert_close(compiled(laplacian)(x), expected)
    torch.testing.assert_close(laplacian(x), expected)


@pytest.mark.parametrize(
    "func",
    [
        lambda x: x.sin().sort(1)[0],
        lambda x: x.sin().amax(1, True),
        lambda x: torch.linalg.cross(x.sin(), x.cos()),
        lambda x: x.sin().cummax(1)[0],
    ],
    ids=["sort", "amax", "cross", "cummax"],
)
def test_second_derivatives_of_an_unknown_operation_keep_the_batch_size_free(func):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = compiled(batch_laplacian(func), counter, dynamic=True)
    for batch in (4, 7, 5):
        x = randn(batch, 3)
        torch.testing.assert_close(run(x), batch_laplacian(func)(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("transform", [batch_laplacian, batch_hessian])
def test_attention(transform):
    """Torch's own kernel has no second derivative, where Dynamo looks through what is recorded."""

    def func(x):
        query = x.view(-1, 1, 3, 2).exp()
        return nn.functional.scaled_dot_product_attention(query, query.sin(), query.cos()).sum(1)

    run, x = transform(func), randn(B, 6)
    compiled_run = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled_run(x), run(x), rtol=1e-10, atol=1e-10)


def test_one_sum_of_second_derivatives_has_the_shape_of_its_value():
    """A compiler does not fuse ``(1, B, H)`` with the value ``(B, H)``: one kernel more."""
    nodes = traced_nodes(batch_laplacian(network()), randn(B, 3))
    shapes = [n.meta["val"].shape for n in nodes if n.target is torch.ops.aten.mul.Tensor]
    assert (B, 6) in shapes
    assert (1, B, 6) not in shapes


# --- where a graph breaks ----------------------------------------------------------------------


def breaking(net):
    def func(x):
        torch._dynamo.graph_break()
        return net(x).sin()

    return func


def branching(net):
    return lambda x: net(x).sin() if x.sum() > 0 else x


@pytest.mark.parametrize("make", [breaking, branching])
@pytest.mark.parametrize(
    "transform",
    [
        batch_jacobian,
        batch_laplacian,
        lambda f: batch_hessian(f, mode="rev_over_rev"),
        lambda f: batch_jacobian(batch_jacobian(f)),
    ],
    ids=["jacobian", "laplacian", "hessian", "nested"],
)
def test_a_call_in_which_the_graph_breaks_runs_as_eager_code(make, transform):
    """Dynamo compiled the library in pieces, which took others for traced: zeros."""
    func, x = make(network()), randn(B, 3).square().requires_grad_()
    expected = transform(func)(x)
    found = torch.compile(lambda x: transform(func)(x), backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    (grad,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), x)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo asks for it
def test_what_was_computed_before_the_graph_is_refused():
    """Its derivatives would be zeros; a graph that breaks there runs as eager code."""
    net, x = network(), randn(B, 3).requires_grad_()

    def before(x):
        y = net(x)
        torch._dynamo.graph_break()
        return batch_jacobian_of(y, x)

    expected, y = batch_jacobian(net)(x), net(x)
    torch.testing.assert_close(torch.compile(before, backend="aot_eager")(x), expected)
    with pytest.raises(Exception, match="was not computed from inputs where it is compiled"):
        compiled(lambda y, x: batch_jacobian_of(y, x))(y, x)


class Owner:
    def __init__(self):
        self.net = network()

    def value(self, x):
        return self.net(x)

    jac = batch_jacobian(value, argnums=1, in_dims=(None, 0))

    def call(self, x):
        return self.jac(x)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="Dynamo binds functions alone")
def test_a_compiled_method_binds_transforms_of_its_class():
    owner, x = Owner(), randn(B, 3)
    torch.testing.assert_close(compiled(owner.call)(x), owner.call(x))


def test_vmap_takes_a_transform_of_a_module_that_is_made_inline():
    """It asks for a name, or else for what it prints as."""
    net, x = network(), randn(2, B, 3)
    found = compiled(lambda x: torch.vmap(batch_jacobian(net))(x))(x)
    torch.testing.assert_close(found, torch.vmap(batch_jacobian(net))(x))


def test_a_method_that_calls_its_super_is_taken():
    net, x = network(), randn(B, 3)
    func = lambda x: net(x).unflatten(1, (1, -1)).sin()
    torch.testing.assert_close(compiled(batch_jacobian(func))(x), batch_jacobian(func)(x))


def test_inference_mode_makes_no_zeros():
    net, x = network(), randn(B, 3)
    expected = batch_jacobian(net)(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(compiled(batch_jacobian(net), "aot_eager")(x), expected)
        with pytest.raises(RuntimeError, match=r"expected torch.no_grad, got torch.inference_mode"):
            compiled(batch_jacobian(net), "eager")(x)
