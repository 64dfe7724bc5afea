"""A dropped block hands its hidden state on."""

import copy

import pytest
import torch
from modcompile.passes.prune_blocks import PruneBlocks
from tiny import Attention, Stack, check_rewrite, nodes_of, outlined, randn, rewritten, run_graph, sub_graph_of

from modcompile import MoDConfig, capture, convert, find_blocks
from modcompile.errors import UsageError
from modcompile.variants import pruned_model

aten = torch.ops.aten
PATHS = ["layers.0", "layers.1", "layers.2"]
X, MASK = randn(3, 63, 8), torch.ones(3, 63, dtype=torch.long)


def test_golden():
    inputs = {"hidden": ("batch", "rows", 8), "mask": ("batch", 1, "rows", "rows")}
    before, after, _ = rewritten(PruneBlocks(("block",)), lambda: sub_graph_of(
        inputs, lambda call, hidden, mask: call(aten.bmm.default, call(aten.squeeze.dim, mask, 1), hidden)))
    check_rewrite("prune_blocks", before, after)


@pytest.fixture(scope="module")
def model():
    return Stack(Attention(), Attention(), Attention())


@pytest.fixture(scope="module")
def graph(model):
    return outlined(model, {"hidden": X[:2, :5], "attention_mask": MASK[:2, :5]}, PATHS).graph_module


def pruned(graph, *blocks):
    return rewritten(PruneBlocks(blocks), lambda: copy.deepcopy(graph))[1]


def test_the_others_run_as_before(model, graph):
    after = pruned(graph, "layers.1")
    assert [name for name in nodes_of(after) if name in PATHS] == ["layers.0", "layers.2"]
    with torch.no_grad():
        assert torch.equal(run_graph(after, X, MASK)[0], model.layers[2](model.layers[0](X, MASK), MASK))


def test_what_nobody_takes_any_more_goes_too(graph):
    after = pruned(graph, *PATHS)
    assert nodes_of(after) == [] and torch.equal(run_graph(after, X, MASK)[0], X)


def test_a_block_in_place_goes_and_the_rest_can_be_converted(model):
    graph = capture(model, {"hidden": X[:2, :5], "attention_mask": MASK[:2, :5]})
    after = pruned_model(graph, ["layers.1"])
    assert [block.path for block in find_blocks(after).routable] == ["layers.0", "layers.2"]
    expected = model.layers[2](model.layers[0](X, MASK), MASK)
    assert torch.equal(after(X, MASK), expected)
    whole = convert(after, config=MoDConfig(blocks="all", capacity_ratio=1.0))
    torch.testing.assert_close(whole(X, MASK), expected)
    assert list(whole.routers) == ["layers.0", "layers.2"]
    # The first, the last and neighbours; the graph they are taken from stays as it is.
    assert torch.equal(pruned_model(graph, ["layers.0", "layers.1"])(X, MASK), model.layers[2](X, MASK))
    assert torch.equal(pruned_model(graph, ["layers.1", "layers.2"])(X, MASK), model.layers[0](X, MASK))
    assert torch.equal(pruned_model(graph, PATHS)(X, MASK), X) and torch.equal(graph(X, MASK), model(X, MASK))


def test_in_place_and_outlined_are_one(graph):
    dense = capture(Stack(Attention(), Attention()), {"hidden": X[:2, :5], "attention_mask": MASK[:2, :5]})
    mod = convert(dense, config=MoDConfig(blocks="all", capacity_ratio=0.5))
    assert torch.equal(pruned_model(dense, ["layers.0"])(X, MASK), pruned_model(mod, ["layers.0"])(X, MASK))


def test_a_path_that_is_no_block(model):
    graph = capture(model, {"hidden": X[:2, :5], "attention_mask": MASK[:2, :5]})
    for source in (graph, convert(graph, config=MoDConfig(capacity_ratio=0.5))):
        with pytest.raises(UsageError, match=r"layers\.7"):
            pruned_model(source, ["layers.1", "layers.7"])


def test_no_block_to_drop(graph):
    assert nodes_of(pruned(graph)) == nodes_of(graph)
