"""Half precision: what is cast, what stays float32, and how far the numbers move."""

import operator

import pytest
import torch
from modcompile.passes.cast_precision import CastPrecision
from torch import nn

from modcompile import MoDConfig, convert
from modcompile.capture import capture
from modcompile.errors import PassContractError
from modcompile.export.flatten import flatten
from modcompile.pass_manager import PassManager
from modcompile.trace import trace_routing

# Relative L2 of a model of four small matrices in a row: the half's machine epsilon times a few roundings.
TOLERANCE = {"float16": 3e-3, "bfloat16": 2.5e-2}


class Norm(nn.Module):
    """RMSNorm, written out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    """Attention with an additive mask of float32's lowest number, and a product."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = Norm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two blocks over tied embeddings."""

    def __init__(self, width=32, vocabulary=50):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, attention_mask):
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


def inputs(batch, rows):
    mask = torch.ones(batch, rows, dtype=torch.long)
    mask[0, -rows // 3:] = 0
    return {"ids": torch.randint(0, 50, (batch, rows)), "attention_mask": mask}


@pytest.fixture(scope="module", params=["chosen", "all"])
def routed(request):
    torch.manual_seed(0)
    mod = convert(Model().eval(), inputs(2, 17), MoDConfig(capacity_ratio=0.25, gate="sigmoid",
                                                           attend_to=request.param))
    for router in mod.routers.values():
        nn.init.normal_(router.weight)
    return mod


def cast(model, dtype):
    flat = flatten(model)
    PassManager([CastPrecision(dtype)])(flat)
    return flat


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_numbers_stay_near_the_float32_model(routed, dtype):
    given = inputs(3, 63)
    with torch.no_grad():
        expected = routed(**given)
        found = cast(routed, dtype)(*given.values())[0]
    assert found.dtype == getattr(torch, dtype)
    valid = given["attention_mask"].bool()
    error = (found.float() - expected)[valid].norm() / expected[valid].norm()
    assert 0 < error < TOLERANCE[dtype]
    assert found[valid].isfinite().all()


class Rotary(nn.Module):
    """Hidden states times cosines of their positions, the frequencies in a buffer."""

    def __init__(self, width=32):
        super().__init__()
        self.register_buffer("frequencies", 1e4 ** -(torch.arange(width) / width), persistent=False)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        positions = torch.arange(x.shape[1], device=x.device).float()
        return self.out(x * (positions[:, None] * self.frequencies).cos())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_angles_are_as_near_at_every_position(dtype):
    """Frequencies of three digits would be a radian off by the thousandth position."""
    torch.manual_seed(0)
    model = capture(Rotary(), {"x": torch.randn(2, 5, 32)})
    x = torch.randn(2, 2048, 32)
    with torch.no_grad():
        (expected,) = model.run_graph([x])
        (found,) = cast(model, dtype)(x.to(getattr(torch, dtype)))
    errors = (found.float() - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))  # [S]
    assert errors.max() < 3 * TOLERANCE[dtype]


def test_a_buffer_in_a_product_is_cast_where_it_meets_a_half_value():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.randn(8, 8))
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(x @ self.weight)

    model = capture(Fixed(), {"x": torch.randn(2, 5, 8)})
    flat = cast(model, "float16")
    x = torch.randn(2, 5, 8)
    error = flat(x.half())[0].float() - model.run_graph([x])[0]
    assert error.norm() < 5e-3 * model.run_graph([x])[0].norm()
    code = flat.code
    PassManager([CastPrecision("float16")])(flat)
    assert flat.code == code


def test_the_model_itself_is_left_alone(routed):
    before = {name: tensor.dtype for name, tensor in routed.tensors().items()}
    cast(routed, "float16")
    assert {name: tensor.dtype for name, tensor in routed.tensors().items()} == before


