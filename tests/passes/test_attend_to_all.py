"""The chosen rows of a split block are, to the last bit but rounding, the rows that the whole block would give."""

import pytest
import torch
from modcompile.passes.attend_to_all import AttendToAll
from tiny import (
    WIDTH,
    Attention,
    Stack,
    check_rewrite,
    nodes_of,
    randn,
    randomise_routers,
    rewritten,
    run_graph,
    sub_graph_of,
)
from tolerances import TOLERANCES, deviation
from torch import nn
from torch.nn import functional

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import PassContractError, UnsupportedGraphError
from modcompile.pass_manager import PassManager
from modcompile.trace import trace_routing

# B batch  R rows  K capacity  H heads  D model dim  d head dim

aten, mod = torch.ops.aten, torch.ops.modcompile
SDPA = aten.scaled_dot_product_attention.default
EAGER = TOLERANCES["eager"][torch.float32]
HIDDEN = {"hidden": ("batch", "rows", 8)}
WEIGHTS = {name: torch.nn.Parameter(randn(8, 8, seed=seed) * 8**-0.5) for seed, name in enumerate(
    ["query", "key", "value", "out"], start=1)}
SIZES = {"batch": 3, "rows": 63}


def projected(call, hidden):
    """Queries, keys and values [B, H, R, d]."""
    batch, rows = (call(aten.sym_size.int, hidden, dim) for dim in (0, 1))
    parts = [call(aten.linear.default, hidden, call.tensor(name)) for name in ("query", "key", "value")]
    return [call(aten.transpose.int, call(aten.reshape.default, part, [batch, rows, 2, 4]), 1, 2) for part in parts]


def finished(call, hidden, mixed):
    """The heads' rows back in one, projected, beside the residual stream."""
    batch, rows = (call(aten.sym_size.int, hidden, dim) for dim in (0, 1))
    rows = call(aten.reshape.default, call(aten.transpose.int, mixed, 1, 2), [batch, rows, 8])
    return call(aten.add.Tensor, hidden, call(aten.linear.default, rows, call.tensor("out")))


class Scored(nn.Module):
    """A block whose attention is written out, with something done to its scores or its weights."""

    def __init__(self, scores=lambda a: a, weights=lambda a: a):
        super().__init__()
        self.parts, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Conv2d(2, 2, 3, padding=1)
        self.scale = nn.Conv2d(2, 2, 1)
        self.norm = nn.BatchNorm2d(2)
        self.scores, self.weights = scores, weights

    def forward(self, x):
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.parts(x).chunk(3, -1))
        weights = self.weights(self, self.scores(self, query @ key.transpose(-1, -2)).softmax(-1))
        return x + self.out((weights @ value).transpose(1, 2).flatten(2))


def scored(**steps):
    steps = {"scores": lambda _, a: a, "weights": lambda _, a: a} | steps
    torch.manual_seed(0)
    return Stack(Scored(**steps), Scored(**steps)).eval()


@pytest.mark.parametrize("steps", [
    {"scores": lambda _, a: a.masked_fill(torch.triu(torch.ones_like(a), 1).bool(), -1e9)},
    {"scores": lambda _, a: a + torch.full_like(a, -1e9).triu(1)},
    {"weights": lambda _, a: a.tril()},
    {"scores": lambda block, a: block.mix(a)},
    {"weights": lambda block, a: block.mix(a)},
    {"weights": lambda _, a: functional.instance_norm(a)},
    {"weights": lambda _, a: a.cumsum(-2)},
    {"weights": lambda _, a: a.roll(1, -2)},
    {"weights": lambda _, a: a.flip(-2)},
    {"scores": lambda _, a: a.log_softmax(-2)},
    {"scores": lambda _, a: a * a.max(-1, keepdim=True)[0].log_softmax(-2)},
], ids=["triu-mask", "triu-bias", "tril", "conv", "conv-weights", "instance-norm", "cumsum", "roll", "flip", "softmax",
        "softmax-of-largest"])
def test_scores_of_several_queries_together_are_refused(steps):
    """On the chosen rows' scores alone they would give something else, without a word."""
    with pytest.raises(UnsupportedGraphError, match=r"(?s)cannot attend to all rows.*are computed by themselves"):
        convert(scored(**steps), (randn(2, 5, 8),), MoDConfig(blocks="all", capacity_ratio=0.3, attend_to="all"))


