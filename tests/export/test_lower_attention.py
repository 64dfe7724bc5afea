"""The operands of attention as an ONNX operator takes them: heads once, masks added, finite and shared."""

import pytest
import torch
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten, run_graph
from tolerances import TOLERANCES, deviation

from modcompile.export.lower_attention import LowerAttention

# B batch  H heads  G key and value heads  S rows  d head dim

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
EAGER = TOLERANCES["eager"][torch.float32]
LOW = torch.finfo(torch.float32).min / 2
QUERY, GROUPS = (3, 4, 63, 6), (3, 2, 63, 6)


def attend(call, query, key, value, mask=None, **options):
    return call(SDPA, query, key, value, mask, **options)


def lowered(build, inputs, stage=None, dtypes=None):
    """The graph after the pass, which keeps its numbers."""
    stage = stage or LowerAttention()
    before, after, _ = rewritten(stage, lambda: graph_of(inputs, build, dtypes=dtypes))
    values = [randn(*shape, seed=i) for i, shape in enumerate(inputs.values())]
    # Every row may look at the first key.
    values = [(value > 0).index_fill(-1, torch.tensor([0]), True) if name in (dtypes or {}) else value
              for name, value in zip(inputs, values, strict=True)]
    assert_same(before, after, *values, tolerance=EAGER)
    return after


def attentions(graph_module):
    return graph_module.graph.find_nodes(op="call_function", target=SDPA)


def mask_of(graph_module):
    """The graph that gives the first attention's mask."""
    graph = torch.fx.Graph()
    values = {}
    for node in graph_module.graph.nodes:
        if node.target is SDPA:
            graph.output((values[node.args[3]],))
            return torch.fx.GraphModule({}, graph)
        values[node] = graph.node_copy(node, values.__getitem__)


def with_mask(shape):
    return {"query": QUERY, "key": QUERY, "value": QUERY, "mask": shape}


# Case 1


def expanded(call, value):
    """[B, G, S, d] -> [B, H, S, d], as decoders write it."""
    batch, rows = (call(aten.sym_size.int, value, dim) for dim in (0, 2))
    wide = call(aten.expand.default, call(aten.unsqueeze.default, value, 2), [batch, 2, 2, rows, 6])
    return wide, [batch, 4, rows, 6]


def repeated_by_reshape(call, value):
    wide, shape = expanded(call, value)
    return call(aten.reshape.default, wide, shape)


def repeated_by_clone(call, value):
    wide, shape = expanded(call, value)
    return call(aten.reshape.default, call(aten.clone.default, wide), shape)


def repeated_by_name(call, value):
    return call(aten.repeat_interleave.self_int, value, 2, 1)


def grouped(repeat):
    return lambda call, query, key, value: attend(call, query, repeat(call, key), repeat(call, value), scale=0.25)


@pytest.mark.parametrize("repeat", [repeated_by_reshape, repeated_by_clone, repeated_by_name])
def test_case_1_repeated_heads_are_passed_once(repeat):
    after = lowered(grouped(repeat), {"query": QUERY, "key": GROUPS, "value": GROUPS})
    (node,) = attentions(after)
    assert [arg.name for arg in node.args[:3]] == ["query", "key", "value"]
    assert node.kwargs == {"scale": 0.25, "enable_gqa": True}
    assert nodes_of(after) == [str(SDPA)]


def test_case_1_one_head_for_all():
    def repeat(call, value):
        batch, rows = (call(aten.sym_size.int, value, dim) for dim in (0, 2))
        return call(aten.expand.default, value, [batch, 4, rows, 6])

    one = (3, 1, 63, 6)
    after = lowered(grouped(repeat), {"query": QUERY, "key": one, "value": one})
    assert nodes_of(after) == [str(SDPA)] and attentions(after)[0].kwargs["enable_gqa"]


def tiled(call, value):
    """All heads, then all heads again: not how groups repeat."""
    batch, rows = (call(aten.sym_size.int, value, dim) for dim in (0, 2))
    wide = call(aten.expand.default, call(aten.unsqueeze.default, value, 1), [batch, 2, 2, rows, 6])
    return call(aten.reshape.default, wide, [batch, 4, rows, 6])


@pytest.mark.parametrize("repeat", [tiled, lambda call, value: call(aten.repeat.default, value, [1, 2, 1, 1])])
def test_other_repetitions_stay(repeat):
    after = lowered(grouped(repeat), {"query": QUERY, "key": GROUPS, "value": GROUPS})
    assert attentions(after)[0].kwargs == {"scale": 0.25}
    assert attentions(after)[0].args[1].name not in ("key", "value")


def test_keys_that_are_repeated_alone_stay():
    after = lowered(lambda call, query, key, value: attend(call, query, repeated_by_name(call, key), value),
                    {"query": QUERY, "key": GROUPS, "value": QUERY})
    assert "enable_gqa" not in attentions(after)[0].kwargs
    assert "aten.repeat_interleave.self_int" in nodes_of(after)


def test_three_dims_are_left_alone():
    flat = (3, 63, 6)
    after = lowered(attend, {"query": flat, "key": flat, "value": flat})
    assert nodes_of(after) == [str(SDPA)]


# Case 2


def two_attentions(call, query, key, value, mask):
    return attend(call, attend(call, query, key, value, mask), key, value, mask)


