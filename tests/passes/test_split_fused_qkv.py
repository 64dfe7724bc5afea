"""A projection of queries, keys and values at once becomes three, each on a slice of the weight."""

import operator

import pytest
import torch
from modcompile.passes.split_fused_qkv import SplitFusedQkv
from tiny import Block, Stack, assert_same, check_rewrite, nodes_of, outlined, randn, rewritten, sub_graph_of
from tolerances import TOLERANCES, deviation

from modcompile.errors import PassContractError
from modcompile.pass_manager import PassManager

# B batch  R rows  H heads  D model dim  d head dim

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
EAGER = TOLERANCES["eager"][torch.float32]
HIDDEN = {"hidden": ("batch", "rows", 8)}
WEIGHTS = {"weight": torch.nn.Parameter(randn(24, 8) * 8**-0.5), "bias": torch.nn.Parameter(randn(24, seed=1)),
           "transposed": torch.nn.Parameter(randn(8, 24) * 8**-0.5), "out": torch.nn.Parameter(randn(8, 8, seed=2))}


def split(build):
    before, after, skips = rewritten(SplitFusedQkv(("block",)), lambda: sub_graph_of(HIDDEN, build, WEIGHTS))
    assert_same(before, after, randn(3, 63, 8), tolerance=EAGER)
    return before, after, skips


def widths(graph_module):
    """The number of features that each product with a parameter gives."""
    products = (aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default)
    return [int(node.meta["val"].shape[-1]) for node in graph_module.get_submodule("block").graph.nodes
            if node.target in products]


def sizes_of(call, hidden):
    return [call(aten.sym_size.int, hidden, dim) for dim in (0, 1)]


def heads(call, hidden, parts):
    """[B, R, H * d] -> [B, H, R, d] each"""
    sizes = sizes_of(call, hidden)
    return [call(aten.transpose.int, call(aten.reshape.default, part, [*sizes, 2, 4]), 1, 2) for part in parts]


def attended(call, hidden, parts):
    """Attention of heads [B, H, R, d], beside the residual stream."""
    mixed = call(aten.transpose.int, call(SDPA, *parts, None, 0.0, True), 1, 2)
    return call(aten.add.Tensor, hidden, call(aten.reshape.default, mixed, [*sizes_of(call, hidden), 8]))


def linear(call, hidden):
    return call(aten.linear.default, hidden, call.tensor("weight"), call.tensor("bias"))


def addmm(call, hidden):
    flat = call(aten.reshape.default, hidden, [-1, 8])
    product = call(aten.addmm.default, call.tensor("bias"), flat, call.tensor("transposed"))
    return call(aten.reshape.default, product, [*sizes_of(call, hidden), 24])


def mm(call, hidden):
    flat = call(aten.mm.default, call(aten.reshape.default, hidden, [-1, 8]), call.tensor("transposed"))
    return call(aten.reshape.default, flat, [*sizes_of(call, hidden), 24])


def matmul(call, hidden):
    return call(aten.matmul.default, hidden, call.tensor("transposed"))


def unpacked(call, parts):
    return [call(operator.getitem, parts, i) for i in range(3)]


def chunks(call, fused):
    return unpacked(call, call(aten.chunk.default, fused, 3, 2))


def chunked(call, hidden, project=linear):
    return attended(call, hidden, heads(call, hidden, chunks(call, project(call, hidden))))


def test_golden():
    before, after, _ = split(chunked)
    check_rewrite("split_fused_qkv", before, after)


@pytest.mark.parametrize("project", [linear, addmm, mm, matmul])
def test_case_1_in_every_kind_of_product(project):
    before, after, skips = split(lambda call, hidden: chunked(call, hidden, project))
    assert not skips and widths(before) == [24] and widths(after) == [8, 8, 8]


@pytest.mark.parametrize("take", [
    lambda call, fused: unpacked(call, call(aten.split.Tensor, fused, 8, 2)),
    lambda call, fused: unpacked(call, call(aten.split_with_sizes.default, fused, [8, 8, 8], -1)),
    lambda call, fused: [call(aten.slice.Tensor, fused, 2, 8 * i, 8 * i + 8) for i in range(3)],
    # Seen anew for each part.
    lambda call, fused: [call(aten.select.int, call(aten.unflatten.int, fused, 2, [3, 8]), 2, i) for i in range(3)],
    lambda call, fused: unpacked(call, call(aten.unbind.int, call(
        aten.permute.default, call(aten.unflatten.int, fused, 2, [3, 8]), [2, 0, 1, 3]))),
])
def test_case_1_in_every_way_to_take_it_apart(take):
    _, after, skips = split(lambda call, hidden: attended(
        call, hidden, heads(call, hidden, take(call, linear(call, hidden)))))
    assert not skips and widths(after) == [8, 8, 8]


def test_case_1_heads_in_front():
    """All heads of all parts are made first: [3, B, H, R, d]."""
    def build(call, hidden):
        fused = call(aten.reshape.default, linear(call, hidden), [*sizes_of(call, hidden), 3, 2, 4])
        fused = call(aten.permute.default, fused, [2, 0, 3, 1, 4])
        return attended(call, hidden, [call(aten.select.int, fused, 0, i) for i in range(3)])

    _, after, skips = split(build)
    assert not skips and widths(after) == [8, 8, 8]


