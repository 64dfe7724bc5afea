"""From dense to routed: equal to the dense model at full capacity, and to the reference below it."""

import copy

import pytest
import torch
from reference import mod_reference
from tiny import Attention, Block, Mlp, Stack, randomise_routers
from tolerances import TOLERANCES, deviation
from torch import nn

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert, padding_mask, routing_passes
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.trace import trace_routing
from modcompile.variants import block_paths, pruned_model

# B batch  S rows  D model dim

EAGER = TOLERANCES["eager"][torch.float32]
RATIO = 5 / 63


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padding(batch, length, seed=0):
    """A mask [B, S] with holes, a text without any word, and one that is full."""
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    mask[0], mask[-1] = True, False
    return mask.long()


class Padded(Stack):
    """Blocks under a mask that is true at padding, and one more output."""

    def forward(self, hidden, pad):
        keep = (~pad).long()
        for layer in self.layers:
            hidden = layer(hidden, keep)
        return {"hidden": hidden, "mean": hidden.mean(1)}


@pytest.fixture(scope="module")
def plain():
    model = Stack(Attention(causal=True), Block(fused=True), Attention())
    return model, capture(model, (rows(2, 5, 8),))


@pytest.fixture(scope="module")
def masked():
    model = Stack(Attention(), Attention(fused=True))
    return model, capture(model, {"hidden": rows(2, 5, 8), "attention_mask": torch.ones(2, 5, dtype=torch.long)})


def routers_of(mod):
    return {path: (router.weight.detach(), router.bias.detach()) for path, router in mod.routers.items()}


# Full capacity


@pytest.mark.parametrize(("gate", "attend_to"), [("raw", "chosen"), ("straight-through", "chosen"), ("raw", "all")])
def test_at_full_capacity_it_is_the_dense_model(plain, gate, attend_to):
    model, graph = plain
    mod = convert(graph, None, MoDConfig(blocks="all", capacity_ratio=1, gate=gate, attend_to=attend_to))
    for shape in ((3, 63, 8), (1, 63, 8), (3, 1, 8), (1, 1, 8), (2, 5, 8)):
        with torch.no_grad():
            actual, expected = mod(rows(*shape)), model(rows(*shape))
        # Split projections may round differently; otherwise the very same kernels run.
        assert deviation(actual, expected) <= (EAGER if attend_to == "all" else 0)


def test_at_full_capacity_under_a_mask_valid_rows_are_the_dense_models(masked):
    model, graph = masked
    mod = convert(graph, None, MoDConfig(blocks="all", capacity_ratio=1))
    mask = padding(4, 63)[:-1]
    with torch.no_grad():
        actual, expected = mod(rows(3, 63, 8), mask), model(rows(3, 63, 8), mask)
    assert torch.equal(actual[mask != 0], expected[mask != 0])


# Below it


@pytest.mark.parametrize(("gate", "attend_to", "blocks", "multiple"), [
    ("raw", "chosen", "every-other", 1), ("sigmoid", "chosen", "all", 1), ("tanh", "all", "all", 1),
    ("straight-through", "all", [0, 2], 1), ("sigmoid", "chosen", [1, 2], 8), ("raw", "all", [1, 2], 8),
])
def test_it_is_the_reference(plain, gate, attend_to, blocks, multiple):
    """In float64: a gate that is no number below 1 makes float32's rounding, which is a processor's own, larger."""
    model, graph = plain
    config = MoDConfig(blocks=blocks, capacity_ratio=RATIO, gate=gate, attend_to=attend_to, capacity_multiple=multiple)
    mod, exact = (copy.deepcopy(one).double() for one in (randomise_routers(convert(graph, None, config)), model))
    for shape in ((2, 63, 8), (1, 13, 8), (3, 1, 8)):
        hidden = rows(*shape).double()
        expected = mod_reference(exact, list(mod.routers), {"hidden": hidden}, routers_of(mod), RATIO, gate=gate,
                                 attend_to=attend_to, capacity_multiple=multiple)
        assert deviation(mod(hidden), expected) <= EAGER


