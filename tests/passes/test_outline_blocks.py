"""A block as a sub-graph computes any number of rows, under its own names, with whatever it took from outside."""

import operator

import pytest
import torch
from modcompile.passes.outline_blocks import OutlineBlocks
from tiny import (
    Attention,
    Mlp,
    Stack,
    assert_same,
    check_rewrite,
    graph_of,
    nodes_of,
    outlined,
    randn,
    rewritten,
    run_graph,
)
from tolerances import TOLERANCES, deviation
from torch import nn

from modcompile.capture import capture
from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import PassManager
from modcompile.shapes import shape_exprs

# B batch  S rows of the model  R rows of the block  H heads  D model dim  d head dim

aten = torch.ops.aten
EAGER = TOLERANCES["eager"][torch.float32]
X = randn(2, 5, 8)
CHOSEN = [0, 7, 8, 30, 62]


class Folded(nn.Module):
    """Attention whose heads are folded into the batch, as is the bias of each head and key: [B * H, 1, S]."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, hidden, bias):
        batch, rows, _ = hidden.shape
        heads = self.project(hidden).view(batch, rows, 2, 4).transpose(1, 2).reshape(batch * 2, rows, 4)
        weights = torch.baddbmm(bias, heads, heads.transpose(1, 2), alpha=0.5).softmax(-1)  # [B * H, S, S]
        mixed = torch.bmm(weights, heads).view(batch, 2, rows, 4).transpose(1, 2)
        return hidden + mixed.reshape(batch, rows, 8)


class Distances(Stack):
    """A bias for each key of each head, from the numbers of the valid rows."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25])[:, None, None])

    def bias(self, mask):
        places = (mask.cumsum(-1) - 1) * mask
        return (self.slopes * places[:, None, None, :]).reshape(-1, 1, mask.shape[1])

    def forward(self, hidden, attention_mask):
        bias = self.bias(attention_mask)
        for layer in self.layers:
            hidden = layer(hidden, bias)
        return hidden


MASK = torch.ones(2, 5, dtype=torch.long)


def body_of(graph_module, path="layers.0"):
    return graph_module.get_submodule(path)


def side_shapes(body):
    """The shapes of a sub-graph's side inputs, with letters for its own sizes."""
    hidden, *sides = (shape_exprs(node) for node in body.graph.find_nodes(op="placeholder"))
    letters = {hidden[0]: "B", hidden[1]: "R"}
    return [tuple(letters.get(size, size) for size in side) for side in sides]


def heads_in_the_batch(call, hidden, bias, table):
    """A block of two heads, as it stands in a main graph: its nodes know their module."""
    batch, rows = (call(aten.sym_size.int, hidden, dim) for dim in (0, 1))
    folded = call(operator.mul, batch, 2)
    before = set(call.graph.nodes)
    heads = call(aten.transpose.int, call(aten.reshape.default, hidden, [batch, rows, 2, 4]), 1, 2)  # [B, H, R, d]
    heads = call(aten.reshape.default, heads, [folded, rows, 4])
    scores = call(aten.bmm.default, heads, call(aten.transpose.int, heads, 1, 2))  # [B * H, R, R]
    mixed = call(aten.bmm.default, call(aten.add.Tensor, scores, bias), heads)
    mixed = call(aten.reshape.default, mixed, [batch, 2, rows, 4])
    mixed = call(aten.reshape.default, call(aten.transpose.int, mixed, 1, 2), [batch, rows, 8])
    mixed = call(aten.linear.default, call(aten.add.Tensor, mixed, table), call.tensor("layers.0.weight"))
    result = call(aten.add.Tensor, hidden, mixed)
    for node in set(call.graph.nodes) - before:
        node.meta["nn_module_stack"] = {"layers.0": ("layers.0", nn.Module)}
    return result


def test_golden():
    inputs = {"hidden": ("batch", "rows", 8), "bias": ("batch", 2, 1, "rows"), "table": ("rows", 8)}

    def build(call, hidden, bias, table):
        return heads_in_the_batch(call, hidden, call(aten.flatten.using_ints, bias, 0, 1), table)

    before, after, _ = rewritten(OutlineBlocks(("layers.0",)), lambda: graph_of(
        inputs, build, {"layers.0.weight": nn.Parameter(randn(8, 8))}))
    check_rewrite("outline_blocks", before, after)
    assert_same(before, after, randn(3, 63, 8), randn(3, 2, 1, 63, seed=1), randn(63, 8, seed=2))


@pytest.fixture(scope="module")
def distances():
    return Distances(Folded(), Folded())


def test_case_1_heads_are_unfolded_outside_and_folded_inside(distances):
    graph = outlined(distances, {"hidden": X, "attention_mask": MASK}, ["layers.0"])
    body = body_of(graph.graph_module)
    assert side_shapes(body) == [("B", 2, 1, "R")]
    hidden, mask = randn(3, 63, 8), (randn(3, 63, seed=1) > 0).long()
    bias = distances.bias(mask)
    with torch.no_grad():
        assert deviation(graph(hidden, mask), distances(hidden, mask)) <= EAGER
        actual = body(hidden[:, CHOSEN], bias.unflatten(0, (3, 2))[..., CHOSEN])
        assert deviation(actual, distances.layers[0](hidden[:, CHOSEN], bias[..., CHOSEN])) <= EAGER


class Tables(Stack):
    """Side inputs of every rank that a [B, H, S, S] or [B, S, D] may be combined with."""

    def forward(self, hidden):
        rows = torch.arange(hidden.shape[1])
        mask = 2 * rows[:, None] >= rows  # [S, S], not a causal one, which would be simplified
        table = torch.sin(rows[:, None] * torch.arange(1, 9.0))  # [S, D]
        for layer in self.layers:
            hidden = layer(hidden, mask, table, hidden.new_tensor(0.5))
        return hidden


