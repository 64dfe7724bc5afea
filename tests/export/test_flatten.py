"""One graph of ops, in the place of the graphs and routers that a model calls, on the same tensors."""

import operator

import pytest
import torch
from tiny import (
    Attention,
    Block,
    Mlp,
    Stack,
    check_golden,
    nodes_of,
    outlined,
    randn,
    randomise_routers,
    run_graph,
)
from tolerances import TOLERANCES, deviation
from torch import nn

from modcompile import MoDConfig, convert
from modcompile.block_view import module_paths
from modcompile.capture import capture
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.export.flatten import bind_shapes, flatten, inline
from modcompile.program import format_graph
from modcompile.shapes import fake_inputs, propagate, shape_exprs
from modcompile.spec import TensorSpec

# B batch  S rows  K capacity

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
X = randn(2, 5, 8)
SIZES = {"hidden": (3, 63, 8)}


@pytest.fixture(scope="module")
def mod():
    return randomise_routers(convert(Stack(Attention(), Block()), (X,), MoDConfig(
        blocks="all", capacity_ratio=5 / 63, gate="sigmoid", attend_to="all")))


@pytest.fixture(scope="module")
def flat(mod):
    return flatten(mod)


def test_golden():
    check_golden("flatten", format_graph(flatten(outlined(Stack(Mlp(), Mlp()), (X,), ["layers.1"]), SIZES)))


def test_it_gives_the_models_numbers(mod, flat):
    for shape in ((3, 63, 8), (1, 13, 8)):
        with torch.no_grad():
            assert deviation(run_graph(flat, randn(*shape))[0], mod(randn(*shape))) <= EAGER


def test_nothing_is_called_and_every_value_has_a_shape(flat):
    assert {node.op for node in flat.graph.nodes} == {"placeholder", "get_attr", "call_function", "output"}
    assert all("val" in node.meta for node in flat.graph.nodes if node.op != "output")


def test_tensors_are_the_models_own(mod, flat):
    attributes = {str(node.target) for node in flat.graph.find_nodes(op="get_attr")}
    assert attributes == set(mod.tensors())
    assert all(operator.attrgetter(name)(flat) is tensor for name, tensor in mod.tensors().items())


def test_nodes_know_their_module(mod, flat):
    paths = {module_paths(node)[-1] for node in flat.graph.nodes if module_paths(node)}
    assert {"layers.0.query", "layers.0.out", "layers.1.mlp.norm", "layers.0", "layers.1"} <= paths
    # What routing put around a block is the block's.
    assert {module_paths(node)[-1] for node in flat.graph.nodes if "modcompile.merge" in str(node.target)} == {
        "layers.0", "layers.1"}


def test_the_model_stays_as_it_is(mod):
    text = mod.format()
    flatten(mod, SIZES)
    assert mod.format() == text


def test_known_sizes_are_numbers(mod):
    known = flatten(mod, SIZES)
    assert not any("size" in name or ("built-in" in name and "getitem" not in name) for name in nodes_of(known))
    (route, _) = known.graph.find_nodes(op="call_function", target=torch.ops.modcompile.route.default)
    assert route.args[2] == 5
    with torch.no_grad():
        assert deviation(run_graph(known, randn(3, 63, 8))[0], mod(randn(3, 63, 8))) <= EAGER


def test_one_known_size_leaves_the_others():
    class Two(nn.Module):
        def forward(self, a, b):
            return a.flatten(1), b.flatten(1)

    graph = capture(Two(), (randn(2, 5, 8), randn(2, 7, 9)))
    a, b = map(shape_exprs, flatten(graph, {"a": (3, 63, 8)}).graph.output_node().args[0])
    assert a == (3, 63 * 8) and b[0] == 3 and b[1].free_symbols


def test_shapes_are_those_of_a_run_node_by_node(flat, mod):
    """One node of each kind was evaluated for all."""
    again = flatten(mod)
    propagate(again, fake_inputs(list(mod.inputs), mod.hints))
    symbols: dict = {}
    for one, other in zip(flat.graph.nodes, again.graph.nodes, strict=True):
        exprs = shape_exprs(other)
        if one.op == "placeholder":
            symbols |= dict(zip(exprs, shape_exprs(one), strict=True))
        assert shape_exprs(one) == (None if exprs is None else tuple(expr.xreplace(symbols) for expr in exprs))
        assert exprs is None or one.meta["val"].dtype == other.meta["val"].dtype


def test_sizes_at_which_the_graph_does_not_run():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Parameter(randn(1, 20, 8))

        def forward(self, x):
            return x + self.positions[:, : x.shape[1]]

    with pytest.raises(UnsupportedGraphError, match="the graph does not run at these sizes") as caught:
        flatten(capture(Short(), (X,)), {"x": (3, 63, 8)})
    assert "63" in caught.value.details["where"] and "RuntimeError" in caught.value.details["found"]


# Parts


SPECS = [TensorSpec("a", "float32", ("batch", "rows", 8)), TensorSpec("b", "int64", ("batch", "rows"))]


def test_shapes_bind_symbols():
    assert bind_shapes(SPECS, {}) == {}
    assert bind_shapes(SPECS, {"b": (3, 63)}) == {"batch": 3, "rows": 63}
    assert bind_shapes(SPECS, {"b": (3, 63), "a": (3, 63, 8)}) == {"batch": 3, "rows": 63}


@pytest.mark.parametrize("shapes", [{"a": (3, 63, 9)}, {"b": (0, 63)}, {"b": (3, -1)}, {"b": (3, 63, 1)}])
def test_shapes_that_bind_nothing(shapes):
    with pytest.raises(UsageError, match="does not fit the model's input") as caught:
        bind_shapes(SPECS, shapes)
    assert str(next(iter(shapes.values()))) == caught.value.details["found"]


def test_a_sub_graph_in_the_place_of_its_call():
    inner = torch.fx.Graph()
    x, y = inner.placeholder("x"), inner.placeholder("y")
    product = inner.call_function(aten.mul.Tensor, (x, inner.get_attr("scale")))
    product.meta["nn_module_stack"] = {"own": ("own", "")}
    inner.output((product, inner.call_function(aten.add.Tensor, (product, y)), 7))
    body = torch.fx.GraphModule({"scale": nn.Parameter(torch.tensor(2.0))}, inner)

    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    results = inline(graph, body, [b, a], "block.inner", "block")
    assert results[2] == 7
    graph.output(tuple(results[:2]))
    (attribute,) = graph.find_nodes(op="get_attr")
    assert attribute.target == "block.inner.scale"
    assert [module_paths(node) for node in results[:2]] == [["own"], ["block"]]
    root = torch.fx.GraphModule({"block.inner.scale": body.scale}, graph)
    assert [value.item() for value in run_graph(root, torch.tensor(1.0), torch.tensor(10.0))] == [20, 21]
