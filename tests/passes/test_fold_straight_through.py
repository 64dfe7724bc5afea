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


def without_padding(call, logits, positions):
    share = call(aten.sigmoid.default, call(aten.gather.default, logits, 1, positions))
    return call(aten.add.Tensor, call(aten.sub.Tensor, share, call(aten.detach.default, share)), 1)


def test_golden_without_padding():
    inputs = {"logits": ("batch", "rows"), "positions": ("batch", "slots")}
    before, after, _ = rewritten(FoldStraightThrough(), lambda: graph_of(inputs, without_padding,
                                                                         dtypes={"positions": "int64"}))
    check_rewrite("fold_straight_through_without_padding", before, after)
    assert_same(before, after, randn(3, 63), torch.tensor([[0, 5, 62]] * 3))


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


def of_no_share(call, logits, filled):
    zero = call(aten.sub.Tensor, logits, call(aten.detach.default, logits))
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, zero, 1), 0.0)


def of_a_number(call, logits, filled):
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, call(aten.sub.Tensor, logits, 1), 1), 0.0)


def plus_two(call, logits, filled):
    share = call(aten.sigmoid.default, logits)
    zero = call(aten.sub.Tensor, share, call(aten.detach.default, share))
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, zero, 2), 0.0)


def twice_one(call, logits, filled):
    share = call(aten.sigmoid.default, logits)
    zero = call(aten.sub.Tensor, share, call(aten.detach.default, share))
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, zero, 1, alpha=2), 0.0)


def half_of_it_is_left(call, logits, filled):
    share = call(aten.sigmoid.default, logits)
    left = call(aten.sub.Tensor, share, call(aten.detach.default, share), alpha=0.5)
    return call(aten.where.ScalarOther, filled, call(aten.add.Tensor, left, 1), 0.0)


def another_gate(call, logits, filled):
    return call(aten.where.ScalarOther, filled, call(aten.sigmoid.default, logits), 0.0)


@pytest.mark.parametrize("build", [of_another_value, of_no_share, of_a_number, plus_two, twice_one,
                                   half_of_it_is_left, another_gate])
def test_other_gates_stay(build):
    before, after, _ = folded(build)
    assert nodes_of(after) == nodes_of(before)
    assert_same(before, after, randn(3, 5), randn(3, 5, seed=1) > 0)


@pytest.mark.parametrize("otherwise, slots", [(0.5, "slots"), (0.0, 1)], ids=["another value", "a broadcast"])
def test_what_is_no_mask_of_the_gate_stays(otherwise, slots):
    def build(call, logits, filled):
        return call(aten.where.ScalarOther, filled, gate(call, logits, filled).args[1], otherwise)

    before, after, _ = folded(build, {"logits": ("batch", "slots"), "filled": ("batch", slots)})
    assert "aten.where.ScalarOther" in nodes_of(after) and "aten.sigmoid.default" not in nodes_of(after)
    assert_same(before, after, randn(3, 5), randn(3, 5 if slots == "slots" else 1) > 0)