class Sided(Attention):
    def forward(self, hidden, mask, table, scale):
        hidden = hidden * scale + table
        query, key, value = (f(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
                             for f in (self.query, self.key, self.value))
        return hidden + self.out(nn.functional.scaled_dot_product_attention(query, key, value, mask)
                                 .transpose(1, 2).flatten(2))


def test_case_1_side_inputs_have_the_rank_that_they_are_broadcast_to():
    model = Tables(Sided(), Sided())
    graph = outlined(model, (X,), ["layers.1"])
    assert side_shapes(body_of(graph.graph_module, "layers.1")) == [(), (1, "R", 8), (1, 1, "R", "R")]
    x = randn(3, 63, 8)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


class Sizes(Mlp):
    """A block that uses its sizes alone, multiplied, halved, and as a number."""

    def forward(self, hidden):
        batch, rows, width = hidden.shape
        hidden = super().forward(hidden).reshape(batch * rows, width).view(batch, rows, width)
        return torch.cat([hidden[:, : rows // 2], hidden[:, rows // 2 : rows]], 1) / rows


@pytest.mark.parametrize("dynamic", [True, False])
def test_case_2_sizes_are_the_blocks_own(dynamic):
    model = Stack(Sizes(), Sizes())
    graph = capture(model, (X,), dynamic=dynamic)
    PassManager([OutlineBlocks(("layers.0",))])(graph.graph_module)
    rows = randn(2, 63, 8)[:, CHOSEN[:4]]
    with torch.no_grad():
        # Where S is fixed, the divisor is a number like any other, and only what is a size becomes R.
        expected = model.layers[0](rows) * (1 if dynamic else 4 / 5)
        assert deviation(body_of(graph.graph_module)(rows), expected) <= EAGER
        x = randn(3, 63, 8) if dynamic else X
        assert torch.equal(graph(x), model(x))


def test_case_3_parameters_of_others_come_in():
    class Shared(Mlp):
        def __init__(self, up):
            super().__init__()
            self.up = up

    up = nn.Linear(8, 16)
    model = Stack(Shared(up), Shared(up))
    graph = outlined(model, (X,), ["layers.0", "layers.1"])
    # One of them holds the parameters under its own name.
    sides = [side_shapes(body_of(graph.graph_module, f"layers.{i}")) for i in (0, 1)]
    assert sorted(sides) == [[], [(16, 8), (16,)]]
    x = randn(3, 63, 8)
    with torch.no_grad():
        assert torch.equal(graph(x), model(x))


def test_parameters_keep_their_names_and_are_the_models_own():
    model = Stack(Attention(fused=True), Mlp())
    graph = outlined(model, (X,), ["layers.0", "layers.1"])
    assert [name for name, _ in graph.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(graph.get_parameter(name) is parameter for name, parameter in model.named_parameters())
    assert nodes_of(graph.graph_module) == ["layers.0", "layers.1"]


def test_the_rest_can_be_outlined_later():
    model = Stack(Mlp(), Mlp(), Mlp())
    graph = outlined(model, (X,), ["layers.1"])
    PassManager([OutlineBlocks(("layers.0", "layers.1", "layers.2"))])(graph.graph_module)
    assert nodes_of(graph.graph_module) == ["layers.0", "layers.1", "layers.2"]
    x = randn(3, 63, 8)
    assert torch.equal(run_graph(graph.graph_module, x)[0], model(x))


# Contracts


def test_a_block_that_is_none_is_skipped_and_missed():
    graph_module = capture(Stack(Mlp(), nn.Linear(8, 4)), (X,)).graph_module
    stage = OutlineBlocks(("layers.0", "layers.1"))
    (skip,) = stage.call(graph_module).skips
    assert (skip.reason, skip.node) == ("no value enters and leaves with one shape", "layers.1")
    with pytest.raises(PassContractError, match="blocks could not be outlined") as caught:
        stage.ensures(graph_module)
    assert caught.value.details["found"] == "layers.1" and "inspect" in caught.value.details["fix"]


def test_a_block_that_holds_the_number_of_rows_in_another_form():
    class Halves(Mlp):
        def forward(self, hidden):
            first, second = hidden.split([2, 3], 1)
            return super().forward(torch.cat([first * 2, second], 1))

    graph_module = capture(Stack(Halves(), Halves()), (X,)).graph_module
    with pytest.raises(UnsupportedGraphError, match=r"block layers\.1 does not compute another number") as caught:
        OutlineBlocks(("layers.0", "layers.1")).call(graph_module)
    assert caught.value.details["expected"] == "a block in which S = 5 is the size of the sequence only"
    assert "Split sizes add up to 5" in caught.value.details["found"]


def test_a_block_whose_table_fits_the_examples_rows_only():
    """Nothing here says that S is a number: it follows from the range of an input's size."""
    class Placed(Mlp):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(randn(5, 8))

        def forward(self, hidden):
            return super().forward(hidden + self.table.tanh())

    class Halved(Stack):
        def forward(self, hidden):
            if not 9 <= hidden.shape[1] < 11:
                raise ValueError("9 or 10 rows")
            return super().forward(hidden[:, ::2])

    graph_module = capture(Halved(Placed(), Placed()), (randn(2, 9, 8),)).graph_module
    with pytest.raises(UnsupportedGraphError, match=r"block layers\.1 does not compute another number") as caught:
        OutlineBlocks(("layers.0", "layers.1")).call(graph_module)
    assert caught.value.details["expected"] == "a block in which S is the size of the sequence only"
    assert caught.value.details["found"] == "it takes 5 rows only"
