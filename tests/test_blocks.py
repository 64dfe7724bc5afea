"""What can be routed in a model, why the rest cannot, and which blocks the options choose."""

import re

import pytest
import torch
from tiny import Attention, Block, Mlp, Stack, randn, randomise_routers
from torch import Tensor, nn

from modcompile.blocks import find_blocks, select_blocks
from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.trace import trace_routing

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


def reasons(model, *example, **options):
    return {block.path: block.reason for block in find_blocks(capture(model.eval(), example or (X,), **options))}


# Which modules are blocks


def test_blocks_of_a_list():
    report = find_blocks(Stack(Block(), Block(causal=True), Mlp()), (X,))
    assert [(block.path, block.group, block.index, block.hidden_shape) for block in report] == [
        (f"layers.{i}", "layers", i, ("batch", "sequence", 8)) for i in range(3)]
    assert all(block.routable for block in report) and len(report.routable) == len(report) == 3


class Two(nn.Module):
    """An encoder and a decoder that looks at it."""

    class Cross(Attention):
        def forward(self, hidden: Tensor, memory: Tensor) -> Tensor:
            scores = self.query(hidden) @ self.key(memory).transpose(1, 2)  # [B, S, M]
            return hidden + self.out(torch.softmax(scores, -1) @ self.value(memory))

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Stack(Block(), Block(), Block()), nn.ModuleList([self.Cross(), self.Cross()])

    def forward(self, words, target):
        memory = self.encoder(words)
        for layer in self.decoder:
            target = layer(target, memory)
        return target


def test_two_lists_are_two_groups():
    report = find_blocks(Two(), (X, torch.randn(2, 7, 8)))
    assert {group: [block.path for block in blocks] for group, blocks in report.groups.items()} == {
        "encoder.layers": [f"encoder.layers.{i}" for i in range(3)],
        "decoder": ["decoder.0", "decoder.1"]}
    assert [block.hidden_shape for block in report.groups["decoder"]] == [("batch", "target_1", 8)] * 2
    assert select_blocks(report, MoDConfig()) == ["encoder.layers.1", "decoder.1"]


def test_a_cross_attention_keeps_all_of_its_memory():
    """Of two lengths only the decoder's is routed."""
    model = Two()
    x, y = torch.randn(3, 63, 8), torch.randn(3, 33, 8)
    mod = convert(model, (X, torch.randn(2, 7, 8)), MoDConfig(blocks="decoder.1", capacity_ratio=5 / 33))
    with torch.no_grad():
        memory = model.encoder(x)
        hidden = model.decoder[0](y, memory)
        # New routers take the first rows.
        expected = torch.cat([model.decoder[1](hidden[:, :5], memory), hidden[:, 5:]], 1)
        assert (mod(x, y) - expected).abs().max() < 1e-6


def test_experts_inside_a_block_are_left_to_it():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden):
            weights = self.gate(hidden).softmax(-1)
            return hidden + sum(weights[..., i, None] * expert(hidden) for i, expert in enumerate(self.experts))

    model = Stack(Experts(), Experts())
    assert reasons(model) == {"layers.0": None, "layers.1": None}
    mod = convert(model, (X,), MoDConfig(capacity_ratio=1))
    with torch.no_grad():
        assert torch.equal(mod(X), model(X))


def test_lists_of_lists():
    assert reasons(Stack(Stack(Mlp(), Mlp()), Stack(Mlp(), Mlp()))) == {"layers.0": None, "layers.1": None}


def test_tensors_of_another_module_are_side_inputs():
    class Shared(Mlp):
        def __init__(self, up):
            super().__init__()
            self.up = up

    up = nn.Linear(8, 16)
    model = Stack(Shared(up), Shared(up), Shared(up))
    mod = convert(model, (X,), MoDConfig(capacity_ratio=1, blocks="all"))
    with torch.no_grad():
        assert torch.equal(mod(X), model(X))
    assert len(list(mod.routers)) == 3
    assert mod.get_parameter("layers.2.up.weight") is up.weight


# Why not


def test_a_model_without_repeated_blocks():
    assert reasons(nn.Linear(8, 8)) == {}
    with pytest.raises(UsageError, match="the model has no block that can be routed") as caught:
        convert(nn.Linear(8, 8), (X,))
    assert caught.value.details["found"] == "no repeated sub-modules" and "fix" in caught.value.details


