"""Rotary embedding that is written out becomes one node on half tables, if both halves of the tables are one."""

import operator

import pytest
import torch
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES

from modcompile import program
from modcompile.export.fuse_rotary import FuseRotary

# B batch  H heads  S rows  K capacity  d head dim

aten, mod = torch.ops.aten, torch.ops.modcompile
EAGER = TOLERANCES["eager"][torch.float32]
INPUTS = {"x": (3, 2, 63, 6), "angles": (1, 63, 3)}
ROTARY = "modcompile_export.rotary.default"
END = 9223372036854775807


@pytest.fixture(autouse=True)
def printable(monkeypatch):
    """The printer refuses what a saved graph may not hold; this op is the export's own, and never saved."""
    monkeypatch.setattr(program, "NAMESPACES", (*program.NAMESPACES, "modcompile_export"))


def tables(call, angles, step=lambda call, value: value):
    """Cosines and sines [B or 1, 1, S, d] of angles [B or 1, S, d / 2]."""
    both = step(call, call(aten.cat.default, [angles, angles], -1))
    return [call(aten.unsqueeze.default, call(op, both), 1) for op in (aten.cos.default, aten.sin.default)]


def sliced(call, x):
    return call(aten.slice.Tensor, x, 3, 0, 3), call(aten.slice.Tensor, x, 3, 3, END)


def chunked(call, x):
    parts = call(aten.chunk.default, x, 2, -1)
    return call(operator.getitem, parts, 0), call(operator.getitem, parts, 1)


def split(call, x):
    parts = call(aten.split.Tensor, x, 3, 3)
    return call(operator.getitem, parts, 0), call(operator.getitem, parts, 1)


def turned(call, x, halves=sliced):
    first, second = halves(call, x)
    return call(aten.cat.default, [call(aten.neg.default, second), first], -1)


def rotated(call, x, cos, sin, halves=sliced):
    return call(aten.add.Tensor, call(aten.mul.Tensor, x, cos), call(aten.mul.Tensor, turned(call, x, halves), sin))


def plain(call, x, angles):
    return rotated(call, x, *tables(call, angles))


def fused(build, inputs=INPUTS, positions=False):
    """What a graph calls after the pass, which keeps its numbers."""
    dtypes = {"positions": "int64"} if positions else None
    before, after, _ = rewritten(FuseRotary(), lambda: graph_of(inputs, build, dtypes=dtypes))
    values = [randn(*shape, seed=i) for i, shape in enumerate(inputs.values())]
    if positions:
        values[-1] = torch.randint(0, 63, (3, 5), generator=torch.Generator().manual_seed(1))
    assert_same(before, after, *values, tolerance=EAGER)
    return nodes_of(after)


def test_golden():
    inputs = {"x": ("batch", 2, "rows", 6), "angles": (1, "rows", 3)}
    before, after, _ = rewritten(FuseRotary(), lambda: graph_of(inputs, plain))
    check_rewrite("fuse_rotary", before, after)


@pytest.mark.parametrize("halves", [sliced, chunked, split])
def test_in_every_way_to_take_halves(halves):
    assert ROTARY in fused(lambda call, x, angles: rotated(call, x, *tables(call, angles), halves))


def test_the_op_turns_by_angles():
    x, angles = randn(3, 2, 63, 6), randn(3, 63, 3, seed=1)
    first, second = x.chunk(2, -1)
    # Two halves are a complex number.
    expected = torch.complex(first, second) * torch.exp(1j * angles)[:, None]
    actual = torch.ops.modcompile_export.rotary(x, angles.cos(), angles.sin())
    assert (actual - torch.cat([expected.real, expected.imag], -1)).abs().max() <= 1e-6