@pytest.mark.parametrize("project", [linear, addmm, matmul])
def test_case_2_interleaved_per_head(project):
    """Each head has its query, key and value side by side: H times [3, d]."""
    def build(call, hidden):
        fused = call(aten.unflatten.int, project(call, hidden), 2, [2, 12])  # [B, R, H, 3 * d]
        parts = unpacked(call, call(aten.chunk.default, fused, 3, -1))
        return attended(call, hidden, [call(aten.transpose.int, part, 1, 2) for part in parts])

    before, after, skips = split(build)
    assert not skips and widths(before) == [24] and widths(after) == [8, 8, 8]


def test_case_2_groups_of_queries_beside_a_key_and_a_value():
    """Of six heads of features, each half has two queries, a key and a value of one, in a layout of its own."""
    def build(call, hidden):
        fused = call(aten.unflatten.int, linear(call, hidden), 2, [2, 4, 3])  # [B, R, G, 2 + 1 + 1, d]
        query = call(aten.flatten.using_ints, call(aten.slice.Tensor, fused, 3, 0, 2), 2, 3)
        key, value = (call(aten.select.int, fused, 3, i) for i in (2, 3))
        query, key, value = (call(aten.transpose.int, part, 1, 2) for part in (query, key, value))
        mixed = call(aten.transpose.int, call(SDPA, query, key, value, enable_gqa=True), 1, 2)
        return call(aten.flatten.using_ints, mixed, 2, 3)

    _, after, skips = split(build)
    assert not skips and widths(after) == [12, 6, 6]


def test_a_norm_of_queries_and_keys_comes_after():
    def build(call, hidden):
        query, key, value = heads(call, hidden, chunks(call, linear(call, hidden)))
        query, key = (call(aten.layer_norm.default, part, [4]) for part in (query, key))
        return attended(call, hidden, [query, key, value])

    _, after, skips = split(build)
    assert not skips and widths(after) == [8, 8, 8]


def test_what_comes_before_the_projection_stays_whole():
    def build(call, hidden):
        return chunked(call, call(aten.relu.default, call(aten.linear.default, hidden, call.tensor("out"))))

    _, after, skips = split(build)
    assert not skips and widths(after) == [8, 8, 8, 8]


# What stays


def test_three_projections_are_no_fused_one():
    def build(call, hidden):
        parts = [call(aten.linear.default, hidden, call.tensor("out")) for _ in range(3)]
        return attended(call, hidden, heads(call, hidden, parts))

    before, after, skips = split(build)
    assert nodes_of(after.get_submodule("block")) == nodes_of(before.get_submodule("block")) and not skips


def test_a_block_without_attention():
    before, after, skips = split(linear)
    assert nodes_of(after.get_submodule("block")) == nodes_of(before.get_submodule("block")) and not skips


def shuffled(call, hidden):
    """Every third feature is the query's: no run of the weight."""
    fused = call(aten.unflatten.int, linear(call, hidden), 2, [8, 3])
    parts = [call(aten.select.int, call(aten.flip.default, fused, [2]), 3, i) for i in range(3)]
    return attended(call, hidden, heads(call, hidden, parts))


def same_for_all(call, hidden):
    """One value is query, key and value."""
    (part,) = heads(call, hidden, [call(aten.slice.Tensor, linear(call, hidden), 2, 0, 8)])
    return attended(call, hidden, [part] * 3)


def merged_rows(call, hidden):
    """Batch, rows and heads in one dim where the parts are taken."""
    fused = call(aten.reshape.default, linear(call, hidden), [-1, 3, 4])
    parts = [call(aten.reshape.default, call(aten.select.int, fused, 1, i), [*sizes_of(call, hidden), 2, 4])
             for i in range(3)]
    return attended(call, hidden, [call(aten.transpose.int, part, 1, 2) for part in parts])


@pytest.mark.parametrize(("build", "reason"), [
    (shuffled, "block: its parts are no slices of the weight"),
    (same_for_all, "block: its parts are no slices of the weight"),
    (merged_rows, "block: select_int merges the batch or the rows with features"),
])
def test_what_cannot_be_split_says_why(build, reason):
    before, after, skips = split(build)
    assert skips == [reason]
    assert nodes_of(after.get_submodule("block")) == nodes_of(before.get_submodule("block"))


def test_a_block_that_is_not_outlined():
    with pytest.raises(PassContractError, match="blocks are not outlined"):
        PassManager([SplitFusedQkv(("other",))])(sub_graph_of(HIDDEN, linear, WEIGHTS))


def test_in_a_model_the_parameter_stays_whole():
    model = Stack(Block(causal=True, fused=True), Block(fused=True))
    graph = outlined(model, (randn(2, 5, 8),), ["layers.0", "layers.1"], SplitFusedQkv(("layers.0", "layers.1")))
    assert [name for name, _ in graph.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert graph.get_parameter("layers.0.attention.qkv.weight").shape == (24, 8)
    x = randn(3, 63, 8)
    with torch.no_grad():
        assert deviation(graph(x), model(x)) <= EAGER
