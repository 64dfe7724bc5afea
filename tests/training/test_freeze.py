"""A recipe leaves exactly the parameters trainable that it names."""

import pytest
import torch
from tiny import Block, Stack, randn

from modcompile.config import MoDConfig
from modcompile.convert import convert
from modcompile.errors import UsageError
from modcompile.training import freeze

X = randn(2, 63, 8)


def trainable(mod):
    return [name for name, parameter in mod.named_parameters() if parameter.requires_grad]


def test_routers_all_and_back():
    mod = convert(Stack(Block(), Block()), (randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5))
    routers = ["router.layers.1.weight", "router.layers.1.bias"]
    assert freeze(mod, "routers") == routers == trainable(mod)
    mod(X).square().mean().backward()
    assert [name for name, parameter in mod.named_parameters() if parameter.grad is not None] == routers
    assert freeze(mod, "all") == [name for name, _ in mod.named_parameters()] == trainable(mod)
    assert len(trainable(mod)) > len(routers)


def test_what_cannot_train():
    mod = convert(Stack(Block(), Block()), (randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5))
    with pytest.raises(UsageError, match="the model has no adapters") as caught:
        freeze(mod, "lora")
    assert "modcompile[peft]" in caught.value.details["fix"] and len(trainable(mod)) == len(list(mod.parameters()))
    with pytest.raises(UsageError, match="there is no such recipe"):
        freeze(mod, "some")
    noise = convert(Stack(Block(), Block()), (randn(2, 5, 8),), MoDConfig(router="noise"))
    with pytest.raises(UsageError, match="nothing would train"):
        freeze(noise, "routers")


def test_routers_and_lora_through_peft():
    peft = pytest.importorskip("peft")

    adapted = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "query"]),
                                           Stack(Block(), Block()))
    mod = convert(adapted.eval(), (randn(2, 5, 8),), MoDConfig(capacity_ratio=0.5, gate="straight-through"))
    expected = [f"layers.{i}.{module}.lora_{side}.default.weight" for i in (0, 1)
                for module in ("attention.query", "mlp.up") for side in "AB"]
    routers = ["router.layers.1.weight", "router.layers.1.bias"]
    assert sorted(freeze(mod, "lora")) == sorted([*expected, *routers]) == sorted(trainable(mod))
    before = {name: parameter.detach().clone() for name, parameter in mod.named_parameters()}
    optimizer = torch.optim.SGD(mod.parameters(), lr=1.0)
    for _ in range(2):
        # B starts at zero, so A moves from the second step on.
        optimizer.zero_grad()
        mod(X).square().mean().backward()
        optimizer.step()
    moved = {name for name, parameter in mod.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {*expected, *routers}
