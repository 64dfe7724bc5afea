"""Norms of merged rows are taken before the merge, where that gives the same numbers."""

import pytest
import torch
from modcompile.passes.norm_before_merge import NormBeforeMerge
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES

# B batch  S rows  K capacity  D model dim
aten, mod = torch.ops.aten, torch.ops.modcompile
MERGE, NORM, RMS = "modcompile.merge_rows.default", "aten.layer_norm.default", "aten.rms_norm.default"
ROWS, WIDTH = 63, 8
TENSORS = {"scale": torch.linspace(0.5, 2, WIDTH), "shift": torch.linspace(-1, 1, WIDTH)}


def moved(build, capacity=5, rows=ROWS):
    inputs = {"x": (2, rows, WIDTH), "y": (2, capacity, WIDTH), "positions": (2, capacity), "gate": (2, capacity)}

    def make():
        return graph_of(inputs, build, tensors=TENSORS, dtypes={"positions": "int64"})

    return rewritten(NormBeforeMerge(), make)[:2]


def given(capacity=5):
    positions = torch.stack([torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:capacity]
                             for seed in (0, 1)]).sort(1).values
    return randn(2, ROWS, WIDTH), randn(2, capacity, WIDTH, seed=1), positions, randn(2, capacity, seed=2)


def ones(call, gate, positions):
    return call(aten.ones_like.default, positions, dtype=torch.float32)


def filled(call, gate, positions):
    return call(aten.to.dtype, call(aten.gt.Scalar, gate, 0.0), torch.float32)


def in_half_and_back(call, gate, positions):
    return call(aten.to.dtype, call(aten.to.dtype, filled(call, gate, positions), torch.float16), torch.float32)


def layer_norm(call, merged):
    # As a graph does, the parameters are read where they are used.
    return call(aten.layer_norm.default, merged, [WIDTH], call.tensor("scale"), call.tensor("shift"), 1e-5)


def rms_norm(call, merged):
    return call(aten.rms_norm.default, merged, [WIDTH], call.tensor("scale"), 1e-6)


def block(gate_of, norm, keep=True):
    def build(call, x, y, positions, gate):
        merged = call(mod.merge_rows.default, x, y, positions, gate_of(call, gate, positions))
        return (merged, norm(call, merged)) if keep else norm(call, merged)
    return build


def test_golden():
    before, after = moved(block(ones, layer_norm))
    check_rewrite("norm_before_merge", before, after)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
@pytest.mark.parametrize("gate_of", [ones, filled, in_half_and_back])
@pytest.mark.parametrize("keep", [True, False])
def test_numbers(gate_of, norm, keep):
    before, after = moved(block(gate_of, norm, keep))
    calls = nodes_of(after)
    assert sorted(name for name in calls if name in (NORM, RMS)) == [NORM if norm is layer_norm else RMS] * 2
    # What writes over x in place is the last to read it.
    assert max(calls.index(NORM if norm is layer_norm else RMS), 0) < calls.index(MERGE)
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def test_two_norms_of_one_merge():
    def build(call, x, y, positions, gate):
        merged = call(mod.merge_rows.default, x, y, positions, ones(call, gate, positions))
        return merged, layer_norm(call, merged), rms_norm(call, merged)

    before, after = moved(build)
    assert nodes_of(after).count(MERGE) == 3
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def test_parameters_that_were_used_before():
    def build(call, x, y, positions, gate):
        scale = call.tensor("scale")
        early = call(aten.rms_norm.default, y, [WIDTH], scale, 1e-6)
        merged = call(mod.merge_rows.default, x, early, positions, ones(call, gate, positions))
        return call(aten.rms_norm.default, merged, [WIDTH], scale, 1e-6)

    before, after = moved(build)
    assert nodes_of(after).count(RMS) == 3
    assert_same(before, after, *given(), tolerance=TOLERANCES["eager"][torch.float32])


def any_number(call, gate, positions):
    return gate


def sigmoid(call, gate, positions):
    return call(aten.sigmoid.default, gate)


@pytest.mark.parametrize("gate_of", [any_number, sigmoid])
def test_a_mix_of_rows_stays(gate_of):
    before, after = moved(block(gate_of, layer_norm))
    assert nodes_of(after) == nodes_of(before)


@pytest.mark.parametrize(("capacity", "rows"), [(32, 63), ("capacity", 63), (5, "rows")])
def test_most_rows_or_an_unknown_number_stay(capacity, rows):
    before, after = moved(block(ones, layer_norm), capacity, rows)
    assert nodes_of(after) == nodes_of(before)


def test_a_norm_of_more_dims_stays():
    def norm(call, merged):
        return call(aten.layer_norm.default, merged, [ROWS, WIDTH])

    before, after = moved(block(ones, norm))
    assert nodes_of(after) == nodes_of(before)


def test_a_computed_weight_stays():
    def norm(call, merged):
        scale = call(aten.mul.Tensor, call.tensor("scale"), 2)
        return call(aten.rms_norm.default, merged, [WIDTH], scale, 1e-6)

    before, after = moved(block(ones, norm))
    assert nodes_of(after) == nodes_of(before)