def test_one_block_is_not_repeated_and_an_activation_is_no_block():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, hidden):
            return hidden + self.mlp(hidden)

    assert reasons(Stack(Wide())) == {
        "layers.0.mlp.0": "no value enters and leaves with one shape",
        "layers.0.mlp.1": "it has no parameters: there is too little in it to save",
        "layers.0.mlp.2": "no value enters and leaves with one shape"}


def test_two_hidden_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden):
            inner = torch.tanh(self.a(hidden))
            return hidden + inner, self.b(inner)

    class Sums(Stack):
        def forward(self, hidden):
            total = 0
            for layer in self.layers:
                hidden, more = layer(hidden)
                total = total + more
            return hidden, total

    model = Sums(Two(), Two())
    one, other = "add [batch, sequence, 8]", "linear_1 [batch, sequence, 8]"
    assert reasons(model)["layers.0"] == f"2 hidden outputs: {one}, {other}; a routed block has one"
    with pytest.raises(UsageError, match="no block that can be routed") as caught:
        convert(model, (X,))
    assert "layers.0: 2 hidden outputs" in caught.value.details["found"]


def test_two_hidden_inputs():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, one, other):
            return one + self.a(other), other + self.b(one)

    class Streams(Stack):
        def forward(self, hidden):
            other = hidden * 2
            for layer in self.layers:
                hidden, other = layer(hidden, other)
            return hidden + other

    found = reasons(Streams(Cross(), Cross()))
    assert all(reason.startswith("2 hidden inputs: ") and reason.endswith("a routed block has one")
               for reason in found.values())


def test_a_layer_that_is_called_again_is_refused():
    class Again(Stack):
        def forward(self, hidden):
            return super().forward(super().forward(hidden))

    found = reasons(Again(Mlp(), Mlp()))
    assert all(reason.startswith("2 hidden inputs: ") for reason in found.values())
    with pytest.raises(UsageError, match="no block that can be routed"):
        convert(Again(Mlp(), Mlp()), (X,))


def test_a_sequence_before_the_batch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    found = reasons(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    assert set(found.values()) == {"attention runs along dim 0 of the hidden state, which is [S, B, D]; a routed block "
                                   "has [B, S, D] (batch_first=True)"}


def test_a_sequence_before_the_batch_in_attention_that_is_written_out():
    class Layer(Mlp):
        def forward(self, x):
            mixed = torch.einsum("qbd,kbd->bqk", x, x).softmax(-1) @ x.transpose(0, 1)
            return super().forward(x + mixed.transpose(0, 1))

    found = reasons(Stack(Layer(), Layer()), randn(7, 3, 8))
    assert set(found.values()) and all("batch_first=True" in str(reason) for reason in found.values()), found


def test_a_residual_outside_of_the_blocks():
    class Outside(Stack):
        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    found = reasons(Outside(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
                            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))))
    assert len(found) == 2 and all("residual is outside" in str(reason) for reason in found.values()), found


@pytest.mark.parametrize("step", [
    lambda model, x, layer, norm: x + layer(norm(x)),
    lambda model, x, layer, norm: x + norm(layer(x)),
    lambda model, x, layer, norm: norm(layer(x) + x),
    lambda model, x, layer, norm: norm(1.5 * x + layer(x)),
    lambda model, x, layer, norm: x + model.drop(model.scale * layer(x)),
    lambda model, x, layer, norm: x + layer(x * (x * x).mean(-1, keepdim=True).rsqrt() * model.scale),
], ids=["norm-before", "norm-after", "post-norm", "scaled", "dropout", "written-out"])
def test_a_residual_outside_of_the_blocks_beside_other_steps(step):
    """Rows that pass by would become x + norm(x), 2.5 x or the like, without a word."""
    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
            self.scale, self.drop = nn.Parameter(torch.ones(8)), nn.Dropout(0.1)

        def forward(self, x):
            for layer, norm in zip(self.layers, self.norms, strict=True):
                x = step(self, x, layer, norm)
            return x

    found = reasons(Outside())
    assert all("residual is outside" in str(found[f"layers.{i}"]) for i in range(2)), found
    assert all("only norms" in str(found.get(f"norms.{i}", "only norms")) for i in range(2)), found


def test_what_comes_back_from_the_start_is_no_residual():
    """As in modded-nanogpt: each block takes a mixture of what the one before gave and of the first hidden state."""
    class Mixed(Stack):
        def __init__(self):
            super().__init__(Mlp(), Mlp(), Mlp())
            self.mix = nn.Parameter(torch.rand(3, 2))

        def forward(self, x):
            start = x
            for layer, mix in zip(self.layers, self.mix, strict=True):
                x = layer(mix[0] * x + mix[1] * start)
            return x + start

    assert not any(reasons(Mixed()).values())


