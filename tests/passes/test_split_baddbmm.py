"""A product that adds becomes a product and a sum, in which a bias that counts for nothing has no part."""

import pytest
import torch
from modcompile.passes.split_baddbmm import SplitBaddbmm
from tiny import assert_same, check_rewrite, graph_of, nodes_of, randn, rewritten
from tolerances import TOLERANCES
from torch import nn

from modcompile.capture import capture

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
INPUTS = {"bias": ("heads", "rows", "keys"), "query": ("heads", "rows", 4), "key": ("heads", 4, "keys")}


def split(factors, inputs=INPUTS):
    def build(call, bias, query, key):
        return call(aten.baddbmm.default, bias, query, key, **factors)

    return rewritten(SplitBaddbmm(), lambda: graph_of(inputs, build))[:2]


def test_golden():
    before, after = split({"beta": 0.5, "alpha": 0.125})
    check_rewrite("split_baddbmm", before, after)


@pytest.mark.parametrize(("factors", "nodes"), [
    ({}, ["bmm.default", "add.Tensor"]),
    ({"beta": 1.0, "alpha": 1.0}, ["bmm.default", "add.Tensor"]),
    ({"alpha": 0.125}, ["bmm.default", "mul.Tensor", "add.Tensor"]),
    ({"beta": 0.5}, ["bmm.default", "mul.Tensor", "add.Tensor"]),
    ({"beta": 0, "alpha": 0.125}, ["bmm.default", "mul.Tensor"]),
    ({"beta": 0.0}, ["bmm.default"]),
])
def test_a_factor_of_one_and_a_sum_with_nothing_make_no_node(factors, nodes):
    before, after = split(factors)
    assert nodes_of(after) == [f"aten.{name}" for name in nodes]
    assert_same(before, after, randn(6, 63, 5), randn(6, 63, 4, seed=1), randn(6, 4, 5, seed=2), tolerance=EAGER)


def test_a_bias_that_counts_for_nothing_may_be_nan():
    before, after = split({"beta": 0})
    bias = torch.full((6, 63, 5), torch.nan)
    assert_same(before, after, bias, randn(6, 63, 4, seed=1), randn(6, 4, 5, seed=2), tolerance=EAGER)


def test_a_bias_that_broadcasts():
    before, after = split({}, {"bias": (6, 1, 5), "query": (6, 63, 4), "key": (6, 4, 5)})
    assert_same(before, after, randn(6, 1, 5), randn(6, 63, 4, seed=1), randn(6, 4, 5, seed=2), tolerance=EAGER)


def test_capture_splits():
    class Scores(nn.Module):
        def forward(self, x):
            memory = torch.empty(x.shape[0], x.shape[1], x.shape[1])
            return torch.baddbmm(memory, x, x.transpose(1, 2), beta=0, alpha=0.125)

    graph = capture(Scores(), (randn(2, 5, 8),))
    assert nodes_of(graph.graph_module) == ["aten.transpose.int", "aten.bmm.default", "aten.mul.Tensor"]
    x = randn(3, 63, 8)
    assert (graph(x) - 0.125 * x @ x.transpose(1, 2)).abs().max() <= EAGER
