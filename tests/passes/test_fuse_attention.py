"""Attention that is written out becomes one node, if one node computes the same."""

import pytest
import torch
from modcompile.passes.fuse_attention import FuseAttention
from tiny import Stack, assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES
from torch import nn

from modcompile.capture import capture
from modcompile.export.flatten import flatten

# B batch  H heads  S rows  d head dim

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
HEADS = (3, 2, 63, 4)
INPUTS = {"query": HEADS, "key": HEADS, "value": HEADS}
MASK = {"mask": (3, 1, 63, 63)}


def scores(call, query, key):
    return call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))


def weigh(call, scored, value):
    return call(aten.matmul.default, call(aten.softmax.int, scored, -1), value)


def fused(build, inputs=INPUTS, dtypes=None):
    """What a graph calls after the pass, which keeps its numbers, and the reasons for what it left alone."""
    before, after, skips = rewritten(FuseAttention(), lambda: graph_of(inputs, build, dtypes=dtypes))
    values = [randn(*shape, seed=i) for i, shape in enumerate(inputs.values())]
    # Every row may look at itself: of a row that may look at nothing, the two forms make different things.
    values = [(value > 0) | torch.eye(63, dtype=torch.bool) if name in (dtypes or {}) else value
              for name, value in zip(inputs, values, strict=True)]
    assert_same(before, after, *values, tolerance=EAGER)
    return nodes_of(after), skips


def masked(by, dtype="float32"):
    """The same for scores that ``by(call, scores, mask)`` masks."""
    def build(call, query, key, value, mask):
        return weigh(call, by(call, scores(call, query, key), mask), value)

    return fused(build, {**INPUTS, **MASK}, {} if dtype == "float32" else {"mask": dtype})


def drop(call, scored, mask, fill=float("-inf")):
    return call(aten.masked_fill.Scalar, scored, call(aten.logical_not.default, mask), fill)


def test_golden():
    def build(call, query, key, value, mask):
        scaled = call(aten.mul.Tensor, scores(call, query, key), 0.125)
        return weigh(call, call(aten.masked_fill.Scalar, scaled, mask, float("-inf")), value)

    heads = ("batch", 2, "sequence", 4)
    inputs = {"query": heads, "key": heads, "value": heads, "mask": ("batch", 1, "sequence", "sequence")}
    before, after, _ = rewritten(FuseAttention(), lambda: graph_of(inputs, build, dtypes={"mask": "bool"}))
    check_rewrite("fuse_attention", before, after)


@pytest.mark.parametrize(("scale", "factor"), [
    (lambda call, scored: scored, 1.0),
    (lambda call, scored: call(aten.mul.Tensor, scored, 0.25), 0.25),
    (lambda call, scored: call(aten.mul.Tensor, call(aten.div.Tensor, scored, 2), 3), 1.5),
])
def test_case_1_scales_are_multiplied(scale, factor):
    def build(call, query, key, value):
        return weigh(call, scale(call, scores(call, query, key)), value)

    _, after, _ = rewritten(FuseAttention(), lambda: graph_of(INPUTS, build))
    (node,) = after.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert node.kwargs == {"scale": factor}
    assert fused(build) == (["aten.scaled_dot_product_attention.default"], [])


@pytest.mark.parametrize(("by", "dtype"), [
    (lambda call, scored, mask: call(aten.add.Tensor, scored, mask), "float32"),
    (lambda call, scored, mask: call(aten.add.Tensor, mask, call(aten.mul.Tensor, scored, 0.5)), "float32"),
    (drop, "bool"),
    (lambda call, scored, mask: drop(call, scored, mask, -1e4), "bool"),
    (lambda call, scored, mask: call(aten.mul.Tensor, drop(call, scored, mask, -1e9), 0.5), "bool"),
    (lambda call, scored, mask: call(aten.where.ScalarOther, mask, scored, float("-inf")), "bool"),
])
def test_case_2_one_mask(by, dtype):
    nodes, skips = masked(by, dtype)
    assert nodes[-1] == "aten.scaled_dot_product_attention.default" and not skips


def test_case_3_casts_and_dropout_are_passed_over():
    def build(call, query, key, value):
        scored = call(aten.dropout.default, call(aten.to.dtype, scores(call, query, key), torch.float32), 0.1, False)
        weights = call(aten.dropout.default, call(aten.softmax.int, scored, 3, torch.float32), 0.1, False)
        return call(aten.matmul.default, call(aten.type_as.default, weights, value), value)

    assert fused(build) == (["aten.scaled_dot_product_attention.default"], [])


def test_a_key_that_came_transposed_is_transposed_back():
    def build(call, query, key, value):
        return weigh(call, call(aten.matmul.default, query, key), value)

    nodes, _ = fused(build, {**INPUTS, "key": (3, 2, 4, 63)})
    assert nodes == ["aten.transpose.int", "aten.scaled_dot_product_attention.default"]


def test_one_head_of_keys_and_values_serves_all():
    def build(call, query, key, value):
        return weigh(call, scores(call, query, key), value)

    nodes, skips = fused(build, {**INPUTS, "key": (3, 1, 63, 4), "value": (3, 1, 63, 4)})
    assert nodes == ["aten.scaled_dot_product_attention.default"] and not skips


