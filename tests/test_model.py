"""A routed model is an ordinary module: state dict, modes, copies, dtypes, gradients, training, compilation."""

import copy
import io

import pytest
import torch
from tiny import Attention, Block, Mlp, Stack, randomise_routers
from tolerances import TOLERANCES, deviation
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from modcompile.capture import capture
from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.saving import load
from modcompile.trace import trace_routing
from modcompile.variants import dense_model, oracle_model

EAGER = TOLERANCES["eager"]


class Words(nn.Module):
    """A decoder with a head tied to its table of words, dropout, a buffer, and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(17, 8)
        self.blocks = Stack(Attention(causal=True), Mlp(dropout=0.5), Attention(causal=True), Mlp(dropout=0.5))
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("scale", torch.full((8,), 0.5))
        self.register_buffer("shift", torch.full((8,), 0.1), persistent=False)
        with torch.no_grad():
            self.words.weight.copy_(torch.randn(17, 8, generator=torch.Generator().manual_seed(5)))
        self.eval()

    def forward(self, ids, shift: bool = True):
        hidden = self.blocks(self.words(ids)) * self.scale
        return {"logits": self.head(hidden + self.shift if shift else hidden)}


IDS = torch.randint(17, (3, 63), generator=torch.Generator().manual_seed(1))
CONFIG = MoDConfig(capacity_ratio=5 / 63, gate="sigmoid")


@pytest.fixture(scope="module")
def source():
    return Words()


@pytest.fixture(scope="module")
def graph(source):
    return capture(source, (IDS[:2, :5],))


@pytest.fixture
def mod(graph):
    return copy.deepcopy(randomise_routers(convert(graph, None, CONFIG)))


@pytest.fixture(scope="module")
def original(graph):
    return randomise_routers(convert(graph, None, CONFIG))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)["logits"]


# The state dict


ROUTERS = [f"router.blocks.layers.{i}.{name}" for i in (1, 3) for name in ("weight", "bias")]


def test_names_are_the_sources_and_the_routers(source, original):
    assert list(original.state_dict()) == [*source.state_dict(), *ROUTERS]
    assert [name for name, _ in original.named_parameters()] == [
        *(name for name, _ in source.named_parameters()), *ROUTERS]
    assert dict(original.named_buffers()).keys() == dict(source.named_buffers()).keys()
    assert list(original.routers) == ["blocks.layers.1", "blocks.layers.3"]


def test_the_tensors_are_the_sources_own(source, original):
    for name, parameter in source.named_parameters(remove_duplicate=False):
        assert original.get_parameter(name) is parameter
    assert original.get_buffer("shift") is source.shift


def test_state_dicts_load_both_ways(mod):
    expected = logits(mod)
    fresh = Words()
    state = {name: value for name, value in mod.state_dict().items() if not name.startswith("router")}
    assert str(fresh.load_state_dict(state)) == "<All keys matched successfully>"
    with torch.no_grad():
        for parameter in mod.parameters():
            parameter.add_(1)
    assert not torch.equal(logits(mod), expected)
    state |= {name: value for name, value in randomise_routers(copy.deepcopy(mod)).state_dict().items()
              if name.startswith("router")}
    # The tied weight is in it twice, once under each name.
    state["words.weight"] = state["head.weight"] = fresh.words.weight.detach()
    state |= {name: value.detach() - 1 for name, value in mod.state_dict().items() if name in state
              and name not in ("words.weight", "head.weight", "scale") and not name.startswith("router")}
    mod.load_state_dict(state)
    assert deviation(logits(mod), expected) < 1e-4
    with pytest.raises(RuntimeError, match="Missing key"):
        mod.load_state_dict(fresh.state_dict())


def test_a_state_dict_goes_through_a_file(mod, original):
    file = io.BytesIO()
    torch.save(mod.state_dict(), file)
    with torch.no_grad():
        for parameter in mod.parameters():
            parameter.zero_()
    file.seek(0)
    mod.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(logits(mod), logits(original))


# Modes


def test_dropout_follows_the_mode(mod, original):
    expected = logits(original)
    assert not mod.training and torch.equal(logits(mod), expected)
    assert mod.train() is mod and mod.training and mod.graph_module.training
    assert not torch.equal(logits(mod), logits(mod))
    assert torch.equal(logits(mod.eval()), expected) and not mod.training
    assert torch.equal(logits(mod.train(False)), expected)


# Copies


def test_a_copy_is_apart(original):
    text, expected = original.format(), logits(original)
    copied = copy.deepcopy(original)
    assert type(copied) is type(original) and torch.equal(logits(copied), expected) and copied.format() == text
    assert copied.config == original.config and copied.routed_blocks == original.routed_blocks
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in original.parameters()}
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(logits(original), expected)
    assert copied.dense_program.graph is not original.dense_program.graph


def test_a_copy_keeps_ties_routers_buffers_and_mode(original):
    copied = copy.deepcopy(original).train()
    again = copy.deepcopy(copied)
    assert again.training and again.get_parameter("head.weight") is again.get_parameter("words.weight")
    assert list(again.routers) == list(original.routers) and again.non_persistent() == {"shift"}
    assert list(again.state_dict()) == list(original.state_dict())
    again.routers["blocks.layers.1"].weight.data.zero_()
    assert torch.equal(again.state_dict()["router.blocks.layers.1.weight"], torch.zeros(1, 8))
    assert copied.routers["blocks.layers.1"].weight.abs().sum() > 0


def test_a_copy_of_a_pair_shares_what_the_pair_shares(source, original):
    one, two = copy.deepcopy((source, original))
    assert two.get_parameter("words.weight") is one.words.weight


# Precisions and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(graph, original, dtype):
    # At full capacity, where no rounding moves a row across a border.
    whole = randomise_routers(convert(graph, None, MoDConfig(capacity_ratio=1, gate="sigmoid")))
    mod = copy.deepcopy(whole).to(dtype)
    assert {tensor.dtype for tensor in mod.parameters()} == {dtype}
    with trace_routing(mod) as trace, torch.no_grad():
        out = mod(IDS)["logits"]
    assert out.dtype == dtype and all(block.logits.dtype == torch.float32 for block in trace.values())
    tolerance = 1e-5 if dtype == torch.float64 else EAGER[dtype]
    assert deviation(out.double(), logits(whole).double()) <= tolerance
    assert [spec.dtype for spec in (*mod.inputs, *mod.outputs)] == ["int64", str(dtype)[6:]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_float_inputs_follow_the_precision(dtype):
    mod = randomise_routers(convert(Stack(Mlp(), Mlp()), (torch.randn(2, 5, 8),), MoDConfig(capacity_ratio=0.3)))
    x = torch.randn(3, 63, 8, generator=torch.Generator().manual_seed(1))
    cast = copy.deepcopy(mod).to(dtype)
    assert cast(x.to(dtype)).dtype == dtype and mod(x).dtype == torch.float32
    with pytest.raises(UsageError, match="input hidden has the wrong dtype"):
        cast(x)
    assert torch.equal(copy.deepcopy(cast)(x.to(dtype)), cast(x.to(dtype)))
    assert dense_model(cast)(x.to(dtype)).dtype == oracle_model(cast)(x.to(dtype)).dtype == dtype
    assert torch.equal(cast.float()(x), copy.deepcopy(mod).to(dtype).float()(x))


def test_a_source_in_half_precision_stays_in_it():
    model = Stack(Attention(), Mlp()).bfloat16()
    x = torch.randn(3, 63, 8).bfloat16()
    mod = convert(model, (x[:2, :5],), MoDConfig(capacity_ratio=1, blocks="all"))
    assert torch.equal(mod(x), model(x)) and mod.outputs[0].dtype == "bfloat16"


def test_a_float_mask_in_double_precision(tmp_path):
    """PyTorch's attention in float64 takes a mask in float32, which the source makes here, and misreads it."""
    class Biased(Attention):
        def forward(self, hidden, bias):
            parts = (f(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value))
            mixed = nn.functional.scaled_dot_product_attention(*parts, attn_mask=bias)
            return hidden + self.out(mixed.transpose(1, 2).flatten(2))

    class Masked(Stack):
        def forward(self, hidden, mask):
            bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask == 0, -torch.inf)[:, None, None]
            for layer in self.layers:
                hidden = layer(hidden, bias)
            return hidden

    model = Masked(Biased(), Biased())
    x, mask = torch.randn(3, 63, 8), torch.ones(3, 63, dtype=torch.long)
    mask[:, 40:] = 0
    mod = convert(model, (x[:2, :5], mask[:2, :5]), MoDConfig(capacity_ratio=1, attend_to="all", padding_mask="mask"))
    with torch.no_grad():
        expected = mod(x, mask)
        wide = copy.deepcopy(mod).double()
        assert deviation(wide(x.double(), mask), expected.double()) < 1e-5
        assert deviation(dense_model(wide)(x.double(), mask)[:, :40], expected.double()[:, :40]) < 1e-5
        assert deviation(wide.double()(x.double(), mask), expected.double()) < 1e-5
        # The cast looks at the query, and is made of the mask alone all the same.
        few = mod.with_capacity(0.25)(x, mask).double()
        wide.set_capacity(0.25)
        assert deviation(wide(x.double(), mask), few) < 1e-5
        oracle_model(wide)(x.double(), mask)
        wide.save_pretrained(tmp_path / "model")
        assert torch.equal(load(tmp_path / "model")(x.double(), mask), wide(x.double(), mask))


