"""Every size that follows from the inputs' dims is computed once, at the top."""

import operator

import pytest
import sympy
import torch
from modcompile.passes.hoist_sizes import HoistSizes, emit_size
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from torch.utils._sympy.functions import FloorDiv

aten = torch.ops.aten
X = {"x": ("batch", "sequence", 8)}


def hoisted(build, inputs=X):
    return rewritten(HoistSizes(), lambda: graph_of(inputs, build))[:2]


def sizes_everywhere(call, x):
    """Reads both sizes from two tensors, and makes one of them of the other."""
    y = call(aten.relu.default, x)
    batch, rows = (call(aten.sym_size.int, x, dim) for dim in (0, 1))
    heads = call(aten.reshape.default, y, [batch, rows, 2, 4])
    flat = call(aten.reshape.default, heads, [call(operator.mul, call(aten.sym_size.int, y, 0), rows), 8])
    return call(aten.reshape.default, flat, [call(aten.sym_size.int, heads, 0), call(aten.sym_size.int, heads, 1), 8])


def test_golden():
    before, after = hoisted(sizes_everywhere)
    check_rewrite("hoist_sizes", before, after)


def test_one_node_for_a_size_above_all_that_is_no_size():
    before, after = hoisted(sizes_everywhere)
    names = nodes_of(after)
    assert names[:4] == ["aten.sym_size.int"] * 2 + ["<built-in function mul>", "aten.relu.default"]
    assert not any("size" in name or "mul" in name for name in names[4:])
    assert_same(before, after, randn(3, 63, 8))


def test_the_first_input_that_carries_a_size_is_asked():
    def build(call, mask, x):
        return call(aten.reshape.default, x, [call(aten.sym_size.int, x, 1), call(aten.sym_size.int, x, 0), 8])

    _, after = hoisted(build, {"mask": ("batch", "sequence"), **X})
    sources = [node.args for node in after.graph.find_nodes(op="call_function", target=aten.sym_size.int)]
    assert [(node.name, dim) for node, dim in sources] == [("mask", 0), ("mask", 1)]


def test_a_graph_without_sizes_is_left_alone():
    before, after = hoisted(lambda call, x: call(aten.relu.default, x))
    assert nodes_of(after) == nodes_of(before)
    assert not HoistSizes().call(after).modified


def test_a_size_that_depends_on_values_stays_where_it_is():
    """As does one computed from it; those of the inputs are hoisted all the same."""
    def build(call, x):
        found = call(aten.nonzero.default, x)
        count = call(aten.sym_size.int, found, 0)
        rows = call(aten.sym_size.int, call(aten.relu.default, x), 1)
        flat = call(aten.reshape.default, found, [call(operator.mul, count, 3)])
        return flat, call(aten.reshape.default, x, [rows, call(aten.sym_size.int, x, 0), 8])

    before, after = hoisted(build)
    assert nodes_of(after) == ["aten.sym_size.int", "aten.sym_size.int", "aten.nonzero.default", "aten.sym_size.int",
                               "<built-in function mul>", "aten.reshape.default", "aten.reshape.default"]
    assert_same(before, after, randn(3, 63, 8).relu())


B, S = sympy.symbols("b s", integer=True, positive=True)


@pytest.mark.parametrize(("expr", "value"), [
    (sympy.Integer(5), 5), (S, 63), (2 * S + 1, 127), (B * S, 189), (FloorDiv(S, 4), 15), (sympy.Max(B, S), 63)])
def test_an_expression_is_computed_by_the_graph(expr, value):
    graph = torch.fx.Graph()
    size = emit_size(graph, expr, {B: graph.placeholder("b"), S: graph.placeholder("s")})
    assert isinstance(size, int) == expr.is_number
    graph.output(size)
    assert torch.fx.GraphModule({}, graph)(3, 63) == value


@pytest.mark.parametrize("names", ["b s", "s b"])
def test_terms_come_in_the_order_of_the_inputs(names):
    """A symbol's own name, which sorts them, is another in every process."""
    first, second = sympy.symbols(names, integer=True, positive=True)
    graph = torch.fx.Graph()
    size = emit_size(graph, first * second, {first: graph.placeholder("one"), second: graph.placeholder("two")})
    assert [arg.name for arg in size.args] == ["one", "two"]
