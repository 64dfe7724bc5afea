"""Every router: what it computes, what a model with it is, through files and engines, and what is refused."""

import copy
import functools

import pytest
import torch
from tiny import Block, Mlp, Stack, randn
from tolerances import TOLERANCES, deviation
from torch.nn import functional as F

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.engine import build_engine
from modcompile.errors import UnsupportedGraphError, UsageError
from modcompile.ops import route
from modcompile.routers import DepthStep, MlpRouter, NoiseRouter, Router
from modcompile.saving import load
from modcompile.trace import trace_routing
from modcompile.verify import verify

# B batch  S rows  D model dim

X = randn(7, 63, 8, seed=3)
KINDS = {
    "mlp": {"router": "mlp", "router_hidden": 3, "attend_to": "all"},
    "scale": {"gate": "scale"},
    "depth": {"router": "depth", "axis": "sequence", "gate": "sigmoid"},
    "attention": {"router": "attention", "gate": "scale", "blocks": [1]},
}


# What differs least from the linear router is not in every run.
NOT_ALWAYS = [pytest.param(kind, marks=pytest.mark.long) if kind in ("mlp", "scale") else kind for kind in KINDS]


@functools.cache
def converted(kind, ratio, blocks):
    return convert(Stack(Block(causal=True), Block(causal=True), Block()), (randn(2, 5, 8),),
                   MoDConfig(**{"capacity_ratio": ratio, "blocks": blocks, **KINDS[kind]}))


def made(kind, ratio=0.3, blocks="all"):
    mod = copy.deepcopy(converted(kind, ratio, blocks))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for router in mod.routers.values():
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return mod


def test_mlp_is_its_formula():
    router = MlpRouter(8, 3)
    with torch.no_grad():
        router.weight.copy_(randn(1, 3)), router.bias.fill_(0.25)
        expected = 0.25 + sum(w * F.silu(X @ row + b) for w, row, b in
                              zip(router.weight[0], router.up_weight, router.up_bias, strict=True))
        assert deviation(router(X), expected) <= TOLERANCES["eager"][torch.float32]
        assert router.to(torch.bfloat16)(X.bfloat16()).dtype == torch.float32
    assert {name: tuple(p.shape) for name, p in MlpRouter(8).named_parameters()} == {
        "weight": (1, 2), "bias": (1,), "up_weight": (2, 8), "up_bias": (2,)}


@pytest.mark.parametrize("router", [Router(8), MlpRouter(8, 3)], ids=["linear", "mlp"])
def test_logits_are_float32_under_autocast(router):
    with torch.no_grad():
        router.weight.copy_(randn(*router.weight.shape))
        expected = router(X)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(X), expected) and F.linear(X, X[0]).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", NOT_ALWAYS)
def test_a_new_model_at_full_capacity_is_the_dense_one(kind):
    model = Stack(Block(causal=True), Block(causal=True), Block())
    gate = "raw" if kind in ("mlp", "depth") else "scale"
    config = MoDConfig(**{"blocks": "all", "capacity_ratio": 1, **KINDS[kind], "gate": gate})
    mod = convert(model, (randn(2, 5, 8),), config)
    with torch.no_grad():
        assert deviation(mod(X), model(X)) <= TOLERANCES["eager"][torch.float32]


@pytest.mark.parametrize("kind", NOT_ALWAYS)
def test_what_is_saved_and_copied_is_what_was(kind, tmp_path):
    mod = made(kind)
    mod.save_pretrained(tmp_path / "model")
    loaded, copied = load(tmp_path / "model"), copy.deepcopy(mod)
    for other in (loaded, copied):
        assert other.config == mod.config and other.routed_blocks == mod.routed_blocks
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in mod.named_parameters()]
        assert [type(router) for router in other.routers.values()] == [type(r) for r in mod.routers.values()]
        assert torch.equal(other(X), mod(X))
    assert {block.router for block in loaded.routed_blocks} == {mod.config.router}


@pytest.mark.parametrize("kind", ["attention", *(pytest.param(kind, marks=pytest.mark.long)
                                                 for kind in ("mlp", "scale", "depth"))])
def test_an_engine_is_the_model(kind, tmp_path):
    mod = made(kind)
    engine = build_engine(mod, tmp_path / "engine", runtime="ort")
    verify(mod, engine, {"hidden": X})
    assert {block.router for block in engine.manifest.routed_blocks} == {mod.config.router}
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_the_gate_reads(kind):
    mod = made(kind)
    mod(X).square().mean().backward()
    for path, router in mod.routers.items():
        for name, parameter in router.named_parameters():
            # With a scale as gate the logits only choose: nothing of the task's loss reaches them.
            silent = mod.config.gate == "scale" and name != "scale"
            assert (parameter.grad is None) == silent, (path, name)


