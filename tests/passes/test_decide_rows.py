"""Rows decide, and nobody sees an empty slot, whatever form the block's attention and its mask have."""

import copy

import pytest
import torch
from modcompile.passes.decide_rows import DecideRows
from modcompile.passes.route_blocks import RouteBlocks
from tiny import Attention, Stack, check_golden, outlined, randn, run_again
from torch import nn
from torch.nn import functional as F

from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import PassManager
from modcompile.program import format_graph
from modcompile.routers import Router

# B batch  S rows  D model dim

X, MASK = randn(3, 63, 8), torch.ones(3, 63, dtype=torch.long)
MASK[1, 40:] = 0
SPLIT = 0.25


class Written(Attention):
    """Attention written out, under an additive mask of its own where it is causal."""

    def forward(self, hidden, mask=None):
        q, k, v = (f(hidden) for f in (self.query, self.key, self.value))  # [B, S, D]
        scores = q @ k.transpose(-1, -2)
        if self.causal:
            scores = scores + torch.full((hidden.shape[1],) * 2, -1e9).triu(1)
        return hidden + self.out(scores.softmax(-1) @ v)


class Biased(Attention):
    """One node under an additive mask."""

    def forward(self, hidden, mask=None):
        q, k, v = (f(hidden)[:, None] for f in (self.query, self.key, self.value))  # [B, 1, S, D]
        bias = (torch.arange(hidden.shape[1])[:, None] - torch.arange(hidden.shape[1])) * -0.1
        return hidden + self.out(F.scaled_dot_product_attention(q, k, v, bias)[:, 0])


class Folded(Attention):
    """Heads folded into the batch."""

    def forward(self, hidden, mask=None):
        batch, rows, _ = hidden.shape
        q, k, v = (f(hidden).view(batch, rows, 2, 4).transpose(1, 2).reshape(2 * batch, rows, 4)
                   for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).view(batch, 2, rows, 4).transpose(1, 2).flatten(2)
        return hidden + self.out(mixed)


def routed(layer, example, padding_mask=None, decide=True):
    model = Stack(layer)
    graph = outlined(model, example, ["layers.0"]).graph_module
    router = Router(8)
    with torch.no_grad():
        router.weight.copy_(randn(1, 8, seed=2))
    graph.add_submodule("router.layers.0", router)
    PassManager([RouteBlocks(("layers.0",), ("1/1",), "straight-through", "token", padding_mask)])(graph)
    if decide:
        PassManager([DecideRows(("layers.0",), (SPLIT,))])(graph)
    return model, graph, router


def test_golden():
    _, graph, _ = routed(Attention(causal=True), {"hidden": X[:2, :5]})
    run_again(DecideRows(("layers.0",), (SPLIT,)), graph)
    check_golden("decide_rows", format_graph(graph))


@pytest.mark.parametrize("layer", [Attention(), Attention(causal=True), Written(), Written(causal=True), Biased()],
                         ids=["plain", "causal", "written", "written-causal", "biased"])
@torch.no_grad()
def test_those_that_enter_are_alone(layer):
    model, graph, router = routed(layer, {"hidden": X[:2, :5]})
    (out,), takes = graph(X), router(X) > SPLIT
    biases = isinstance(layer, Biased)
    for b in range(3):
        chosen = takes[b].nonzero()[:, 0]
        assert 5 < len(chosen) < 58 and torch.equal(out[b][~takes[b]], X[b][~takes[b]])
        if biases:
            # Distances are the original ones: hide the others in the dense block.
            q, k, v = (f(X[b]) for f in (layer.query, layer.key, layer.value))
            bias = (torch.arange(63)[:, None] - torch.arange(63)) * -0.1
            weights = (q @ k.T / 8**0.5 + bias)[chosen][:, chosen].softmax(-1)
            expected = X[b][chosen] + layer.out(weights @ v[chosen])
        else:
            expected = model.layers[0](X[b:b + 1, chosen])[0]
        assert torch.allclose(out[b][chosen], expected, atol=1e-5)


@torch.no_grad()
def test_padding_neither_enters_nor_is_seen():
    model, graph, router = routed(Attention(), {"hidden": X[:2, :5], "attention_mask": MASK[:2, :5]}, "attention_mask")
    (out,), takes = graph(X, MASK), (router(X) > SPLIT) & MASK.bool()
    for b in range(3):
        chosen = takes[b].nonzero()[:, 0]
        assert torch.equal(out[b][~takes[b]], X[b][~takes[b]])
        assert torch.allclose(out[b][chosen], model.layers[0](X[b:b + 1, chosen])[0], atol=1e-5)


def test_what_it_does_not_take():
    _, graph, _ = routed(Attention(), {"hidden": X[:2, :5]}, decide=False)
    with pytest.raises(PassContractError, match="rows do not decide"):
        DecideRows(("layers.0",), (SPLIT,)).ensures(graph)
    dense = outlined(Stack(Attention()), {"hidden": X[:2, :5]}, ["layers.0"]).graph_module
    with pytest.raises(PassContractError, match="blocks are not routed"):
        DecideRows(("layers.0",), (SPLIT,)).requires(copy.deepcopy(dense))
    with pytest.raises(UnsupportedGraphError, match="a leading dim of the batch"):
        routed(Folded(), {"hidden": X[:2, :5]})
    with pytest.raises(UnsupportedGraphError, match="no attention"):
        routed(nn.Linear(8, 8), {"hidden": X[:2, :5]})