@pytest.mark.parametrize(("by", "dtype", "reason"), [
    (lambda call, scored, mask: call(aten.add.Tensor, call(aten.tanh.default, scored), mask), "float32",
     "the scores pass through aten.tanh.default"),
    (lambda call, scored, mask: call(aten.mul.Tensor, scored, mask), "float32",
     "the scores pass through aten.mul.Tensor"),
    (lambda call, scored, mask: call(aten.add.Tensor, scored, mask, alpha=2), "float32",
     "the scores pass through aten.add.Tensor"),
    (lambda call, scored, mask: call(aten.add.Tensor, call(aten.add.Tensor, scored, mask), mask), "float32",
     "the scores have more than one mask"),
    (lambda call, scored, mask: call(aten.mul.Tensor, call(aten.add.Tensor, scored, mask), 0.5), "float32",
     "the mask is added before the scores are scaled"),
    # Fills that leave a weight, or become large, when they are scaled.
    (lambda call, scored, mask: drop(call, scored, mask, -1e3), "bool",
     "the scores pass through aten.masked_fill.Scalar"),
    (lambda call, scored, mask: call(aten.mul.Tensor, drop(call, scored, mask, -1e4), 1e-4), "bool",
     "the scores pass through aten.masked_fill.Scalar"),
    (lambda call, scored, mask: call(aten.mul.Tensor, call(aten.where.ScalarOther, mask, scored, -1e4), -1.0), "bool",
     "the scores pass through aten.where.ScalarOther"),
])
def test_other_scores_stay(by, dtype, reason):
    nodes, skips = masked(by, dtype)
    assert skips == [reason] and "aten.softmax.int" in nodes


@pytest.mark.parametrize(("mask", "reason"), [
    ((63,), "the mask has no dim of queries"),
    ((4, 3, 2, 63, 63), "the softmax does not feed a product of rank 4"),
])
def test_masks_that_the_node_does_not_take(mask, reason):
    def build(call, query, key, value, mask):
        return weigh(call, call(aten.add.Tensor, scores(call, query, key), mask), value)

    assert fused(build, {**INPUTS, "mask": mask})[1] == [reason]


def test_a_mask_with_more_heads_than_the_scores():
    def build(call, query, key, value, mask):
        return weigh(call, call(aten.add.Tensor, scores(call, query, key), mask), value)

    one = (3, 1, 63, 4)
    _, skips = fused(build, {"query": one, "key": one, "value": HEADS, "mask": (1, 2, 63, 63)})
    assert skips == ["the mask has more batches or heads than the scores"]


@pytest.mark.parametrize(("name", "shape"), [
    ("query", (2, 5, 4)), ("query", (1, 2, 5, 4)), ("value", (63, 4)), ("value", (3, 1, 63, 4))])
def test_products_that_broadcast_stay(name, shape):
    def build(call, query, key, value):
        return weigh(call, scores(call, query, key), value)

    assert fused(build, {**INPUTS, name: shape})[1] == ["queries, keys and values are not [B, H, R, d] each"]


def over_the_queries(call, query, key, value):
    return call(aten.matmul.default, call(aten.softmax.int, scores(call, query, key), 2), value)


def without_values(call, query, key, value):
    return call(aten.softmax.int, scores(call, query, key), -1)


def read_twice(call, query, key, value):
    weights = call(aten.softmax.int, scores(call, query, key), -1)
    return call(aten.matmul.default, weights, value), weights


def weights_on_the_right(call, query, key, value):
    weights = call(aten.softmax.int, scores(call, query, key), -1)
    return call(aten.matmul.default, call(aten.transpose.int, value, 2, 3), weights)


def the_type_of_weights(call, query, key, value):
    weights = call(aten.softmax.int, scores(call, query, key), -1)
    return call(aten.matmul.default, call(aten.type_as.default, scores(call, key, query), weights), value)


@pytest.mark.parametrize(("build", "reason"), [
    (over_the_queries, "the softmax is not over the last dim"),
    (without_values, "the softmax does not feed a product of rank 4"),
    (read_twice, "the softmax does not feed a product of rank 4"),
    (weights_on_the_right, "the softmax does not feed a product of rank 4"),
    (the_type_of_weights, "the softmax does not feed a product of rank 4"),
])
def test_what_is_no_attention_stays(build, reason):
    nodes, skips = fused(build)
    assert skips == [reason] and "aten.softmax.int" in nodes


def test_three_dims_stay():
    def build(call, query, key, value):
        return call(aten.bmm.default, call(aten.softmax.int, call(aten.bmm.default, query, key), -1), value)

    _, skips = fused(build, {"query": (6, 63, 4), "key": (6, 4, 63), "value": (6, 63, 4)})
    assert skips == ["the softmax does not feed a product of rank 4"]


class Written(nn.Module):
    """Causal attention, written out."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden):
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1))
        scored = query @ key.transpose(-1, -2) / 4**0.5
        later = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).triu(1)
        weights = scored.masked_fill(later, torch.finfo(torch.float32).min).softmax(-1)
        return hidden + self.out((weights @ value).transpose(1, 2).flatten(2))


def test_in_a_model():
    model = Stack(Written(), Written())
    graph = capture(model, (randn(2, 5, 8),))
    before, after, skips = rewritten(FuseAttention(), lambda: flatten(graph))
    assert not skips and nodes_of(after).count("aten.scaled_dot_product_attention.default") == 2
    assert_same(before, after, randn(3, 63, 8), tolerance=EAGER)
