"""Capacities change, tensors stay, and the end of an annealing is the conversion at the target."""

import pytest
import torch
from tiny import Attention, Block, Mlp, Stack, randn, randomise_routers

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.saving import load
from modcompile.trace import trace_routing
from modcompile.training import CapacityAnnealing

X, EXAMPLE = randn(3, 63, 8, seed=1), (randn(2, 5, 8),)
CONFIGS = [{"attend_to": "all", "capacity_multiple": 4, "gate": "sigmoid"},
           pytest.param({"router": "mlp", "gate": "scale", "axis": "sequence"}, marks=pytest.mark.long)]


def converted(ratio, model=None, **options):
    model = model or Stack(Block(causal=True), Block(fused=True), Attention())
    return randomise_routers(convert(model, EXAMPLE, MoDConfig(blocks=[1, 2], capacity_ratio=ratio, **options)))


@pytest.mark.parametrize("options", CONFIGS)
def test_it_ends_as_the_conversion(options, tmp_path):
    target = [0.5, 0.1]
    mod = converted(target, **options)
    expected = converted(target, **options)
    expected.load_state_dict(mod.state_dict())
    parameters, names = list(mod.parameters()), list(mod.state_dict())
    annealing = CapacityAnnealing(mod, steps=10, stages=2)
    changes = [step for step in range(14) if annealing.update(step)]
    assert changes == [0, 5, 10]
    assert torch.equal(mod(X), expected(X))
    assert mod.config == expected.config and mod.routed_blocks == expected.routed_blocks
    assert mod.passes == expected.passes and list(mod.state_dict()) == names
    # The very objects, in the very order, that an optimizer holds.
    assert all(a is b for a, b in zip(mod.parameters(), parameters, strict=True))
    mod.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded(X), expected(X))
    loaded.set_capacity(1)
    mod.set_capacity(1)
    assert torch.equal(loaded(X), mod(X)) and not torch.equal(mod(X), expected(X))


def test_it_begins_as_the_dense_model():
    model = Stack(Block(causal=True), Block(), Attention())
    mod = converted(0.25, model, gate="straight-through")
    annealing = CapacityAnnealing(mod, steps=4, stages=4)
    annealing.update(0)
    assert torch.equal(mod(X), model(X))
    with trace_routing(mod) as trace:
        mod(X)
        annealing.update(2)
        mod(X)
    # 1 - 0.75 / 2 of 63.
    assert trace["layers.1"].positions.shape == (3, 40)


def test_a_step_back_is_a_step():
    mod = converted(0.25)
    annealing = CapacityAnnealing(mod, steps=4, stages=2)
    for step, ratio in ((9, "1/4"), (0, "1/1"), (3, "5/8"), (0, "1/1"), (4, "1/4")):
        annealing.update(step)
        assert mod.routed_blocks[0].capacity_ratio == ratio


def test_a_model_apart_and_the_same():
    mod = converted(0.25)
    other = mod.with_capacity(0.5)
    assert other is not mod and mod.routed_blocks[0].capacity_ratio == "1/4"
    assert other.get_parameter("layers.1.attention.qkv.weight") is \
        mod.get_parameter("layers.1.attention.qkv.weight")
    assert other.routers["layers.1"] is mod.routers["layers.1"]
    mod.train().set_capacity(0.5)
    assert mod.training and torch.equal(mod.eval()(X), other(X))
    optimizer = torch.optim.SGD(mod.parameters(), lr=0.1)
    before = mod(X)
    before.square().mean().backward()
    optimizer.step()
    assert not torch.equal(mod(X), before) and torch.equal(mod(X), other(X))


def test_dropout_follows_the_mode_through_a_change():
    mod = converted(0.25, Stack(Mlp(dropout=0.5), Mlp(dropout=0.5), Mlp(dropout=0.5))).train()
    mod.set_capacity(0.5)
    assert not torch.equal(mod(X), mod(X))
    mod.eval().set_capacity(0.25)
    assert torch.equal(mod(X), mod(X))


def test_what_does_not_fit():
    mod = converted(0.25)
    for ratio in (0, 1.5, [0.5]):
        with pytest.raises(UsageError, match="capacity_ratio"):
            mod.set_capacity(ratio)
    with pytest.raises(UsageError, match="at least one step a stage"):
        CapacityAnnealing(mod, steps=2, stages=3)
