"""The straight-through gate is a constant outside of training; what only looks like one stays."""

import pytest
import torch
from modcompile.passes.fold_straight_through import FoldStraightThrough
from modcompile.passes.route_blocks import RouteBlocks
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten, sub_graph_of

from modcompile.pass_manager import PassManager
from modcompile.routers import Router

aten = torch.ops.aten
INPUTS = {"logits": ("batch", "slots"), "filled": ("batch", "slots")}


def gate(call, logits, filled):
    share = call(aten.sigmoid.default, logits)
    one = call(aten.add.Tensor, call(aten.sub.Tensor, share, call(aten.detach.default, share)), 1)
    return call(aten.where.ScalarOther, filled, one, 0.0)


def folded(build, inputs=INPUTS):
    return rewritten(FoldStraightThrough(), lambda: graph_of(inputs, build, dtypes={"filled": "bool"}))


def test_golden():
    before, after, _ = folded(gate)
    check_rewrite("fold_straight_through", before, after)


def test_it_is_one_where_a_slot_is_filled():
    before, after, _ = folded(gate)
    filled = randn(3, 5) > 0
    assert_same(before, after, 9 * randn(3, 5, seed=1), filled)
    assert torch.equal(after(randn(3, 5), filled)[0], filled.float())


def test_the_gate_of_a_routed_block():
    def make():
        graph_module = sub_graph_of({"hidden": ("batch", "rows", 8)}, lambda call, x: call(aten.relu.default, x))
        graph_module.add_submodule("router.block", Router(8))
        return PassManager([RouteBlocks(("block",), ("5/63",), "straight-through")])(graph_module)

    before, after, _ = rewritten(FoldStraightThrough(), make)
    assert "aten.sigmoid.default" in nodes_of(before) and "aten.sigmoid.default" not in nodes_of(after)
    assert_same(before, after, randn(3, 63, 8))


def of_another_value(call, logits, filled):
    zero = call(aten.sub.Tensor, call(aten.sigmoid.default, logits), call(aten.detach.default, logits))
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, zero, 1), 0.0)


def of_a_number(call, logits, filled):
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, call(aten.sub.Tensor, logits, 1), 1), 0.0)


def plus_two(call, logits, filled):
    zero = call(aten.sub.Tensor, logits, call(aten.detach.default, logits))
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, zero, 2), 0.0)


def twice_one(call, logits, filled):
    zero = call(aten.sub.Tensor, logits, call(aten.detach.default, logits))
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, zero, 1, alpha=2), 0.0)


def half_of_it_is_left(call, logits, filled):
    left = call(aten.sub.Tensor, logits, call(aten.detach.default, logits), alpha=0.5)
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, left, 1), 0.0)


def not_zero_elsewhere(call, logits, filled):
    one = call(aten.add.Tensor, call(aten.sub.Tensor, logits, call(aten.detach.default, logits)), 1)
    return call(aten.where.ScalarOther, filled, one, 0.5)


def another_gate(call, logits, filled):
    return call(aten.where.ScalarOther, filled, call(aten.sigmoid.default, logits), 0.0)


@pytest.mark.parametrize("build", [of_another_value, of_a_number, plus_two, twice_one, half_of_it_is_left,
                                   not_zero_elsewhere, another_gate])
def test_other_gates_stay(build):
    before, after, _ = folded(build)
    assert nodes_of(after) == nodes_of(before)
    assert_same(before, after, randn(3, 5), randn(3, 5, seed=1) > 0)


def test_a_condition_that_broadcasts_stays():
    before, after, _ = folded(gate, {"logits": ("batch", "slots"), "filled": ("batch", 1)})
    assert nodes_of(after) == nodes_of(before)