@pytest.mark.parametrize("steps", [
    {"scores": lambda block, a: block.scale(a)},
    {"weights": lambda block, a: block.norm(a)},
    {"scores": lambda _, a: a.log_softmax(-1).cumsum(-1)},
    {"scores": lambda _, a: torch.where(a > 0, a, torch.zeros_like(a))},
    {"scores": lambda _, a: a - a.amax(dim=-1, keepdim=True).detach()},
    {"scores": lambda _, a: a - a.max(-1, keepdim=True)[0]},
    {"scores": lambda _, a: (a / 32 - (a / 32).amax(-1, keepdim=True)) * 32},
    {"weights": lambda _, a: a / (1e-6 + a.sum(dim=-1, keepdim=True))},
    {"scores": lambda _, a: a - a.mean((1, -1), keepdim=True)},
    {"weights": lambda _, a: a.chunk(2, 1)[0] - 0.3 * a.chunk(2, 1)[1]},
], ids=["conv-1x1", "batch-norm", "along-keys", "zeros-like", "largest", "largest-of-max", "largest-scaled", "sum",
        "mean", "differential"])
@torch.no_grad()
def test_scores_of_each_query_apart_are_taken(steps):
    model, x = scored(**steps), randn(3, 63, 8, seed=1)
    mod = randomise_routers(convert(model, (randn(2, 5, 8),), MoDConfig(
        blocks=(1,), capacity_ratio=0.3, attend_to="all", gate="straight-through")))
    with trace_routing(mod) as trace:
        out = mod(x)
    taken = trace["layers.1"].taken()
    assert deviation(out[taken], model(x)[taken]) <= EAGER
    assert torch.equal(out[~taken], model.layers[0](x)[~taken])


def written(call, hidden, between):
    query, key, value = projected(call, hidden)
    scored = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    weights = call(aten.softmax.int, between(call, scored), -1)
    return finished(call, hidden, call(aten.matmul.default, weights, value))


def split(build, inputs=HIDDEN, dtypes=None):
    """The sub-graph before and after."""
    before, after, _ = rewritten(AttendToAll(("block",)), lambda: sub_graph_of(inputs, build, WEIGHTS, dtypes))
    return before.get_submodule("block"), after.get_submodule("block")


def assert_chosen_rows(build, inputs=HIDDEN, dtypes=None):
    """The split block gives rows of the whole block; returns what it calls."""
    before, after = split(build, inputs, dtypes)
    hidden, *sides = (randn(*(SIZES.get(size, size) for size in shape), seed=i)
                      for i, shape in enumerate(inputs.values()))
    sides = [side > 0 if name in (dtypes or {}) else side for name, side in zip([*inputs][1:], sides, strict=True)]
    positions = torch.stack([torch.randperm(63, generator=torch.Generator().manual_seed(b))[:5].sort().values
                             for b in range(3)])
    expected = mod.gather_rows(run_graph(before, hidden, *sides), positions)
    assert deviation(run_graph(after, hidden, positions, *sides), expected) <= EAGER
    return nodes_of(after)


def causal(call, hidden):
    return finished(call, hidden, call(SDPA, *projected(call, hidden), None, 0.0, True))


def test_golden():
    before, after, _ = rewritten(AttendToAll(("block",)), lambda: sub_graph_of(HIDDEN, causal, WEIGHTS))
    check_rewrite("attend_to_all", before, after)


def test_case_1_keys_and_values_are_computed_on_all_rows():
    _, after = split(causal)
    rows = {node.args[1].name: node.meta["val"].shape[1]
            for node in after.graph.find_nodes(op="call_function", target=aten.linear.default)}
    hidden, positions = (node.meta["val"] for node in after.graph.find_nodes(op="placeholder"))
    assert rows == {"query": positions.shape[1], "key": hidden.shape[1], "value": hidden.shape[1],
                    "out": positions.shape[1]}


def test_case_1_a_bias_of_the_rows_themselves():
    """One that every query has for every key."""
    def build(call, hidden):
        scored = call(aten.select.int, hidden, 2, 0)
        outer = call(aten.mul.Tensor, call(aten.unsqueeze.default, scored, 2), call(aten.unsqueeze.default, scored, 1))
        bias = call(aten.unsqueeze.default, outer, 1)  # [B, 1, R, R]
        return written(call, hidden, lambda call, scored: call(aten.add.Tensor, scored, bias))

    assert_chosen_rows(build)