def test_a_scale_is_the_weight_of_the_update():
    mod = made("scale", blocks=(1,))
    with torch.no_grad():
        mod.routers["layers.1"].scale.fill_(0.25)
        with trace_routing(mod) as trace:
            mod(X)
        block = trace["layers.1"]
        assert (block.gate == 0.25).all()
        mod.routers["layers.1"].scale.fill_(1.0)
        with trace_routing(mod) as whole:
            mod(X)
        expected = block.seen + 0.25 * (whole["layers.1"].output - block.seen)
    assert deviation(block.output, expected) <= TOLERANCES["eager"][torch.float32]


def test_a_depth_is_predicted_once_and_nests_the_choices():
    mod = made("depth", ratio=(0.8, 0.5, 0.2))
    first, second, third = mod.routers.values()
    assert isinstance(first, MlpRouter) and isinstance(second, DepthStep) and isinstance(third, DepthStep)
    with trace_routing(mod) as trace, torch.no_grad():
        mod(X)
    one, two, three = trace.values()
    with torch.no_grad():
        depth = first(X.mean(1))
    assert deviation(one.logits, depth[None]) <= TOLERANCES["eager"][torch.float32]
    for block, router, k in ((two, second, 4), (three, third, 2)):
        assert torch.equal(block.logits, one.logits + router.bias)
        assert torch.equal(block.positions, route(one.logits, None, k)[0])
    taken = [block.taken() for block in trace.values()]
    assert [t.sum().item() for t in taken] == [6, 4, 2]
    assert not (taken[1] & ~taken[0]).any() and not (taken[2] & ~taken[1]).any()


def test_noise_is_new_at_every_call_and_follows_the_seed(tmp_path):
    model = Stack(Mlp(), Mlp())
    mod = convert(model, (randn(2, 5, 8),), MoDConfig(capacity_ratio=5 / 63, router="noise", gate="straight-through"))
    assert isinstance(mod.routers["layers.1"], NoiseRouter) and not list(mod.routers["layers.1"].parameters())
    mod.save_pretrained(tmp_path / "model")

    def positions(model, seed):
        torch.manual_seed(seed)
        with trace_routing(model) as trace, torch.no_grad():
            model(X.repeat(30, 1, 1))
        return trace["layers.1"].positions

    assert torch.equal(positions(mod, 0), positions(load(tmp_path / "model"), 0))
    assert not torch.equal(positions(mod, 0), positions(mod, 1))
    # 210 sequences take 5 of 63 rows each: every row about 17 times.
    counts = positions(mod, 0).flatten().bincount(minlength=63)
    assert counts.sum() == 1050 and 3 <= counts.min() and counts.max() <= 35
    with pytest.raises(UnsupportedGraphError, match="draws random numbers") as caught:
        build_engine(mod, tmp_path / "engine", runtime="ort")
    assert caught.value.details["where"] == "router.layers.1" and not (tmp_path / "engine").exists()


def test_a_compiled_router_multiplies_no_matrices():
    graphs = []

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    router, rows = Router(16), torch.randn(3, 63, 16)
    torch.nn.init.normal_(router.weight)
    torch.nn.init.normal_(router.bias)
    found = []
    for call in (router, torch.compile(router, backend=backend, dynamic=False)):
        x = rows.clone().requires_grad_()
        logits = call(x)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), [x, router.weight, router.bias])])
    for expected, other in zip(*found, strict=True):
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    targets = [node.target for graph_module in graphs for node in graph_module.graph.nodes]
    assert targets and F.linear not in targets
    # What is exported is still one product, which lowering looks for.
    exported = torch.export.export(router, (rows,))
    assert torch.ops.aten.linear.default in [node.target for node in exported.graph.nodes]


@pytest.mark.parametrize(("options", "match"), [
    ({"router": "depth"}, "a depth is predicted for a whole input"),
    ({"router_hidden": 4}, "this router has no hidden layer"),
    ({"router": "noise", "router_hidden": 4}, "this router has no hidden layer"),
    ({"router": "attention"}, "attention says which tokens to take"),
    ({"router": "attention", "gate": "scale", "axis": "sequence"}, "attention says which tokens to take"),
    ({"router": "attend"}, "router does not fit"),
    ({"router": "mlp", "router_hidden": 0}, "router_hidden does not fit"),
])
def test_options_that_do_not_fit(options, match):
    with pytest.raises(UsageError, match=match):
        MoDConfig(**options)
