"""Where nothing is padding, gates are not masked; where something may be, they are."""

import operator

import pytest
import torch
from modcompile.passes.fold_filled import FoldFilled
from modcompile.passes.route_blocks import RouteBlocks
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten, sub_graph_of

from modcompile.pass_manager import PassManager
from modcompile.routers import Router

aten, mod = torch.ops.aten, torch.ops.modcompile
WHERE = "aten.where.ScalarOther"


def routed(call, logits, valid):
    chosen = call(mod.route.default, logits, valid, 5)
    positions, filled = (call(operator.getitem, chosen, i) for i in range(2))
    return filled, call(aten.gather.default, logits, 1, positions)


def without_padding(call, logits):
    filled, gate = routed(call, logits, None)
    return call(aten.where.ScalarOther, filled, gate, 0.0)


def folded(build, inputs, **dtypes):
    return rewritten(FoldFilled(), lambda: graph_of(inputs, build, dtypes=dtypes))


def test_golden():
    before, after, _ = folded(without_padding, {"logits": ("batch", "rows")})
    check_rewrite("fold_filled", before, after)
    assert_same(before, after, randn(3, 63))


def test_the_gate_of_a_routed_block():
    def make():
        graph_module = sub_graph_of({"hidden": ("batch", "rows", 8)}, lambda call, x: call(aten.relu.default, x))
        graph_module.add_submodule("router.block", Router(8))
        return PassManager([RouteBlocks(("block",), ("5/63",), "raw")])(graph_module)

    before, after, _ = rewritten(FoldFilled(), make)
    assert WHERE in nodes_of(before) and WHERE not in nodes_of(after)
    assert_same(before, after, randn(3, 63, 8))


def test_with_a_mask_gates_stay():
    def build(call, logits, valid):
        filled, gate = routed(call, logits, valid)
        return call(aten.where.ScalarOther, filled, gate, 0.0)

    before, after, _ = folded(build, {"logits": ("batch", "rows"), "valid": ("batch", "rows")}, valid="bool")
    assert nodes_of(after) == nodes_of(before)
    assert_same(before, after, randn(3, 63), randn(3, 63, seed=1) > 1.5)


@pytest.mark.parametrize("wide", [False, True], ids=["another use", "a broadcast"])
def test_what_else_uses_the_mask_stays(wide):
    def build(call, logits):
        filled, gate = routed(call, logits, None)
        if wide:
            gate = call(aten.unsqueeze.default, call(aten.select.int, gate, 1, 0), 1)
        return call(aten.where.ScalarOther, filled, gate, 0.0), filled

    before, after, _ = folded(build, {"logits": ("batch", "rows")})
    assert (WHERE in nodes_of(after)) == wide
    assert nodes_of(after).count(str(operator.getitem)) == 2
    assert_same(before, after, randn(3, 63))
