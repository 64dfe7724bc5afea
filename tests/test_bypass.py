"""Rows that pass a block by take a low-rank update; rows that are chosen do not."""

import copy

import pytest
import torch
from tiny import WIDTH, Block, Stack, randn, randomise_routers
from tolerances import TOLERANCES, deviation
from torch.nn import functional

import modcompile as mc
from modcompile.bypass import bypass_parameters
from modcompile.calibration import calibrate
from modcompile.flops import count_flops, flops_by_module
from modcompile.training import freeze
from modcompile.variants import dense_model, masked_model, oracle_model

# B batch  S rows  D model dim  R rank

EAGER = TOLERANCES["eager"][torch.float32]
B, S, D, R = 3, 63, WIDTH, 2
X = randn(B, S, D)
SIZES = {"batch": B, "rows": S}


def converted(rank=R, dropped=(), seed=1, **options):
    """Three blocks, of which the second is routed; routers and updates are random."""
    torch.manual_seed(seed)
    mask = options.pop("mask", None)
    inputs = {"hidden": X[:2, :5], **({} if mask is None else {"attention_mask": mask[:2, :5]})}
    mod = mc.convert(Stack(Block(), Block(), Block()), inputs, mc.MoDConfig(**{
        "blocks": (1,), "capacity_ratio": 5 / 63, "bypass_rank": rank, "dropped": dropped,
        "gate": "straight-through"} | options))
    for name, parameter in bypass_parameters(mod).items():
        if name.endswith("up"):
            torch.nn.init.normal_(parameter)
    return randomise_routers(mod)


def reference(mod, x, block):
    """b(x) in float64."""
    down, up = (mod.get_parameter(f"bypass.{block}.{name}").double() for name in ("down", "up"))
    x = x.double()
    normed = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return x + functional.silu(normed @ down.T) @ up.T


@pytest.mark.parametrize("gate", ["straight-through", "raw", "sigmoid"])
@pytest.mark.parametrize("attend_to", ["chosen", "all"])
def test_rows_that_pass_by_and_rows_that_are_chosen(gate, attend_to):
    mod = converted(gate=gate, attend_to=attend_to)
    plain = converted(rank=None, gate=gate, attend_to=attend_to)
    with torch.no_grad(), mc.trace_routing(mod) as trace, mc.trace_routing(plain) as before:
        mod(X), plain(X)
    one, other = trace["layers.1"], before["layers.1"]
    assert torch.equal(one.positions, other.positions)
    seen, chosen = one.seen, one.taken()
    passed = reference(mod, seen, "layers.1")
    assert deviation(one.output[~chosen], passed[~chosen]) <= EAGER
    # A chosen row: (1 - g) b(x) + g y, of which the plain model shows (1 - g) x + g y.
    gates = torch.zeros(B, S).scatter(1, one.positions, one.gate)[..., None]
    expected = other.output.double() + (1 - gates.double()) * (passed - seen)
    assert deviation(one.output[chosen], expected[chosen]) <= EAGER


def test_at_the_start_nothing_is_changed():
    mod = mc.convert(Stack(Block(), Block()), (X[:2, :5],), mc.MoDConfig(bypass_rank=R))
    plain = mc.convert(Stack(Block(), Block()), (X[:2, :5],))
    assert sorted(bypass_parameters(mod)) == ["bypass.layers.1.down", "bypass.layers.1.up"]
    assert bypass_parameters(mod)["bypass.layers.1.down"].shape == (R, D) and not bypass_parameters(plain)
    assert torch.equal(mod(X), plain(X))
    mod(X).square().mean().backward()
    assert mod.get_parameter("bypass.layers.1.up").grad.abs().max() > 0


def test_a_block_that_is_left_out_leaves_its_bypass():
    mod = converted(dropped=("layers.2",))
    with torch.no_grad(), mc.trace_routing(mod) as trace:
        result = mod(X)
    assert deviation(result, reference(mod, trace["layers.1"].output, "layers.2")) <= EAGER
    whole = converted(dropped=("layers.2",), blocks=("layers.1",))
    assert sorted(bypass_parameters(whole)) == [f"bypass.layers.{i}.{name}" for i in (1, 2) for name in ("down", "up")]


def test_padding_stays_where_it_is():
    mask = torch.ones(B, S, dtype=torch.long)
    mask[0, 40:] = 0
    mod = converted(mask=mask)
    other = X.masked_fill(mask[..., None] == 0, 1e3)
    with torch.no_grad():
        assert deviation(mod(other, mask)[mask != 0], mod(X, mask)[mask != 0]) <= EAGER


def test_a_whole_sequence_passes_by():
    mod = converted(axis="sequence", capacity_ratio=1 / 3)
    with torch.no_grad(), mc.trace_routing(mod) as trace:
        mod(X)
    chosen = trace["layers.1"].taken().squeeze(0)
    before = mc.convert(Stack(Block(), Block(), Block()), (X[:2, :5],)).get_submodule("layers.0")
    hidden = before(X)
    passed = reference(mod, hidden, "layers.1")
    assert chosen.sum() == 1
    assert deviation(trace["layers.1"].output[~chosen], passed[~chosen]) <= EAGER


def test_variants_copies_and_files(tmp_path):
    mod = converted(dropped=("layers.2",), attend_to="all")
    with torch.no_grad():
        expected = mod(X)
        assert torch.equal(copy.deepcopy(mod)(X), expected)
        assert torch.equal(mc.load(mod.save_pretrained(tmp_path / "mod"))(X), expected)
        assert deviation(masked_model(mod)(X), expected) <= EAGER
        assert deviation(mod.with_capacity(0.5).with_capacity(5 / 63)(X), expected) <= EAGER
        dense = Stack(Block(), Block(), Block())
        assert deviation(dense_model(mod)(X), dense(X)) <= EAGER
    assert not [node for node in oracle_model(mod).graph_module.graph.nodes if "bypass" in str(node.target)]


def test_flops_are_counted_and_named():
    mod, plain = converted(dropped=("layers.2",)), converted(rank=None, dropped=("layers.2",))
    sizes = {spec: size for spec, size in zip(mod.inputs[0].shape, (B, S), strict=False)}
    of_one = B * S * 2 * 2 * R * D
    assert count_flops(mod, sizes) - count_flops(plain, sizes) == 2 * of_one
    assert flops_by_module(mod, sizes)["bypass.layers.2"] == of_one


def test_conversion_alone_is_trained():
    mod = converted()
    assert freeze(mod, "routers") == ["router.layers.1.weight", "router.layers.1.bias", "bypass.layers.1.down",
                                      "bypass.layers.1.up"]


def test_calibration_keeps_the_budget_with_it():
    graph = mc.capture(Stack(*(Block() for _ in range(5))), (X[:2, :5],))
    result = calibrate(graph, [(X,), (randn(B, S, D, seed=3),)], 0.6, bypass_rank=R, attend_to="all")
    sizes = dict(zip(graph.inputs[0].shape, (B, S), strict=False))
    share = count_flops(result.mod, sizes) / count_flops(graph, sizes)
    assert share <= 0.6 and share == pytest.approx(result.report["flops"])
    touched = [path for path, block in result.report["blocks"].items() if block["ratio"] != "1"]
    assert {name.removeprefix("bypass.").rpartition(".")[0] for name in bypass_parameters(result.mod)} == set(touched)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_has_it(tmp_path, precision):
    pytest.importorskip("onnxruntime")
    mod = converted(dropped=("layers.2",))
    engine = mc.build_engine(mod, tmp_path / "engine", precision=precision)
    report = mc.verify(mod, engine, {"hidden": X})
    assert report.passed, report