@pytest.mark.parametrize(("axis", "attend_to"), [("token", "chosen"), ("token", "all"), ("sequence", "chosen")])
def test_under_a_mask_it_is_the_reference(masked, axis, attend_to):
    model, graph = masked
    config = MoDConfig(blocks="all", capacity_ratio=0.4, gate="sigmoid", attend_to=attend_to, axis=axis)
    mod = randomise_routers(convert(graph, None, config))
    for batch, length in ((4, 63), (2, 7), (5, 1)):
        # A text without any word attends to nothing: its numbers are no one's.
        x, mask = rows(batch, length, 8), padding(batch + 1, length)[:batch]
        if length == 1:
            mask = torch.ones_like(mask)
        expected = mod_reference(model, list(mod.routers), {"hidden": x, "attention_mask": mask}, routers_of(mod), 0.4,
                                 gate="sigmoid", attend_to=attend_to, valid=mask != 0, axis=axis)
        assert deviation(mod(x, mask)[mask != 0], expected[mask != 0]) <= EAGER


def test_both_ways_of_attending_on_the_sequence_axis_are_one(masked):
    _, graph = masked
    texts = [convert(graph, None, MoDConfig(capacity_ratio=0.4, axis="sequence", attend_to=way)).format()
             for way in ("chosen", "all")]
    assert texts[0] == texts[1]


def test_a_text_without_words_changes_nothing_and_makes_no_nan(masked):
    _, graph = masked
    for axis, attend_to in (("token", "chosen"), ("token", "all"), ("sequence", "chosen")):
        mod = randomise_routers(convert(graph, None, MoDConfig(blocks="all", capacity_ratio=1, axis=axis,
                                                               attend_to=attend_to)))
        x, mask = rows(3, 9, 8), padding(3, 9)
        with trace_routing(mod) as trace, torch.no_grad():
            out = mod(x, mask)
        assert torch.equal(out[-1], x[-1]) and out.isfinite().all()
        for block in trace.values():
            assert not block.filled[-1].any() if axis == "token" else block.filled.tolist() == [[True, True, False]]


def test_new_routers_take_the_first_valid_rows(masked):
    _, graph = masked
    mod = convert(graph, None, MoDConfig(capacity_ratio=0.25))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    with trace_routing(mod) as trace:
        mod(rows(2, 12, 8), mask)
    block = trace["layers.1"]
    assert block.positions.tolist() == [[4, 5, 6], [0, 1, 2]]
    assert block.gate.tolist() == [[1, 1, 1]] * 2 and block.logits.unique().tolist() == [1]


def test_each_block_has_its_ratio(plain):
    _, graph = plain
    mod = convert(graph, None, MoDConfig(blocks=[0, 1, 2], capacity_ratio=[0.1, 0.5, 1]))
    with trace_routing(mod) as trace:
        mod(rows(1, 20, 8))
    assert [block.positions.shape[1] for block in trace.values()] == [2, 10, 20]
    assert [(block.path, block.capacity_ratio) for block in mod.routed_blocks] == [
        ("layers.0", "1/10"), ("layers.1", "1/2"), ("layers.2", "1/1")]
    with pytest.raises(UsageError, match="list of the wrong length"):
        convert(graph, None, MoDConfig(blocks=[0, 1], capacity_ratio=[0.1]))


@pytest.mark.parametrize("config", [
    {"capacity_multiple": 64}, {"capacity_multiple": 10**9}, {"capacity_ratio": 1 / 4096}, {"capacity_ratio": 0.97},
])
def test_a_short_model_takes_any_option(config):
    """K may be 1, or all rows, at every length that a table of positions allows."""
    class Short(Stack):
        def __init__(self):
            super().__init__(Mlp(), Mlp())
            self.positions = nn.Parameter(rows(1, 20, 8))

        def forward(self, hidden):
            return super().forward(hidden + self.positions[:, :hidden.shape[1]])

    model = Short()
    mod = convert(model, (rows(2, 5, 8),), MoDConfig(**config))
    (block,) = mod.routed_blocks
    for length in (1, 2, 19, 20):
        with torch.no_grad():
            k = block.capacity_for(length)
            hidden = model.layers[0](rows(2, length, 8) + model.positions[:, :length])
            expected = torch.cat([model.layers[1](hidden[:, :k]), hidden[:, k:]], 1)
            assert deviation(mod(rows(2, length, 8)), expected) <= EAGER


# The padding mask


def test_a_mask_of_another_name_and_meaning():
    model = Padded(Attention(), Attention())
    example = {"hidden": rows(2, 5, 8), "pad": torch.zeros(2, 5, dtype=torch.bool)}
    mod = randomise_routers(convert(model, example, MoDConfig(capacity_ratio=0.4, padding_mask="~pad", gate="tanh")))
    pad = padding(4, 63)[:-1] == 0
    inputs = {"hidden": rows(3, 63, 8), "pad": pad}
    expected = mod_reference(model, ["layers.1"], inputs, routers_of(mod), 0.4, gate="tanh", valid=~pad)
    actual = mod(**inputs)
    assert list(actual) == ["hidden", "mean"]
    assert deviation(actual["hidden"][~pad], expected["hidden"][~pad]) <= EAGER