def test_a_source_in_double_precision_is_saved_and_read(tmp_path):
    x, mask = torch.randn(3, 63, 8, dtype=torch.float64), torch.ones(3, 63, dtype=torch.long)
    mod = randomise_routers(convert(Stack(Attention(), Attention()).double(), (x[:2, :5], mask[:2, :5]),
                                    MoDConfig(capacity_ratio=0.3)))
    mod.save_pretrained(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model")(x, mask), mod(x, mask))


def test_devices_in_the_graph_move_too():
    class Counts(Attention):
        def forward(self, hidden):
            return super().forward(hidden) + torch.arange(hidden.shape[1], device=hidden.device)[:, None]

    mod = convert(Stack(Counts(), Counts()), (torch.randn(2, 5, 8),), MoDConfig(capacity_ratio=0.1, attend_to="all"))
    moved = copy.deepcopy(mod).to("meta")
    x = torch.randn(3, 63, 8)
    for model in (moved, copy.deepcopy(moved), dense_model(moved), oracle_model(moved)):
        out = model(x.to("meta"))
        assert out.is_meta and out.shape == (3, 63, 8)
    assert "device(type='cpu')" not in moved.format()
    # What is known of the values has moved with them, of those that are several too: later passes go by it.
    known = [node.meta.get("val") for node in moved.program.graph.nodes]
    assert {type(value) for value in known} >= {tuple, FakeTensor}
    assert {value.device.type for value in tree_leaves(known) if isinstance(value, FakeTensor)} == {"meta"}
    assert mod(x).device.type == "cpu"


def test_a_model_on_another_device_is_captured_there():
    model = Stack(Attention(), Mlp()).to("meta")
    mod = convert(model, (torch.randn(2, 5, 8, device="meta"),), MoDConfig(capacity_ratio=0.1, blocks="all"))
    assert mod(torch.randn(3, 63, 8, device="meta")).is_meta and mod.routers["layers.0"].weight.is_meta


# Training


def test_gradients_reach_everything(mod, source):
    mod.train()
    mod(IDS)["logits"].square().mean().backward()
    for name, parameter in mod.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in source.parameters())


