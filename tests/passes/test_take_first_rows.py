"""The oracle takes the first K rows, or sequences, wherever the routed model would choose some."""

import pytest
import torch
from modcompile.passes.take_first_rows import TakeFirstRows
from tiny import Attention, Stack, check_rewrite, nodes_of, outlined, randn, rewritten, run_graph, sub_graph_of
from tolerances import EXACT, TOLERANCES, deviation

from modcompile.errors import PassContractError
from modcompile.pass_manager import PassManager
from modcompile.shapes import fake_inputs, propagate
from modcompile.spec import TensorSpec

# B batch  S rows  K capacity  D model dim

aten, mod = torch.ops.aten, torch.ops.modcompile
EAGER = TOLERANCES["eager"][torch.float32]
INPUTS = {"hidden": ("batch", "rows", 8), "weights": ("batch", 1, "rows", "rows"), "table": (1, "rows", 8)}


def mix(call, hidden, weights, table):
    """Rows that see each other through weights, and have a place each: all kinds of side inputs."""
    mixed = call(aten.bmm.default, call(aten.squeeze.dim, weights, 1), hidden)  # [B, R, D]
    return call(aten.add.Tensor, call(aten.add.Tensor, hidden, mixed), table)


def taken(ratio, rows=None, **options):
    """The graph before and after, with a number of rows that varies, or is fixed outside of the block."""
    def make():
        graph_module = sub_graph_of(INPUTS, mix)
        if rows is not None:
            propagate(graph_module, fake_inputs([
                TensorSpec(name, "float32", tuple(rows if size == "rows" else size for size in shape))
                for name, shape in INPUTS.items()]))
        return graph_module

    return rewritten(TakeFirstRows(("block",), (ratio,), **options), make)[:2]


def arguments(batch=3, rows=63):
    return randn(batch, rows, 8), randn(batch, 1, rows, rows, seed=1) / rows, randn(1, rows, 8, seed=2)


def test_golden():
    before, after = taken("5/63")
    check_rewrite("take_first_rows", before, after)


@pytest.mark.parametrize(("ratio", "multiple", "count", "rows"), [
    ("5/63", 1, 5, None), ("5/63", 8, 8, None), ("62/63", 64, 63, None), ("5/63", 1, 5, 63), ("5/63", 8, 8, 63)])
def test_the_first_rows_of_each_sequence(ratio, multiple, count, rows):
    before, after = taken(ratio, rows, multiple=multiple)
    hidden, weights, table = arguments()
    (expected,) = run_graph(before, hidden[:, :count], weights[:, :, :count, :count], table[:, :count])
    (actual,) = run_graph(after, hidden, weights, table)
    assert torch.equal(actual[:, :count], expected) and torch.equal(actual[:, count:], hidden[:, count:])


def test_the_first_sequences():
    before, after = taken("2/7", axis="sequence")
    hidden, weights, table = arguments(batch=7)
    (expected,) = run_graph(before, hidden[:2], weights[:2], table)
    (actual,) = run_graph(after, hidden, weights, table)
    assert torch.equal(actual[:2], expected) and torch.equal(actual[2:], hidden[2:])


def test_a_block_that_gathers_inside_is_told_the_first_positions():
    def make():
        inputs = {"hidden": ("batch", "rows", 8), "positions": ("batch", "capacity"), "table": (1, "rows", 8)}
        graph_module = sub_graph_of(inputs, lambda call, hidden, positions, table: call(
            mod.gather_rows.default, call(aten.add.Tensor, hidden, table), positions), dtypes={"positions": "int64"})
        (call,) = graph_module.graph.find_nodes(op="call_module", target="block")
        hidden, positions, table = call.args
        call.args, call.meta["val"] = (hidden, table), hidden.meta["val"]
        graph_module.graph.erase_node(positions)
        return graph_module

    after = PassManager([TakeFirstRows(("block",), ("5/63",))])(make())
    for batch in (3, 1):
        hidden, _, table = arguments(batch)
        (actual,) = run_graph(after, hidden, table)
        assert torch.equal(actual[:, :5], (hidden + table)[:, :5]) and torch.equal(actual[:, 5:], hidden[:, 5:])


def test_at_full_capacity_nothing_changes():
    before, after = taken("1")
    assert nodes_of(after) == nodes_of(before)
    assert deviation(run_graph(after, *arguments())[0], run_graph(before, *arguments())[0]) == EXACT


def test_blocks_in_a_row():
    model = Stack(Attention(), Attention(), Attention())
    stage = TakeFirstRows(("layers.0", "layers.1"), ("5/63", "5/63"))
    given = {"hidden": randn(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    _, after, _ = rewritten(stage, lambda: outlined(model, given, ["layers.0", "layers.1"]).graph_module)
    hidden, mask = randn(3, 63, 8), (randn(3, 63, seed=1) > 0).long()
    mask[:, 0] = 1
    with torch.no_grad():
        expected = hidden.clone()
        for layer in model.layers[:2]:
            expected = torch.cat([layer(expected[:, :5], mask[:, :5]), expected[:, 5:]], 1)
        expected = model.layers[2](expected, mask)
    assert deviation(run_graph(after, hidden, mask)[0], expected) <= EAGER


def test_a_block_that_is_not_outlined():
    with pytest.raises(PassContractError, match="blocks are not outlined") as caught:
        PassManager([TakeFirstRows(("layers.1",), ("1/8",))])(sub_graph_of(INPUTS, mix))
    assert caught.value.details["found"] == "layers.1"
