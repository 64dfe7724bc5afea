"""A row's score is the attention that it received in the block before, in whatever form that is written."""

import pytest
import torch
from modcompile.passes.route_blocks import RouteBlocks
from tiny import HEADS, Attention, Mlp, Stack, check_golden, outlined, randn
from torch import nn
from torch.nn import functional as F

from modcompile.errors import UnsupportedGraphError
from modcompile.pass_manager import PassManager
from modcompile.program import format_graph
from modcompile.routers import AttentionRouter

# B batch  H heads  S rows  D model dim

X, MASK = randn(3, 63, 8), torch.ones(3, 63, dtype=torch.long)
MASK[1, 40:] = 0
PATH = "layers.1"


class Written(Attention):
    """Attention written out, heads folded into the batch, half a mask added."""

    def forward(self, hidden, mask=None):
        q, k, v = (f(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1)
                   for f in (self.query, self.key, self.value))  # [B * H, S, D / H]
        weights = (q @ k.transpose(1, 2) / 2).softmax(-1)
        return hidden + self.out((weights @ v).unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2))


class Grouped(Attention):
    """Two heads of queries share one of keys, under a bias that is added."""

    def __init__(self):
        super().__init__()
        self.key, self.value = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, hidden, mask=None):
        q = self.query(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
        k, v = (f(hidden).unflatten(-1, (1, 4)).transpose(1, 2) for f in (self.key, self.value))
        bias = (torch.arange(hidden.shape[1])[:, None] - torch.arange(hidden.shape[1])) * -0.1
        mixed = F.scaled_dot_product_attention(q, k, v, bias, scale=0.3, enable_gqa=True)
        return hidden + self.out(mixed.transpose(1, 2).flatten(2))


def scored(before, example, padding_mask=None):
    graph = outlined(Stack(before, Attention()), example, ["layers.0", PATH]).graph_module
    graph.add_submodule(f"router.{PATH}", AttentionRouter())
    return routed(graph, (PATH,), padding_mask)


def routed(graph, blocks, padding_mask=None):
    return PassManager([RouteBlocks(blocks, ("1/4",) * len(blocks), "straight-through", "token", padding_mask,
                                    seen="attention")])(graph)


def received(graph, *inputs):
    """The logits of the routed block."""
    interpreter = torch.fx.Interpreter(graph)
    node = next(n for n in graph.graph.nodes if n.meta.get("role") == (PATH, "logits"))
    seen = {}
    interpreter.run_node = lambda n, run=interpreter.run_node: seen.setdefault(n, run(n))
    with torch.no_grad():
        interpreter.run(*inputs)
    return seen[node]


def by_hand(layer, heads=HEADS, scale=0.5, causal=False, bias=0.0, keys=None, groups=1):
    """[B, S]: the sum over queries of the mean over heads."""
    q = layer.query(X).unflatten(-1, (heads, -1)).transpose(1, 2)
    k = layer.key(X).unflatten(-1, (heads // groups, -1)).transpose(1, 2).repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale + bias
    if causal:
        scores = scores.masked_fill(torch.ones(63, 63).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1) if keys is None else scores.masked_fill(~keys[:, None, None], -torch.inf).softmax(-1)
    return (weights if keys is None else weights * keys[:, None, :, None]).mean(1).sum(1)


def test_golden():
    check_golden("received", format_graph(scored(Attention(causal=True), {"hidden": X[:2, :5]})))


@pytest.mark.parametrize(("layer", "options"), [
    (Attention(), {}), (Attention(causal=True), {"causal": True}), (Written(), {}),
    (Grouped(), {"scale": 0.3, "groups": 2,
                 "bias": (torch.arange(63)[:, None] - torch.arange(63)) * -0.1})],
    ids=["plain", "causal", "written", "grouped"])
@torch.no_grad()
def test_the_attention_received(layer, options):
    graph = scored(layer, {"hidden": X[:2, :5]})
    logits = received(graph, X)
    assert torch.allclose(logits, by_hand(layer, **options), atol=1e-5)
    assert torch.allclose(logits.mean(), torch.ones(()))


@torch.no_grad()
def test_padding_looks_at_nothing():
    layer = Attention()
    graph = scored(layer, {"hidden": X[:2, :5], "attention_mask": MASK[:2, :5]}, "attention_mask")
    logits = received(graph, X, MASK)
    assert torch.allclose(logits, by_hand(layer, keys=MASK.bool()), atol=1e-5)
    assert torch.allclose(logits.sum(1), MASK.sum(1).float()) and (logits[1, 40:] == 0).all()


def test_what_cannot_be_scored():
    example = {"hidden": X[:2, :5]}
    paths = ("layers.0", "layers.1", "layers.2")
    for blocks in (paths[:1], paths[1:]):
        graph = outlined(Stack(Attention(), Attention(), Attention()), example, paths).graph_module
        for path in blocks:
            graph.add_submodule(f"router.{path}", AttentionRouter())
        with pytest.raises(UnsupportedGraphError, match="cannot be routed by attention"):
            routed(graph, blocks)
    with pytest.raises(UnsupportedGraphError, match="no attention"):
        scored(Mlp(), example)