@pytest.mark.parametrize("gate", ["raw", "sigmoid", "tanh", "straight-through"])
def test_a_step_learns(graph, gate):
    mod = copy.deepcopy(randomise_routers(convert(graph, None, MoDConfig(capacity_ratio=0.3, gate=gate))))
    optimizer = torch.optim.SGD(mod.parameters(), 0.1)
    losses = []
    for _ in range(4):
        loss = nn.functional.cross_entropy(mod(IDS)["logits"].flatten(0, 1), IDS.flatten())
        optimizer.zero_grad()
        loss.backward()
        before = [router.weight.clone() for router in mod.routers.values()]
        optimizer.step()
        losses.append(loss.item())
        assert all(not torch.equal(a, router.weight) for a, router in zip(before, mod.routers.values(), strict=True))
    assert losses == sorted(losses, reverse=True)
    assert mod.get_parameter("head.weight") is mod.get_parameter("words.weight")


def test_a_raw_gate_has_the_gradient_of_its_update(graph):
    """d out / d r of a chosen row is f(x): with one row chosen, the bias's gradient is sum(grad * f(x))."""
    config = MoDConfig(blocks="blocks.layers.3", capacity_ratio=1 / 63)
    mod = copy.deepcopy(randomise_routers(convert(graph, None, config)))
    with trace_routing(mod) as trace:
        out = mod(IDS[:1])["logits"]
    position = trace["blocks.layers.3"].positions[0, 0]
    with torch.no_grad():
        hidden = mod.words.weight[IDS[:1]]
        for layer in Words().blocks.layers[:3]:
            hidden = layer(hidden)
        update = Words().blocks.layers[3](hidden)[0, position] - hidden[0, position]
    out.sum().backward()
    expected = (update * mod.scale * mod.words.weight.sum(0)).sum()
    assert deviation(mod.routers["blocks.layers.3"].bias.grad, expected[None]) < 1e-4


