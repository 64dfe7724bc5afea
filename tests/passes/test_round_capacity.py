"""K becomes a multiple, and never more than the rows there are."""

import operator

import pytest
import torch
from modcompile.passes.round_capacity import RoundCapacity
from tiny import check_rewrite, graph_of, nodes_of, randn, rewritten, run_graph

from modcompile.config import capacity
from modcompile.pass_manager import PassManager
from modcompile.shapes import shape_exprs, size_value

# B batch  S rows  K capacity

aten, mod = torch.ops.aten, torch.ops.modcompile
LOGITS = {"logits": ("batch", "rows")}


def route(call, logits, count):
    return call(operator.getitem, call(mod.route.default, logits, None, count), 0)


def one_in_eight(call, logits):
    size = call(aten.sym_size.int, logits, 1)
    return call(operator.floordiv, call(operator.add, size, 7), 8)


def routed(call, logits):
    return route(call, logits, one_in_eight(call, logits))


def rounded(multiple, build=routed, inputs=LOGITS):
    return rewritten(RoundCapacity(multiple), lambda: graph_of(inputs, build))[:2]


def test_golden():
    before, after = rounded(64)
    check_rewrite("round_capacity", before, after)


@pytest.mark.parametrize("multiple", [1, 2, 64])
@pytest.mark.parametrize("rows", [1, 2, 9, 63, 129, 520, 1024])
def test_it_is_the_capacity_of_the_configuration(multiple, rows):
    _, after = rounded(multiple)
    (positions,) = run_graph(after, randn(3, rows))
    assert positions.shape == (3, capacity(1 / 8, rows, multiple))


def test_a_multiple_of_one_changes_nothing():
    before, after = rounded(1)
    assert nodes_of(after) == nodes_of(before)


def test_all_rows_are_not_rounded():
    before, after = rounded(64, lambda call, logits: route(call, logits, call(aten.sym_size.int, logits, 1)))
    assert nodes_of(after) == nodes_of(before)


@pytest.mark.parametrize(("count", "multiple", "expected"), [(5, 8, 8), (8, 8, 8), (9, 8, 16), (5, 64, 63), (5, 1, 5)])
def test_a_number_becomes_a_number(count, multiple, expected):
    _, after = rounded(multiple, lambda call, logits: route(call, logits, count), {"logits": ("batch", 63)})
    (node,) = after.graph.find_nodes(op="call_function", target=mod.route.default)
    assert node.args[2] == expected
    assert run_graph(after, randn(3, 63))[0].shape == (3, expected)


def test_routes_of_one_capacity_share_one_that_is_rounded():
    def build(call, logits):
        count = one_in_eight(call, logits)
        return route(call, logits, count), route(call, call(aten.neg.default, logits), count)

    _, after = rounded(64, build)
    routes = after.graph.find_nodes(op="call_function", target=mod.route.default)
    assert routes[0].args[2] is routes[1].args[2]
    assert nodes_of(after).count(str(torch.sym_min)) == 1


def test_shapes_up_to_the_merge_have_the_rounded_capacity():
    def build(call, x, logits):
        positions = routed(call, logits)
        rows = call(aten.relu.default, call(mod.gather_rows.default, x, positions))
        gate = call(aten.gather.default, logits, 1, positions)
        return call(mod.merge_rows.default, x, rows, positions, gate), call(aten.neg.default, rows)

    _, after = rounded(64, build, {"x": ("batch", "rows", 8), **LOGITS})
    (count,) = [size_value(node) for node in after.graph.nodes if node.target is torch.sym_min]
    merged, rows = map(shape_exprs, after.graph.output_node().args[0])
    assert merged == shape_exprs(next(iter(after.graph.nodes))) and rows[1] == count
    x, logits = randn(3, 130, 8), randn(3, 130, seed=1)
    assert [value.shape[1] for value in run_graph(after, x, logits)] == [130, 64]


def test_another_multiple_rounds_again():
    _, after = rounded(8)
    PassManager([RoundCapacity(64)])(after)
    assert run_graph(after, randn(3, 130))[0].shape == (3, 64)