def test_case_2_a_layout_with_the_sequence_first():
    def build(call, hidden):
        first = call(aten.relu.default, call(aten.transpose.int, hidden, 0, 1))  # [R, B, D]
        return causal(call, call(aten.transpose.int, first, 0, 1))

    assert_chosen_rows(build)


def test_case_2_batch_and_rows_in_one_dim():
    def build(call, hidden):
        batch, rows = (call(aten.sym_size.int, hidden, dim) for dim in (0, 1))
        flat = call(aten.relu.default, call(aten.reshape.default, hidden, [-1, 8]))  # [B * R, D]
        return causal(call, call(aten.reshape.default, flat, [batch, rows, 8]))

    assert_chosen_rows(build)


@pytest.mark.parametrize(("lead", "gathers"), [("batch", "modcompile.gather_rows.default"), (1, "aten.index.Tensor")])
def test_case_2_a_table_of_places_is_gathered_for_queries_alone(lead, gathers):
    def build(call, hidden, table):
        query, key, value = projected(call, hidden)
        turned = [call(aten.mul.Tensor, part, table) for part in (query, key)]
        return finished(call, hidden, call(SDPA, *turned, value, None, 0.0, True))

    nodes = assert_chosen_rows(build, {**HIDDEN, "table": (lead, 1, "rows", 4)})
    # Beside it, only the hidden state is.
    assert nodes.count(gathers) == (2 if lead == "batch" else 1)


@pytest.mark.parametrize("shape", [("batch", 1, "rows", "rows"), (1, 2, "rows", "rows"), ("batch", 1, 1, "rows")])
def test_case_3_a_mask_of_a_fused_attention(shape):
    def build(call, hidden, mask):
        return finished(call, hidden, call(SDPA, *projected(call, hidden), mask))

    assert_chosen_rows(build, {**HIDDEN, "mask": shape})


def test_case_3_a_mask_of_bools_and_a_scale():
    def build(call, hidden, mask):
        return finished(call, hidden, call(SDPA, *projected(call, hidden), attn_mask=mask, scale=0.25))

    assert_chosen_rows(build, {**HIDDEN, "mask": ("batch", 1, "rows", "rows")}, {"mask": "bool"})


@pytest.mark.parametrize("shape", [("batch", 2, "rows", "rows"), (1, 1, "rows", "rows"), (1, 1, 1, "rows")])
def test_case_3_masks_of_one_that_is_written_out(shape):
    def build(call, hidden, bias, drop):
        def between(call, scored):
            capped = call(aten.mul.Tensor, call(aten.tanh.default, call(aten.div.Tensor, scored, 3)), 3)
            return call(aten.masked_fill.Scalar, call(aten.add.Tensor, capped, bias), drop, -1e9)

        return written(call, hidden, between)

    assert_chosen_rows(build, {**HIDDEN, "bias": shape, "drop": (1, 1, "rows", "rows")}, {"drop": "bool"})


@pytest.mark.parametrize("rows", [1, "rows"])
def test_case_3_heads_folded_into_the_batch(rows):
    def build(call, hidden, bias):
        query, key, value = (call(aten.flatten.using_ints, part, 0, 1) for part in projected(call, hidden))
        scored = call(aten.bmm.default, query, call(aten.transpose.int, key, 1, 2))
        folded = call(aten.flatten.using_ints, bias, 0, 1)
        weights = call(aten.softmax.int, call(aten.add.Tensor, scored, folded), -1)
        mixed = call(aten.unflatten.int, call(aten.bmm.default, weights, value), 0, [-1, 2])
        return finished(call, hidden, mixed)

    assert_chosen_rows(build, {**HIDDEN, "bias": ("batch", 2, rows, "rows")})


def test_case_4_the_last_size_of_scores_stays():
    def build(call, hidden):
        batch, rows = (call(aten.sym_size.int, hidden, dim) for dim in (0, 1))

        def between(call, scored):
            flat = call(aten.reshape.default, scored, [call(aten.sym_size.int, scored, 0), 2, rows, rows])
            return call(aten.reshape.default, flat, [batch, 2, rows, rows])

        return written(call, hidden, between)

    assert_chosen_rows(build)


