"""Shapes of a graph's values: symbols are shared, sizes are expressions, and only what is missing is computed."""

import sympy
import torch
from tiny import Block, Mlp, Stack, graph_of, outlined, sub_graph_of

from modcompile.shapes import (
    dim_expr,
    fake_inputs,
    fake_mode_of,
    new_symbol,
    propagate,
    propagate_alike,
    propagate_missing,
    shape_exprs,
    size_value,
)
from modcompile.spec import TensorSpec

aten = torch.ops.aten


def specs(**shapes):
    return [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in shapes.items()]


def test_equal_names_share_a_symbol():
    x, y, z = fake_inputs(specs(x=("batch", "rows", 8), y=("rows", 4), z=("columns",)), {"rows": 33})
    assert dim_expr(x.shape[1]) == dim_expr(y.shape[0]) != dim_expr(z.shape[0])
    assert x.shape[1].node.hint == 33 and dim_expr(y.shape[1]) == 4
    assert len({x.shape[0].node.hint, x.shape[1].node.hint, z.shape[0].node.hint}) == 3
    assert x.fake_mode is y.fake_mode


def test_symbols_of_other_inputs_are_others():
    (x,), (y,) = fake_inputs(specs(x=("rows",))), fake_inputs(specs(y=("rows",)))
    assert x.fake_mode is not y.fake_mode
    fresh = new_symbol(x.fake_mode.shape_env, "capacity", 5)
    assert fresh.node.hint == 5 and dim_expr(fresh) != dim_expr(x.shape[0])


def test_what_a_node_carries():
    def build(call, x):
        rows = call(aten.sym_size.int, x, 1)
        return call(aten.reshape.default, x, [-1, 8]), call(aten.arange.default, rows)

    graph_module = graph_of({"x": ("batch", "rows", 8)}, build)
    x, rows, flat, numbers, output = graph_module.graph.nodes
    batch, s, width = shape_exprs(x)
    assert width == 8 and size_value(rows) == s and shape_exprs(rows) is None
    assert sympy.expand(shape_exprs(flat)[0]) == batch * s and shape_exprs(numbers) == (s,)
    assert size_value(x) is None and size_value(7) is None and shape_exprs(output) is None
    assert fake_mode_of(graph_module) is x.meta["val"].fake_mode


def test_a_hint_that_equals_another_size_is_not_mistaken_for_it():
    def build(call, x):
        return call(aten.add.Tensor, x, call(aten.mean.dim, x, [1], True))

    for hints in ({"rows": 8}, {"batch": 57}, {"batch": 5, "rows": 5}):
        graph_module = graph_of({"x": ("batch", "rows", 8)}, build)
        propagate(graph_module, fake_inputs(specs(x=("batch", "rows", 8)), hints))
        output = graph_module.graph.output_node().args[0][0]
        assert all(expr.is_Symbol for expr in shape_exprs(output)[:2])


def test_only_what_is_missing_is_computed():
    graph_module = graph_of({"x": ("batch", "rows", 8)}, lambda call, x: call(aten.relu.default, x))
    relu = graph_module.graph.output_node().args[0][0]
    recorded = relu.meta["val"]
    with graph_module.graph.inserting_after(relu):
        added = graph_module.graph.call_function(aten.add.Tensor, (relu, 1))
    propagate_missing(graph_module)
    assert relu.meta["val"] is recorded and added.meta["val"].shape == recorded.shape


def test_a_graph_without_shapes_is_left_alone():
    graph = torch.fx.Graph()
    graph.output((graph.call_function(aten.relu.default, (graph.placeholder("x"),)),))
    graph_module = torch.fx.GraphModule({}, graph)
    propagate_missing(graph_module)
    assert not any("val" in node.meta for node in graph.nodes)


def test_a_call_of_a_sub_graph_gives_its_output_at_the_callers_sizes():
    graph_module = sub_graph_of({"x": ("batch", "rows", 8)},
                                lambda call, x: call(aten.to.dtype, call(aten.slice.Tensor, x, 2, 0, 4), torch.float16))
    call = graph_module.graph.find_nodes(op="call_module", target="block")[0]
    outer = shape_exprs(call.args[0])
    assert shape_exprs(call) == (*outer[:2], 4) and call.meta["val"].dtype == torch.float16
    inner = shape_exprs(graph_module.get_submodule("block").graph.output_node().args[0])
    assert inner[2] == 4 and graph_module.get_submodule("block").graph.output_node().args[0].meta["val"] is not \
        call.meta["val"]


def test_blocks_of_one_kind_are_computed_once():
    model = outlined(Stack(Mlp(), Mlp(), Block()), (torch.randn(2, 5, 8),), [f"layers.{i}" for i in range(3)])
    bodies = [model.graph_module.get_submodule(f"layers.{i}") for i in range(3)]
    inputs = specs(hidden=("batch", "rows", 8))
    known: dict = {}
    for body in bodies:
        propagate_alike(body, inputs, {}, known)
    assert len(known) == 2
    for one, other in zip(bodies[0].graph.nodes, bodies[1].graph.nodes, strict=True):
        assert one.meta.get("val") is other.meta.get("val")
    assert all("val" in node.meta for body in bodies for node in body.graph.nodes if node.op != "output")