def test_golden():
    heads = ("batch", 4, "rows", 6)
    inputs = {"query": heads, "key": heads, "value": heads, "mask": ("batch", 1, 1, "rows")}
    before, after, _ = rewritten(LowerAttention(expand_rows=True), lambda: graph_of(
        inputs, two_attentions, dtypes={"mask": "bool"}))
    check_rewrite("lower_attention", before, after)


@pytest.mark.parametrize("shape", [(3, 1, 1, 63), (3, 1, 63, 63), (63, 63)])
def test_case_2_a_mask_of_bools_is_added_once_for_all(shape):
    after = lowered(two_attentions, with_mask(shape), dtypes={"mask": "bool"})
    first, second = attentions(after)
    assert first.args[3] is second.args[3] and first.args[3].meta["val"].dtype == torch.float32
    assert nodes_of(after).count("aten.where.Scalar") == 1


@pytest.mark.parametrize("expand_rows", [False, True])
def test_case_2_a_mask_that_is_added_is_clamped_once_for_all(expand_rows):
    after = lowered(two_attentions, with_mask((3, 1, 1, 63)), LowerAttention(expand_rows))
    first, second = attentions(after)
    assert first.args[3] is second.args[3] and first.args[3].target is aten.clamp.default
    assert nodes_of(after).count("aten.clamp.default") == 1


@pytest.mark.parametrize(("dtype", "low"), [
    ("bool", None), ("float32", torch.finfo(torch.float32).min), ("float32", float("-inf"))])
def test_case_2_a_row_that_may_attend_to_nothing_averages(dtype, low):
    _, after, _ = rewritten(LowerAttention(), lambda: graph_of(
        with_mask((3, 1, 63, 63)), attend, dtypes={"mask": dtype}))
    query, key, value = (randn(3, 4, 63, 6, seed=i) for i in range(3))
    keep = randn(3, 1, 63, 63, seed=3) > 0
    keep[:, :, 5] = False
    mask = keep if dtype == "bool" else torch.zeros(keep.shape).masked_fill(~keep, low)
    (actual,) = run_graph(after, query, key, value, mask)
    assert run_graph(mask_of(after), query, key, value, mask)[0].min() == LOW
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, keep)
    expected[:, :, 5] = value.mean(2)
    assert deviation(actual, expected) <= EAGER


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_case_2_a_mask_that_was_cast_was_clamped_then(dtype):
    inputs = with_mask((3, 1, 63, 63))
    _, after, _ = rewritten(LowerAttention(), lambda: graph_of(inputs, attend, dtypes=dict.fromkeys(inputs, dtype)))
    assert nodes_of(after) == [str(SDPA)]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_case_2_the_fill_is_finite_in_the_dtype_of_the_query(dtype):
    inputs = with_mask((3, 1, 63, 63))
    _, after, _ = rewritten(LowerAttention(), lambda: graph_of(
        inputs, attend, dtypes={**dict.fromkeys(inputs, dtype), "mask": "bool"}))
    (node,) = attentions(after)
    assert node.args[3].meta["val"].dtype == getattr(torch, dtype)
    assert node.args[3].args[0].args[2] == torch.finfo(getattr(torch, dtype)).min / 2


# Cases 3 and 4


@pytest.mark.parametrize("dtypes", [{}, {"mask": "bool"}])
@pytest.mark.parametrize(("shape", "rows"), [
    ((3, 1, 1, 63), True), ((1, 1, 1, 63), True), ((3, 1, 63, 63), False),
    ((63, 63), False)])
def test_case_3_a_row_for_each_query(shape, rows, dtypes):
    after = lowered(attend, with_mask(shape), LowerAttention(expand_rows=True), dtypes)
    assert ("aten.expand.default" in nodes_of(after)) == rows
    (node,) = attentions(after)
    assert node.args[3].meta["val"].shape[-2] == node.args[0].meta["val"].shape[-2]


def test_case_3_one_query_needs_one_row():
    inputs = {"query": (3, 4, 1, 6), "key": QUERY, "value": QUERY, "mask": (3, 1, 1, 63)}
    after = lowered(attend, inputs, LowerAttention(expand_rows=True), {"mask": "bool"})
    assert "aten.expand.default" not in nodes_of(after)


def causal(call, query, key, value):
    return attend(call, attend(call, query, key, value, None, is_causal=True), key, value, None, is_causal=True)


def test_case_4_a_causal_flag_becomes_a_mask_where_there_is_no_flag():
    inputs = {"query": QUERY, "key": QUERY, "value": QUERY}
    after = lowered(causal, inputs, LowerAttention(causal_masks=True))
    first, second = attentions(after)
    assert first.args[3] is second.args[3] and first.args[5] is second.args[5] is False
    assert nodes_of(after).count("aten.ge.Tensor") == 1
    (kept, _) = attentions(lowered(causal, inputs))
    assert kept.args[3] is None and kept.kwargs["is_causal"]


def test_case_4_three_dims_have_no_flag_either():
    flat = (3, 63, 6)
    after = lowered(causal, {"query": flat, "key": flat, "value": flat})
    assert all(node.args[3] is not None and not node.args[5] for node in attentions(after))


def test_dropout_is_trainings():
    def build(call, query, key, value, mask):
        return call(SDPA, query, key, value, mask, dropout_p=0.5, is_causal=False)

    _, after, _ = rewritten(LowerAttention(), lambda: graph_of(with_mask((63, 63)), build))
    (node,) = attentions(after)
    assert node.args[4:] == (0.0, False) and not node.kwargs