def test_what_follows_works_on_chosen_rows():
    """A gate of each row, a table of places, and a size."""
    def build(call, hidden, table):
        mixed = causal(call, hidden)
        gate = call(aten.sigmoid.default, call(aten.mean.dim, hidden, [2], True))
        batch, rows = (call(aten.sym_size.int, mixed, dim) for dim in (0, 1))
        mixed = call(aten.reshape.default, call(aten.reshape.default, mixed, [-1, 8]), [batch, rows, 8])
        return call(aten.add.Tensor, call(aten.mul.Tensor, mixed, gate), table)

    assert_chosen_rows(build, {**HIDDEN, "table": (1, "rows", 8)})


# Contracts


def test_a_block_without_attention():
    with pytest.raises(UnsupportedGraphError, match="block block cannot attend to all rows") as caught:
        split(lambda call, hidden: call(aten.relu.default, hidden))
    assert caught.value.details["found"] == "no attention: neither scaled_dot_product_attention nor a softmax"
    assert caught.value.details["fix"] == 'use attend_to="chosen"' and caught.value.details["where"] == "block"


def test_two_attentions_written_out_one_after_the_other():
    def build(call, hidden):
        return written(call, written(call, hidden, lambda call, scored: scored), lambda call, scored: scored)

    with pytest.raises(UnsupportedGraphError, match="cannot attend to all rows") as caught:
        split(build)
    assert caught.value.details["found"] == "2 self-attentions"


def test_a_bias_without_a_batch():
    def build(call, hidden, bias):
        own = call(aten.squeeze.dim, bias, 0)  # [H, R, R]
        return written(call, hidden, lambda call, scored: call(aten.add.Tensor, scored, own))

    with pytest.raises(UnsupportedGraphError, match="cannot attend to all rows") as caught:
        split(build, {**HIDDEN, "bias": (1, 2, "rows", "rows")})
    assert "a leading dim of the batch" in caught.value.details["expected"]
    assert caught.value.details["where"] == "squeeze_dim"


def test_a_value_of_pairs_of_rows():
    def build(call, hidden):
        pairs = call(aten.tanh.default, call(aten.bmm.default, hidden, call(aten.transpose.int, hidden, 1, 2)))
        own = call(aten.mean.dim, pairs, [2], True)  # [B, R, 1]
        return call(aten.mul.Tensor, causal(call, call(aten.bmm.default, pairs, hidden)), own)

    with pytest.raises(UnsupportedGraphError, match="cannot attend to all rows") as caught:
        split(build)
    assert "one dim along the sequence" in caught.value.details["expected"]
    assert caught.value.details["where"] == "tanh_default"


def test_a_block_that_is_not_outlined():
    with pytest.raises(PassContractError, match="blocks are not outlined"):
        PassManager([AttendToAll(("other",))])(sub_graph_of(HIDDEN, causal, WEIGHTS))


def test_a_block_that_gives_other_rows():
    graph_module = sub_graph_of({**HIDDEN, "positions": ("batch", "capacity")},
                                lambda call, hidden, positions: call(aten.relu.default, hidden),
                                dtypes={"positions": "int64"})
    with pytest.raises(PassContractError, match="a split block gives the wrong rows") as caught:
        PassManager([AttendToAll(("block",))])(graph_module)
    details = caught.value.details
    assert details["where"] == "block" and details["expected"] != details["found"]


class MixesRows(nn.Module):
    """Attention, then something that sees several rows at once."""

    def __init__(self, mix):
        super().__init__()
        self.attention, self.mix = Attention(), mix
        self.weight = nn.Parameter(torch.ones(WIDTH, 1, 3))

    def forward(self, hidden):
        hidden = self.attention(hidden)
        return hidden + self.mix(hidden, self.weight)