def test_a_size_that_is_computed_from_values():
    class Spanned(Mlp):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.empty(64, 8))

        def forward(self, x):
            span = torch.tensor(x.shape[1]).clamp(max=16).item()
            torch._check(span >= 2)
            torch._check(span <= 16)
            return super().forward(x + self.table[:span].mean(0) + torch.einsum("bsd,td->bst", x, self.table[:span]
                                                                                ).amax(-1, keepdim=True))

    found = reasons(Stack(Spanned(), Spanned()))
    assert all("computed from a tensor's values" in str(reason) for reason in found.values()), found


def test_long_skips_and_conditions_of_one_block():
    """What only one block takes is not its hidden state if another value comes from a block, or skips over some."""
    class Conditioned(Mlp):
        def forward(self, x, condition=None, skip=None):
            x = x if condition is None else x * condition.sigmoid()
            return super().forward(x if skip is None else x + skip)

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Conditioned() for _ in range(5))
            self.conditions = nn.Linear(8, 16)

        def forward(self, x):
            first, second = self.conditions(x.tanh()).chunk(2, -1)
            x1 = self.blocks[0](x, first)
            x2 = self.blocks[1](x1, second)
            x3 = self.blocks[2](x2)
            return self.blocks[4](self.blocks[3](x3, None, x1), None, x)

    found = reasons(Skips())
    assert all("2 hidden inputs" in str(found[f"blocks.{i}"]) for i in (0, 1)), found


def test_a_number_along_the_features_that_happens_to_be_s():
    """S is fixed at 4, half of the features."""
    class Layer(Mlp):
        def forward(self, x):
            h = self.norm(x)
            h = torch.cat((-h[..., 4:], h[..., :4]), -1) + h[..., 4:5] + h.select(-1, 4)[..., None] + h.roll(4, -1)
            return x + self.down(torch.relu(self.up(h)))

    class Fixed(Stack):
        def __init__(self):
            super().__init__(Layer(), Layer(), Layer())
            self.places = nn.Parameter(randn(1, 4, 8, seed=3))

        def forward(self, x):
            return super().forward(x + self.places)

    model, x = Fixed(), randn(3, 4, 8, seed=2)
    mod = randomise_routers(convert(model, (randn(2, 4, 8),), MoDConfig(blocks=(1,), capacity_ratio=0.5,
                                                                        gate="straight-through")))
    with torch.no_grad(), trace_routing(mod) as trace:
        out = mod(x)
        before = model.layers[0](x + model.places)
        after = torch.where(trace["layers.1"].taken()[..., None], model.layers[1](before), before)
        assert torch.allclose(out, model.layers[2](after), atol=1e-6)


def test_a_hidden_state_of_another_rank():
    class Flat(Stack):
        def forward(self, hidden):
            return super().forward(hidden.flatten(0, 1))

    assert reasons(Flat(Mlp(), Mlp()))["layers.1"] == "the hidden state add [batch*sequence, 8] is not [B, S, D]"


def test_an_output_of_another_dtype():
    class Half(Mlp):
        def forward(self, hidden):
            return super().forward(hidden.float()).half()

    class Mixed(Stack):
        def forward(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden).float()
            return hidden

    assert all("is not shaped like the input" in reason for reason in reasons(Mixed(Half(), Half())).values())


def test_one_row():
    assert set(reasons(Stack(Mlp(), Mlp()), X[:, :1]).values()) == {"S = 1: there is nothing to choose from"}


def test_a_fixed_size_that_is_also_a_features():
    found = reasons(Stack(Mlp(), Mlp()), torch.randn(2, 16, 8), dynamic=False)
    assert set(found.values()) == {
        "S = 16 is fixed and also the size of a parameter's dim, so the two cannot be told apart; choose an input with "
        "another number of tokens, or keep tables of positions out of the block"}


def test_reasons_name_sizes_as_the_inputs_do():
    """A symbol's own number differs from process to process."""
    for reason in reasons(Two(), X, torch.randn(2, 7, 8)).values():
        assert reason is None or not re.search(r"\bs\d", reason)


# Which blocks


@pytest.fixture(scope="module")
def report():
    return find_blocks(Stack(Mlp(), Mlp(), Mlp(), nn.Linear(8, 4)), (X,))


