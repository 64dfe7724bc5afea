"""Routers are fitted again when it is time, and at no other; what the fit itself gives is calibration's to test."""

from types import SimpleNamespace

import pytest
import torch
from tiny import WIDTH, Mlp, Stack, randn

import modcompile as mc
from modcompile.calibration import refit_routers
from modcompile.errors import UsageError
from modcompile.training import CapacityAnnealing, RouterRefits, WithLoss


def made():
    return mc.convert(Stack(*(Mlp() for _ in range(3))), (randn(2, 9, WIDTH),),
                      mc.MoDConfig(blocks=(0, 1), capacity_ratio=0.5, gate="straight-through"))


def weights(mod):
    return torch.cat([router.weight.detach().clone() for router in mod.routers.values()])


def test_a_loop_fits_them_at_the_given_steps():
    mod, batches = made(), [(randn(2, 9, WIDTH),), (randn(3, 5, WIDTH),)]
    refits, changed = RouterRefits(mod, batches, steps=(0, 3), seed=5), []
    for step in range(5):
        before = weights(mod)
        assert refits.update(step) == (step in (0, 3))
        changed.append(not torch.equal(weights(mod), before))
        with torch.no_grad():
            for name, parameter in mod.named_parameters():
                if not name.startswith("router"):
                    parameter.mul_(1.1)
    assert changed == [True, False, False, True, False]
    assert list(refits.r2) == list(mod.routers) and all(0 <= r2 <= 1 for r2 in refits.r2.values())


def test_options_are_handed_on():
    one, other, batches = made(), made(), [(randn(2, 9, WIDTH),)]
    RouterRefits(one, batches, steps=(1,), ridge=0.5, draws=1, seed=3).update(1)
    refit_routers(other, batches, ridge=0.5, draws=1, seed=3)
    assert torch.equal(weights(one), weights(other))
    refit_routers(other, batches)
    assert not torch.equal(weights(one), weights(other))


def test_the_trainer_lowers_capacities_before_it_fits():
    pytest.importorskip("transformers")
    from modcompile.training.callback import RoutedTraining

    mod = made()
    model, seen = WithLoss(mod), []
    annealing = CapacityAnnealing(mod, steps=2, stages=2)
    refits = RouterRefits(mod, [(randn(2, 9, WIDTH),)], steps=(1,))
    callback = RoutedTraining(model, annealing, refits)
    for step in range(3):
        before = weights(mod)
        callback.on_step_begin(None, SimpleNamespace(global_step=step), None)
        seen.append((mod.routed_blocks[0].capacity_ratio, not torch.equal(weights(mod), before)))
    assert seen == [("1/1", False), ("3/4", True), ("1/2", False)] and model.step == 2


def test_a_step_that_never_comes():
    with pytest.raises(UsageError, match="a step does not fit"):
        RouterRefits(made(), [], steps=(-1,))
