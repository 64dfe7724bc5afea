"""A merge whose gate is made of ones writes rows; any other stays."""

import pytest
import torch
from modcompile.passes.overwrite_rows import OverwriteRows
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten

# B batch  S rows  K capacity  D model dim
aten, mod = torch.ops.aten, torch.ops.modcompile
MERGE = "modcompile.merge_rows.default"


def overwritten(gate_of, batch="batch"):
    inputs = {"x": (batch, "rows", 8), "y": (batch, "slots", 8), "positions": (batch, "slots"),
              "gate": (batch, "slots")}

    def build(call, x, y, positions, gate):
        return call(mod.merge_rows.default, x, y, positions, gate_of(call, gate, positions))

    return rewritten(OverwriteRows(), lambda: graph_of(inputs, build, dtypes={"positions": "int64"}))[:2]


def ones(call, gate, positions):
    return call(aten.ones_like.default, positions, dtype=torch.float32)


def ones_in_half(call, gate, positions):
    return call(aten.to.dtype, ones(call, gate, positions), torch.float16)


def test_golden():
    before, after = overwritten(ones)
    check_rewrite("overwrite_rows", before, after)


@pytest.mark.parametrize("batch", ["batch", 3])
@pytest.mark.parametrize("gate_of", [ones, ones_in_half])
def test_numbers(gate_of, batch):
    before, after = overwritten(gate_of, batch)
    assert MERGE not in nodes_of(after)
    for rows, slots in ((1, 1), (63, 1), (63, 5), (63, 63)):
        scores = randn(3, rows, seed=rows)
        positions = scores.topk(slots).indices.sort(1).values
        y = randn(3, slots, 8, seed=1)
        y[0, 0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
        assert_same(before, after, randn(3, rows, 8), y, positions, torch.zeros(3, slots))


def filled(call, gate, positions):
    return call(aten.to.dtype, call(aten.gt.Scalar, gate, 0.0), torch.float32)


@pytest.mark.parametrize("gate_of", [lambda call, gate, positions: gate, filled])
def test_other_gates_stay(gate_of):
    before, after = overwritten(gate_of)
    assert nodes_of(after) == nodes_of(before)