@pytest.mark.parametrize(("blocks", "chosen"), [
    ("every-other", ["layers.1"]),
    ("all", ["layers.0", "layers.1", "layers.2"]),
    ([2, 0], ["layers.0", "layers.2"]),
    ("layers.*", ["layers.0", "layers.1", "layers.2"]),
    ("layers.[01]", ["layers.0", "layers.1"]),
    (["layers.2", "layers.0"], ["layers.0", "layers.2"]),
    ([1, 1], ["layers.1"]),
])
def test_the_options_choose(report, blocks, chosen):
    assert select_blocks(report, MoDConfig(blocks=blocks)) == chosen


@pytest.mark.parametrize(("blocks", "problem"), [
    ("layer.*", "blocks names no block: 'layer.*'"),
    ([7], "blocks names no block: 7"),
    ([-1], "blocks names no block: -1"),
    ("layers.3", "block layers.3 cannot be routed"),
    ([3], "block layers.3 cannot be routed"),
    ("layers.[3]", "no block of 'layers.[3]' can be routed"),
    ([], "blocks chooses nothing to route"),
])
def test_options_that_choose_nothing(report, blocks, problem):
    with pytest.raises(UsageError) as caught:
        select_blocks(report, MoDConfig(blocks=blocks))
    assert caught.value.problem == problem and caught.value.details["where"] == "MoDConfig.blocks"
    assert "layers.0, layers.1, layers.2" in caught.value.details["expected"]


def test_every_other_of_one():
    with pytest.raises(UsageError, match="blocks chooses nothing to route") as caught:
        convert(Stack(Mlp(), nn.Linear(8, 4)), (X,))
    assert caught.value.details["fix"] == 'pass blocks="all", or name the blocks'


# Sizes that are numbers


class Patches(nn.Module):
    """An image of 9 patches and a class token: S is 10 as the forward checks, or as its positions are, or not fixed."""

    def __init__(self, fixed: str | None):
        super().__init__()
        self.strict = fixed == "checked"
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, 10 if fixed else 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, image):
        if self.strict and image.shape[2:] != (12, 12):
            raise ValueError("an image has 12 x 12 pixels")
        hidden = self.patch(image).flatten(2).transpose(1, 2)
        hidden = torch.cat([hidden.mean(1, keepdim=True), hidden], 1) + self.positions
        return self.encoder(hidden)


@pytest.mark.parametrize(("fixed", "dynamic", "rows"), [
    ("checked", True, 10), ("checked", False, 10), ("positions", True, 10),
    (None, True, "((image_2//4))*((image_3//4)) + 1")])
def test_an_image(fixed, dynamic, rows):
    """nn.MultiheadAttention merges S with B and with B * H: all three become K."""
    torch.manual_seed(0)
    model = Patches(fixed).eval()
    graph = capture(model, (torch.randn(2, 3, 12, 12),), dynamic=dynamic)
    mod = convert(graph, None, MoDConfig(blocks="all", capacity_ratio=0.3))
    assert [block.rows for block in mod.routed_blocks] in ([rows] * 2, ["((image_3//4))*((image_2//4)) + 1"] * 2)
    images = torch.randn(2 if not dynamic else 3, 3, 12, 12)
    with torch.no_grad():
        hidden = model.patch(images).flatten(2).transpose(1, 2)
        hidden = torch.cat([hidden.mean(1, keepdim=True), hidden], 1) + model.positions
        for layer in model.encoder.layers:
            # New routers take the first rows.
            hidden = torch.cat([layer(hidden[:, :3]), hidden[:, 3:]], 1)
        assert (mod(images) - hidden).abs().max() < 1e-5


class Placed(nn.Module):
    """Adds a number for each of 15 positions inside the block."""

    def __init__(self, bounded: bool):
        super().__init__()
        self.bounded, self.mlp = bounded, Mlp()
        self.table = nn.Parameter(randn(15, 8, seed=2))

    def forward(self, hidden):
        return self.mlp(hidden + (self.table.tanh() if self.bounded else self.table))