def test_tied_weights_are_cast_once(routed):
    flat = cast(routed, "float16")
    names = {str(node.target) for node in flat.graph.find_nodes(op="get_attr")} & {"tokens.weight", "head.weight"}
    weights = [operator.attrgetter(name)(flat) for name in names]
    assert weights and len({id(weight) for weight in weights}) == 1
    assert weights[0].dtype == torch.float16


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_what_a_router_reads_of_a_block_it_reads_in_float32(dtype):
    """Received attention is computed again for the router alone, from the parameters of the block before."""
    torch.manual_seed(0)
    mod = convert(Model().eval(), inputs(2, 17), MoDConfig(capacity_ratio=0.25, router="attention",
                                                           gate="straight-through"))
    given, flat = inputs(3, 63), cast(mod, dtype)
    kept = [str(node.target) for node in flat.graph.find_nodes(op="get_attr") if str(node.target).endswith("_float32")]
    assert kept and all(operator.attrgetter(name)(flat).dtype == torch.float32 for name in kept)
    with torch.no_grad(), trace_routing(mod) as trace:
        mod(**given)
    (route,) = flat.graph.find_nodes(op="call_function", target=torch.ops.modcompile.route.default)
    flat.graph.output_node().args = ((route.args[0],),)
    flat.recompile()
    with torch.no_grad():
        (logits,) = flat(*given.values())
    valid = given["attention_mask"].bool()
    (block,) = trace.values()
    assert logits.dtype == torch.float32
    assert (logits - block.logits)[valid].norm() < TOLERANCE[dtype] * block.logits[valid].norm()


def test_logits_gate_and_router_parameters_stay_float32(routed):
    flat = cast(routed, "bfloat16")
    for node in flat.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("router."):
            assert node.meta["val"].dtype == torch.float32
        if node.target is torch.ops.modcompile.route.default:
            assert node.args[0].meta["val"].dtype == torch.float32
        if node.target is torch.ops.aten.sigmoid.default:
            assert node.meta["val"].dtype == torch.float32


def test_the_squares_of_a_norm_are_taken_in_float32_and_products_in_half(routed):
    dtypes = {}
    for node in cast(routed, "float16").graph.nodes:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            dtypes.setdefault(str(node.target), set()).add(node.meta["val"].dtype)
    assert dtypes["aten.pow.Tensor_Scalar"] == dtypes["aten.rsqrt.default"] == {torch.float32}
    assert dtypes["aten.scaled_dot_product_attention.default"] == {torch.float16}
    # A router's is the only product in float32.
    assert dtypes["aten.linear.default"] == {torch.float16, torch.float32}


@pytest.mark.parametrize("form", [
    lambda x: torch.where(x > 0, torch.full((), torch.finfo(torch.float32).min), x).softmax(-1),
    lambda x: torch.where(x.abs() >= 0, torch.tensor(-1e9), x).softmax(-1),
    lambda x: (x + torch.full_like(x, -1e9)).softmax(-1),
    lambda x: (x.relu() + 1e-9).log(),
    lambda x: nn.functional.normalize(x * 0),
    lambda x: nn.functional.normalize(x.abs() * 5000 + 5000),
], ids=["full", "tensor", "full_like", "log", "normalize-zero", "normalize-large"])
@torch.no_grad()
def test_case_4_numbers_beyond_the_half(form):
    class Formed(nn.Module):
        def forward(self, x):
            return form(x)

    model = capture(Formed(), {"x": torch.randn(2, 5, 32)})
    x = torch.randn(3, 63, 32).half()
    (found,) = cast(model, "float16")(x)
    (expected,) = model.run_graph([x.float()])
    assert found.isfinite().all()
    assert ((found.float() - expected).abs() < 0.01).float().mean() > 0.4


def test_a_large_hidden_state_does_not_overflow_in_the_norm():
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = Norm(8)

        def forward(self, x):
            return self.norm(x * 300)

    model = Loud()
    x = torch.randn(3, 5, 8) + 2
    found = cast(capture(model, (x,)), "float16")(x.half())[0]
    assert torch.allclose(found.float(), model(x), rtol=5e-3)


def test_a_second_run_changes_nothing(routed):
    flat = cast(routed, "float16")
    assert not CastPrecision("float16").call(flat).modified


def test_a_graph_that_calls_modules_is_refused(routed):
    with pytest.raises(PassContractError, match="flat graph"):
        PassManager([CastPrecision("float16")])(routed.graph_module)
