"""Routers are fitted again when it is time, and at no other; what the fit itself gives is calibration's to test."""

import os
import subprocess
import sys
from pathlib import Path
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


def test_routers_that_cannot_be_fitted_are_refused_before_the_first_step():
    mod = mc.convert(Stack(Mlp(), Mlp()), (randn(2, 9, WIDTH),), mc.MoDConfig(router="mlp", gate="straight-through"))
    with pytest.raises(UsageError, match=r"ranks? the rows(.|\n)*router=.mlp"):
        RouterRefits(mod, [(randn(2, 9, WIDTH),)], steps=(100,))


RANKS = '''
import sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny import WIDTH, randn
from training.test_refit import made, weights
from modcompile.errors import UsageError
from modcompile.training import RouterRefits, WithLoss
dist.init_process_group("gloo")
mod = made()
torch.nn.parallel.DistributedDataParallel(mod)
torch.manual_seed(dist.get_rank())
batches = [(torch.randn(2, 9, WIDTH),)]
RouterRefits(mod, batches, steps=(0,)).update(0)
routers = [torch.empty_like(weights(mod)) for _ in range(2)]
dist.all_gather(routers, weights(mod))
assert torch.equal(*routers) and routers[0].abs().max() > 0, "the ranks' routers differ"
if dist.get_rank() == 0:
    torch.save((batches, weights(mod)), {out!r})
fully_shard(mod, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
try:
    RouterRefits(mod, batches, steps=(0,)).update(0)
    raise SystemExit("nothing was refused")
except UsageError as error:
    assert "fitted where the whole model is" in str(error), error
dist.destroy_process_group()
'''


@pytest.mark.long
def test_processes_take_the_routers_of_the_first(tmp_path):
    out, script = tmp_path / "routers.pt", tmp_path / "ranks.py"
    script.write_text(RANKS.format(tests=str(Path(__file__).parents[1]), out=str(out)))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script],
                   check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    batches, routers = torch.load(out)
    mod = made()
    refit_routers(mod, batches)
    torch.testing.assert_close(weights(mod), routers)