class Pictures(nn.Module):
    """15 patches, without a word on the size of the image: only the tables fix it."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.patch, self.positions = nn.Conv2d(3, 8, 4, 4), nn.Parameter(randn(15, 8, seed=3))
        self.stack = Stack(*layers)

    def forward(self, image):
        return self.stack(self.patch(image).flatten(2).transpose(1, 2) + self.positions)


@pytest.mark.parametrize("batch", [1, 2, 15])
def test_what_a_block_computes_for_each_position_is_gathered(batch):
    model = Pictures(Placed(True), Placed(True)).eval()
    config = MoDConfig(blocks=[1], capacity_ratio=0.4, gate="straight-through")
    mod = randomise_routers(convert(model, (randn(2, 3, 12, 20),), config))
    images = randn(batch, 3, 12, 20, seed=4)
    with torch.no_grad(), trace_routing(mod) as trace:
        out = mod(images)
        before = model.stack.layers[0](model.patch(images).flatten(2).transpose(1, 2) + model.positions)
        # Its rows do not see each other.
        after = torch.where(trace["stack.layers.1"].taken()[..., None], model.stack.layers[1](before), before)
        assert torch.allclose(out, after, atol=1e-6)


def test_a_table_of_positions_in_a_block_is_refused():
    found = reasons(Pictures(Placed(False), Mlp()), randn(2, 3, 12, 20))
    assert found["stack.layers.1"] is None and found["stack.layers.0"].startswith("S = 15 is fixed and also the size")


def test_a_number_that_happens_to_be_s_stays():
    class Scaled(Mlp):
        def forward(self, hidden):
            return super().forward(hidden) * 5

    model = Stack(Scaled(), Mlp())
    mod = convert(capture(model, (X,), dynamic=False), None, MoDConfig(blocks=[0], capacity_ratio=0.4))
    with torch.no_grad():
        expected = model.layers[1](torch.cat([model.layers[0](X[:, :2]), X[:, 2:]], 1))
        assert (mod(X) - expected).abs().max() < 1e-6


def test_a_mask_that_meets_folded_heads_is_refused():
    class Weighed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, hidden, mask):
            return hidden + self.attention(hidden, hidden, hidden, attn_mask=mask, need_weights=True)[0]

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Weighed() for _ in range(2))

        def forward(self, hidden):
            mask = torch.triu(torch.full((hidden.shape[1], hidden.shape[1]), -1e4), 1)
            for layer in self.layers:
                hidden = layer(hidden, mask)
            return hidden

    report = find_blocks(Masked().eval(), (torch.randn(2, 5, 8),))
    assert not report.routable and "heads and sequences in one dim" in report.blocks[0].reason


class Written(nn.Module):
    """Attention that is written out, its mask a number that takes the place of scores."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, hidden):
        query, key, value = self.qkv(hidden).chunk(3, -1)
        seen = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()
        scores = torch.where(seen, query @ key.transpose(1, 2), -1e9)
        return hidden + self.out(scores.softmax(-1) @ value)


@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_a_mask_that_chooses_between_scores_and_a_number(attend_to):
    model, x = Stack(Written(), Written()).eval(), torch.randn(3, 9, 8)
    mod = convert(model, (x[:2, :5],), MoDConfig(attend_to=attend_to, capacity_ratio=1.0, gate="straight-through"))
    assert torch.allclose(mod(x), model(x), atol=1e-6)


class Sorting(Mlp):
    """Puts the rows of all sequences in an order, and back."""

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        order = flat[:, 0].argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0])
        return super().forward(flat[order][back].view_as(hidden))


class Complex(Mlp):
    """Turns pairs of numbers by complex factors that are given."""

    def forward(self, hidden, angles):
        turned = torch.view_as_complex(hidden.unflatten(-1, (4, 2))) * angles
        return super().forward(torch.view_as_real(turned).flatten(2))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Complex(), Complex()])

    def forward(self, hidden):
        angles = torch.polar(torch.ones(hidden.shape[1], 4), torch.arange(hidden.shape[1])[:, None] / torch.ones(4))
        for layer in self.layers:
            hidden = layer(hidden, angles)
        return hidden


class OneLength(Two):
    """A decoder of as many rows as the encoder that it looks at."""

    def forward(self, words):
        return super().forward(words, words.relu())


@torch.no_grad()
def test_lists_of_one_length_are_told_apart():
    model, x = OneLength().eval(), randn(3, 63, 8)
    mod = convert(model, (X,), MoDConfig(blocks="all", capacity_ratio=1.0))
    assert list(mod.routers) == ["encoder.layers.0", "encoder.layers.1", "encoder.layers.2", "decoder.0", "decoder.1"]
    assert torch.equal(mod(x), model(x))


def test_rows_of_all_sequences_in_one_order():
    found = reasons(Stack(Sorting(), Sorting()))["layers.0"]
    assert re.search(r"a dim of (batch\*sequence|sequence\*batch): rows of all sequences in one order, as", found)


def test_complex_side_inputs():
    assert re.search(r"is complex, which no runtime takes; pass cosines and sines", reasons(Turned())["layers.1"])