# Compilation


def test_compiled_is_eager():
    mod = randomise_routers(convert(Stack(Attention(causal=True), Mlp()), (torch.randn(2, 5, 8),),
                                    MoDConfig(blocks="all", capacity_ratio=0.3, gate="sigmoid")))
    torch._dynamo.reset()
    compiled = torch.compile(mod, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((3, 63), (2, 33)):
        x = torch.randn(batch, length, 8)
        eager, out = mod(x), compiled(x)
        assert deviation(out, eager) <= EAGER[torch.float32]
        one, two = (torch.autograd.grad(o.square().mean(), list(mod.parameters())) for o in (eager, out))
        assert max(deviation(a, b) for a, b in zip(two, one, strict=True)) <= 1e-5


# The rest


def test_it_is_called_like_its_source(mod, source):
    assert mod.inputs == mod.interface.inputs and [spec.name for spec in mod.outputs] == ["logits"]
    with torch.no_grad():
        assert torch.equal(mod(ids=IDS)["logits"], mod(IDS, shift=True)["logits"])
    with pytest.raises(UsageError, match="argument shift is not what the model was captured with"):
        mod(IDS, shift=False)
    with pytest.raises(UsageError, match="input ids has the wrong dtype"):
        mod(IDS.int())


def test_one_token_and_one_text(original):
    for shape in ((1, 63), (3, 1), (1, 1)):
        assert logits(original, IDS[: shape[0], : shape[1]]).isfinite().all()


def test_a_dense_graph_routes_nothing(graph):
    assert graph.routed_blocks == [] and graph.routers == {}


def test_a_block_of_the_graph_can_be_called():
    graph = convert(Stack(Block(), Block()), (torch.randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5))
    x = torch.randn(3, 63, 8)
    with torch.no_grad():
        assert torch.equal(graph.get_submodule("layers.1")(x), Stack(Block(), Block()).layers[1](x))


def test_what_is_made_of_a_model_in_training_has_no_dropout_in_evaluation(tmp_path):
    x = torch.randn(3, 9, 8)
    mod = convert(Stack(Mlp(dropout=0.5), Mlp(dropout=0.5)), (x,), MoDConfig(capacity_ratio=0.5)).train()
    mod.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert not loaded.training and torch.equal(loaded(x), loaded(x)) and torch.equal(loaded(x), mod.eval()(x))
    assert not torch.equal(loaded.train()(x), loaded(x))
    graph = capture(Stack(Mlp(dropout=0.5), Mlp(dropout=0.5)), (x,)).train()
    mod = convert(graph, config=MoDConfig(capacity_ratio=0.5))
    assert mod.training and not torch.equal(mod(x), mod(x))
    mod.eval()
    for made in (mod, mod.with_capacity(0.25), dense_model(mod)):
        assert not made.training and torch.equal(made(x), made(x))
    mod.set_capacity(0.25)
    assert torch.equal(mod(x), mod(x))


def test_the_inputs_follow_a_half_model_to_float():
    x = torch.randn(3, 9, 8)
    mod = convert(Stack(Mlp(), Mlp()).bfloat16(), (x.bfloat16(),)).float()
    assert mod.inputs[0].dtype == mod.outputs[0].dtype == "float32" and mod(x).dtype == torch.float32
