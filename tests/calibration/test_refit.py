"""Routers fitted again are those that calibration would fit to the model as it has become."""

import pytest
import torch
from tiny import WIDTH, Block, Mlp, Stack, randn, randomise_routers

import modcompile as mc
from modcompile.calibration import refit
from modcompile.calibration.batches import bind_batches
from modcompile.calibration.measure import measure
from modcompile.calibration.trials import DENSE, DROPPED, Trials
from modcompile.errors import UsageError

B, S = 2, 24
CALLS = [{"hidden": randn(B, S, WIDTH, seed=seed)} for seed in range(3)]


def converted(**options):
    stack = Stack(*(Block() for _ in range(4)))
    return randomise_routers(mc.convert(stack, CALLS[0], mc.MoDConfig(**{
        "blocks": (1, 3), "capacity_ratio": (1 / 4, 1 / 2), "gate": "straight-through", "attend_to": "all",
        "dropped": ("layers.2",)} | options)))


def test_it_is_the_measurement_of_calibration():
    mod = converted()
    state = {"layers.0": DENSE, "layers.1": mod.config.ratios([0, 1])[0], "layers.2": DROPPED,
             "layers.3": mod.config.ratios([0, 1])[1]}
    config = mc.MoDConfig(blocks="all", attend_to="all", gate="straight-through")
    graph = mc.capture(Stack(*(Block() for _ in range(4))), CALLS[0])
    batches = bind_batches(graph, CALLS, config)
    trials = Trials(graph, config, "auto", batches)
    for path, router in mod.routers.items():
        trials.mod.routers[path].load_state_dict(router.state_dict())
    expected = {path: fit.solve(0.01) for path, fit in measure(trials, state, batches, draws=2, seed=5).items()}
    found = refit(mod, CALLS, seed=5)
    assert list(found) == ["layers.1", "layers.3"]
    for path, r2 in found.items():
        weight, bias, share = expected[path]
        # Gradients go through fewer nodes where blocks are left out, which rounds them differently.
        torch.testing.assert_close(mod.routers[path].weight[0].double(), weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mod.routers[path].bias[0].double(), bias, rtol=1e-4, atol=1e-6)
        assert r2 == pytest.approx(share, rel=1e-4)


def test_nothing_else_is_touched():
    mod = converted().train()
    mod(CALLS[0]["hidden"]).square().mean().backward()
    others = {name: (parameter.clone(), parameter.grad.clone()) for name, parameter in mod.named_parameters()
              if parameter.grad is not None and not name.startswith("router.")}
    routers = {path: router.weight for path, router in mod.routers.items()}
    before = {path: weight.clone() for path, weight in routers.items()}
    refit(mod, CALLS[:1])
    assert mod.training and len(others) > 10
    for name, (value, grad) in others.items():
        assert torch.equal(mod.get_parameter(name), value) and torch.equal(mod.get_parameter(name).grad, grad)
    for path, router in mod.routers.items():
        # The same objects, which an optimizer may hold.
        assert router.weight is routers[path] and not torch.equal(router.weight, before[path])


def test_it_follows_what_has_become_of_the_model():
    mod = converted()
    first = refit(mod, CALLS), mod.routers["layers.1"].weight.clone()
    assert refit(mod, CALLS) != first[0], "the routers before it have changed"
    with torch.no_grad():
        for name, parameter in mod.named_parameters():
            if name.startswith("layers.3"):
                parameter.copy_(randn(*parameter.shape, seed=8))
    refit(mod, CALLS)
    assert not torch.allclose(mod.routers["layers.1"].weight, first[1], rtol=0.1)


@pytest.mark.parametrize(("options", "found"), [
    ({"gate": "raw"}, 'gate="raw"'), ({"router": "mlp"}, 'router="mlp"'), ({"axis": "sequence"}, 'axis="sequence"')])
def test_what_cannot_be_fitted(options, found):
    mod = mc.convert(Stack(Mlp(), Mlp()), CALLS[0], mc.MoDConfig(**{"gate": "straight-through"} | options))
    with pytest.raises(UsageError, match="these routers cannot be fitted") as caught:
        refit(mod, CALLS)
    assert found in caught.value.details["found"]


def test_no_batches():
    with pytest.raises(UsageError, match="there is nothing to fit routers to"):
        refit(converted(), [])
