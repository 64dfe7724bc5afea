"""Where the rows of a block see each other, in every form that attention is written in, and what is none."""

import operator

import pytest
import torch
from tiny import graph_of

from modcompile.attention import SDPA, ancestors, attention_arguments, self_attention
from modcompile.pass_manager import Skip

# B batch  H heads  R rows  d head dim

aten = torch.ops.aten
HIDDEN = {"hidden": (3, 63, 8)}
MASK = {"mask": (3, 1, 63, 63)}


def heads(call, hidden, count=2):
    """[B, R, H * d] -> [B, H, R, d]"""
    return call(aten.transpose.int, call(aten.unflatten.int, hidden, 2, [count, 8 // count]), 1, 2)


def projected(call, hidden):
    """Three values of the hidden state, of which none is another: query, key and value."""
    return [heads(call, call(op, hidden)) for op in (aten.relu.default, aten.neg.default, aten.tanh.default)]


def scores(call, query, key):
    return call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))


def written(call, hidden, between=lambda call, scored: scored, after=lambda call, weights: weights):
    """Attention written out, with steps before and after the softmax."""
    query, key, value = projected(call, hidden)
    weights = call(aten.softmax.int, between(call, scores(call, query, key)), -1)
    return call(aten.matmul.default, after(call, weights), value)


def attention_of(build, inputs=HIDDEN):
    """What is found, and the graph's nodes by name."""
    graph = graph_of(inputs, build).graph
    return self_attention(graph), {node.name: node for node in graph.nodes}


def targets(nodes):
    return sorted(str(node.target) for node in nodes)


# What is found


@pytest.mark.parametrize("by_name", [False, True])
def test_fused(by_name):
    def build(call, hidden, mask):
        query, key, value = projected(call, hidden)
        return call(SDPA, query, key, value, attn_mask=mask) if by_name else call(SDPA, query, key, value, mask)

    found, nodes = attention_of(build, {**HIDDEN, **MASK})
    node = nodes["scaled_dot_product_attention_default"]
    assert found.fused and found.first is found.last is node and not found.scores
    assert (found.query, found.key, found.value) == node.args[:3]
    assert attention_arguments(node) == {
        "query": found.query, "key": found.key, "value": found.value, "attn_mask": nodes["mask"], "dropout_p": 0.0,
        "is_causal": False, "scale": None, "enable_gqa": False}


WRITTEN = {
    "plain": (lambda call, scored: scored, []),
    "scaled": (lambda call, scored: call(aten.mul.Tensor, scored, 0.5), ["mul.Tensor"]),
    "capped": (lambda call, scored: call(
        aten.mul.Tensor, call(aten.tanh.default, call(aten.div.Tensor, scored, 50)), 50),
        ["div.Tensor", "mul.Tensor", "tanh.default"]),
    "cast": (lambda call, scored: call(aten.to.dtype, scored, torch.float64), ["to.dtype"]),
}


@pytest.mark.parametrize("form", WRITTEN)
def test_written_out(form):
    between, steps = WRITTEN[form]
    found, nodes = attention_of(lambda call, hidden: written(
        call, hidden, between, lambda call, weights: call(aten.to.dtype, weights, torch.float32)))
    assert not found.fused and found.first is nodes["matmul_default"] and found.last is nodes["matmul_default_1"]
    assert found.query is nodes["transpose_int"] and found.value is nodes["transpose_int_2"]
    # The key is transposed already.
    assert found.key is found.first.args[1] and nodes["transpose_int_1"] in ancestors([found.key])
    assert targets(found.scores) == sorted(f"aten.{step}" for step in [*steps, "softmax.int", "to.dtype"])


def test_written_out_with_two_masks_and_dropout():
    def build(call, hidden, mask, bias):
        def masked(call, scored):
            filled = call(aten.masked_fill.Scalar, scored, call(aten.gt.Scalar, mask, 0), -1e9)
            return call(aten.add.Tensor, filled, bias)

        return written(call, hidden, masked, lambda call, weights: call(aten.dropout.default, weights, 0.1, False))

    found, nodes = attention_of(build, {**HIDDEN, **MASK, "bias": (1, 2, 63, 63)})
    assert targets(found.scores) == ["aten.add.Tensor", "aten.dropout.default", "aten.masked_fill.Scalar",
                                     "aten.softmax.int"]
    assert not found.scores & {nodes["mask"], nodes["bias"]}


def test_written_out_with_heads_folded_into_the_batch():
    def build(call, hidden):
        query, key, value = (call(aten.flatten.using_ints, part, 0, 1) for part in projected(call, hidden))
        scored = call(aten.bmm.default, query, call(aten.transpose.int, key, 1, 2))
        unfolded = call(aten.softmax.int, call(aten.unflatten.int, scored, 0, [-1, 2]), -1)
        return call(aten.bmm.default, call(aten.flatten.using_ints, unfolded, 0, 1), value)

    found, _ = attention_of(build)
    assert targets([found.first, found.last]) == ["aten.bmm.default"] * 2
    assert targets(found.scores) == ["aten.flatten.using_ints", "aten.softmax.int", "aten.unflatten.int"]


@pytest.mark.parametrize("fused", [False, True])
def test_one_head_of_keys_and_values(fused):
    def build(call, hidden):
        query, (key, value) = heads(call, hidden), (heads(call, call(op, hidden), 1) for op in
                                                    (aten.relu.default, aten.neg.default))
        key, value = (call(aten.slice.Tensor, part, 3, 0, 4) for part in (key, value))
        if fused:
            return call(SDPA, query, key, value, enable_gqa=True)
        return call(aten.matmul.default, call(aten.softmax.int, scores(call, query, key), -1), value)

    found, nodes = attention_of(build)
    assert found.fused == fused and found.query is nodes["transpose_int"]


def test_a_softmax_of_the_first_kind():
    def build(call, hidden):
        query, key, value = projected(call, hidden)
        weights = call(aten._softmax.default, scores(call, query, key), 3, False)
        return call(aten.matmul.default, weights, value)

    found, _ = attention_of(build)
    assert targets(found.scores) == ["aten._softmax.default"]


def test_a_bias_that_is_made_from_the_rows_is_beside_the_scores():
    def build(call, hidden):
        query, key, value = projected(call, hidden)
        # [B, 1, R, 1], of every query.
        bias = call(aten.unsqueeze.default, call(aten.mean.dim, hidden, [2], True), 1)
        weights = call(aten.softmax.int, call(aten.add.Tensor, scores(call, query, key), bias), -1)
        return call(aten.matmul.default, weights, value)

    found, nodes = attention_of(build)
    assert targets(found.scores) == ["aten.add.Tensor", "aten.softmax.int"]
    assert nodes["mean_dim"] not in found.scores


def test_what_looks_at_something_else_is_no_self_attention():
    def build(call, hidden, memory):
        own = written(call, hidden)
        other = call(SDPA, own, heads(call, memory), heads(call, memory))
        gate = call(aten.softmax.int, hidden, -1)
        return own, other, gate

    found, nodes = attention_of(build, {**HIDDEN, "memory": (3, 33, 8)})
    assert found.last is nodes["matmul_default_1"]


# What is not, and why


def no_attention(call, hidden):
    return call(aten.relu.default, hidden)


def two_fused(call, hidden):
    first = call(SDPA, *projected(call, hidden))
    return call(SDPA, first, *projected(call, hidden)[1:])


def two_written_out(call, hidden):
    """One after the other: the second one's operands come from the first."""
    first = written(call, hidden)
    return written(call, call(aten.flatten.using_ints, call(aten.transpose.int, first, 1, 2), 2, 3))


def one_of_each(call, hidden):
    first = written(call, hidden)
    return call(SDPA, first, *projected(call, hidden)[1:])


def over_the_queries(call, hidden):
    query, key, value = projected(call, hidden)
    return call(aten.matmul.default, call(aten.softmax.int, scores(call, query, key), 2), value)


def weights_that_are_returned(call, hidden):
    query, key, value = projected(call, hidden)
    weights = call(aten.softmax.int, scores(call, query, key), -1)
    return call(aten.matmul.default, weights, value), weights


def weights_on_the_right(call, hidden):
    query, key, value = projected(call, hidden)
    weights = call(aten.softmax.int, scores(call, query, key), -1)
    return call(aten.matmul.default, call(aten.transpose.int, value, 2, 3), weights)


def without_values(call, hidden):
    query, key, _ = projected(call, hidden)
    return call(aten.softmax.int, scores(call, query, key), -1)


def scores_of_two_products(call, hidden):
    return written(call, hidden, lambda call, scored: call(
        aten.add.Tensor, scored, scores(call, heads(call, hidden), heads(call, hidden))))


def weights_of_no_product(call, hidden):
    row = call(aten.select.int, hidden, 2, 0)
    square = call(aten.mul.Tensor, call(aten.unsqueeze.default, row, 2), call(aten.unsqueeze.default, row, 1))
    return call(aten.matmul.default, call(aten.softmax.int, square, -1), hidden)


def scores_of_features(call, hidden):
    query, key, value = projected(call, hidden)
    weights = call(aten.softmax.int, call(aten.matmul.default, call(aten.transpose.int, query, -2, -1), key), -1)
    return call(aten.matmul.default, weights, call(aten.transpose.int, value, -2, -1))


def scores_in_parts(call, hidden):
    return written(call, hidden, lambda call, scored: call(aten.sub.Tensor, scored, call(
        aten.sum.dim_IntList, call(operator.getitem, call(aten.topk.default, scored, 2), 0), [-1], True)))


def one_number_of_each_key(call, hidden):
    return written(call, hidden, lambda call, scored: call(
        aten.sub.Tensor, scored, call(aten.amax.default, scored, [-2], True)))


def one_number_of_all(call, hidden):
    return written(call, hidden, lambda call, scored: call(
        aten.sub.Tensor, scored, call(aten.amax.default, scored, [-2, -1], True)))


def rows_and_heads_in_one_dim(call, hidden):
    """One head of keys and values for all, with each row's heads in a column: [B, R * H, d]."""
    query = call(aten.reshape.default, hidden, [call(aten.sym_size.int, hidden, 0), -1, 4])
    key = call(aten.slice.Tensor, hidden, 2, 0, 4)
    weights = call(aten.softmax.int, call(aten.bmm.default, query, call(aten.transpose.int, key, 1, 2)), -1)
    return call(aten.bmm.default, weights, key)


@pytest.mark.parametrize(("build", "reason", "node"), [
    (no_attention, "no attention: neither scaled_dot_product_attention nor a softmax", ""),
    (two_fused, "2 self-attentions", "scaled_dot_product_attention_default_1"),
    (two_written_out, "2 self-attentions", "matmul_default_3"),
    (one_of_each, "2 self-attentions", "scaled_dot_product_attention_default"),
    (over_the_queries, "softmax_int is not over the last dim", "softmax_int"),
    (weights_that_are_returned, "softmax_int is not followed by one product with values", "softmax_int"),
    (weights_on_the_right, "softmax_int is not followed by one product with values", "softmax_int"),
    (without_values, "softmax_int is not followed by one product with values", "softmax_int"),
    (scores_of_two_products, "the scores of softmax_int come from matmul_default, matmul_default_1; attention has one "
     "product of queries and keys", "softmax_int"),
    (weights_of_no_product, "the scores of softmax_int come from no product; attention has one product of queries and "
     "keys", "softmax_int"),
    (scores_of_features, "matmul_default stands between the product and the softmax softmax_int, but does not give "
     "scores of queries and keys", "matmul_default"),
    (scores_in_parts, "topk_default stands between the product and the softmax softmax_int, but does not give scores "
     "of queries and keys", "topk_default"),
    (one_number_of_each_key, "amax_default stands between the product and the softmax softmax_int, but does not give "
     "scores of queries and keys", "amax_default"),
    (one_number_of_all, "amax_default stands between the product and the softmax softmax_int, but does not give scores "
     "of queries and keys", "amax_default"),
    (rows_and_heads_in_one_dim, "bmm_default stands between the product and the softmax softmax_int, but does not give "
     "scores of queries and keys", "bmm_default"),
])
def test_what_is_none_says_why(build, reason, node):
    assert attention_of(build)[0] == Skip(reason, node)


@pytest.mark.parametrize("other", [over_the_queries, scores_of_two_products, weights_that_are_returned])
def test_an_attention_beside_one_that_is_not_understood(other):
    """Rows would see each other there as well."""
    found, _ = attention_of(lambda call, hidden: (call(SDPA, *projected(call, hidden)), other(call, hidden)))
    assert isinstance(found, Skip) and "softmax_int" in found.reason


def test_ancestors_hold_what_they_are_of():
    _, nodes = attention_of(no_attention)
    assert ancestors([nodes["relu_default"]]) == {nodes["relu_default"], nodes["hidden"]}