@pytest.mark.parametrize("mix", [
    lambda hidden, weight: hidden.mean(1, keepdim=True),
    lambda hidden, weight: hidden.cumsum(1),
    lambda hidden, weight: functional.conv1d(hidden.transpose(1, 2), weight, padding=1, groups=WIDTH).transpose(1, 2),
    lambda hidden, weight: functional.pad(hidden[:, :-1], (0, 0, 1, 0)),
    lambda hidden, weight: hidden[:, :1],
    lambda hidden, weight: hidden[:, 0].unsqueeze(1),
    lambda hidden, weight: hidden @ (hidden.transpose(1, 2) @ hidden),
    lambda hidden, weight: torch.einsum("bid,bjd,bje->bie", hidden, hidden, hidden),
    lambda hidden, weight: hidden.sort(1).values,
    lambda hidden, weight: functional.layer_norm(hidden.transpose(1, 2), hidden.shape[1:2]).transpose(1, 2),
    lambda hidden, weight: functional.group_norm(hidden.transpose(1, 2), 2).transpose(1, 2),
    lambda hidden, weight: hidden.roll(1, 1),
    lambda hidden, weight: hidden / hidden.shape[1],
    lambda hidden, weight: hidden.logcumsumexp(1),
    lambda hidden, weight: hidden.repeat(1, 2, 1)[:, ::2],
    lambda hidden, weight: (hidden.reshape(len(hidden), WIDTH, -1) + weight[:, 0, :1]).reshape(hidden.shape),
], ids=["mean", "cumsum", "convolution", "shift", "first", "select", "linear attention", "einsum", "sort", "layer norm",
        "group norm", "roll", "number of rows", "logcumsumexp", "repeated", "scrambled"])
def test_rows_that_are_mixed_outside_of_attention_are_refused(mix):
    model = Stack(MixesRows(mix), MixesRows(mix))
    with pytest.raises(UnsupportedGraphError, match="cannot attend to all rows") as caught:
        convert(model, (torch.randn(2, 5, WIDTH),), MoDConfig(attend_to="all", capacity_ratio=0.5))
    assert "no operation but attention" in caught.value.details["expected"]


def assert_routed(mod, model, x):
    """The chosen rows are what the dense model's own layers make of them."""
    with torch.no_grad(), trace_routing(mod) as trace:
        made, hidden = mod(x), x
        for layer, block in zip(model.layers, trace.values(), strict=True):
            hidden = torch.where(block.taken()[..., None], layer(hidden), hidden)
    assert torch.allclose(made, hidden, atol=1e-5)


@pytest.mark.parametrize("mix", [
    lambda hidden, weight: hidden.softmax(-1),
    lambda hidden, weight: hidden[..., 1:2] * functional.layer_norm(hidden, (WIDTH,)),
    lambda hidden, weight: torch.cat([hidden[..., 4:], hidden[..., :4]], -1).sort(-1).values,
    lambda hidden, weight: hidden @ weight[:, 0, :1].expand(-1, WIDTH),
    lambda hidden, weight: torch.einsum("bid,ed->bie", hidden, weight[:, 0, :1].expand(-1, WIDTH)),
    lambda hidden, weight: weight[hidden.argmax(-1), 0, :1] * functional.glu(hidden.repeat(1, 1, 2)),
    lambda hidden, weight: functional.pad(hidden, (1, 0))[..., :-1].topk(1).values,
    lambda hidden, weight: hidden.masked_fill(hidden > 0, 0.0).chunk(2, -1)[0].norm(dim=-1, keepdim=True),
    lambda hidden, weight: torch.stack([hidden, -hidden], 3).amax(3).where(hidden > 0, 0.0),
    lambda hidden, weight: functional.layer_norm(hidden.reshape(-1, WIDTH // 2), (WIDTH // 2,)).view(hidden.shape),
], ids=["softmax", "norm", "halves", "product", "einsum", "table", "pad", "chunk", "stack", "halves as rows"])
def test_rows_that_are_apart_are_routed(mix):
    model, x = Stack(MixesRows(mix), MixesRows(mix)).eval(), torch.randn(3, 9, WIDTH)
    mod = randomise_routers(convert(model, (x[:2, :5],), MoDConfig(
        blocks="all", attend_to="all", capacity_ratio=0.5, gate="straight-through")))
    assert_routed(mod, model, x)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_of_fixed_sizes(batch):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(batch, 9, WIDTH)
    mod = randomise_routers(convert(capture(model, (x,), dynamic=False), config=MoDConfig(
        blocks="all", attend_to="all", capacity_ratio=0.5, gate="straight-through")))
    assert_routed(mod, model, x)