STEPS = {
    "scaled": lambda call, value: call(aten.mul.Tensor, value, 0.5),
    "cast": lambda call, value: call(aten.to.dtype, value, torch.float32),
    "negated": lambda call, value: call(aten.neg.default, value),
    "sliced along the rows": lambda call, value: call(aten.slice.Tensor, value, 1, 0, END),
    "swapped and back": lambda call, value: call(aten.transpose.int, call(aten.transpose.int, value, 0, 1), 0, 1),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_case_1_tables_are_traced_to_their_halves(step):
    assert ROTARY in fused(lambda call, x, angles: rotated(call, x, *tables(call, angles, step)))


def test_case_1_gathered_at_positions():
    """As routing leaves them: of each sequence its own rows, from a table of all, or from its own."""
    def looked_up(call, x, angles, positions):
        return rotated(call, x, *tables(call, angles, lambda call, value: call(
            aten.index.Tensor, call(aten.select.int, value, 0, 0), [positions])))

    def gathered(call, x, angles, positions):
        return rotated(call, x, *tables(call, angles, lambda call, value: call(
            mod.gather_rows.default, value, positions)))

    for build, lead in ((looked_up, 1), (gathered, 3)):
        assert ROTARY in fused(build, {"x": (3, 2, 5, 6), "angles": (lead, 63, 3), "positions": (3, 5)}, positions=True)


def test_case_2_a_table_for_all_sequences_is_expanded_once():
    def build(call, x, angles):
        cos, sin = tables(call, angles)
        return rotated(call, x, cos, sin), rotated(call, call(aten.relu.default, x), cos, sin)

    nodes = fused(build)
    assert nodes.count(ROTARY) == 2 and nodes.count("aten.expand.default") == 2


def test_a_table_of_each_sequence_is_not_expanded():
    nodes = fused(plain, {**INPUTS, "angles": (3, 63, 3)})
    assert ROTARY in nodes and "aten.expand.default" not in nodes


# What stays


def halves_that_differ(call, x, angles):
    other = call(aten.mul.Tensor, angles, 2.0)
    both = call(aten.cat.default, [angles, other], -1)
    return rotated(call, x, *(call(aten.unsqueeze.default, call(op, both), 1) for op in (aten.cos.default,
                                                                                          aten.sin.default)))


def tables_that_are_given(call, x, angles):
    wide = call(aten.unsqueeze.default, angles, 1)
    wide = call(aten.expand.default, call(aten.slice.Tensor, wide, 3, 0, 1), [-1, -1, -1, 6])
    return rotated(call, x, wide, wide)


def scaled_by_a_value(call, x, angles):
    def step(call, value):
        return call(aten.mul.Tensor, value, call(aten.cat.default, [angles, call(aten.neg.default, angles)], -1))

    return rotated(call, x, *tables(call, angles, step))


def along_the_last_dim(call, x, angles):
    return rotated(call, x, *tables(call, angles, lambda call, value: call(
        aten.cat.default, [call(aten.slice.Tensor, value, -1, 1, END), call(aten.slice.Tensor, value, -1, 0, 1)], -1)))


def not_negated(call, x, angles):
    cos, sin = tables(call, angles)
    first, second = sliced(call, x)
    other = call(aten.cat.default, [second, first], -1)
    return call(aten.add.Tensor, call(aten.mul.Tensor, x, cos), call(aten.mul.Tensor, other, sin))


def the_wrong_half(call, x, angles):
    return rotated(call, x, *tables(call, angles), halves=lambda call, x: sliced(call, x)[::-1])


def of_another_value(call, x, angles):
    cos, sin = tables(call, angles)
    other = turned(call, call(aten.relu.default, x))
    return call(aten.add.Tensor, call(aten.mul.Tensor, x, cos), call(aten.mul.Tensor, other, sin))


def uneven_parts(call, x, angles):
    return rotated(call, x, *tables(call, angles), halves=lambda call, x: (
        call(aten.slice.Tensor, x, 3, 0, 2), call(aten.slice.Tensor, x, 3, 2, END)))


@pytest.mark.parametrize("build", [halves_that_differ, tables_that_are_given, scaled_by_a_value, along_the_last_dim,
                                   not_negated, the_wrong_half, of_another_value, uneven_parts])
def test_what_only_looks_like_it_stays(build):
    assert ROTARY not in fused(build)


def test_a_table_for_each_head_stays():
    def build(call, x, angles):
        both = call(aten.cat.default, [angles, angles], -1)
        return rotated(call, x, call(aten.cos.default, both), call(aten.sin.default, both))

    nodes = fused(build, {**INPUTS, "angles": (1, 2, 63, 3)})
    assert ROTARY not in nodes


def test_three_dims_stay():
    def build(call, x, angles):
        both = call(aten.cat.default, [angles, angles], -1)
        parts = call(aten.slice.Tensor, x, 2, 0, 3), call(aten.slice.Tensor, x, 2, 3, END)
        other = call(aten.cat.default, [call(aten.neg.default, parts[1]), parts[0]], -1)
        return call(aten.add.Tensor, call(aten.mul.Tensor, x, call(aten.cos.default, both)),
                    call(aten.mul.Tensor, other, call(aten.sin.default, both)))

    assert ROTARY not in fused(build, {"x": (3, 63, 6), "angles": (1, 63, 3)})