def test_which_mask_is_meant(plain, masked):
    assert padding_mask(plain[1], MoDConfig()) is None
    assert padding_mask(masked[1], MoDConfig()) == "attention_mask"
    assert padding_mask(masked[1], MoDConfig(padding_mask="~attention_mask")) == "~attention_mask"
    for graph, name in [(plain[1], "attention_mask"), (masked[1], "hidden"), (masked[1], "~mask")]:
        with pytest.raises(UsageError, match="names no input of shape") as caught:
            padding_mask(graph, MoDConfig(padding_mask=name))
        assert caught.value.details["found"] == name and "hidden float32" in caught.value.details["expected"]


# What comes of it


def test_the_pipeline_is_recorded(plain):
    _, graph = plain
    mod = convert(graph, None, MoDConfig(attend_to="all", capacity_ratio=0.25))
    assert [record["name"] for record in mod.passes] == [
        "expand-einsum", "split-baddbmm", "functionalize", "remove-noops", "fuse-softmax", "hoist-sizes",
        "simplify-masks", "outline-blocks", "split-fused-qkv", "attend-to-all", "route-blocks", "round-capacity"]
    assert mod.passes[-2]["options"] == {"blocks": ["layers.1"], "ratios": ["1/4"], "gate": "raw", "axis": "token",
                                         "padding_mask": None, "masked": False, "seen": "hidden"}
    names = [stage.name for stage in routing_passes(graph, ["layers.1"], MoDConfig(axis="sequence", attend_to="all"))]
    assert names == ["route-blocks", "round-capacity"]


def test_blocks_are_left_out(plain):
    _, graph = plain
    mod = convert(graph, None, MoDConfig(blocks="all", dropped=("layers.0",), capacity_ratio=0.25))
    assert list(mod.routers) == [path for path in block_paths(mod) if path != "layers.0"]
    # A model may leave out blocks and route none.
    pruned = convert(graph, None, MoDConfig(blocks=("layers.0",), dropped=("layers.0",)))
    hidden = rows(3, 9, 8)
    with torch.no_grad():
        assert pruned.routers == {} and torch.equal(pruned(hidden), pruned_model(mod, ["layers.0"])(hidden))
    with pytest.raises(UsageError, match="a block to drop is none"):
        convert(graph, None, MoDConfig(dropped=("layers.9",)))


def test_the_captured_graph_is_left_as_it_was(plain):
    _, graph = plain
    text, passes = graph.format(), list(graph.passes)
    mod = convert(graph, None, MoDConfig(attend_to="all", capacity_ratio=0.25))
    assert graph.format() == text and graph.passes == passes
    assert not any(name.startswith("router") for name in graph.state_dict())
    assert mod.get_parameter("layers.1.mlp.up.weight") is graph.get_parameter("layers.1.mlp.up.weight")


def test_the_mode_is_the_sources():
    model = Stack(Mlp(), Mlp())
    assert not convert(model, (rows(2, 5, 8),)).training
    assert convert(model.train(), (rows(2, 5, 8),)).training and model.training


def test_the_default_is_the_papers_choice(plain):
    mod = convert(plain[1])
    assert mod.config == MoDConfig() and list(mod.routers) == ["layers.1"]
    assert [block.capacity_ratio for block in mod.routed_blocks] == ["1/8"]


def test_two_attentions_cannot_attend_to_all():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Attention(), Attention()

        def forward(self, hidden):
            return self.two(self.one(hidden))

    with pytest.raises(UnsupportedGraphError, match=r"block layers\.1 cannot attend to all rows") as caught:
        convert(Stack(Twice(), Twice()), (rows(2, 5, 8),), MoDConfig(attend_to="all"))
    assert caught.value.details["found"] == "2 self-attentions"
    assert caught.value.details["fix"] == 'use attend_to="chosen"'


def test_routing_adds_what_it_says_and_no_more(plain):
    model, graph = plain
    mod = convert(graph, None, MoDConfig(blocks=[1], capacity_ratio=RATIO))
    assert list(mod.state_dict()) == [*model.state_dict(), "router.layers.1.weight", "router.layers.1.bias"]
    assert mod.routers["layers.1"].weight.shape == (1, 8) and mod.routers["layers.1"].bias.shape == (1,)
